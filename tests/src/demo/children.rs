//! Child processes that cannot outlive the demo, and waiting that Ctrl-C ends.
//!
//! Upstairs:   `daemon` and `story` start children; the hidden subcommand `leash` is their start.
//! Downstairs: the kernel's parent-death signal, and a thread that listens for signals.
//!
//! Invariants kept here
//!   X1  No child survives the demo: a dropped [`Child`] is killed and reaped, and should the demo
//!       itself be killed, the kernel kills what it started.
//!   X2  No wait here is unbounded or deaf: each has a limit and ends on SIGINT, SIGTERM, SIGHUP.
//!
//! Not here on purpose: pre-exec hooks, which would need unsafe code. A child first starts as this
//! program, ties itself to its parent, and then becomes what it was to be.

use std::ffi::OsStr;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvtier_benches::launch;
use tokio::signal::unix::{SignalKind, signal};

use super::DemoError;

/// How often a wait looks.
const PAUSE: Duration = Duration::from_millis(10);
/// What the shell reports for a program that Ctrl-C ended.
const INTERRUPTED: i32 = 130;

static SEEN: AtomicBool = AtomicBool::new(false);

/// Listens for the signals that ask the demo to stop. A second one ends it at once; then the
/// kernel kills the children, and the temporary folder stays.
pub(super) fn listen() -> Result<(), DemoError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(DemoError::io("cannot listen for signals"))?;
    let mut streams = Vec::new();
    {
        let _inside = runtime.enter();
        for kind in [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
        ] {
            let stream = signal(kind).map_err(DemoError::io("cannot listen for signals"))?;
            streams.push(stream);
        }
    }
    for mut stream in streams {
        runtime.spawn(async move {
            while stream.recv().await.is_some() {
                if SEEN.swap(true, Ordering::SeqCst) {
                    std::process::exit(INTERRUPTED);
                }
                eprintln!("\nstopping");
            }
        });
    }
    std::thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
    Ok(())
}

/// Fails when the demo was asked to stop.
pub(super) fn check() -> Result<(), DemoError> {
    if SEEN.load(Ordering::SeqCst) {
        return Err(DemoError::Interrupted);
    }
    Ok(())
}

/// Asks `look` until it has an answer or `limit` has passed; `None` after that.
pub(super) fn poll<T>(
    limit: Duration,
    mut look: impl FnMut() -> Result<Option<T>, DemoError>,
) -> Result<Option<T>, DemoError> {
    let end = Instant::now() + limit;
    loop {
        check()?;
        if let Some(answer) = look()? {
            return Ok(Some(answer));
        }
        if Instant::now() >= end {
            return Ok(None);
        }
        std::thread::sleep(PAUSE);
    }
}

/// A running child. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Child {
    name: String,
    process: std::process::Child,
}

impl Child {
    /// Starts `program`, tied to this process. `log` takes its standard error, which is inherited
    /// otherwise.
    pub(super) fn start(
        name: &str,
        program: &Path,
        arguments: &[&OsStr],
        log: Option<std::fs::File>,
    ) -> Result<Self, DemoError> {
        let itself = std::env::current_exe().map_err(DemoError::io("cannot find this program"))?;
        let mut command = Command::new(itself);
        command
            .arg("leash")
            .arg(std::process::id().to_string())
            .arg(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // Ctrl-C of the terminal reaches the demo alone, which then ends its children.
            .process_group(0);
        if let Some(log) = log {
            command.stderr(log);
        }
        launch::without_settings(&mut command);
        let process = command
            .spawn()
            .map_err(DemoError::io(format!("cannot start {name}")))?;
        let name = name.to_owned();
        Ok(Self { name, process })
    }

    /// Process id.
    pub(super) fn id(&self) -> u32 {
        self.process.id()
    }

    /// How it ended, if it has.
    pub(super) fn ended(&mut self) -> Result<Option<ExitStatus>, DemoError> {
        let ended = self.process.try_wait();
        ended.map_err(DemoError::io(format!("cannot wait for {}", self.name)))
    }

    /// Waits until it ends well.
    pub(super) fn finish(mut self, limit: Duration) -> Result<(), DemoError> {
        let Some(status) = poll(limit, || self.ended())? else {
            let seconds = limit.as_secs();
            return Err(DemoError::Child(format!(
                "{} did not end within {seconds} s",
                self.name
            )));
        };
        if status.success() {
            return Ok(());
        }
        Err(DemoError::Child(format!("{} failed: {status}", self.name)))
    }

    /// Kills it with SIGKILL, and makes sure that this is what ended it.
    pub(super) fn kill(mut self) -> Result<(), DemoError> {
        let sent = self.process.kill();
        sent.map_err(DemoError::io(format!("cannot kill {}", self.name)))?;
        let status = self.process.wait();
        let status = status.map_err(DemoError::io(format!("cannot wait for {}", self.name)))?;
        if status.signal() == Some(rustix::process::Signal::KILL.as_raw()) {
            return Ok(());
        }
        Err(DemoError::Child(format!(
            "{} had ended before it was killed: {status}",
            self.name
        )))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Fails only for a child that has ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The hidden subcommand `leash`: ties this process to `parent`, then becomes `command`. Returns
/// only when that fails.
pub(super) fn leash(parent: u32, command: &[std::ffi::OsString]) -> DemoError {
    let kill = Some(rustix::process::Signal::KILL);
    if let Err(error) = rustix::process::set_parent_process_death_signal(kill) {
        return DemoError::io("cannot tie a child to its parent")(error.into());
    }
    // The parent may have ended before the tie.
    let now = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    if now != Some(parent) {
        return DemoError::Interrupted;
    }
    let Some((program, arguments)) = command.split_first() else {
        return DemoError::Child("leash: no program given".to_owned());
    };
    let error = Command::new(program).args(arguments).exec();
    DemoError::io(format!("cannot start {}", Path::new(program).display()))(error)
}
