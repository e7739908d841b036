//! Offline check of a store: reads everything, checks every checksum, changes nothing.
//!
//! Upstairs:   `kvtier verify`, `kvtier inspect`.
//! Downstairs: `superblock` slots, `recover::survey`, `scan`.
//!
//! Each segment is walked record by record and the result is held against its footer: a record
//! that the footer lists and the walk does not find is damage, and the reason is what lies at its
//! place. So is what the device does not deliver. Blocks that no footer vouches for (a torn tail,
//! a hole of a failed write, an earlier life of the file) are counted, not blamed: without the
//! footer nobody can tell such a block from a durable record that was damaged since.
//!
//! Not here on purpose: no repair. The daemon treats what is damaged as a miss; whoever wants the
//! space back lets it be recycled.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvtier_proto::{BlockKey, Miss, NamespaceId};
use strum::IntoStaticStr;

use crate::disk::Disk;
use crate::format::segment::Footer;
use crate::format::{BLOCK, StoreId, Summary, Superblock, index};
use crate::lane::{Lane, Transfer};
use crate::mem::{Arena, Share};
use crate::recover::OpenError;
use crate::recover::survey::{Surveyed, has_forgotten, segment_files, survey};
use crate::scan::{Scanner, Verdict, WINDOW, WINDOWS_AHEAD, scan};
use crate::superblock::{Looked, look};

/// How bad it is; the exit status of `kvtier verify` follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Severity {
    /// Everything that should be there is there and right.
    Sound,
    /// A segment has no footer. Its whole records are found by the next opening; what else lies
    /// there may never have been durable.
    Untidy,
    /// Records that were durable are damaged or the device does not deliver them: misses, not
    /// wrong bytes. Or the superblock's file was cut or grown: no daemon starts until it is mended.
    Damaged,
    /// The superblock is gone, or older than a segment: every record is stale.
    Lost,
}

/// What became of one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordVerdict {
    /// Whole and right.
    Sound,
    /// Whole, of a namespace that was wiped after it was written.
    Wiped,
    /// Listed by the segment's footer and no record any more, and why.
    Bad(Miss),
}

impl RecordVerdict {
    /// Name as tables show it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sound => "sound",
            Self::Wiped => "wiped",
            Self::Bad(miss) => miss.as_str(),
        }
    }
}

/// One record and its verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordRow {
    /// Segment number.
    pub segment: u32,
    /// Offset in the segment. Unit: bytes.
    pub offset: u64,
    /// Length of the image. Unit: bytes.
    pub len: u32,
    /// Whose block.
    pub namespace: NamespaceId,
    /// Which block.
    pub key: BlockKey,
    /// What became of it.
    pub verdict: RecordVerdict,
}

/// What was found of one record that should be there and is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadRecord {
    /// Offset in the segment. Unit: bytes.
    pub offset: u64,
    /// Whose block.
    pub namespace: NamespaceId,
    /// Which block.
    pub key: BlockKey,
    /// Why it is none.
    pub reason: Miss,
}

/// One segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentRow {
    /// Segment number.
    pub segment: u32,
    /// Epoch of its life; 0 when it has none in this store.
    pub epoch: u64,
    /// Length of the file. Unit: bytes.
    pub size: u64,
    /// True when its header is sound and of this store.
    pub header: bool,
    /// True when its footer is sound and of the present life.
    pub footer: bool,
    /// Whole records, wiped ones not counted.
    pub records: u64,
    /// Whole records of wiped namespaces.
    pub wiped: u64,
    /// Bytes of the whole records. Unit: bytes.
    pub bytes: u64,
    /// Blocks that are no record, by reason, apart from `bad`.
    pub other: BTreeMap<Miss, u64>,
    /// Records that the footer lists and that are damaged.
    pub bad: Vec<BadRecord>,
}

/// Everything that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The superblock, when a slot is sound.
    pub superblock: Option<Superblock>,
    /// Superblock slots that are not sound.
    pub bad_slots: u32,
    /// Length of the superblock's file where it is not the one it was made with; 0 without a file.
    pub superblock_misfit: Option<u64>,
    /// A segment is of a later incarnation than the superblock, which counts for nothing then.
    pub superblock_outdated: bool,
    /// One row a segment, by number.
    pub segments: Vec<SegmentRow>,
    /// Segment files that did not open: nothing is known of them.
    pub unopened: u64,
    /// Damaged records by reason.
    pub damage: BTreeMap<Miss, u64>,
    /// Whole records.
    pub records: u64,
    /// Bytes read.
    pub bytes: u64,
}

