//! Scenes to restore in: one for each seed.
//!
//! Upstairs:   the suite.
//! Downstairs: `weather`, `world`.

use kvtierd::restore::plan::Prefill;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::trace::Trace;
use super::weather::{GPU_SHARE, Weather, gpu_share};
use super::world::{Learned, Line, Place, Scene};

/// Tokens of a block.
const BLOCK_TOKENS: u32 = 256;
/// No step takes less than its some hundred kernels. Unit: seconds.
const STEP_LEAST_S: f64 = 1e-3;
/// Bytes of a block: 128 KiB a token.
const BLOCK_BYTES: f64 = 32.0 * 1024.0 * 1024.0;
/// A message over a Unix socket, and a thread that wakes. Unit: seconds.
const HOP_S: f64 = 130e-6;

/// Where the blocks lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lie {
    /// On one device.
    Device,
    /// The front in host memory, the rest on a device: least recently used first out of a tree.
    Layered,
    /// On two devices, one of them three times as fast.
    Devices,
    /// On one device, and a few are nowhere.
    Gaps,
}

/// What is drawn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    pub(super) name: &'static str,
    pub(super) weather: Weather,
    pub(super) lie: Lie,
    /// The GPU decodes for others as well.
    pub(super) shared_gpu: bool,
    /// Nothing was restored before.
    pub(super) first: bool,
    /// Of a step. Unit: seconds.
    pub(super) fixed_s: f64,
}

impl Kind {
    pub(super) fn of(weather: Weather) -> Self {
        Self {
            name: weather.name(),
            weather,
            lie: Lie::Device,
            shared_gpu: weather != Weather::Steady,
            first: false,
            fixed_s: 0.0,
        }
    }

    /// True of the weathers alone.
    pub(super) fn is_bare(&self) -> bool {
        self.name == self.weather.name()
    }

    /// All that the suite runs: every weather, then what else may be other than usual.
    pub(super) fn all() -> Vec<Self> {
        let weathers = Weather::ALL.map(Self::of);
        let drawn = Self::of(Weather::Drawn);
        let others = [
            Self {
                name: "layered",
                lie: Lie::Layered,
                ..drawn
            },
            Self {
                name: "two_devices",
                lie: Lie::Devices,
                ..drawn
            },
            Self {
                name: "gaps",
                lie: Lie::Gaps,
                ..drawn
            },
            Self {
                name: "first",
                first: true,
                ..drawn
            },
            Self {
                name: "fixed_step",
                fixed_s: 1e-3,
                ..drawn
            },
        ];
        weathers.into_iter().chain(others).collect()
    }

    /// A scene, and what earlier restores have taught.
    pub(super) fn draw(&self, seed: u64) -> (Scene, Learned) {
        let mut draw = ChaCha8Rng::seed_from_u64(seed);
        let blocks = draw.random_range(48..=160);
        let load_all_s = log(&mut draw, 0.1, 3.0);
        let compute_all_s = load_all_s * log(&mut draw, 1.0 / 32.0, 32.0);
        let compute_all_s = compute_all_s.max(STEP_LEAST_S * f64::from(blocks));
        let grows = draw.random_range(0.1..3.0);
        let both_s = load_all_s * compute_all_s / (load_all_s + compute_all_s);
        let rate = BLOCK_BYTES * f64::from(blocks) / load_all_s;
        let share = if self.shared_gpu { GPU_SHARE } else { 1.0 };
        let prefill = prefill(
            f64::from(blocks),
            compute_all_s * share,
            grows,
            self.fixed_s,
        );
        let places = places(&mut draw, self.lie, blocks);
        let mut rates = vec![rate];
        if self.lie == Lie::Devices {
            rates = vec![0.75 * rate, 0.25 * rate];
        }
        let latency_s = log(&mut draw, 1e-4, 5e-3);
        let line = |rate: &f64| Line {
            trace: self.weather.trace(&mut draw, both_s).times(*rate),
            latency_s,
        };
        let devices = rates.iter().map(line).collect();
        let fastest = rate.max(BLOCK_BYTES * f64::from(blocks) / compute_all_s);
        let link = Trace::steady(fastest * log(&mut draw, 4.0, 20.0));
        let gpu = match self.shared_gpu {
            true => gpu_share(&mut draw, both_s),
            false => Trace::steady(1.0),
        };
        let scene = Scene {
            places,
            block_tokens: BLOCK_TOKENS,
            block_bytes: BLOCK_BYTES,
            suffix_tokens: 64,
            prefill,
            devices,
            link,
            gpu,
            hop_s: HOP_S,
        };
        let learned = match self.first {
            true => Learned::default(),
            false => Learned {
                rates,
                prefill: Some(slower(prefill, share)),
            },
        };
        (scene, learned)
    }
}

fn log(draw: &mut ChaCha8Rng, from: f64, to: f64) -> f64 {
    draw.random_range(from.ln()..to.ln()).exp()
}

/// All blocks take `all_s`, the last one `1 + grows` times as long as the first.
fn prefill(blocks: f64, all_s: f64, grows: f64, fixed_s: f64) -> Prefill {
    let tokens = f64::from(BLOCK_TOKENS);
    let per_token_s = all_s / (blocks * tokens) / (1.0 + grows / 2.0);
    Prefill {
        fixed_s,
        per_context_s: 0.0,
        per_token_s,
        attention_s: per_token_s * grows / (2.0 * blocks * tokens),
    }
}

/// As an engine reports it that gets this part of its GPU.
fn slower(prefill: Prefill, share: f64) -> Prefill {
    Prefill {
        fixed_s: prefill.fixed_s / share,
        per_context_s: prefill.per_context_s / share,
        per_token_s: prefill.per_token_s / share,
        attention_s: prefill.attention_s / share,
    }
}

fn places(draw: &mut ChaCha8Rng, lie: Lie, blocks: u32) -> Vec<Place> {
    let front = draw.random_range(0..blocks / 2);
    let place = |index: u32| match lie {
        Lie::Layered if index < front => Place::Memory,
        Lie::Devices => Place::Device(usize::from(draw.random_bool(0.25))),
        Lie::Gaps if draw.random_bool(0.03) => Place::Missing,
        _ => Place::Device(0),
    };
    (0..blocks).map(place).collect()
}
