//! The command line against a running daemon: the real binaries, a real socket, a real disk.
//!
//! Upstairs:   `cargo test`.
//! Downstairs: the `kvtierd` and `kvtier` binaries.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is the failure report"
)]

mod export;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest wait for a daemon to start or to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon of a test, ended when the test ends.
struct Daemon {
    process: Child,
    dir: tempfile::TempDir,
}

fn clean(program: &str) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("KVTIER_") {
            command.env_remove(name);
        }
    }
    command
}

fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}

impl Daemon {
    fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap())
    }

    fn start_in(dir: tempfile::TempDir) -> Self {
        let at = |name: &str| dir.path().join(name);
        let log = std::fs::File::create(at("log")).unwrap();
        let process = clean(env!("CARGO_BIN_EXE_kvtierd"))
            .args(["--socket", arg(&at("s")), "--state-dir", arg(&at("state"))])
            .args(["--metrics", "127.0.0.1:0", "--host-capacity", "64 MiB"])
            .args(["--disk-path", arg(&at("disk")), "--disk-capacity", "64 MiB"])
            .args(["--set", "disk.segment_size=8 MiB"])
            .args(["--set", "namespace.default.staging_max=16 MiB"])
            .args(["--set", &format!("namespace.default.uids={}", uid())])
            .stderr(log)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut daemon = Self { process, dir };
        let start = Instant::now();
        while !daemon.kvtier(&["status"]).status.success() {
            let ended = daemon.process.try_wait().unwrap();
            assert!(
                ended.is_none() && start.elapsed() < PATIENCE,
                "{}",
                daemon.log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        daemon
    }

    /// Kills it and starts another one over what it left.
    fn restart(mut self) -> Self {
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap());
        drop(self);
        Self::start_in(dir)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    fn disk(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn kvtier(&self, args: &[&str]) -> Output {
        let socket = self.dir.path().join("s");
        let mut command = clean(env!("CARGO_BIN_EXE_kvtier"));
        command
            .args(args)
            .args(["--socket", arg(&socket)])
            .output()
            .unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.kvtier(&[args, &["--json"]].concat());
        assert!(
            output.status.success(),
            "{args:?}: {output:?}\n{}",
            self.log()
        );
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn end(&mut self) {
        let start = Instant::now();
        while self.process.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < PATIENCE, "{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn uid() -> u32 {
    rustix::process::getuid().as_raw()
}

/// `kvtier` without a daemon.
fn offline(args: &[&str]) -> Output {
    clean(env!("CARGO_BIN_EXE_kvtier"))
        .args(args)
        .output()
        .unwrap()
}

// Goal: one operator's day. What `bench` saves, `status` counts, `explain` finds, `drain` makes
// durable, `inspect` sees on the device without a daemon, and `wipe` makes a miss.
#[test]
fn commands_agree_with_each_other_about_the_same_blocks() {
    let mut daemon = Daemon::start();
    let bench = daemon.json(&[
        "bench",
        "--blocks",
        "4",
        "--block-mib",
        "1",
        "--rounds",
        "3",
    ]);
    assert_eq!(bench["wrong_blocks"], 0);
    for row in bench["rows"].as_array().unwrap() {
        assert!(row["median"].as_f64().unwrap() > 0.0, "{row}");
    }

    let status = daemon.json(&["status"]);
    assert_eq!(status["state"], "serving");
    assert_eq!(status["namespaces"][0]["name"], "default");
    assert_eq!(status["namespaces"][0]["blocks"], 4);
    let counters = &status["counters"];
    assert_eq!(
        counters["kvtier_save_blocks_total{outcome=\"accepted\"}"],
        4.0
    );
    assert_eq!(counters["kvtier_miss_total{reason=\"absent\"}"], 0.0);

    let drained = daemon.kvtier(&["drain"]);
    assert!(drained.status.success(), "{drained:?}");
    assert_eq!(daemon.json(&["status"])["state"], "draining");
    let disk = daemon.disk();
    let listed = offline(&["inspect", arg(&disk), "--segment", "0", "--json"]);
    let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
    let keys: Vec<&str> = listed["records"]
        .as_array()
        .unwrap()
        .iter()
        .map(|record| record["key"].as_str().unwrap())
        .collect();
    assert_eq!(keys.len(), 4);

    let found = daemon.json(&["explain", keys[2]]);
    assert_eq!(found["hit"], true, "{found}");
    let tiers: Vec<_> = found["variants"].as_array().unwrap().iter().collect();
    assert!(
        tiers.iter().any(|variant| variant["tier"] == "disk"),
        "{found}"
    );

    assert_eq!(daemon.json(&["wipe", "default", "--yes"])["blocks"], 4);
    let gone = daemon.json(&["explain", keys[2], "--namespace", "default"]);
    assert_eq!(
        (&gone["hit"], &gone["miss"]),
        (&Value::from(false), &Value::from("absent"))
    );

    let stop = daemon.kvtier(&["drain", "--stop"]);
    assert!(stop.status.success(), "{stop:?}\n{}", daemon.log());
    daemon.end();
    let asked = daemon.kvtier(&["status"]);
    assert_eq!(asked.status.code(), Some(2));
}

#[test]
fn refusals_of_the_daemon_reach_the_operator_in_words() {
    let daemon = Daemon::start();
    let wiped = daemon.kvtier(&["wipe", "other", "--yes"]);
    let text = String::from_utf8(wiped.stderr).unwrap();
    assert_eq!(wiped.status.code(), Some(2));
    assert!(text.contains("other") && text.contains("default"), "{text}");

    let asked = daemon.kvtier(&["wipe", "default"]);
    let text = String::from_utf8(asked.stderr).unwrap();
    assert!(
        text.contains("cannot be undone") && text.contains("--yes"),
        "{text}"
    );

    let explained = daemon.kvtier(&["explain", &"ab".repeat(32), "--namespace", "x"]);
    let text = String::from_utf8(explained.stderr).unwrap();
    assert!(
        text.contains("--namespace is \"x\"; accepted: default"),
        "{text}"
    );
}
