//! The way to the daemon: the control protocol over its Unix socket.
//!
//! Upstairs:   every command that asks a running daemon.
//! Downstairs: `tonic` over `tokio`'s Unix streams.
//!
//! Not here on purpose: no retry; a person waits in front of it, and is told what is wrong.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use kvtier_proto::limits::{HTTP2_CONNECTION_WINDOW, HTTP2_STREAM_WINDOW, MESSAGE_BYTES_MAX};
use kvtier_proto::v1::kvtier_client::KvtierClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

/// Longest wait for the connection and for the answer to a question.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Why a command could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CliError {
    /// There is no socket.
    #[error(
        "no daemon at {}: there is no such socket. Start one with `systemctl start kvtierd` or \
         `kvtierd --socket PATH`, or name the socket of a running one with --socket PATH",
        socket.display()
    )]
    NoSocket {
        /// The socket asked for.
        socket: PathBuf,
    },
    /// There is a socket and nobody behind it.
    #[error(
        "no daemon at {}: the socket is there but nobody listens, so the daemon ended without \
         cleaning up. Start it with `systemctl start kvtierd` or `kvtierd`",
        socket.display()
    )]
    NobodyListens {
        /// The socket asked for.
        socket: PathBuf,
    },
    /// This user may not open the socket.
    #[error(
        "user id {uid} may not open {}: run as root or as a member of the socket's group",
        socket.display()
    )]
    NotAllowed {
        /// The socket asked for.
        socket: PathBuf,
        /// Who asks.
        uid: u32,
    },
    /// The connection failed in another way.
    #[error("{} cannot be connected to: {message}", socket.display())]
    Connect {
        /// The socket asked for.
        socket: PathBuf,
        /// What the system or the transport says.
        message: String,
    },
    /// The daemon refused.
    #[error("the daemon answered {:?}: {}", .0.code(), .0.message())]
    Refused(Box<tonic::Status>),
    /// What was asked for cannot be.
    #[error("{0}")]
    Usage(String),
    /// This process could not start.
    #[error("cannot start: {0}")]
    Runtime(std::io::Error),
}

impl From<tonic::Status> for CliError {
    fn from(status: tonic::Status) -> Self {
        Self::Refused(Box::new(status))
    }
}

/// Connects to the daemon behind `socket`.
pub(super) async fn connect(socket: &Path) -> Result<KvtierClient<Channel>, CliError> {
    // A first connection by hand, because its error still knows what is wrong.
    UnixStream::connect(socket)
        .await
        .map_err(|error| explain(socket, &error))?;
    let path = socket.to_owned();
    let dial = service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The URI goes into a header that nobody reads: the socket decides who answers.
    let channel = Endpoint::from_static("http://kvtierd")
        .connect_timeout(TIMEOUT)
        .initial_stream_window_size(HTTP2_STREAM_WINDOW)
        .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
        .connect_with_connector(dial)
        .await
        .map_err(|error| CliError::Connect {
            socket: socket.to_owned(),
            message: error.to_string(),
        })?;
    Ok(KvtierClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX))
}

/// A question that is answered within [`TIMEOUT`] or not at all.
pub(super) fn question<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(TIMEOUT);
    request
}

fn explain(socket: &Path, error: &std::io::Error) -> CliError {
    let socket = socket.to_owned();
    match error.kind() {
        ErrorKind::NotFound => CliError::NoSocket { socket },
        ErrorKind::ConnectionRefused => CliError::NobodyListens { socket },
        ErrorKind::PermissionDenied => CliError::NotAllowed {
            socket,
            uid: rustix::process::getuid().as_raw(),
        },
        _ => CliError::Connect {
            socket,
            message: error.to_string(),
        },
    }
}
