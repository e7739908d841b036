//! Numbers of any bits, one after the other, from the low bits of a byte on.
//!
//! Upstairs:   [`super::classes`].
//! Downstairs: nothing.

/// Most ones that a number of [`Bits::rice`] begins with.
const ONES_MAX: u32 = 32;

/// Writes bits.
#[derive(Debug, Default)]
pub(super) struct Writer {
    pub(super) bytes: Vec<u8>,
    /// Bits that are used of the last byte; 0 when it is full.
    used: u32,
}

impl Writer {
    pub(super) fn put(&mut self, value: u32, bits: u32) {
        let mut left = (u64::from(value), bits);
        while left.1 > 0 {
            if self.used == 0 {
                self.bytes.push(0);
            }
            let fits = left.1.min(8 - self.used);
            let [low, ..] = (left.0 & ((1 << fits) - 1)).to_le_bytes();
            if let Some(byte) = self.bytes.last_mut() {
                *byte |= low << self.used;
            }
            left = (left.0 >> fits, left.1 - fits);
            self.used = (self.used + fits) % 8;
        }
    }

    /// A number that is small as a rule: its quarter as ones and a zero, then two bits.
    pub(super) fn rice(&mut self, value: u32) {
        let mut ones = value / 4;
        while ones > 16 {
            self.put(0xffff, 16);
            ones -= 16;
        }
        self.put(((1 << ones) - 1) | ((value % 4) << (ones + 1)), ones + 3);
    }
}

/// Reads bits; `None` at the end.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// At most 32 bits.
    pub(super) fn get(&mut self, bits: u32) -> Option<u32> {
        let value = self.window() & ((1 << bits) - 1);
        self.skip(bits)?;
        u32::try_from(value).ok()
    }

    pub(super) fn rice(&mut self) -> Option<u32> {
        let window = self.window();
        let ones = window.trailing_ones();
        if ones > ONES_MAX {
            return None;
        }
        self.skip(ones + 3)?;
        let quarter = u32::try_from(window >> (ones + 1) & 3).ok()?;
        Some(4 * ones + quarter)
    }

    /// At least 57 bits from here on, as if zeros followed.
    fn window(&self) -> u64 {
        let bytes = self.bytes.get(self.at / 8..).unwrap_or_default();
        let eight = bytes.first_chunk().copied().unwrap_or_else(|| {
            let mut eight = [0; 8];
            for (to, byte) in eight.iter_mut().zip(bytes) {
                *to = *byte;
            }
            eight
        });
        u64::from_le_bytes(eight) >> (self.at % 8)
    }

    fn skip(&mut self, bits: u32) -> Option<()> {
        self.at += bits as usize;
        (self.at <= 8 * self.bytes.len()).then_some(())
    }

    /// Whether all that is left are the zeros that fill the last byte.
    pub(super) fn ends_here(mut self) -> bool {
        let left = 8 * self.bytes.len() - self.at;
        left < 8 && (0..left).all(|_| self.get(1) == Some(0))
    }
}
