//! The HTTP endpoint for operators' tools: /metrics, /healthz and /readyz.
//!
//! Upstairs:   `process` binds it and says when to stop.
//! Downstairs: `hyper`; `metrics` and `health` give the answers.
//!
//! Bounds: connections at a time, time for a request's header, time for a connection, size of a
//! header. No body of a request is read.
//!
//! Not here on purpose: no TLS and no authentication. It listens on loopback unless the
//! configuration says otherwise, and shows no key, no secret and no name of a tenant.

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::health::Health;
use crate::metrics::Metrics;

/// Most connections at a time; more wait to be accepted.
const CONNECTIONS_MAX: usize = 64;
/// Longest wait for the header of a request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest life of a connection; a scraper opens another.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(300);
/// Longest wait for answers under way when the endpoint stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// Most memory for a request's header; hyper answers 431 past it.
const HEADER_BYTES_MAX: usize = 16 * 1024;
/// Pause after a failed accept: out of descriptors does not mend in no time.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const TEXT: &str = "text/plain; charset=utf-8";
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
const PATHS: &str = "no such page; pages: /metrics /healthz /readyz\n";

/// What the endpoint shows.
#[derive(Clone)]
pub struct Endpoint {
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    refresh: Arc<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Endpoint")
    }
}

impl Endpoint {
    /// An endpoint that shows these.
    pub fn new(metrics: Arc<Metrics>, health: Arc<Health>) -> Self {
        Self {
            metrics,
            health,
            refresh: Arc::new(|| {}),
        }
    }

    /// Calls `refresh` before every answer to /metrics, for gauges that are read off rather than
    /// counted. It must not block.
    pub fn refresh_with(mut self, refresh: impl Fn() + Send + Sync + 'static) -> Self {
        self.refresh = Arc::new(refresh);
        self
    }

    /// Serves until `stop` is done; answers under way get a moment to finish.
    pub async fn serve(self, listener: TcpListener, stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        let seats = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut connections = JoinSet::new();
        let (stop_all, stopping) = watch::channel(());
        loop {
            let next = async {
                let seat = Arc::clone(&seats).acquire_owned().await;
                (seat, listener.accept().await)
            };
            let (seat, accepted) = tokio::select! {
                () = &mut stop => break,
                next = next => next,
                Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let (endpoint, stopping) = (self.clone(), stopping.clone());
                    connections.spawn(async move {
                        endpoint.connection(stream, peer, stopping).await;
                        drop(seat);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "metrics endpoint cannot accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(listener);
        drop(stop_all);
        let finished = async { while connections.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(STOP_TIMEOUT, finished).await;
        // Dropping the set ends what is still open.
    }

    async fn connection(
        self,
        stream: TcpStream,
        peer: SocketAddr,
        mut stopping: watch::Receiver<()>,
    ) {
        let answer = service_fn(|request: Request<Incoming>| {
            let response = self.answer(request.method(), request.uri().path());
            async move { Ok::<_, Infallible>(response) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_buf_size(HEADER_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), answer);
        let mut connection = pin!(connection);
        let ended = async {
            tokio::select! {
                ended = connection.as_mut() => return ended,
                _ = stopping.changed() => connection.as_mut().graceful_shutdown(),
            }
            connection.await
        };
        if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_TIMEOUT, ended).await {
            tracing::debug!(%peer, %error, "metrics connection ended");
        }
    }

    fn answer(&self, method: &Method, path: &str) -> Response<Full<Bytes>> {
        if method != Method::GET && method != Method::HEAD {
            let mut refused = respond(StatusCode::METHOD_NOT_ALLOWED, TEXT, "use GET or HEAD\n");
            let allowed = hyper::header::HeaderValue::from_static("GET, HEAD");
            refused.headers_mut().insert(ALLOW, allowed);
            return refused;
        }
        match path {
            "/metrics" => {
                (self.refresh)();
                match self.metrics.render() {
                    Ok(text) => respond(StatusCode::OK, METRICS, text),
                    Err(error) => respond(
                        StatusCode::INTERNAL_SERVER_ERROR,
                        TEXT,
                        format!("{error}\n"),
                    ),
                }
            }
            "/healthz" => state(self.health.live(), &self.health),
            "/readyz" => state(self.health.ready(), &self.health),
            _ => respond(StatusCode::NOT_FOUND, TEXT, PATHS),
        }
    }
}

fn state(well: Result<(), String>, health: &Health) -> Response<Full<Bytes>> {
    match well {
        Ok(()) => respond(StatusCode::OK, TEXT, format!("{health}\n")),
        Err(why) => respond(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{why}\n")),
    }
}

fn respond(
    status: StatusCode,
    content: &'static str,
    body: impl Into<Bytes>,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let content = hyper::header::HeaderValue::from_static(content);
    response.headers_mut().insert(CONTENT_TYPE, content);
    response
}

#[cfg(test)]
mod tests;
