//! Restored parts as the 8-bit integers that others are predicted from.
//!
//! Upstairs:   [`super`], both when encoding and when decoding.
//! Downstairs: [`super::elements`], [`super::rotary`].
//!
//! `u = round((x - centre) * (1 / scale))`, held within -127 and 127; -127 where x is no number. K
//! is read before RoPE.
//!
//! Not here on purpose: no weights.

use kvtier_proto::layout::PartCode;

use super::elements::Rows;
use super::kit::Shared;
use super::product::{Operand, TILE, word};
use super::rotary::Turn;
use crate::codec::Restored;
use crate::profile::{Cross, Input};
use crate::shape::PartShape;
use crate::simd::ladder::{Work, vectorised};

/// Adding it leaves a whole number in the low bits, ties to even, of anything below 2^22.
const ROUND: f32 = 12_582_912.0;

/// The nearest whole number, ties to even, of a number below 2^22 in absolute value.
#[inline(always)]
pub(super) fn whole(number: f32) -> i32 {
    (number + ROUND)
        .to_bits()
        .wrapping_sub(ROUND.to_bits())
        .cast_signed()
}

/// Memory for the integers of a block's tokens.
#[derive(Debug, Default)]
pub(super) struct Inputs {
    words: Vec<i32>,
    row: Vec<f32>,
    numbers: Vec<i16>,
    reciprocals: Vec<f32>,
}

/// A part that is needed and not there.
#[derive(Debug)]
pub(super) struct Missing(pub(super) u32, pub(super) PartCode);

impl Inputs {
    /// Reads all that a part of this shape is predicted from.
    pub(super) fn read<'a>(
        &'a mut self,
        (shared, shape): (&Shared, &PartShape),
        cross: &Cross,
        restored: &dyn Restored,
    ) -> Result<Operand<'a>, Missing> {
        let tokens = shape.tokens() as usize;
        let columns = cross.weights.columns();
        let pairs = columns.div_ceil(2);
        self.numbers.clear();
        self.numbers
            .resize(2 * pairs * tokens.next_multiple_of(TILE), 0);
        let mut from = 0;
        for (layer, code) in &cross.needs {
            let missing = || Missing(*layer, *code);
            let part = shared.profile.part(*layer, *code).ok_or_else(missing)?;
            let width = part.heads * part.dim;
            let own = PartShape::new(shape.element(), shape.tokens(), width)
                .and_then(|own| own.with_heads(part.heads, shape.order()))
                .map_err(|_| missing())?
                .of_layer(*layer, *code)
                .at_position(shape.position());
            let raw = restored.part(*layer, *code).ok_or_else(missing)?;
            let input = part.input.as_ref().ok_or_else(missing)?;
            if raw.len() != own.raw_bytes() {
                return Err(missing());
            }
            self.reciprocals.clear();
            let scales = input.scale.iter();
            self.reciprocals.extend(scales.map(|scale| 1.0 / scale));
            self.row.clear();
            self.row.resize(part.channels(), 0.0);
            let angles = shared.angles(&own, *code);
            vectorised(Quantise {
                raw,
                rows: Rows::of(&own),
                input,
                turn: angles.as_deref().map(|angles| Turn {
                    angles,
                    dim: part.dim as usize,
                }),
                row: &mut self.row,
                reciprocals: &self.reciprocals,
                numbers: self.numbers.chunks_exact_mut(2 * pairs).take(tokens),
                from,
            });
            from += part.channels();
        }
        let pairs_of = self.numbers.as_chunks::<2>().0.iter();
        self.words.clear();
        self.words
            .extend(pairs_of.map(|[low, high]| word(*low, *high)));
        Ok(Operand {
            words: &self.words,
            pair_stride: 1,
            token_stride: pairs,
            pairs,
        })
    }
}

/// Reads one part into its columns of the tokens' rows.
struct Quantise<'a, I> {
    raw: &'a [u8],
    rows: Rows,
    input: &'a Input,
    turn: Option<Turn<'a>>,
    row: &'a mut [f32],
    reciprocals: &'a [f32],
    numbers: I,
    from: usize,
}

impl<'a, I: Iterator<Item = &'a mut [i16]>> Work for Quantise<'_, I> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        for (token, numbers) in self.numbers.enumerate() {
            self.rows.read(self.raw, token, self.row);
            if let Some(turn) = &self.turn {
                turn.back(token, self.row);
            }
            let own = numbers.get_mut(self.from..).unwrap_or_default();
            let how = self.input.centre.iter().zip(self.reciprocals);
            for ((number, value), (centre, reciprocal)) in own.iter_mut().zip(&*self.row).zip(how) {
                let steps = (value - centre) * reciprocal;
                let steps = if steps > -127.0 { steps } else { -127.0 };
                let steps = if steps < 127.0 { steps } else { 127.0 };
                #[expect(clippy::cast_possible_truncation, reason = "held within 127")]
                let whole = whole(steps) as i16;
                *number = whole;
            }
        }
    }
}
