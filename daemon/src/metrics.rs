//! All metrics of the daemon, declared here and nowhere else.
//!
//! Upstairs:   every room of the daemon counts through these fields; `http` shows them.
//! Downstairs: `prometheus`, through `family`.
//!
//! Names end in their unit. Labels are closed enums, so every series exists at zero from the
//! first scrape. One registry for each `Metrics`: two daemons in one test do not mix.
//!
//! `docs/METRICS.md` is rendered from these declarations by a test.
//!
//! Not here on purpose: no clock; callers measure and observe.

mod document;
mod family;
mod labels;

use std::sync::atomic::{AtomicUsize, Ordering};

use kvtier_proto::{Miss, Quality};
use prometheus::proto::{LabelPair, MetricFamily};
use prometheus::{Counter, Gauge, Histogram, IntCounter, IntGauge, Registry, TextEncoder};
use strum::IntoEnumIterator;

pub use document::page;
pub use family::{Declaration, Family, Label, Labels};
pub use labels::{
    Acknowledge, By, CatalogReason, Code, Damage, Device, Direction, DiskState, Form, Found,
    Method, Moved, Recoded, RegionRefused, Rung, Saved, SessionOutcome, Stage, Tier, Version,
};

/// Declares the struct, its constructor and what the documents say, from one list.
macro_rules! metrics {
    ($(#[doc = $about:literal])+
     pub struct $struct:ident { $(
        $(#[doc = $doc:literal])+
        $field:ident: $labels:ty, $child:ty = $name:literal;
     )+ }) => {
        $(#[doc = $about])+
        #[derive(Debug)]
        pub struct $struct {
            registry: Registry,
            devices: AtomicUsize,
            $(
                #[doc = concat!("`", $name, "`:")]
                $(#[doc = $doc])+
                pub $field: Family<$labels, $child>,
            )+
        }

        impl $struct {
            fn declared() -> Self {
                let registry = Registry::new();
                $(let $field = Family::declare(&registry, $name, &help(&[$($doc),+]));)+
                Self { registry, devices: AtomicUsize::new(1), $($field),+ }
            }

            /// What the documents say of every metric, in the order declared.
            pub fn declarations() -> Vec<Declaration> {
                vec![$(
                    Declaration::new::<$labels, $child>($name, help(&[$($doc),+]))
                ),+]
            }
        }
    };
}

fn help(lines: &[&str]) -> String {
    let trimmed: Vec<&str> = lines.iter().map(|line| line.trim()).collect();
    trimmed.join(" ")
}

metrics! {
    /// Everything the daemon counts. Share it behind an `Arc`.
    pub struct Metrics {
        /// Blocks asked for, by the tier that answered. Misses count on the last tier asked.
        lookups: (Tier, Found), IntCounter = "kvtier_lookup_total";
        /// Blocks that a lookup did not find or a restore could not give back, by reason. One that
        /// is looked up and then restored all the same counts twice.
        misses: Miss, IntCounter = "kvtier_miss_total";
        /// Stored blocks that were refused because they are damaged. Any increase deserves a look.
        corrupt: Damage, IntCounter = "kvtier_corrupt_total";
        /// Blocks that engines wanted to save, by what became of them.
        save_blocks: Saved, IntCounter = "kvtier_save_blocks_total";
        /// Blocks taken into host memory, by the quality of what they were computed from.
        saved_through: Quality, IntCounter = "kvtier_saved_through_blocks_total";
        /// Bytes of saved blocks before and after the codec.
        saved_bytes: Stage, IntCounter = "kvtier_saved_bytes_total";
        /// Blocks handed to engines, by the tier they came from.
        restore_blocks: Tier, IntCounter = "kvtier_restore_blocks_total";
        /// Raw bytes handed to engines, by the tier they came from.
        restore_bytes: Tier, IntCounter = "kvtier_restore_bytes_total";
        /// From the request of a restore to its last block, by the slowest tier it needed.
        restore_seconds: Tier, Histogram = "kvtier_restore_seconds";
        /// Blocks of two-ended restores, by who brought them: the engine that computed them, or the
        /// daemon that loaded them.
        two_ended_blocks: By, IntCounter = "kvtier_two_ended_blocks_total";
        /// Prefill steps that engines reported: what plans are made with.
        prefill_steps: (), IntCounter = "kvtier_prefill_steps_total";
        /// From a commit to its acknowledgement.
        commit_seconds: Acknowledge, Histogram = "kvtier_commit_seconds";
        /// Time that encoders ran, on one core each: their bytes by their time are their speed.
        encode_seconds: Rung, Counter = "kvtier_encode_seconds_total";
        /// Time that decoders ran, on one core each.
        decode_seconds: Rung, Counter = "kvtier_decode_seconds_total";
        /// Bytes that encoders took and gave, head and padding of records included: raw by stored
        /// is the ratio of the level.
        encoded_bytes: (Rung, Stage), IntCounter = "kvtier_encoded_bytes_total";
        /// Bytes that decoders gave (raw) and took (stored).
        decoded_bytes: (Rung, Stage), IntCounter = "kvtier_decoded_bytes_total";
        /// Cold blocks that were to be re-encoded, by what became of them. One that is left as it
        /// is counts each time that it is looked at.
        recoded_blocks: Recoded, IntCounter = "kvtier_recoded_blocks_total";
        /// Bytes of records that were re-encoded, before and after.
        recoded_bytes: Form, IntCounter = "kvtier_recoded_bytes_total";
        /// Files of tables that are loaded.
        tables: (), IntGauge = "kvtier_tables";
        /// Bytes that a device moved, padding included. Devices are numbered as their `[[disk]]`
        /// tables stand in the configuration, from 0.
        disk_bytes: (Device, Direction), IntCounter = "kvtier_disk_bytes_total";
        /// Reads that a device delivered, and records that it made durable.
        disk_ops: (Device, Direction), IntCounter = "kvtier_disk_ops_total";
        /// Writes and syncs that a device failed. A failed read counts as a miss for `device`.
        disk_errors: Device, IntCounter = "kvtier_disk_errors_total";
        /// 1 for the state that a device is in, 0 for the others. All 0 without a disk tier.
        disk_state: (Device, DiskState), IntGauge = "kvtier_disk_state";
        /// Bytes that the segments of a device take.
        disk_used: Device, IntGauge = "kvtier_disk_used_bytes";
        /// Bytes that the segments of a device may take.
        disk_capacity: Device, IntGauge = "kvtier_disk_capacity_bytes";
        /// Blocks on a device that can be restored.
        disk_blocks: Device, IntGauge = "kvtier_disk_blocks";
        /// Bytes that the scrub of a device read.
        scrub_bytes: Device, IntCounter = "kvtier_scrub_bytes_total";
        /// Damaged records that the scrub found. Each counts in `kvtier_corrupt_total` as well.
        scrub_bad: Device, IntCounter = "kvtier_scrub_bad_total";
        /// Part of a device that the scrub under way has been through, 0 when none is.
        scrub_position: Device, Gauge = "kvtier_scrub_position_ratio";
        /// When the scrub was last through all of a device, in seconds since 1970; 0 before that.
        scrub_ended: Device, Gauge = "kvtier_scrub_ended_seconds";
        /// Blocks that made room for others.
        evicted_blocks: Tier, IntCounter = "kvtier_evicted_blocks_total";
        /// Bytes that blocks take.
        tier_used: Tier, IntGauge = "kvtier_tier_used_bytes";
        /// Bytes that blocks may take.
        tier_capacity: Tier, IntGauge = "kvtier_tier_capacity_bytes";
        /// Blocks that can be restored.
        tier_blocks: Tier, IntGauge = "kvtier_tier_blocks";
        /// Open sessions.
        sessions: (), IntGauge = "kvtier_sessions";
        /// Attempts to open a session.
        sessions_opened: SessionOutcome, IntCounter = "kvtier_sessions_total";
        /// Blocks that clients hold leases on.
        leases: (), IntGauge = "kvtier_leases";
        /// Bytes of staging regions of all sessions.
        region_bytes: (), IntGauge = "kvtier_region_bytes";
        /// Bytes of engines' own memory that they registered.
        engine_region_bytes: (), IntGauge = "kvtier_engine_region_bytes";
        /// Bytes that were copied between the daemon and engines' own memory.
        region_moved: Moved, IntCounter = "kvtier_engine_region_moved_bytes_total";
        /// Regions of engines' own memory that were refused, or are not used any more.
        regions_refused: RegionRefused, IntCounter = "kvtier_engine_region_refused_total";
        /// Calls and streams that ended, by method and gRPC code. What the client ended itself is
        /// cancelled: so ends every session that was not cut off.
        rpcs: (Method, Code), IntCounter = "kvtier_rpc_total";
        /// From a call's request to its response; for streams, to the end of the stream.
        rpc_seconds: Method, Histogram = "kvtier_rpc_seconds";
        /// Time that the last start took to find out which blocks the disk tier holds.
        recovery_seconds: (), Gauge = "kvtier_recovery_seconds";
        /// Blocks that the last start found on the disk tier.
        recovered_blocks: (), IntGauge = "kvtier_recovered_blocks";
        /// Catalogs that were rebuilt from segments.
        catalog_rebuilt: CatalogReason, IntCounter = "kvtier_catalog_rebuilt_total";
        /// 1, with the version of the daemon.
        build_info: Version, IntGauge = "kvtier_build_info";
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All series at zero, and the build's version.
    pub fn new() -> Self {
        let metrics = Self::declared();
        metrics.build_info.of(Version).set(1);
        metrics
    }

    /// Shows the series of the first `count` devices and of no other; at least one.
    pub fn set_devices(&self, count: usize) {
        self.devices.store(count.max(1), Ordering::Relaxed);
    }

    /// Says which state a device is in.
    pub fn set_disk_state(&self, device: Device, state: DiskState) {
        for one in DiskState::iter() {
            let is = i64::from(one == state);
            self.disk_state.of((device, one)).set(is);
        }
    }

    /// Every series that is shown.
    fn gather(&self) -> Vec<MetricFamily> {
        let devices = self.devices.load(Ordering::Relaxed);
        let is_there = |pair: &LabelPair| {
            pair.name() != Device::NAME || pair.value().parse().is_ok_and(|n: usize| n < devices)
        };
        let mut families = self.registry.gather();
        for family in &mut families {
            let mut series = family.take_metric();
            series.retain(|one| one.get_label().iter().all(is_there));
            family.set_metric(series);
        }
        families
    }

    /// Everything in the Prometheus text format.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.gather())
    }

    /// Every series with its value, named as `render` names it. Histograms give their count and
    /// their sum.
    pub fn counters(&self) -> Vec<(String, f64)> {
        let families = self.gather();
        let mut counters = Vec::new();
        for family in &families {
            for metric in family.get_metric() {
                let labels = labels_of(metric);
                let name = family.name();
                let mut push = |suffix: &str, value| {
                    counters.push((format!("{name}{suffix}{labels}"), value));
                };
                match family.get_field_type() {
                    prometheus::proto::MetricType::COUNTER => {
                        push("", metric.get_counter().get_value());
                    }
                    prometheus::proto::MetricType::GAUGE => {
                        push("", metric.get_gauge().get_value())
                    }
                    _ => {
                        let histogram = metric.get_histogram();
                        push("_count", histogram.get_sample_count() as f64);
                        push("_sum", histogram.get_sample_sum());
                    }
                }
            }
        }
        counters
    }
}

fn labels_of(metric: &prometheus::proto::Metric) -> String {
    let pair = |pair: &prometheus::proto::LabelPair| format!("{}={:?}", pair.name(), pair.value());
    let pairs: Vec<String> = metric.get_label().iter().map(pair).collect();
    match pairs.is_empty() {
        true => String::new(),
        false => format!("{{{}}}", pairs.join(",")),
    }
}

#[cfg(test)]
mod tests;
