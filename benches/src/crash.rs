//! Suite `crash`: the real daemon killed and its power cut, and the simulated store in every way.
//!
//! Upstairs:   `kvtier-bench crash`.
//! Downstairs: `kvtier_benches::harness`; for `--campaign` the store's own tests.
//!
//! One number must be 0 in every row that ends in `lost`, `wrong`, `ghosts` or `damaged`; else the
//! exit status says so, with `--check` or without.
//!
//! Power is cut in private mounts, which only root may make: this program starts itself again in
//! them. Elsewhere that part is left out, and the report says so.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kvtier_benches::harness::crash::Tally;
use kvtier_benches::harness::mounts::{loop_args, mount};
use kvtier_benches::harness::{binary, kill, power};
use kvtier_benches::launch;
use kvtier_benches::report::{Problem, Report};
use serde_json::Value;

use crate::Common;

/// File that the part in private mounts leaves its tally in.
const TALLY: &str = "tally.json";
/// Tests of the store that are its campaign, and how the lines begin in which they say what it did.
const TESTS: [&str; 2] = [
    "campaign::counts::the_campaign_keeps_every_promise_and_says_what_it_did",
    "campaign::planted::every_planted_bug_is_found_within_its_seeds_and_none_without_a_bug",
];
const COUNTS: &str = "campaign counts: ";
const PLANTED: &str = "planted bugs, seeds until found: ";

/// Options of this suite.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Times that the daemon is killed; 200, or 20 with --quick.
    #[arg(long)]
    rounds: Option<u32>,
    /// Times that the power is cut; 50, or 3 with --quick.
    #[arg(long)]
    cuts: Option<u32>,
    /// Decides every random choice but the moment at which a process is stopped.
    #[arg(long)]
    seed: Option<u64>,
    /// Also run the store over the simulated disk: so many workloads, a crash at every operation
    /// of each, every image that the crash may leave. One takes about 8 seconds of CPU.
    #[arg(long, value_name = "WORKLOADS")]
    campaign: Option<u32>,
    /// The part that runs in private mounts.
    #[arg(long, hide = true)]
    mounted: Option<PathBuf>,
}

/// Runs the suite.
pub(crate) fn run(options: &Options, common: &Common) -> Result<Report, Problem> {
    let mut report = Report::new("crash", &common.dir);
    let seed = options
        .seed
        .unwrap_or_else(|| u64::from(std::process::id()));
    let usual = |long: u32, short: u32| if common.quick { short } else { long };
    let cuts = options.cuts.unwrap_or(usual(50, 3));
    if let Some(scratch) = &options.mounted {
        cut_here(scratch, cuts, seed)?;
        return Ok(report);
    }
    report.note(format!("seed {seed}"));
    // Its build, where one is due, is nobody's time.
    binary::kvtierd();
    let rounds = options.rounds.unwrap_or(usual(200, 20));
    if rounds > 0 {
        let tally = kill::campaign(rounds, seed, &common.dir, &mut |line| eprintln!("{line}"));
        rows(&mut report, "kill9", &tally);
        if rounds > 4 && tally.killed_recovering == 0 {
            report.fail("kill9: no kill met a recovery".to_owned());
        }
    }
    if cuts > 0 {
        match cut_elsewhere(&common.dir, cuts, seed)? {
            Some(tally) => {
                rows(&mut report, "power_cut", &tally);
                if tally.control_lost == 0 {
                    report
                        .note("SKIPPED the control of the cuts: a release build has no fault lane");
                }
            }
            None => report.note("SKIPPED power cuts: only root may make private mounts"),
        }
    }
    if let Some(workloads) = options.campaign {
        simulate(&mut report, workloads)?;
    }
    Ok(report)
}

