//! A real `kvtierd` with a disk tier in a folder of its own: built, started, killed, started again.
//!
//! Upstairs:   `story`.
//! Downstairs: `kvtier_benches::launch`, the daemon's configuration file and its log.
//!
//! Invariants kept here
//!   D1  The daemon runs with what any operator could write in a configuration file; nothing in
//!       it is special to the demo.
//!
//! Not here on purpose: the rest of a test harness; this is what the demo needs.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kvtier_benches::launch;

use super::DemoError;
use super::children::{Child, check, poll};

/// Longest wait for a daemon to serve: it prepares its memory and recovers its store.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// Longest build of the daemon, from nothing on a small busy machine.
const BUILD_LIMIT: Duration = Duration::from_secs(30 * 60);
/// Least host memory. Unit: bytes.
const HOST_MIN: u64 = 64 << 20;
/// A store has at least four segments.
const SEGMENTS_MIN: u64 = 4;
/// Lines of the log that are shown when something went wrong.
const LOG_TAIL: usize = 12;

/// Builds `kvtierd` in the profile of this program, showing cargo's output, and returns its path.
/// Takes the one beside this program where there is no cargo.
pub(super) fn binary() -> Result<PathBuf, DemoError> {
    let dir = launch::profile_dir().map_err(DemoError::io("cannot find this program"))?;
    let found = dir.join("kvtierd");
    let mut build = launch::build(&dir, env!("CARGO_PKG_NAME"));
    match build.spawn() {
        Ok(mut cargo) => {
            let outcome = poll(BUILD_LIMIT, || {
                cargo
                    .try_wait()
                    .map_err(DemoError::io("cannot wait for cargo"))
            });
            if !matches!(outcome, Ok(Some(_))) {
                let _ = cargo.kill();
                let _ = cargo.wait();
            }
            match outcome? {
                Some(status) if status.success() => Ok(found),
                Some(status) => Err(DemoError::Daemon(format!("it did not build: {status}"))),
                None => Err(DemoError::Daemon("its build takes too long".to_owned())),
            }
        }
        Err(_) if found.exists() => Ok(found),
        Err(error) => Err(DemoError::io(format!(
            "cargo does not run and there is no {}",
            found.display()
        ))(error)),
    }
}

/// What one daemon is to be.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// The executable.
    pub(super) binary: PathBuf,
    /// Folder of its store, state, configuration and log.
    pub(super) folder: PathBuf,
    /// Folder of its sockets; their paths must be short.
    pub(super) sockets: PathBuf,
    /// Codec level of its disk tier: "raw" or "lossless".
    pub(super) level: &'static str,
    /// KV bytes that it has to hold.
    pub(super) payload: u64,
    /// KV bytes of one block.
    pub(super) block: u64,
}

impl Plan {
    /// The control socket.
    pub(super) fn socket(&self) -> PathBuf {
        self.sockets.join(format!("{}.sock", self.level))
    }

    /// The folder of the segments.
    pub(super) fn disk(&self) -> PathBuf {
        self.folder.join("disk")
    }

    fn log(&self) -> PathBuf {
        self.folder.join("kvtierd.log")
    }

    /// The configuration: twice the room that is needed, so that nothing has to make way.
    fn configuration(&self) -> String {
        // No block is larger than a segment, which has a head and a foot too.
        let least = if self.payload > 8 << 20 { 64 } else { 16 };
        let segment_mib = (2 * self.block).div_ceil(1 << 20).max(least);
        let needed = (2 * self.payload).div_ceil(segment_mib << 20) + 1;
        let disk_mib = needed.max(SEGMENTS_MIN) * segment_mib;
        let host_mib = (2 * self.payload).max(HOST_MIN).div_ceil(1 << 20);
        let quoted = |path: PathBuf| format!("{:?}", path.display().to_string());
        format!(
            "[server]\n\
             socket = {socket}\n\
             metrics = \"127.0.0.1:0\"\n\n\
             [state]\n\
             dir = {state}\n\n\
             [host]\n\
             capacity = \"{host_mib} MiB\"\n\n\
             [[disk]]\n\
             path = {disk}\n\
             capacity = \"{disk_mib} MiB\"\n\
             segment_size = \"{segment_mib} MiB\"\n\
             level = \"{level}\"\n",
            socket = quoted(self.socket()),
            state = quoted(self.folder.join("state")),
            disk = quoted(self.disk()),
            level = self.level,
        )
    }

