//! Level lossless_x: bit-exact, predicted from the layer before and from the part's own channels.
//!
//! Upstairs:   [`Ladder::all`](super::Ladder::all) gives it to a registry beside the lossy levels.
//! Downstairs: `kit` prepares the tables, `predict` says what values are about, `part` stores the
//!             difference.
//!
//! Nothing is transformed: transforms lose bits. Instead every channel is predicted, from the
//! parts that are needed and from the channels that come before it in its own part, and its 16
//! bits are coded as a [cell](super::cells) about that prediction. Encoding knows all values, so
//! only decoding goes channel after channel; tokens lie side by side in both.
//!
//! Invariants kept here
//!   X1  Every 16 bits come back as they were.
//!   T1  Every machine makes the same bits of the same part.
//!   K4  A part decodes after the parts that its tables name, and no others.
//!
//! Not here on purpose: no choice of the numbers. Calibration makes them.

use std::cell::Cell;
use std::sync::{Arc, OnceLock};

use kvtier_proto::Level;
use kvtier_proto::layout::PartCode;

use self::kit::Kit;
use self::part::{Memory, Part};
use self::predict::{GROUP, bound, read};
use super::cells::Form;
use super::elements::Rows;
use super::input::Missing;
use super::kit::Shared;
use super::product::{TILE, word};
use super::rotary::{Angles, Turn};
use crate::codec::{
    Codec, DecodeError, EncodeError, NothingRestored, Restored, check_encode, envelope,
};
use crate::profile::ExactTables;
use crate::shape::PartShape;
use crate::simd::ladder::{Work, vectorised};

mod bits;
mod kit;
mod part;
mod predict;

/// Scratch memory that a thread keeps, by the raw bytes of a part. A larger one is freed.
const KEPT_PART_MAX: usize = 2 << 20;

thread_local! {
    static SCRATCH: Cell<Option<Box<Memory>>> = const { Cell::new(None) };
}

/// The level, with the tables of one model.
#[derive(Debug)]
pub(super) struct Exact {
    shared: Arc<Shared>,
    kits: Vec<OnceLock<Option<Kit>>>,
}

/// A needed part.
struct Source<'a> {
    raw: &'a [u8],
    rows: Rows,
    kit: &'a Kit,
    angles: Option<Arc<Angles>>,
    dim: usize,
}

impl Exact {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let kits = shared.profile.exact.iter().map(|_| OnceLock::new());
        Self {
            kits: kits.collect(),
            shared,
        }
    }

    /// Tables of a part of this shape.
    fn tables(&self, shape: &PartShape) -> Option<&ExactTables> {
        let part = self.shared.profile.exact(shape.layer(), shape.code())?;
        let fits = part.heads == shape.heads() && part.channels() == shape.width() as usize;
        (fits && Form::of(shape.element()).is_some()).then_some(part)
    }

    fn kit(&self, tables: &ExactTables) -> Option<&Kit> {
        let of = |other: &ExactTables| std::ptr::eq(other, tables);
        let at = self.shared.profile.exact.iter().position(of)?;
        let kit = self.kits.get(at)?;
        kit.get_or_init(|| Kit::new(&self.shared.profile, tables))
            .as_ref()
    }

    /// The parts that a part is predicted from, in the order of its weights' columns.
    fn sources<'a>(
        &'a self,
        (tables, shape): (&ExactTables, &PartShape),
        restored: &'a dyn Restored,
    ) -> Result<Vec<Source<'a>>, Missing> {
        let needs = tables.needs.iter();
        let source = |(layer, code): &(u32, PartCode)| {
            let missing = || Missing(*layer, *code);
            let part = self.shared.profile.exact(*layer, *code);
            let part = part.ok_or_else(missing)?;
            let own = PartShape::new(shape.element(), shape.tokens(), part.heads * part.dim)
                .and_then(|own| own.with_heads(part.heads, shape.order()))
                .map_err(|_| missing())?
                .of_layer(*layer, *code)
                .at_position(shape.position());
            let raw = restored.part(*layer, *code).ok_or_else(missing)?;
            if raw.len() != own.raw_bytes() {
                return Err(missing());
            }
            Ok(Source {
                raw,
                rows: Rows::of(&own),
                kit: self.kit(part).ok_or_else(missing)?,
                angles: self.shared.angles(&own, *code),
                dim: part.dim as usize,
            })
        };
        needs.map(source).collect()
    }

    /// Runs `work` with everything that a part is coded with.
    fn with<T>(
        &self,
        (tables, shape): (&ExactTables, &PartShape),
        restored: &dyn Restored,
        work: impl FnOnce(
            &Part<'_>,
            &mut Memory,
            (&mut part::ReadInputs<'_>, &part::FindAngles<'_>),
        ) -> T,
    ) -> Result<T, Missing> {
        let (layer, code) = (shape.layer(), shape.code());
        let missing = || Missing(layer, code);
        let sources = self.sources((tables, shape), restored)?;
        let rows = Rows::of(shape);
        let part = Part {
            kit: self.kit(tables).ok_or_else(missing)?,
            form: Form::of(shape.element()).ok_or_else(missing)?,
            rows,
            tokens: shape.tokens() as usize,
            needed: sources.iter().map(|source| source.kit.order.len()).sum(),
        };
        let angles = self.shared.angles(shape, code);
        let turned = |from: usize| {
            let angles = angles.as_deref();
            angles.map_or(&[][..], |angles| angles.group(from / GROUP))
        };
        let (mut row, mut numbers) = (Vec::new(), Vec::new());
        let mut inputs = |from: usize, words: &mut [[i32; TILE]]| {
            let pairs = words.len() / (GROUP / TILE);
            let mut first = 0;
            for source in &sources {
                let tiles = words.chunks_exact_mut(pairs.max(1)).enumerate();
                for (tile, words) in tiles {
                    let words = words.get_mut(first..).unwrap_or_default();
                    let from = from + tile * TILE;
                    vectorised(ReadTile {
                        source,
                        tokens: from..part.tokens.min(from + TILE),
                        words,
                        row: &mut row,
                        numbers: &mut numbers,
                    });
                }
                first += source.kit.order.len() / 2;
            }
        };
        let mut memory = SCRATCH.take().unwrap_or_default();
        let out = work(&part, &mut memory, (&mut inputs, &turned));
        if shape.raw_bytes() <= KEPT_PART_MAX {
            SCRATCH.set(Some(memory));
        }
        Ok(out)
    }
}

