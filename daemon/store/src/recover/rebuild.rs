//! The index from the segments: footers first, records where there is no footer.
//!
//! Upstairs:   `recover`.
//! Downstairs: `scan`, `lane`, `format::segment`.
//!
//! Not here on purpose: a sealed segment's records are not read. A footer lists what was durable,
//! and a read checks the record anyway.

use std::collections::BTreeSet;

use crate::disk::Disk;
use crate::format::segment::{Footer, Trailer, footer_len, segment_name};
use crate::format::{BLOCK, Summary, index};
use crate::index::Stored;
use crate::lane::Transfer;
use crate::scan::{Scanner, Verdict, scan};
use crate::store::{Store, trailer_of};

use super::survey::Surveyed;
use super::{Progress, RecoveryReport, add};

/// Footers read together.
const TOGETHER: usize = 32;

/// Removes the oldest segments when there are more than the capacity allows.
pub(super) fn trim<D: Disk>(
    store: &mut Store<D>,
    surveyed: &mut Vec<Surveyed>,
    report: &mut RecoveryReport,
) {
    let store_id = store.superfile.now().store_id;
    let excess = (surveyed.len() as u64).saturating_sub(store.segments_max);
    let mut ages: Vec<(u64, u32)> = surveyed
        .iter()
        .map(|one| (one.epoch(store_id).unwrap_or(0), one.number))
        .collect();
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
    let (mut own, foreign): (Vec<_>, Vec<_>) = surveyed
        .into_iter()
        .partition(|one| !one.is_foreign(store_id));
    now.segments_done = foreign.len() as u64;
    let mut bare = Vec::new();
    while !own.is_empty() {
        let rest = own.split_off(own.len().min(TOGETHER));
        let group = std::mem::replace(&mut own, rest);
        by_footers(store, group, &mut bare, report, &mut now);
        progress(&now);
    }
    for one in bare {
        if !by_records(store, &one, report, &mut now) {
            unread.insert(one.number);
        }
        now.segments_done += 1;
        progress(&now);
    }
    report.bytes += now.bytes;
    unread
}

/// Reads the footers of a group. Segments without a sound one go to `bare`.
fn by_footers<D: Disk>(
    store: &mut Store<D>,
    group: Vec<Surveyed>,
    bare: &mut Vec<Surveyed>,
    report: &mut RecoveryReport,
    now: &mut Progress,
) {
    let store_id = store.superfile.now().store_id;
    let (mut asked, mut transfers) = (Vec::new(), Vec::new());
    for one in group {
        // Without a header nothing says that the footer is of the present life: the segment may
        // have been in use again.
        let trailer = one.header.and(one.footer_of(store_id));
        let buf = trailer.and_then(|trailer| store.own_buf(trailer.table_len()).ok());
        match (trailer, buf) {
            (Some(trailer), Some(buf)) => {
                let len = index(trailer.table_len());
                transfers.push(Transfer::read(one.file, trailer.table_at, buf, len));
                asked.push((one, trailer));
            }
            _ => bare.push(one),
        }
    }
    let results = store.lane.run_all(transfers);
    for ((one, trailer), (buf, result)) in asked.into_iter().zip(results) {
        let footer = buf
            .filter(|_| result.is_ok())
            .and_then(|table| Footer::decode(&table, trailer));
        let Some(footer) = footer else {
            bare.push(one);
            continue;
        };
        now.bytes += 2 * BLOCK + trailer.table_len();
        now.records += footer.rows.len() as u64;
        now.segments_done += 1;
        report.by_footer += 1;
        take_rows(store, &one, &trailer, &footer.rows, report);
    }
}

fn take_rows<D: Disk>(
    store: &mut Store<D>,
    one: &Surveyed,
    trailer: &Trailer,
    rows: &[Summary],
    report: &mut RecoveryReport,
) {
    if let Some(segment) = store.segments.get_mut(one.number) {
        segment.end = trailer.end;
    }
    for row in rows {
        report.records += 1;
        add(store, &Stored::of(row), report);
    }
}

/// Reads a segment record by record and, when all of it could be read, writes the footer that it
/// lacks, so that the next opening need not do this again. False when not all of it could be read.
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
    let store_id = store.superfile.now().store_id;
    let epoch = one.header.map(|header| header.epoch);
    let mut scanner = Scanner::new(store_id, one.number, one.size, epoch);
    let (mut rows, mut unread) = (Vec::new(), false);
    let (arena, range) = (std::sync::Arc::clone(&store.arena), BLOCK..one.size);
    let refused = &mut report.refused;
    let mut each = |verdict: Verdict| match verdict {
        Verdict::Good(summary) => rows.push(summary),
        Verdict::Bad { miss, .. } => {
            unread |= miss == kvtier_proto::Miss::Device;
            *refused.entry(miss).or_default() += 1;
        }
    };
    let read = scan(
        &mut store.lane,
        &arena,
        one.file,
        range,
        &mut scanner,
        &mut each,
    );
    match read {
        Ok(bytes) => now.bytes += bytes,
        Err(problem) => {
            tracing::warn!(segment = one.number, %problem, "scan cut short");
            unread = true;
        }
    }
    report.scanned += 1;
    now.records += rows.len() as u64;
    let Some(epoch) = scanner.epoch() else {
        return !unread;
    };
    rows.retain(|row| row.place.epoch == epoch);
    if !rows.is_empty()
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
    for row in &rows {
        report.records += 1;
        add(store, &Stored::of(row), report);
    }
    if one.header.is_some()
        && !rows.is_empty()
        && !unread
        && report.unsynced == 0
        && !store.is_poisoned()
    {
        write_footer(store, one);
    }
    if let Some(segment) = store.segments.get_mut(one.number) {
        segment.rows = Vec::new();
    }
    !unread
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
