//! The unit is one that systemd takes, as tight as promised, and agrees with the configuration.
//!
//! Upstairs:   `cargo test`.
//! Downstairs: `systemd/`, and `systemd-analyze` where it is present.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is the failure report"
)]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kvtierd::config::{Config, EXIT_BAD_CONFIG};

/// Highest exposure that `systemd-analyze security` may find. Unit: tenths.
const EXPOSURE_MAX: u32 = 15;

fn file(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../systemd")
        .join(name);
    std::fs::read_to_string(path).unwrap()
}

/// All values of a key of the unit.
fn values(key: &str) -> Vec<String> {
    let unit = file("kvtierd.service");
    let value = |line: &str| line.strip_prefix(key)?.strip_prefix('=').map(str::to_owned);
    unit.lines().filter_map(value).collect()
}

fn value(key: &str) -> String {
    let values = values(key);
    assert_eq!(values.len(), 1, "{key} appears {} times", values.len());
    values[0].clone()
}

/// `systemd-analyze` with the unit, whose programs are ours here; `None` where it is absent.
fn analyze(arguments: &[&str]) -> Option<Output> {
    if Command::new("systemd-analyze")
        .arg("--version")
        .output()
        .is_err()
    {
        // Past the test runner, which keeps what the print macros write.
        let line = "SKIPPED a check of the unit: no systemd-analyze on this machine";
        let _ = writeln!(std::io::stderr(), "{line}");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let unit: PathBuf = dir.path().join("kvtierd.service");
    let text = file("kvtierd.service");
    let text = text.replace("/usr/bin/kvtierd", env!("CARGO_BIN_EXE_kvtierd"));
    std::fs::write(&unit, text).unwrap();
    Some(
        Command::new("systemd-analyze")
            .args(arguments)
            .arg(unit)
            .output()
            .unwrap(),
    )
}

#[test]
fn unit_has_no_key_or_value_that_systemd_refuses() {
    let Some(output) = analyze(&["verify", "--man=no"]) else {
        return;
    };
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let about_us: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("kvtierd.service"))
        .collect();
    assert!(output.status.success() && about_us.is_empty(), "{text}");
}

#[test]
fn unit_exposes_no_more_than_promised() {
    let threshold = format!("--threshold={EXPOSURE_MAX}");
    let Some(output) = analyze(&["security", "--offline=yes", "--no-pager", &threshold]) else {
        return;
    };
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{table}");
}

// Goal: what the unit prepares is what a daemon with the sample configuration uses.
#[test]
fn unit_and_configuration_agree() {
    let config = Config::from_toml(&file("kvtier.toml")).unwrap();
    let runtime = Path::new("/run").join(value("RuntimeDirectory"));
    assert_eq!(config.server.socket.parent(), Some(runtime.as_path()));
    assert_eq!(
        config.state.dir,
        Path::new("/var/lib").join(value("StateDirectory"))
    );
    // What follows the drain is bounded in `process::end` and takes at most 9 seconds.
    let stop: u32 = value("TimeoutStopSec").parse().unwrap();
    assert!(stop >= config.server.drain_timeout_s + 10, "{stop}");
    assert_eq!(
        value("RestartPreventExitStatus"),
        EXIT_BAD_CONFIG.to_string()
    );
    // A check beforehand would fail with a code that systemd does not hold against a restart.
    assert_eq!(values("ExecStartPre"), Vec::<String>::new());
}

// Goal: nobody switches these off by accident. Each breaks a promise, not only a score.
#[test]
fn unit_keeps_what_the_daemon_depends_on() {
    assert_eq!(
        value("LimitMEMLOCK"),
        "infinity",
        "registered buffers count as locked memory"
    );
    assert_eq!(
        values("PrivateUsers"),
        Vec::<String>::new(),
        "peers' user ids must be readable"
    );
    assert_eq!(value("UMask"), "0077", "secrets are files");
    assert_eq!(value("CapabilityBoundingSet"), "");
    let filters = values("SystemCallFilter");
    assert!(
        filters.contains(&String::from("@system-service")),
        "{filters:?}"
    );
}

#[test]
fn user_of_the_unit_is_the_one_that_is_made() {
    let made = file("kvtier.sysusers.conf");
    let line = made.lines().find(|line| line.starts_with("u ")).unwrap();
    assert_eq!(line.split_whitespace().nth(1), Some(value("User").as_str()));
}
