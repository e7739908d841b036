//! File of a profile, version 1, little-endian.
//!
//! | part        | bytes                                                                       |
//! |-------------|-----------------------------------------------------------------------------|
//! | magic       | "KVTPROF\0"                                                                 |
//! | version     | u16                                                                         |
//! | head        | model, revision, fingerprint; element u8; K after RoPE u8; sinks u32        |
//! | rope        | u8 whether; then rotate half u8, frequencies (f64 each)                     |
//! | measured    | u32 count; of each: level u8, bits f32, predicted KL f32                    |
//! | parts       | u32 count; of each: layer u32, code u8, heads u32, dim u32, input, plain,   |
//! |             | u8 count of crosses                                                         |
//! | input       | u8 whether; then centre, scale: f32 a channel                               |
//! | plain       | mean: f32 a channel; transform; levels                                      |
//! | cross       | u8 count of needs, of each layer u32 and code u8; u32 columns; weights;     |
//! |             | bias: f32 a channel; transform; levels                                      |
//! | transform   | forward, inverse: matrices of channels x channels                           |
//! | matrix      | a scale f32 a row; then the integers i16, row after row                     |
//! | levels      | u8 whether, for each of three; then step f32, a scale index a channel,      |
//! |             | predictor u8: 0 mean, 1 anchor (group u16), 2 first (rho i8 a channel)      |
//! | costs       | nothing where no level has them; or "COST", version u16, and of each        |
//! |             | measured level: u32 count, 0 or that of the parts, and f32 each             |
//! | exact       | nothing, or what `super::exact` describes: tag, version, tables             |
//! | hash        | BLAKE3 of all before, 32 bytes                                              |
//!
//! Texts and lists of bytes or frequencies begin with their length, u32.
//!
//! Upstairs:   [`super::Profile`].
//! Downstairs: nothing.
//!
//! Invariants kept here
//!   P3  The hash is checked before anything else is believed, and a table is allocated only when
//!       all its bytes are there.
//!
//! Not here on purpose: no compression. A profile is read once a start.

mod exact;

use kvtier_proto::element::Element;
use kvtier_proto::layout::PartCode;
use kvtier_proto::limits::{NAME_BYTES_MAX, PARTS_MAX};

use super::check::{at_most, channels};
use super::{
    Cross, FILE_BYTES_MAX, Input, LevelTables, Matrix16, Measured, NEEDS_MAX, PartTables, Plain,
    Profile, ProfileError, QUALITIES, Rope, TokenPredictor, Transform,
};

const MAGIC: &[u8; 8] = b"KVTPROF\0";
/// Version that is written and read.
pub(super) const VERSION: u16 = 1;
const HASH_BYTES: usize = 32;
/// Tag and version of the section of costs.
const COSTS: &[u8; 6] = b"COST\x01\x00";
/// Tag and version of the section of the exact level.
const EXACT: &[u8; 6] = b"EXCT\x01\x00";

/// The identity of a whole file.
pub(super) fn identity(file: &[u8]) -> u32 {
    let hash = file.last_chunk::<HASH_BYTES>();
    let first = hash.and_then(|hash| hash.first_chunk()).copied();
    u32::from_le_bytes(first.unwrap_or_default()).max(1)
}

pub(super) fn write(profile: &Profile) -> Vec<u8> {
    let mut file = Writer(Vec::new());
    file.0.extend(MAGIC);
    file.0.extend(VERSION.to_le_bytes());
    file.bytes(profile.model.as_bytes());
    file.bytes(profile.revision.as_bytes());
    file.bytes(&profile.weights_fingerprint);
    file.byte(profile.element as u8);
    file.byte(u8::from(profile.k_after_rope));
    file.word(profile.sinks);
    file.byte(u8::from(profile.rope.is_some()));
    if let Some(rope) = &profile.rope {
        file.byte(u8::from(rope.rotate_half));
        file.count(rope.frequencies.len());
        let frequencies = rope.frequencies.iter();
        file.0.extend(frequencies.flat_map(|f| f.to_le_bytes()));
    }
    file.count(profile.measured.len());
    for one in &profile.measured {
        file.byte(one.level);
        file.floats(&[one.bits, one.predicted_kl]);
    }
    file.count(profile.parts.len());
    for part in &profile.parts {
        file.part(part);
    }
    if profile.measured.iter().any(|one| !one.costs.is_empty()) {
        file.0.extend(COSTS);
        for one in &profile.measured {
            file.count(one.costs.len());
            file.floats(&one.costs);
        }
    }
    if !profile.exact.is_empty() {
        file.0.extend(EXACT);
        file.count(profile.exact.len());
    }
    for part in &profile.exact {
        file.exact(part);
    }
    let hash = blake3::hash(&file.0);
    file.0.extend(hash.as_bytes());
    file.0
}

