//! `status`: what the daemon is doing, holds and did.
//!
//! Upstairs:   `kvtier status`.
//! Downstairs: `Stats` of the control protocol.

use std::collections::BTreeMap;
use std::fmt::Write;

use kvtier_proto::v1::{Counter, StatsReply, StatsRequest, TierStats};
use serde_json::{Value, json};

use super::Target;
use super::connect::{CliError, connect, question};
use super::learned;
use super::levels;
use super::output::{Answer, duration, percent, section, size, table};

/// Flags of `status`.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    target: Target,
    /// Show every counter that is not zero, not only the ones that summarise
    #[arg(long)]
    counters: bool,
}

pub(super) async fn run(args: &Args) -> Result<Answer, CliError> {
    let mut client = connect(&args.target.socket).await?;
    let reply = client.stats(question(StatsRequest {})).await?.into_inner();
    Ok(answer(&reply, args.counters))
}

fn answer(stats: &StatsReply, counters: bool) -> Answer {
    let mut text = format!(
        "kvtierd {}: {}, up {}\n",
        stats.version,
        stats.state,
        duration(stats.uptime_s)
    );
    text += &tiers(stats);
    text += &namespaces(stats);
    text += &sessions(stats);
    text += &levels::levels(stats);
    text += &learned::learned(stats);
    text += &summary(&Counted::new(&stats.counters));
    if counters {
        text += &all_counters(&stats.counters);
    }
    Answer::new(to_json(stats), text)
}

fn tiers(stats: &StatsReply) -> String {
    let mut rows = table(&[
        "tier",
        "state",
        ">blocks",
        ">used",
        ">capacity",
        ">full",
        "lane",
    ]);
    for tier in &stats.tiers {
        rows.add_row([
            tier_name(tier),
            tier.state.clone(),
            tier.blocks.to_string(),
            size(tier.used_bytes),
            size(tier.capacity_bytes),
            percent(tier.used_bytes as f64, tier.capacity_bytes as f64),
            tier.lane.clone(),
        ]);
    }
    let mut text = section("Tiers", &rows);
    for tier in stats.tiers.iter().filter(|tier| !tier.problem.is_empty()) {
        let (name, problem) = (tier_name(tier), crate::log::clean(&tier.problem));
        let _ = writeln!(text, "{name} IS OUT OF SERVICE: {problem}");
    }
    text + &devices(stats)
}

fn tier_name(tier: &TierStats) -> String {
    match tier.device {
        Some(number) => format!("disk {number}: {}", tier.name),
        None => tier.name.clone(),
    }
}

/// What each device did.
fn devices(stats: &StatsReply) -> String {
    let columns = [
        "device", ">reads", ">read", ">writes", ">written", ">errors",
    ];
    let mut rows = table(&columns);
    for tier in &stats.tiers {
        if let Some(number) = tier.device {
            rows.add_row([
                number.to_string(),
                tier.reads.to_string(),
                size(tier.read_bytes),
                tier.writes.to_string(),
                size(tier.written_bytes),
                tier.errors.to_string(),
            ]);
        }
    }
    section("Devices", &rows)
}

fn namespaces(stats: &StatsReply) -> String {
    let mut rows = table(&[
        "namespace",
        ">id",
        ">blocks",
        ">host",
        ">quota",
        ">sessions",
    ]);
    for one in &stats.namespaces {
        rows.add_row([
            one.name.clone(),
            one.namespace_id.to_string(),
            one.blocks.to_string(),
            size(one.host_bytes),
            size(one.host_quota_bytes),
            one.sessions.to_string(),
        ]);
    }
    section("Namespaces", &rows)
}

fn sessions(stats: &StatsReply) -> String {
    let columns = [
        "client", "model", ">ns", ">uid", ">pid", ">leases", ">region", ">engine", ">open",
    ];
    let mut rows = table(&columns);
    for one in &stats.sessions {
        rows.add_row([
            crate::log::clean(&one.client).to_string(),
            crate::log::clean(&one.model).to_string(),
            one.namespace_id.to_string(),
            one.uid.to_string(),
            one.pid.to_string(),
            one.leases.to_string(),
            size(one.region_bytes),
            size(one.engine_bytes),
            duration(one.open_s),
        ]);
    }
    section("Sessions", &rows)
}

