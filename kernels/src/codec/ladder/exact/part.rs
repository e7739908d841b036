//! The stream of a part: which tokens are kept as they are, symbols, and the bits beside them.
//!
//! | what    | bytes                                                                           |
//! |---------|---------------------------------------------------------------------------------|
//! | kept    | a bit a token, low bits first: 1 where it is kept as it is                      |
//! | rows    | the bytes of those tokens, heads in order                                       |
//! | length  | u32: bytes of the symbols                                                       |
//! | symbols | rANS: for each group of 32 tokens, for each channel in the order of coding, one |
//! |         | step with the channel's table; 0 where a token is kept or there is none         |
//! | bits    | in the same order, what each symbol leaves open ([`cells`]); the last byte is   |
//! |         | filled up with 0                                                                |
//!
//! Upstairs:   [`super`].
//! Downstairs: [`super::predict`], [`cells`], [`super::bits`], [`crate::rans`].
//!
//! Invariants kept here
//!   K2  Everything is sized by the shape; what the stream says of lengths is checked against it.
//!   X1  Every 16 bits come back as they were.
//!
//! [`cells`]: crate::codec::ladder::cells

use super::bits::{BitReader, BitWriter, PIECE_MAX};
use super::kit::{Block, Kit, PAIRS};
use super::predict::{Channel, GROUP, Lanes, Predict, Rows};
use crate::codec::DecodeError;
use crate::codec::ladder::cells::{Coded, ESCAPE, Form, low};
use crate::codec::ladder::elements;
use crate::codec::ladder::product::{Column, Operand, PANEL, TILE};
use crate::codec::reader::Reader;
use crate::profile::exact::WITHIN;
use crate::rans::{self, Codes, Decoder, STATES_BYTES, Slots};
use crate::simd;
use crate::simd::ladder::vectorised;

/// Tiles of a group.
const TILES: usize = GROUP / TILE;
/// Words of a pair of columns for a group.
type PairWords = [i32; TILE];

/// Memory of one part, kept between parts.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// What a group is predicted from: for each tile, its pairs of columns.
    pub(super) words: Vec<PairWords>,
    sums: Vec<[Column; TILE]>,
    /// Bits of a group's values, by place in the order of coding.
    values: Vec<Lanes<u16>>,
    symbols: Vec<u8>,
    pieces: Vec<Lanes<Coded>>,
    row: Vec<u8>,
}

/// All that a part is coded with.
pub(super) struct Part<'a> {
    pub(super) kit: &'a Kit,
    pub(super) form: Form,
    pub(super) rows: elements::Rows,
    pub(super) tokens: usize,
    /// Channels of all that the part is predicted from.
    pub(super) needed: usize,
}

/// Reads what a group of tokens, from one on, is predicted from into the words of its tiles.
pub(super) type ReadInputs<'a> = dyn FnMut(usize, &mut [PairWords]) + 'a;
/// Finds the cosines and sines of a group of tokens.
pub(super) type FindAngles<'a> = dyn Fn(usize) -> &'a [[Lanes<f32>; 2]] + 'a;

