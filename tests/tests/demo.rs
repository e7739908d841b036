//! The main job as a test: the whole demo, with real processes, and with faults planted in it.
//!
//! Upstairs:   nobody.
//! Downstairs: the program `kvtier-demo`, which builds and starts the real `kvtierd`.
//!
//! Most tests run a tiny random model: nothing is fetched and a run takes seconds. One runs the
//! real model on a prompt of about 1,000 tokens.
//!
//! Not here on purpose: time bounds that a busy machine would break; each run has one limit so
//! that nothing hangs.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is the failure report"
)]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde_json::Value;
use tempfile::TempDir;

/// Longest run; the first one may build the daemon.
const LIMIT: Duration = Duration::from_secs(20 * 60);

fn start(folder: &Path, arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvtier-demo"));
    // Files rather than pipes: nobody has to read them for the demo to go on.
    let file = |name| fs::File::create(folder.join(name)).unwrap();
    for inside in ["work", "tmp"] {
        fs::create_dir_all(folder.join(inside)).unwrap();
    }
    command
        .env("TMPDIR", folder.join("tmp"))
        .args(arguments)
        .arg("--dir")
        .arg(folder.join("work"))
        .stdin(Stdio::null())
        .stdout(file("out"))
        .stderr(file("err"));
    command.spawn().unwrap()
}

