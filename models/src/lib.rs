//! The daemon's shared state, compiled with shuttle's locks and atomics in place of the standard
//! library's, and run under thousands of orders of events.
//!
//! Upstairs:   `models/tests`, which `cargo test` runs like any other.
//! Downstairs: the daemon's own sources, word for word: `sync` and `planted` are the two modules
//!             that differ.
//!
//! A seed fixes every order, so that a failure happens again. A model of locks and atomics is also
//! shown to fail: with a bug planted, it must be found. Where the waiting is tokio's own
//! (`whoever_waits_for_room`, `scratch_memory`), shuttle orders the tasks only, not what happens
//! inside of its locks.
//!
//! Not here on purpose: no copy of anything that is modelled, no sockets and no device; nor the
//! sources' own unit tests, which run in their own packages.
#![cfg(not(test))]

use std::sync::Arc;

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, FailurePersistence, Runner};

/// The daemon's sources, without those that call them.
#[allow(dead_code, reason = "fuzz targets and the server are not here")]
#[path = "../../daemon/src"]
mod daemon {
    pub mod block;
    pub mod config;
    pub mod health;
    pub mod keep;
    pub mod log;
    pub mod metrics;
    pub mod region;
    pub mod restore;
    pub mod session;
    pub mod shm;
    pub mod tenant;
    pub mod tier;
}
pub mod planted;

pub use daemon::{
    block, config, health, keep, log, metrics, region, restore, session, shm, tenant, tier,
};

use planted::Bug;

/// What threads share, under shuttle.
pub mod sync {
    pub use shuttle::sync::atomic::{AtomicU64, Ordering};
    pub use shuttle::sync::{Mutex, MutexGuard, RwLock};
}

/// Orders of events that are tried at random, and as many again that change threads at few places:
/// each way finds what the other finds late.
const ORDERS: usize = 1500;
/// Places where the second way changes threads.
const CHANGES: usize = 3;
const SEED: u64 = 0x6B76;
/// A task's stack: what tasks call here is the whole of the daemon below them. Unit: bytes.
const STACK: usize = 256 << 10;

fn run(model: &Arc<dyn Fn() + Send + Sync>, told: FailurePersistence) {
    let mut config = Config::new();
    config.stack_size = STACK;
    config.failure_persistence = told;
    let (first, second) = (Arc::clone(model), Arc::clone(model));
    let random = RandomScheduler::new_from_seed(SEED, ORDERS);
    Runner::new(random, config.clone()).run(move || first());
    let few = PctScheduler::new_from_seed(SEED, CHANGES, ORDERS);
    Runner::new(few, config).run(move || second());
}

/// Runs a model under many orders of events: none of them may break it.
///
/// # Panics
/// When one does; the order is printed.
pub fn holds(model: impl Fn() + Send + Sync + 'static) {
    let model: Arc<dyn Fn() + Send + Sync> = Arc::new(model);
    run(&model, FailurePersistence::Print);
}

/// True when some order of events breaks the model with `bug` planted.
pub fn finds(bug: Bug, model: impl Fn() + Send + Sync + 'static) -> bool {
    let model: Arc<dyn Fn() + Send + Sync> = Arc::new(model);
    // On a thread of its own, for the bug is planted on one.
    let found = std::thread::spawn(move || {
        planted::plant(bug);
        run(&model, FailurePersistence::None);
    });
    found.join().is_err()
}