impl Part<'_> {
    fn channels(&self) -> usize {
        self.kit.order.len()
    }

    fn kept_bytes(&self) -> usize {
        self.tokens.div_ceil(8)
    }

    fn pairs(&self) -> usize {
        (self.needed + self.channels()) / 2
    }

    /// Goes through the blocks of a group.
    fn group<C: Channel>(
        &self,
        (words, sums): (&mut [PairWords], &mut Vec<[Column; TILE]>),
        angles: &[[Lanes<f32>; 2]],
        mut channel: C,
    ) -> Option<()> {
        let pairs = self.pairs();
        for (index, block) in self.kit.blocks.iter().enumerate() {
            let mut base: Rows<f32> = block.bias.map(|bias| [bias; GROUP]);
            if let Some(weights) = &block.weights {
                let with = Operand {
                    words: words.as_flattened(),
                    pair_stride: TILE,
                    tile_stride: pairs * TILE,
                    pairs,
                };
                for tile in 0..TILES {
                    simd::ladder::product(weights, &with, tile, sums);
                    let [sums] = sums.as_slice() else { return None };
                    add(&mut base, (&block.scale, sums), tile * TILE);
                }
            }
            let mut own = [[0; GROUP]; PAIRS];
            vectorised(Predict {
                block,
                base: &base,
                angles,
                channel: &mut channel,
                words: &mut own,
            })?;
            let first = self.needed / 2 + index * PAIRS;
            for (tile, words) in words.chunks_exact_mut(pairs).enumerate() {
                let places = words.get_mut(first..)?.iter_mut();
                for (place, own) in places.zip(own.iter().take(block.pairs)) {
                    *place = *own.as_chunks().0.get(tile)?;
                }
            }
        }
        Some(())
    }

    /// Decodes a stream into `out`, the raw bytes of the part.
    pub(super) fn decode(
        &self,
        (body, out): (&[u8], &mut [u8]),
        memory: &mut Memory,
        (inputs, angles): (&mut ReadInputs<'_>, &FindAngles<'_>),
    ) -> Result<(), DecodeError> {
        let mut stored = Reader {
            left: body,
            total: body.len(),
        };
        let kept = stored.take(self.kept_bytes())?;
        let is_kept = |token: usize| bit(kept, token);
        let beyond = self.tokens..8 * kept.len();
        if let Some(token) = beyond.into_iter().find(|token| is_kept(*token)) {
            return Err(DecodeError::Header {
                field: "kept token",
                got: token as u64,
                want: self.tokens as u64,
            });
        }
        for token in (0..self.tokens).filter(|token| is_kept(*token)) {
            let row = stored.take(self.rows.bytes())?;
            self.rows.copy_from(out, token, row);
        }
        let coded = u32::from_le_bytes(*stored.chunk()?) as usize;
        let wrong = |source| DecodeError::Stream { stream: 0, source };
        let mut decoder = Decoder::new(stored.take(coded)?).map_err(wrong)?;
        let mut reader = BitReader::new(stored.left);
        let channels = self.channels();
        memory.words.resize(self.pairs() * TILES, [0; TILE]);
        memory.values.resize(channels, [0; GROUP]);
        memory.symbols.resize(channels * GROUP, 0);
        for from in (0..self.tokens).step_by(GROUP) {
            inputs(from, &mut memory.words);
            let places = memory.symbols.chunks_exact_mut(GROUP);
            for (symbols, slots) in places.zip(self.slots()) {
                decoder.run(slots, symbols).map_err(wrong)?;
            }
            let free: Lanes<bool> = std::array::from_fn(|lane| {
                let token = from + lane;
                token >= self.tokens || is_kept(token)
            });
            if free.contains(&true) {
                self.read_values(out, from, (&mut memory.values, &mut memory.row));
            }
            let channel = Decode {
                form: self.form,
                symbols: memory.symbols.as_chunks().0,
                values: &mut memory.values,
                free: &free,
                bits: &mut reader,
            };
            let (words, sums) = (&mut memory.words, &mut memory.sums);
            let done = self.group((words, sums), angles(from), channel);
            done.ok_or(DecodeError::Header {
                field: "channels",
                got: channels as u64,
                want: channels as u64,
            })?;
            self.write_values(&memory.values, out, from, &mut memory.row);
        }
        decoder.end().map_err(wrong)?;
        Self::ended(reader, body.len())
    }

    /// Whether a stream ends where its last bit does.
    fn ended(reader: BitReader<'_>, len: usize) -> Result<(), DecodeError> {
        match reader.end() {
            Some(0) => Ok(()),
            Some(extra) if extra > 0 => Err(DecodeError::Trailing {
                extra: extra.unsigned_abs(),
            }),
            Some(lacking) => Err(DecodeError::Truncated {
                need: len + lacking.unsigned_abs(),
                have: len,
            }),
            None => Err(DecodeError::Header {
                field: "bits after the last",
                got: 1,
                want: 0,
            }),
        }
    }

    fn slots(&self) -> impl Iterator<Item = &'static Slots> {
        let blocks = self.kit.blocks.iter();
        let tables = blocks.flat_map(|block| block.tables.iter().take(2 * block.pairs));
        tables.map(|table| &table.slots)
    }

    fn codes(&self) -> impl Iterator<Item = &'static Codes> {
        let blocks = self.kit.blocks.iter();
        let tables = blocks.flat_map(|block| block.tables.iter().take(2 * block.pairs));
        tables.map(|table| &table.codes)
    }

    /// Encodes `raw` into the front of `out`, and says how long the stream is; `None` when it does
    /// not fit. The first `sinks` tokens are kept as they are.
    pub(super) fn encode(
        &self,
        (raw, out, sinks): (&[u8], &mut [u8], usize),
        memory: &mut Memory,
        (inputs, angles): (&mut ReadInputs<'_>, &FindAngles<'_>),
    ) -> Option<usize> {
        let channels = self.channels();
        let groups = self.tokens.div_ceil(GROUP);
        memory.words.resize(self.pairs() * TILES, [0; TILE]);
        memory.values.resize(channels, [0; GROUP]);
        memory.pieces.clear();
        memory.pieces.reserve(groups * channels);
        let mut kept = vec![0; self.kept_bytes()];
        for from in (0..self.tokens).step_by(GROUP) {
            inputs(from, &mut memory.words);
            self.read_values(raw, from, (&mut memory.values, &mut memory.row));
            let first = memory.pieces.len();
            let mut costs = [0.0; GROUP];
            let channel = Encode {
                form: self.form,
                values: &memory.values,
                pieces: &mut memory.pieces,
                costs: &mut costs,
            };
            let (words, sums) = (&mut memory.words, &mut memory.sums);
            self.group((words, sums), angles(from), channel)?;
            // What takes more room than its bits is kept.
            let most = 16.0 * channels as f32;
            for (lane, cost) in costs.into_iter().enumerate() {
                let token = from + lane;
                let keep = token < sinks || cost > most;
                if keep && let Some(byte) = kept.get_mut(token / 8).filter(|_| token < self.tokens)
                {
                    *byte |= 1 << (token % 8);
                }
                if keep || token >= self.tokens {
                    for piece in memory.pieces.iter_mut().skip(first) {
                        *piece.get_mut(lane)? = NOTHING;
                    }
                }
            }
        }
        self.put((raw, out), &kept, (&memory.pieces, &mut memory.symbols))
    }

    /// Writes the stream.
    fn put(
        &self,
        (raw, out): (&[u8], &mut [u8]),
        kept: &[u8],
        (pieces, symbols): (&[Lanes<Coded>], &mut Vec<u8>),
    ) -> Option<usize> {
        let whole = out.len();
        let (place, mut room) = out.split_at_mut_checked(kept.len())?;
        place.copy_from_slice(kept);
        for token in (0..self.tokens).filter(|token| bit(kept, *token)) {
            for run in self.rows.row(raw, token) {
                let (place, rest) = room.split_at_mut_checked(run.len())?;
                place.copy_from_slice(run);
                room = rest;
            }
        }
        symbols.clear();
        let of = |piece: &Coded| piece.symbol.cast_unsigned();
        symbols.extend(pieces.as_flattened().iter().map(of));
        let runs: Vec<(&Codes, &[u8])> = (0..self.tokens.div_ceil(GROUP))
            .flat_map(|_| self.codes())
            .zip(symbols.chunks_exact(GROUP))
            .collect();
        let (length, room) = room.split_first_chunk_mut::<4>()?;
        let most = room.len().min(STATES_BYTES + 2 * symbols.len());
        let coded = rans::encode_runs(&runs, room.get_mut(..most)?)?;
        *length = u32::try_from(coded).ok()?.to_le_bytes();
        let (_, room) = room.split_at_mut_checked(coded)?;
        let all = room.len();
        let mut bits = BitWriter::new(room);
        for piece in pieces.as_flattened() {
            bits.put(piece.bits, piece.len)?;
        }
        Some(whole - all + bits.end()?)
    }

    /// Reads the values of a group, by place in the order of coding.
    fn read_values(
        &self,
        raw: &[u8],
        from: usize,
        (values, row): (&mut [Lanes<u16>], &mut Vec<u8>),
    ) {
        for lane in 0..GROUP.min(self.tokens - from) {
            row.clear();
            for run in self.rows.row(raw, from + lane) {
                row.extend(run);
            }
            let numbers = row.as_chunks::<2>().0;
            for (values, channel) in values.iter_mut().zip(&self.kit.order) {
                let bits = numbers.get(*channel).copied().unwrap_or_default();
                if let Some(place) = values.get_mut(lane) {
                    *place = u16::from_le_bytes(bits);
                }
            }
        }
    }

    /// Writes them back.
    fn write_values(&self, values: &[Lanes<u16>], out: &mut [u8], from: usize, row: &mut Vec<u8>) {
        row.resize(self.rows.bytes(), 0);
        for lane in 0..GROUP.min(self.tokens - from) {
            let numbers = row.as_chunks_mut::<2>().0;
            for (values, channel) in values.iter().zip(&self.kit.order) {
                if let (Some(place), Some(value)) = (numbers.get_mut(*channel), values.get(lane)) {
                    *place = value.to_le_bytes();
                }
            }
            self.rows.copy_from(out, from + lane, row);
        }
    }
}

