//! What documents take when they are stored: the real codecs, every byte counted.
//!
//! Upstairs:   `kvtier calibrate`; benchmarks that compare documents left out with those learnt
//!             from.
//! Downstairs: [`Ladder`] codes, block after block, as the daemon would.
//!
//! Not here on purpose: no quality. What restored bytes do to a model, only the model shows.

use std::collections::HashMap;
use std::sync::Arc;

use kvtier_proto::Level;
use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::layout::PartCode;
use kvtier_proto::limits::BLOCK_TOKENS_DEFAULT;

use super::each::each;
use super::samples::Document;
use crate::codec::ladder::Ladder;
use crate::codec::{Codec, DecodeError, EncodeError, Restored};
use crate::profile::{Profile, ProfileError};
use crate::shape::{PartShape, ShapeError};

/// What all documents take at one level.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// The level.
    pub level: Level,
    /// As the engine holds them. Unit: bytes.
    pub raw_bytes: u64,
    /// As they are stored. Unit: bytes.
    pub stored_bytes: u64,
    /// The part of them that is K. Unit: bytes.
    pub k_bytes: u64,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MeasureError {
    /// The profile does not fit together.
    #[error("the profile codes nothing")]
    Profile(#[source] ProfileError),
    /// A document is of no shape that a codec takes.
    #[error("a document has parts that no block holds")]
    Shape(#[source] ShapeError),
    /// A part was not encoded.
    #[error("a part cannot be stored")]
    Encode(#[source] EncodeError),
    /// What was encoded does not decode.
    #[error("a stored part cannot be restored")]
    Decode(#[source] DecodeError),
}

/// Stores every block of every document at every level of the profile.
///
/// # Errors
/// [`MeasureError`] says what could not be stored.
pub fn measure(
    profile: Profile,
    documents: &[Document<'_>],
    threads: usize,
) -> Result<Vec<Stored>, MeasureError> {
    let codecs = Ladder::all(Arc::new(profile)).map_err(MeasureError::Profile)?;
    each(threads, &codecs, |codec| {
        let mut all = Stored {
            level: codec.level(),
            raw_bytes: 0,
            stored_bytes: 0,
            k_bytes: 0,
        };
        let block = usize::try_from(BLOCK_TOKENS_DEFAULT).unwrap_or(usize::MAX);
        for document in documents {
            for from in (0..document.tokens()).step_by(block) {
                let to = document.tokens().min(from + block);
                store(codec.as_ref(), document, from..to, &mut all)?;
            }
        }
        Ok(all)
    })
}

/// The parts of a block that were restored.
#[derive(Debug, Default)]
struct Parts(HashMap<(u32, PartCode), Vec<u8>>);

impl Restored for Parts {
    fn part(&self, layer: u32, code: PartCode) -> Option<&[u8]> {
        self.0.get(&(layer, code)).map(Vec::as_slice)
    }
}

/// Stores one block, part after part in the order of layouts.
fn store(
    codec: &dyn Codec,
    document: &Document<'_>,
    tokens: std::ops::Range<usize>,
    all: &mut Stored,
) -> Result<(), MeasureError> {
    let mut parts = Parts::default();
    for layer in 0..document.layers() {
        for code in [PartCode::K, PartCode::V] {
            let tensor = document.tensor(code);
            let [rows, width, heads, position, at] = [
                tokens.len(),
                tensor.width(),
                tensor.heads,
                tokens.start,
                layer,
            ]
            .map(|number| u32::try_from(number).unwrap_or(u32::MAX));
            let shape = PartShape::new(tensor.element, rows, width)
                .and_then(|shape| shape.with_heads(heads, PartOrder::TokenMajor))
                .map_err(MeasureError::Shape)?
                .of_layer(at, code)
                .at_position(position);
            let row = shape.raw_bytes() / tokens.len().max(1);
            let raw = tensor.layer_bytes(layer);
            let raw = raw
                .get(tokens.start * row..tokens.end * row)
                .unwrap_or_default();
            let mut stored = vec![0; codec.stored_bytes_max(&shape)];
            let len = codec
                .encode_after(&shape, raw, &parts, &mut stored)
                .map_err(MeasureError::Encode)?;
            stored.truncate(len);
            all.raw_bytes += raw.len() as u64;
            all.stored_bytes += len as u64;
            if code == PartCode::K {
                all.k_bytes += len as u64;
            }
            let mut back = vec![0; shape.raw_bytes()];
            codec
                .decode_after(&shape, &stored, &parts, &mut back)
                .map_err(MeasureError::Decode)?;
            parts.0.insert((at, code), back);
        }
    }
    Ok(())
}
