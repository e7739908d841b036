//! RoPE and back, in single precision, alike on every machine.
//!
//! Upstairs:   [`super::rows`] rotates what it restores, [`super::input`] undoes it.
//! Downstairs: `libm` for sines and cosines.
//!
//! Products and sums are rounded one by one and never fused.
//!
//! Invariants kept here
//!   T1  The angle is a product in double precision, its sine and cosine are `libm`'s, and both
//!       are rounded to single precision: every machine turns by the same.
//!
//! Not here on purpose: no engine's own way of rounding. What decoding gives is within the error
//! that the level declares, and that is measured on what the engine stored.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::profile::Rope;
use crate::rans::LANES;
use crate::shape::PartShape;

/// Blocks whose angles are kept: all K parts of one block have the same.
const KEPT: usize = 8;

/// Cosines and sines of a block's tokens.
#[derive(Debug)]
pub(super) struct Angles {
    pairs: usize,
    rotate_half: bool,
    /// Of each token, those of all pairs.
    cosines: Vec<f32>,
    sines: Vec<f32>,
    /// The same, group after group and of each its pairs.
    side_by_side: OnceLock<Vec<SideBySide>>,
}

/// Cosines and sines of a pair for a group of tokens.
pub(super) type SideBySide = [[f32; LANES]; 2];

/// How the rows of a part are turned.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn<'a> {
    pub(super) angles: &'a Angles,
    /// Channels of a head.
    pub(super) dim: usize,
}

/// Position of the first token, and tokens.
type Place = (u32, u32);

/// The angles of the blocks that were asked for last.
#[derive(Debug, Default)]
pub(super) struct AngleCache(Mutex<Vec<(Place, Arc<Angles>)>>);

impl AngleCache {
    pub(super) fn of(&self, rope: &Rope, shape: &PartShape) -> Arc<Angles> {
        let key = (shape.position(), shape.tokens());
        let kept = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, angles)) = kept().iter().find(|(place, _)| *place == key) {
            return Arc::clone(angles);
        }
        let angles = Arc::new(Angles::new(rope, key));
        let mut kept = kept();
        kept.truncate(KEPT - 1);
        kept.insert(0, (key, Arc::clone(&angles)));
        angles
    }
}

impl Angles {
    fn new(rope: &Rope, (position, tokens): Place) -> Self {
        let count = rope.frequencies.len() * tokens as usize;
        let (mut cosines, mut sines) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for token in 0..tokens {
            let at = f64::from(position) + f64::from(token);
            for frequency in &rope.frequencies {
                let (sine, cosine) = libm::sincos(at * frequency);
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "rounding to single precision is meant (T1)"
                )]
                let (sine, cosine) = (sine as f32, cosine as f32);
                sines.push(sine);
                cosines.push(cosine);
            }
        }
        Self {
            pairs: rope.frequencies.len(),
            rotate_half: rope.rotate_half,
            cosines,
            sines,
            side_by_side: OnceLock::new(),
        }
    }
}

impl Angles {
    /// Cosines and sines of each pair for a group of tokens side by side; 0 where there is no
    /// token.
    pub(super) fn group(&self, index: usize) -> &[SideBySide] {
        let pairs = self.pairs;
        let all = self.side_by_side.get_or_init(|| {
            let tokens = self.cosines.len() / pairs.max(1);
            let groups = (0..tokens).step_by(LANES);
            let each = groups.flat_map(|from| (0..pairs).map(move |pair| (from, pair)));
            let of = |all: &[f32], (from, pair): (usize, usize)| {
                std::array::from_fn(|token| {
                    let at = (from + token) * pairs + pair;
                    all.get(at).copied().unwrap_or(0.0)
                })
            };
            each.map(|at| [of(&self.cosines, at), of(&self.sines, at)])
                .collect()
        });
        all.get(index * pairs..(index + 1) * pairs)
            .unwrap_or_default()
    }
}

impl Turn<'_> {
    /// Turns the heads of a token's row.
    #[inline(always)]
    pub(super) fn forth(&self, token: usize, row: &mut [f32]) {
        self.each(token, row, |a, b, c, s| (a * c - b * s, b * c + a * s));
    }

    /// Turns them back.
    #[inline(always)]
    pub(super) fn back(&self, token: usize, row: &mut [f32]) {
        self.each(token, row, |a, b, c, s| (a * c + b * s, b * c - a * s));
    }

    #[inline(always)]
    fn each(&self, token: usize, row: &mut [f32], turn: impl Fn(f32, f32, f32, f32) -> (f32, f32)) {
        let n = self.angles.pairs;
        let own = token * n..(token + 1) * n;
        let cosines = self.angles.cosines.get(own.clone()).unwrap_or_default();
        let sines = self.angles.sines.get(own).unwrap_or_default();
        for head in row.chunks_exact_mut(self.dim) {
            let Some(head) = head.get_mut(..2 * n) else {
                continue;
            };
            if self.angles.rotate_half {
                let (first, second) = head.split_at_mut(n);
                let pairs = first.iter_mut().zip(second);
                for ((a, b), (c, s)) in pairs.zip(cosines.iter().zip(sines)) {
                    (*a, *b) = turn(*a, *b, *c, *s);
                }
            } else {
                let pairs = head.as_chunks_mut::<2>().0.iter_mut();
                for ([a, b], (c, s)) in pairs.zip(cosines.iter().zip(sines)) {
                    (*a, *b) = turn(*a, *b, *c, *s);
                }
            }
        }
    }
}
