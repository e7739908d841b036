//! One real daemon in a folder of its own: started, killed, restarted.
//!
//! Upstairs:   tests.
//! Downstairs: the `kvtierd` binary, its log, its HTTP endpoint, its files.
//!
//! Invariants kept here
//!   H2  Dropping a daemon kills it; where `setpriv` exists the kernel kills it with the test.
//!
//! Not here on purpose: no fixed ports and no shared folders; tests run side by side.

use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::launch::{self, page};
use kvtier_client::{
    BlockKey, Bytes, Client, ConnectOptions, Endpoint, Error, ModelDescriptor, SaveBlock, Session,
    SessionOptions,
};
use kvtier_store::format::Superblock;
use kvtier_store::format::segment::{segment_name, segment_number};
use kvtier_store::format::superblock::{SLOT_LEN, SUPERBLOCK_NAME};
use rustix::process::{Pid, Signal};

use super::options::Options;
use super::scrape::Scrape;
use super::{binary, blocks};

/// Longest wait for a daemon to become ready. A loaded machine takes seconds.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// Longest wait for a daemon to end after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(40);
/// Lines of the log that a failed test shows.
const LOG_LINES: usize = 60;

/// A daemon and everything it leaves behind.
pub struct Daemon {
    options: Options,
    home: tempfile::TempDir,
    child: Option<Child>,
    metrics: SocketAddr,
    took_to_start: Duration,
}

impl Daemon {
    /// Starts a daemon and waits until it serves.
    pub fn start(options: Options) -> Self {
        Self::start_in(options, &std::env::temp_dir())
    }

    /// Starts a daemon whose folder lies in `parent`.
    pub fn start_in(options: Options, parent: &Path) -> Self {
        let home = tempfile::Builder::new().prefix("kvt-").tempdir_in(parent);
        let home = home.unwrap();
        // Clients of other users must reach the socket.
        set_mode(home.path(), 0o755);
        let metrics = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut daemon = Self {
            options,
            home,
            child: None,
            metrics,
            took_to_start: Duration::ZERO,
        };
        daemon.launch();
        daemon
    }

    /// A daemon that holds the blocks that `make` names on its device, and nothing in host memory.
    pub async fn cold(
        options: Options,
        model: &ModelDescriptor,
        make: impl FnOnce(&Session) -> Vec<SaveBlock>,
    ) -> (Self, Vec<SaveBlock>) {
        let mut daemon = Self::start(options);
        let session = daemon.session(model).await;
        let set = make(&session);
        blocks::save_durable(&session, &set).await;
        drop(session);
        daemon.restart();
        (daemon, set)
    }

    /// The options, to change before the next start.
    pub fn options_mut(&mut self) -> &mut Options {
        &mut self.options
    }

    /// Starts the daemon again in the same folders.
    pub fn launch(&mut self) {
        if let Err(why) = self.try_launch() {
            panic!("kvtierd did not become ready: {why}");
        }
    }

    /// As `launch`, for a daemon that may refuse to start.
    pub fn try_launch(&mut self) -> Result<(), String> {
        let from = self.spawn();
        self.wait_ready(from)
    }

    /// Starts the process and does not wait for it; the length of the log before.
    pub fn spawn(&mut self) -> usize {
        assert!(self.child.is_none(), "the daemon runs already");
        let home = self.home.path();
        std::fs::write(home.join("kvtierd.toml"), self.options.to_toml(home)).unwrap();
        let mut appending = std::fs::File::options();
        let log = appending.create(true).append(true).open(self.log_path());
        let log = log.unwrap();
        let from = usize::try_from(log.metadata().unwrap().len()).unwrap();
        let mut command = guarded(&binary::kvtierd());
        command.arg("--config").arg(home.join("kvtierd.toml"));
        launch::without_settings(&mut command);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.child = Some(command.spawn().unwrap());
        from
    }

