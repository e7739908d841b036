//! What tables must be to be coded with, and how the refusal of others reads.
//!
//! Upstairs:   [`super::Profile`], on the way in and on the way out.
//! Downstairs: nothing.
//!
//! Invariants kept here
//!   P1  Tables fit each other, and a prediction needs parts that come before.
//!
//! Not here on purpose: no judgement of quality. Bad tables of the right form code badly, within
//! the error that they declare.

use kvtier_proto::layout::PartCode;
use kvtier_proto::limits::{LAYERS_MAX, NAME_BYTES_MAX, PARTS_MAX};

use super::{
    CHANNELS_MAX, Cross, DEAD, FILE_BYTES_MAX, LevelTables, Matrix16, NEEDS_MAX, PartTables,
    Profile, QUALITIES, SINKS_MAX, TokenPredictor, Transform, scales,
};

/// Most pairs of channels that rotate.
const PAIRS_MAX: usize = CHANNELS_MAX / 2;
/// Most entries of what was measured: one for each number of a level.
const MEASURED_MAX: usize = 256;

/// Why bytes or tables are no profile.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// The file does not begin like a profile.
    #[error("file is no profile; accepted: files that begin with \"KVTPROF\\0\"")]
    Magic,
    /// A version that this build does not read.
    #[error("profile is of version {got}; accepted: {}", super::file::VERSION)]
    Version {
        /// What the file says.
        got: u16,
    },
    /// The file is too long for a profile.
    #[error("profile has {got} bytes; accepted: at most {FILE_BYTES_MAX}")]
    TooLong {
        /// Its length. Unit: bytes.
        got: usize,
    },
    /// The file ends within a field.
    #[error("profile ends within {field}: {got} bytes left; accepted: {want}")]
    Truncated {
        /// Where.
        field: &'static str,
        /// Bytes left.
        got: usize,
        /// Bytes that the field takes.
        want: usize,
    },
    /// The file goes on after its last table.
    #[error("profile goes on for {got} bytes after its tables; accepted: 0")]
    Trailing {
        /// Bytes too many.
        got: usize,
    },
    /// The file is not as it was written.
    #[error("profile has another hash than it ends with; accepted: the file as it was written")]
    Hash,
    /// A list of the wrong length.
    #[error("{field} has {got} entries; accepted: {want}")]
    Length {
        /// Which list.
        field: &'static str,
        /// Its length.
        got: usize,
        /// What the other tables ask for, or the most.
        want: usize,
    },
    /// A number out of range.
    #[error("{field} is {got}; accepted: {want}")]
    Number {
        /// Which number.
        field: &'static str,
        /// What it is.
        got: f64,
        /// The range.
        want: &'static str,
    },
    /// Text that is not UTF-8.
    #[error("{field} is no text; accepted: UTF-8")]
    Text {
        /// Which text.
        field: &'static str,
    },
    /// Parts that are not sorted, or twice there.
    #[error(
        "{} of layer {layer} is out of order; accepted: rising layers, K before V",
        <&str>::from(*code)
    )]
    Order {
        /// Its layer.
        layer: u32,
        /// Which tensor of the layer.
        code: PartCode,
    },
    /// A prediction from a part that cannot be had.
    #[error(
        "{} of layer {layer} is predicted from {} of layer {from_layer}; \
         accepted: parts with an input that come before it",
        <&str>::from(*code), <&str>::from(*from_code)
    )]
    Needs {
        /// Layer of the predicted part.
        layer: u32,
        /// Which tensor of the layer.
        code: PartCode,
        /// Layer of what it is predicted from.
        from_layer: u32,
        /// Which tensor of that layer.
        from_code: PartCode,
    },
}

impl ProfileError {
    pub(super) const fn length(field: &'static str, got: usize, want: usize) -> Self {
        Self::Length { field, got, want }
    }

    pub(super) const fn number(field: &'static str, got: f64, want: &'static str) -> Self {
        Self::Number { field, got, want }
    }
}

pub(super) type Checked = Result<(), ProfileError>;

impl Profile {
    /// Checks that the tables fit each other (P1).
    ///
    /// # Errors
    /// [`ProfileError`] names the first table that does not fit, and what is accepted.
    pub fn check(&self) -> Checked {
        at_most("model name", self.model.len(), NAME_BYTES_MAX)?;
        at_most("revision", self.revision.len(), NAME_BYTES_MAX)?;
        let fingerprint = self.weights_fingerprint.len();
        at_most("weights fingerprint", fingerprint, NAME_BYTES_MAX)?;
        let sinks = (self.sinks <= SINKS_MAX).then_some(());
        sinks.ok_or_else(|| ProfileError::number("sinks", self.sinks.into(), "0 to 64"))?;
        if let Some(rope) = &self.rope {
            at_most("rope frequencies", rope.frequencies.len(), PAIRS_MAX)?;
            for frequency in &rope.frequencies {
                let good = (0.0..=4.0).contains(frequency);
                let wrong = || ProfileError::number("rope frequency", *frequency, "0 to 4");
                good.then_some(()).ok_or_else(wrong)?;
            }
        }
        at_most("measured levels", self.measured.len(), MEASURED_MAX)?;
        for one in &self.measured {
            all("measured bits", &[one.bits, one.predicted_kl], FINITE)?;
            if !one.costs.is_empty() {
                exactly("costs", one.costs.len(), self.parts.len())?;
                all("costs", &one.costs, FINITE)?;
            }
        }
        at_most("parts", self.parts.len(), PARTS_MAX)?;
        for pair in self.parts.array_windows::<2>() {
            let [before, part] = pair.each_ref().map(|part| (part.layer, part.code as u8));
            if before >= part {
                let [_, part] = pair;
                let (layer, code) = (part.layer, part.code);
                return Err(ProfileError::Order { layer, code });
            }
        }
        self.parts
            .iter()
            .try_for_each(|part| self.check_part(part))?;
        self.check_exact()
    }

