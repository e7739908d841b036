//! How a device's rate and a GPU's share go up and down: one seeded trace of a kind.
//!
//! Upstairs:   `scenes`.
//! Downstairs: `trace`; `recorded.txt`, what a disk did.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::trace::Trace;

/// How long a drawn rate holds. Unit: seconds.
const DRAWN_S: f64 = 20e-3;
/// How long a state of the chain holds on average. Unit: seconds.
const STATE_S: f64 = 50e-3;
/// States of the chain, parts of the full rate: neighbours come and go.
const STATES: [f64; 4] = [1.0, 0.5, 0.25, 0.1];
/// Of a device that hangs. Unit: seconds.
pub(super) const STALL_S: f64 = 0.2;
/// A device that drops has this part of its rate left.
const DROP: f64 = 0.1;
/// How long a recorded rate holds. Unit: seconds.
const RECORDED_S: f64 = 5e-3;

/// What a device is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Weather {
    /// One rate.
    Steady,
    /// Drawn anew every 20 ms: mean 1, deviation 0.6.
    Drawn,
    /// A chain of four states between the full rate and a tenth.
    Chain,
    /// A tenth of the rate from some moment on.
    Drop,
    /// Nothing for 200 ms, once.
    Stall,
    /// As a disk was that others wrote to.
    Recorded,
}

impl Weather {
    pub(super) const ALL: [Self; 6] = [
        Self::Steady,
        Self::Drawn,
        Self::Chain,
        Self::Drop,
        Self::Stall,
        Self::Recorded,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Steady => "steady",
            Self::Drawn => "drawn",
            Self::Chain => "chain",
            Self::Drop => "drop",
            Self::Stall => "stall",
            Self::Recorded => "recorded",
        }
    }

    /// A trace about the rate 1, for something that takes about `span_s` if all goes well.
    pub(super) fn trace(self, draw: &mut ChaCha8Rng, span_s: f64) -> Trace {
        let moment_s = draw.random_range(0.1..0.9) * span_s;
        let long_s = 40.0 * span_s + 2.0;
        match self {
            Self::Steady => Trace::steady(1.0),
            Self::Drawn => drawn(draw, long_s, (1.0, 0.6), (0.05, 3.0)),
            Self::Chain => chain(draw, long_s),
            Self::Drop => Trace::new([(moment_s, 1.0)], DROP),
            Self::Stall => Trace::new([(moment_s, 1.0), (STALL_S, 0.0)], 1.0),
            Self::Recorded => recorded(draw),
        }
    }
}

/// The share of a GPU that decodes for others as well.
pub(super) fn gpu_share(draw: &mut ChaCha8Rng, span_s: f64) -> Trace {
    drawn(draw, 40.0 * span_s + 2.0, (0.75, 0.3), (0.1, 1.0))
}

/// Mean of [`gpu_share`], cut at both ends.
pub(super) const GPU_SHARE: f64 = 0.72;

fn drawn(
    draw: &mut ChaCha8Rng,
    long_s: f64,
    (mean, deviation): (f64, f64),
    (least, most): (f64, f64),
) -> Trace {
    let mut steps = Vec::new();
    let mut at_s = 0.0;
    while at_s < long_s {
        // The sum of twelve uniform numbers is as good as normal here.
        let normal: f64 = (0..12).map(|_| draw.random::<f64>()).sum::<f64>() - 6.0;
        steps.push((DRAWN_S, (mean + deviation * normal).clamp(least, most)));
        at_s += DRAWN_S;
    }
    Trace::new(steps, mean)
}

fn chain(draw: &mut ChaCha8Rng, long_s: f64) -> Trace {
    let mut steps = Vec::new();
    let (mut at_s, mut state) = (0.0, draw.random_range(0..STATES.len()));
    while at_s < long_s {
        let holds_s = -STATE_S * (1.0 - draw.random::<f64>()).ln();
        steps.push((holds_s, STATES.get(state).copied().unwrap_or(1.0)));
        at_s += holds_s;
        let up = draw.random_bool(0.5);
        state = match up {
            true => state.saturating_sub(1),
            false => (state + 1).min(STATES.len() - 1),
        };
    }
    Trace::new(steps, 1.0)
}

/// From a random place of the record on, round and round.
fn recorded(draw: &mut ChaCha8Rng) -> Trace {
    let rates = include_str!("recorded.txt").lines();
    let rates: Vec<f64> = rates.filter_map(|line| line.parse().ok()).collect();
    let mean = rates.iter().sum::<f64>() / rates.len() as f64;
    let from = draw.random_range(0..rates.len());
    let round = rates.iter().cycle().skip(from).take(4 * rates.len());
    Trace::new(round.map(|rate| (RECORDED_S, rate / mean)), 1.0)
}
