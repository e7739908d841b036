//! What a part at a level with tables is stored as: exact tokens, escapes, low bits, symbols.
//!
//! | off     | len     | field          | meaning                                             |
//! |--------:|--------:|----------------|-----------------------------------------------------|
//! |       0 |       2 | exact tokens   | how many tokens are kept as they are                |
//! |       2 |       2 | reserved       | zero                                                |
//! |       4 |       4 | escapes        | how many coefficients are beside the stream         |
//! |       8 |     2 e | indices        | u16 each, rising: the exact tokens                  |
//! |         |     e r | rows           | raw bytes of the exact tokens, heads in order       |
//! |         |     6 n | escapes        | place u32, rising; value i16                        |
//! |         |     4 w | low bits       | of each coefficient with `k` of them, 32 tokens     |
//! |         |         |                | after the other: `k` words, lowest first; bit `t`   |
//! |         |         |                | is of token `t`                                     |
//! |         |         | symbols        | one rANS stream, coefficient after coefficient, of  |
//! |         |         |                | each all tokens and then 0 up to a multiple of 32   |
//!
//! A place is `coefficient * padded + token`, `padded` being the tokens up to a multiple of 32.
//! Coefficients that are always 0 have neither low bits nor symbols.
//!
//! Upstairs:   [`super`].
//! Downstairs: [`super::tables`], [`crate::rans`].
//!
//! Invariants kept here
//!   K2  Every size follows from the shape and the tables, or is checked against the bytes that
//!       are left before anything is allocated.
//!
//! Not here on purpose: no arithmetic but of whole numbers.

use super::product::{halves, word};
use super::tables::{self, Table};
use crate::codec::DecodeError;
use crate::profile::{LevelTables, TokenPredictor};
use crate::rans::{Codes, Decoder, LANES, StreamError};
use crate::simd::ladder::{Work, vectorised};

/// Bytes before the indices.
const LEAD_BYTES: usize = 8;
/// Bytes of an escape.
const ESCAPE_BYTES: usize = 6;

/// A coefficient that is not always 0.
#[derive(Debug, Clone, Copy)]
struct Live {
    coefficient: usize,
    table: usize,
    /// Low bits that are stored as they are.
    low: u32,
}

/// How the coefficients of a level are coded.
#[derive(Debug)]
pub(super) struct Coding {
    live: Vec<Live>,
    /// Coefficients up to the last one that is not always 0.
    used: usize,
    channels: usize,
    predictor: TokenPredictor,
}

/// Memory of a part. The words of a pair of coefficients are its tokens', one after the other.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// Words of pairs of coefficients, see [`super::product`].
    pub(super) words: Vec<i32>,
    symbols: Vec<u8>,
    low: Vec<u32>,
    escapes: Vec<(u32, i16)>,
}

/// The exact tokens of a stored part.
#[derive(Debug)]
pub(super) struct Exact<'a> {
    indices: &'a [[u8; 2]],
    rows: &'a [u8],
    row_bytes: usize,
}

impl<'a> Exact<'a> {
    /// Each exact token and its raw bytes.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &'a [u8])> {
        let indices = self.indices.iter().map(|i| u16::from_le_bytes(*i).into());
        indices.zip(self.rows.chunks_exact(self.row_bytes))
    }
}

/// Tokens up to a multiple of the lanes.
pub(super) const fn padded(tokens: usize) -> usize {
    tokens.next_multiple_of(LANES)
}

impl Coding {
    pub(super) fn new(level: &LevelTables) -> Self {
        let live: Vec<_> = (0..)
            .zip(&level.scales)
            .filter_map(|(coefficient, index)| {
                let (table, low) = tables::of(*index)?;
                Some(Live {
                    coefficient,
                    table,
                    low,
                })
            })
            .collect();
        Self {
            used: live.last().map_or(0, |live| live.coefficient + 1),
            live,
            channels: level.scales.len(),
            predictor: level.predictor.clone(),
        }
    }

    /// Pairs of coefficients, as the words lie.
    pub(super) const fn pairs(&self) -> usize {
        self.channels.div_ceil(2)
    }

    /// Runs of coefficients that share a table.
    fn runs(&self) -> impl Iterator<Item = (&'static Table, usize)> {
        let runs = self.live.chunk_by(|a, b| a.table == b.table);
        runs.filter_map(|run| Some((tables::all().get(run.first()?.table)?, run.len())))
    }