/// What stands for a token that is kept, or none.
const NOTHING: Coded = Coded {
    symbol: 0,
    bits: 0,
    len: 0,
};

fn bit(bits: &[u8], at: usize) -> bool {
    let byte = bits.get(at / 8).copied().unwrap_or(0);
    byte >> (at % 8) & 1 == 1
}

/// Adds the sums of a tile to what its tokens are about.
fn add(base: &mut Rows<f32>, (scale, sums): (&[f32; WITHIN], &[Column; TILE]), from: usize) {
    for (row, (lanes, scale)) in base.iter_mut().zip(scale).enumerate() {
        let places = lanes.iter_mut().skip(from);
        for (place, sums) in places.zip(sums) {
            let sum = sums.get(row).copied().unwrap_or(0);
            *place += sum as f32 * scale;
        }
    }
}

/// Decodes the channels of a group.
struct Decode<'a, 'b> {
    form: Form,
    symbols: &'a [[u8; GROUP]],
    values: &'a mut [Lanes<u16>],
    /// Lanes that have their value already, or none.
    free: &'a Lanes<bool>,
    bits: &'a mut BitReader<'b>,
}

impl Channel for Decode<'_, '_> {
    #[inline(always)]
    #[expect(clippy::indexing_slicing, reason = "lanes of arrays of their length")]
    fn row(&mut self, block: &Block, row: usize, about: &Lanes<f32>) -> Option<Lanes<f32>> {
        let place = block.first + row;
        let (symbols, values) = (self.symbols.get(place)?, self.values.get_mut(place)?);
        let (step, per_step) = (*block.steps.get(row)?, *block.per_step.get(row)?);
        let (mut cells, mut wholes) = ([0; GROUP], [0; GROUP]);
        let (mut lens, mut odd) = ([0; GROUP], [0_u8; GROUP]);
        for lane in 0..GROUP {
            let symbol = i32::from(symbols[lane].cast_signed());
            let cell = self.form.cell(about[lane], per_step) + symbol;
            cells[lane] = cell;
            (wholes[lane], lens[lane]) = self.form.of_cell(cell, step);
            let first = cell ^ (cell >> 31) == 0;
            let escape = symbol == i32::from(ESCAPE);
            odd[lane] = u8::from(first | escape | self.free[lane]);
        }
        // A copy, so that it stays in registers.
        let mut reader = *self.bits;
        for lane in 0..GROUP {
            let bits = reader.peek();
            let (whole, len) = if odd[lane] == 0 {
                (wholes[lane] | low(bits, lens[lane]), lens[lane])
            } else if self.free[lane] {
                (values[lane].into(), 0)
            } else if symbols[lane] == ESCAPE.cast_unsigned() {
                (low(bits, 16), 16)
            } else {
                self.form.of_first(cells[lane], step, bits)
            };
            reader.skip(len);
            #[expect(clippy::cast_possible_truncation, reason = "16 bits")]
            let whole = whole as u16;
            values[lane] = whole;
        }
        *self.bits = reader;
        Some(values.map(|bits| self.form.number(bits)))
    }
}

