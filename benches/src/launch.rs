//! A daemon as a child process: its build, its surroundings, and how it says that it serves.
//!
//! Upstairs:   the suite `planes`, the demo, the test harness.
//! Downstairs: cargo, the daemon's log and its HTTP endpoint.
//!
//! Not here on purpose: no process and no waiting. The demo's children are on a leash and its
//! waits end on Ctrl-C; a test's panic; a measurement's do neither.

use std::ffi::OsStr;
use std::io::{Error, Read as _, Result, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Longest wait for an answer of the HTTP endpoint.
const HTTP_LIMIT: Duration = Duration::from_secs(5);

/// Folder of the profile that this executable belongs to: `target/debug`.
pub fn profile_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let dir = exe.parent().unwrap_or(Path::new("."));
    let inner = dir.ends_with("deps") || dir.ends_with("examples");
    let dir = if inner { dir.parent() } else { Some(dir) };
    Ok(dir.unwrap_or(Path::new(".")).to_owned())
}

/// The command that builds `kvtierd` and `kvtier` into the profile folder `dir`. `with` is the
/// package of this executable: it adds nothing to build, and with it every dependency has the
/// features that it was built with before; without it most of them would be built again.
pub fn build(dir: &Path, with: &str) -> Command {
    let profile = match dir.file_name().and_then(OsStr::to_str) {
        Some("debug") | None => "dev",
        Some(name) => name,
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["build", "--package", with, "--package", "kvtierd"])
        .args(["--bin", "kvtierd", "--bin", "kvtier"])
        .args(["--profile", profile, "--manifest-path"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml"))
        .arg("--target-dir")
        .arg(dir.parent().unwrap_or(dir))
        .stdin(Stdio::null());
    command
}

/// Takes the variables away that a daemon reads: those around here are meant for another one.
pub fn without_settings(command: &mut Command) {
    for (variable, _) in std::env::vars_os() {
        if variable.to_string_lossy().starts_with("KVTIER_") {
            command.env_remove(variable);
        }
    }
}

/// HTTP address of a daemon that serves, from its log since its start; `None` while it does not.
pub fn serving(log: &str) -> Option<SocketAddr> {
    let address = announced(log)?;
    let (status, _) = page(address, "/readyz").ok()?;
    (status == 200).then_some(address)
}

/// Where the daemon says in its log, text or JSON, that it can be watched.
fn announced(log: &str) -> Option<SocketAddr> {
    log.lines().rev().find_map(|line| {
        let (_, after) = line.split_once("http://")?;
        let (address, _) = after.split_once("/metrics")?;
        address.parse().ok()
    })
}

/// Status code and body of a page of the daemon's HTTP endpoint, on a connection of its own.
pub fn page(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&address, HTTP_LIMIT)?;
    stream.set_read_timeout(Some(HTTP_LIMIT))?;
    stream.set_write_timeout(Some(HTTP_LIMIT))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let bad = || Error::other(format!("{answer:?} is no HTTP answer"));
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(bad)?;
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok((code.ok_or_else(bad)?, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announced_reads_the_last_address_of_text_and_json_logs() {
        let text = "INFO kvtierd: watch me here metrics=http://127.0.0.1:4711/metrics\n";
        let json = "{\"metrics\":\"http://127.0.0.1:4712/metrics\"}\n{\"level\":\"INFO\"}\n";
        assert_eq!(announced(""), None);
        assert_eq!(announced("metrics=http://127.0.0.1:47"), None, "cut off");
        assert_eq!(announced(text), "127.0.0.1:4711".parse().ok());
        let both = format!("{text}{json}");
        assert_eq!(announced(&both), "127.0.0.1:4712".parse().ok());
    }
}
