//! Codecs: one rung of the ladder each, all behind one trait.
//!
//! Upstairs:   [`registry`] finds them by level; the tier manager encodes, restore decodes.
//! Downstairs: [`raw`], [`lossless`], [`lossless_c`], [`byte_planes`], and the kernels below
//!             them: [`crate::rans`], [`halves`], [`crate::planes`].
//!
//! Invariants kept here
//!   K1  Encoded bytes never exceed [`Codec::stored_bytes_max`], which is the raw size plus at
//!       most [`header::HEADER_BYTES`]: a part that does not shrink is stored as it is.
//!   K2  Decoding sizes everything by the [`PartShape`], never by a length that stands in the
//!       stored bytes; it writes inside `out` only, and memory of its own is bounded.
//!   K3  Decoding answers exactly the bytes that were encoded (an exact level), or always the same
//!       ones within [`Codec::error_in`] (a lossy one), or an error. A coded level proves it by a
//!       CRC of the bytes that decoding must give; level raw leans on the page's CRC.
//!   K4  A part decodes alone, or after those parts of its block that [`Codec::needs`] names: no
//!       other part, page or block is needed.
//!
//! Not here on purpose: no choice of a level. What a request accepts and a tier wants is policy.

use std::fmt;

use kvtier_proto::layout::PartCode;
use kvtier_proto::{Level, Miss, Quality};

use crate::shape::PartShape;

pub mod byte_planes;
pub mod cachegen;
pub mod cachegen_paper;
mod envelope;
pub mod fp8;
pub mod halves;
pub mod header;
pub mod ladder;
pub mod lossless;
pub mod lossless_c;
pub mod quant;
pub mod raw;
mod reader;
pub mod registry;
mod rows;

/// One rung of the codec ladder.
///
/// A codec is immutable and shared between threads. It may keep scratch memory for a thread, of
/// bounded size.
pub trait Codec: Send + Sync + fmt::Debug {
    /// Number that records and messages carry.
    fn level(&self) -> Level;

