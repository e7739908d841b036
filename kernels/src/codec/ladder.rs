//! Levels that code with the tables of a model: transparent, balanced and small, each plain and
//! predicted from the layers before.
//!
//! Upstairs:   [`Ladder::all`] gives the levels of a profile to a [`Registry`](crate::Registry);
//!             [`crate::profile`] offers what calibration needs to know of the tables.
//! Downstairs: `kit` prepares the tables; `forward` makes coefficients of values, `rows`
//!             values of coefficients; `stream` stores them.
//!
//! A token's channels become coefficients, which are rounded to whole steps and coded with shared
//! [`tables`] of probabilities. Some tokens are kept as they are: the sinks at the front of a
//! prefix, and every token with a value that the declared error would not hold for.
//!
//! Invariants kept here
//!   T1  Every machine makes the same bits of the same part, and restores the same.
//!   T3  No value is further from the one that was given than [`Codec::error_in`] says, beside
//!       the rounding to its element type: the encoder restores the part and looks. What is no
//!       number, infinite or out of range is kept exactly.
//!   K4  A level across layers decodes after the parts that its tables name, and no others.
//!
//! Not here on purpose: no choice of the numbers. Calibration makes them, see [`crate::profile`].

use std::cell::Cell;
use std::sync::Arc;

use kvtier_proto::Level;
use kvtier_proto::layout::PartCode;

use super::{Codec, DecodeError, EncodeError, NothingRestored, Restored, envelope};
use crate::codec::quant::floats;
use crate::profile::{Profile, ProfileError};
use crate::shape::PartShape;

pub(crate) mod cells;
mod elements;
mod exact;
mod forward;
mod input;
mod kit;
mod predict;
pub(crate) mod product;
mod rotary;
mod rows;
mod stream;
pub mod tables;

use elements::Rows;
use forward::Forward;
use input::{Inputs, Missing};
use kit::{Shared, View};
use product::Operand;
use rotary::Turn;
use rows::{Base, Stage, Take};

/// Levels by rising number: which of a part's three they take, and whether they predict.
const LEVELS: [(Level, usize, bool); 6] = [
    (Level::TRANSPARENT, 0, false),
    (Level::BALANCED, 1, false),
    (Level::SMALL, 2, false),
    (Level::TRANSPARENT_X, 0, true),
    (Level::BALANCED_X, 1, true),
    (Level::SMALL_X, 2, true),
];

/// Scratch memory that a thread keeps. Unit: bytes. A larger one is freed after use.
const KEPT_BYTES_MAX: usize = 16 << 20;

/// One level, with the tables of one model.
#[derive(Debug, Clone)]
pub struct Ladder {
    level: Level,
    quality: usize,
    across: bool,
    shared: Arc<Shared>,
}

/// Memory of one part, kept between parts.
#[derive(Debug, Default)]
struct Scratch {
    memory: stream::Memory,
    tile: rows::Tile,
    forward: forward::Memory,
    inputs: Inputs,
    restored: Vec<u8>,
    row: Vec<f32>,
}

/// What of it encoding takes beside the inputs, which it reads meanwhile.
type Lent<'a> = (
    &'a mut stream::Memory,
    &'a mut rows::Tile,
    &'a mut forward::Memory,
    &'a mut Vec<u8>,
    &'a mut Vec<f32>,
);

