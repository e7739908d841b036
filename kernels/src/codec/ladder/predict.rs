//! Prediction of a token's rounded coefficients from those of tokens before it.
//!
//! Upstairs:   [`super::stream`], between what is coded and what it stands for.
//! Downstairs: [`crate::profile::TokenPredictor`] says how.
//!
//! It works on whole numbers of 16 bits that wrap, and so changes what a part takes, never what it
//! decodes to. Several pairs of coefficients go through the tokens side by side, because one
//! number waits for the one before.
//!
//! Not here on purpose: no choice. Calibration finds out where a prediction pays.

use super::product::{halves, word};
use super::stream::padded;
use crate::profile::TokenPredictor;
use crate::simd::ladder::Work;

/// Pairs of coefficients side by side, and tokens of a square of them.
const WIDE: usize = 8;

/// Goes through the words of a part, pair after pair: with `RESTORE` from what is coded to the
/// coefficients, else back.
pub(super) struct Predict<'a, const RESTORE: bool> {
    predictor: &'a TokenPredictor,
    tokens: usize,
    words: &'a mut [i32],
}

impl<'a, const RESTORE: bool> Predict<'a, RESTORE> {
    pub(super) fn new(predictor: &'a TokenPredictor, tokens: usize, words: &'a mut [i32]) -> Self {
        Self {
            predictor,
            tokens,
            words,
        }
    }
}

/// Lower and upper halves of pairs side by side.
type Lanes = [[i32; WIDE]; 2];

impl<const RESTORE: bool> Work for Predict<'_, RESTORE> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        let padded = padded(self.tokens);
        match self.predictor {
            TokenPredictor::Mean => {}
            TokenPredictor::Anchor { group } => {
                for row in self.words.chunks_exact_mut(padded) {
                    let row = row.get_mut(..self.tokens).unwrap_or_default();
                    for run in row.chunks_mut((*group).into()) {
                        anchor::<RESTORE>(run);
                    }
                }
            }
            TokenPredictor::First { rho } => {
                let blocks = self.words.chunks_mut(WIDE * padded);
                for (block, rho) in blocks.zip(rho.chunks(2 * WIDE)) {
                    let mut both: Lanes = [[0; WIDE]; 2];
                    for (at, rho) in rho.iter().enumerate() {
                        let half = both.get_mut(at % 2).and_then(|half| half.get_mut(at / 2));
                        half.into_iter().for_each(|half| *half = (*rho).into());
                    }
                    first::<RESTORE>(block, (padded, self.tokens), &both);
                }
            }
        }
    }
}

/// All of a run but its first are about the first.
#[inline(always)]
fn anchor<const RESTORE: bool>(run: &mut [i32]) {
    let Some((anchor, others)) = run.split_first_mut() else {
        return;
    };
    let (low, high) = halves(*anchor);
    for other in others {
        let (a, b) = halves(*other);
        *other = match RESTORE {
            true => word(a.wrapping_add(low), b.wrapping_add(high)),
            false => word(a.wrapping_sub(low), b.wrapping_sub(high)),
        };
    }
}

/// Each token of a block of pairs is about a part of the token before.
#[inline(always)]
fn first<const RESTORE: bool>(block: &mut [i32], (padded, tokens): (usize, usize), rho: &Lanes) {
    let mut before: Lanes = [[0; WIDE]; 2];
    for from in (0..tokens).step_by(WIDE) {
        // A square of tokens, each with its pairs side by side.
        let mut square = [[0; WIDE]; WIDE];
        for (pair, row) in block.chunks_exact(padded).enumerate() {
            let own = row.get(from..).and_then(<[i32]>::first_chunk::<WIDE>);
            for (words, word) in square.iter_mut().zip(own.into_iter().flatten()) {
                words
                    .get_mut(pair)
                    .into_iter()
                    .for_each(|place| *place = *word);
            }
        }
        for words in square.iter_mut().take(tokens - from) {
            for lane in 0..WIDE {
                step::<RESTORE>(words, &mut before, rho, lane);
            }
        }
        for (pair, row) in block.chunks_exact_mut(padded).enumerate() {
            let own = row
                .get_mut(from..)
                .and_then(<[i32]>::first_chunk_mut::<WIDE>);
            for (place, words) in own.into_iter().flatten().zip(&square) {
                *place = words.get(pair).copied().unwrap_or(0);
            }
        }
    }
}

#[inline(always)]
#[expect(
    clippy::indexing_slicing,
    reason = "a lane is below the width of all four"
)]
fn step<const RESTORE: bool>(
    words: &mut [i32; WIDE],
    before: &mut Lanes,
    rho: &Lanes,
    lane: usize,
) {
    let coded = words[lane];
    let about = |half: usize| {
        let product = rho[half][lane] * before[half][lane];
        // Ties away from 0.
        (product + 32 + (product >> 31)) >> 6
    };
    let (low, high) = (about(0), about(1));
    let other = match RESTORE {
        true => [(coded << 16 >> 16) + low, (coded >> 16) + high],
        false => [(coded << 16 >> 16) - low, (coded >> 16) - high],
    };
    words[lane] = other[0] & 0xffff | other[1] << 16;
    let whole = if RESTORE { words[lane] } else { coded };
    before[0][lane] = whole << 16 >> 16;
    before[1][lane] = whole >> 16;
}