    fn check_part(&self, part: &PartTables) -> Checked {
        let channels = channels(part.heads, part.dim)?;
        if part.layer as usize >= LAYERS_MAX {
            return Err(ProfileError::number(
                "layer",
                part.layer.into(),
                "0 to 1023",
            ));
        }
        if !matches!(part.code, PartCode::K | PartCode::V) {
            let got = f64::from(part.code as u8);
            return Err(ProfileError::number("part code", got, "1 (k) or 2 (v)"));
        }
        // V never turns, and its heads may be narrower.
        if let Some(rope) = self.rope.as_ref().filter(|_| part.code == PartCode::K) {
            let most = part.dim as usize / 2;
            at_most("rope frequencies", rope.frequencies.len(), most)?;
        }
        if let Some(input) = &part.input {
            exactly("input centre", input.centre.len(), channels)?;
            exactly("input scale", input.scale.len(), channels)?;
            all("input centre", &input.centre, FINITE)?;
            all("input scale", &input.scale, STEP)?;
        }
        exactly("mean", part.plain.mean.len(), channels)?;
        all("mean", &part.plain.mean, FINITE)?;
        check_transform(&part.plain.transform, channels)?;
        check_levels(&part.plain.levels, channels)?;
        at_most("cross tables", part.crosses.len(), QUALITIES)?;
        let mut crosses = part.crosses.iter();
        crosses.try_for_each(|cross| self.check_cross(part, cross, channels))
    }

    fn check_cross(&self, part: &PartTables, cross: &Cross, channels: usize) -> Checked {
        let count = cross.needs.len();
        if count == 0 {
            return Err(ProfileError::length("needed parts", count, 1));
        }
        at_most("needed parts", count, NEEDS_MAX)?;
        let mut columns = 0;
        for (layer, code) in &cross.needs {
            let before = (*layer, *code as u8) < (part.layer, part.code as u8);
            let input = self
                .part(*layer, *code)
                .filter(|input| input.input.is_some());
            let Some(input) = input.filter(|_| before) else {
                return Err(ProfileError::Needs {
                    layer: part.layer,
                    code: part.code,
                    from_layer: *layer,
                    from_code: *code,
                });
            };
            columns += input.channels();
        }
        check_matrix("weights", &cross.weights, (channels, columns))?;
        exactly("bias", cross.bias.len(), channels)?;
        all("bias", &cross.bias, FINITE)?;
        check_transform(&cross.transform, channels)?;
        check_levels(&cross.levels, channels)
    }
}

/// Channels of such a part, within the limit.
pub(super) fn channels(heads: u32, dim: u32) -> Result<usize, ProfileError> {
    let channels = (heads as usize).saturating_mul(dim as usize);
    match channels {
        1..=CHANNELS_MAX => Ok(channels),
        _ => Err(ProfileError::number(
            "channels",
            channels as f64,
            "1 to 4096",
        )),
    }
}

fn check_transform(transform: &Transform, channels: usize) -> Checked {
    check_matrix("forward", &transform.forward, (channels, channels))?;
    check_matrix("inverse", &transform.inverse, (channels, channels))
}

pub(super) fn check_matrix(
    field: &'static str,
    matrix: &Matrix16,
    (rows, columns): (usize, usize),
) -> Checked {
    exactly(field, matrix.rows(), rows)?;
    exactly(field, matrix.columns(), columns)
}

fn check_levels(levels: &[Option<LevelTables>], channels: usize) -> Checked {
    for level in levels.iter().flatten() {
        all("step", &[level.step], STEP)?;
        exactly("scale indices", level.scales.len(), channels)?;
        let is_index = |index: &u8| *index <= scales::SCALE_MAX || *index == DEAD;
        if let Some(index) = level.scales.iter().find(|index| !is_index(index)) {
            let got = f64::from(*index);
            return Err(ProfileError::number("scale index", got, "0 to 28, or 255"));
        }
        match &level.predictor {
            TokenPredictor::Anchor { group: 0 | 1 } => {
                return Err(ProfileError::number("anchor group", 1.0, "2 and above"));
            }
            TokenPredictor::First { rho } => exactly("rho", rho.len(), channels)?,
            TokenPredictor::Mean | TokenPredictor::Anchor { .. } => {}
        }
    }
    Ok(())
}

pub(super) fn at_most(field: &'static str, got: usize, want: usize) -> Checked {
    let good = (got <= want).then_some(());
    good.ok_or(ProfileError::length(field, got, want))
}

pub(super) fn exactly(field: &'static str, got: usize, want: usize) -> Checked {
    let good = (got == want).then_some(());
    good.ok_or(ProfileError::length(field, got, want))
}

/// A range of numbers, and how it reads.
pub(super) type Range = (fn(f32) -> bool, &'static str);

const fn finite(number: f32) -> bool {
    number.is_finite()
}

/// Steps are powers away from what single precision cannot divide by or multiply with.
fn step(number: f32) -> bool {
    (1e-30..=1e30).contains(&number)
}

pub(super) const FINITE: Range = (finite, "finite numbers");
pub(super) const STEP: Range = (step, "1e-30 to 1e30");

pub(super) fn all(field: &'static str, numbers: &[f32], (good, want): Range) -> Checked {
    match numbers.iter().find(|number| !good(**number)) {
        Some(number) => Err(ProfileError::number(field, f64::from(*number), want)),
        None => Ok(()),
    }
}
