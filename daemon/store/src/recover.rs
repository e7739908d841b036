//! Opening a store: who it is, what it holds, and where it may write next.
//!
//! Upstairs:   `Store::open`.
//! Downstairs: `superblock`, `recover::survey`, `recover::rebuild`, `catalog`, `scan`.
//!
//! ```text
//!   superblock -> survey (header and trailer of every segment) -> superblock, one incarnation on
//!       -> catalog, when it is sound -----------------------------+-> index
//!       -> else footers -> else record by record, then a footer --+
//! ```
//! Everything here is bounded by the device's size and can be cut short at any point and run
//! again: the only writes are the superblock and footers of segments that lack one.
//!
//! Invariants kept here
//!   L2  Epochs and sequences of this life are above those of all earlier ones, because the
//!       incarnation is durable before anything is written.
//!   P7  The rebuilt index is the index that was live.
//!
//! Not here on purpose: no repair by guessing. A record that does not pass is not a record.

mod flow;
mod load;
mod rebuild;
pub(crate) mod survey;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kvtier_proto::Miss;

use crate::catalog::{Catalog, CatalogError, Stamp};
use crate::disk::{Disk, FILES_MAX};
use crate::events::DeviceState;
use crate::format::superblock::{SLOT_LEN, SLOTS, SUPERBLOCK_NAME};
use crate::format::{CleanClose, Superblock, VERSION};
use crate::lane::Lane;
use crate::mem::{Arena, Share};
use crate::planted::{Bug, planted};
use crate::segments::{Life, Segment};
use crate::store::{Store, StoreOptions};
use crate::superblock::{LoadError, SuperFile, load};

use survey::{Surveyed, has_forgotten};

/// Memory of the store's own blocks: two scan windows and some small ones. Unit: bytes.
const ARENA: usize = 16 << 20;

/// Why a store cannot be opened. Damage is not among it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The options are out of bounds; every problem is listed.
    #[error("store options: {}", .0.join("; "))]
    Options(Vec<String>),
    /// No memory for the store's own blocks.
    #[error("memory for the store's own blocks")]
    Memory(#[source] std::io::Error),
    /// The device does not list its files.
    #[error("listing the store's folder")]
    List(#[source] std::io::Error),
    /// The superblock cannot be read or made.
    #[error("reading the superblock")]
    Superblock(#[source] std::io::Error),
    /// The superblock is sound, but its file was cut or grown. Nothing was changed.
    #[error(
        "{SUPERBLOCK_NAME} is {len} bytes long and was made with {}; a slot of it is sound: give \
         the file its length back (truncate -s {0})",
        SLOTS * SLOT_LEN
    )]
    SuperblockLength {
        /// Length of the file. Unit: bytes.
        len: u64,
    },
    /// A later version of this program wrote the store. Nothing was changed.
    #[error(
        "the store is of format version {found}; this program knows version {VERSION}: use the \
         program that wrote it, or another directory"
    )]
    Newer {
        /// Version of the store.
        found: u16,
    },
}

impl From<LoadError> for OpenError {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Io(problem) => Self::Superblock(problem),
            LoadError::Newer(found) => Self::Newer { found },
            LoadError::Length(len) => Self::SuperblockLength { len },
        }
    }
}

/// How far an opening is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Segments whose records are known.
    pub segments_done: u64,
    /// Segments in all.
    pub segments_total: u64,
    /// Records found.
    pub records: u64,
    /// Bytes read.
    pub bytes: u64,
}

/// What the superblock was found to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum SuperblockFound {
    /// There was none and no segment: a new store.
    New,
    /// Sound.
    Sound,
    /// One slot was damaged, the other is sound.
    OneSlot,
    /// No slot is sound, or segments are younger: the store starts over, all records are stale.
    Lost,
}

/// Where the index came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IndexSource {
    /// The catalog, after a clean close.
    Catalog,
    /// The segments: there was no clean close, or no catalog is used.
    Segments,
    /// The segments, because the catalog could not be trusted, and why.
    SegmentsAfter(Distrust),
}

/// Why a catalog was not trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Distrust {
    /// In one word, to count by.
    pub reason: DistrustReason,
    /// In a sentence, for the log.
    pub what: String,
}

/// What can be wrong with a catalog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DistrustReason {
    /// There is none.
    Missing,
    /// It cannot be opened or read.
    Unreadable,
    /// It is not the one of the last clean close, or contradicts the segments.
    Mismatch,
}

impl From<CatalogError> for Distrust {
    fn from(problem: CatalogError) -> Self {
        let reason = match problem {
            CatalogError::Missing => DistrustReason::Missing,
            CatalogError::Unsound { .. } => DistrustReason::Mismatch,
            CatalogError::Library { .. } | CatalogError::Folder(_) => DistrustReason::Unreadable,
        };
        let what = problem.to_string();
        Self { reason, what }
    }
}

