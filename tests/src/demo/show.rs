//! The demo's table and its result file.
//!
//! Upstairs:   `story` prints and writes what this makes of an outcome.
//! Downstairs: `outcome`, `kvtier_benches::report`.
//!
//! The file has the form that all of kvtier's measurements have (`kvtier_benches::report`).
//!
//! Not here on purpose: measuring and judging.

use comfy_table::{CellAlignment, Table, presets};
use kvtier_benches::report::Report;

use super::job::Restore;
use super::outcome::{LevelOutcome, Outcome, quotient};

const MIB: f64 = (1 << 20) as f64;
const GIB: f64 = (1 << 30) as f64;

/// The recompute time, which the restores are compared with.
const RECOMPUTE: &str = "demo.ttft.recompute_ms";

/// The table for people: one column a level.
pub(super) fn table(outcome: &Outcome) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let mut row = |name: &str, cell: &dyn Fn(&LevelOutcome) -> String| {
        let cells = outcome.levels.iter().map(cell);
        table.add_row([name.to_owned()].into_iter().chain(cells));
    };
    let recompute = outcome.computed.ttft_s;
    let times = |seconds: f64| format!("{:.0} ms  {:.1}x", seconds * 1e3, recompute / seconds);
    row("codec level on NVMe", &|one| one.level.to_owned());
    row("time to first token", &|_| String::new());
    row("  prompt computed", &|_| {
        format!("{:.0} ms  1.0x", recompute * 1e3)
    });
    row("  restored from NVMe, after kill -9", &|one| {
        times(one.disk.ttft_s)
    });
    row("  restored from host memory", &|one| times(one.host.ttft_s));
    row("  NVMe: lookup + restore + rest", &|one| {
        parts(one.disk.lookup_s, &one.disk)
    });
    row("  host: lookup + restore + rest", &|one| {
        parts(one.host.lookup_s, &one.host)
    });
    row("tier that answered", &|one| {
        format!("{} NVMe, {} host", one.disk.from_disk, one.host.from_host)
    });
    row("KV of the prompt", &|one| {
        format!("{:.1} MiB, {} blocks", mib(one.save.bytes), one.save.blocks)
    });
    row("on the device", &|one| {
        format!(
            "{:.1} MiB, ratio {:.2}",
            mib(one.save.stored_bytes),
            one.ratio()
        )
    });
    row("save until durable", &|one| {
        rate(one.save.bytes, one.save.seconds)
    });
    row("restore from NVMe into the engine", &|one| {
        rate(one.disk.bytes, one.disk.transfer_s)
    });
    row("restore from memory into the engine", &|one| {
        rate(one.host.bytes, one.host.transfer_s)
    });
    row("daemon serves again after kill -9", &|one| {
        format!("{:.0} ms", one.ready_after_s * 1e3)
    });
    row("continuation, scores and KV bytes", &|one| {
        let runs = [&one.disk.run, &one.host.run];
        let same = runs.iter().all(|run| **run == outcome.computed.run);
        if same { "identical" } else { "DIFFERENT" }.to_owned()
    });
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

fn parts(lookup_s: f64, restore: &Restore) -> String {
    let rest = restore.ttft_s - restore.lookup_s - restore.transfer_s;
    let ms = [lookup_s, restore.transfer_s, rest].map(|seconds| format!("{:.0}", seconds * 1e3));
    format!("{} ms", ms.join(" + "))
}

fn mib(bytes: u64) -> f64 {
    quotient(bytes, 1) / MIB
}

fn gib_s(bytes: u64, seconds: f64) -> f64 {
    quotient(bytes, 1) / GIB / seconds
}

fn rate(bytes: u64, seconds: f64) -> String {
    format!("{:.2} GiB/s", gib_s(bytes, seconds))
}

