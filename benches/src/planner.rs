//! Suite `planner`: the daemon's plans and decisions over modelled machines, beside what nobody
//! beats.
//!
//! Upstairs:   `kvtier-bench planner`.
//! Downstairs: `world` runs restores in time of its own, `bound` knows the future; `solver`,
//!             `shapes` and `wins` ask for plans; `plot` draws.
//!
//! Nothing here takes real time or uses a device: the same seeds give the same numbers on every
//! machine.
//!
//! Not here on purpose: engines and daemons as they are. Suite `ttft` has those.

mod bound;
mod engine;
mod models;
mod plot;
mod scenes;
mod shapes;
mod solver;
mod trace;
mod weather;
mod wins;
mod world;

use std::path::PathBuf;

use self::scenes::Kind;
use crate::Common;
use kvtier_benches::report::{Problem, Report};

/// Bars of DESIGN 14: the executor beside the clairvoyant, nineteen of twenty times; and beside the
/// better of loading and computing everything, whatever comes.
const CLAIRVOYANT_BAR: f64 = 1.05;
const PURE_BAR: f64 = 1.03;

/// Options of this suite.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Restores of each kind.
    #[arg(long, default_value_t = 400)]
    seeds: u64,
    /// Only kinds whose name contains this, and nothing else.
    #[arg(long, default_value = "")]
    only: String,
    /// Draw into this folder.
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
}

/// What came of the restores of one kind.
#[derive(Debug, Clone, Default)]
struct Seen {
    /// First token over the clairvoyant's.
    clairvoyant: Vec<f64>,
    /// First token, less a block, over the better of loading and computing everything.
    pure: Vec<f64>,
    /// Of all blocks, those that were loaded for nothing.
    wasted: Vec<f64>,
}

/// Runs the suite.
pub(crate) fn run(options: &Options, common: &Common) -> Result<Report, Problem> {
    let mut report = Report::new("planner", &common.dir);
    let seeds = if common.quick { 40 } else { options.seeds };
    let all = executor(&mut report, seeds, &options.only)?;
    if let Some(dir) = &options.plots {
        plot::spread(&dir.join("planner-executor.svg"), &all)?;
    }
    if options.only.is_empty() {
        solver::rows(&mut report, seeds)?;
        shapes::rows(&mut report)?;
        wins::rows(&mut report, options.plots.as_deref(), common.quick)?;
    }
    Ok(report)
}

fn executor(
    report: &mut Report,
    seeds: u64,
    only: &str,
) -> Result<Vec<(&'static str, Seen)>, Problem> {
    let mut all = Vec::new();
    let mut weathers = Seen::default();
    for kind in Kind::all() {
        if !kind.name.contains(only) {
            continue;
        }
        let mut seen = Seen::default();
        for seed in 0..seeds {
            let one = look(&kind, seed).map_err(|e| format!("{} {seed}: {e}", kind.name))?;
            seen.add(&one);
        }
        seen.report(report, &format!("planner.executor.{}", kind.name));
        if kind.is_bare() {
            weathers.add(&seen);
        }
        all.push((kind.name, seen));
    }
    weathers.report(report, "planner.executor");
    Ok(all)
}

fn look(kind: &Kind, seed: u64) -> Result<Seen, Problem> {
    let (scene, learned) = kind.draw(seed);
    let went = world::run(&scene, &learned)?;
    let pure_s = bound::load_s(&scene).min(bound::compute_s(&scene));
    let blocks = scene.places.len() as f64;
    Ok(Seen {
        clairvoyant: vec![went.ttft_s / bound::clairvoyant_s(&scene)],
        pure: vec![went.ttft_s / pure_s - 1.0 / blocks],
        wasted: vec![went.wasted as f64 / blocks],
    })
}

impl Seen {
    fn add(&mut self, other: &Self) {
        self.clairvoyant.extend(&other.clairvoyant);
        self.pure.extend(&other.pure);
        self.wasted.extend(&other.wasted);
    }

    fn report(&self, report: &mut Report, name: &str) {
        let over = format!("{name}.over_clairvoyant");
        let all = &self.clairvoyant;
        report.row(&over, "x", all);
        report.row(format!("{over}_mean"), "x", &[mean(all)]);
        let p95 = [quantile(all, 0.95)];
        report.at_most(format!("{over}_p95"), "x", &p95, CLAIRVOYANT_BAR);
        report.at_most(format!("{name}.over_pure"), "x", &self.pure, PURE_BAR);
        report.row(format!("{name}.wasted"), "part", &self.wasted);
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The value that this part of all is not above.
fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let below = |at: &usize| *at as f64 + 1.0 >= part * values.len() as f64;
    let at = (0..values.len()).find(below);
    at.and_then(|at| sorted.get(at))
        .copied()
        .unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests;
