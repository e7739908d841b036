//! What the metrics promise.

use std::collections::BTreeSet;

use super::*;
use crate::golden;

/// How a name may end, with what it then counts.
const UNITS: [&str; 11] = [
    "_ratio",
    "_total",
    "_bytes",
    "_seconds",
    "_blocks",
    "_slots",
    "_sessions",
    "_leases",
    "_tables",
    "_state",
    "_info",
];

fn value(metrics: &Metrics, name: &str) -> Option<f64> {
    let counters = metrics.counters();
    counters
        .into_iter()
        .find(|(found, _)| found == name)
        .map(|(_, value)| value)
}

#[test]
fn reference_page_is_current() {
    golden::check("docs/METRICS.md", &page());
}

#[test]
fn names_end_in_their_unit_and_say_whose_they_are() {
    for metric in Metrics::declarations() {
        let unit = UNITS.iter().find(|unit| metric.name.ends_with(**unit));
        assert!(unit.is_some(), "{} ends in no unit", metric.name);
        assert!(metric.name.starts_with("kvtier_"), "{}", metric.name);
        let counts = metric.name.ends_with("_total");
        assert_eq!(
            metric.kind == "counter",
            counts,
            "{} is a {}",
            metric.name,
            metric.kind
        );
        assert!(
            metric.help.ends_with('.'),
            "{}: {}",
            metric.name,
            metric.help
        );
    }
}

// Goal: a dashboard sees a flat zero, not a gap, before something happens for the first time.
// Method: count the series of a fresh registry against the product of the label values.
#[test]
fn every_series_exists_at_zero_before_anything_happened() {
    let metrics = Metrics::new();
    let mut want = 0;
    for metric in Metrics::declarations() {
        let series: usize = metric
            .labels
            .iter()
            .map(|(name, values)| if *name == "device" { 1 } else { values.len() })
            .product();
        want += series * if metric.kind == "histogram" { 2 } else { 1 };
    }
    let counters = metrics.counters();
    assert_eq!(counters.len(), want);
    for (name, value) in counters {
        let info = name.starts_with("kvtier_build_info");
        assert_eq!(value, if info { 1.0 } else { 0.0 }, "{name}");
    }
}

// Goal: counting through a label type lands in the series with that text.
#[test]
fn families_count_in_the_series_of_their_labels() {
    let metrics = Metrics::new();
    for miss in Miss::iter() {
        metrics.misses.of(miss).inc_by(1 + miss as u64);
    }
    for miss in Miss::iter() {
        let name = format!("kvtier_miss_total{{reason=\"{}\"}}", miss.as_str());
        assert_eq!(
            value(&metrics, &name),
            Some(1.0 + miss as u64 as f64),
            "{name}"
        );
    }
    metrics.lookups.of((Tier::Disk, Found::Hit)).inc();
    let name = "kvtier_lookup_total{outcome=\"hit\",tier=\"disk\"}";
    assert_eq!(value(&metrics, name), Some(1.0), "{:?}", metrics.counters());
    metrics.disk_errors.of(Device::FIRST).inc();
    let name = "kvtier_disk_errors_total{device=\"0\"}";
    assert_eq!(value(&metrics, name), Some(1.0));
    let seconds = metrics.commit_seconds.of(Acknowledge::Durable);
    seconds.observe(0.5);
    let name = "kvtier_commit_seconds_sum{acknowledge=\"durable\"}";
    assert_eq!(value(&metrics, name), Some(0.5));
}

#[test]
fn each_device_is_in_one_state_at_a_time() {
    let metrics = Metrics::new();
    let devices = <Device as Label>::all();
    let now = |device: Device| {
        let is = |one: &DiskState| metrics.disk_state.of((device, *one)).get() == 1;
        DiskState::iter().filter(is).collect::<Vec<_>>()
    };
    assert_eq!(now(devices[1]), []);
    for state in DiskState::iter() {
        metrics.set_disk_state(devices[1], state);
        assert_eq!(now(devices[1]), [state]);
    }
    assert_eq!(now(devices[0]), [], "the other one");
}

// Goal: as many series as there are devices, and none by a name that nobody bounds.
#[test]
fn series_of_devices_are_those_of_the_configured_ones() {
    let metrics = Metrics::new();
    let shown = || {
        let named = |(name, _): &(String, f64)| name.starts_with("kvtier_disk_blocks");
        metrics.counters().iter().filter(|one| named(one)).count()
    };
    assert_eq!(shown(), 1, "without a device the first one is at zero");
    for (configured, want) in [(0, 1), (1, 1), (3, 3), (16, 16)] {
        metrics.set_devices(configured);
        assert_eq!(shown(), want);
        metrics.render().unwrap();
    }
    let devices = <Device as Label>::all();
    let texts: Vec<String> = devices.iter().map(|one| one.number().to_string()).collect();
    assert!(
        devices
            .iter()
            .zip(texts)
            .all(|(device, text)| device.text() == text)
    );
}

// Goal: a call that the protocol gains cannot be forgotten here.
#[test]
fn methods_are_those_of_the_protocol() {
    let proto = include_str!("../../../proto/kvtier/v1/kvtier.proto");
    let names = proto
        .lines()
        .filter_map(|line| line.trim().strip_prefix("rpc "));
    let names: BTreeSet<String> = names
        .filter_map(|line| Some(line.split_once('(')?.0.to_owned()))
        .collect();
    let ours: BTreeSet<String> = Method::iter().map(|method| format!("{method:?}")).collect();
    assert_eq!(names, ours);
}

#[test]
fn codes_are_those_of_grpc() {
    for number in 0..17 {
        let code = tonic::Code::from_i32(number);
        assert_eq!(format!("{code:?}"), format!("{:?}", Code::from(code)));
    }
}

#[test]
fn rendered_text_has_help_type_and_value_of_every_metric() {
    let text = Metrics::new().render().unwrap();
    for metric in Metrics::declarations() {
        assert!(
            text.contains(&format!("# HELP {} ", metric.name)),
            "{}",
            metric.name
        );
        let kind = format!("# TYPE {} {}", metric.name, metric.kind);
        assert!(text.contains(&kind), "{kind}");
    }
}

// Goal: two daemons in one process, as tests run them, do not count into each other.
#[test]
fn registries_are_apart() {
    let (one, other) = (Metrics::new(), Metrics::new());
    one.sessions.inc();
    assert_eq!(value(&other, "kvtier_sessions"), Some(0.0));
}
