//! The coder, one lane after the other: what the faster ones must equal bit for bit.
//!
//! Upstairs:   [`crate::simd`], for the ends of streams, and where there is nothing faster.
//! Downstairs: [`super`].

use super::table::too_large;
use super::{
    Codes, Decoder, LANES, LOW, SCALE, SCALE_BITS, SCALE_U32, STATES_BYTES, Slots, StreamError,
};

/// [`Decoder::run`], a symbol at a time.
pub fn decode(decoder: &mut Decoder<'_>, slots: &Slots, out: &mut [u8]) -> Result<(), StreamError> {
    for step in out.chunks_mut(LANES) {
        for (symbol, state) in step.iter_mut().zip(&mut decoder.states) {
            let at = *state as usize % SCALE;
            let slot = slots.0.get(at).copied().unwrap_or_default();
            *symbol = (slot >> 12).to_le_bytes()[0];
            *state = (slot & 0xfff) * (*state >> SCALE_BITS) + (slot >> 20);
            if *state < LOW {
                let (word, rest) = decoder
                    .words
                    .split_first_chunk()
                    .ok_or(StreamError::Short)?;
                *state = *state << 16 | u32::from(u16::from_le_bytes(*word));
                decoder.words = rest;
            }
        }
    }
    Ok(())
}

/// States and words of a stream while it is encoded, from its end to its front.
#[derive(Debug)]
pub(crate) struct Encoder<'a> {
    pub(crate) states: [u32; LANES],
    /// Room of which the words take the end.
    pub(crate) room: &'a mut [u8],
    /// Where the words begin in it.
    pub(crate) at: usize,
}

impl<'a> Encoder<'a> {
    pub(crate) fn new(room: &'a mut [u8]) -> Self {
        Self {
            states: [LOW; LANES],
            at: room.len(),
            room,
        }
    }

    /// Encodes the steps of `symbols`, the last one first.
    pub(crate) fn run(&mut self, codes: &Codes, symbols: &[u8]) -> Option<()> {
        symbols
            .rchunks(LANES)
            .try_for_each(|step| self.step(codes, step))
    }

    fn step(&mut self, codes: &Codes, step: &[u8]) -> Option<()> {
        for (symbol, state) in step.iter().zip(&mut self.states).rev() {
            let symbol = usize::from(*symbol);
            let share = *codes.shares.get(symbol)?;
            let (frequency, first, shift) = (share & 0xfff, share >> 12 & 0xfff, share >> 24);
            if frequency == 0 {
                return None;
            }
            if *state >= too_large(frequency) {
                let at = self.at.checked_sub(2)?;
                let word = u16::try_from(*state & 0xffff).ok()?;
                self.room
                    .get_mut(at..self.at)?
                    .copy_from_slice(&word.to_le_bytes());
                self.at = at;
                *state >>= 16;
            }
            let product = u64::from(*state) * u64::from(*codes.reciprocal.get(symbol)?);
            let quotient = u32::try_from(product >> 32).ok()? >> shift;
            let missing = if frequency == 1 { SCALE_U32 - 1 } else { 0 };
            *state += first + missing + quotient * (SCALE_U32 - frequency);
        }
        Some(())
    }

    /// Puts states and words to the front of the room, and says how long they are.
    pub(crate) fn end(self) -> Option<usize> {
        let words = self.at..self.room.len();
        let len = STATES_BYTES + words.len();
        // The words move to the front before the states overwrite what was there.
        if self.at < STATES_BYTES {
            return None;
        }
        self.room.copy_within(words, STATES_BYTES);
        let head = self.room.get_mut(..STATES_BYTES)?;
        for (bytes, state) in head.as_chunks_mut::<4>().0.iter_mut().zip(self.states) {
            *bytes = state.to_le_bytes();
        }
        Some(len)
    }
}