/// What an opening found and did.
#[derive(Debug, Clone)]
pub struct RecoveryReport {
    /// State of the superblock.
    pub superblock: SuperblockFound,
    /// Where the index came from.
    pub source: IndexSource,
    /// Segment files.
    pub segments: u64,
    /// Segments whose footer was read.
    pub by_footer: u64,
    /// Segments that were read record by record.
    pub scanned: u64,
    /// Segments without a block; they are free.
    pub empty: u64,
    /// Segment files beyond the capacity; they were removed.
    pub removed: u64,
    /// Segment files that did not open: their blocks are absent until they do.
    pub unopened: u64,
    /// Segments that could not be synced after a walk: their blocks count for nothing, and the
    /// store takes no writes.
    pub unsynced: u64,
    /// Records found.
    pub records: u64,
    /// Records that an older or newer one of the same key replaced.
    pub superseded: u64,
    /// Records of wiped namespaces.
    pub wiped: u64,
    /// What was found that is no record, by reason. A torn tail and earlier lives show here too.
    pub refused: BTreeMap<Miss, u64>,
    /// Blocks in the index.
    pub blocks: u64,
    /// Bytes read.
    pub bytes: u64,
}

pub(crate) fn open<D: Disk>(
    disk: D,
    mut options: StoreOptions,
    catalog: Option<Box<dyn Catalog>>,
    progress: &mut dyn FnMut(&Progress),
) -> Result<(Store<D>, RecoveryReport), OpenError> {
    let mut problems = options.problems();
    let files_max = disk.files_max();
    problems.extend(too_many_files(&options, files_max));
    if !problems.is_empty() {
        return Err(OpenError::Options(problems));
    }
    let mut lane = Lane::new(disk);
    let arena = Arena::create("kvtier-store", ARENA, Share::Private).map_err(OpenError::Memory)?;
    let loaded = load(&mut lane, &arena)?;
    if let Some(found) = &loaded.found {
        options = as_made(options, found.segment_size, files_max)?;
    }
    let files = survey::segment_files(lane.disk().list().map_err(OpenError::List)?);
    let surveyed = survey::survey(&mut lane, &arena, &files);
    let (superblock, found) = decide(&options, loaded.found, loaded.bad_slots, &surveyed);
    let clean = superblock.clean;
    let mut superfile = SuperFile::new(loaded.file, Arc::clone(&arena), superblock);
    let stamp = clean.map(|close| stamp_of(superfile.now(), close));
    superfile.change(|now| {
        let lives = u32::from(!planted(Bug::SameIncarnation) || now.incarnation == 0);
        now.incarnation = now.incarnation.saturating_add(lives);
        now.clean = None;
    });
    let written = superfile.write(&mut lane);
    let mut store = Store::empty(options, lane, arena, superfile, None);
    let mut report = blank_report(found, surveyed.len() as u64);
    report.unopened = (files.len() - surveyed.len()) as u64;
    if let Err(failed) = &written {
        // Before anything else is written: what follows only reads (L3).
        tracing::error!(problem = %failed.problem, "superblock not written: the store takes no writes");
        store.open_read_only();
    }
    fill(&mut store, surveyed, catalog, stamp, &mut report, progress);
    if report.unsynced > 0 && written.is_ok() {
        store.open_read_only();
    }
    report.blocks = store.index.len() as u64;
    Ok((store, report))
}

/// A store that could not open all of its segments would lose sight of durable blocks.
fn too_many_files(options: &StoreOptions, files_max: u64) -> Option<String> {
    let segments = options.capacity / options.segment_size.max(1);
    // One more for the superblock.
    (segments >= files_max).then(|| {
        // Of the limit, a quarter is left to the rest of the process; one more is the superblock.
        let limit = (segments + 1) * 4 / 3 + 1;
        let advice = if segments < u64::from(FILES_MAX) {
            format!("raise the limit of open files (LimitNOFILE=) to {limit}, or segment_size")
        } else {
            "use a larger segment_size".to_owned()
        };
        format!(
            "capacity is {} bytes, which is {segments} segments of {}; this process may hold {} \
             of them open: {advice}",
            options.capacity,
            options.segment_size,
            files_max.saturating_sub(1)
        )
    })
}

/// The options with the segment size that the store was made with. They were checked against
/// another: a capacity that is too small for this one would remove what the store holds.
fn as_made(
    mut options: StoreOptions,
    segment_size: u64,
    files_max: u64,
) -> Result<StoreOptions, OpenError> {
    let asked = std::mem::replace(&mut options.segment_size, segment_size);
    let mut problems = options.problems();
    problems.extend(too_many_files(&options, files_max));
    if problems.is_empty() {
        return Ok(options);
    }
    problems.push(format!(
        "the store that is there was made with a segment_size of {segment_size} bytes and keeps \
         it, whatever is asked for now ({asked})"
    ));
    Err(OpenError::Options(problems))
}

