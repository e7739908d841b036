//! Level 0, raw: the part as the engine stores it.
//!
//! Upstairs:   [`super::registry`].
//! Downstairs: nothing.
//!
//! No header: stored bytes are the raw bytes, so that a direct read can land a page in the
//! engine's slot without a copy. A caller that did so has nothing to decode.
//!
//! Not here on purpose: no checksum (K3). The page's CRC covers the very same bytes.

use kvtier_proto::Level;

use super::{Codec, DecodeError, EncodeError, check_decode, check_encode};
use crate::shape::PartShape;

/// Level 0: the identity.
#[derive(Debug, Clone, Copy, Default)]
pub struct Raw;

impl Codec for Raw {
    fn level(&self) -> Level {
        Level::RAW
    }

    fn applies(&self, _shape: &PartShape) -> bool {
        true
    }

    fn stored_bytes_max(&self, shape: &PartShape) -> usize {
        shape.raw_bytes()
    }

    fn encode(&self, shape: &PartShape, raw: &[u8], out: &mut [u8]) -> Result<usize, EncodeError> {
        check_encode(self, shape, raw, out)?;
        let have = out.len();
        let room = out.get_mut(..raw.len()).ok_or(EncodeError::OutTooSmall {
            want: raw.len(),
            got: have,
        })?;
        room.copy_from_slice(raw);
        Ok(raw.len())
    }

    fn decode(&self, shape: &PartShape, stored: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
        check_decode(shape, out)?;
        exact_length(stored, out.len())?;
        out.copy_from_slice(stored);
        Ok(())
    }
}

/// Refuses stored bytes that are shorter or longer than the raw part.
pub(super) fn exact_length(stored: &[u8], want: usize) -> Result<(), DecodeError> {
    let have = stored.len();
    match have.checked_sub(want) {
        Some(0) => Ok(()),
        Some(extra) => Err(DecodeError::Trailing { extra }),
        None => Err(DecodeError::Truncated { need: want, have }),
    }
}
