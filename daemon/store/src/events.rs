//! What the store answers: events, refusals, device state, counters.
//!
//! Upstairs:   the daemon's store thread turns these into replies and metrics.
//! Downstairs: nothing.

use kvtier_proto::{BlockKey, Miss, NamespaceId, PayloadKind};
use strum::{EnumCount, EnumIter, IntoStaticStr};

use crate::format::Place;
use crate::image::RecordImage;
use crate::mem::IoBuf;
use crate::read::Unverified;
use crate::store::{ScrubProgress, ToCheck};

/// Why a record was not stored. `Refused` variants mean that nothing happened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PutError {
    /// Nothing happened. Retry after an event.
    #[error("{queued} puts wait already")]
    Busy {
        /// Puts in the queue.
        queued: usize,
    },
    /// Nothing happened, and never will: the record does not fit into a segment.
    #[error("a record of {len} bytes does not fit; segments of this store take up to {max} bytes")]
    TooLarge {
        /// Length of the image.
        len: u64,
        /// Longest image that fits.
        max: u64,
    },
    /// Nothing happened: the device has no room for even one segment.
    #[error("the device has no room for a segment")]
    NoRoom,
    /// Nothing happened that counts: the namespace was wiped after the put came in.
    #[error("namespace {namespace} was wiped")]
    Wiped {
        /// Whose record it was.
        namespace: NamespaceId,
    },
    /// The record that this one was to take the place of is no longer there.
    #[error("the record that was to be replaced has gone")]
    Superseded,
    /// The bytes may or may not be on the device; recovery will decide. Treat as not stored.
    #[error("write of {len} bytes at {at} of segment {segment} did not complete")]
    Indeterminate {
        /// Segment number.
        segment: u32,
        /// Offset in the segment. Unit: bytes.
        at: u64,
        /// Length of the image. Unit: bytes.
        len: u32,
        /// What the device said.
        #[source]
        source: std::io::Error,
    },
    /// A sync failed, or three writes in a row. This store takes no writes until it is opened
    /// again (L3).
    #[error("the log is poisoned since record {since}")]
    Poisoned {
        /// Sequence that the next record would have had.
        since: u64,
    },
}

/// Why a wipe is not durable. The namespace is gone from this process all the same.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WipeError {
    /// The log takes no writes (L3); open the store again and repeat the wipe.
    #[error("the log is poisoned; the wipe of namespace {namespace} is not durable")]
    Poisoned {
        /// Whose records.
        namespace: NamespaceId,
    },
    /// The superblock could not be written; repeat the wipe. After a failed sync the log is
    /// poisoned as well (L3), and the store must be opened again first.
    #[error("the wipe of namespace {namespace} is not durable")]
    Superblock {
        /// Whose records.
        namespace: NamespaceId,
        /// What the device said.
        #[source]
        source: std::io::Error,
    },
}

/// What [`crate::Store::step`] reports.
#[derive(Debug)]
pub enum Event {
    /// A put came to its end. `Ok` means durable: it survives a power cut (P2).
    Put {
        /// As given to `put`.
        tag: u64,
        /// The image comes home, unless the device kept its buffer (a lane that failed).
        image: Option<RecordImage>,
        /// Where it lies, or why it is not stored.
        result: Result<Place, PutError>,
    },
    /// A read came to its end.
    Got {
        /// As given to `get` or `get_parts`.
        tag: u64,
        /// Bytes to verify, or why there are none and the buffer, unless the device kept it.
        result: Result<Unverified, (Option<IoBuf>, Miss)>,
    },
    /// A block made room for others.
    Evicted {
        /// Whose block.
        namespace: NamespaceId,
        /// Which block.
        key: BlockKey,
        /// What its bytes were.
        kind: PayloadKind,
        /// Where it was.
        place: Place,
    },
    /// The device changed its state.
    Device(DeviceState),
    /// A record that the scrub has read: to be checked on some other thread, and the result to be
    /// told to [`crate::Store::scrubbed`].
    Scrub(ToCheck),
    /// The scrub has been through everything.
    Scrubbed(ScrubProgress),
}

/// How the device does. The planner and the metrics see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, EnumIter, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum DeviceState {
    /// Reads and writes.
    Healthy,
    /// Has less room than configured: evicts and goes on.
    Full,
    /// Works, but each operation takes many times what it took before, or more than a second.
    Slow,
    /// Reads only, until the store is opened again (L3).
    ReadOnly,
    /// Takes no operations any more.
    Failed,
}

impl DeviceState {
    /// Name as metrics and tables show it.
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// The number that the status metric carries.
    pub const fn number(self) -> u8 {
        self as u8
    }
}

/// What is counted. The `snake_case` name is the one of the metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, EnumIter, EnumCount, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
#[repr(usize)]
pub enum Counter {
    /// Puts that became durable.
    PutsDurable,
    /// Puts answered at once because the same record was there.
    PutsPresent,
    /// Puts that failed or were refused after they were queued.
    PutsFailed,
    /// Image bytes written for puts.
    BytesWritten,
    /// Image bytes written again to keep pinned records.
    BytesForwarded,
    /// Bytes read for `get` and `get_parts`.
    BytesRead,
    /// Reads that the device delivered.
    Reads,
    /// Writes that failed.
    WriteErrors,
    /// Syncs done.
    Syncs,
    /// Syncs that failed.
    SyncErrors,
    /// Segments sealed with a footer.
    Sealed,
    /// Footers that could not be written.
    FooterErrors,
    /// Segments recycled.
    Recycled,
    /// Blocks that made room.
    Evicted,
    /// Records that a reader condemned.
    Condemned,
    /// Wipes acknowledged.
    Wipes,
    /// Creates that the device had no room for.
    CreatesRefused,
    /// Image bytes that the scrub read.
    ScrubBytes,
    /// Records that the scrub found damaged, each twice in a row.
    ScrubBad,
}

/// All counters of one store, zero at its opening.
#[derive(Debug, Clone, Default)]
pub struct Counters([u64; Counter::COUNT]);

impl Counters {
    pub(crate) fn add(&mut self, counter: Counter, n: u64) {
        if let Some(place) = self.0.get_mut(counter as usize) {
            *place += n;
        }
    }

    /// Value of `counter`.
    pub fn get(&self, counter: Counter) -> u64 {
        self.0.get(counter as usize).copied().unwrap_or(0)
    }
}

/// What the store holds now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Blocks that can be read.
    pub blocks: u64,
    /// Memory of the index. Unit: bytes.
    pub index_bytes: u64,
    /// Memory of heads that are kept for reads of parts. Unit: bytes.
    pub head_bytes: u64,
    /// Segment files on the device.
    pub segments: u64,
    /// Most segment files.
    pub segments_max: u64,
    /// Length of a segment file. Unit: bytes.
    pub segment_size: u64,
    /// Puts that wait for a place or for durability.
    pub puts_pending: u64,
    /// Reads that the device has not delivered.
    pub reads_pending: u64,
}
