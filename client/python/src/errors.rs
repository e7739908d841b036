//! The SDK's errors as exceptions, by the same names.
//!
//! Upstairs:   every call of the module raises these.
//! Downstairs: `kvtier_client::Error`.
//!
//! They are made when the module is loaded, because each has a base of Python's own as well:
//! whoever catches `TimeoutError` or `ValueError` catches these.

use kvtier_client::{Error, Happened};
use pyo3::exceptions::{
    PyBufferError, PyConnectionError, PyException, PyNotImplementedError, PyPermissionError,
    PyTimeoutError, PyTypeError, PyValueError,
};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};

/// Name, what it means, and Python's own base if there is one.
type Kind = (
    &'static str,
    &'static str,
    Option<fn(Python<'_>) -> Bound<'_, PyType>>,
);

const BASE: &str = "Error";

const KINDS: [Kind; 16] = [
    (
        "Connect",
        "The daemon cannot be reached.",
        Some(|py| py.get_type::<PyConnectionError>()),
    ),
    (
        "Unavailable",
        "The daemon is away or stops; go on without it.",
        Some(|py| py.get_type::<PyConnectionError>()),
    ),
    (
        "Invalid",
        "An argument is out of range; the text names it and what is accepted.",
        Some(|py| py.get_type::<PyValueError>()),
    ),
    (
        "Refused",
        "Not permitted, or another protocol version.",
        Some(|py| py.get_type::<PyPermissionError>()),
    ),
    (
        "Busy",
        "A bound is reached; retry when something has been given back.",
        None,
    ),
    (
        "Unimplemented",
        "This daemon does not do that.",
        Some(|py| py.get_type::<PyNotImplementedError>()),
    ),
    (
        "Timeout",
        "No answer in time.",
        Some(|py| py.get_type::<PyTimeoutError>()),
    ),
    (
        "SessionLost",
        "The session died during the call; the next call opens it again.",
        Some(|py| py.get_type::<PyConnectionError>()),
    ),
    (
        "LeaseLost",
        "Leases were taken back before they were released: discard what was read.",
        None,
    ),
    (
        "LayoutMismatch",
        "Daemon and client disagree about the descriptor: install matching versions.",
        None,
    ),
    (
        "NamespaceChanged",
        "After a reconnect the daemon uses another namespace: open a new session.",
        None,
    ),
    ("Region", "Shared memory could not be set up.", None),
    ("BadReply", "The daemon's answer breaks the protocol.", None),
    ("Daemon", "The daemon failed inside.", None),
    (
        "Forked",
        "The object was made by the process that this one was forked from.",
        None,
    ),
    (
        "Cancelled",
        "The work behind this handle was cancelled.",
        None,
    ),
];

/// The base and one class a kind, in the order of [`KINDS`].
struct Classes {
    base: Py<PyType>,
    kinds: Vec<Py<PyType>>,
}

static CLASSES: PyOnceLock<Classes> = PyOnceLock::new();

fn class<'py>(
    py: Python<'py>,
    name: &str,
    doc: &str,
    bases: &Bound<'py, PyTuple>,
) -> PyResult<Bound<'py, PyType>> {
    let body = PyDict::new(py);
    body.set_item("__module__", "kvtier")?;
    body.set_item("__doc__", doc)?;
    if name == BASE {
        body.set_item("happened", "no")?;
        body.set_item("is_transient", false)?;
        body.set_item("retry_after", 0.0)?;
    }
    let made = py.get_type::<PyType>().call1((name, bases, body))?;
    Ok(made.cast_into()?)
}

fn make(py: Python<'_>) -> PyResult<Classes> {
    let exception = PyTuple::new(py, [py.get_type::<PyException>()])?;
    let doc = "A call did not work. Its kinds follow what the caller can do about it.";
    let base = class(py, BASE, doc, &exception)?;
    let kind = |(name, doc, own): &Kind| {
        let bases = match own {
            Some(own) => PyTuple::new(py, [base.clone(), own(py)]),
            None => PyTuple::new(py, [base.clone()]),
        };
        class(py, name, doc, &bases?).map(Bound::unbind)
    };
    let kinds = KINDS.iter().map(kind).collect::<PyResult<_>>()?;
    let base = base.unbind();
    Ok(Classes { base, kinds })
}

