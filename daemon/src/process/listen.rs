//! Sockets: made, taken over from the service manager, and cleaned away.
//!
//! Upstairs:   `process`.
//! Downstairs: the kernel.
//!
//! With socket activation the first descriptor is the control socket and the second the
//! companion that hands out memory.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinHandle;

use super::{Failed, Stop, failed};
use crate::config::Config;
use crate::health::Health;
use crate::http::Endpoint;
use crate::metrics::Metrics;

/// Who may connect is decided by user id when a session opens; the mode keeps strangers out of
/// the accept queue.
const SOCKET_MODE: u32 = 0o660;

/// Where the daemon listens.
#[derive(Debug)]
pub(super) struct Sockets {
    pub(super) control: UnixListener,
    pub(super) descriptors: UnixListener,
    pub(super) tcp: Option<TcpListener>,
}

/// Starts the HTTP endpoint; it serves from here on, also while the store recovers.
pub(super) async fn http(
    config: &Config,
    health: &Arc<Health>,
    metrics: &Arc<Metrics>,
    refresh: impl Fn() + Send + Sync + 'static,
    stop: Stop,
) -> Result<JoinHandle<()>, Failed> {
    let address = config.server.metrics;
    let listener = TcpListener::bind(address).await.map_err(|problem| {
        failed(format!(
            "cannot listen on server.metrics {address}: {problem}"
        ))
    })?;
    let bound = listener.local_addr().map_or(address, |bound| bound);
    tracing::info!(metrics = %format!("http://{bound}/metrics"), "watch me here");
    let endpoint = Endpoint::new(Arc::clone(metrics), Arc::clone(health)).refresh_with(refresh);
    Ok(tokio::spawn(endpoint.serve(listener, stop.ended())))
}

/// Binds the sockets, or takes those of the service manager.
pub(super) async fn sockets(config: &Config) -> Result<Sockets, Failed> {
    let mut given = listenfd::ListenFd::from_env();
    let (control, companion) = (&config.server.socket, config.server.descriptor_socket());
    let tcp = match config.server.tcp {
        Some(address) => Some(TcpListener::bind(address).await.map_err(|problem| {
            failed(format!("cannot listen on server.tcp {address}: {problem}"))
        })?),
        None => None,
    };
    Ok(Sockets {
        control: taken(&mut given, 0)?.map_or_else(|| unix(control), Ok)?,
        descriptors: taken(&mut given, 1)?.map_or_else(|| unix(&companion), Ok)?,
        tcp,
    })
}

fn taken(given: &mut listenfd::ListenFd, index: usize) -> Result<Option<UnixListener>, Failed> {
    let say = |problem| failed(format!("socket {index} of the service manager: {problem}"));
    let Some(listener) = given.take_unix_listener(index).map_err(say)? else {
        return Ok(None);
    };
    listener.set_nonblocking(true).map_err(say)?;
    UnixListener::from_std(listener).map(Some).map_err(say)
}

fn unix(path: &Path) -> Result<UnixListener, Failed> {
    let say =
        |problem: std::io::Error| failed(format!("cannot listen on {}: {problem}", path.display()));
    if let Some(parent) = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
    {
        std::fs::create_dir_all(parent).map_err(say)?;
    }
    if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(failed(format!(
                "{}: another daemon listens there",
                path.display()
            )));
        }
        std::fs::remove_file(path).map_err(say)?;
    }
    let listener = UnixListener::bind(path).map_err(say)?;
    let mode = std::fs::Permissions::from_mode(SOCKET_MODE);
    std::fs::set_permissions(path, mode).map_err(say)?;
    Ok(listener)
}

/// Removes the sockets that were bound here.
pub(super) fn clean_up(config: &Config) {
    for path in [
        config.server.socket.clone(),
        config.server.descriptor_socket(),
    ] {
        let _ = std::fs::remove_file(path);
    }
}
