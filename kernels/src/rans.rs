//! Range asymmetric numeral systems over 32 interleaved lanes: the entropy coder of the ladder.
//!
//! Upstairs:   the coded levels of [`crate::codec`].
//! Downstairs: [`mod@reference`] defines the bits; [`crate::simd`] makes the same ones faster.
//!
//! The coder is Duda's (arXiv:1311.2540), interleaved as by Giesen (arXiv:1402.3392). A symbol
//! is a byte. Its frequency is a part of [`SCALE`]; a lane's state is a number of 31 bits that
//! grows and shrinks by words of 16. A stream is
//!
//! | off | len | field  | meaning                                                        |
//! |----:|----:|--------|----------------------------------------------------------------|
//! |   0 | 128 | states | one u32 a lane, in `LOW..2^31`: where decoding begins           |
//! | 128 | 2 n | words  | u16, in the order in which decoding takes them                  |
//!
//! Symbol `i` belongs to lane `i % 32`. A step decodes one symbol of each lane, in the order of
//! lanes; a lane whose state fell below `LOW` takes one word before the next lane is looked at.
//! Lanes, words and steps are those of a GPU's warp: one ballot a step finds everybody's word.
//!
//! Invariants kept here
//!   R1  Frequencies sum to [`SCALE`], at least two of them above 0: no
//!       frequency needs a 13th bit. Making them takes integer arithmetic only.
//!   R2  Decoding ends with every lane where encoding began, and with no word left, or it is an
//!       error: most damage shows here already.
//!   R3  Reading and writing stay inside the slices, whatever they hold.
//!
//! Not here on purpose: no statistics of the data and no choice of symbols.

pub mod reference;
mod table;

pub use table::{Codes, Frequencies, Slots};

/// Lanes of a stream.
pub const LANES: usize = 32;
/// Sum of all frequencies. 12 bits: a table of slots then fits a core's first cache.
pub const SCALE: usize = 1 << SCALE_BITS;
pub(crate) const SCALE_U32: u32 = 1 << SCALE_BITS;
pub(crate) const SCALE_BITS: u32 = 12;
/// Least state of a lane between two symbols.
pub(crate) const LOW: u32 = 1 << 15;
/// Bytes of the states at the front of a stream.
pub const STATES_BYTES: usize = 4 * LANES;

/// Most bytes that a stream of `symbols` symbols takes.
///
/// A symbol costs at most 12 bits, and the words of a lane are at most that, rounded up.
pub const fn stream_bytes_max(symbols: usize) -> usize {
    STATES_BYTES + 2 * symbols
}

/// States and words of a stream while it is decoded.
#[derive(Debug)]
pub struct Decoder<'a> {
    pub(crate) states: [u32; LANES],
    /// Words that were not taken yet.
    pub(crate) words: &'a [u8],
}

/// Why a stream was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// It ends before its symbols do.
    #[error("ends too early")]
    Short,
    /// A state that no encoder leaves.
    #[error("begins with a state that is none")]
    State,
    /// Symbols came out, but not those that went in (R2).
    #[error("does not end where it began")]
    End,
}

impl<'a> Decoder<'a> {
    /// Reads the states that `stream` begins with.
    ///
    /// # Errors
    /// [`StreamError::Short`] and [`StreamError::State`].
    pub fn new(stream: &'a [u8]) -> Result<Self, StreamError> {
        let (head, words) = stream
            .split_first_chunk::<STATES_BYTES>()
            .ok_or(StreamError::Short)?;
        let mut states = [0; LANES];
        for (state, bytes) in states.iter_mut().zip(head.as_chunks::<4>().0) {
            *state = u32::from_le_bytes(*bytes);
            if !(LOW..1 << 31).contains(state) {
                return Err(StreamError::State);
            }
        }
        Ok(Self { states, words })
    }

    /// Decodes as many symbols as `out` is long, a multiple of [`LANES`].
    ///
    /// # Errors
    /// [`StreamError::Short`]; `out` may then hold anything.
    pub fn run(&mut self, slots: &Slots, out: &mut [u8]) -> Result<(), StreamError> {
        crate::simd::rans_decode(self, slots, out)
    }

    /// Checks that nothing is left (R2).
    ///
    /// # Errors
    /// [`StreamError::End`].
    pub fn end(self) -> Result<(), StreamError> {
        let there = self.words.is_empty() && self.states.iter().all(|state| *state == LOW);
        there.then_some(()).ok_or(StreamError::End)
    }
}

/// Encodes `symbols`, a multiple of [`LANES`], into the front of `out`, and returns the size of
/// the stream. `None` when `out` is too short, or a symbol has no code.
pub fn encode(codes: &Codes, symbols: &[u8], out: &mut [u8]) -> Option<usize> {
    crate::simd::rans_encode(codes, symbols, out)
}

/// [`encode`] of runs of symbols with codes of their own, one after the other in one stream. Each
/// is a multiple of [`LANES`] long, and decoded by one [`Decoder::run`].
pub fn encode_runs(runs: &[(&Codes, &[u8])], out: &mut [u8]) -> Option<usize> {
    crate::simd::rans_encode_runs(runs, out)
}

#[cfg(test)]
mod tests;
