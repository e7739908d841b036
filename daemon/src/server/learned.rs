//! The part of Stats that tells what restores have learned: rates, engines, and how it went.
//!
//! Upstairs:   `operate`.
//! Downstairs: `restore`.

use std::time::Duration;

use kvtier_proto::v1;

use super::explain::level_name;
use super::{Shared, convert, restore};

/// How fast blocks have come.
pub(super) fn rates(shared: &Shared) -> Vec<v1::RateStats> {
    let all = shared.learned.rates.all().into_iter();
    let rate = |((device, level), rate): ((crate::metrics::Device, _), _)| {
        let crate::restore::rates::Rate { bytes_s, blocks } = rate;
        v1::RateStats {
            device: device.number(),
            level: level_name(shared, level),
            bytes_s,
            blocks,
        }
    };
    all.map(rate).collect()
}

/// How fast engines say that they are.
pub(super) fn engines(shared: &Shared) -> Vec<v1::EngineStats> {
    let all = shared.learned.engines.all().into_iter();
    let engine = all.map(|(namespace, layout, prefill, steps)| v1::EngineStats {
        namespace_id: namespace.0,
        layout: layout.short(),
        fixed_s: prefill.fixed_s,
        per_context_s: prefill.per_context_s,
        per_token_s: prefill.per_token_s,
        attention_s: prefill.attention_s,
        steps: steps as u64,
    });
    engine.collect()
}

/// What came of the last two-ended restores.
pub(super) fn met(shared: &Shared) -> Vec<v1::MetStats> {
    let all = shared.learned.history.all().into_iter();
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let met = all.map(|met| v1::MetStats {
        namespace_id: met.namespace.0,
        took_us: micros(met.took),
        computed_blocks: convert::count(met.computed),
        loaded_blocks: convert::count(met.loaded),
        outlook: Some(restore::to_wire_outlook(met.outlook)),
    });
    met.collect()
}
