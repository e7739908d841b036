//! One calibration: which part is worked on when, and what is kept of it.
//!
//! Upstairs:   [`super::calibrate`].
//! Downstairs: every step of calibration.
//!
//! Samples of a part are read each time they are needed and never kept: memory grows with the
//! channels and not with the documents.
//!
//! Not here on purpose: no mathematics and no table format.

use std::sync::atomic::{AtomicUsize, Ordering};

use kvtier_proto::layout::PartCode;

use super::algebra::{Moments, Samples, narrow};
use super::costs::Costs;
use super::cross::{Fit, Loop, Name, Part};
use super::each::each;
use super::input::Input;
use super::metric::{Basis, Metric, least_trace};
use super::rate::Choice;
use super::samples::{Document, Fisher, SampleError};
use super::steps::{Target, meet};
use super::{CalibrateError, Options, Progress, plain};

/// Most closed loops until a level's cost is its target.
const LOOPS_MAX: usize = 4;
/// How near is near enough.
const NEAR: f64 = 0.03;
/// A cost grows about with this power of the step, at the rates of the ladder.
const POWER: f64 = 1.7;
/// Levels of an 8-bit input on each side of its centre.
const INPUT_MAX: f64 = 127.0;
/// Tokens that the range of an input is chosen on.
const RANGE_TOKENS: usize = 4096;
/// Ranges to choose from, as parts of the largest magnitude.
const RANGES: [f32; 7] = [1.0, 0.8, 0.6, 0.45, 0.35, 0.25, 0.18];

/// What was found about one part.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) name: Name,
    pub(super) heads: usize,
    pub(super) dim: usize,
    /// 0 where no mean is taken off.
    pub(super) mean: Vec<f64>,
    metric: Metric,
    pub(super) basis: Basis,
    /// Centre and scale of each channel as an input.
    pub(super) centre: Vec<f32>,
    pub(super) scale: Vec<f32>,
    /// Cost of each step of each plain target's grid.
    curves: Vec<Option<Vec<f64>>>,
}

/// A part at a plain level.
#[derive(Debug)]
pub(super) struct Coded {
    pub(super) step: f64,
    pub(super) choice: Choice,
    pub(super) cost: Option<f64>,
}

pub(super) struct Run<'a> {
    pub(super) input: Input<'a>,
    pub(super) fisher: Option<&'a Fisher>,
    pub(super) options: &'a Options,
    /// Plain levels, with those that a level across layers falls back to.
    pub(super) plain: Vec<Target>,
    /// Levels across layers.
    pub(super) cross: Vec<Target>,
    pub(super) names: Vec<Name>,
    least_trace: f64,
    starts: Vec<usize>,
    costs: Costs,
    report: &'a (dyn Fn(Progress) + Sync),
    done: AtomicUsize,
}