/// Counters by metric and label.
struct Counted<'a>(BTreeMap<&'a str, f64>);

impl<'a> Counted<'a> {
    fn new(counters: &'a [Counter]) -> Self {
        Self(
            counters
                .iter()
                .map(|one| (one.name.as_str(), one.value))
                .collect(),
        )
    }

    /// Sum over all series of `metric` whose labels contain `label` (all for "").
    fn sum(&self, metric: &str, label: &str) -> f64 {
        self.series(metric)
            .filter(|(labels, _)| labels.contains(label))
            .map(|(_, n)| n)
            .sum()
    }

    /// Labels and value of each series of `metric`.
    fn series<'b>(&'b self, metric: &'b str) -> impl Iterator<Item = (&'a str, f64)> + 'b {
        self.0.iter().filter_map(move |(name, value)| {
            let labels = name.strip_prefix(metric)?;
            (labels.is_empty() || labels.starts_with('{')).then_some((labels, *value))
        })
    }
}

fn summary(counted: &Counted<'_>) -> String {
    let mut rows = table(&["since start", ">"]);
    let hits = counted.sum("kvtier_lookup_total", "outcome=\"hit\"");
    let asked = counted.sum("kvtier_lookup_total", "");
    let raw = counted.sum("kvtier_saved_bytes_total", "raw");
    let stored = counted.sum("kvtier_saved_bytes_total", "stored");
    rows.add_row(["blocks looked up", &asked.to_string()]);
    rows.add_row(["hit ratio", &percent(hits, asked)]);
    for tier in ["host", "disk"] {
        let blocks = counted.sum("kvtier_restore_blocks_total", tier);
        rows.add_row([format!("blocks restored from {tier}"), blocks.to_string()]);
    }
    rows.add_row(["stored bytes of raw bytes", &percent(stored, raw)]);
    let scrubbed = counted.sum("kvtier_scrub_bytes_total", "");
    rows.add_row([String::from("scrubbed"), scrub(counted, scrubbed)]);
    for (way, what) in [
        ("saved", "from engine regions"),
        ("restored", "into engine regions"),
    ] {
        let bytes = counted.sum("kvtier_engine_region_moved_bytes_total", way);
        rows.add_row([format!("copied {what}"), size(whole(bytes))]);
    }
    for (metric, what) in [
        ("kvtier_save_blocks_total", "saves"),
        ("kvtier_miss_total", "misses"),
        ("kvtier_evicted_blocks_total", "evicted"),
        ("kvtier_corrupt_total", "DAMAGED"),
        ("kvtier_scrub_bad_total", "FOUND DAMAGED BY SCRUB"),
        ("kvtier_disk_errors_total", "DEVICE ERRORS"),
        (
            "kvtier_engine_region_refused_total",
            "engine regions refused",
        ),
    ] {
        for (labels, value) in counted.series(metric).filter(|(_, value)| *value != 0.0) {
            let label = labels.split('"').nth(1).unwrap_or_default();
            let disk = if labels.starts_with("{device=") {
                "disk "
            } else {
                ""
            };
            rows.add_row([format!("{what} {disk}{label}"), value.to_string()]);
        }
    }
    format!("\n{rows}\n")
}

/// How much the scrub has read, how far it is, and when it was last through.
fn scrub(counted: &Counted<'_>, bytes: f64) -> String {
    let mut text = size(whole(bytes));
    let each = |metric| counted.series(metric).map(|(_, value)| value);
    // Of several passes under way the one that is behind the others.
    let running = each("kvtier_scrub_position_ratio").filter(|position| *position > 0.0);
    if let Some(position) = running.reduce(f64::min) {
        let _ = write!(text, ", now at {}", percent(position, 1.0));
    }
    // Of several devices the one whose last pass is the oldest; one that had none has 0.
    let ended = each("kvtier_scrub_ended_seconds").reduce(f64::min);
    if let Some(ended) = ended.filter(|ended| *ended > 0.0) {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let ago = now.unwrap_or_default().as_secs_f64() - ended;
        let _ = write!(text, ", all of it {} ago", duration(whole(ago)));
    }
    text
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "a float that is too large or negative becomes the nearest number"
)]
fn whole(value: f64) -> u64 {
    value as u64
}

