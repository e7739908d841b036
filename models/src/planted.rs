//! Bugs on purpose, switched on by a model: stands in for the daemon's file of this name, whose
//! list it repeats. A bug that is missing here does not compile.
//!
//! Upstairs:   the daemon's sources, and the tests that plant one.
//! Downstairs: nothing.

use std::cell::Cell;

/// See `daemon/src/planted.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    PublishAcrossWipe,
    LifeBeforeForget,
    ReturnWhileLent,
    LeaseAfterEnd,
    TakeInTwoSteps,
    CopyAfterClose,
    EngineOfOneEnd,
}

thread_local! {
    static ACTIVE: Cell<Option<Bug>> = const { Cell::new(None) };
}

/// Whether this bug is switched on, on this thread and the tasks that it runs.
pub fn planted(bug: Bug) -> bool {
    ACTIVE.get() == Some(bug)
}

/// Switches a bug on, on this thread.
pub fn plant(bug: Bug) {
    ACTIVE.set(Some(bug));
}
