//! Plans of random machines and models beside the bounds that no plan beats.
//!
//! Upstairs:   the suite.
//! Downstairs: `models`; `kvtierd::restore::plan`.

use kvtier_proto::Level;
use kvtierd::restore::plan::{
    Form, GPU, PlanRequest, Reader, Resource, Tier, Variant, plan, staircase_bound_s,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::models::{H100, MODELS};
use super::quantile;
use kvtier_benches::report::{Problem, Report};

/// Bar of DESIGN 14.
const BAR: f64 = 1.02;
/// Levels that are stored: size of raw bytes over theirs, and damage.
const LEVELS: [(Level, f64, f64); 4] = [
    (Level::RAW, 1.0, 0.0),
    (Level::LOSSLESS, 1.49, 0.0),
    (Level::TRANSPARENT, 3.49, 0.1),
    (Level::BALANCED, 5.58, 1.0),
];

/// Where chunks lie: all on the last link, or the first in memory and the rest farther and farther.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lie {
    Alike,
    Layered,
}

/// All kinds of requests. Where a suffix runs layer by layer, the bounds let it overlap with all
/// loads, which no order can.
pub(super) fn rows(report: &mut Report, seeds: u64) -> Result<(), Problem> {
    let kinds = [
        ("alike", Lie::Alike, false),
        ("layer_events", Lie::Alike, true),
        ("layered", Lie::Layered, false),
    ];
    for (name, lie, layer_events) in kinds {
        let (mut fluid, mut stairs) = (Vec::new(), Vec::new());
        for seed in 0..seeds {
            let request = draw(seed, lie, layer_events);
            let plan = plan(&request)?;
            let bound_s = staircase_bound_s(&request)?.max(plan.bounds.both_s());
            fluid.push(plan.ttft_s / plan.bounds.both_s());
            stairs.push(plan.ttft_s / bound_s);
        }
        for (bound, over) in [("fluid", fluid), ("stairs", stairs)] {
            let name = format!("planner.solver.{name}.over_{bound}");
            let p95 = [quantile(&over, 0.95)];
            report.row(&name, "x", &over);
            report.at_most(format!("{name}_p95"), "x", &p95, BAR);
        }
    }
    Ok(())
}

fn draw(seed: u64, lie: Lie, layer_events: bool) -> PlanRequest {
    let mut draw = ChaCha8Rng::seed_from_u64(seed);
    let mut log = |from: f64, to: f64| draw.random_range(from.ln()..to.ln()).exp();
    let flop_s = H100 * log(0.1, 1.0);
    let rates = [log(2e10, 5.5e10), log(1e9, 2.5e10), log(2e8, 2e10)];
    let tokens = log(64.0, 2048.0);
    let links = draw.random_range(1..=rates.len());
    let model = one_of(&mut draw, MODELS);
    let chunks = draw.random_range(48..=96);
    let layers = draw.random_range(8..=16);
    let has_hidden = draw.random_bool(0.5);
    let cuts = [draw.random_range(0..=chunks), draw.random_range(0..=chunks)];
    let part = tokens / layers as f64;
    let mut cells = Vec::with_capacity(chunks * layers);
    for chunk in 0..chunks {
        let far = match lie {
            Lie::Alike => links - 1,
            Lie::Layered => cuts
                .iter()
                .filter(|cut| chunk >= **cut)
                .count()
                .min(links - 1),
        };
        let form = |(level, ratio, damage): (Level, f64, f64)| {
            let bytes = part * model.kv_bytes / ratio;
            through(Form::Kv(level), far, bytes).damaging(damage)
        };
        let mut cell: Vec<Variant> = LEVELS.into_iter().map(form).collect();
        if has_hidden {
            let states = through(Form::Hidden, far, part * model.hidden_bytes);
            cell.push(states.through(GPU, part * model.project_s(flop_s)));
        }
        cells.extend(std::iter::repeat_n(cell, layers));
    }
    let mut resources = vec![Resource::processor(1.0)];
    resources.extend(
        rates
            .iter()
            .take(links)
            .map(|rate| Resource::bytes(*rate, 0.0)),
    );
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "some thousands"
    )]
    let tokens = tokens as u32;
    PlanRequest {
        chunks: vec![tokens; chunks],
        layers,
        cells,
        resources,
        reader: Reader {
            layer_events,
            two_ended: true,
            hidden_proj: true,
            gpu_decode: true,
            prefix_only: false,
        },
        damage_max: one_of(&mut draw, [0.0, 0.1, 0.5, 1.0]),
        suffix_tokens: one_of(&mut draw, [0, 64, 256]),
        ..model.request((0, 1), flop_s)
    }
}

#[expect(clippy::indexing_slicing, reason = "below the length")]
fn one_of<T: Copy, const N: usize>(draw: &mut ChaCha8Rng, all: [T; N]) -> T {
    all[draw.random_range(0..N)]
}

/// The first link is the way into the engine; what lies farther comes through another one too.
fn through(form: Form, far: usize, bytes: f64) -> Variant {
    let tier = match far {
        0 => Tier::Memory,
        1 => Tier::Device,
        _ => Tier::Remote,
    };
    let variant = Variant::new(form, tier).through(GPU + 1, bytes);
    match far {
        0 => variant,
        far => variant.through(GPU + 1 + far, bytes),
    }
}