    /// Name that tables, logs and configuration show.
    fn name(&self) -> &'static str {
        self.level().name().unwrap_or("unnamed")
    }

    /// True when decoding gives back every bit.
    fn exact(&self) -> bool {
        self.level().quality() == Quality::Exact
    }

    /// Identity of the tables of a model that it codes with; 0 for a level that has none. Records
    /// carry it; the header of a part has its lower 16 bits. Parts made with other tables answer
    /// [`DecodeError::TableVersion`], which is a miss upstairs.
    fn tables(&self) -> u32 {
        0
    }

    /// The parts of the same block, by layer and code, that must be restored before this one: a
    /// level that predicts across layers names them, all others none (K4). They come earlier in
    /// every layout.
    fn needs(&self, shape: &PartShape) -> Vec<(u32, PartCode)> {
        let _ = shape;
        Vec::new()
    }

    /// True when parts of this element type and code may be given to it.
    fn applies(&self, shape: &PartShape) -> bool;

    /// Largest encoded size of such a part (K1). Unit: bytes.
    fn stored_bytes_max(&self, shape: &PartShape) -> usize {
        envelope::bytes_max(shape)
    }

    /// Encodes `raw` into the front of `out` and returns the encoded size. Unit: bytes.
    ///
    /// # Errors
    /// [`EncodeError`] when a length is not the one the shape demands or the level does not apply.
    /// `out` may then hold anything.
    fn encode(&self, shape: &PartShape, raw: &[u8], out: &mut [u8]) -> Result<usize, EncodeError>;

    /// Decodes the whole of `stored` into the whole of `out`.
    ///
    /// # Errors
    /// [`DecodeError`] when `stored` is not what this codec makes of a part of this shape. `out`
    /// may then hold anything and must not be published.
    fn decode(&self, shape: &PartShape, stored: &[u8], out: &mut [u8]) -> Result<(), DecodeError>;

    /// [`Codec::encode`] after the parts that it needs, as *decoding* gives them: what both ends
    /// predict from must be the same.
    ///
    /// # Errors
    /// Those of [`Codec::encode`]; [`EncodeError::Needs`] when a part is not there.
    fn encode_after(
        &self,
        shape: &PartShape,
        raw: &[u8],
        restored: &dyn Restored,
        out: &mut [u8],
    ) -> Result<usize, EncodeError> {
        let _ = restored;
        self.encode(shape, raw, out)
    }

    /// [`Codec::encode_after`] for a part that others need: `here` becomes what decoding gives. A
    /// level that finds that out while it encodes hands it over; of others it is decoded.
    ///
    /// # Errors
    /// Those of [`Codec::encode_after`]; `here` is as long as `raw`.
    fn encode_restoring(
        &self,
        shape: &PartShape,
        raw: &[u8],
        restored: &dyn Restored,
        (out, here): (&mut [u8], &mut [u8]),
    ) -> Result<usize, EncodeError> {
        let size = self.encode_after(shape, raw, restored, out)?;
        let stored = out.get(..size).unwrap_or_default();
        let decoded = self.decode_after(shape, stored, restored, here);
        decoded.map_err(|problem| EncodeError::Compressor(std::io::Error::other(problem)))?;
        Ok(size)
    }

    /// [`Codec::decode`] after the parts that it needs.
    ///
    /// # Errors
    /// Those of [`Codec::decode`]; [`DecodeError::Needs`] when a part is not there.
    fn decode_after(
        &self,
        shape: &PartShape,
        stored: &[u8],
        restored: &dyn Restored,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        let _ = restored;
        self.decode(shape, stored, out)
    }

    /// Largest absolute error that any value of this stored part may have, beside the rounding of
    /// the result to its element type. Unit: that of the values; 0 for an exact level.
    ///
    /// # Errors
    /// [`DecodeError`] when `stored` does not begin like a part of this codec and shape.
    fn error_in(&self, shape: &PartShape, stored: &[u8]) -> Result<f32, DecodeError> {
        debug_assert!(self.exact(), "a lossy level says its error");
        let _ = (shape, stored);
        Ok(0.0)
    }
}

/// The parts of a block that were restored already: what a level predicts from.
pub trait Restored {
    /// The raw bytes of a part, as decoding gave them; `None` when it is not restored, or none of
    /// this block.
    fn part(&self, layer: u32, code: PartCode) -> Option<&[u8]>;
}

/// No part is restored.
#[derive(Debug, Clone, Copy, Default)]
pub struct NothingRestored;

impl Restored for NothingRestored {
    fn part(&self, _layer: u32, _code: PartCode) -> Option<&[u8]> {
        None
    }
}

/// Why a part was not encoded. A defect of the caller, or of memory; never of the data.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The raw bytes are not those of the shape.
    #[error("part has {got} raw bytes but its shape says {want}")]
    RawLength {
        /// Bytes of the shape.
        want: usize,
        /// Bytes given.
        got: usize,
    },
    /// The output is shorter than the worst case.
    #[error("encoding needs room for {want} bytes but was given {got}")]
    OutTooSmall {
        /// The worst case, [`Codec::stored_bytes_max`].
        want: usize,
        /// Bytes given.
        got: usize,
    },
    /// The level is not for parts like this.
    #[error(
        "level {name} does not apply to {} parts of {}",
        <&str>::from(shape.code()),
        shape.element().as_str()
    )]
    NotApplicable {
        /// Name of the level.
        name: &'static str,
        /// The part.
        shape: PartShape,
    },
    /// A part that this one is predicted from is not there.
    #[error("level {name} needs the {} part of layer {layer} first", <&str>::from(*code))]
    Needs {
        /// Name of the level.
        name: &'static str,
        /// Its layer.
        layer: u32,
        /// Which tensor of the layer.
        code: PartCode,
    },
    /// The compressor gave up, for want of memory as a rule.
    #[error("the compressor failed")]
    Compressor(#[source] std::io::Error),
}

