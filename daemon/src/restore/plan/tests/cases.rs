//! Requests to plan: seeded random ones, and machines and models as they are.

use kvtier_proto::Level;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::restore::plan::{Form, GPU, PlanRequest, Prefill, Reader, Resource, Tier, Variant};

/// A reader that can do everything.
pub(super) const ABLE: Reader = Reader {
    prefix_only: false,
    two_ended: true,
    layer_events: false,
    hidden_proj: true,
    gpu_decode: true,
};

pub(super) fn raw(tier: Tier) -> Variant {
    Variant::new(Form::Kv(Level::RAW), tier)
}

/// Equal chunks of 512 tokens, equal cells, one device: seconds as they come.
pub(super) fn simple(chunks: usize, layers: usize, variants: Vec<Variant>) -> PlanRequest {
    PlanRequest {
        chunks: vec![512; chunks],
        layers,
        cells: vec![variants; chunks * layers],
        resources: vec![
            Resource::processor(1.0),
            Resource::bytes(1.0, 0.0),
            Resource::bytes(1.0, 0.0),
        ],
        prefill: Prefill::default(),
        layer_weights: vec![],
        suffix_tokens: 0,
        reader: ABLE,
        damage_max: 0.0,
        rates_are_poor: false,
    }
}

/// Where the chunks of a random request lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lie {
    /// All alike.
    Uniform,
    /// The first in host memory, then the device, then the network: least recently used first out
    /// of a tree.
    Layered,
    /// Anything anywhere.
    Scattered,
}

/// A random request of 2 to 4 resources with mixed tiers, levels and, of some models, hidden
/// states.
pub(super) fn random(
    seed: u64,
    chunks: (usize, usize),
    layers: (usize, usize),
) -> (PlanRequest, Lie) {
    let mut draw = StdRng::seed_from_u64(seed);
    let chunks = draw.random_range(chunks.0..=chunks.1);
    let layers = draw.random_range(layers.0..=layers.1);
    let links = draw.random_range(1..=3);
    let lie = [Lie::Uniform, Lie::Layered, Lie::Scattered][draw.random_range(0..3)];
    let mut log = |from: f64, to: f64| (draw.random_range(from.ln()..to.ln())).exp();
    let bytes = 1e6;
    let prefill_s = log(1e-5, 1e-3); // of a cell without context
    let grows = log(0.1, 4.0); // of the last chunk's cells
    let per_token_s = prefill_s * layers as f64 / 512.0;
    let last = (chunks * 512) as f64;
    let eta = log(0.25, 4.0);
    let rates: Vec<f64> = (0..links).map(|_| log(0.5e9, 5e10)).collect();
    let ratios: Vec<f64> = [1.0, 1.45, 2.5, 4.5]
        .map(|ratio| ratio * log(0.9, 1.1))
        .to_vec();
    let damage_of: Vec<f64> = [0.0, 0.0, 0.1, 1.0]
        .map(|one| one * log(0.8, 1.25))
        .to_vec();
    let damage_max = [0.0, 0.1, 0.5, 1.0][draw.random_range(0..4)];
    let has_hidden = draw.random_bool(0.5);
    let cuts = [draw.random_range(0..=chunks), draw.random_range(0..=chunks)];
    let mut cells = Vec::new();
    for chunk in 0..chunks {
        let tier = match lie {
            Lie::Uniform => links - 1,
            Lie::Layered => cuts
                .iter()
                .filter(|cut| chunk >= **cut)
                .count()
                .min(links - 1),
            Lie::Scattered => draw.random_range(0..links),
        };
        for layer in 0..layers {
            let mut cell = Vec::new();
            for (level, (ratio, damage)) in ratios.iter().zip(&damage_of).enumerate() {
                let form = Form::Kv(Level(level as u8));
                let damage = damage * (2.0 - layer as f64 / layers as f64) / 1.5;
                cell.push(through(form, tier, bytes / ratio).damaging(damage));
            }
            if has_hidden {
                let hidden = through(Form::Hidden, tier, bytes * eta);
                cell.push(hidden.through(GPU, prefill_s / 8.0));
            }
            cells.push(cell);
        }
    }
    let mut resources = vec![Resource::processor(draw.random_range(0.3..=1.0))];
    resources.extend(rates.iter().map(|rate| Resource::bytes(*rate, 0.0)));
    let request = PlanRequest {
        chunks: vec![512; chunks],
        layers,
        cells,
        resources,
        prefill: Prefill {
            per_token_s,
            attention_s: per_token_s * grows / (2.0 * last),
            ..Prefill::default()
        },
        layer_weights: vec![],
        suffix_tokens: [0, 64][draw.random_range(0..2)],
        reader: Reader {
            layer_events: draw.random_bool(0.5),
            ..ABLE
        },
        damage_max,
        rates_are_poor: false,
    };
    (request, lie)
}

/// Resource 1 is the way into the engine; what lies further away comes through 2 or 3 too.
fn through(form: Form, tier: usize, bytes: f64) -> Variant {
    let at = [Tier::Memory, Tier::Device, Tier::Remote][tier];
    let variant = Variant::new(form, at).through(1, bytes);
    if tier == 0 {
        variant
    } else {
        variant.through(1 + tier, bytes)
    }
}