    /// Words of low bits for each 32 tokens.
    fn low_words(&self) -> usize {
        self.live.iter().map(|live| live.low as usize).sum()
    }

    /// Reads a stored part of so many tokens, whose raw rows have so many bytes, into the words.
    /// Returns the exact tokens, and how many pairs may be other than 0.
    pub(super) fn decode<'a>(
        &self,
        (tokens, row_bytes): (usize, usize),
        body: &'a [u8],
        memory: &mut Memory,
    ) -> Result<(Exact<'a>, usize), DecodeError> {
        let mut reader = Reader { body, left: body };
        let [e0, e1, r0, r1, n0, n1, n2, n3] = *reader.array::<LEAD_BYTES>()?;
        if (r0, r1) != (0, 0) {
            let got = u16::from_le_bytes([r0, r1]).into();
            return Err(header("reserved", got, 0));
        }
        let count = usize::from(u16::from_le_bytes([e0, e1]));
        if count > tokens {
            return Err(header("exact tokens", count as u64, tokens as u64));
        }
        let indices = reader.take(2 * count)?.as_chunks::<2>().0;
        let number = |index: &[u8; 2]| usize::from(u16::from_le_bytes(*index));
        let rising = indices.array_windows().all(|[a, b]| number(a) < number(b));
        let last = indices.last().map_or(0, number);
        if !rising || last >= tokens {
            return Err(header("exact token", last as u64, tokens as u64 - 1));
        }
        let rows = reader.take(count * row_bytes)?;
        let padded = padded(tokens);
        let escapes = u32::from_le_bytes([n0, n1, n2, n3]) as usize;
        let escapes = reader.take(escapes.saturating_mul(ESCAPE_BYTES))?;
        let low = reader.take(4 * self.low_words() * (padded / LANES))?;
        memory.low.clear();
        let words = low.as_chunks::<4>().0.iter();
        memory
            .low
            .extend(words.map(|word| u32::from_le_bytes(*word)));
        self.symbols(padded, reader.left, memory)
            .map_err(|source| DecodeError::Stream { stream: 0, source })?;
        memory.words.clear();
        memory.words.resize(self.pairs() * padded, 0);
        vectorised(Widen {
            live: &self.live,
            padded,
            memory,
        });
        let used = self.escape(escapes, padded, memory)?;
        self.restore(tokens, padded, &mut memory.words);
        let exact = Exact {
            indices,
            rows,
            row_bytes,
        };
        let words = &mut memory.words;
        for (token, _) in exact.iter() {
            forget(words, padded, token);
        }
        Ok((exact, used))
    }

    fn symbols(
        &self,
        padded: usize,
        stream: &[u8],
        memory: &mut Memory,
    ) -> Result<(), StreamError> {
        memory.symbols.resize(self.live.len() * padded, 0);
        let mut decoder = Decoder::new(stream)?;
        let mut left = memory.symbols.as_mut_slice();
        for (table, count) in self.runs() {
            let own = left.split_off_mut(..count * padded);
            decoder.run(&table.slots, own.unwrap_or_default())?;
        }
        decoder.end()
    }

    /// Puts the escapes where they belong, and returns how many pairs may be other than 0.
    fn escape(
        &self,
        escapes: &[u8],
        padded: usize,
        memory: &mut Memory,
    ) -> Result<usize, DecodeError> {
        let (mut next, mut used) = (0, self.used);
        for escape in escapes.as_chunks::<ESCAPE_BYTES>().0 {
            let [a, b, c, d, e, f] = *escape;
            let place = u32::from_le_bytes([a, b, c, d]) as usize;
            let most = self.channels * padded - 1;
            if place < next || place > most {
                return Err(header("escape", place as u64, most as u64));
            }
            next = place + 1;
            let coefficient = place / padded;
            used = used.max(coefficient + 1);
            let value = i16::from_le_bytes([e, f]);
            set(
                &mut memory.words,
                padded,
                (coefficient, place % padded),
                value,
            );
        }
        Ok(used.div_ceil(2))
    }

    /// Adds to the coefficients of each token what was predicted of them.
    fn restore(&self, tokens: usize, padded: usize, words: &mut [i32]) {
        self.each(tokens, padded, words, |value, predicted| {
            let value = value.wrapping_add(predicted);
            (value, value)
        });
    }

    /// Subtracts it.
    fn leave(&self, tokens: usize, padded: usize, words: &mut [i32]) {
        self.each(tokens, padded, words, |value, predicted| {
            (value.wrapping_sub(predicted), value)
        });
    }

    /// Goes through the tokens of each coefficient: `step` makes of a number and its prediction
    /// what stands there then, and what the number itself is.
    fn each(
        &self,
        tokens: usize,
        padded: usize,
        words: &mut [i32],
        step: impl Fn(i16, i16) -> (i16, i16),
    ) {
        if self.predictor == TokenPredictor::Mean {
            return;
        }
        for coefficient in 0..self.channels {
            let mut from = 0;
            for token in 0..tokens {
                let place = (coefficient, token);
                let value = get(words, padded, place);
                let (rest, whole) = step(value, self.predicted(place, from));
                from = match &self.predictor {
                    TokenPredictor::Anchor { group }
                        if !token.is_multiple_of(usize::from(*group)) =>
                    {
                        from
                    }
                    _ => whole,
                };
                set(words, padded, place, rest);
            }
        }
    }

    /// What is predicted of a token's coefficient, `from` being that of the token before or of
    /// the anchor.
    fn predicted(&self, (coefficient, token): (usize, usize), from: i16) -> i16 {
        match &self.predictor {
            TokenPredictor::Mean => 0,
            TokenPredictor::Anchor { group } => match token.is_multiple_of(usize::from(*group)) {
                true => 0,
                false => from,
            },
            TokenPredictor::First { rho } => {
                let rho = rho.get(coefficient).copied().unwrap_or(0);
                let product = i32::from(rho) * i32::from(from);
                let rounded = (product.abs() + 32) / 64 * product.signum();
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "128 / 64 may wrap: so be it"
                )]
                let rounded = rounded as i16;
                rounded
            }
        }
    }

    /// Writes the words of so many tokens, of which `exact` are kept as they are, each with its
    /// row, and returns the size; `None` when it does not fit. The words are then other ones.
    pub(super) fn encode<'a>(
        &self,
        tokens: usize,
        exact: &[usize],
        rows: impl Iterator<Item = &'a [u8]>,
        memory: &mut Memory,
        out: &mut [u8],
    ) -> Option<usize> {
        let padded = padded(tokens);
        self.leave(tokens, padded, &mut memory.words);
        self.narrow(tokens, padded, memory)?;
        let whole = out.len();
        let mut out = out;
        let mut put = |bytes: &[u8]| -> Option<()> {
            let place = out.split_off_mut(..bytes.len())?;
            place.copy_from_slice(bytes);
            Some(())
        };
        put(&u16::try_from(exact.len()).ok()?.to_le_bytes())?;
        put(&[0; 2])?;
        put(&u32::try_from(memory.escapes.len()).ok()?.to_le_bytes())?;
        for index in exact {
            put(&u16::try_from(*index).ok()?.to_le_bytes())?;
        }
        for row in rows {
            put(row)?;
        }
        for (place, value) in &memory.escapes {
            put(&place.to_le_bytes())?;
            put(&value.to_le_bytes())?;
        }
        for word in &memory.low {
            put(&word.to_le_bytes())?;
        }
        let mut left = memory.symbols.as_slice();
        let mut runs: Vec<(&Codes, &[u8])> = Vec::new();
        for (table, count) in self.runs() {
            runs.push((&table.codes, left.split_off(..count * padded)?));
        }
        let before = whole - out.len();
        Some(before + crate::rans::encode_runs(&runs, out)?)
    }

    /// Makes symbols, low bits and escapes of the words.
    fn narrow(&self, tokens: usize, padded: usize, memory: &mut Memory) -> Option<()> {
        let Memory {
            words,
            symbols,
            low,
            escapes,
        } = memory;
        symbols.clear();
        symbols.resize(self.live.len() * padded, 0);
        low.clear();
        escapes.clear();
        let mut live = self
            .live
            .iter()
            .zip(symbols.chunks_exact_mut(padded))
            .peekable();
        for coefficient in 0..self.channels {
            let own = live.next_if(|(live, _)| live.coefficient == coefficient);
            let mut own = own.map(|(live, row)| (live.low, tables::all().get(live.table), row));
            let first = low.len();
            if let Some((bits, ..)) = own {
                low.resize(first + bits as usize * (padded / LANES), 0);
            }
            for token in 0..tokens {
                let value = get(words, padded, (coefficient, token));
                let Some((bits, Some(table), row)) = &mut own else {
                    if value != 0 {
                        escapes.push((place(padded, coefficient, token)?, value));
                    }
                    continue;
                };
                let half = if *bits > 0 { 1 << (*bits - 1) } else { 0 };
                let moved = i32::from(value) + half;
                let symbol = moved >> *bits;
                if symbol.abs() > table.reach.into() {
                    escapes.push((place(padded, coefficient, token)?, value));
                    continue;
                }
                *row.get_mut(token)? = symbol.to_le_bytes()[0];
                let words = low.get_mut(first + token / LANES * *bits as usize..)?;
                for (bit, word) in (0..*bits).zip(words) {
                    *word |= (moved.cast_unsigned() >> bit & 1) << (token % LANES);
                }
            }
        }
        Some(())
    }
}

