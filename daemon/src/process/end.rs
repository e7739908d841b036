//! The way down: what runs is finished, what was accepted becomes durable, and nobody waits long.
//!
//! Upstairs:   `process`, once the daemon is told to stop.
//! Downstairs: `server` refuses and ends its streams; `tier` flushes and closes.
//!
//! ```text
//!   told -> no new sessions, saves, restores -> running restores end -> their leases come back
//!        -> no more commits -> all writes durable -> sessions and streams end -> listeners end
//!        -> store closed
//! ```
//! One deadline, `server.drain_timeout_s` after the daemon was told, bounds everything up to the
//! end of the sessions. What follows takes a moment, which is bounded here.
//!
//! Invariants kept here
//!   P2  What was accepted before commits were refused is durable when the store closes, unless
//!       the deadline passed; that is said.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

use super::{Stop, notify};
use crate::health::State;
use crate::server::{Drain, SAVES_MAX, Shared};

/// How long clients may go on reading what they restored. An engine copies blocks out at once;
/// one that keeps its leases finds the session gone and discards what it read meanwhile.
const LEASES_WAIT: Duration = Duration::from_secs(2);
/// How often leases are looked at meanwhile.
const LEASES_LOOK: Duration = Duration::from_millis(10);
/// Longest wait for the last replies on open connections.
const LISTENERS_WAIT: Duration = Duration::from_secs(2);
/// Longest wait for the store to close in order. What is written is safe without it.
const CLOSE_WAIT: Duration = Duration::from_secs(5);

/// Ends everything that `serving` serves.
pub(super) async fn end(shared: &Arc<Shared>, stop: Stop, serving: Vec<JoinHandle<()>>) {
    let deadline = Instant::now() + shared.drain_limit;
    shared.health.enter(State::Draining);
    notify(&[sd_notify::NotifyState::Stopping]);
    // Half of the time at most: one reader that has stopped reading must not use up that of the
    // writes.
    let readers = timeout(shared.drain_limit / 2, readers_done(shared));
    if readers.await.is_err() {
        tracing::warn!("restores were cut off: they did not end in time");
    }
    if timeout_at(deadline, writes_done(shared)).await.is_err() {
        tracing::warn!(
            unwritten = shared.tiers.pending_writes(),
            "not everything became durable in time; blocks acknowledged durable are safe"
        );
    }
    shared.saves.close();
    // Sessions are long streams, which would keep the listeners from ending.
    Drain::Ended.enter(&shared.drain);
    for session in shared.sessions.all() {
        shared.sessions.close(session.token);
    }
    stop.now();
    let replied = async {
        for server in serving {
            let _ = server.await;
        }
    };
    if timeout(LISTENERS_WAIT, replied).await.is_err() {
        tracing::debug!("a connection was still open at the end");
    }
    if let Some(disk) = shared.tiers.disk()
        && timeout(CLOSE_WAIT, disk.close()).await.is_err()
    {
        tracing::warn!("the store did not close in time; the next start recovers from segments");
    }
}

/// Waits for restores, which are not begun any more, and then a moment for their leases.
async fn readers_done(shared: &Shared) {
    for session in shared.sessions.all() {
        session.no_restores().await;
    }
    let held = || shared.sessions.all().iter().any(|one| one.leases() > 0);
    let returned = async {
        while held() {
            tokio::time::sleep(LEASES_LOOK).await;
        }
    };
    if timeout(LEASES_WAIT, returned).await.is_err() {
        tracing::info!("clients still hold leases; their sessions end all the same");
    }
}

/// Waits for everything that was accepted, and refuses more once it is durable.
async fn writes_done(shared: &Shared) {
    let blocks = shared.tiers.flush().await;
    // With all permits in hand nobody hands blocks over, and nobody will.
    if let Ok(all) = shared.saves.acquire_many(SAVES_MAX).await {
        shared.saves.close();
        drop(all);
    }
    let late = shared.tiers.flush().await;
    tracing::info!(blocks = blocks + late, "all that was accepted is durable");
}
