//! Calibration: the tables of a model, made from samples of its K and V.
//!
//! Upstairs:   `kvtier calibrate`; benchmarks and tests that want a profile.
//! Downstairs: [`samples`] reads what it is given; [`crate::profile`] holds what it makes.
//!
//! The steps, for every layer and code:
//!   1. The channels' means and covariance, sinks left out.
//!   2. The transform that makes channels independent, in the metric of what the next token minds
//!      (`metric.rs`).
//!   3. One step for all parts of a level, so that the predicted KL is the level's (`steps.rs`).
//!   4. Token predictor and scale indices, by what the integers cost (`rate.rs`).
//!   5. For the levels across layers: the same of what a prediction leaves (`cross.rs`).
//!
//! Invariants kept here
//!   P1  The same samples, matrices and options make the same profile on the same machine, on any
//!       number of threads.
//!   P2  Too few tokens are refused: tables that fit the samples by heart code nothing else.
//!
//! Not here on purpose: no file, no clock, and no judgement of quality: a predicted KL is a
//! number to choose a step by, and the benchmarks measure the real one.

use kvtier_proto::layout::PartCode;

mod algebra;
mod costs;
mod cross;
mod each;
pub mod exact;
mod input;
pub mod measure;
mod metric;
mod plain;
mod rate;
mod run;
pub mod samples;
mod steps;
mod tables;

use cross::Fit;
use input::Input;
use rate::Choice;
use run::{Coded, Found, Run};
use samples::{Document, Fisher, SampleError};
pub use steps::Target;

use crate::profile::{Profile, ProfileError, Rope, TokenPredictor};

/// Tokens that a channel of a part must have at least, for its means and covariance.
pub const TOKENS_PER_CHANNEL: usize = 3;
/// Tokens that an input of a prediction must have at least.
pub const TOKENS_PER_INPUT: usize = 3;

/// Whose tables they are, as descriptors have it.
#[derive(Debug, Clone, Default)]
pub struct Model {
    /// Repository or path of the model.
    pub name: String,
    /// Revision of the model; may be empty.
    pub revision: String,
    /// Hash of the weights; may be empty.
    pub weights_fingerprint: Vec<u8>,
}

/// What to make.
#[derive(Debug, Clone)]
pub struct Options {
    /// Rotation of K in the samples; `None` where K is not rotated.
    pub rope: Option<Rope>,
    /// Tokens at the front of a prefix that every level keeps exactly.
    pub sinks: u32,
    /// Layers that the levels across layers look back.
    pub back: u32,
    /// Levels and their targets, plain ones and those across layers.
    pub targets: Vec<Target>,
    /// Tables of the exact level across layers as well.
    pub lossless_x: bool,
    /// Threads to use at most.
    pub threads: usize,
}

/// Why no profile was made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CalibrateError {
    /// A document is not as it must be.
    #[error("document {index}")]
    Document {
        /// Its index.
        index: usize,
        /// What is wrong.
        #[source]
        source: SampleError,
    },
    /// Documents are of different models.
    #[error("document {index} has other layers, heads or elements than document 0")]
    Mixed {
        /// Index of the first that differs.
        index: usize,
    },
    /// The Fisher matrices are of another model.
    #[error("the Fisher matrices have other layers, heads or sizes of a head than the documents")]
    FisherShape,
    /// A Fisher matrix is none.
    #[error(
        "the Fisher matrix of head {head} of the {} part of layer {layer} has a negative \
         eigenvalue; accepted: sums of outer products g g^T",
        <&str>::from(*code)
    )]
    Indefinite {
        /// Layer of the part.
        layer: usize,
        /// Its code.
        code: PartCode,
        /// The head.
        head: usize,
    },
    /// Too little to learn from (P2).
    #[error(
        "{tokens} tokens after the sinks are too few for {what}: at least {need} are needed; add \
         documents"
    )]
    TooFew {
        /// Tokens given.
        tokens: usize,
        /// Tokens needed.
        need: usize,
        /// What they are needed for.
        what: &'static str,
    },
    /// No step reaches the target.
    #[error(
        "level {level} cannot have a KL of {kl:e}: the coarsest step costs {most:e}; \
         choose less"
    )]
    OutOfReach {
        /// Name of the level.
        level: &'static str,
        /// What was asked for.
        kl: f64,
        /// What is possible.
        most: f64,
    },
    /// The statistics of a part have no solution.
    #[error(
        "the samples of the {} part of layer {layer} do not determine its tables",
        <&str>::from(*code)
    )]
    Singular {
        /// Layer of the part.
        layer: usize,
        /// Its code.
        code: PartCode,
    },
    /// The tables are none that a profile may have, like those of a model with too many channels.
    #[error("no profile can hold these tables")]
    Profile(#[source] ProfileError),
}

/// How far a calibration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Parts done, once for each pass over them.
    pub done: usize,
    /// All of them.
    pub total: usize,
}

/// What calibration measured.
#[derive(Debug, Clone)]
pub struct Report {
    /// Tokens that statistics were made of.
    pub tokens: usize,
    /// Mean context of the Fisher matrices; `None` where there were none. Unit: tokens.
    pub fisher_tokens: Option<f64>,
    /// One a target, in their order.
    pub levels: Vec<LevelReport>,
}

/// What was measured at one level.
#[derive(Debug, Clone)]
pub struct LevelReport {
    /// What it aims at.
    pub target: Target,
    /// One a layer and code.
    pub parts: Vec<PartReport>,
}

