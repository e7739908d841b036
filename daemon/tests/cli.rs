//! The command line as an operator meets it: the real binary, with and without a configuration,
//! without a daemon.
//!
//! Upstairs:   `cargo test`.
//! Downstairs: the `kvtier` binary.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is the failure report"
)]

use std::path::Path;
use std::process::{Command, Output};

/// The binary with these arguments and variables, and nothing of ours from the environment.
fn kvtier(args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvtier"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("KVTIER_") {
            command.env_remove(name);
        }
    }
    command
        .args(args)
        .envs(env.iter().copied())
        .output()
        .unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn repository_file(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
    path.to_str().unwrap().to_owned()
}

#[test]
fn check_config_prints_the_effective_configuration_when_it_is_usable() {
    let args = [
        "check-config",
        "--host-capacity",
        "2 GiB",
        "--set",
        "log.format=json",
    ];
    let checked = kvtier(&args, &[("KVTIER_SERVER_SESSIONS_MAX", "7")]);
    assert_eq!(code(&checked), 0, "{}", err(&checked));
    for part in [
        "# This configuration is usable.",
        "capacity = \"2 GiB\"",
        "format = \"json\"",
        "sessions_max = 7",
        "name = \"default\"",
    ] {
        assert!(
            out(&checked).contains(part),
            "{part} not in {}",
            out(&checked)
        );
    }
}

#[test]
fn check_config_accepts_the_installed_sample() {
    let sample = repository_file("systemd/kvtier.toml");
    let checked = kvtier(&["check-config", "--config", &sample], &[]);
    assert_eq!(code(&checked), 0, "{}", err(&checked));
    let printed = kvtier(&["check-config", "--sample"], &[]);
    assert_eq!(out(&printed), std::fs::read_to_string(sample).unwrap());
}

#[test]
fn check_config_names_every_problem_and_exits_with_64() {
    let args = [
        "check-config",
        "--tcp",
        "10.0.0.1:1",
        "--host-capacity",
        "1 GB",
        "--set",
        "x.y=1",
    ];
    let checked = kvtier(&args, &[("KVTIER_SOCKET", "/x")]);
    assert_eq!(code(&checked), 64);
    assert_eq!(out(&checked), "");
    for part in [
        "4 problems in the configuration",
        "flag --tcp: server.tcp is \"10.0.0.1:1\"; accepted: a loopback address",
        "flag --host-capacity: host.capacity is \"1 GB\"; accepted: 16 MiB to 16 TiB",
        "flag --set x.y=1: x.y is not a setting",
        "environment variable KVTIER_SOCKET: KVTIER_SOCKET is not a setting",
    ] {
        assert!(
            err(&checked).contains(part),
            "{part} not in {}",
            err(&checked)
        );
    }
}

#[test]
fn check_config_speaks_json_when_asked() {
    let good = kvtier(&["check-config", "--json"], &[]);
    let json: serde_json::Value = serde_json::from_str(&out(&good)).unwrap();
    assert_eq!(
        json["config"]["server"]["socket"],
        "/run/kvtier/kvtierd.sock"
    );
    let bad = kvtier(&["check-config", "--json", "--host-capacity", "1"], &[]);
    assert_eq!(code(&bad), 64);
    let json: serde_json::Value = serde_json::from_str(&out(&bad)).unwrap();
    assert_eq!(json["problems"].as_array().unwrap().len(), 1);
}

#[test]
fn every_question_to_an_absent_daemon_names_socket_and_remedy() {
    let key = "ab".repeat(32);
    let commands: [&[&str]; 5] = [
        &["status"],
        &["explain", &key],
        &["bench"],
        &["drain"],
        &["wipe", "default", "--yes"],
    ];
    for command in commands {
        let socket = ["--socket", "/nonexistent/kvtierd.sock"];
        let asked = kvtier(&[command, &socket].concat(), &[]);
        assert_eq!(code(&asked), 2, "{command:?}");
        assert_eq!(out(&asked), "", "{command:?}");
        let text = err(&asked);
        assert!(
            text.contains("no daemon at /nonexistent/kvtierd.sock: there is no"),
            "{text}"
        );
        assert!(text.contains("systemctl start kvtierd"), "{text}");
        assert!(text.contains("--socket PATH"), "{text}");
    }
}

#[test]
fn socket_may_come_from_the_variable_of_the_daemon() {
    let asked = kvtier(
        &["status"],
        &[("KVTIER_SERVER_SOCKET", "/nonexistent/x.sock")],
    );
    assert!(
        err(&asked).contains("no daemon at /nonexistent/x.sock"),
        "{}",
        err(&asked)
    );
}

#[test]
fn socket_of_a_dead_daemon_is_told_from_no_socket() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("kvtierd.sock");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let asked = kvtier(
        &["status", "--json", "--socket", socket.to_str().unwrap()],
        &[],
    );
    assert_eq!(code(&asked), 2);
    let json: serde_json::Value = serde_json::from_str(&err(&asked)).unwrap();
    let error = json["error"].as_str().unwrap();
    assert!(
        error.contains("the socket is there but nobody listens"),
        "{error}"
    );
}

#[test]
fn malformed_arguments_are_refused_with_what_is_accepted() {
    for (args, part) in [
        (
            &["explain", "abc"][..],
            "accepted: the 64 hex digits of a key",
        ),
        (&["bench", "--blocks", "0"], "0 is not in 1..=1024"),
        (&["wipe"], "<NAMESPACE>"),
        (&["stauts"], "'status'"),
    ] {
        let refused = kvtier(args, &[]);
        assert_eq!(code(&refused), 2, "{args:?}");
        assert!(
            err(&refused).contains(part),
            "{part} not in {}",
            err(&refused)
        );
    }
}
