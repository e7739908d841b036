//! The first step: a connection that sessions are opened over.
//!
//! Upstairs:   engines.
//! Downstairs: `rpc` connects, `link` opens, `session` is what comes out.

use std::sync::{Mutex, PoisonError};

use kvtier_proto::{ModelDescriptor, WireError, v1};

use crate::error::Error;
use crate::link::{Link, Recipe};
use crate::options::{ConnectOptions, Endpoint, SessionOptions};
use crate::rpc::{self, Rpc};
use crate::session::Session;

/// A daemon that answered. Opens sessions, each over a connection of its own.
pub struct Client {
    endpoint: Endpoint,
    options: ConnectOptions,
    /// The connection that proved that the daemon is there; the first session takes it.
    first: Mutex<Option<Rpc>>,
}

impl Client {
    /// Connects to the daemon.
    ///
    /// Errors: `Invalid` for an endpoint that cannot be, `Connect` when nobody answers within
    /// `options.timeouts.connect`; nothing happened in either case.
    /// Cancel safety: dropping the future leaves nothing behind. Blocks: no.
    ///
    /// ```no_run
    /// use kvtier_client::{Client, ConnectOptions, Endpoint};
    ///
    /// # async fn connect() -> Result<(), kvtier_client::Error> {
    /// let endpoint = Endpoint::unix("/run/kvtier/kvtierd.sock");
    /// let client = Client::connect(endpoint, ConnectOptions::default()).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn connect(endpoint: Endpoint, options: ConnectOptions) -> Result<Self, Error> {
        endpoint.check()?;
        let rpc = rpc::connect(&endpoint, options.timeouts.connect).await?;
        let first = Mutex::new(Some(rpc));
        Ok(Self {
            endpoint,
            options,
            first,
        })
    }

    /// Opens a session for blocks of `model` in the namespace of this peer, and maps its memory.
    ///
    /// Errors: `Invalid` names every problem of the descriptor and of the options; `Refused`
    /// (not permitted, another protocol version), `Unavailable` (draining), `LayoutMismatch`,
    /// `Region`, `Connect`, `Timeout`. Nothing is left behind in any case.
    /// Cancel safety: dropping the future ends the session. Blocks: no.
    ///
    /// ```no_run
    /// # use kvtier_client::{Bytes, Client, Error, ModelDescriptor, Session, SessionOptions};
    /// # async fn open(client: Client, model: ModelDescriptor) -> Result<Session, Error> {
    /// let options = SessionOptions::new("my-engine 1.0").staging_bytes(Bytes::mib(256));
    /// let session = client.open_session(&model, options).await?;
    /// println!("namespace {}", session.namespace());
    /// # Ok(session)
    /// # }
    /// ```
    pub async fn open_session(
        &self,
        model: &ModelDescriptor,
        options: SessionOptions,
    ) -> Result<Session, Error> {
        options.check()?;
        let problems = model.validate();
        if !problems.is_empty() {
            return Err(Error::invalid(WireError::Descriptor(problems).to_string()));
        }
        let reader = options.reader.check(model);
        reader.map_err(|problem| Error::invalid(problem.to_string()))?;
        let recipe = Recipe {
            endpoint: self.endpoint.clone(),
            connect: self.options.clone(),
            session: options,
            model: v1::ModelDescriptor::from(model),
            fingerprint: model.fingerprint(),
        };
        let first = {
            let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
            first.take()
        };
        let link = Link::open(&recipe, first).await?;
        Ok(Session::new(recipe, model.clone(), link))
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Client({})", self.endpoint)
    }
}
