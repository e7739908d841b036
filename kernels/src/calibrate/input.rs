//! The samples of one part over all documents, as statistics want them.
//!
//! Upstairs:   the steps of [`super`].
//! Downstairs: [`super::samples`].
//!
//! Sinks are stored exactly by every level, so they are left out of all statistics. K comes back
//! to before RoPE.
//!
//! Not here on purpose: no statistics.

use kvtier_proto::layout::PartCode;
use kvtier_proto::limits::BLOCK_TOKENS_DEFAULT;

use super::algebra::{Samples, narrow};
use super::samples::{Document, SampleError};
use crate::profile::Rope;

/// Documents and how to read them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Input<'a> {
    pub(super) documents: &'a [Document<'a>],
    pub(super) rope: Option<&'a Rope>,
    pub(super) sinks: usize,
}

impl Input<'_> {
    /// Tokens that statistics are made of.
    pub(super) fn tokens(&self) -> usize {
        let kept = |document: &Document<'_>| document.tokens().saturating_sub(self.sinks);
        self.documents.iter().map(kept).sum()
    }

    /// Where blocks of the usual size begin among those tokens.
    pub(super) fn starts(&self) -> Vec<usize> {
        let block = usize::try_from(BLOCK_TOKENS_DEFAULT).unwrap_or(usize::MAX);
        let (mut starts, mut before) = (Vec::new(), 0);
        for document in self.documents {
            let kept = document.tokens().saturating_sub(self.sinks);
            let first = block.saturating_sub(self.sinks).max(1);
            let later = (first..kept).step_by(block);
            starts.extend((0..kept.min(1)).chain(later).map(|at| before + at));
            before += kept;
        }
        starts
    }

    /// One column a token.
    pub(super) fn samples(&self, layer: usize, code: PartCode) -> Result<Samples, SampleError> {
        let mut all = Vec::new();
        let mut width = 0;
        for document in self.documents {
            let tensor = document.tensor(code);
            width = tensor.width();
            let mut values = tensor.layer(layer)?;
            if let (PartCode::K, Some(rope)) = (code, self.rope) {
                for (position, token) in values.chunks_exact_mut(width.max(1)).enumerate() {
                    undo_rope(rope, position, tensor.dim, token);
                }
            }
            all.extend(values.into_iter().skip(self.sinks * width));
        }
        let tokens = all.len() / width.max(1);
        Ok(Samples::from_vec(width, tokens, all))
    }
}

fn undo_rope(rope: &Rope, position: usize, dim: usize, token: &mut [f32]) {
    let pairs = rope.frequencies.len();
    for head in token.chunks_exact_mut(dim.max(1)) {
        for (pair, frequency) in rope.frequencies.iter().enumerate() {
            let angle = position as f64 * frequency;
            let (sin, cos) = (narrow(libm::sin(angle)), narrow(libm::cos(angle)));
            let pair = match rope.rotate_half {
                true => [pair, pair + pairs],
                false => [2 * pair, 2 * pair + 1],
            };
            if let Ok([x, y]) = head.get_disjoint_mut(pair) {
                (*x, *y) = (*x * cos + *y * sin, *y * cos - *x * sin);
            }
        }
    }
}
