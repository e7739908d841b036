//! The real daemon under test: started, killed, restarted, damaged and looked into.
//!
//! Upstairs:   the end-to-end tests of `tests/`, and the suite `crash`; every user has daemons of
//!             its own, in folders of its own.
//! Downstairs: the `kvtierd` and `kvtier` binaries beside the running executable, and the SDK.
//!
//! Invariants kept here
//!   H1  Nothing hangs: every wait has a limit and fails with a sentence.
//!   H2  No process outlives its test: a daemon dies with the value that started it.
//!   H3  A wrong byte is always seen: payloads are derived from keys and compared whole.
//!
//! Not here on purpose
//!   No second implementation of the daemon: what is tested is what ships.
//!   No result type: who cannot go on panics with what is known.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is the failure report of a test"
)]

pub mod binary;
pub mod blocks;
pub mod crash;
pub mod daemon;
pub mod journal;
pub mod kill;
pub mod mounts;
pub mod options;
pub mod power;
pub mod scrape;

use std::time::Duration;

pub use daemon::Daemon;
pub use options::Options;
pub use scrape::Scrape;

/// Runs `task` on a runtime of its own and panics when it takes longer than `limit`.
pub fn limited<T>(limit: Duration, task: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let done = runtime.block_on(async { tokio::time::timeout(limit, task).await });
    // Tasks that still wait for a daemon that is gone must not hold anybody up.
    runtime.shutdown_timeout(Duration::from_secs(1));
    done.unwrap_or_else(|_| panic!("not done within {limit:?}"))
}
