//! Bugs on purpose: each is switched on by one model at a time, to show that the model sees it.
//!
//! Upstairs:   the places where the bug would be; `models/` has its own file of this name, which
//!             switches them on.
//! Downstairs: nothing.
//!
//! In a daemon `planted` is the constant `false`: nothing of this is in it.

/// What could be wrong and must be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bug {
    /// A block of the life before a wipe is published after it.
    PublishAcrossWipe,
    /// A life is seen before the devices were told of the wipe that begins it.
    LifeBeforeForget,
    /// A block that was handed out again counts as returned.
    ReturnWhileLent,
    /// A session that has ended takes a lease.
    LeaseAfterEnd,
    /// A slot is looked at, and taken later.
    TakeInTwoSteps,
    /// Bytes move in a region that was closed.
    CopyAfterClose,
    /// Who ends a session second does not wait for its engine's memory.
    EngineOfOneEnd,
}

/// Whether this bug is switched on.
#[inline]
pub(crate) const fn planted(_: Bug) -> bool {
    false
}
