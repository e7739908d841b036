//! The daemon under measurement: the `kvtierd` of the same build, in a directory of its own.
//!
//! Upstairs:   `planes`.
//! Downstairs: a child process.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::report::Problem;

/// How long a start may take; host memory is touched before the daemon serves.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs until dropped.
pub(super) struct Daemon {
    child: Child,
    home: TempDir,
}

impl Daemon {
    /// Starts a daemon with host memory only and waits until its socket is there.
    pub(super) fn start(dir: &Path) -> Result<Self, Problem> {
        let binary = std::env::current_exe()?.with_file_name("kvtierd");
        if !binary.exists() {
            let how = "build it first: cargo build --release -p kvtierd";
            return Err(format!("{} is missing; {how}", binary.display()).into());
        }
        let home = tempfile::Builder::new()
            .prefix("kvtier-bench")
            .tempdir_in(dir)?;
        let config = home.path().join("kvtier.toml");
        let at = |name: &str| home.path().join(name).display().to_string();
        std::fs::write(
            &config,
            format!(
                "[server]\nsocket = {:?}\nmetrics = \"127.0.0.1:0\"\n[state]\ndir = {:?}\n\
                 [host]\ncapacity = \"512 MiB\"\n[log]\nlevel = \"warn\"\n",
                at("sock"),
                at("state")
            ),
        )?;
        let child = Command::new(binary)
            .arg("--config")
            .arg(&config)
            .stdout(Stdio::null())
            .spawn()?;
        let mut daemon = Self { child, home };
        let begin = Instant::now();
        while !daemon.socket().exists() {
            if let Some(status) = daemon.child.try_wait()? {
                return Err(format!("kvtierd ended at its start: {status}").into());
            }
            if begin.elapsed() > PATIENCE {
                return Err("kvtierd did not come up within a minute".into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(daemon)
    }

    /// Where it listens.
    pub(super) fn socket(&self) -> PathBuf {
        self.home.path().join("sock")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
