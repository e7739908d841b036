//! The raw bytes of a part as rows of numbers, token after token, and back.
//!
//! Upstairs:   [`super::input`] reads, [`super::rows`] writes.
//! Downstairs: the `half` crate, for f16.
//!
//! Not here on purpose: no arithmetic.

use half::f16;
use half::slice::HalfFloatSliceExt;
use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::element::Element;

use crate::shape::PartShape;

/// Where the rows of a part lie in its bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    pub(super) element: Element,
    /// Runs of a row that lie together: 1, or the heads where each has its own run of tokens.
    runs: usize,
    /// Bytes of such a run.
    run: usize,
    /// Bytes from one run to the next.
    stride: usize,
}

impl Rows {
    pub(super) fn of(shape: &PartShape) -> Self {
        let runs = match shape.order() {
            PartOrder::HeadMajor => shape.heads() as usize,
            PartOrder::TokenMajor => 1,
        };
        let run = shape.width() as usize / runs * shape.element().bytes();
        Self {
            element: shape.element(),
            runs,
            run,
            stride: run * shape.tokens() as usize,
        }
    }

    /// Bytes of a row.
    pub(super) const fn bytes(&self) -> usize {
        self.runs * self.run
    }

    /// The runs of a token's row.
    pub(super) fn row<'a>(&self, raw: &'a [u8], token: usize) -> impl Iterator<Item = &'a [u8]> {
        let (run, stride) = (self.run, self.stride);
        (0..self.runs).map(move |at| {
            let from = at * stride + token * run;
            raw.get(from..from + run).unwrap_or_default()
        })
    }

    /// Calls `write` with each run of a token's row, and where in the row it begins.
    #[inline(always)]
    pub(super) fn row_mut(
        &self,
        raw: &mut [u8],
        token: usize,
        mut write: impl FnMut(&mut [u8], usize),
    ) {
        for at in 0..self.runs {
            let from = at * self.stride + token * self.run;
            if let Some(run) = raw.get_mut(from..from + self.run) {
                write(run, at * self.run);
            }
        }
    }

    /// Reads a token's row.
    #[inline(always)]
    pub(super) fn read(&self, raw: &[u8], token: usize, row: &mut [f32]) {
        let size = self.element.bytes();
        for (bytes, row) in self
            .row(raw, token)
            .zip(row.chunks_exact_mut(self.run / size))
        {
            read(self.element, bytes, row);
        }
    }

    /// Writes a token's row, each number as the nearest of the element type, ties to even.
    #[inline(always)]
    pub(super) fn write(&self, raw: &mut [u8], token: usize, row: &[f32]) {
        let size = self.element.bytes();
        self.row_mut(raw, token, |bytes, from| {
            let row = row.get(from / size..).unwrap_or_default();
            write(self.element, row, bytes);
        });
    }
}

/// Largest finite number of an element type.
pub(super) const fn most(element: Element) -> f32 {
    match element {
        Element::F16 => 65504.0,
        Element::Bf16 => f32::from_bits(0x7f7f_0000),
        _ => f32::MAX,
    }
}

#[inline(always)]
fn read(element: Element, bytes: &[u8], row: &mut [f32]) {
    match element {
        Element::Bf16 => {
            for (number, bytes) in row.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *number = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
        Element::F16 => {
            let mut halves = [f16::ZERO; 64];
            for (row, bytes) in row.chunks_mut(64).zip(bytes.chunks(128)) {
                for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *half = f16::from_le_bytes(*bytes);
                }
                let halves = halves.get(..row.len()).unwrap_or_default();
                halves.convert_to_f32_slice(row);
            }
        }
        _ => {
            for (number, bytes) in row.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *number = f32::from_le_bytes(*bytes);
            }
        }
    }
}

#[inline(always)]
fn write(element: Element, row: &[f32], bytes: &mut [u8]) {
    match element {
        Element::Bf16 => {
            for (bytes, number) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(row) {
                let bits = number.to_bits();
                // Nothing that is kept is no number, so that the sum stays below 2^32.
                let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
                let [low, high, ..] = rounded.to_le_bytes();
                *bytes = [low, high];
            }
        }
        Element::F16 => {
            let mut halves = [f16::ZERO; 64];
            for (row, bytes) in row.chunks(64).zip(bytes.chunks_mut(128)) {
                let halves = halves.get_mut(..row.len()).unwrap_or_default();
                halves.convert_from_f32_slice(row);
                for (bytes, half) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(halves) {
                    *bytes = half.to_le_bytes();
                }
            }
        }
        _ => {
            for (bytes, number) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(row) {
                *bytes = number.to_le_bytes();
            }
        }
    }
}