fn all_counters(counters: &[Counter]) -> String {
    let mut text = String::from("\nCounters that are not zero\n");
    for one in counters.iter().filter(|one| one.value != 0.0) {
        let _ = writeln!(text, "{} {}", one.name, one.value);
    }
    text
}

fn to_json(stats: &StatsReply) -> Value {
    let tiers = stats.tiers.iter().map(|one| {
        json!({
            "name": one.name, "state": one.state, "blocks": one.blocks, "lane": one.lane,
            "used_bytes": one.used_bytes, "capacity_bytes": one.capacity_bytes,
            "device": one.device, "problem": one.problem,
            "read_bytes": one.read_bytes, "written_bytes": one.written_bytes,
            "reads": one.reads, "writes": one.writes, "errors": one.errors,
        })
    });
    let namespaces = stats.namespaces.iter().map(|one| {
        json!({
            "id": one.namespace_id, "name": one.name, "blocks": one.blocks,
            "host_bytes": one.host_bytes, "host_quota_bytes": one.host_quota_bytes,
            "sessions": one.sessions, "lowest_quality": levels::lowest(one),
        })
    });
    let sessions = stats.sessions.iter().map(|one| {
        json!({
            "client": one.client, "model": one.model, "namespace_id": one.namespace_id,
            "uid": one.uid, "pid": one.pid, "leases": one.leases,
            "region_bytes": one.region_bytes, "engine_bytes": one.engine_bytes,
            "open_s": one.open_s,
        })
    });
    let counters: BTreeMap<&str, f64> = stats
        .counters
        .iter()
        .map(|one| (one.name.as_str(), one.value))
        .collect();
    json!({
        "version": stats.version,
        "uptime_s": stats.uptime_s,
        "state": stats.state,
        "tiers": tiers.collect::<Vec<_>>(),
        "namespaces": namespaces.collect::<Vec<_>>(),
        "sessions": sessions.collect::<Vec<_>>(),
        "counters": counters,
        "level": stats.level,
        "cold_level": stats.cold_level,
        "tables": levels::tables_json(stats),
        "learned": learned::learned_json(stats),
    })
}

#[cfg(test)]
mod tests {
    use kvtier_proto::Miss;
    use kvtier_proto::v1::{NamespaceStats, SessionStats};

    use super::*;
    use crate::metrics::{Damage, Device, Found, Label, Metrics, Stage, Tier};

    fn stats() -> StatsReply {
        let metrics = Metrics::new();
        metrics.lookups.of((Tier::Host, Found::Hit)).inc_by(3);
        metrics.lookups.of((Tier::Disk, Found::Miss)).inc();
        metrics.saved_bytes.of(Stage::Raw).inc_by(200);
        metrics.saved_bytes.of(Stage::Stored).inc_by(150);
        metrics.restore_blocks.of(Tier::Disk).inc_by(7);
        metrics.misses.of(Miss::PayloadCrc).inc();
        let damage = Damage::of(Miss::PayloadCrc).unwrap();
        metrics.corrupt.of(damage).inc();
        let counters = metrics.counters().into_iter();
        StatsReply {
            version: String::from("0.1.0"),
            uptime_s: 61,
            state: String::from("serving"),
            tiers: vec![
                TierStats {
                    name: String::from("host"),
                    state: String::from("healthy"),
                    capacity_bytes: 1 << 30,
                    used_bytes: 1 << 29,
                    blocks: 12,
                    ..TierStats::default()
                },
                TierStats {
                    name: String::from("/mnt/b"),
                    state: String::from("failed"),
                    device: Some(1),
                    problem: String::from("it burns"),
                    reads: 77,
                    ..TierStats::default()
                },
            ],
            namespaces: vec![NamespaceStats {
                namespace_id: 1,
                name: String::from("default"),
                ..NamespaceStats::default()
            }],
            sessions: vec![SessionStats {
                client: String::from("bad\nclient"),
                ..SessionStats::default()
            }],
            counters: counters
                .map(|(name, value)| Counter { name, value })
                .collect(),
            ..StatsReply::default()
        }
    }

