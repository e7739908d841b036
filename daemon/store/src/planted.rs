//! Bugs on purpose: each is switched on by one test at a time, to show that the campaign sees it.
//!
//! Upstairs:   the places where the bug would be; `campaign::planted` switches it on.
//! Downstairs: nothing.
//!
//! Outside of tests `planted` is the constant `false`: nothing of this is in a daemon.

/// What could be wrong and must be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(test, derive(strum::EnumIter))]
pub(crate) enum Bug {
    /// A record is taken for the one that was asked for, whatever it says of itself.
    SkipIdentity,
    /// Payload checksums are not compared.
    SkipPayloadCrc,
    /// A sync is acknowledged and not made.
    NoSync,
    /// A failed sync counts as a good one.
    AckAfterFailedSync,
    /// A segment is used again while it is being read.
    RecycleUnderReader,
    /// A recycled segment's blocks stay in the index.
    RecycleKeepsIndex,
    /// A segment takes records before its new header is durable.
    HeaderNotSynced,
    /// A footer is written before the last records are.
    FooterTooEarly,
    /// A rebuild does not look at the wipe table.
    SkipWipeOnRebuild,
    /// A wipe is acknowledged before it is durable.
    WipeUnwritten,
    /// A new life uses the epochs and sequences of the one before.
    SameIncarnation,
    /// A short count is taken for success.
    ShortIsWhole,
    /// A write that failed counts as written.
    WriteErrorIgnored,
    /// A pinned record is copied without a look at what was read.
    CopyUnverified,
    /// The rows of a catalog are taken without adding them up.
    CatalogUnchecked,
    /// A catalog is kept in a life that could not read all segments.
    CatalogOfHalf,
    /// A catalog does not hear what left the index.
    CatalogKeepsRemoved,
    /// Bytes of a merged operation go to the transfers in the wrong order.
    MergeSwapped,
    /// What is left of a piece goes out again from the wrong place in memory.
    ResumedElsewhere,
    /// Records that a walk found are taken without a sync.
    WalkNotSynced,
    /// A segment header that was misread once counts as lost.
    HeaderReadOnce,
    /// A walk that found damage believes it at once.
    WalkReadsOnce,
    /// A segment tells the life it leads by its last block when its header is lost.
    TrailerTellsLife,
    /// A segment that was not read whole makes room like any other.
    UnreadGoesFirst,
    /// The scrub condemns what it has read once.
    ScrubReadsOnce,
    /// The youngest segment makes room.
    YoungestGoes,
    /// Pinned blocks go with their segment.
    PinsIgnored,
}

/// Whether this bug is switched on, on this thread.
#[cfg(not(test))]
#[inline]
pub(crate) const fn planted(_: Bug) -> bool {
    false
}

/// Whether this bug is switched on, on this thread.
#[cfg(test)]
pub(crate) fn planted(bug: Bug) -> bool {
    ACTIVE.get() == Some(bug)
}

#[cfg(test)]
thread_local! {
    static ACTIVE: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Runs `run` with `bug` switched on.
#[cfg(test)]
pub(crate) fn with<T>(bug: Option<Bug>, run: impl FnOnce() -> T) -> T {
    ACTIVE.set(bug);
    let result = run();
    ACTIVE.set(None);
    result
}
