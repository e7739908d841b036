//! The closed sets that label values come from.
//!
//! Upstairs:   every room that counts something names it with these.
//! Downstairs: `family`.
//!
//! Not here on purpose: no namespace, session or model as a label; their number has no bound
//! that a metrics database would like, and names of tenants are nobody else's business.

use kvtier_proto::region::Handover;
use kvtier_proto::{Level, Miss, Quality};
use strum::{EnumIter, IntoEnumIterator, IntoStaticStr};

use super::family::Label;

mod device;

pub use device::Device;

/// Declares an enum that is a label.
macro_rules! label {
    ($(#[doc = $about:literal])+ $name:ident is $label:literal {
        $($(#[doc = $doc:literal])+ $variant:ident),+ $(,)?
    }) => {
        $(#[doc = $about])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[derive(EnumIter, IntoStaticStr)]
        #[strum(serialize_all = "snake_case")]
        pub enum $name { $($(#[doc = $doc])+ $variant),+ }

        impl $name {
            /// Name as metrics and tables show it.
            pub fn as_str(self) -> &'static str {
                self.into()
            }
        }

        impl Label for $name {
            const NAME: &'static str = $label;
            fn all() -> Vec<Self> {
                Self::iter().collect()
            }
            fn count() -> usize {
                Self::iter().len()
            }
            fn index(self) -> usize {
                self as usize
            }
            fn text(self) -> &'static str {
                self.into()
            }
        }
    };
}

label! {
    /// Where blocks live.
    Tier is "tier" {
        /// Host memory.
        Host,
        /// NVMe.
        Disk,
    }
}

label! {
    /// What a lookup found.
    Found is "outcome" {
        /// The block can be restored.
        Hit,
        /// It cannot; `kvtier_miss_total` says why.
        Miss,
    }
}

label! {
    /// What became of a block that an engine wanted to save.
    Saved is "outcome" {
        /// In host memory.
        Accepted,
        /// On the device.
        Durable,
        /// Was there before, or on its way.
        Already,
        /// The staging region was full.
        RegionFull,
        /// Larger than its namespace may hold.
        OverQuota,
        /// The daemon was draining.
        Draining,
        /// No room in host memory.
        NoSpace,
        /// The slot was not the one granted.
        StaleSlot,
        /// The client's checksum said otherwise.
        Checksum,
        /// In host memory, but the device did not take it.
        NotDurable,
        /// Its namespace was wiped meanwhile.
        Wiped,
    }
}

label! {
    /// Size of saved blocks before and after the codec.
    Stage is "stage" {
        /// As the engine handed it over.
        Raw,
        /// As the device took it.
        Stored,
    }
}

label! {
    /// What an acknowledgement promised.
    Acknowledge is "acknowledge" {
        /// In host memory.
        Accepted,
        /// On the device.
        Durable,
    }
}

label! {
    /// Which way bytes moved between the daemon and an engine's region.
    Moved is "way" {
        /// From the engine.
        Saved,
        /// To the engine.
        Restored,
    }
}

label! {
    /// Why an engine's region was refused, or is not used any more.
    RegionRefused is "reason" {
        /// Its user is not one of `regions.trusted_uids`.
        Untrusted,
        /// Its slots do not lie where they could.
        Geometry,
        /// The session has as many regions, or bytes of them, as allowed.
        TooMany,
        /// The ticket was not shown, or not as it must be.
        Ticket,
        /// No descriptor came.
        Missing,
        /// The file is not memory of small pages.
        NotMemory,
        /// The file cannot be read and written.
        NotWritable,
        /// The file is sealed against writing.
        Sealed,
        /// The file is smaller than the region.
        TooSmall,
        /// The file could not be mapped.
        Unmapped,
        /// The file changed its size, or the kernel did not copy.
        Lost,
    }
}

impl From<Handover> for RegionRefused {
    fn from(answer: Handover) -> Self {
        match answer {
            Handover::Refused | Handover::Taken => Self::Ticket,
            Handover::Missing => Self::Missing,
            Handover::NotMemory => Self::NotMemory,
            Handover::NotWritable => Self::NotWritable,
            Handover::Sealed => Self::Sealed,
            Handover::TooSmall => Self::TooSmall,
            Handover::Unmapped => Self::Unmapped,
        }
    }
}

/// A rung of the codec ladder: its place in [`Level::ALL`], or behind the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rung(usize);

impl From<Level> for Rung {
    fn from(level: Level) -> Self {
        let place = Level::ALL.iter().position(|one| *one == level);
        Self(place.unwrap_or(Level::ALL.len()))
    }
}

impl Label for Rung {
    const NAME: &'static str = "level";
    fn all() -> Vec<Self> {
        (0..Self::count()).map(Self).collect()
    }
    fn count() -> usize {
        Level::ALL.len() + 1
    }
    fn index(self) -> usize {
        self.0
    }
    fn text(self) -> &'static str {
        let level = Level::ALL.get(self.0);
        level.and_then(|one| one.name()).unwrap_or("other")
    }
}

impl Label for Quality {
    const NAME: &'static str = "quality";
    fn all() -> Vec<Self> {
        Self::iter().collect()
    }
    fn count() -> usize {
        Self::Any as usize + 1
    }
    fn index(self) -> usize {
        self as usize
    }
    fn text(self) -> &'static str {
        self.as_str()
    }
}

label! {
    /// Who brought a block of a two-ended restore.
    By is "by" {
        /// The engine computed it.
        Engine,
        /// The daemon loaded it.
        Daemon,
    }
}

label! {
    /// What became of a cold block.
    Recoded is "outcome" {
        /// It takes less room now.
        Done,
        /// It is in host memory: somebody uses it after all.
        InUse,
        /// No session of its model was open since the start.
        UnknownModel,
        /// The level of cold blocks is not for such blocks.
        NotApplicable,
        /// It would take as much room as before.
        NotSmaller,
        /// It was not read, encoded or written, or was replaced meanwhile. It stays as it was.
        Failed,
    }
}

impl Recoded {
    /// True when the block was read for it.
    pub fn has_read(self) -> bool {
        !matches!(self, Self::InUse | Self::UnknownModel)
    }
}

label! {
    /// A record before and after it was re-encoded.
    Form is "form" {
        /// As it was.
        Before,
        /// As it is.
        After,
    }
}

label! {
    /// Which way bytes moved between memory and device.
    Direction is "direction" {
        /// Device to memory.
        Read,
        /// Memory to device.
        Write,
    }
}

label! {
    /// State of a device.
    DiskState is "state" {
        /// Reads and writes.
        Healthy,
        /// Writes after making room.
        Full,
        /// Serves, but slower than it should.
        Slow,
        /// Serves reads; takes no writes until a restart.
        ReadOnly,
        /// Serves nothing.
        Failed,
    }
}

label! {
    /// How a session began or why it did not.
    SessionOutcome is "outcome" {
        /// Opened.
        Opened,
        /// The peer belongs to no namespace.
        RefusedPeer,
        /// The peer speaks another protocol version.
        RefusedVersion,
        /// The model descriptor is not usable.
        RefusedModel,
        /// As many sessions as allowed are open.
        RefusedFull,
        /// The daemon was draining or not ready.
        RefusedDraining,
    }
}

label! {
    /// Why a catalog was rebuilt from segments.
    CatalogReason is "reason" {
        /// There was none.
        Missing,
        /// It could not be opened or read.
        Unreadable,
        /// It did not match the segments.
        Mismatch,
    }
}

label! {
    /// Calls of the control protocol.
    Method is "method" {
        /// `OpenSession`
        OpenSession,
        /// `RegisterRegion`
        RegisterRegion,
        /// `Lookup`
        Lookup,
        /// `Save`
        Save,
        /// `Commit`
        Commit,
        /// `Restore`
        Restore,
        /// `ReportPrefill`
        ReportPrefill,
        /// `Release`
        Release,
        /// `Pin`
        Pin,
        /// `Prefetch`
        Prefetch,
        /// `PutInline`
        PutInline,
        /// `GetInline`
        GetInline,
        /// `Wipe`
        Wipe,
        /// `WatchEvents`
        WatchEvents,
        /// `Explain`
        Explain,
        /// `Stats`
        Stats,
        /// `Drain`
        Drain,
    }
}

label! {
    /// How a call ended, in gRPC's words.
    Code is "code" {
        /// 0
        Ok,
        /// 1
        Cancelled,
        /// 2
        Unknown,
        /// 3
        InvalidArgument,
        /// 4
        DeadlineExceeded,
        /// 5
        NotFound,
        /// 6
        AlreadyExists,
        /// 7
        PermissionDenied,
        /// 8
        ResourceExhausted,
        /// 9
        FailedPrecondition,
        /// 10
        Aborted,
        /// 11
        OutOfRange,
        /// 12
        Unimplemented,
        /// 13
        Internal,
        /// 14
        Unavailable,
        /// 15
        DataLoss,
        /// 16
        Unauthenticated,
    }
}

impl From<tonic::Code> for Code {
    fn from(code: tonic::Code) -> Self {
        let number = i32::from(code);
        let same = |(index, _): &(i32, Self)| *index == number;
        let found = (0..).zip(Self::iter()).find(same);
        found.map_or(Self::Unknown, |(_, code)| code)
    }
}

impl Label for Miss {
    const NAME: &'static str = "reason";
    fn all() -> Vec<Self> {
        Self::iter().collect()
    }
    fn index(self) -> usize {
        self as usize
    }
    fn text(self) -> &'static str {
        self.as_str()
    }
}

/// A miss that speaks of damage. Made with [`Damage::of`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Damage(Miss);

impl Damage {
    /// The damage that a read's miss speaks of, if any. A record of an earlier life is damage
    /// where the index says that a later one lies: its write was lost.
    pub fn of(miss: Miss) -> Option<Self> {
        (miss.is_damage() || miss == Miss::StaleEpoch).then_some(Self(miss))
    }
}

impl Label for Damage {
    const NAME: &'static str = "reason";
    fn all() -> Vec<Self> {
        Miss::iter().filter_map(Self::of).collect()
    }
    fn index(self) -> usize {
        let before = |miss: &Miss| *miss != self.0;
        Miss::iter().take_while(before).filter_map(Self::of).count()
    }
    fn text(self) -> &'static str {
        self.0.as_str()
    }
}

/// The version of this program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version;

impl Label for Version {
    const NAME: &'static str = "version";
    fn all() -> Vec<Self> {
        vec![Self]
    }
    fn index(self) -> usize {
        0
    }
    fn text(self) -> &'static str {
        env!("CARGO_PKG_VERSION")
    }
}
