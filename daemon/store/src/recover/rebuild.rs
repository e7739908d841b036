//! The index from the segments: footers first, records where there is no footer.
//!
//! Upstairs:   `recover`.
//! Downstairs: `scan`, `lane`, `format::segment`.
//!
//! Footers of many segments are on their way at a time, and the rows of one are taken while the
//! device delivers the next.
//!
//! Not here on purpose: a sealed segment's records are not read. A footer lists what was durable,
//! and a read checks the record anyway.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kvtier_proto::Miss;

use crate::disk::Disk;
use crate::format::segment::{Footer, Trailer, footer_len, segment_name, sound_rows};
use crate::format::{BLOCK, Summary, index};
use crate::index::Stored;
use crate::lane::Transfer;
use crate::planted::{Bug, planted};
use crate::scan::{Scanner, Verdict, scan};
use crate::store::{Store, trailer_of};

use super::flow::{Ask, Flow};
use super::load::{TOGETHER, add};
use super::survey::Surveyed;
use super::{Progress, RecoveryReport};

/// To read as much as this, memory is prepared: a device fills small pages at half its speed.
/// Unit: bytes.
const MUCH: u64 = 64 << 20;

/// Removes the oldest segments when there are more than the capacity allows. One that no header
/// tells the age of is asked for its records first: without any, it goes first.
pub(super) fn trim<D: Disk>(
    store: &mut Store<D>,
    surveyed: &mut Vec<Surveyed>,
    report: &mut RecoveryReport,
) {
    let store_id = store.superfile.now().store_id;
    let excess = (surveyed.len() as u64).saturating_sub(store.segments_max);
    if excess == 0 {
        return;
    }
    let mut ages = Vec::with_capacity(surveyed.len());
    for one in surveyed.iter() {
        let told = one.epoch(store_id);
        let epoch = told.unwrap_or_else(|| epoch_of_records(store, one, report));
        ages.push((epoch, one.number));
    }
    ages.sort_unstable();
    for (_, number) in ages.into_iter().take(index(excess)) {
        let Some(at) = surveyed.iter().position(|one| one.number == number) else {
            continue;
        };
        let one = surveyed.remove(at);
        match store.lane.disk().remove(one.file) {
            Ok(()) => report.removed += 1,
            Err(problem) => {
                tracing::warn!(name = segment_name(number), %problem, "segment not removed");
            }
        }
    }
}

/// Epoch of the youngest record of a segment: 0 when there is none. One that cannot be read counts
/// as the youngest.
fn epoch_of_records<D: Disk>(
    store: &mut Store<D>,
    one: &Surveyed,
    report: &mut RecoveryReport,
) -> u64 {
    let store_id = store.superfile.now().store_id;
    if one.is_foreign(store_id) {
        return 0;
    }
    let mut scanner = Scanner::new(store_id, one.number, one.size, None);
    let (arena, range) = (Arc::clone(&store.arena), BLOCK..one.size);
    let each = &mut |_: Verdict| {};
    match scan(&mut store.lane, &arena, one.file, range, &mut scanner, each) {
        Ok(bytes) if !scanner.unread() => report.bytes += bytes,
        _ => return u64::MAX,
    }
    scanner.epoch().unwrap_or(0)
}

/// Fills the index from all segments. Returns those that the device did not deliver whole.
pub(super) fn rebuild<D: Disk>(
    store: &mut Store<D>,
    surveyed: Vec<Surveyed>,
    report: &mut RecoveryReport,
    progress: &mut dyn FnMut(&Progress),
) -> BTreeSet<u32> {
    let store_id = store.superfile.now().store_id;
    let mut unread = BTreeSet::new();
    let mut now = Progress {
        segments_total: surveyed.len() as u64,
        ..Progress::default()
    };
    let (own, foreign): (Vec<_>, Vec<_>) = surveyed
        .into_iter()
        .partition(|one| !one.is_foreign(store_id));
    now.segments_done = foreign.len() as u64;
    for one in by_footers(store, own, report, &mut now, progress) {
        if !by_records(store, &one, report, &mut now) {
            unread.insert(one.number);
        }
        now.segments_done += 1;
        progress(&now);
    }
    report.bytes += now.bytes;
    unread
}