/// Puts the classes into the module.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    let classes = CLASSES.get_or_try_init(py, || make(py))?;
    module.add(BASE, &classes.base)?;
    for ((name, _, _), class) in KINDS.iter().zip(&classes.kinds) {
        module.add(*name, class)?;
    }
    Ok(())
}

struct Facts {
    happened: Happened,
    is_transient: bool,
    retry_after: f64,
}

fn exception(name: &str, text: String, facts: Option<&Facts>) -> PyErr {
    let built = Python::attach(|py| {
        let classes = CLASSES.get_or_try_init(py, || make(py))?;
        let mut named = KINDS.iter().zip(&classes.kinds);
        let class = named.find(|((kind, _, _), _)| *kind == name);
        let class = class.map_or(&classes.base, |(_, class)| class);
        let value = class.bind(py).call1((text,))?;
        if let Some(facts) = facts {
            let happened = match facts.happened {
                Happened::No => "no",
                Happened::Unknown => "unknown",
            };
            value.setattr("happened", happened)?;
            value.setattr("is_transient", facts.is_transient)?;
            value.setattr("retry_after", facts.retry_after)?;
        }
        Ok::<_, PyErr>(PyErr::from_value(value))
    });
    built.unwrap_or_else(|error| error)
}

/// The exception of an error of the SDK.
pub(crate) fn raise(error: Error) -> PyErr {
    let name = match &error {
        Error::Connect { .. } => "Connect",
        Error::Unavailable { .. } => "Unavailable",
        Error::Invalid { .. } => "Invalid",
        Error::Refused { .. } => "Refused",
        Error::Busy { .. } => "Busy",
        Error::Unimplemented { .. } => "Unimplemented",
        Error::Timeout { .. } => "Timeout",
        Error::SessionLost { .. } => "SessionLost",
        Error::LeaseLost { .. } => "LeaseLost",
        Error::LayoutMismatch { .. } => "LayoutMismatch",
        Error::NamespaceChanged { .. } => "NamespaceChanged",
        Error::Region { .. } => "Region",
        Error::BadReply { .. } => "BadReply",
        Error::Daemon { .. } => "Daemon",
        // A later kind of the SDK's is still an error of ours.
        _ => BASE,
    };
    let retry_after = match &error {
        Error::Unavailable { retry_after, .. } => retry_after.as_secs_f64(),
        _ => 0.0,
    };
    let facts = Facts {
        happened: error.happened(),
        is_transient: error.is_transient(),
        retry_after,
    };
    exception(name, error.to_string(), Some(&facts))
}

/// An argument that the SDK does not get to see.
pub(crate) fn invalid(text: impl Into<String>) -> PyErr {
    exception("Invalid", text.into(), None)
}

/// The caller's own timeout: what it waited for goes on.
pub(crate) fn timeout(what: &str) -> PyErr {
    let facts = Facts {
        happened: Happened::Unknown,
        is_transient: true,
        retry_after: 0.0,
    };
    exception("Timeout", format!("{what} is not done"), Some(&facts))
}

pub(crate) fn cancelled(what: &str) -> PyErr {
    let facts = Facts {
        happened: Happened::Unknown,
        is_transient: false,
        retry_after: 0.0,
    };
    exception("Cancelled", format!("{what} was cancelled"), Some(&facts))
}

pub(crate) fn forked(made: u32, here: u32) -> PyErr {
    let text = format!(
        "made in process {made}, used in process {here}, its child; connect again after a fork"
    );
    exception("Forked", text, None)
}

/// Memory is in use, or no longer there.
pub(crate) fn buffer(text: impl Into<String>) -> PyErr {
    PyBufferError::new_err(text.into())
}

pub(crate) fn wrong_type(text: impl Into<String>) -> PyErr {
    PyTypeError::new_err(text.into())
}