/// Reads a tile of tokens as whole numbers, two channels of the order of coding in a word.
struct ReadTile<'a> {
    source: &'a Source<'a>,
    tokens: std::ops::Range<usize>,
    words: &'a mut [[i32; TILE]],
    row: &'a mut Vec<f32>,
    numbers: &'a mut Vec<i16>,
}

impl Work for ReadTile<'_> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        let Source {
            raw,
            rows,
            kit,
            angles,
            dim,
        } = self.source;
        let (row, numbers) = (self.row, self.numbers);
        row.resize(kit.order.len(), 0.0);
        numbers.resize(kit.order.len(), 0);
        for (lane, token) in self.tokens.enumerate() {
            rows.read(raw, token, row);
            for value in &mut *row {
                *value = bound(*value);
            }
            if let Some(angles) = angles {
                Turn { angles, dim: *dim }.back(token, row);
            }
            let how = kit.centre.iter().zip(&kit.reciprocal);
            for ((number, value), (centre, reciprocal)) in numbers.iter_mut().zip(&*row).zip(how) {
                *number = read(*value, *centre, *reciprocal);
            }
            let number = |channel: usize| numbers.get(channel).copied().unwrap_or(0);
            for (words, [low, high]) in self.words.iter_mut().zip(kit.order.as_chunks::<2>().0) {
                if let Some(place) = words.get_mut(lane) {
                    *place = word(number(*low), number(*high));
                }
            }
        }
    }
}

impl Codec for Exact {
    fn level(&self) -> Level {
        Level::LOSSLESS_X
    }

    fn tables(&self) -> u32 {
        self.shared.identity
    }

    fn needs(&self, shape: &PartShape) -> Vec<(u32, PartCode)> {
        let tables = Self::tables(self, shape);
        tables.map_or_else(Vec::new, |tables| tables.needs.clone())
    }

    fn applies(&self, shape: &PartShape) -> bool {
        Self::tables(self, shape).is_some()
    }

    fn encode(&self, shape: &PartShape, raw: &[u8], out: &mut [u8]) -> Result<usize, EncodeError> {
        self.encode_after(shape, raw, &NothingRestored, out)
    }

    fn decode(&self, shape: &PartShape, stored: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
        self.decode_after(shape, stored, &NothingRestored, out)
    }

    fn encode_after(
        &self,
        shape: &PartShape,
        raw: &[u8],
        restored: &dyn Restored,
        out: &mut [u8],
    ) -> Result<usize, EncodeError> {
        check_encode(self, shape, raw, out)?;
        let tables = Self::tables(self, shape).ok_or(EncodeError::NotApplicable {
            name: self.name(),
            shape: *shape,
        })?;
        let sinks = self.shared.profile.sinks.saturating_sub(shape.position());
        envelope::seal(self, shape, (raw, out), |body| {
            let coded = self.with((tables, shape), restored, |part, memory, with| {
                part.encode((raw, body, sinks as usize), memory, with)
            });
            coded
                .map(|len| len.filter(|len| *len < raw.len()))
                .map_err(|Missing(layer, code)| EncodeError::Needs {
                    name: self.name(),
                    layer,
                    code,
                })
        })
    }

    fn decode_after(
        &self,
        shape: &PartShape,
        stored: &[u8],
        restored: &dyn Restored,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        envelope::open(self, shape, (stored, out), |body, out| {
            let tables = Self::tables(self, shape).ok_or(DecodeError::Header {
                field: "level",
                got: self.level().0.into(),
                want: Level::RAW.0.into(),
            })?;
            let done = self.with((tables, shape), restored, |part, memory, with| {
                part.decode((body, out), memory, with)
            });
            done.map_err(|Missing(layer, code)| DecodeError::Needs { layer, code })??;
            Ok(crc32fast::hash(out))
        })
    }
}

#[cfg(test)]
mod tests;