thread_local! {
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

fn with_scratch<T>(shape: &PartShape, work: impl FnOnce(&mut Scratch) -> T) -> T {
    let mut scratch = SCRATCH.take().unwrap_or_default();
    let out = work(&mut scratch);
    // Words, values and inputs are a few times as large as a part.
    if shape.raw_bytes() * 8 <= KEPT_BYTES_MAX {
        SCRATCH.set(Some(scratch));
    }
    out
}

impl Ladder {
    /// The levels that a profile has tables for, as codecs of a registry.
    ///
    /// # Errors
    /// [`ProfileError`] when the profile does not fit together.
    pub fn all(profile: Arc<Profile>) -> Result<Vec<Arc<dyn Codec>>, ProfileError> {
        profile.check()?;
        let shared = Arc::new(Shared::new(profile));
        let has = |quality: usize, across: bool| {
            shared.profile.parts.iter().any(|part| match across {
                true => Shared::cross(part, quality).is_some(),
                false => matches!(part.plain.levels.get(quality), Some(Some(_))),
            })
        };
        let levels = LEVELS.into_iter();
        let exact = (!shared.profile.exact.is_empty())
            .then(|| Arc::new(exact::Exact::new(Arc::clone(&shared))) as Arc<dyn Codec>);
        Ok(levels
            .filter(|(_, quality, across)| has(*quality, *across))
            .map(|(level, quality, across)| {
                let shared = Arc::clone(&shared);
                Arc::new(Self {
                    level,
                    quality,
                    across,
                    shared,
                }) as Arc<dyn Codec>
            })
            .chain(exact)
            .collect())
    }

    fn view(&self, shape: &PartShape) -> Option<View<'_>> {
        self.shared.view(shape, self.quality, self.across)
    }

    /// Nothing of this level was ever made of a part without tables.
    fn no_tables(&self) -> DecodeError {
        DecodeError::Header {
            field: "level",
            got: self.level.0.into(),
            want: Level::RAW.0.into(),
        }
    }

    /// Decodes the stream of a part into `out`, and returns the CRC of it.
    fn decode_part(
        &self,
        shape: &PartShape,
        (body, out): (&[u8], &mut [u8]),
        restored: &dyn Restored,
        scratch: &mut Scratch,
    ) -> Result<u32, DecodeError> {
        let view = self.view(shape).ok_or_else(|| self.no_tables())?;
        let rows = Rows::of(shape);
        let size = (shape.tokens() as usize, rows.bytes());
        let coding = &view.level.coding;
        let (exact, pairs) = coding.decode(size, body, &mut scratch.memory)?;
        let base = self
            .base(shape, &view, restored, &mut scratch.inputs)
            .map_err(|Missing(layer, code)| DecodeError::Needs { layer, code })?;
        let angles = self.shared.angles(shape, shape.code());
        let stage = Stage {
            turn: angles.as_deref().map(|angles| turn(angles, &view)),
            ..stage(shape, &view, (&scratch.memory.words, pairs), base)
        };
        stage.run(&mut scratch.tile, &mut Write { rows, out });
        for (token, row) in exact.iter() {
            rows.copy_from(out, token, row);
        }
        Ok(crc32fast::hash(out))
    }

    /// What values are about.
    fn base<'a>(
        &'a self,
        shape: &PartShape,
        view: &View<'a>,
        restored: &dyn Restored,
        inputs: &'a mut Inputs,
    ) -> Result<Base<'a>, Missing> {
        let (Some(cross), Some(weights)) = (view.cross, &view.kit.weights) else {
            return Ok(Base::Mean(&view.tables.plain.mean));
        };
        let inputs = inputs.read((&self.shared, shape), cross, restored)?;
        Ok(Base::Predicted {
            weights,
            scale: cross.weights.scale(),
            bias: &cross.bias,
            inputs,
        })
    }

    /// Encodes a part, and returns the size of its stream and the CRC of what it decodes to;
    /// `None` when it does not fit.
    fn encode_part(
        &self,
        shape: &PartShape,
        (raw, out): (&[u8], &mut [u8]),
        base: Base<'_>,
        parts: Lent<'_>,
    ) -> Option<(usize, u32)> {
        let (memory, tile, forward, restored, given) = parts;
        let view = self.view(shape)?;
        let rows = Rows::of(shape);
        let (tokens, padded) = (
            shape.tokens() as usize,
            stream::padded(shape.tokens() as usize),
        );
        let angles = self.shared.angles(shape, shape.code());
        let turn = angles.as_deref().map(|angles| turn(angles, &view));
        let pairs = view.level.coding.pairs();
        memory.words.clear();
        memory.words.resize(pairs * padded, 0);
        let sinks = self.shared.profile.sinks.saturating_sub(shape.position());
        let sinks = tokens.min(sinks as usize);
        let mut exact: Vec<usize> = Vec::new();
        let coefficients = Forward {
            raw,
            rows,
            tokens,
            channels: view.tables.channels(),
            turn,
            base,
            matrix: view.kit.forward(&view),
            in_scale: &view.level.in_scale,
        };
        coefficients.run(forward, &mut memory.words, &mut exact);
        exact.extend(0..sinks);
        restored.resize(raw.len(), 0);
        given.resize(view.tables.channels(), 0.0);
        let (bound, most) = (view.level.bound, elements::most(shape.element()));
        let base = base.known(&forward.known);
        let stage = Stage {
            turn,
            ..stage(shape, &view, (&memory.words, pairs), base)
        };
        let mut judge = Judge {
            raw,
            given,
            bound,
            most,
            exact: &mut exact,
            write: Write {
                rows,
                out: restored,
            },
        };
        stage.run(tile, &mut judge);
        exact.sort_unstable();
        exact.dedup();
        for token in &exact {
            stream::forget(&mut memory.words, padded, *token);
            let row: Vec<u8> = rows.row(raw, *token).flatten().copied().collect();
            rows.copy_from(restored, *token, &row);
        }
        let kept = exact.iter().flat_map(|token| rows.row(raw, *token));
        let len = view
            .level
            .coding
            .encode(tokens, &exact, kept, memory, out)?;
        (len < raw.len()).then(|| (len, crc32fast::hash(restored)))
    }

    /// Encodes a part, and writes what it decodes to where that is asked for.
    fn encode_to(
        &self,
        shape: &PartShape,
        raw: &[u8],
        restored: &dyn Restored,
        (out, here): (&mut [u8], Option<&mut [u8]>),
    ) -> Result<usize, EncodeError> {
        super::check_encode(self, shape, raw, out)?;
        let (want, got) = (
            raw.len(),
            here.as_ref().map_or(raw.len(), |here| here.len()),
        );
        if want != got {
            return Err(EncodeError::OutTooSmall { want, got });
        }
        let not_applicable = EncodeError::NotApplicable {
            name: self.name(),
            shape: *shape,
        };
        let view = self.view(shape).ok_or(not_applicable)?;
        with_scratch(shape, |scratch| {
            let Scratch {
                memory,
                tile,
                forward,
                inputs,
                restored: bytes,
                row,
            } = scratch;
            let base =
                self.base(shape, &view, restored, inputs)
                    .map_err(|Missing(layer, code)| EncodeError::Needs {
                        name: self.name(),
                        layer,
                        code,
                    })?;
            let mut coded = false;
            let size = envelope::seal_restored(self, shape, (raw, out), |body| {
                let parts = (memory, tile, forward, &mut *bytes, row);
                let sealed = self.encode_part(shape, (raw, body), base, parts);
                coded = sealed.is_some();
                sealed
            })?;
            if let Some(here) = here {
                here.copy_from_slice(if coded { bytes } else { raw });
            }
            Ok(size)
        })
    }
}