    fn wait_ready(&mut self, from: usize) -> Result<(), String> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
                self.child = None;
                return Err(format!("it ended with {status}:\n{}", self.log_since(from)));
            }
            if let Some(address) = launch::serving(&self.log_since(from)) {
                self.metrics = address;
                self.took_to_start = begin.elapsed();
                return Ok(());
            }
            if begin.elapsed() > READY_LIMIT {
                return Err(format!("not ready after {READY_LIMIT:?}"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Time from the last start to readiness.
    pub fn took_to_start(&self) -> Duration {
        self.took_to_start
    }

    /// Openings for writing that the store on the device knows of; 0 when none is to be read.
    pub fn incarnation(&self) -> u32 {
        let file = std::fs::read(self.disk_dir().join(SUPERBLOCK_NAME)).unwrap_or_default();
        let slots = file.chunks(usize::try_from(SLOT_LEN).unwrap());
        let sound = slots.filter_map(Superblock::decode);
        sound.map(|one| one.incarnation).max().unwrap_or(0)
    }

    /// SIGKILL: what a crash or the OOM killer does.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            let status = child.wait().unwrap();
            let killed = status.signal() == Some(Signal::KILL.as_raw());
            assert!(
                killed,
                "the daemon had ended before it was killed: {status}"
            );
        }
    }

    /// SIGTERM, and waits for the end.
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait_exit(STOP_LIMIT)
    }

    /// SIGTERM, an end in order, and a new start.
    pub fn restart(&mut self) {
        let status = self.stop();
        assert!(
            status.success(),
            "kvtierd ended with {status} after SIGTERM"
        );
        self.launch();
    }

    /// SIGKILL and a new start.
    pub fn crash(&mut self) {
        self.kill9();
        self.launch();
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("the daemon does not run");
        rustix::process::kill_process(Pid::from_child(child), signal).unwrap();
    }

    /// Number of the process.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the daemon does not run").id()
    }

    /// Waits for the end of the process.
    pub fn wait_exit(&mut self, limit: Duration) -> ExitStatus {
        let mut child = self.child.take().expect("the daemon does not run");
        let begin = Instant::now();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            if begin.elapsed() > limit {
                self.child = Some(child);
                panic!("kvtierd did not end within {limit:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// True while the process lives.
    pub fn is_alive(&mut self) -> bool {
        let child = self.child.as_mut();
        child.is_some_and(|child| child.try_wait().unwrap().is_none())
    }

    /// File and offset of a block's record on the device.
    pub async fn place_of(&self, session: &Session, key: &BlockKey) -> (PathBuf, u64) {
        let explained = session.explain(key).await.unwrap();
        let places = explained.variants.iter().map(|variant| &variant.place);
        let place = places
            .filter_map(|place| place.strip_prefix("segment "))
            .next();
        let place = place.expect("the block is on the device");
        let (segment, offset) = place.split_once(" offset ").unwrap();
        let number: u32 = segment.parse().unwrap();
        let file = self.disk_dir().join(segment_name(number));
        (file, offset.parse().unwrap())
    }

    /// A look at /metrics.
    pub fn metrics(&self) -> Scrape {
        let (code, text) = page(self.metrics, "/metrics").unwrap();
        assert_eq!(code, 200, "{text}");
        Scrape::parse(&text)
    }

    /// A page of the HTTP endpoint.
    pub fn http(&self, path: &str) -> (u16, String) {
        page(self.metrics, path).unwrap()
    }

    /// The Unix socket.
    pub fn socket(&self) -> PathBuf {
        self.home.path().join("d.sock")
    }

    /// The test's folder.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// The options.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Folder of segments and catalog.
    pub fn disk_dir(&self) -> PathBuf {
        self.options.disk_dir_in(self.home.path())
    }

    /// Rules of the fault lane (`kvtier_store::disk::fault`). The lane is there when the file was
    /// there at the start; from then on a change counts at once. The rules before must have struck.
    pub fn inject(&self, rules: &str) {
        self.inject_into(&self.disk_dir(), rules);
    }

    /// The same for one of several disks.
    pub fn inject_into(&self, dir: &Path, rules: &str) {
        std::fs::create_dir_all(dir).unwrap();
        // By another name first: a lane never sees half of it.
        let (new, now) = (dir.join("faults.new"), dir.join("faults"));
        let (before, struck) = (std::fs::read_to_string(&now), dir.join("faults.struck"));
        let before = before.unwrap_or_default();
        assert!(
            before.is_empty() || struck.exists(),
            "{before:?} struck nothing"
        );
        // There may be none.
        let _ = std::fs::remove_file(struck);
        std::fs::write(&new, rules).unwrap();
        std::fs::rename(new, now).unwrap();
    }

    /// Folders of all disks.
    pub fn disk_dirs(&self) -> Vec<PathBuf> {
        self.options.disk_dirs_in(self.home.path())
    }

    /// Folder of the catalog.
    pub fn catalog_dir(&self) -> PathBuf {
        self.disk_dir().join("catalog")
    }

    /// Segment files by number.
    pub fn segments(&self) -> Vec<(u32, PathBuf)> {
        let entries = std::fs::read_dir(self.disk_dir()).unwrap();
        let named = entries.filter_map(|entry| {
            let path = entry.unwrap().path();
            let number = segment_number(path.file_name()?.to_str()?)?;
            Some((number, path))
        });
        let mut segments: Vec<_> = named.collect();
        segments.sort();
        segments
    }

    fn log_path(&self) -> PathBuf {
        self.home.path().join("kvtierd.log")
    }

    fn log_since(&self, from: usize) -> String {
        let bytes = std::fs::read(self.log_path()).unwrap_or_default();
        String::from_utf8_lossy(bytes.get(from..).unwrap_or_default()).into_owned()
    }

    /// Everything logged so far, by all lives of this daemon.
    pub fn log(&self) -> String {
        self.log_since(0)
    }

    /// A client with the suite's patience.
    pub async fn client(&self) -> Client {
        let endpoint = Endpoint::unix(self.socket());
        Client::connect(endpoint, connect_options()).await.unwrap()
    }

    /// A session of `model` with 8 MiB of staging memory.
    pub async fn session(&self, model: &ModelDescriptor) -> Session {
        self.try_session(model).await.unwrap()
    }

    /// As `session`, where it may be refused.
    pub async fn try_session(&self, model: &ModelDescriptor) -> Result<Session, Error> {
        let options = SessionOptions::new("kvtier-tests").staging_bytes(Bytes::mib(8));
        self.client().await.open_session(model, options).await
    }

    /// A session over TCP.
    pub async fn tcp_session(&self, model: &ModelDescriptor) -> Session {
        let endpoint = Endpoint::tcp(self.options.tcp_address());
        let client = Client::connect(endpoint, connect_options()).await.unwrap();
        let options = SessionOptions::new("kvtier-tests tcp").staging_bytes(Bytes::mib(8));
        client.open_session(model, options).await.unwrap()
    }
}

/// Patience that a loaded machine needs.
pub fn connect_options() -> ConnectOptions {
    let mut options = ConnectOptions::default();
    options.timeouts.connect = Duration::from_secs(20);
    options.timeouts.control = Duration::from_secs(20);
    options
}

/// A command whose process the kernel kills with the thread that starts it, where `setpriv` is.
fn guarded(program: &Path) -> Command {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let setpriv = std::env::split_paths(&path).map(|dir| dir.join("setpriv"));
    match setpriv.into_iter().find(|setpriv| setpriv.is_file()) {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.args(["--pdeathsig", "KILL", "--"]).arg(program);
            command
        }
        None => Command::new(program),
    }
}

/// Sets the mode of a path.
pub fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let last = lines.len().saturating_sub(LOG_LINES);
            eprintln!("--- the daemon's log, last {LOG_LINES} lines");
            lines[last..].iter().for_each(|line| eprintln!("{line}"));
            eprintln!("--- end of the daemon's log");
        }
    }
}