impl<'a> Run<'a> {
    pub(super) fn new(
        input: Input<'a>,
        fisher: Option<&'a Fisher>,
        options: &'a Options,
        report: &'a (dyn Fn(Progress) + Sync),
    ) -> Self {
        let document = input.documents.first();
        let layers = document.map_or(0, Document::layers);
        let codes = [PartCode::K, PartCode::V];
        let names = (0..layers).flat_map(|layer| codes.map(|code| (layer, code)));
        let shape = |document: &Document<'_>| {
            codes.map(|code| {
                let tensor = document.tensor(code);
                (code, tensor.heads, tensor.dim)
            })
        };
        let shapes = document.map(shape);
        let (cross, mut plain): (Vec<Target>, Vec<Target>) =
            options.targets.iter().partition(|target| target.is_cross());
        for target in &cross {
            if !plain
                .iter()
                .any(|other| other.quality() == target.quality())
            {
                plain.push(target.plain());
            }
        }
        plain.sort_by_key(|target| target.level);
        let least = fisher.zip(shapes.as_ref());
        Self {
            starts: input.starts(),
            names: names.collect(),
            least_trace: least.map_or(0.0, |(fisher, shapes)| least_trace(fisher, layers, shapes)),
            costs: Costs::new(),
            done: AtomicUsize::new(0),
            plain,
            cross,
            input,
            fisher,
            options,
            report,
        }
    }

    fn samples(&self, name: Name) -> Result<Samples, CalibrateError> {
        let (layer, code) = name;
        let read = self.input.samples(layer, code);
        read.map_err(|source| self.at_fault(source, name))
    }

    /// Names the document that made reading fail.
    fn at_fault(&self, source: SampleError, (layer, code): Name) -> CalibrateError {
        let is_bad = |document: &Document<'_>| document.tensor(code).layer(layer).is_err();
        let index = self.input.documents.iter().position(is_bad);
        CalibrateError::Document {
            index: index.unwrap_or(0),
            source,
        }
    }

    fn one_done(&self) {
        let passes = 2 + self.cross.len();
        let done = 1 + self.done.fetch_add(1, Ordering::Relaxed);
        (self.report)(Progress {
            done,
            total: (passes * self.names.len()).max(done),
        });
    }

    /// Statistics of every part.
    pub(super) fn find(&self) -> Result<Vec<Found>, CalibrateError> {
        each(self.options.threads, &self.names, |name| {
            let found = self.find_one(*name);
            self.one_done();
            found
        })
    }

    fn find_one(&self, name: Name) -> Result<Found, CalibrateError> {
        let (layer, code) = name;
        let singular = || CalibrateError::Singular { layer, code };
        let mut samples = self.samples(name)?;
        let shape = self
            .input
            .documents
            .first()
            .map(|document| document.tensor(code));
        let (heads, dim) = shape.map_or((1, samples.nrows()), |shape| (shape.heads, shape.dim));
        let moments = Moments::of(&samples);
        let metric = match self.fisher {
            Some(fisher) => Metric::of(fisher, name, (heads, dim), self.least_trace)
                .map_err(|head| CalibrateError::Indefinite { layer, code, head })?,
            None => Metric::flat(&moments),
        };
        let basis = metric.basis(&moments.covariance()).ok_or_else(singular)?;
        let mean: Vec<f64> = moments.mean().iter().copied().collect();
        plain::centre(&mut samples, &mean);
        let scale = ranges(&samples);
        let coefficients = plain::coefficients(&basis, &samples);
        let curve = |target: &Target| {
            let steps = target.grid(self.coefficients());
            plain::costs_of_steps(&basis, &coefficients, &steps)
        };
        Ok(Found {
            name,
            heads,
            dim,
            metric,
            curves: self.plain.iter().map(curve).collect(),
            basis,
            centre: mean.iter().copied().map(narrow).collect(),
            scale,
            mean,
        })
    }

    /// Coefficients of all parts.
    fn coefficients(&self) -> usize {
        let width = |document: &Document<'_>, code| document.tensor(code).width();
        let first = self.input.documents.first();
        let each = first.map_or(0, |first| {
            width(first, PartCode::K) + width(first, PartCode::V)
        });
        first.map_or(0, Document::layers) * each
    }

    /// The step of each plain target.
    pub(super) fn steps(&self, found: &[Found]) -> Result<Vec<f64>, CalibrateError> {
        let mut chosen = Vec::new();
        for (index, target) in self.plain.iter().enumerate() {
            if self.fisher.is_none() {
                chosen.push(target.step_of_rms);
                continue;
            }
            let steps = target.grid(self.coefficients());
            let mut sums = vec![0.0; steps.len()];
            for curve in found
                .iter()
                .filter_map(|part| part.curves.get(index)?.as_ref())
            {
                for (sum, cost) in sums.iter_mut().zip(curve) {
                    *sum += cost;
                }
            }
            let step = meet(&steps, &sums, target.predicted_kl());
            chosen.push(step.ok_or(CalibrateError::OutOfReach {
                level: target.name(),
                kl: target.kl,
                most: sums.last().map_or(0.0, |most| most * target.optimism),
            })?);
        }
        Ok(chosen)
    }

    /// Codes every part at every plain step. Drops the mean of a part that is coded in fewer bits
    /// without.
    pub(super) fn code(
        &self,
        found: &mut [Found],
        steps: &[f64],
    ) -> Result<Vec<Vec<Coded>>, CalibrateError> {
        let coded = each(self.options.threads, found, |part: &Found| {
            let samples = self.samples(part.name)?;
            let zero = vec![0.0; part.mean.len()];
            let with = self.code_one(part, samples.clone(), &part.mean, steps);
            let without = self.code_one(part, samples, &zero, steps);
            let bits = |coded: &[Coded]| coded.iter().map(|level| level.choice.bits).sum::<f64>();
            let pays = bits(&with) < bits(&without) || with.is_empty();
            self.one_done();
            Ok::<_, CalibrateError>((pays, if pays { with } else { without }))
        })?;
        let mut levels = Vec::with_capacity(coded.len());
        for (part, (mean_pays, coded)) in found.iter_mut().zip(coded) {
            if !mean_pays {
                part.mean.fill(0.0);
            }
            levels.push(coded);
        }
        Ok(levels)
    }

    fn code_one(
        &self,
        part: &Found,
        mut samples: Samples,
        mean: &[f64],
        steps: &[f64],
    ) -> Vec<Coded> {
        plain::centre(&mut samples, mean);
        let coefficients = plain::coefficients(&part.basis, &samples);
        let one = |step: &f64| {
            let (integers, errors) = plain::quantise(&coefficients, *step);
            let integers = plain::integers(integers, samples.ncols(), &self.starts);
            Coded {
                step: *step,
                choice: integers.choose(&self.costs),
                cost: plain::cost(&part.basis, &errors),
            }
        };
        steps.iter().map(one).collect()
    }

    /// Fits of every part at every level across layers, levels beside one another.
    pub(super) fn cross(
        &self,
        found: &[Found],
        steps: &[f64],
    ) -> Result<Vec<Vec<Fit>>, CalibrateError> {
        each(self.options.threads, &self.cross, |target| {
            let of = |plain: &Target| plain.quality() == target.quality();
            let plain = self.plain.iter().zip(steps).find(|(plain, _)| of(plain));
            // Every level across layers has its plain one.
            self.cross_level(found, target, plain.unwrap_or((target, &1.0)))
        })
    }

    fn cross_level(
        &self,
        found: &[Found],
        target: &Target,
        (alike, &plain): (&Target, &f64),
    ) -> Result<Vec<Fit>, CalibrateError> {
        if self.fisher.is_none() {
            return self.closed_loop(found, (target.step_of_rms, plain));
        }
        // The plain step meets the plain target; the two need not be the same.
        let apart = target.predicted_kl() / alike.predicted_kl();
        let mut step = plain * apart.powf(1.0 / POWER);
        let mut fits = self.closed_loop(found, (step, plain))?;
        for _ in 1..LOOPS_MAX {
            let cost: f64 = fits.iter().filter_map(|fit| fit.cost).sum();
            let miss = target.predicted_kl() / cost.max(f64::MIN_POSITIVE);
            if (miss - 1.0).abs() < NEAR {
                break;
            }
            step *= miss.powf(1.0 / POWER).clamp(0.2, 5.0);
            fits = self.closed_loop(found, (step, plain))?;
        }
        Ok(fits)
    }

    fn closed_loop(
        &self,
        found: &[Found],
        (step, plain_step): (f64, f64),
    ) -> Result<Vec<Fit>, CalibrateError> {
        let back = usize::try_from(self.options.back).unwrap_or(usize::MAX);
        let mut parts = Loop::new(back, &self.starts, &self.costs);
        let mut fits = Vec::with_capacity(found.len());
        for part in found {
            let samples = self.samples(part.name)?;
            let of = Part {
                metric: &part.metric,
                centre: &part.centre,
                scale: &part.scale,
                step,
                mean: &part.mean,
                basis: &part.basis,
                plain_step,
            };
            let (layer, code) = part.name;
            let fit = parts.part(part.name, &samples, &of);
            fits.push(fit.ok_or(CalibrateError::Singular { layer, code })?);
            self.one_done();
        }
        Ok(fits)
    }
}

/// Scale of each channel of centred samples as an 8-bit input: the range with the least error,
/// where what lies outside is clamped.
fn ranges(centred: &Samples) -> Vec<f32> {
    let every = centred.ncols().div_ceil(RANGE_TOKENS).max(1);
    let rows = centred.row_iter().map(|row| {
        let some: Vec<f32> = row.iter().copied().step_by(every).collect();
        let most = some
            .iter()
            .fold(0.0_f32, |most, value| most.max(value.abs()));
        let error = |range: f32| {
            let scale = range * most / narrow(INPUT_MAX);
            let of = |value: &f32| {
                let whole = (value / scale).round_ties_even().clamp(-127.0, 127.0);
                f64::from(value - whole * scale).powi(2)
            };
            some.iter().map(of).sum::<f64>()
        };
        let best = RANGES
            .into_iter()
            .min_by(|a, b| error(*a).total_cmp(&error(*b)));
        let scale = best.unwrap_or(1.0) * most / narrow(INPUT_MAX);
        // A channel that never changes has no range; any scale reads it as 0.
        if scale.is_normal() { scale } else { 1.0 }
    });
    rows.collect()
}