    /// Starts the daemon and waits until it serves.
    pub(super) fn start(&self) -> Result<Daemon, DemoError> {
        let folder = &self.folder;
        let making = format!("cannot write to {}", folder.display());
        fs::create_dir_all(folder).map_err(DemoError::io(making.clone()))?;
        let config = folder.join("kvtierd.toml");
        fs::write(&config, self.configuration()).map_err(DemoError::io(making.clone()))?;
        let log = File::create(self.log()).map_err(DemoError::io(making))?;
        let begin = Instant::now();
        let arguments = [OsStr::new("--config"), config.as_os_str()];
        let name = format!("kvtierd ({})", self.level);
        let mut child = Child::start(&name, &self.binary, &arguments, Some(log))?;
        let ready = poll(READY_LIMIT, || {
            if let Some(status) = child.ended()? {
                let tail = self.log_tail();
                return Err(DemoError::Daemon(format!(
                    "it ended before it served ({status}); its log ends with\n{tail}"
                )));
            }
            let log = fs::read(self.log()).unwrap_or_default();
            Ok(launch::serving(&String::from_utf8_lossy(&log)))
        })?;
        let Some(http) = ready else {
            let tail = self.log_tail();
            return Err(DemoError::Daemon(format!(
                "it did not serve within {} s; its log ends with\n{tail}",
                READY_LIMIT.as_secs()
            )));
        };
        Ok(Daemon {
            child,
            http,
            ready_after: begin.elapsed(),
        })
    }

    /// The end of the log, for a report of what went wrong.
    pub(super) fn log_tail(&self) -> String {
        let log = fs::read(self.log()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let from = lines.len().saturating_sub(LOG_TAIL);
        lines.get(from..).unwrap_or_default().join("\n")
    }
}

/// A daemon that serves.
#[derive(Debug)]
pub(super) struct Daemon {
    child: Child,
    http: SocketAddr,
    /// Time from its start until it served, recovery included.
    pub(super) ready_after: Duration,
}

impl Daemon {
    /// Process id.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Kills it with SIGKILL.
    pub(super) fn kill(self) -> Result<(), DemoError> {
        self.child.kill()
    }

    /// One of the daemon's own counters, by name and labels as /metrics writes them.
    pub(super) fn counter(&self, series: &str) -> Result<u64, DemoError> {
        check()?;
        let page = launch::page(self.http, "/metrics");
        let (_, page) = page.map_err(DemoError::io("cannot read the daemon's /metrics"))?;
        let line = page.lines().find_map(|line| line.strip_prefix(series));
        let value = line.and_then(|value| value.trim().parse().ok());
        value.ok_or_else(|| DemoError::Daemon(format!("its /metrics does not have {series}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(payload: u64, block: u64) -> Plan {
        Plan {
            binary: PathBuf::new(),
            folder: "/store".into(),
            sockets: "/s".into(),
            level: "lossless",
            payload,
            block,
        }
    }

    // The last case is a 7B model without grouped queries: 512 KiB a token.
    #[test]
    fn configuration_has_room_for_twice_the_payload_and_a_block_in_a_segment() {
        let cases = [
            (1, 1),
            (90 << 20, 6 << 20),
            (1 << 30, 16 << 20),
            (2 << 30, 128 << 20),
        ];
        for (payload, block) in cases {
            let text = plan(payload, block).configuration();
            let mib = |name: &str| -> u64 {
                let line = text.lines().find(|line| line.starts_with(name));
                let value = line.unwrap().split('"').nth(1).unwrap();
                value.strip_suffix(" MiB").unwrap().parse().unwrap()
            };
            let disk = text.split_once("[[disk]]").unwrap().1;
            let disk = disk.lines().find(|line| line.starts_with("capacity"));
            let disk: u64 = disk
                .unwrap()
                .split([' ', '"'])
                .nth(3)
                .unwrap()
                .parse()
                .unwrap();
            assert!(disk << 20 >= 2 * payload, "{text}");
            assert!(mib("capacity") << 20 >= 2 * payload, "{text}");
            assert!(disk >= 4 * mib("segment_size"), "{text}");
            assert!(mib("segment_size") << 20 > block, "{text}");
        }
    }
}
