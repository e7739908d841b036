//! A session of a command that speaks to the daemon as an engine does.
//!
//! Upstairs:   `bench` and `export`.
//! Downstairs: the control protocol.
//!
//! Not here on purpose: no shared memory.

use kvtier_proto::ModelDescriptor;
use kvtier_proto::limits::PROTOCOL_VERSION;
use kvtier_proto::v1::kvtier_client::KvtierClient;
use kvtier_proto::v1::{self, session_event::Event};
use tonic::Streaming;
use tonic::transport::Channel;

use super::connect::CliError;

/// An open session.
pub(super) struct Session {
    pub(super) client: KvtierClient<Channel>,
    /// Names it in every call.
    pub(super) id: bytes::Bytes,
    /// What the daemon said when it opened.
    pub(super) opened: v1::SessionOpened,
    /// The session lives as long as this stream.
    _events: Streaming<v1::SessionEvent>,
}

impl Session {
    /// Opens a session of `who` with blocks of `model`.
    pub(super) async fn open(
        mut client: KvtierClient<Channel>,
        model: &ModelDescriptor,
        who: &str,
    ) -> Result<Self, CliError> {
        let request = v1::OpenSessionRequest {
            protocol_version: PROTOCOL_VERSION,
            client: format!("{who} {}", env!("CARGO_PKG_VERSION")),
            model: Some(model.into()),
            reader: None,
        };
        let mut events = client.open_session(request).await?.into_inner();
        let first = events.message().await?.and_then(|event| event.event);
        let Some(Event::Opened(opened)) = first else {
            return Err(unexpected("the first event of the session is not `opened`"));
        };
        Ok(Self {
            client,
            id: opened.session.clone(),
            opened,
            _events: events,
        })
    }
}

/// What the daemon must not do.
pub(super) fn unexpected(what: impl Into<String>) -> CliError {
    CliError::Usage(format!(
        "the daemon did not answer as it should: {}",
        what.into()
    ))
}
