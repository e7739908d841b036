//! Bits as they are, beside the entropy-coded symbols, low bits first.
//!
//! Upstairs:   [`super::part`].
//! Downstairs: nothing.
//!
//! Invariants kept here
//!   X2  Reading beyond the end gives zeros and is found out at the end: nothing is read elsewhere.

/// Most bits of one piece.
pub(super) const PIECE_MAX: u32 = 32;

/// Puts pieces one after the other.
#[derive(Debug)]
pub(super) struct BitWriter<'a> {
    out: &'a mut [u8],
    at: usize,
    held: u64,
    count: u32,
}

impl<'a> BitWriter<'a> {
    pub(super) fn new(out: &'a mut [u8]) -> Self {
        Self {
            out,
            at: 0,
            held: 0,
            count: 0,
        }
    }

    /// Writes the low `len` bits of `bits`, which has no others; `None` when there is no room.
    #[inline(always)]
    pub(super) fn put(&mut self, bits: u32, len: u32) -> Option<()> {
        debug_assert!(len <= PIECE_MAX && u64::from(bits) >> len == 0);
        self.held |= u64::from(bits) << self.count;
        self.count += len;
        if self.count >= 32 {
            let [a, b, c, d, ..] = self.held.to_le_bytes();
            let room = self.out.get_mut(self.at..)?.first_chunk_mut::<4>()?;
            *room = [a, b, c, d];
            self.at += 4;
            self.held >>= 32;
            self.count -= 32;
        }
        Some(())
    }

    /// The bytes that were written, the last one filled up with 0.
    pub(super) fn end(self) -> Option<usize> {
        let len = self.count.div_ceil(8) as usize;
        let room = self.out.get_mut(self.at..self.at + len)?;
        room.copy_from_slice(self.held.to_le_bytes().get(..len)?);
        Some(self.at + len)
    }
}

/// Takes them off again.
#[derive(Debug, Clone, Copy)]
pub(super) struct BitReader<'a> {
    bytes: &'a [u8],
    /// Bits that were taken.
    at: usize,
}

impl<'a> BitReader<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// The next bits, at least [`PIECE_MAX`] of them, without taking them.
    #[inline(always)]
    pub(super) fn peek(&self) -> u64 {
        let rest = self.bytes.get(self.at / 8..).unwrap_or_default();
        let word = match rest.first_chunk::<8>() {
            Some(whole) => u64::from_le_bytes(*whole),
            None => last(rest),
        };
        word >> (self.at % 8)
    }

    /// Takes the next bits.
    #[inline(always)]
    pub(super) const fn skip(&mut self, len: u32) {
        self.at += len as usize;
    }

    /// What was not taken of whole bytes, negative where more was taken than is there; `None`
    /// where bits that fill up the last byte are not 0.
    pub(super) fn end(self) -> Option<isize> {
        let taken = self.at.div_ceil(8);
        let filled = !self.at.is_multiple_of(8) && self.peek() & (0xff >> (self.at % 8)) != 0;
        let left = self.bytes.len().checked_signed_diff(taken)?;
        (left != 0 || !filled).then_some(left)
    }
}

/// Fewer bytes than a word.
#[cold]
fn last(rest: &[u8]) -> u64 {
    let mut word = [0; 8];
    for (to, byte) in word.iter_mut().zip(rest) {
        *to = *byte;
    }
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_come_back_as_they_were_put() {
        let pieces: Vec<(u32, u32)> = (0..400_u32)
            .map(|at| (at * 7 % (PIECE_MAX + 1), at.wrapping_mul(0x9e37_79b9)))
            .map(|(len, bits)| (bits & u32::MAX.unbounded_shr(32 - len), len))
            .collect();
        let mut out = vec![0x55; 4096];
        let mut writer = BitWriter::new(&mut out);
        for (bits, len) in &pieces {
            writer.put(*bits, *len).unwrap();
        }
        let len = writer.end().unwrap();
        let mut reader = BitReader::new(&out[..len]);
        for (bits, len) in &pieces {
            assert_eq!(reader.peek() & ((1 << len) - 1), u64::from(*bits));
            reader.skip(*len);
        }
        assert_eq!(reader.end(), Some(0));
    }

    #[test]
    fn reader_says_what_is_left_or_lacking() {
        let bytes = [1, 2, 3];
        let mut reader = BitReader::new(&bytes);
        reader.skip(16);
        assert_eq!(reader.end(), Some(1));
        let mut reader = BitReader::new(&bytes);
        reader.skip(32);
        assert_eq!((reader.peek(), reader.end()), (0, Some(-1)));
        let mut reader = BitReader::new(&bytes);
        reader.skip(17);
        assert_eq!(reader.end(), None, "3 has bits that no piece took");
    }

    #[test]
    fn writer_refuses_what_does_not_fit() {
        let mut out = [0; 5];
        let mut writer = BitWriter::new(&mut out);
        assert!(writer.put(u32::MAX, 32).is_some() && writer.put(0, 9).is_some());
        assert_eq!(writer.end(), None);
        let mut writer = BitWriter::new(&mut out);
        assert!(writer.put(0, 32).is_some());
        assert_eq!(writer.put(0, 32), None);
    }
}
