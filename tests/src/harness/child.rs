//! Child processes of a test: the same executable in another role, as another user, or where
//! mounts are private.
//!
//! Upstairs:   tests whose clients die, belong to other users, or need a file system of their own.
//! Downstairs: the test binary itself: `--ignored --exact ROLE`.
//!
//! A role is an ignored test that returns at once unless [`role`] says that it was started from
//! here. It talks back in lines: [`say`].
//!
//! Invariants kept here
//!   H2  Dropping a child kills it.

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Says to a process that it is a child, and what it needs to know.
const VARIABLE: &str = "KVTIER_TEST_ROLE";
/// Starts every line that is meant for the parent.
const MARK: &str = "kvtier-child: ";

/// What the parent told this process; `None` when it is no child.
pub fn role() -> Option<String> {
    std::env::var(VARIABLE).ok()
}

/// Tells the parent something.
pub fn say(text: &str) {
    // A line of its own: the test runner may have begun one.
    println!("\n{MARK}{text}");
}

/// A child to be.
pub struct Role {
    name: String,
    told: String,
    user: Option<u32>,
    private_mounts: bool,
}

impl Role {
    /// The ignored test of this path in the same executable, told `told`.
    pub fn new(name: &str, told: impl Into<String>) -> Self {
        Self {
            name: name.to_owned(),
            told: told.into(),
            user: None,
            private_mounts: false,
        }
    }

    /// As another user, in this process's group, which may use the daemon's socket.
    #[must_use]
    pub fn user(mut self, uid: u32) -> Self {
        self.user = Some(uid);
        self
    }

    /// With mounts of its own, which end with it. Only root may.
    #[must_use]
    pub fn private_mounts(mut self) -> Self {
        self.private_mounts = true;
        self
    }

    /// Starts the child. `scratch` is a folder that everybody may enter.
    pub fn spawn(self, scratch: &Path) -> Running {
        let exe = self.executable(scratch);
        let mut command = match self.private_mounts {
            true => {
                let mut command = Command::new("unshare");
                command.arg("--mount").arg(exe);
                command
            }
            false => Command::new(exe),
        };
        command
            .args(["--ignored", "--exact", "--nocapture", "--test-threads=1"])
            .arg(&self.name)
            .env(VARIABLE, &self.told)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        if let Some(uid) = self.user {
            command.uid(uid).gid(rustix::process::getegid().as_raw());
        }
        let mut child = command.spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                let text = line.strip_prefix(MARK).map(str::to_owned);
                if text.is_some_and(|text| sender.send(text).is_err()) {
                    return;
                }
            }
        });
        Running {
            name: self.name,
            child,
            lines,
        }
    }

    /// This executable, or a copy where another user cannot reach it.
    fn executable(&self, scratch: &Path) -> PathBuf {
        let exe = std::env::current_exe().unwrap();
        if self.user.is_none() {
            return exe;
        }
        let copy = scratch.join("role");
        if !copy.exists() {
            std::fs::copy(&exe, &copy).unwrap();
            super::daemon::set_mode(&copy, 0o755);
        }
        copy
    }
}

/// A child that runs.
pub struct Running {
    name: String,
    child: Child,
    lines: Receiver<String>,
}

impl Running {
    /// The next thing the child says.
    pub fn hear(&mut self, limit: Duration) -> String {
        match self.lines.recv_timeout(limit) {
            Ok(text) => text,
            Err(RecvTimeoutError::Timeout) => panic!("{} said nothing for {limit:?}", self.name),
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.child.wait().unwrap();
                panic!("{} ended with {status} and said nothing more", self.name)
            }
        }
    }

    /// SIGKILL.
    pub fn kill9(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end, which must be a good one. Returns what was said and not heard yet.
    pub fn finish(mut self, limit: Duration) -> Vec<String> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                let rest = self.lines.iter().collect();
                assert!(
                    status.success(),
                    "{} ended with {status}: {rest:?}",
                    self.name
                );
                return rest;
            }
            let name = &self.name;
            assert!(
                begin.elapsed() < limit,
                "{name} did not end within {limit:?}"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