impl Report {
    /// The worst that was found.
    pub fn severity(&self) -> Severity {
        let bare = |row: &SegmentRow| row.records > 0 && !(row.footer && row.header);
        match () {
            () if self.superblock.is_none() || self.superblock_outdated => Severity::Lost,
            () if self.superblock_misfit.is_some() => Severity::Damaged,
            () if self.unopened > 0 => Severity::Damaged,
            () if !self.damage.is_empty() => Severity::Damaged,
            () if self.bad_slots > 0 || self.segments.iter().any(bare) => Severity::Untidy,
            () => Severity::Sound,
        }
    }
}

/// How far a verification is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VerifyProgress {
    /// Segments done.
    pub segments_done: u64,
    /// Segments in all.
    pub segments_total: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Bytes in all.
    pub bytes_total: u64,
}

/// Reads the store in the disk's directory from end to end. Never writes.
///
/// Errors: the directory cannot be listed, or the superblock cannot be read at all. A folder
/// without a store gives an empty report of severity `Lost`.
pub fn run<D: Disk>(
    disk: D,
    progress: &mut dyn FnMut(&VerifyProgress),
) -> Result<Report, OpenError> {
    run_each(disk, progress, &mut |_| {})
}

/// As [`run`]; `each` hears of every record, segment by segment in the order of their places.
pub fn run_each<D: Disk>(
    disk: D,
    progress: &mut dyn FnMut(&VerifyProgress),
    each: &mut dyn FnMut(&RecordRow),
) -> Result<Report, OpenError> {
    let mut lane = Lane::new(disk);
    // One more for footers.
    let memory = index((WINDOWS_AHEAD as u64 + 2) * WINDOW);
    let arena =
        Arena::create("kvtier-verify", memory, Share::Private).map_err(OpenError::Memory)?;
    let files = lane.disk().list().map_err(OpenError::List)?;
    let Looked {
        found: superblock,
        bad_slots,
        misfit,
    } = look(&mut lane, &arena, &files)?;
    let segments = segment_files(files);
    let surveyed = survey(&mut lane, &arena, &segments);
    let unopened = (segments.len() - surveyed.len()) as u64;
    let mut now = VerifyProgress {
        segments_total: surveyed.len() as u64,
        bytes_total: surveyed.iter().map(|one| one.size).sum(),
        ..VerifyProgress::default()
    };
    let outdated = |now: &Superblock| has_forgotten(now, &surveyed);
    let mut report = Report {
        superblock_outdated: superblock.as_ref().is_some_and(outdated),
        superblock,
        bad_slots,
        superblock_misfit: misfit,
        segments: Vec::new(),
        unopened,
        damage: BTreeMap::new(),
        records: 0,
        bytes: 0,
    };
    for one in &surveyed {
        let row = check(
            &mut lane,
            &arena,
            report.superblock.as_ref(),
            one,
            &mut now.bytes,
            each,
        );
        for bad in &row.bad {
            *report.damage.entry(bad.reason).or_default() += 1;
        }
        if let Some(unread) = row.other.get(&Miss::Device) {
            *report.damage.entry(Miss::Device).or_default() += unread;
        }
        report.records += row.records;
        report.segments.push(row);
        now.segments_done += 1;
        progress(&now);
    }
    report.bytes = now.bytes;
    Ok(report)
}

