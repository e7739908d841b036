//! Two predictions of the same text, compared.
//!
//! Upstairs:   `quality`.
//! Downstairs: nothing.
//!
//! Invariants kept here
//!   J4  Equal scores give a divergence of exactly 0 and full agreement: what is left over is
//!       never the arithmetic of the comparison.
//!
//! Not here on purpose: where the scores come from.

use rayon::prelude::*;

/// What changed over the positions of one document, or of several.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Change {
    /// Positions compared.
    pub positions: u32,
    /// Sum of KL(exact | coded). Unit: nats.
    pub divergence: f64,
    /// Positions whose likeliest token is the same.
    pub same_top: u32,
    /// Sum of -log p(next token) over exact KV. Unit: nats.
    pub exact_loss: f64,
    /// The same over coded KV.
    pub coded_loss: f64,
}

impl Change {
    /// Compares scores `[positions, vocab]` of the same tokens; `next` follows each of them.
    pub fn between(exact: &[f32], coded: &[f32], vocab: usize, next: &[u32]) -> Self {
        let rows = exact
            .par_chunks_exact(vocab)
            .zip(coded.par_chunks_exact(vocab));
        let each: Vec<Self> = rows
            .zip(next)
            .map(|((exact, coded), next)| Self::of_position(exact, coded, *next))
            .collect();
        each.iter().fold(Self::default(), |sum, one| sum.and(one))
    }

    fn of_position(exact: &[f32], coded: &[f32], next: u32) -> Self {
        let (p, q) = (Row::new(exact), Row::new(coded));
        let divergence = exact.iter().zip(coded).map(|(exact, coded)| {
            let (log_p, log_q) = (p.log(*exact), q.log(*coded));
            log_p.exp() * (log_p - log_q)
        });
        let at = |scores: &[f32]| {
            let place = usize::try_from(next).unwrap_or(usize::MAX);
            scores.get(place).copied().unwrap_or(f32::NEG_INFINITY)
        };
        Self {
            positions: 1,
            divergence: divergence.sum(),
            same_top: u32::from(likeliest(exact) == likeliest(coded)),
            exact_loss: -p.log(at(exact)),
            coded_loss: -q.log(at(coded)),
        }
    }

    /// Both together.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self {
            positions: self.positions + other.positions,
            divergence: self.divergence + other.divergence,
            same_top: self.same_top + other.same_top,
            exact_loss: self.exact_loss + other.exact_loss,
            coded_loss: self.coded_loss + other.coded_loss,
        }
    }

    /// Mean divergence. Unit: nats a token.
    pub fn kl(&self) -> f64 {
        self.divergence / f64::from(self.positions)
    }

    /// Share of positions with the same likeliest token. Unit: percent.
    pub fn top1(&self) -> f64 {
        100.0 * f64::from(self.same_top) / f64::from(self.positions)
    }

    /// How much larger the perplexity is. Unit: percent.
    pub fn perplexity(&self) -> f64 {
        100.0 * ((self.coded_loss - self.exact_loss) / f64::from(self.positions)).exp_m1()
    }
}

/// Index of the first of the largest scores.
pub fn likeliest(scores: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, &score) in (0..).zip(scores) {
        if score > best.1 {
            best = (token, score);
        }
    }
    best.0
}

/// What turns scores into log probabilities.
struct Row {
    log_sum: f64,
}

impl Row {
    fn new(scores: &[f32]) -> Self {
        let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = scores
            .iter()
            .map(|score| f64::from(*score - top).exp())
            .sum();
        Self {
            log_sum: f64::from(top) + sum.ln(),
        }
    }

    fn log(&self, score: f32) -> f64 {
        f64::from(score) - self.log_sum
    }
}
