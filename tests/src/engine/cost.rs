//! What computing costs: measured for whoever plans restores, and made slower for their tests.
//!
//! Upstairs:   `sequence` and `driven` run a stopwatch over every layer.
//! Downstairs: the clock and a sleep.
//!
//! A machine without an accelerator reads a block faster than it computes one, whatever the
//! device: no plan on it would ever compute. [`SlowEngine`] turns that round, for small models on
//! which a real prefill takes next to nothing, and makes the times of a test the ones it chose.
//!
//! Invariant E3: time decides nothing but when a step ends; no bit depends on it.
//!
//! Not here on purpose: the model of costs that is fitted to these numbers; the daemon has it.

use std::time::{Duration, Instant};

/// What one step took: a point for the cost model of a planner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefillCost {
    /// Tokens before the first of the step.
    pub before: usize,
    /// Tokens of the step.
    pub tokens: usize,
    /// Time in the layers of the step; what it waited for is not in it.
    pub took: Duration,
}

/// Steps that take at least so long, all layers together; a real step that takes longer stays as
/// it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SlowEngine {
    /// Once a step.
    pub step: Duration,
    /// For each token of a step.
    pub token: Duration,
    /// For each token of a step and each 1024 tokens before it.
    pub attend: Duration,
    /// For each token whose keys and values are rebuilt from hidden states.
    pub rebuild: Duration,
}

impl SlowEngine {
    /// Time of a step of `tokens` with `before` tokens before it.
    pub fn prefill(&self, before: usize, tokens: usize) -> Duration {
        // Each token also attends to the earlier ones of its own step.
        let pairs = tokens * before + tokens * tokens / 2;
        self.step + times(self.token, tokens) + times(self.attend, pairs) / 1024
    }

    /// Time of rebuilding all layers of `tokens`.
    pub fn projection(&self, tokens: usize) -> Duration {
        times(self.rebuild, tokens)
    }
}

fn times(one: Duration, count: usize) -> Duration {
    one.saturating_mul(u32::try_from(count).unwrap_or(u32::MAX))
}

/// Measures runs of layers and stretches them to what a [`SlowEngine`] would take.
#[derive(Debug)]
pub(super) struct Stopwatch {
    /// What one layer has to take at least.
    layer: Duration,
    owed: Duration,
    took: Duration,
}

impl Stopwatch {
    /// For a run whose `layers` layers would take `whole` together.
    pub(super) fn new(whole: Option<Duration>, layers: usize) -> Self {
        let layers = u32::try_from(layers).unwrap_or(u32::MAX).max(1);
        Self {
            layer: whole.unwrap_or_default() / layers,
            owed: Duration::ZERO,
            took: Duration::ZERO,
        }
    }

    /// Runs one layer. A sleep that was too long is taken off the next ones.
    pub(super) fn layer<T>(&mut self, run: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = run();
        self.owed += self.layer;
        let missing = self.owed.saturating_sub(self.took + begin.elapsed());
        if !missing.is_zero() {
            std::thread::sleep(missing);
        }
        self.took += begin.elapsed();
        result
    }

    /// Time in layers until now.
    pub(super) const fn took(&self) -> Duration {
        self.took
    }
}

#[cfg(test)]
mod tests;
