//! The part of `status` that speaks of codec levels: what each did, and which tables there are.
//!
//! Upstairs:   `status`.
//! Downstairs: counters and tables of the daemon's answer.

use std::fmt::Write;

use kvtier_proto::Quality;
use kvtier_proto::v1::{NamespaceStats, StatsReply};
use serde_json::{Value, json};

use super::output::{section, table};

/// What the levels did since the start, and the tables that are loaded.
pub(super) fn levels(stats: &StatsReply) -> String {
    let value = |metric: &str, labels: &str| {
        let name = format!("{metric}{{{labels}}}");
        let found = stats.counters.iter().find(|one| one.name == name);
        found.map_or(0.0, |one| one.value)
    };
    let columns = [
        "level",
        ">encoded",
        ">ratio",
        ">GB/s a core",
        ">decoded",
        ">GB/s a core",
    ];
    let mut rows = table(&columns);
    for level in names(stats) {
        let label = format!("level=\"{level}\"");
        let bytes = |metric, stage| value(metric, &format!("{label},stage=\"{stage}\""));
        let (raw, stored) = (
            bytes("kvtier_encoded_bytes_total", "raw"),
            bytes("kvtier_encoded_bytes_total", "stored"),
        );
        let back = bytes("kvtier_decoded_bytes_total", "raw");
        if raw + back == 0.0 {
            continue;
        }
        let encode = value("kvtier_encode_seconds_total", &label);
        let decode = value("kvtier_decode_seconds_total", &label);
        let mib = |bytes: f64| format!("{:.1} MiB", bytes / f64::from(1 << 20));
        rows.add_row([
            level.to_owned(),
            mib(raw),
            quotient(raw, stored),
            quotient(raw / 1e9, encode),
            mib(back),
            quotient(back / 1e9, decode),
        ]);
    }
    let mut text = section("Codec levels", &rows);
    if !stats.level.is_empty() {
        let _ = write!(text, "saved as {}", stats.level);
        if !stats.cold_level.is_empty() {
            let _ = write!(text, ", cold blocks as {}", stats.cold_level);
        }
        text.push('\n');
    }
    for one in &stats.tables {
        let (model, path) = (crate::log::clean(&one.model), crate::log::clean(&one.path));
        let _ = writeln!(text, "tables {:08x} of {model}: {path}", one.tables);
    }
    text
}

/// Levels that there is a counter of.
fn names(stats: &StatsReply) -> impl Iterator<Item = &str> {
    stats.counters.iter().filter_map(|one| {
        let labels = one
            .name
            .strip_prefix("kvtier_encode_seconds_total{level=\"")?;
        labels.strip_suffix("\"}")
    })
}

fn quotient(one: f64, by: f64) -> String {
    match by > 0.0 {
        true => format!("{:.2}", one / by),
        false => String::from("-"),
    }
}

/// The worst quality at which blocks of a namespace may be stored, by name.
pub(super) fn lowest(namespace: &NamespaceStats) -> &'static str {
    Quality::from(namespace.lowest_quality()).as_str()
}

/// Tables as JSON.
pub(super) fn tables_json(stats: &StatsReply) -> Vec<Value> {
    let one = |one: &kvtier_proto::v1::TablesStats| json!({ "tables": format!("{:08x}", one.tables), "model": one.model, "path": one.path });
    stats.tables.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use kvtier_proto::Level;
    use kvtier_proto::v1::{Counter, TablesStats};

    use super::*;
    use crate::metrics::{Metrics, Rung, Stage};

    #[test]
    fn levels_that_did_something_show_ratio_and_speed_and_tables_their_model() {
        let metrics = Metrics::new();
        let raw = (Rung::from(Level::BALANCED_X), Stage::Raw);
        metrics.encoded_bytes.of(raw).inc_by(6_000_000_000);
        let stored = (Rung::from(Level::BALANCED_X), Stage::Stored);
        metrics.encoded_bytes.of(stored).inc_by(1_000_000_000);
        metrics
            .encode_seconds
            .of(Rung::from(Level::BALANCED_X))
            .inc_by(4.0);
        let counters = metrics.counters().into_iter();
        let stats = StatsReply {
            counters: counters
                .map(|(name, value)| Counter { name, value })
                .collect(),
            tables: vec![TablesStats {
                tables: 0xab,
                model: "tiny".into(),
                path: "/t/tiny.kvtables".into(),
            }],
            level: "lossless".into(),
            cold_level: "balanced_x".into(),
            ..StatsReply::default()
        };
        let text = levels(&stats);
        for part in [
            "balanced_x",
            "6.00",
            "1.50",
            "saved as lossless, cold blocks as balanced_x",
            "tables 000000ab of tiny: /t/tiny.kvtables",
        ] {
            assert!(text.contains(part), "{part} not in {text}");
        }
        assert!(!text.contains("int8"), "{text}");
    }
}