fn place(padded: usize, coefficient: usize, token: usize) -> Option<u32> {
    u32::try_from(coefficient * padded + token).ok()
}

/// A coefficient of a token.
pub(super) fn get(words: &[i32], padded: usize, (coefficient, token): (usize, usize)) -> i16 {
    let at = coefficient / 2 * padded + token;
    let (low, high) = halves(words.get(at).copied().unwrap_or(0));
    if coefficient.is_multiple_of(2) {
        low
    } else {
        high
    }
}

/// Sets a coefficient of a token.
pub(super) fn set(
    words: &mut [i32],
    padded: usize,
    (coefficient, token): (usize, usize),
    value: i16,
) {
    let at = coefficient / 2 * padded + token;
    if let Some(place) = words.get_mut(at) {
        let (low, high) = halves(*place);
        *place = match coefficient.is_multiple_of(2) {
            true => word(value, high),
            false => word(low, value),
        };
    }
}

/// Sets all coefficients of a token to 0.
pub(super) fn forget(words: &mut [i32], padded: usize, token: usize) {
    let own = words.iter_mut().skip(token).step_by(padded);
    own.for_each(|word| *word = 0);
}

/// Makes words of symbols and low bits.
struct Widen<'a> {
    live: &'a [Live],
    padded: usize,
    memory: &'a mut Memory,
}

