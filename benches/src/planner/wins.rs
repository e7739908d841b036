//! Who wins where: what is fastest over the bandwidth of the link and the length of the context.
//!
//! Upstairs:   the suite.
//! Downstairs: `models`; the daemon's plans, restricted to what each way may do.

use std::path::Path;

use kvtier_proto::Level;
use kvtierd::restore::plan::{PlanRequest, Resource, Variant, plan};

use super::models::{H100, MODELS, Model, hidden, kv};
use super::plot;
use kvtier_benches::report::{Problem, Report};

/// What `balanced` makes of keys and values (docs/LEVELS.md).
const LOSSY: f64 = 5.58;
/// A way is as good as the fastest exact one when it takes at most this much more.
const AS_GOOD: f64 = 1.05;
/// Damage is worth while where it lowers the end by this factor.
const WORTH: f64 = 1.5;
/// A context is cut into so many chunks.
const CHUNKS: u32 = 64;

/// The simplest exact way that is as good as any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Recompute,
    Load,
    Both,
    Hidden,
}

impl Way {
    pub(super) const ALL: [Self; 4] = [Self::Recompute, Self::Load, Self::Both, Self::Hidden];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Recompute => "recompute",
            Self::Load => "load",
            Self::Both => "both ends",
            Self::Hidden => "with hidden states",
        }
    }
}

/// One point of the map.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Point {
    pub(super) way: Way,
    /// First token of the best exact way over that of the better of load and recompute, inverted.
    pub(super) gain: f64,
    /// The same with lossy levels over the best exact way.
    pub(super) lossy: f64,
}

/// The map of one model.
#[derive(Debug)]
pub(super) struct Map {
    pub(super) name: &'static str,
    /// Bandwidths, and a row of points for each context.
    pub(super) bytes_s: Vec<f64>,
    pub(super) rows: Vec<(u32, Vec<Point>)>,
}

impl Point {
    pub(super) fn is_worth_damage(&self) -> bool {
        self.lossy >= WORTH
    }
}

/// Maps of all models.
pub(super) fn rows(report: &mut Report, plots: Option<&Path>, quick: bool) -> Result<(), Problem> {
    let steps = if quick { 8 } else { 36 };
    let mut maps = Vec::new();
    for model in &MODELS {
        let map = map(model, steps)?;
        let name = model.name.split(' ').next().unwrap_or_default();
        let points = || map.rows.iter().flat_map(|(_, points)| points);
        let all = points().count() as f64;
        for way in Way::ALL {
            let count = points().filter(|point| point.way == way).count() as f64;
            let way = way.name().replace(' ', "_");
            report.row(format!("planner.wins.{name}.{way}"), "part", &[count / all]);
        }
        let gains: Vec<f64> = points().map(|point| point.gain).collect();
        report.row(format!("planner.wins.{name}.gain"), "x", &gains);
        let lossy: Vec<f64> = points().map(|point| point.lossy).collect();
        report.row(format!("planner.wins.{name}.lossy_gain"), "x", &lossy);
        maps.push(map);
    }
    if let Some(dir) = plots {
        plot::wins(&dir.join("planner-wins.svg"), &maps)?;
    }
    Ok(())
}

fn map(model: &Model, steps: u32) -> Result<Map, Problem> {
    // From 50 MB/s to 100 GB/s.
    let bandwidth = |step: u32| 5e7 * 2000_f64.powf(f64::from(step) / f64::from(steps - 1));
    let bytes_s: Vec<f64> = (0..steps).map(bandwidth).collect();
    let contexts = (0..8).map(|power| 1024_u32 << power);
    let row = |context: u32| {
        let points = bytes_s
            .iter()
            .map(|bytes_s| point(model, context, *bytes_s));
        Ok((context, points.collect::<Result<_, Problem>>()?))
    };
    let rows = contexts.map(row).collect::<Result<_, Problem>>()?;
    Ok(Map {
        name: model.name,
        bytes_s,
        rows,
    })
}

fn point(model: &Model, context: u32, bytes_s: f64) -> Result<Point, Problem> {
    let tokens = context / CHUNKS;
    let mut request = model.request((CHUNKS as usize, tokens), H100);
    request.resources.push(Resource::bytes(bytes_s, 0.0));
    let tokens = f64::from(tokens);
    let raw = kv(Level::RAW, tokens * model.kv_bytes);
    let states = hidden(tokens * model.hidden_bytes, tokens * model.project_s(H100));
    let lossy = kv(Level::BALANCED, tokens * model.kv_bytes / LOSSY);
    let both = ends(&mut request, &[raw])?;
    let with_hidden = ends(&mut request, &[raw, states])?;
    let with_lossy = ends(&mut request, &[raw, states, lossy])?.0;
    let (both_s, otherwise) = both;
    let (load_s, recompute_s) = (otherwise.load_s, otherwise.recompute_s);
    let best_s = with_hidden.0.min(both_s);
    let ways = [recompute_s, load_s, both_s, best_s];
    let good = Way::ALL.into_iter().zip(ways);
    let mut good = good.filter(|(_, end_s)| *end_s <= AS_GOOD * best_s);
    Ok(Point {
        way: good.next().map_or(Way::Hidden, |(way, _)| way),
        gain: load_s.min(recompute_s) / best_s,
        lossy: best_s / with_lossy.min(best_s),
    })
}

/// When the first token comes, if these forms are stored of every chunk.
fn ends(
    request: &mut PlanRequest,
    forms: &[Variant],
) -> Result<(f64, kvtierd::restore::plan::Otherwise), Problem> {
    for cell in &mut request.cells {
        cell.clear();
        cell.extend(forms);
    }
    let plan = plan(request)?;
    Ok((plan.ttft_s, plan.otherwise))
}
