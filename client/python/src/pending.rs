//! A call that runs in the background, to poll or to wait for.
//!
//! Upstairs:   engines whose scheduler must not wait.
//! Downstairs: one task of the runtime.

use std::sync::{Arc, Mutex, PoisonError};

use kvtier_client::Error;
use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::errors;
use crate::runtime::{self, Here};

/// Makes the answer's object, once somebody asks for it.
type Answer = Box<dyn FnOnce(Python<'_>) -> PyResult<Py<PyAny>> + Send>;

enum State {
    Running,
    Answered(Answer),
    Known(PyResult<Py<PyAny>>),
}

struct Shared {
    state: Mutex<State>,
    done: watch::Sender<bool>,
}

/// A call that runs in the background. Dropping it cancels what can be cancelled.
#[pyclass(frozen, generic, module = "kvtier")]
pub(crate) struct Pending(Here<Running>);

struct Running {
    shared: Arc<Shared>,
    task: AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Shared {
    fn answer(&self, answer: Answer) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*state, State::Running) {
            *state = State::Answered(answer);
        }
        drop(state);
        self.done.send_replace(true);
    }

    /// The answer, made once and kept.
    fn known(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        // Making the answer may let go of the interpreter, so nobody waits for this lock attached.
        let state = self.state.lock_py_attached(py);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        let known = match std::mem::replace(&mut *state, State::Running) {
            State::Running => return Err(errors::timeout("the call")),
            State::Answered(answer) => answer(py),
            State::Known(known) => known,
        };
        let copy = match &known {
            Ok(value) => Ok(value.clone_ref(py)),
            Err(error) => Err(error.clone_ref(py)),
        };
        *state = State::Known(known);
        copy
    }
}

impl Pending {
    /// Starts a call. `made` turns its answer into what `result` returns.
    pub(crate) fn start<T: Send + 'static>(
        py: Python<'_>,
        call: impl Future<Output = Result<T, Error>> + Send + 'static,
        made: impl FnOnce(Python<'_>, T) -> PyResult<Py<PyAny>> + Send + 'static,
    ) -> PyResult<Self> {
        let (done, _) = watch::channel(false);
        let state = Mutex::new(State::Running);
        let shared = Arc::new(Shared { state, done });
        let task = {
            let shared = Arc::clone(&shared);
            runtime::runtime(py)?.spawn(async move {
                let answer = call.await;
                shared.answer(Box::new(move |py| match answer {
                    Ok(value) => made(py, value),
                    Err(error) => Err(errors::raise(error)),
                }));
            })
        };
        let task = task.abort_handle();
        Ok(Self(Here::new(Running { shared, task })))
    }
}

#[pymethods]
impl Pending {
    /// True when `result` answers at once. Never waits.
    fn done(&self) -> PyResult<bool> {
        Ok(*self.0.get()?.shared.done.borrow())
    }

    /// Waits for the answer, as often as it is asked.
    #[pyo3(signature = (timeout=None))]
    fn result(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Py<PyAny>> {
        let shared = &self.0.get()?.shared;
        let mut done = shared.done.subscribe();
        let limit = runtime::limit(timeout)?;
        let waited = runtime::wait_for(py, limit, async {
            done.wait_for(|done| *done).await.is_ok()
        });
        waited?.ok_or_else(|| errors::timeout("the call"))?;
        shared.known(py)
    }

    fn cancel(&self) -> PyResult<()> {
        let running = self.0.get()?;
        running.task.abort();
        let answer: Answer = Box::new(|_| Err(errors::cancelled("the call")));
        running.shared.answer(answer);
        Ok(())
    }
}
