//! The faults of the simulated device: their probabilities and the counters that prove them.
//!
//! Upstairs:   `disk::sim` asks before every operation; tests set and read.
//! Downstairs: nothing.

/// One way to go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::EnumIter, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
#[repr(usize)]
pub enum Fault {
    /// A write reports success and only some of its sectors of 512 bytes arrive.
    TornSectors,
    /// A write reports success and only some of its pages of 4096 bytes arrive.
    TornPages,
    /// A write reports success and nothing arrives.
    LostWrite,
    /// A write reports success and arrives elsewhere, in this file or another.
    MisdirectedWrite,
    /// A read brings what lies elsewhere, in this file or another.
    MisdirectedRead,
    /// A read brings what lay there before the last write.
    StaleRead,
    /// One bit of a read is wrong, once.
    FlipOnRead,
    /// One bit of a write is wrong, for good.
    FlipOnWrite,
    /// A read or write moves less than asked for.
    Short,
    /// An operation is interrupted and did nothing.
    Interrupted,
    /// A read fails with EIO.
    ReadError,
    /// A write fails with EIO.
    WriteError,
    /// A create fails with ENOSPC.
    NoSpace,
    /// A write fails with ENOSPC, as on a file system that never writes in place.
    WriteNoSpace,
    /// A sync fails and what it covered may be lost.
    SyncError,
    /// An operation is overtaken by younger ones.
    Slow,
}

impl Fault {
    /// Every fault.
    pub fn iter_all() -> impl Iterator<Item = Self> {
        <Self as strum::IntoEnumIterator>::iter()
    }
}

const KINDS: usize = Fault::Slow as usize + 1;

/// Probability of each fault, in a million of the operations that it can strike.
#[derive(Debug, Clone, Default)]
pub struct Faults([u32; KINDS]);

impl Faults {
    /// The same faults with `fault` at `per_million`.
    #[must_use]
    pub fn with(mut self, fault: Fault, per_million: u32) -> Self {
        if let Some(place) = self.0.get_mut(fault as usize) {
            *place = per_million;
        }
        self
    }

    /// Every fault at `per_million`.
    #[must_use]
    pub fn all(per_million: u32) -> Self {
        Self([per_million; KINDS])
    }

    /// True when none of them loses or changes anything, or is an error.
    pub fn are_harmless(&self) -> bool {
        let harmless = [Fault::Short, Fault::Interrupted, Fault::Slow];
        Fault::iter_all().all(|fault| harmless.contains(&fault) || self.per_million(fault) == 0)
    }

    /// Probability of `fault`.
    pub fn per_million(&self, fault: Fault) -> u32 {
        self.0.get(fault as usize).copied().unwrap_or(0)
    }
}

/// How often each fault happened.
#[derive(Debug, Clone, Default)]
pub struct Fired([u64; KINDS]);

impl Fired {
    pub(super) fn count(&mut self, fault: Fault) {
        if let Some(place) = self.0.get_mut(fault as usize) {
            *place += 1;
        }
    }

    /// Times that `fault` happened.
    pub fn times(&self, fault: Fault) -> u64 {
        self.0.get(fault as usize).copied().unwrap_or(0)
    }

    /// Adds the counts of another disk.
    pub fn add(&mut self, other: &Fired) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine += theirs;
        }
    }
}
