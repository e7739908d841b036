//! A device that keeps everything but records: stores of any size to open and to index.
//!
//! Upstairs:   benches and tests of openings, whose stores would not fit this machine.
//! Downstairs: a real lane, in whose directory the segments lie as files with holes.
//!
//! Superblock, segment headers and footers are where they belong and are read from the device. A
//! record that is written is forgotten: what is read at its place is zeros, which is a miss.
//!
//! Not here on purpose: no fault. The simulated device has those.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Disk, Done, FileId, Found, Op, OpKind, SubmitError, Wait, Waker};
use crate::format::record::MAGIC;
use crate::mem::Arena;

/// See the module.
#[derive(Debug)]
pub struct HollowDisk<D> {
    disk: D,
    path: PathBuf,
    /// Operations that ended without the device.
    ended: Vec<Done>,
    /// Files with something that a sync would make durable.
    touched: BTreeSet<FileId>,
}

impl<D: Disk> HollowDisk<D> {
    /// Over `disk`, whose directory is `path`.
    pub fn new(disk: D, path: &Path) -> Self {
        Self {
            disk,
            path: path.to_owned(),
            ended: Vec::new(),
            touched: BTreeSet::new(),
        }
    }

    fn end(&mut self, op: Op) {
        let moved = op.total();
        self.ended.push(op.done(Ok(moved)));
    }
}

/// True when what is written starts with a record. Merged operations are all records or none: a
/// header or footer is written when no record of its segment is on its way.
fn is_record(op: &Op) -> bool {
    let bytes = op.buf.as_ref().and_then(|buf| buf.get(op.buf_at..));
    op.kind == OpKind::Write && bytes.is_some_and(|bytes| bytes.starts_with(&MAGIC))
}

impl<D: Disk> Disk for HollowDisk<D> {
    fn list(&mut self) -> std::io::Result<Vec<Found>> {
        self.disk.list()
    }

    fn open(&mut self, name: &str) -> std::io::Result<FileId> {
        self.disk.open(name)
    }

    fn create(&mut self, name: &str, len: u64) -> std::io::Result<FileId> {
        std::fs::File::create_new(self.path.join(name))?.set_len(len)?;
        self.disk.open(name)
    }

    fn remove(&mut self, file: FileId) -> std::io::Result<()> {
        self.touched.remove(&file);
        self.disk.remove(file)
    }

    fn close(&mut self, file: FileId) {
        self.disk.close(file);
    }

    fn submit(&mut self, op: Op) -> Result<(), (Op, SubmitError)> {
        if is_record(&op) || (op.kind == OpKind::Sync && !self.touched.remove(&op.file)) {
            self.end(op);
            return Ok(());
        }
        let (file, writes) = (op.file, op.kind == OpKind::Write);
        self.disk.submit(op)?;
        if writes {
            self.touched.insert(file);
        }
        Ok(())
    }

    fn reap(&mut self, wait: Wait, done: &mut Vec<Done>) {
        let wait = if self.ended.is_empty() {
            wait
        } else {
            Wait::No
        };
        done.append(&mut self.ended);
        self.disk.reap(wait, done);
    }

    fn in_flight(&self) -> usize {
        self.disk.in_flight() + self.ended.len()
    }

    fn depth(&self) -> usize {
        self.disk.depth()
    }

    fn files_max(&self) -> u64 {
        self.disk.files_max()
    }

    fn align(&self) -> usize {
        self.disk.align()
    }

    fn attach(&mut self, arena: &Arc<Arena>) -> Option<String> {
        self.disk.attach(arena)
    }

    fn waker(&self) -> Waker {
        self.disk.waker()
    }

    fn lane(&self) -> &'static str {
        self.disk.lane()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is the failure report")]
    use super::*;
    use crate::disk::lane::{LaneKind, open_lane};
    use crate::mem::Share;
    use crate::testkit::*;
    use crate::{IndexSource, Store};

    #[test]
    fn hollow_disk_keeps_everything_but_records() {
        let folder = tempfile::tempdir().unwrap();
        let open = || {
            let lane = open_lane(folder.path(), LaneKind::Pread, 8, &[]).unwrap();
            let disk = HollowDisk::new(lane.disk, folder.path());
            Store::open(disk, options(), None, &mut |_| {}).unwrap()
        };
        let (mut store, _) = open();
        let arena = Arena::create("test", 8 << 20, Share::Private).unwrap();
        let mut events = Vec::new();
        for number in 0..30 {
            store.put(number, image(&arena, NS, number, 0)).unwrap();
        }
        while !store.is_idle() {
            store.step(Wait::One, &mut events);
        }
        drop(store.close(&mut events));
        let (mut store, report) = open();
        assert_eq!((report.source, report.blocks), (IndexSource::Segments, 30));
        assert_eq!(report.scanned, 0, "footers are kept");
        let buf = arena.alloc(64 << 10).unwrap();
        store.get(1, &want(NS, 3), buf).unwrap();
        let mut events = Vec::new();
        while events.is_empty() {
            store.step(Wait::One, &mut events);
        }
        let crate::Event::Got { result, .. } = events.remove(0) else {
            panic!("{events:?}");
        };
        assert!(
            result.is_err() || result.unwrap().verify().is_err(),
            "records are not"
        );
    }
}