/// Writes the values of a part.
struct Write<'a> {
    rows: Rows,
    out: &'a mut [u8],
}

impl Take for Write<'_> {
    #[inline(always)]
    fn take(&mut self, token: usize, values: &[f32]) {
        self.rows.write(self.out, token, values);
    }
}

/// Writes them, and names the tokens that are further off than declared (T3).
struct Judge<'a> {
    raw: &'a [u8],
    given: &'a mut [f32],
    bound: f32,
    most: f32,
    exact: &'a mut Vec<usize>,
    write: Write<'a>,
}

impl Take for Judge<'_> {
    #[inline(always)]
    fn take(&mut self, token: usize, values: &[f32]) {
        self.write.rows.read(self.raw, token, self.given);
        let mut all = true;
        // Not one after the other: a token is good as a rule, and registers are wide.
        for (value, given) in values.iter().zip(&*self.given) {
            all &= ((value - given).abs() <= self.bound) & (value.abs() <= self.most);
        }
        if !all {
            self.exact.push(token);
        }
        self.write.take(token, values);
    }
}

fn turn<'a>(angles: &'a rotary::Angles, view: &View<'_>) -> Turn<'a> {
    let dim = view.tables.dim as usize;
    Turn { angles, dim }
}

fn stage<'a>(
    shape: &PartShape,
    view: &View<'a>,
    (words, pairs): (&'a [i32], usize),
    base: Base<'a>,
) -> Stage<'a> {
    let tokens = shape.tokens() as usize;
    Stage {
        channels: view.tables.channels(),
        tokens,
        inverse: &view.kit.inverse,
        out_scale: &view.level.out_scale,
        coefficients: Operand {
            words,
            pair_stride: stream::padded(tokens),
            tile_stride: product::TILE,
            pairs,
        },
        base,
        turn: None,
    }
}

impl Codec for Ladder {
    fn level(&self) -> Level {
        self.level
    }

    fn tables(&self) -> u32 {
        self.shared.identity
    }

    fn needs(&self, shape: &PartShape) -> Vec<(u32, PartCode)> {
        let cross = self.shared.cross_of(shape, self.quality);
        let cross = cross.filter(|_| self.across);
        cross.map_or_else(Vec::new, |cross| cross.needs.clone())
    }

    fn applies(&self, shape: &PartShape) -> bool {
        floats::is_float(shape.element()) && self.shared.has(shape, self.quality, self.across)
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
        self.encode_to(shape, raw, restored, (out, None))
    }

    fn encode_restoring(
        &self,
        shape: &PartShape,
        raw: &[u8],
        restored: &dyn Restored,
        (out, here): (&mut [u8], &mut [u8]),
    ) -> Result<usize, EncodeError> {
        self.encode_to(shape, raw, restored, (out, Some(here)))
    }

    fn decode_after(
        &self,
        shape: &PartShape,
        stored: &[u8],
        restored: &dyn Restored,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        envelope::open(self, shape, (stored, out), |body, out| {
            with_scratch(shape, |scratch| {
                self.decode_part(shape, (body, out), restored, scratch)
            })
        })
    }

    fn error_in(&self, shape: &PartShape, stored: &[u8]) -> Result<f32, DecodeError> {
        let view = self.view(shape).ok_or_else(|| self.no_tables())?;
        envelope::coded(self, shape, stored, |_| view.level.bound)
    }
}

#[cfg(test)]
mod tests;