impl Work for Widen<'_> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        let mut low = self.memory.low.as_slice();
        let rows = self.memory.symbols.chunks_exact(self.padded);
        for (live, symbols) in self.live.iter().zip(rows) {
            let from = live.coefficient / 2 * self.padded;
            let own = from..from + self.padded;
            let words = self.memory.words.get_mut(own).unwrap_or_default();
            let shift = if live.coefficient.is_multiple_of(2) {
                0
            } else {
                16
            };
            let bits = live.low;
            let half = if bits > 0 { 1 << (bits - 1) } else { 0 };
            let steps = words.as_chunks_mut::<LANES>().0.iter_mut();
            for (words, symbols) in steps.zip(symbols.as_chunks::<LANES>().0) {
                let mut below = [-half; LANES];
                let own = low.split_off(..bits as usize).unwrap_or_default();
                for (bit, word) in (0..bits).zip(own) {
                    for (lane, below) in (0_u32..).zip(&mut below) {
                        *below += ((*word >> lane & 1) << bit).cast_signed();
                    }
                }
                for ((word, symbol), below) in words.iter_mut().zip(symbols).zip(below) {
                    let value = (i32::from(symbol.cast_signed()) << bits).wrapping_add(below);
                    *word |= (value & 0xffff) << shift;
                }
            }
        }
    }
}

struct Reader<'a> {
    body: &'a [u8],
    left: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let have = self.body.len();
        let need = (have - self.left.len()).saturating_add(len);
        let taken = self.left.split_off(..len);
        taken.ok_or(DecodeError::Truncated { need, have })
    }

    fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], DecodeError> {
        let taken = self.take(N)?;
        let (need, have) = (N, taken.len());
        taken
            .first_chunk()
            .ok_or(DecodeError::Truncated { need, have })
    }
}

const fn header(field: &'static str, got: u64, want: u64) -> DecodeError {
    DecodeError::Header { field, got, want }
}
