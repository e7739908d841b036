//! The daemon under measurement: the `kvtierd` of the same build, in a directory of its own.
//!
//! Upstairs:   `planes`; `index` for the build and the configuration.
//! Downstairs: a child process.
//!
//! Invariants kept here
//!   It is built before it is measured, where there is a cargo: never an older daemon's numbers.

use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvtier_benches::launch;
use kvtier_benches::report::Problem;
use tempfile::TempDir;

/// How long a start may take; host memory is touched before the daemon serves.
const PATIENCE: Duration = Duration::from_secs(60);
/// Size of a segment. Unit: MiB.
const SEGMENT_MIB: u64 = 256;

/// What one daemon is to have.
pub(crate) struct Room {
    /// Host memory. Unit: MiB.
    pub(crate) host_mib: usize,
    /// Capacity on the device, stored raw, and most operations in flight there. Unit: MiB.
    pub(crate) disk: Option<(u64, usize)>,
}

/// Runs until dropped.
pub(super) struct Daemon {
    child: Child,
    home: TempDir,
}

/// Builds the daemon and returns its path. Takes the one beside this program without a cargo.
pub(crate) fn binary() -> Result<PathBuf, Problem> {
    let dir = launch::profile_dir()?;
    let binary = dir.join("kvtierd");
    match launch::build(&dir, "kvtier-benches").status() {
        Ok(status) if status.success() => Ok(binary),
        Ok(status) => Err(format!("kvtierd did not build: {status}").into()),
        Err(_) if binary.exists() => Ok(binary),
        Err(error) => {
            let missing = binary.display();
            Err(format!("cargo does not run ({error}) and there is no {missing}").into())
        }
    }
}

impl Daemon {
    /// Starts a daemon and waits until it serves.
    pub(super) fn start(binary: &Path, dir: &Path, room: &Room) -> Result<Self, Problem> {
        let home = tempfile::Builder::new()
            .prefix("kvtier-bench")
            .tempdir_in(dir)?;
        let at = |name: &str| home.path().join(name);
        std::fs::write(at("kvtier.toml"), configuration(home.path(), room)?)?;
        let mut command = Command::new(binary);
        launch::without_settings(&mut command);
        let child = command
            .arg("--config")
            .arg(at("kvtier.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(at("log"))?)
            .spawn()?;
        let mut daemon = Self { child, home };
        let begin = Instant::now();
        loop {
            let log = std::fs::read_to_string(daemon.home.path().join("log"))?;
            if launch::serving(&log).is_some() {
                return Ok(daemon);
            }
            if let Some(status) = daemon.child.try_wait()? {
                return Err(format!("kvtierd ended at its start: {status}\n{log}").into());
            }
            if begin.elapsed() > PATIENCE {
                return Err("kvtierd did not come up within a minute".into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Where it listens.
    pub(super) fn socket(&self) -> PathBuf {
        self.home.path().join("sock")
    }
}

/// The configuration of a daemon that lives in `home`.
pub(crate) fn configuration(home: &Path, room: &Room) -> Result<String, Problem> {
    let at = |name: &str| home.join(name).display().to_string();
    let mut text = format!(
        "[server]\nsocket = {:?}\nmetrics = \"127.0.0.1:0\"\n[state]\ndir = {:?}\n\
         [host]\ncapacity = \"{} MiB\"\n[regions]\ntrusted_uids = [{}]\n",
        at("sock"),
        at("state"),
        room.host_mib,
        rustix::process::geteuid().as_raw()
    );
    if let Some((mib, depth)) = room.disk {
        write!(
            text,
            "[[disk]]\npath = {:?}\ncapacity = \"{mib} MiB\"\nsegment_size = \"{SEGMENT_MIB} MiB\"\n\
             queue_depth = {depth}\nlevel = \"raw\"\n",
            at("disk")
        )?;
    }
    Ok(text)
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
