//! Closed forms and published figures of other systems, by our plans and our executor.
//!
//! Upstairs:   the suite.
//! Downstairs: `models`, `world`; `kvtierd::restore::plan`.
//!
//! Cake (table 3): Llama-2-13B, 16K tokens, five bandwidths. At full share both columns are
//! published; two constants come from there: 3.25 s to compute everything, 3 ms of every chunk's
//! load beside its bytes. HCache: of one chunk, how many layers come as hidden states.

use kvtier_proto::Level;
use kvtierd::restore::plan::{Action, PlanRequest, Prefill, Resource, plan};

use super::bound;
use super::models::{Model, hidden, kv};
use super::trace::Trace;
use super::world::{Learned, Line, Place, Scene, run};
use kvtier_benches::report::{Problem, Report};

/// Gbit/s, and how many times as long loading and computing everything took.
const CAKE: [(f64, f64, f64); 5] = [
    (7.0, 5.62, 1.21),
    (25.0, 2.41, 1.81),
    (32.0, 2.00, 1.91),
    (56.0, 1.69, 2.71),
    (100.0, 1.30, 3.52),
];
/// Parts of the GPU that prefill gets.
const SHARES: [f64; 4] = [1.0, 0.75, 0.5, 0.25];
const CHUNKS: usize = 32;
const CHUNK_TOKENS: u32 = 512;
/// Of keys and values. Unit: bytes.
const CHUNK_BYTES: f64 = 819_200.0 * 512.0;
const CHUNK_FIXED_S: f64 = 3e-3;
const COMPUTE_S: f64 = 3.25;
/// The last of the chunks takes about half as much more than the first.
const GROWS: f64 = 1.0 / 64.0;

/// All of them.
pub(super) fn rows(report: &mut Report) -> Result<(), Problem> {
    for (gbps, over_load, over_compute) in CAKE {
        for share in SHARES {
            let (load, compute) = cake(gbps, share)?;
            let name = format!("planner.cake.{gbps}gbps.share{share}");
            let columns = [
                ("load", load, over_load),
                ("recompute", compute, over_compute),
            ];
            for (column, ours, published) in columns {
                let name = format!("{name}.over_{column}");
                if share < 1.0 {
                    report.row(name, "x", &[ours]);
                } else {
                    report.beside((name, "x"), &[ours], ("published", &[published]), None);
                }
            }
        }
    }
    for (io_h, c_h, c_token) in [
        (3e-3, 1e-3, 8e-3),
        (5e-3, 0.5e-3, 4e-3),
        (2e-3, 1.9e-3, 14e-3),
    ] {
        let (found, split) = hcache(io_h, c_h, c_token)?;
        let name = format!("planner.hcache.{}us.hidden_layers", io_h * 1e6);
        report.beside((name, "layers"), &[found], ("closed form", &[split]), None);
    }
    Ok(())
}

/// The executor's first token beside that of loading, and of computing, everything.
fn cake(gbps: f64, share: f64) -> Result<(f64, f64), Problem> {
    let first_s = COMPUTE_S / (CHUNKS as f64 + GROWS * 31.0 * 16.0);
    let tokens = f64::from(CHUNK_TOKENS);
    let prefill = Prefill {
        per_token_s: first_s * (1.0 - GROWS / 2.0) / tokens,
        attention_s: first_s * GROWS / (2.0 * tokens * tokens),
        ..Prefill::default()
    };
    let chunk_s = CHUNK_BYTES * 8.0 / (gbps * 1e9) + CHUNK_FIXED_S;
    let rate = CHUNK_BYTES / chunk_s;
    let scene = Scene {
        places: vec![Place::Device(0); CHUNKS],
        block_tokens: CHUNK_TOKENS,
        block_bytes: CHUNK_BYTES,
        suffix_tokens: 0,
        prefill,
        devices: vec![Line {
            trace: Trace::steady(rate),
            latency_s: 0.0,
        }],
        link: Trace::steady(1e12),
        gpu: Trace::steady(share),
        hop_s: 0.0,
    };
    let as_seen = Prefill {
        per_token_s: prefill.per_token_s / share,
        attention_s: prefill.attention_s / share,
        ..prefill
    };
    let learned = Learned {
        rates: vec![rate],
        prefill: Some(as_seen),
    };
    let ttft_s = run(&scene, &learned)?.ttft_s;
    Ok((
        bound::load_s(&scene) / ttft_s,
        bound::compute_s(&scene) / ttft_s,
    ))
}

/// Layers of hidden states, planned and by HCache's formula, where loading takes longer than
/// projecting and the other layers are computed. Times of a layer.
fn hcache(io_h: f64, c_h: f64, c_token: f64) -> Result<(f64, f64), Problem> {
    let layers = 40;
    let all = layers as f64;
    let model = Model {
        name: "",
        layers: all,
        kv_bytes: 0.0,
        hidden_bytes: 0.0,
        flop: c_token * all / f64::from(CHUNK_TOKENS),
        flop_of_context: 0.0,
    };
    let request = PlanRequest {
        layers,
        cells: vec![vec![hidden(io_h, c_h), kv(Level::RAW, 1e3)]; layers],
        resources: vec![Resource::processor(1.0), Resource::bytes(1.0, 0.0)],
        suffix_tokens: 0,
        ..model.request((1, CHUNK_TOKENS), 1.0)
    };
    let actions = plan(&request)?.actions;
    let projected = |action: &&Action| matches!(action, Action::Project(_));
    let found = actions.iter().filter(projected).count();
    Ok((found as f64, all * c_token / (c_token + io_h - c_h)))
}