struct Writer(Vec<u8>);

impl Writer {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }

    fn word(&mut self, word: u32) {
        self.0.extend(word.to_le_bytes());
    }

    /// The check has bounded every count.
    fn count(&mut self, count: usize) {
        self.word(u32::try_from(count).unwrap_or(u32::MAX));
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.0.extend(bytes);
    }

    fn floats(&mut self, floats: &[f32]) {
        self.0.extend(floats.iter().flat_map(|f| f.to_le_bytes()));
    }

    fn matrix(&mut self, matrix: &Matrix16) {
        self.floats(matrix.scale());
        let data = matrix.data().iter();
        self.0.extend(data.flat_map(|number| number.to_le_bytes()));
    }

    fn part(&mut self, part: &PartTables) {
        self.word(part.layer);
        self.byte(part.code as u8);
        self.word(part.heads);
        self.word(part.dim);
        self.byte(u8::from(part.input.is_some()));
        if let Some(input) = &part.input {
            self.floats(&input.centre);
            self.floats(&input.scale);
        }
        self.floats(&part.plain.mean);
        self.transform(&part.plain.transform);
        self.levels(&part.plain.levels);
        self.byte(u8::try_from(part.crosses.len()).unwrap_or(u8::MAX));
        for cross in &part.crosses {
            self.byte(u8::try_from(cross.needs.len()).unwrap_or(u8::MAX));
            for (layer, code) in &cross.needs {
                self.word(*layer);
                self.byte(*code as u8);
            }
            self.count(cross.weights.columns());
            self.matrix(&cross.weights);
            self.floats(&cross.bias);
            self.transform(&cross.transform);
            self.levels(&cross.levels);
        }
    }

    fn transform(&mut self, transform: &Transform) {
        self.matrix(&transform.forward);
        self.matrix(&transform.inverse);
    }

    fn levels(&mut self, levels: &[Option<LevelTables>; QUALITIES]) {
        for level in levels {
            self.byte(u8::from(level.is_some()));
            let Some(level) = level else { continue };
            self.floats(&[level.step]);
            self.0.extend(&level.scales);
            match &level.predictor {
                TokenPredictor::Mean => self.byte(0),
                TokenPredictor::Anchor { group } => {
                    self.byte(1);
                    self.0.extend(group.to_le_bytes());
                }
                TokenPredictor::First { rho } => {
                    self.byte(2);
                    self.0.extend(rho.iter().flat_map(|rho| rho.to_le_bytes()));
                }
            }
        }
    }
}