/// Takes the rows of all sound footers. Returns the segments without one.
fn by_footers<D: Disk>(
    store: &mut Store<D>,
    own: Vec<Surveyed>,
    report: &mut RecoveryReport,
    now: &mut Progress,
    progress: &mut dyn FnMut(&Progress),
) -> Vec<Surveyed> {
    let store_id = store.superfile.now().store_id;
    let (mut listed, mut bare) = (Vec::new(), Vec::new());
    for one in own {
        // Without a header nothing says that the footer is of the present life: the segment may
        // have been in use again.
        match one.header.and(one.footer_of(store_id)) {
            Some(trailer) => listed.push((one, trailer)),
            None => bare.push(one),
        }
    }
    let rows = listed.iter().map(|(_, trailer)| u64::from(trailer.rows));
    store.index.reserve(rows.sum());
    let tables = listed.iter().map(|(_, trailer)| trailer.table_len());
    let records = bare.iter().map(|one| one.size);
    if tables.chain(records).sum::<u64>() >= MUCH {
        // A wish: without huge pages this takes longer.
        let _ = store.arena.populate(&mut |_, _| {});
    }
    let mut take =
        |store: &mut Store<D>, one: Surveyed, trailer: &Trailer, table: Option<&[u8]>| match table
            .and_then(|table| take_rows(store, &one, trailer, table, report))
        {
            Some(rows) => {
                now.bytes += 2 * BLOCK + trailer.table_len();
                now.records += rows;
                now.segments_done += 1;
                report.by_footer += 1;
                progress(now);
            }
            None => bare.push(one),
        };
    let mut asks = Vec::with_capacity(listed.len());
    for (one, trailer) in listed {
        if trailer.rows == 0 {
            take(store, one, &trailer, Some(&[]));
            continue;
        }
        asks.push(Ask {
            file: one.file,
            at: trailer.table_at,
            len: trailer.table_len(),
            what: (one, trailer),
        });
    }
    let mut flow = Flow::new(&Arc::clone(&store.arena), asks);
    while let Some(((one, trailer), table)) = flow.next(&mut store.lane) {
        take(store, one, &trailer, table.ok().as_deref());
    }
    bare
}

/// Takes the rows of a table, or none of them when any is unsound. Returns how many.
fn take_rows<D: Disk>(
    store: &mut Store<D>,
    one: &Surveyed,
    trailer: &Trailer,
    table: &[u8],
    report: &mut RecoveryReport,
) -> Option<u64> {
    let rows = sound_rows(table, trailer)?;
    if let Some(segment) = store.segments.get_mut(one.number) {
        segment.end = trailer.end;
    }
    let before = report.records;
    add_all(store, rows, report);
    Some(report.records - before)
}

/// Reads a segment record by record and, when all of it could be read, writes the footer that it
/// lacks, so that the next opening need not do this again. False when not all of it could be read.
///
/// A header that the device did not deliver may be that of the next life, durable before any
/// record of it: then all records are of the life before, and the next opening does not know them.
/// They count in no life that has not read the header.
///
/// Records that were found may never have been synced: the writer died first. They count only
/// behind a sync of this process (L1); from then on a save of the same block is told that it is
/// durable.
fn by_records<D: Disk>(
    store: &mut Store<D>,
    one: &Surveyed,
    report: &mut RecoveryReport,
    now: &mut Progress,
) -> bool {
    if one.header_unread {
        return false;
    }
    let Walked {
        rows,
        refused,
        epoch,
        unread,
    } = walk(store, one, now);
    let strange = !refused.is_empty();
    for (miss, times) in refused {
        *report.refused.entry(miss).or_default() += times;
    }
    report.scanned += 1;
    now.records += rows.len() as u64;
    let Some(epoch) = epoch else {
        return !unread;
    };
    let mut rows: Vec<Summary> = rows.into_values().collect();
    rows.retain(|row| row.place.epoch == epoch);
    if !rows.is_empty()
        && !planted(Bug::WalkNotSynced)
        && let (_, Err(problem)) = store.lane.run(Transfer::sync(one.file))
    {
        tracing::error!(segment = one.number, %problem, "segment not synced: its blocks are not taken");
        report.unsynced += 1;
        return !unread;
    }
    store.index.set_epoch(one.number, epoch);
    if let Some(segment) = store.segments.get_mut(one.number) {
        segment.epoch = epoch;
        segment.end = rows.iter().map(end_of).max().unwrap_or(BLOCK);
        segment.rows = rows.clone();
    }
    let found = rows.len();
    add_all(store, rows.into_iter(), report);
    // One that holds nothing at all gets its footer too: it was prepared and never used.
    let listed = !unread && (found > 0 || !strange);
    if one.header.is_some() && listed && report.unsynced == 0 && !store.is_poisoned() {
        write_footer(store, one);
    }
    if let Some(segment) = store.segments.get_mut(one.number) {
        segment.rows = Vec::new();
    }
    !unread
}