fn check<D: Disk>(
    lane: &mut Lane<D>,
    arena: &Arc<Arena>,
    superblock: Option<&Superblock>,
    one: &Surveyed,
    bytes: &mut u64,
    record: &mut dyn FnMut(&RecordRow),
) -> SegmentRow {
    // Without a superblock the segment's own word for the store is all there is.
    let own = one.header.map(|header| header.store_id);
    let store_id = superblock
        .map(|now| now.store_id)
        .or(own)
        .unwrap_or(StoreId([0; 16]));
    // As recovery does: without a header nothing says whose life the footer is of.
    let header = one.header.filter(|header| header.store_id == store_id);
    let epoch = header.map(|header| header.epoch);
    let mut row = SegmentRow {
        segment: one.number,
        epoch: epoch.unwrap_or(0),
        size: one.size,
        header: one.header.is_some_and(|header| header.store_id == store_id),
        footer: false,
        records: 0,
        wiped: 0,
        bytes: 0,
        other: BTreeMap::new(),
        bad: Vec::new(),
    };
    let footer = read_footer(lane, arena, one, store_id);
    row.footer = footer.is_some();
    // Behind the last record of a sealed segment lie remains of earlier lives and the footer.
    let end = footer
        .as_ref()
        .map_or(one.size, |footer| footer.trailer.end);
    let (mut good, mut refused) = (BTreeMap::new(), BTreeMap::new());
    let mut scanner = Scanner::new(store_id, one.number, end, epoch);
    let mut each = |verdict: Verdict| match verdict {
        Verdict::Good(summary) => drop(good.insert(summary.place.offset, summary)),
        Verdict::Bad { offset, miss } => drop(refused.insert(offset, miss)),
    };
    match scan(lane, arena, one.file, BLOCK..end, &mut scanner, &mut each) {
        Ok(read) => *bytes += read + BLOCK,
        Err(problem) => {
            tracing::warn!(segment = one.number, %problem, "scan cut short");
            *row.other.entry(Miss::Device).or_default() += 1;
        }
    }
    row.epoch = scanner.epoch().unwrap_or(0);
    let rows = tally(&mut row, superblock, &good, refused, footer.as_ref());
    rows.iter().for_each(record);
    row
}

fn tally(
    row: &mut SegmentRow,
    superblock: Option<&Superblock>,
    good: &BTreeMap<u64, Summary>,
    mut refused: BTreeMap<u64, Miss>,
    footer: Option<&Footer>,
) -> Vec<RecordRow> {
    let segment = row.segment;
    let record = |one: &Summary, verdict| RecordRow {
        segment,
        offset: one.place.offset,
        len: one.place.len,
        namespace: one.namespace,
        key: one.key,
        verdict,
    };
    let mut rows = Vec::with_capacity(good.len());
    let wiped = |one: &Summary| {
        superblock.is_some_and(|now| now.is_wiped(one.namespace, one.place.sequence))
    };
    for summary in good.values() {
        if wiped(summary) {
            row.wiped += 1;
            rows.push(record(summary, RecordVerdict::Wiped));
        } else {
            rows.push(record(summary, RecordVerdict::Sound));
            row.records += 1;
            row.bytes += u64::from(summary.place.len);
        }
    }
    for listed in footer
        .map(|footer| footer.rows.as_slice())
        .unwrap_or_default()
    {
        let offset = listed.place.offset;
        let reason = match (good.get(&offset), refused.remove(&offset)) {
            (Some(found), _) if found == listed => continue,
            (Some(found), _) if found.place.sequence != listed.place.sequence => Miss::StaleEpoch,
            (Some(_), _) => Miss::WrongKey,
            (None, Some(miss)) => miss,
            (None, None) => Miss::HeaderCrc,
        };
        rows.push(record(listed, RecordVerdict::Bad(reason)));
        let Summary { namespace, key, .. } = *listed;
        row.bad.push(BadRecord {
            offset,
            namespace,
            key,
            reason,
        });
    }
    for miss in refused.into_values() {
        *row.other.entry(miss).or_default() += 1;
    }
    rows.sort_by_key(|one| one.offset);
    rows
}

fn read_footer<D: Disk>(
    lane: &mut Lane<D>,
    arena: &Arc<Arena>,
    one: &Surveyed,
    store_id: StoreId,
) -> Option<Footer> {
    let trailer = one.header.and(one.footer_of(store_id))?;
    if trailer.rows == 0 {
        return Footer::decode(&[], trailer);
    }
    let len = index(trailer.table_len());
    let buf = arena.alloc_or_own(len).ok()?;
    let (table, result) = lane.run(Transfer::read(one.file, trailer.table_at, buf, len));
    result.ok()?;
    Footer::decode(&table?, trailer)
}

#[cfg(test)]
mod tests;