/// Adds the rows of the result file to an empty report.
pub(super) fn rows(mut report: Report, outcome: &Outcome, wall_s: f64) -> Report {
    let recompute = outcome.computed.ttft_s * 1e3;
    let identical = if outcome.is_identical() { 1.0 } else { 0.0 };
    report.row("demo.identical", "bool", &[identical]);
    report.row(RECOMPUTE, "ms", &[recompute]);
    let tokens = quotient(outcome.prompt_tokens as u64, 1);
    report.row("demo.prompt_tokens", "tokens", &[tokens]);
    report.row("demo.wall_s", "s", &[wall_s]);
    for one in &outcome.levels {
        let prefix = match one.level {
            "raw" => "demo",
            _ => "demo.lossless",
        };
        let (save, disk, host) = (&one.save, &one.disk, &one.host);
        let speedup = |restore: &Restore| outcome.computed.ttft_s / restore.ttft_s;
        let plain = [
            ("ratio", "x", one.ratio()),
            ("kv_bytes", "bytes", quotient(save.bytes, 1)),
            ("stored_bytes", "bytes", quotient(save.stored_bytes, 1)),
            (
                "save.durable.gib_s",
                "GiB/s",
                gib_s(save.bytes, save.seconds),
            ),
            ("restore.gib_s", "GiB/s", gib_s(disk.bytes, disk.transfer_s)),
            (
                "restore_host.gib_s",
                "GiB/s",
                gib_s(host.bytes, host.transfer_s),
            ),
            ("restart_ms", "ms", one.ready_after_s * 1e3),
            ("ttft.speedup", "x", speedup(disk)),
            ("ttft.speedup_host", "x", speedup(host)),
        ];
        for (name, unit, value) in plain {
            report.row(format!("{prefix}.{name}"), unit, &[value]);
        }
        for (name, restore) in [("restore_ms", disk), ("restore_host_ms", host)] {
            let name = (format!("{prefix}.ttft.{name}"), "ms");
            let limit = (RECOMPUTE, &[recompute][..]);
            report.beside(name, &[restore.ttft_s * 1e3], limit, None);
        }
    }
    report
}

/// Where to look next.
pub(super) const NEXT: &str = "\
Where to look next
  a daemon of your own      cargo run --release --bin kvtierd -- --help
  its metrics and health    http://127.0.0.1:9471/metrics and /readyz while it runs
  what it holds and does    cargo run --release --bin kvtier -- status
  why a block missed        cargo run --release --bin kvtier -- explain --help
  how an engine uses it     tests/src/demo/engine_link.rs, client/README.md
  how it works              docs/ARCHITECTURE.md";

#[cfg(test)]
mod tests {
    use super::super::outcome::tests::good;
    use super::*;

    #[test]
    fn table_shows_both_levels_with_their_times_and_ratios() {
        let table = table(&good());
        let line = |name: &str| {
            let line = table.lines().find(|line| line.contains(name));
            line.unwrap_or_else(|| panic!("no {name} in\n{table}"))
                .to_owned()
        };
        assert_eq!(
            line("restored from NVMe").matches("200 ms  50.0x").count(),
            2
        );
        assert!(
            line("on the device").contains("2.0 MiB, ratio 1.50"),
            "{table}"
        );
        assert_eq!(line("KV bytes").matches("identical").count(), 2);
        let mut bad = good();
        bad.levels[0].host.run.tokens.clear();
        assert!(super::table(&bad).contains("DIFFERENT"));
    }

    #[test]
    fn result_file_has_the_rows_whose_names_are_promised() {
        let report = rows(Report::new("demo", "/".as_ref()), &good(), 60.0);
        let file = serde_json::to_value(report).unwrap();
        let row = |name: &str| {
            let rows = file["rows"].as_array().unwrap().iter();
            let mut named = rows.filter(|row| row["name"] == name);
            let row = named.next().unwrap_or_else(|| panic!("no row {name}"));
            assert!(named.next().is_none(), "{name} twice");
            row.clone()
        };
        assert_eq!(file["suite"], "demo");
        assert!(file["machine"]["cores"].as_u64().unwrap() > 0);
        assert_eq!(row("demo.identical")["median"], 1.0);
        assert_eq!(row("demo.ttft.recompute_ms")["median"], 10_000.0);
        assert_eq!(
            row("demo.ttft.restore_ms")["limit"],
            "demo.ttft.recompute_ms"
        );
        assert_eq!(row("demo.ttft.restore_ms")["ratio"], 0.02);
        assert_eq!(row("demo.lossless.ratio")["median"], 1.5);
        for name in ["demo.ttft.restore_host_ms", "demo.lossless.ttft.restore_ms"] {
            assert_eq!(row(name)["unit"], "ms");
        }
    }
}