pub(super) fn read(bytes: &[u8]) -> Result<Profile, ProfileError> {
    if bytes.len() > FILE_BYTES_MAX {
        let got = bytes.len();
        return Err(ProfileError::TooLong { got });
    }
    let rest = bytes.strip_prefix(MAGIC).ok_or(ProfileError::Magic)?;
    let got = u16::from_le_bytes(*Reader(rest).array("version")?);
    if got != VERSION {
        return Err(ProfileError::Version { got });
    }
    let (body, hash) = bytes
        .split_last_chunk::<HASH_BYTES>()
        .ok_or(ProfileError::Hash)?;
    if blake3::hash(body) != blake3::Hash::from_bytes(*hash) {
        return Err(ProfileError::Hash);
    }
    let mut file = Reader(body);
    file.take("version", MAGIC.len() + 2)?;
    let profile = file.profile()?;
    match file.0.len() {
        0 => Ok(profile),
        got => Err(ProfileError::Trailing { got }),
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// The next bytes, when they are there (P3).
    fn take(&mut self, field: &'static str, want: usize) -> Result<&'a [u8], ProfileError> {
        let got = self.0.len();
        let short = ProfileError::Truncated { field, got, want };
        let (taken, rest) = self.0.split_at_checked(want).ok_or(short)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<&'a [u8; N], ProfileError> {
        let got = self.0.len();
        let short = ProfileError::Truncated {
            field,
            got,
            want: N,
        };
        let (taken, rest) = self.0.split_first_chunk().ok_or(short)?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self, field: &'static str) -> Result<u8, ProfileError> {
        let [byte] = *self.array(field)?;
        Ok(byte)
    }

    fn word(&mut self, field: &'static str) -> Result<u32, ProfileError> {
        self.array(field).map(|bytes| u32::from_le_bytes(*bytes))
    }

    fn flag(&mut self, field: &'static str) -> Result<bool, ProfileError> {
        match self.byte(field)? {
            0 => Ok(false),
            1 => Ok(true),
            got => Err(ProfileError::number(field, got.into(), "0 or 1")),
        }
    }

    fn count(&mut self, field: &'static str, most: usize) -> Result<usize, ProfileError> {
        let count = self.word(field)? as usize;
        at_most(field, count, most)?;
        Ok(count)
    }

    fn text(&mut self, field: &'static str) -> Result<String, ProfileError> {
        let len = self.count(field, NAME_BYTES_MAX)?;
        let text = self.take(field, len)?.to_vec();
        String::from_utf8(text).map_err(|_| ProfileError::Text { field })
    }

    fn floats(&mut self, field: &'static str, count: usize) -> Result<Vec<f32>, ProfileError> {
        let bytes = self.take(field, count.saturating_mul(4))?;
        let floats = bytes.as_chunks().0.iter();
        Ok(floats.map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    fn matrix(&mut self, field: &'static str, size: [usize; 2]) -> Result<Matrix16, ProfileError> {
        let [rows, columns] = size;
        let scale = self.floats(field, rows)?;
        let count = rows.saturating_mul(columns);
        let bytes = self.take(field, count.saturating_mul(2))?;
        let numbers = bytes.as_chunks().0.iter();
        let data = numbers.map(|bytes| i16::from_le_bytes(*bytes)).collect();
        Matrix16::new(rows, columns, data, scale)
    }

    fn profile(&mut self) -> Result<Profile, ProfileError> {
        let model = self.text("model name")?;
        let revision = self.text("revision")?;
        let len = self.count("weights fingerprint", NAME_BYTES_MAX)?;
        let weights_fingerprint = self.take("weights fingerprint", len)?.to_vec();
        let element = match self.byte("element")? {
            1 => Element::Bf16,
            2 => Element::F16,
            3 => Element::F32,
            got => return Err(ProfileError::number("element", got.into(), "1 to 3")),
        };
        let k_after_rope = self.flag("k after rope")?;
        let sinks = self.word("sinks")?;
        let rope = match self.flag("rope")? {
            true => Some(self.rope()?),
            false => None,
        };
        let mut measured = Vec::new();
        for _ in 0..self.count("measured levels", 256)? {
            let level = self.byte("measured level")?;
            let [bits, predicted_kl] = *self.floats("measured bits", 2)?.as_slice() else {
                break;
            };
            measured.push(Measured {
                level,
                bits,
                predicted_kl,
                costs: Vec::new(),
            });
        }
        let mut parts = Vec::new();
        for _ in 0..self.count("parts", PARTS_MAX)? {
            parts.push(self.part()?);
        }
        if let Some(rest) = self.0.strip_prefix(COSTS) {
            self.0 = rest;
            for one in &mut measured {
                let count = self.count("costs", PARTS_MAX)?;
                one.costs = self.floats("costs", count)?;
            }
            // Written only where there are some: one file a profile.
            if measured.iter().all(|one| one.costs.is_empty()) {
                return Err(ProfileError::length("costs", 0, parts.len()));
            }
        }
        let mut exact = Vec::new();
        if let Some(rest) = self.0.strip_prefix(EXACT) {
            self.0 = rest;
            for _ in 0..self.count("exact parts", PARTS_MAX)? {
                exact.push(self.exact()?);
            }
        }
        Ok(Profile {
            model,
            revision,
            weights_fingerprint,
            element,
            rope,
            k_after_rope,
            sinks,
            parts,
            measured,
            exact,
        })
    }

    fn rope(&mut self) -> Result<Rope, ProfileError> {
        let rotate_half = self.flag("rotate half")?;
        let count = self.word("rope frequencies")? as usize;
        let bytes = self.take("rope frequencies", count.saturating_mul(8))?;
        let frequencies = bytes.as_chunks().0.iter();
        Ok(Rope {
            frequencies: frequencies.map(|f| f64::from_le_bytes(*f)).collect(),
            rotate_half,
        })
    }

    fn code(&mut self) -> Result<PartCode, ProfileError> {
        match self.byte("part code")? {
            1 => Ok(PartCode::K),
            2 => Ok(PartCode::V),
            got => Err(ProfileError::number(
                "part code",
                got.into(),
                "1 (k) or 2 (v)",
            )),
        }
    }

    fn part(&mut self) -> Result<PartTables, ProfileError> {
        let layer = self.word("layer")?;
        let code = self.code()?;
        let (heads, dim) = (self.word("heads")?, self.word("dim")?);
        let channels = channels(heads, dim)?;
        let input = match self.flag("input")? {
            true => Some(Input {
                centre: self.floats("input centre", channels)?,
                scale: self.floats("input scale", channels)?,
            }),
            false => None,
        };
        let plain = Plain {
            mean: self.floats("mean", channels)?,
            transform: self.transform(channels)?,
            levels: self.levels(channels)?,
        };
        let mut crosses = Vec::new();
        let count = usize::from(self.byte("cross tables")?);
        at_most("cross tables", count, QUALITIES)?;
        for _ in 0..count {
            crosses.push(self.cross(channels)?);
        }
        Ok(PartTables {
            layer,
            code,
            heads,
            dim,
            input,
            plain,
            crosses,
        })
    }

    fn cross(&mut self, channels: usize) -> Result<Cross, ProfileError> {
        let count = usize::from(self.byte("needed parts")?);
        at_most("needed parts", count, NEEDS_MAX)?;
        let mut needs = Vec::new();
        for _ in 0..count {
            needs.push((self.word("needed layer")?, self.code()?));
        }
        let columns = self.word("weights")? as usize;
        Ok(Cross {
            needs,
            weights: self.matrix("weights", [channels, columns])?,
            bias: self.floats("bias", channels)?,
            transform: self.transform(channels)?,
            levels: self.levels(channels)?,
        })
    }

    fn transform(&mut self, channels: usize) -> Result<Transform, ProfileError> {
        Ok(Transform {
            forward: self.matrix("forward", [channels; 2])?,
            inverse: self.matrix("inverse", [channels; 2])?,
        })
    }

    fn levels(
        &mut self,
        channels: usize,
    ) -> Result<[Option<LevelTables>; QUALITIES], ProfileError> {
        let mut levels = [const { None }; QUALITIES];
        for level in &mut levels {
            if !self.flag("level")? {
                continue;
            }
            let step = f32::from_le_bytes(*self.array("step")?);
            let scales = self.take("scale indices", channels)?.to_vec();
            let predictor = match self.byte("token predictor")? {
                0 => TokenPredictor::Mean,
                1 => TokenPredictor::Anchor {
                    group: u16::from_le_bytes(*self.array("anchor group")?),
                },
                2 => {
                    let rho = self.take("rho", channels)?.iter();
                    let rho = rho.map(|byte| i8::from_le_bytes([*byte])).collect();
                    TokenPredictor::First { rho }
                }
                got => {
                    return Err(ProfileError::number(
                        "token predictor",
                        got.into(),
                        "0 to 2",
                    ));
                }
            };
            *level = Some(LevelTables {
                step,
                scales,
                predictor,
            });
        }
        Ok(levels)
    }
}