/// Codes the channels of a group.
struct Encode<'a> {
    form: Form,
    values: &'a [Lanes<u16>],
    pieces: &'a mut Vec<Lanes<Coded>>,
    costs: &'a mut Lanes<f32>,
}

impl Channel for Encode<'_> {
    #[inline(always)]
    #[expect(clippy::indexing_slicing, reason = "lanes of arrays of their length")]
    fn row(&mut self, block: &Block, row: usize, about: &Lanes<f32>) -> Option<Lanes<f32>> {
        let values = self.values.get(block.first + row)?;
        let (step, per_step) = (*block.steps.get(row)?, *block.per_step.get(row)?);
        let table = block.tables.get(row)?;
        let mut pieces = [NOTHING; GROUP];
        for lane in 0..GROUP {
            let cell = self.form.cell(about[lane], per_step);
            let piece = self.form.code(values[lane], cell, (step, table.reach));
            debug_assert!(piece.len < PIECE_MAX);
            self.costs[lane] += table.bits[usize::from(piece.symbol.cast_unsigned())];
            self.costs[lane] += piece.len as f32;
            pieces[lane] = piece;
        }
        self.pieces.push(pieces);
        Some(values.map(|bits| self.form.number(bits)))
    }
}

const _: () = assert!(GROUP.is_multiple_of(TILE) && PANEL == WITHIN);