    // Goal: the names that the summary looks for are those that the daemon counts under.
    #[test]
    fn summary_finds_the_counters_of_the_daemon() {
        let text = answer(&stats(), false).text;
        let row = |name: &str| {
            let line = text
                .lines()
                .find(|line| line.trim_start().starts_with(name));
            line.unwrap_or_else(|| panic!("{name} not in {text}"))
                .to_owned()
        };
        assert!(
            text.starts_with("kvtierd 0.1.0: serving, up 1 min 1 s\n"),
            "{text}"
        );
        assert!(row("blocks looked up").trim_end().ends_with(" 4"));
        assert!(row("hit ratio").contains("75.0 %"));
        assert!(row("blocks restored from disk").trim_end().ends_with(" 7"));
        assert!(row("stored bytes of raw bytes").contains("75.0 %"));
        assert!(row("misses payload_crc").trim_end().ends_with(" 1"));
        assert!(row("DAMAGED payload_crc").trim_end().ends_with(" 1"));
        assert!(row("host ").contains("50.0 %"));
        assert!(row("bad\\nclient").contains("0 s"));
    }

    #[test]
    fn a_device_shows_what_it_did_and_why_it_is_out_of_service() {
        let Answer { json, text, .. } = answer(&stats(), false);
        for part in ["disk 1: /mnt/b", "IS OUT OF SERVICE: it burns", " 77 "] {
            assert!(text.contains(part), "{part} not in {text}");
        }
        assert_eq!(json["tiers"][0]["device"], Value::Null);
        assert_eq!(json["tiers"][1]["device"], 1);
        assert_eq!(json["tiers"][1]["reads"], 77);
    }

    // Goal: nobody is told that all was checked while one device never was.
    #[test]
    fn scrub_is_as_old_as_on_the_device_that_is_behind() {
        let metrics = Metrics::new();
        metrics.set_devices(2);
        let [first, second] = [0, 1].map(|at| <Device as Label>::all()[at]);
        let shown = || {
            let counters = metrics.counters().into_iter();
            let counters: Vec<_> = counters
                .map(|(name, value)| Counter { name, value })
                .collect();
            summary(&Counted::new(&counters))
        };
        metrics.scrub_ended.of(first).set(1e9);
        metrics.disk_errors.of(second).inc_by(5);
        metrics.scrub_bad.of(first).inc();
        let text = shown();
        assert!(!text.contains("all of it"), "{text}");
        for row in ["DEVICE ERRORS disk 1", "FOUND DAMAGED BY SCRUB disk 0"] {
            assert!(text.contains(row), "{text}");
        }
        metrics.scrub_ended.of(second).set(2e9);
        let text = shown();
        assert!(text.contains("all of it"), "{text}");
    }

    #[test]
    fn every_counter_that_moved_is_listed_when_asked_for() {
        let text = answer(&stats(), true).text;
        assert!(
            text.contains("\nkvtier_miss_total{reason=\"payload_crc\"} 1\n"),
            "{text}"
        );
        assert!(!text.contains("reason=\"absent\""), "{text}");
    }

    #[test]
    fn json_carries_everything_the_daemon_said() {
        let json = answer(&stats(), false).json;
        assert_eq!(json["state"], "serving");
        assert_eq!(json["tiers"][0]["used_bytes"], 1 << 29);
        assert_eq!(json["sessions"][0]["client"], "bad\nclient");
        assert_eq!(
            json["counters"]["kvtier_miss_total{reason=\"payload_crc\"}"],
            1.0
        );
        assert_eq!(
            json["counters"]["kvtier_miss_total{reason=\"absent\"}"],
            0.0
        );
    }
}