/// The rows of one campaign over the real daemon.
fn rows(report: &mut Report, name: &str, tally: &Tally) {
    let mut row = |what: &str, unit, value: f64| {
        report.row(format!("{name}.{what}"), unit, &[value]);
    };
    let count = |n: u64| n as f64;
    row("rounds", "crashes", count(tally.rounds));
    row("durable", "blocks", count(tally.durable));
    row("compared", "blocks", count(tally.checked));
    row("lost", "blocks", count(tally.lost));
    row("wrong", "blocks", count(tally.wrong));
    row("ghosts", "blocks", count(tally.ghosts));
    row("damaged", "starts", count(tally.damaged));
    if tally.orderly > 0 {
        row("behind_an_end_in_order", "crashes", count(tally.orderly));
        row("catalogs_rebuilt", "crashes", count(tally.catalogs_rebuilt));
    }
    if tally.killed_starting > 0 {
        row("killed_starting", "crashes", count(tally.killed_starting));
        row(
            "killed_recovering",
            "crashes",
            count(tally.killed_recovering),
        );
    }
    if tally.control_lost > 0 {
        row("lost_without_syncs", "blocks", count(tally.control_lost));
    }
    row("seconds", "s", tally.seconds);
    if !tally.holds() {
        report.fail(format!("{name}: {}", tally.examples.join("; ")));
    }
}

/// Starts this program again in private mounts; `None` where that is not allowed.
fn cut_elsewhere(dir: &Path, cuts: u32, seed: u64) -> Result<Option<Tally>, Problem> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let scratch = tempfile::Builder::new()
        .prefix("kvtier-cuts")
        .tempdir_in(dir)?;
    let status = Command::new("unshare")
        .arg("--mount")
        .arg(std::env::current_exe()?)
        .args(["crash", "--cuts", &cuts.to_string()])
        .args(["--seed", &seed.to_string(), "--mounted"])
        .arg(scratch.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .map_err(|problem| format!("unshare: {problem}"))?;
    if !status.success() {
        return Err(format!("the power cuts ended with {status}").into());
    }
    let text = std::fs::read_to_string(scratch.path().join(TALLY))?;
    Ok(Some(serde_json::from_str(&text)?))
}

/// In the private mounts: makes a file system, cuts its power, leaves the tally.
fn cut_here(scratch: &Path, cuts: u32, seed: u64) -> Result<(), Problem> {
    let at = scratch.join("mount");
    let args = loop_args(scratch, power::IMAGE_MIB);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    mount(&args, &at)?;
    let tally = power::campaign(cuts, seed, &at, &mut |line| eprintln!("{line}"))?;
    std::fs::write(scratch.join(TALLY), serde_json::to_string(&tally)?)?;
    Ok(())
}

/// The store's campaign over the simulated disk, which its own tests are.
fn simulate(report: &mut Report, workloads: u32) -> Result<(), Problem> {
    let dir = launch::profile_dir()?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let output = Command::new(cargo)
        .args([
            "test",
            "--package",
            "kvtier-store",
            "--lib",
            "--manifest-path",
        ])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml"))
        .arg("--target-dir")
        .arg(dir.parent().unwrap_or(&dir))
        .args(["--", "--nocapture", "--exact"])
        .args(TESTS)
        .env("KVTIER_TEST_WORKLOADS", workloads.to_string())
        .env("KVTIER_TEST_THREADS", threads.to_string())
        .stdin(Stdio::null())
        .output()
        .map_err(|problem| format!("cargo: {problem}"))?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let said = |start| text.lines().find_map(|line| line.strip_prefix(start));
    let (Some(counts), Some(planted), true) =
        (said(COUNTS), said(PLANTED), output.status.success())
    else {
        let out = String::from_utf8_lossy(&output.stdout);
        report.fail(format!("the simulated campaign: {out}{text}"));
        return Ok(());
    };
    let counts: Value = serde_json::from_str(counts)?;
    for (name, value) in counts.as_object().into_iter().flatten() {
        match value {
            Value::Object(inner) => {
                for (kind, value) in inner {
                    count(report, &format!("simulated.{name}.{kind}"), value);
                }
            }
            value => count(report, &format!("simulated.{name}"), value),
        }
    }
    for bug in planted.split(", ") {
        if let Some((name, seeds)) = bug.split_once(' ') {
            report.row(format!("planted.{name}"), "seeds", &[seeds.parse()?]);
        }
    }
    Ok(())
}

fn count(report: &mut Report, name: &str, value: &Value) {
    if let Some(value) = value.as_f64() {
        report.row(name, "", &[value]);
    }
}
