//! The storage engine: from encoded blocks down to the device.
//!
//! Upstairs:   `kvtierd::tier` owns one store per device, on a thread of its own.
//! Downstairs: files, through `disk::Disk`.
//!
//! The store is a step machine. Requests go in by [`Store::put`], [`Store::get`],
//! [`Store::get_parts`]; [`Store::step`] moves bytes and answers with [`Event`]s. One thread owns
//! it; only [`Unverified::verify`] and [`RecordBuilder::build`], the parts that cost CPU, are made
//! to run on any thread.
//!
//! ```text
//!   PartSpec list -> ImageLayout -> arena slot filled at head_len.. -> RecordBuilder::build
//!        -> RecordImage -> Store::put -> step -> Event::Put { image, result: Ok(Place) }
//!   Store::peek -> IoBuf of place.len -> Store::get -> step -> Event::Got { Ok(Unverified) }
//!        -> Unverified::verify -> Record, or (IoBuf, Miss) -> Store::condemn
//! ```
//!
//! Invariants of the whole engine
//!   H1  A [`Record`] is of the namespace, key and layout that was asked for.
//!   H2  Its bytes are those of some completed put of that key: every one passed a checksum.
//!   L1  A record is visible only after its bytes are durable.
//!   L2  A record carries the store, epoch and place it was written for; anything else at that
//!       place is no record at all.
//!   L3  After one failed sync, or three failed writes in a row, nothing is written until the
//!       store is opened again. Reads go on.
//!   L4  A segment changes state only along the edges of `segment::Life`.
//!   W1  After an acknowledged wipe no byte of the namespace written before is returned, by this
//!       process or a later one.
//!
//! Not here on purpose: no async runtime, no clock but the disk's own, no randomness, no RPC, no
//! tenant, no codec.
#![deny(missing_docs)]
#![deny(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

pub mod catalog;
pub mod disk;
mod events;
pub mod format;
#[doc(hidden)]
pub mod fuzzing;
mod image;
mod index;
mod lane;
#[allow(
    unsafe_code,
    reason = "a room of its own: it hands out slices of a mapping"
)]
pub mod mem;
mod planted;
mod read;
mod recover;
mod scan;
mod segments;
mod store;
mod superblock;
mod sync;
pub mod verify;

pub use catalog::{Catalog, CatalogError, SledCatalog};
pub use events::{Counter, Counters, DeviceState, Event, PutError, Usage, WipeError};
pub use format::{Head, Header, Part, PartCode, Place, StoreId, Summary};
pub use image::{ImageError, ImageLayout, PartSpec, RecordBuilder, RecordImage, RecordMeta};
pub use index::Stored;
pub use read::{Record, Unverified, Want};
pub use recover::{
    Distrust, DistrustReason, IndexSource, OpenError, Progress, RecoveryReport, SuperblockFound,
};
pub use segments::{Candidate, Life, choose_victim};
pub use store::{
    Checked, Forgotten, Refused, SEGMENTS_MAX, SEGMENTS_MIN, ScrubProgress, Store, StoreOptions,
    ToCheck, WRITE_ERRORS_MAX,
};

#[cfg(test)]
mod campaign;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod museum;
#[cfg(test)]
mod testkit;