fn finish(folder: &Path, mut demo: Child) -> Output {
    let end = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = demo.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > end {
            demo.kill().unwrap();
            panic!("the demo hangs: {}", said(folder));
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let read = |name| fs::read(folder.join(name)).unwrap();
    Output {
        status,
        stdout: read("out"),
        stderr: read("err"),
    }
}

fn said(folder: &Path) -> String {
    fs::read_to_string(folder.join("err")).unwrap_or_default()
}

fn demo(arguments: &[&str]) -> (TempDir, Output) {
    let folder = tempfile::tempdir().unwrap();
    let child = start(folder.path(), arguments);
    let output = finish(folder.path(), child);
    (folder, output)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn value(results: &Value, name: &str) -> f64 {
    let mut rows = results["rows"].as_array().unwrap().iter();
    let row = rows.find(|row| row["name"] == name);
    row.unwrap_or_else(|| panic!("no row {name}"))["median"]
        .as_f64()
        .unwrap()
}

fn left_in(folder: &Path) -> usize {
    let count = |inside| fs::read_dir(folder.join(inside)).unwrap().count();
    count("work") + count("tmp")
}

/// Processes that were started with this folder in their arguments.
fn processes_of(folder: &Path) -> usize {
    let name = folder.to_str().unwrap();
    let running = fs::read_dir("/proc").unwrap().flatten().filter(|entry| {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(name)
    });
    running.count()
}

/// Runs the demo to its good end and returns its result file.
fn succeeds(arguments: &[&str]) -> Value {
    let results = tempfile::NamedTempFile::new().unwrap();
    let mut all = arguments.to_vec();
    all.extend(["--json", results.path().to_str().unwrap()]);
    let (folder, output) = demo(&all);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{}\n{out}\n{err}", output.status);
    assert!(
        out.contains("identical") && !out.contains("DIFFERENT"),
        "{out}"
    );
    assert!(err.matches("kill -9").count() == 2, "{err}");
    assert_eq!(left_in(folder.path()), 0, "the temporary folder stays");
    let results = serde_json::from_slice(&fs::read(results.path()).unwrap()).unwrap();
    assert_eq!(value(&results, "demo.identical"), 1.0);
    results
}

#[test]
fn demo_of_every_layer_kind_restores_identically_after_kill_9() {
    let results = succeeds(&["--tiny", "--tokens", "1000"]);
    assert_eq!(results["suite"], "demo");
    // Restoring must not be possible without the bytes having been there.
    assert!(value(&results, "demo.stored_bytes") >= value(&results, "demo.kv_bytes"));
}

#[test]
fn demo_of_a_prompt_of_whole_blocks_computes_only_the_last_token() {
    succeeds(&["--tiny", "--tokens", "512"]);
}

// Goal: what the README promises, with real weights and a real text.
#[test]
fn demo_of_the_real_model_restores_identically_and_sooner_after_kill_9() {
    let results = succeeds(&["--tokens", "1000"]);
    assert!(value(&results, "demo.lossless.ratio") > 1.2);
    for restored in ["restore_ms", "restore_host_ms"] {
        for level in ["demo", "demo.lossless"] {
            let restored = value(&results, &format!("{level}.ttft.{restored}"));
            assert!(
                restored < value(&results, "demo.ttft.recompute_ms"),
                "{results}"
            );
        }
    }
}

// Goal: a demo that could not fail would show nothing.
#[test]
fn demo_fails_loudly_when_one_restored_bit_is_wrong() {
    let (_, output) = demo(&["--tiny", "--tokens", "600", "--plant", "restored-bit"]);
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("THE DEMO FAILED"), "{err}");
    assert!(
        err.contains("level raw: restore from NVMe: the KV DIFFERS"),
        "{err}"
    );
    assert!(
        err.contains("level lossless: restore from memory: the KV DIFFERS"),
        "{err}"
    );
    assert!(text(&output.stdout).contains("DIFFERENT"));
}

// Goal: damage on the device is a miss. The demo fails because not everything was restored, never
// because something wrong was.
#[test]
fn demo_fails_for_missing_and_not_for_wrong_kv_when_the_device_has_lost_a_page() {
    let (_, output) = demo(&["--tiny", "--tokens", "2000", "--plant", "stored-bytes"]);
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{err}");
    for level in ["raw", "lossless"] {
        assert!(
            err.contains(&format!("level {level}: restore from NVMe: ")),
            "{err}"
        );
    }
    assert!(err.contains("tokens needed no prefill"), "{err}");
    assert!(!err.contains("DIFFERS"), "{err}");
    assert!(!text(&output.stdout).contains("DIFFERENT"));
}

#[test]
fn demo_refuses_a_prompt_longer_than_the_text_and_names_the_range() {
    let (_, output) = demo(&["--tiny", "--tokens", "1000000"]);
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains("--tokens is 1000000; accepted: 2 to"), "{err}");
    let (_, output) = demo(&["--tiny", "--tokens", "1"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("at least 2"));
}

/// Starts a demo and waits until its daemons run and its first engine works.
fn under_way(folder: &Path) -> Child {
    let mut demo = start(folder, &["--tiny", "--tokens", "7000"]);
    let end = Instant::now() + LIMIT;
    while !said(folder).contains("engine A starts") {
        let ended = demo.try_wait().unwrap();
        assert!(ended.is_none() && Instant::now() < end, "{}", said(folder));
        std::thread::sleep(Duration::from_millis(5));
    }
    demo
}

fn send(demo: &Child, signal: Signal) {
    let pid = Pid::from_raw(demo.id().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

#[test]
fn demo_leaves_no_process_and_no_file_when_it_is_interrupted() {
    let folder = tempfile::tempdir().unwrap();
    let demo = under_way(folder.path());
    send(&demo, Signal::INT);
    let output = finish(folder.path(), demo);
    assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
    assert_eq!(left_in(folder.path()), 0);
    assert_eq!(processes_of(folder.path()), 0);
}

#[test]
fn demo_leaves_no_process_when_it_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let demo = under_way(folder.path());
    assert!(processes_of(folder.path()) >= 3, "two daemons and the demo");
    send(&demo, Signal::KILL);
    finish(folder.path(), demo);
    let end = Instant::now() + Duration::from_secs(30);
    while processes_of(folder.path()) > 0 {
        assert!(Instant::now() < end, "a child outlives the demo");
        std::thread::sleep(Duration::from_millis(20));
    }
}
