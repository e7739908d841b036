//! What engines say of their own speed: prefill steps by namespace and layout, and the model that
//! fits them.
//!
//! Upstairs:   the server's ReportPrefill; the plans of two-ended restores.
//! Downstairs: `fit`. No clock: engines measured.
//!
//! Engines of one namespace and layout are taken to be alike: they run one model, on one host.
//!
//! Invariants kept here
//!   G1  A step that no engine can have made changes nothing.
//!   G2  What one namespace reports changes no other's plans.

mod fit;

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kvtier_proto::{LayoutFingerprint, NamespaceId};

use super::plan::Prefill;

/// Longest step that is believed: an hour. What takes longer was suspended.
const STEP_MAX: Duration = Duration::from_secs(3600);
/// Most models that are remembered; then all are forgotten. A host serves a few.
const MODELS_MAX: usize = 1024;

/// Steps that are remembered of each model: the latest.
const STEPS_MAX: usize = 256;

/// One prefill step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Tokens whose KV was there before.
    pub before: u32,
    /// Tokens that were computed.
    pub tokens: u32,
    /// What that took.
    pub took: Duration,
}

/// Everything that was reported, shared by all sessions.
#[derive(Debug, Default)]
pub struct Engines {
    models: Mutex<HashMap<(NamespaceId, LayoutFingerprint), Vec<Step>>>,
}

impl Engines {
    /// Takes steps of an engine. Returns how many were believed (G1).
    pub fn report(
        &self,
        namespace: NamespaceId,
        layout: LayoutFingerprint,
        steps: impl IntoIterator<Item = Step>,
    ) -> usize {
        let possible =
            |step: &Step| step.tokens > 0 && !step.took.is_zero() && step.took <= STEP_MAX;
        let steps: Vec<Step> = steps.into_iter().filter(possible).collect();
        let count = steps.len();
        let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        if models.len() >= MODELS_MAX && !models.contains_key(&(namespace, layout)) {
            models.clear();
        }
        let known = models.entry((namespace, layout)).or_default();
        known.extend(steps);
        let old = known.len().saturating_sub(STEPS_MAX);
        known.drain(..old);
        count
    }

    /// How fast engines of this namespace and layout are; `None` before one has said so.
    pub fn prefill(&self, namespace: NamespaceId, layout: LayoutFingerprint) -> Option<Prefill> {
        fit::fit(&self.steps(namespace, layout))
    }

    /// Everything known, in order, for status: the model of each, and its steps.
    pub fn all(&self) -> Vec<(NamespaceId, LayoutFingerprint, Prefill, usize)> {
        let models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        let known = models.iter().filter_map(|((namespace, layout), steps)| {
            Some((*namespace, *layout, fit::fit(steps)?, steps.len()))
        });
        let mut all: Vec<_> = known.collect();
        all.sort_by_key(|(namespace, layout, ..)| (namespace.0, layout.0));
        all
    }

    /// The latest steps of engines of this namespace and layout, oldest first.
    pub fn steps(&self, namespace: NamespaceId, layout: LayoutFingerprint) -> Vec<Step> {
        let models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        models
            .get(&(namespace, layout))
            .cloned()
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(before: u32, tokens: u32, micros: u64) -> Step {
        let took = Duration::from_micros(micros);
        Step {
            before,
            tokens,
            took,
        }
    }

    #[test]
    fn report_keeps_the_latest_steps_of_each_namespace_and_layout_apart() {
        let engines = Engines::default();
        let layout = |byte| LayoutFingerprint([byte; 32]);
        let many = (0..1000).map(|before| step(before, 16, 5));
        assert_eq!(engines.report(NamespaceId(1), layout(1), many), 1000);
        let kept = engines.steps(NamespaceId(1), layout(1));
        assert_eq!((kept.len(), kept[0].before), (STEPS_MAX, 1000 - 256));
        assert!(engines.steps(NamespaceId(2), layout(1)).is_empty());
        assert!(engines.steps(NamespaceId(1), layout(2)).is_empty());
    }

    #[test]
    fn report_believes_no_step_that_cannot_have_been() {
        let engines = Engines::default();
        let lies = [step(0, 0, 5), step(0, 16, 0), step(0, 16, u64::MAX)];
        assert_eq!(
            engines.report(NamespaceId(1), LayoutFingerprint([1; 32]), lies),
            0
        );
    }
}
