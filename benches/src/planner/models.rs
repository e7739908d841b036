//! Models and machines by their published numbers, as requests to plan.
//!
//! Upstairs:   `solver`, `shapes`, `wins`.
//! Downstairs: `kvtierd::restore::plan`.

use kvtier_proto::Level;
use kvtierd::restore::plan::{Form, GPU, PlanRequest, Prefill, Reader, Resource, Tier, Variant};

/// What a model keeps and what its tokens take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Model {
    pub(super) name: &'static str,
    pub(super) layers: f64,
    /// Keys and values, and hidden states, of a token in all layers. Unit: bytes.
    pub(super) kv_bytes: f64,
    pub(super) hidden_bytes: f64,
    /// Of a token, and more of it for each token before. Unit: floating point operations.
    pub(super) flop: f64,
    pub(super) flop_of_context: f64,
}

const fn model(
    name: &'static str,
    (layers, kv_kib, hidden_kib): (f64, f64, f64),
    (gflop, gflop_of_1k): (f64, f64),
) -> Model {
    Model {
        name,
        layers,
        kv_bytes: kv_kib * 1024.0,
        hidden_bytes: hidden_kib * 1024.0,
        flop: gflop * 1e9,
        flop_of_context: gflop_of_1k * 1e9 / 1024.0,
    }
}

/// In bf16.
pub(super) const MODELS: [Model; 5] = [
    model("Llama-3.1-8B", (32.0, 128.0, 256.0), (13.96, 0.537)),
    model("Llama-2-7B (MHA)", (32.0, 512.0, 256.0), (12.96, 0.537)),
    model("Qwen3-0.6B", (28.0, 112.0, 56.0), (0.88, 0.235)),
    model("DeepSeek-V3 (MLA)", (61.0, 68.6, 854.0), (71.40, 5.117)),
    model("Llama-3.1-70B", (80.0, 320.0, 1280.0), (136.9, 2.684)),
];

/// What an H100 does of prefill. Unit: floating point operations a second.
pub(super) const H100: f64 = 445e12;

impl Model {
    /// Prefill on a GPU that does so many operations a second.
    pub(super) fn prefill(&self, flop_s: f64) -> Prefill {
        Prefill {
            per_token_s: self.flop / flop_s,
            attention_s: self.flop_of_context / 2.0 / flop_s,
            ..Prefill::default()
        }
    }

    /// To make keys and values of a token's hidden states. Unit: seconds.
    pub(super) fn project_s(&self, flop_s: f64) -> f64 {
        let (hidden, kv) = (self.hidden_bytes / 2.0, self.kv_bytes / 2.0);
        2.0 * hidden * kv / self.layers / flop_s
    }

    /// Chunks of a context over one link, without variants yet.
    pub(super) fn request(&self, (chunks, tokens): (usize, u32), flop_s: f64) -> PlanRequest {
        PlanRequest {
            chunks: vec![tokens; chunks],
            layers: 1,
            cells: vec![Vec::new(); chunks],
            resources: vec![Resource::processor(1.0)],
            prefill: self.prefill(flop_s),
            layer_weights: Vec::new(),
            suffix_tokens: 64,
            reader: Reader {
                two_ended: true,
                hidden_proj: true,
                gpu_decode: true,
                ..Reader::default()
            },
            damage_max: 0.0,
            rates_are_poor: false,
        }
    }
}

/// Keys and values at a level, through the first link.
pub(super) fn kv(level: Level, bytes: f64) -> Variant {
    Variant::new(Form::Kv(level), Tier::Device).through(GPU + 1, bytes)
}

/// Hidden states through the first link, and their projection.
pub(super) fn hidden(bytes: f64, project_s: f64) -> Variant {
    let hidden = Variant::new(Form::Hidden, Tier::Device);
    hidden.through(GPU + 1, bytes).through(GPU, project_s)
}
