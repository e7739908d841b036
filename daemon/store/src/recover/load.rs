//! Rows into the index: the catalog's, and those that `rebuild` found.
//!
//! Upstairs:   `recover`, `recover::rebuild`.
//! Downstairs: `catalog`, `index`.
//!
//! Invariants kept here
//!   C1  A catalog counts as a whole or not at all: rows are taken as they come, and all of them
//!       are forgotten when they do not add up in the end.
//!
//! Not here on purpose: no copy of the rows. A million of them would take more memory for a moment
//! than the index takes for good.

use crate::catalog::{Catalog, Stamp, Sum};
use crate::disk::Disk;
use crate::index::{Inserted, Stored};
use crate::planted::{Bug, planted};
use crate::store::Store;

use super::{Distrust, DistrustReason, IndexSource, RecoveryReport};

/// Rows that go into the index together.
pub(super) const TOGETHER: usize = 32;

/// Fills the index from the catalog. False when it is not what the clean close left; the index is
/// empty then.
pub(super) fn load_catalog<D: Disk>(
    store: &mut Store<D>,
    catalog: &mut dyn Catalog,
    stamp: &Stamp,
    report: &mut RecoveryReport,
) -> bool {
    let (mut sum, mut known) = (Sum::default(), true);
    let (mut some, mut hashes, mut loaded) = (Vec::new(), Vec::new(), report.clone());
    store.index.reserve(stamp.close.rows);
    let outcome = catalog.load(stamp, &mut |row| {
        sum.add(row);
        known &= is_known(store, row);
        if known {
            some.push(*row);
        }
        if some.len() == TOGETHER {
            add(store, &mut some, &mut hashes, &mut loaded);
        }
    });
    add(store, &mut some, &mut hashes, &mut loaded);
    let mismatch = |what: &str| Distrust {
        reason: DistrustReason::Mismatch,
        what: what.to_owned(),
    };
    let distrust = match outcome {
        Err(problem) => Distrust::from(problem),
        Ok(()) if sum.close() != stamp.close && !planted(Bug::CatalogUnchecked) => {
            mismatch("its rows do not add up")
        }
        Ok(()) if !known => mismatch("a row names a segment that is not there"),
        Ok(()) => {
            *report = loaded;
            report.source = IndexSource::Catalog;
            return true;
        }
    };
    store.index.clear();
    tracing::warn!(
        problem = distrust.what,
        "catalog not trusted; rebuilding the index from the segments"
    );
    report.source = IndexSource::SegmentsAfter(distrust);
    false
}

/// True when the row's segment is there and reaches as far.
fn is_known<D: Disk>(store: &Store<D>, row: &Stored) -> bool {
    store
        .segments
        .get(row.place.segment)
        .is_some_and(|segment| {
            segment.epoch > 0 && row.place.offset + u64::from(row.place.len) <= segment.size
        })
}

/// Adds records to the index, those that were wiped excepted, and empties `rows`.
pub(super) fn add<D: Disk>(
    store: &mut Store<D>,
    rows: &mut Vec<Stored>,
    hashes: &mut Vec<u32>,
    report: &mut RecoveryReport,
) {
    store.index.hashes(rows, hashes);
    report.records += rows.len() as u64;
    for (stored, hash) in rows.drain(..).zip(hashes.iter()) {
        let now = store.superfile.now();
        let wiped = now.is_wiped(stored.namespace, stored.place.sequence);
        if wiped && !planted(Bug::SkipWipeOnRebuild) {
            report.wiped += 1;
        } else if store.index.insert_hashed(*hash, &stored) != Inserted::New {
            report.superseded += 1;
        }
    }
}
