//! Where the SDK's tasks run, and how an interpreter's thread waits for them.
//!
//! Upstairs:   every class of the module.
//! Downstairs: one tokio runtime a process.
//!
//! Invariants kept here
//!   W1  Nothing waits while it is attached to the interpreter.
//!   W2  A wait ends within [`SLICE`] of a signal: Ctrl-C is not held up by a daemon.
//!   W3  Nothing made before a fork is used or dropped in the child: its threads are not there,
//!       and what they had locked stays locked.

use std::future::Future;
use std::mem::ManuallyDrop;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use tokio::runtime::{Builder, Runtime};
use tokio::time::Instant;

use crate::errors;

/// How long a wait goes on before it looks for signals.
const SLICE: Duration = Duration::from_millis(50);

/// Threads of the runtime: one copies pages while another hears of the next block, and more cores
/// are the engine's.
const THREADS: usize = 3;

/// The runtime and the process that made it. Locked by attached threads only, so that no fork of
/// the interpreter's finds it locked.
static RUNTIME: Mutex<Option<(u32, Arc<Runtime>)>> = Mutex::new(None);

/// The runtime of this process; the first use starts it.
pub(crate) fn runtime(_py: Python<'_>) -> PyResult<Arc<Runtime>> {
    let mut current = RUNTIME.lock().unwrap_or_else(PoisonError::into_inner);
    let here = std::process::id();
    if let Some((process, runtime)) = current.as_ref()
        && *process == here
    {
        return Ok(Arc::clone(runtime));
    }
    let mut builder = Builder::new_multi_thread();
    builder.enable_all().thread_name("kvtier");
    let runtime = Arc::new(builder.worker_threads(THREADS).build()?);
    // The parent's, in the child of a fork: its threads are not here to be joined (W3).
    let _ = ManuallyDrop::new(current.replace((here, Arc::clone(&runtime))));
    Ok(runtime)
}

/// Runs a future to its end on this thread, detached from the interpreter (W1). `None` when
/// `timeout` passes first.
///
/// Errors: what a signal handler raises (W2). The future is dropped then.
pub(crate) fn wait_for<F>(
    py: Python<'_>,
    timeout: Option<Duration>,
    future: F,
) -> PyResult<Option<F::Output>>
where
    F: Future + Send,
    F::Output: Send,
{
    let runtime = runtime(py)?;
    let end = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let mut future = pin!(future);
    loop {
        let left = end.map_or(SLICE, |end| end.saturating_duration_since(Instant::now()));
        let slice = async { tokio::time::timeout(left.min(SLICE), future.as_mut()).await };
        if let Ok(output) = py.detach(|| runtime.block_on(slice)) {
            return Ok(Some(output));
        }
        py.check_signals()?;
        if end.is_some_and(|end| Instant::now() >= end) {
            return Ok(None);
        }
    }
}

/// Runs a call of the SDK to its end. Its own limits end it.
pub(crate) fn call<T: Send>(
    py: Python<'_>,
    future: impl Future<Output = Result<T, kvtier_client::Error>> + Send,
) -> PyResult<T> {
    let done = wait_for(py, None, future)?;
    let done = done.ok_or_else(|| errors::timeout("the call"))?;
    done.map_err(errors::raise)
}

/// Seconds as Python gives them.
pub(crate) fn seconds(name: &str, value: f64) -> PyResult<Duration> {
    let duration = Duration::try_from_secs_f64(value);
    duration.map_err(|_| errors::invalid(format!("{name} is {value}; accepted: 0 or more seconds")))
}

/// A timeout as Python gives it.
pub(crate) fn limit(timeout: Option<f64>) -> PyResult<Option<Duration>> {
    timeout.map(|value| seconds("timeout", value)).transpose()
}

/// A value of the process that made it (W3).
pub(crate) struct Here<T> {
    process: u32,
    value: Option<T>,
}

impl<T> Here<T> {
    pub(crate) fn new(value: T) -> Self {
        let process = std::process::id();
        let value = Some(value);
        Self { process, value }
    }

    /// Errors: `Forked`.
    pub(crate) fn get(&self) -> PyResult<&T> {
        let here = std::process::id();
        let mine = self.value.as_ref().filter(|_| self.process == here);
        mine.ok_or_else(|| errors::forked(self.process, here))
    }
}

impl<T> Drop for Here<T> {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            let _ = ManuallyDrop::new(self.value.take());
        }
    }
}