/// Why stored bytes were refused. A miss upstairs, never an error to the engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The output is not as long as the shape says.
    #[error("output has room for {got} bytes but the shape says {want}")]
    OutLength {
        /// Bytes of the shape.
        want: usize,
        /// Bytes given.
        got: usize,
    },
    /// The stored bytes end too early.
    #[error("stored part ends after {have} bytes but needs {need}")]
    Truncated {
        /// Bytes needed, as far as was read.
        need: usize,
        /// Bytes given.
        have: usize,
    },
    /// The stored bytes go on after the last plane.
    #[error("stored part goes on for {extra} bytes after its end")]
    Trailing {
        /// Bytes too many.
        extra: usize,
    },
    /// A header that no version of this codec writes.
    #[error("header of the stored part has {field} {got}; accepted: {want}")]
    Header {
        /// Field of the header.
        field: &'static str,
        /// What it holds.
        got: u64,
        /// What it must hold.
        want: u64,
    },
    /// Encoded with tables that this codec does not hold.
    #[error("part was coded with tables of version {stored}; this daemon holds version {held}")]
    TableVersion {
        /// Version in the stored header.
        stored: u16,
        /// Version of this codec.
        held: u16,
    },
    /// A part that this one was predicted from is not there.
    #[error("the {} part of layer {layer} must be restored first", <&str>::from(*code))]
    Needs {
        /// Its layer.
        layer: u32,
        /// Which tensor of the layer.
        code: PartCode,
    },
    /// One plane does not decode to its size.
    #[error("plane {plane} of chunk {chunk} does not decode to {want} bytes")]
    Plane {
        /// Index of the chunk.
        chunk: usize,
        /// Index of the plane, most significant byte first.
        plane: usize,
        /// Size it must have.
        want: usize,
        /// What the decompressor said, where it was asked.
        #[source]
        source: Option<std::io::Error>,
    },
    /// An entropy-coded stream is none.
    #[error("stream {stream} of the stored part {source}")]
    Stream {
        /// Index of the stream.
        stream: usize,
        /// What is wrong with it.
        #[source]
        source: crate::rans::StreamError,
    },
    /// Everything decodes, to other bytes than were encoded.
    #[error("decoded part has CRC {got:#010x} but was stored as {want:#010x}")]
    Checksum {
        /// CRC in the stored header.
        want: u32,
        /// CRC of the decoded bytes.
        got: u32,
    },
}

impl DecodeError {
    /// The reason of the miss that it is upstairs.
    ///
    /// ```
    /// use kvtier_kernels::DecodeError;
    /// use kvtier_proto::Miss;
    ///
    /// assert_eq!(DecodeError::Trailing { extra: 1 }.miss(), Miss::Undecodable);
    /// assert_eq!(DecodeError::TableVersion { stored: 2, held: 1 }.miss(), Miss::Unsupported);
    /// ```
    pub const fn miss(&self) -> Miss {
        match self {
            Self::TableVersion { .. } => Miss::Unsupported,
            _ => Miss::Undecodable,
        }
    }
}

/// Checks the lengths that every encoder demands.
pub(crate) fn check_encode(
    codec: &dyn Codec,
    shape: &PartShape,
    raw: &[u8],
    out: &[u8],
) -> Result<(), EncodeError> {
    if !codec.applies(shape) {
        return Err(EncodeError::NotApplicable {
            name: codec.name(),
            shape: *shape,
        });
    }
    let (want, got) = (shape.raw_bytes(), raw.len());
    if want != got {
        return Err(EncodeError::RawLength { want, got });
    }
    let (want, got) = (codec.stored_bytes_max(shape), out.len());
    if got < want {
        return Err(EncodeError::OutTooSmall { want, got });
    }
    Ok(())
}

/// Checks the length that every decoder demands.
pub(crate) fn check_decode(shape: &PartShape, out: &[u8]) -> Result<(), DecodeError> {
    let (want, got) = (shape.raw_bytes(), out.len());
    if want != got {
        return Err(DecodeError::OutLength { want, got });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