/// What was measured of one part.
#[derive(Debug, Clone)]
pub struct PartReport {
    /// Layer of the part.
    pub layer: usize,
    /// Its code.
    pub code: PartCode,
    /// Channels.
    pub width: usize,
    /// Step of its coefficients.
    pub step: f64,
    /// Mean length of a value that is no sink. Unit: bits.
    pub bits: f64,
    /// The same, without a look at other tokens.
    pub mean_bits: f64,
    /// Expected cost of its errors, the level's optimism counted. Unit: nats. `None` without
    /// gradients.
    pub kl: Option<f64>,
    /// What its integers are predicted from.
    pub predictor: TokenPredictor,
}

impl LevelReport {
    /// Mean length of a value that is no sink. Unit: bits.
    pub fn bits(&self) -> f64 {
        let values: usize = self.parts.iter().map(|part| part.width).sum();
        let bits = self.parts.iter().map(|part| part.bits * part.width as f64);
        bits.sum::<f64>() / values.max(1) as f64
    }

    /// KL to expect. Unit: nats a token. `None` without gradients.
    pub fn kl(&self) -> Option<f64> {
        self.parts.iter().map(|part| part.kl).sum()
    }
}

/// Makes the tables of a model.
///
/// # Errors
/// [`CalibrateError`] says what is wrong with the samples, or what is missing.
pub fn calibrate(
    documents: &[Document<'_>],
    fisher: Option<&Fisher>,
    (model, options): (&Model, &Options),
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<(Profile, Report), CalibrateError> {
    let sinks = usize::try_from(options.sinks).unwrap_or(usize::MAX);
    let input = Input {
        documents,
        rope: options.rope.as_ref(),
        sinks,
    };
    check(&input, fisher, options)?;
    let run = Run::new(input, fisher, options, progress);
    let mut found = run.find()?;
    let steps = run.steps(&found)?;
    let plain = run.code(&mut found, &steps)?;
    let cross = run.cross(&found, &steps)?;
    let report = report(&run, &found, &plain, &cross);
    let tables = (&found[..], &plain[..], &cross[..]);
    let mut profile = tables::profile(&run, model, tables, &report.levels)?;
    if options.lossless_x {
        // Two layers back take 0.2 bits a value less, and twice the time to decode.
        exact::add(documents, &mut profile, (1, options.threads), progress)?;
    }
    Ok((profile, report))
}

fn check(
    input: &Input<'_>,
    fisher: Option<&Fisher>,
    options: &Options,
) -> Result<(), CalibrateError> {
    let tokens = input.tokens();
    let Some(first) = input.documents.first() else {
        let (need, what) = (1, "anything");
        return Err(CalibrateError::TooFew { tokens, need, what });
    };
    let codes = [PartCode::K, PartCode::V];
    for (index, document) in input.documents.iter().enumerate() {
        let same = |code: PartCode| document.tensor(code).is_like(first.tensor(code));
        if !codes.into_iter().all(same) {
            return Err(CalibrateError::Mixed { index });
        }
    }
    if fisher.is_some_and(|fisher| !fisher.is_of(first)) {
        return Err(CalibrateError::FisherShape);
    }
    let [k, v] = codes.map(|code| first.tensor(code).width());
    let inputs = usize::try_from(options.back)
        .unwrap_or(usize::MAX)
        .saturating_mul(k + v)
        + k;
    let cross = options.targets.iter().any(Target::is_cross);
    let (need, what) = match cross {
        true => (
            inputs.saturating_mul(TOKENS_PER_INPUT),
            "levels across layers",
        ),
        false => (
            k.max(v).saturating_mul(TOKENS_PER_CHANNEL),
            "a layer's channels",
        ),
    };
    match tokens < need {
        true => Err(CalibrateError::TooFew { tokens, need, what }),
        false => Ok(()),
    }
}

fn report(run: &Run<'_>, found: &[Found], plain: &[Vec<Coded>], cross: &[Vec<Fit>]) -> Report {
    let mut levels = Vec::new();
    for (at, target) in run.plain.iter().enumerate() {
        let coded = plain.iter().filter_map(|part| part.get(at));
        let coded = coded.map(|coded| (coded.step, &coded.choice, coded.cost));
        levels.push(level_report(run, found, target, coded));
    }
    for (target, fits) in run.cross.iter().zip(cross) {
        let coded = fits.iter().map(|fit| (fit.step, &fit.choice, fit.cost));
        levels.push(level_report(run, found, target, coded));
    }
    Report {
        tokens: run.input.tokens(),
        fisher_tokens: run.fisher.map(|fisher| fisher.tokens),
        levels,
    }
}

fn level_report<'a>(
    run: &Run<'_>,
    found: &[Found],
    target: &Target,
    coded: impl Iterator<Item = (f64, &'a Choice, Option<f64>)>,
) -> LevelReport {
    let tokens = run.input.tokens();
    let parts = found.iter().zip(coded).map(|(part, (step, choice, kl))| {
        let width = part.heads * part.dim;
        let (layer, code) = part.name;
        let a_value = |bits: f64| bits / (tokens * width).max(1) as f64;
        PartReport {
            layer,
            code,
            width,
            step,
            bits: a_value(choice.bits),
            mean_bits: a_value(choice.mean_bits),
            kl: kl.map(|kl| kl * target.optimism),
            predictor: choice.predictor.clone(),
        }
    });
    LevelReport {
        target: *target,
        parts: parts.collect(),
    }
}

#[cfg(test)]
mod tests;
