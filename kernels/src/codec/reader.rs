//! Pieces of stored bytes, one after the other.
//!
//! Upstairs:   the lossless levels, those that compare.
//! Downstairs: nothing.

use super::DecodeError;

/// Takes pieces off the stored bytes.
pub(super) struct Reader<'a> {
    pub(super) left: &'a [u8],
    pub(super) total: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let (piece, left) = self
            .left
            .split_at_checked(len)
            .ok_or_else(|| self.truncated(len))?;
        self.left = left;
        Ok(piece)
    }

    pub(super) fn chunk<const N: usize>(&mut self) -> Result<&'a [u8; N], DecodeError> {
        let (piece, left) = self
            .left
            .split_first_chunk()
            .ok_or_else(|| self.truncated(N))?;
        self.left = left;
        Ok(piece)
    }

    fn truncated(&self, len: usize) -> DecodeError {
        DecodeError::Truncated {
            need: self.total - self.left.len() + len,
            have: self.total,
        }
    }
}
