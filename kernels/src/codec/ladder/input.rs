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
use super::product::{Bytes, HALF, SQUARE_COLUMNS, Square, TILE};
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
    squares: Vec<Square>,
    row: Vec<f32>,
    numbers: Vec<u8>,
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
    ) -> Result<Bytes<'a>, Missing> {
        let tokens = shape.tokens() as usize;
        let columns = cross.weights.columns();
        let across = columns.div_ceil(SQUARE_COLUMNS);
        // What is not written was written for another part: it is beyond columns or tokens.
        let count = tokens.div_ceil(TILE) * across;
        self.squares.resize(count, Square([0; 2 * HALF]));
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
            self.numbers.resize(part.channels(), 0);
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
                numbers: &mut self.numbers,
                squares: &mut self.squares,
                tokens,
                across,
                from,
            });
            from += part.channels();
        }
        Ok(Bytes {
            squares: &self.squares,
            columns,
        })
    }
}

/// Reads one part into its columns of the tokens' rows.
struct Quantise<'a> {
    raw: &'a [u8],
    rows: Rows,
    input: &'a Input,
    turn: Option<Turn<'a>>,
    row: &'a mut [f32],
    reciprocals: &'a [f32],
    numbers: &'a mut [u8],
    squares: &'a mut [Square],
    tokens: usize,
    /// Squares of a tile.
    across: usize,
    /// The part's first column.
    from: usize,
}

impl Work for Quantise<'_> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        for token in 0..self.tokens {
            self.rows.read(self.raw, token, self.row);
            if let Some(turn) = &self.turn {
                turn.back(token, self.row);
            }
            let how = self.input.centre.iter().zip(self.reciprocals);
            let values = self.numbers.iter_mut().zip(&*self.row);
            for ((number, value), (centre, reciprocal)) in values.zip(how) {
                let steps = (value - centre) * reciprocal;
                let steps = if steps > -127.0 { steps } else { -127.0 };
                let steps = if steps < 127.0 { steps } else { 127.0 };
                #[expect(clippy::cast_possible_truncation, reason = "held within 127")]
                let whole = whole(steps) as i8;
                *number = whole.cast_unsigned();
            }
            let (mut left, mut column) = (&*self.numbers, self.from);
            while !left.is_empty() {
                let inside = column % SQUARE_COLUMNS;
                let count = left.len().min(SQUARE_COLUMNS - inside);
                let own = left.split_off(..count).unwrap_or_default();
                let square = token / TILE * self.across + column / SQUARE_COLUMNS;
                let place = token % TILE * SQUARE_COLUMNS + inside;
                let square = self.squares.get_mut(square);
                if let Some(to) = square.and_then(|to| to.0.get_mut(place..place + count)) {
                    to.copy_from_slice(own);
                }
                column += count;
            }
        }
    }
}