/// What counts from now on.
fn decide(
    options: &StoreOptions,
    found: Option<Superblock>,
    bad_slots: u32,
    surveyed: &[Surveyed],
) -> (Superblock, SuperblockFound) {
    let state = match &found {
        Some(now) if has_forgotten(now, surveyed) => SuperblockFound::Lost,
        Some(_) if bad_slots > 0 => SuperblockFound::OneSlot,
        Some(_) => SuperblockFound::Sound,
        None if bad_slots == 0 && surveyed.is_empty() => SuperblockFound::New,
        None => SuperblockFound::Lost,
    };
    let revision = found.as_ref().map_or(0, |now| now.revision);
    match found {
        Some(now) if state != SuperblockFound::Lost => (now, state),
        _ => {
            let new = Superblock {
                store_id: options.new_store_id,
                revision,
                incarnation: 0,
                segment_size: options.segment_size,
                floor: 0,
                clean: None,
                wiped: Vec::new(),
            };
            (new, state)
        }
    }
}

fn stamp_of(now: &Superblock, close: CleanClose) -> Stamp {
    Stamp {
        store_id: now.store_id,
        incarnation: now.incarnation,
        close,
    }
}

fn blank_report(superblock: SuperblockFound, segments: u64) -> RecoveryReport {
    RecoveryReport {
        superblock,
        source: IndexSource::Segments,
        segments,
        by_footer: 0,
        scanned: 0,
        empty: 0,
        removed: 0,
        unopened: 0,
        unsynced: 0,
        records: 0,
        superseded: 0,
        wiped: 0,
        refused: BTreeMap::new(),
        blocks: 0,
        bytes: 0,
    }
}

fn fill<D: Disk>(
    store: &mut Store<D>,
    mut surveyed: Vec<Surveyed>,
    catalog: Option<Box<dyn Catalog>>,
    stamp: Option<Stamp>,
    report: &mut RecoveryReport,
    progress: &mut dyn FnMut(&Progress),
) {
    if !store.is_poisoned() {
        rebuild::trim(store, &mut surveyed, report);
    }
    for one in &surveyed {
        let mut segment = Segment::new(one.number, one.file, one.size);
        if let Some(epoch) = one.epoch(store.superfile.now().store_id) {
            segment.epoch = epoch;
            store.index.set_epoch(one.number, epoch);
        }
        store.segments.add(segment);
    }
    // The rows of a catalog that a read-only store leaves alone would be out of date.
    let mut catalog = catalog.filter(|_| !store.is_poisoned());
    let trusted = match (&mut catalog, stamp) {
        (Some(catalog), Some(stamp)) => load::load_catalog(store, catalog.as_mut(), &stamp, report),
        _ => false,
    };
    let mut unread = BTreeSet::new();
    if !trusted {
        unread = rebuild::rebuild(store, surveyed, report, progress);
        let whole = report.unopened == 0 && unread.is_empty();
        if !whole && !planted(Bug::CatalogOfHalf) {
            // Blocks that the device did not deliver may be there the next time. A catalog that
            // is closed without them would hide them for good.
            tracing::warn!("not all segments could be read: no catalog in this life");
            catalog = None;
        }
        if let Some(Err(problem)) = catalog.as_mut().map(|catalog| catalog.reset()) {
            tracing::warn!(%problem, "no catalog until the next opening");
            catalog = None;
        }
    }
    store.catalog = catalog;
    if store.catalog.is_some() {
        store.changed.start();
    }
    settle_lives(store, trusted, &unread, report);
}

/// A segment with a block is sealed, one without is free, unless it was not read whole.
fn settle_lives<D: Disk>(
    store: &mut Store<D>,
    trusted: bool,
    unread: &BTreeSet<u32>,
    report: &mut RecoveryReport,
) {
    let numbers: Vec<u32> = store
        .segments
        .iter()
        .map(|segment| segment.number)
        .collect();
    for number in numbers {
        let live = store.index.live_in(number);
        let Some(segment) = store.segments.get_mut(number) else {
            continue;
        };
        segment.unread = unread.contains(&number);
        let free = live == 0 && !segment.unread;
        if free && segment.size == store.options.segment_size {
            segment.life = Life::Free;
            report.empty += 1;
        } else {
            segment.life = Life::Sealed;
            if !trusted {
                store.changed.sealed(number);
            }
        }
    }
}

impl<D: Disk> Store<D> {
    /// True when nothing may be written (L3).
    pub(crate) fn is_poisoned(&self) -> bool {
        self.state() >= DeviceState::ReadOnly
    }

    fn open_read_only(&mut self) {
        let mut events = Vec::new();
        self.poison(&mut events);
        debug_assert_eq!(self.state(), DeviceState::ReadOnly);
    }
}

#[cfg(test)]
mod tests;
