//! The gRPC connection: windows, message limits, sockets.
//!
//! Upstairs:   `connect` and `link`.
//! Downstairs: tonic, tokio sockets.
//!
//! Invariants kept here
//!   W1  No message larger than the limit is decoded, whatever the daemon sends.

use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use kvtier_proto::limits::{
    HTTP2_CONNECTION_WINDOW, HTTP2_FRAME, HTTP2_STREAM_WINDOW, MESSAGE_BYTES_MAX,
};
use kvtier_proto::v1::kvtier_client::KvtierClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Uri};

use crate::error::Error;
use crate::options::Endpoint;

/// The generated client over one connection. Cheap to clone.
pub(crate) type Rpc = KvtierClient<Channel>;

/// How often a silent connection is probed, and how long the answer may take: what detects a
/// peer that stopped without closing the socket.
const PROBE_EVERY: Duration = Duration::from_secs(10);
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// Connects once; no retry.
pub(crate) async fn connect(endpoint: &Endpoint, limit: Duration) -> Result<Rpc, Error> {
    let failed = |source: Arc<dyn std::error::Error + Send + Sync>| Error::Connect {
        endpoint: endpoint.to_string(),
        source,
    };
    let uri = match endpoint {
        // The connector ignores it; HTTP/2 wants an authority.
        Endpoint::Unix(_) => "http://kvtierd.local".to_owned(),
        Endpoint::Tcp(address) => format!("http://{address}"),
    };
    let tuned = tonic::transport::Endpoint::from_shared(uri)
        .map_err(|error| failed(Arc::new(error)))?
        .initial_stream_window_size(HTTP2_STREAM_WINDOW)
        .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
        .max_frame_size(HTTP2_FRAME)
        .tcp_nodelay(true)
        .connect_timeout(limit)
        .http2_keep_alive_interval(PROBE_EVERY)
        .keep_alive_timeout(PROBE_LIMIT)
        .keep_alive_while_idle(true);
    let connecting = async {
        match endpoint {
            Endpoint::Tcp(_) => tuned.connect().await,
            Endpoint::Unix(path) => {
                let path = path.clone();
                let dial = tower::service_fn(move |_: Uri| {
                    let path = path.clone();
                    async move { UnixStream::connect(path).await.map(TokioIo::new) }
                });
                tuned.connect_with_connector(dial).await
            }
        }
    };
    match tokio::time::timeout(limit, connecting).await {
        Ok(Ok(channel)) => Ok(KvtierClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)),
        Ok(Err(error)) => Err(failed(Arc::new(error))),
        Err(late) => Err(failed(Arc::new(late))),
    }
}