/// What was found in a segment.
#[derive(Debug, Default)]
struct Walked {
    /// Sound records, by their offsets.
    rows: BTreeMap<u64, Summary>,
    refused: BTreeMap<Miss, u64>,
    /// Of the present life; none where there is neither a header nor a record.
    epoch: Option<u64>,
    /// There may be a record that was not seen.
    unread: bool,
}

/// Walks through a segment, and once more from where it is no longer one record after the other: a
/// record that was misread once, as blank perhaps, must not be left out of a footer or a catalog
/// for good. What passes either time is a record. Where both times differ the device cannot be
/// believed now, and a third might find more.
fn walk<D: Disk>(store: &mut Store<D>, one: &Surveyed, now: &mut Progress) -> Walked {
    let store_id = store.superfile.now().store_id;
    let epoch = one.header.map(|header| header.epoch);
    let mut scanner = Scanner::new(store_id, one.number, one.size, epoch);
    let mut walked = Walked::default();
    walk_once(store, one, BLOCK, &mut scanner, &mut walked, now);
    if let Some(at) = scanner.doubt_at()
        && !walked.unread
        && !planted(Bug::WalkReadsOnce)
    {
        let mut again = scanner.again(at);
        walked.refused.clear();
        walk_once(store, one, at, &mut again, &mut walked, now);
        walked.unread |= again.doubt() != scanner.doubt();
        if walked.unread {
            tracing::warn!(segment = one.number, "read twice, and not the same");
        }
    }
    walked
}

fn walk_once<D: Disk>(
    store: &mut Store<D>,
    one: &Surveyed,
    from: u64,
    scanner: &mut Scanner,
    walked: &mut Walked,
    now: &mut Progress,
) {
    let (arena, range) = (Arc::clone(&store.arena), from..one.size);
    let Walked { rows, refused, .. } = walked;
    let mut each = |verdict: Verdict| match verdict {
        Verdict::Good(row) => drop(rows.insert(row.place.offset, row)),
        Verdict::Bad { miss, .. } => *refused.entry(miss).or_default() += 1,
    };
    let lane = &mut store.lane;
    match scan(lane, &arena, one.file, range, scanner, &mut each) {
        Ok(bytes) => now.bytes += bytes,
        Err(problem) => {
            tracing::warn!(segment = one.number, %problem, "scan cut short");
            walked.unread = true;
        }
    }
    walked.unread |= scanner.unread();
    walked.epoch = scanner.epoch();
}

fn add_all<D: Disk>(
    store: &mut Store<D>,
    rows: impl Iterator<Item = Summary>,
    report: &mut RecoveryReport,
) {
    let (mut some, mut hashes) = (Vec::with_capacity(TOGETHER), Vec::with_capacity(TOGETHER));
    for row in rows {
        some.push(Stored::of(&row));
        if some.len() == TOGETHER {
            add(store, &mut some, &mut hashes, report);
        }
    }
    add(store, &mut some, &mut hashes, report);
}

fn end_of(row: &Summary) -> u64 {
    row.place.offset + u64::from(row.place.len)
}

fn write_footer<D: Disk>(store: &mut Store<D>, one: &Surveyed) {
    let Some(segment) = store.segments.get(one.number) else {
        return;
    };
    let len = footer_len(segment.rows.len() as u64);
    if segment.end + len > segment.size || one.size != store.options.segment_size {
        return;
    }
    let trailer = trailer_of(store.superfile.now().store_id, segment);
    let Ok(mut buf) = store.own_buf(len) else {
        return;
    };
    if let Some(bytes) = buf.get_mut(..index(len)) {
        Footer::encode(bytes, &trailer, &segment.rows);
    }
    let write = Transfer::write(one.file, one.size - len, buf, index(len));
    let (_, written) = store.lane.run(write);
    let (_, synced) = store.lane.run(Transfer::sync(one.file));
    if let Err(problem) = written.and(synced) {
        tracing::warn!(segment = one.number, %problem, "footer not written");
    }
}
