//! The first step: a daemon that answers, and sessions over it.
//!
//! Upstairs:   engines.
//! Downstairs: `kvtier_client::Client`.

use std::net::SocketAddr;
use std::path::PathBuf;

use kvtier_client::{Bytes, ConnectOptions, Endpoint, SessionOptions};
use pyo3::prelude::*;

use crate::errors;
use crate::model::{ModelDescriptor, ReaderSpec};
use crate::runtime::{self, Here, seconds};
use crate::session::Session;

/// Connects to the daemon at a path of a Unix socket, or at `tcp://127.0.0.1:PORT`.
#[pyfunction]
#[pyo3(signature = (
    endpoint, *, connect_timeout=5.0, control_timeout=5.0, commit_timeout=30.0,
    restore_idle_timeout=30.0, inline_timeout=60.0, reconnect_pause_min=0.05,
    reconnect_pause_max=2.0, reconnect_wait=0.0, reopen_wait=30.0, descriptor_socket=None
))]
#[expect(clippy::too_many_arguments, reason = "named arguments of a function")]
pub(crate) fn connect(
    py: Python<'_>,
    endpoint: PathBuf,
    connect_timeout: f64,
    control_timeout: f64,
    commit_timeout: f64,
    restore_idle_timeout: f64,
    inline_timeout: f64,
    reconnect_pause_min: f64,
    reconnect_pause_max: f64,
    reconnect_wait: f64,
    reopen_wait: f64,
    descriptor_socket: Option<PathBuf>,
) -> PyResult<Client> {
    let mut options = ConnectOptions::default();
    let timeouts = &mut options.timeouts;
    timeouts.connect = seconds("connect_timeout", connect_timeout)?;
    timeouts.control = seconds("control_timeout", control_timeout)?;
    timeouts.commit = seconds("commit_timeout", commit_timeout)?;
    timeouts.restore_idle = seconds("restore_idle_timeout", restore_idle_timeout)?;
    timeouts.inline = seconds("inline_timeout", inline_timeout)?;
    let reconnect = &mut options.reconnect;
    reconnect.pause_min = seconds("reconnect_pause_min", reconnect_pause_min)?;
    reconnect.pause_max = seconds("reconnect_pause_max", reconnect_pause_max)?;
    reconnect.wait = seconds("reconnect_wait", reconnect_wait)?;
    reconnect.reopen = seconds("reopen_wait", reopen_wait)?;
    options.descriptor_socket = descriptor_socket;
    let endpoint = read_endpoint(endpoint)?;
    let name = endpoint.to_string();
    let client = runtime::call(py, kvtier_client::Client::connect(endpoint, options))?;
    let client = Here::new(client);
    Ok(Client { client, name })
}

fn read_endpoint(endpoint: PathBuf) -> PyResult<Endpoint> {
    let Some(address) = endpoint
        .to_str()
        .and_then(|text| text.strip_prefix("tcp://"))
    else {
        return Ok(Endpoint::unix(endpoint));
    };
    let read: Result<SocketAddr, _> = address.parse();
    let read = read.map_err(|_| {
        errors::invalid(format!(
            "endpoint is tcp://{address}; accepted: a path, or tcp:// and an IP address and port"
        ))
    });
    read.map(Endpoint::tcp)
}

/// A daemon that answered.
#[pyclass(frozen, module = "kvtier")]
pub(crate) struct Client {
    client: Here<kvtier_client::Client>,
    name: String,
}

#[pymethods]
impl Client {
    #[getter]
    fn endpoint(&self) -> &str {
        &self.name
    }

    /// Opens a session for blocks of `model`, over a connection of its own.
    #[pyo3(signature = (
        model, *, client_name="python", staging_bytes=67_108_864, checksum=true, reader=None
    ))]
    fn open_session(
        &self,
        py: Python<'_>,
        model: &Bound<'_, ModelDescriptor>,
        client_name: &str,
        staging_bytes: u64,
        checksum: bool,
        reader: Option<&Bound<'_, ReaderSpec>>,
    ) -> PyResult<Session> {
        let client = self.client.get()?;
        let reader = reader.map_or_else(Default::default, |reader| reader.get().0.clone());
        let options = SessionOptions::new(client_name)
            .staging_bytes(Bytes(staging_bytes))
            .checksum(checksum)
            .reader(reader);
        let model = &model.get().0;
        let session = runtime::call(py, client.open_session(model, options))?;
        Ok(Session::new(session, model))
    }

    fn __repr__(&self) -> String {
        format!("Client({:?})", self.name)
    }
}
