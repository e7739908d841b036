//! The ring lane as a `Disk`: what each call checks before the ring is asked.
//!
//! Upstairs:   the store, through `disk::Disk`.
//! Downstairs: `disk::ring`, whose invariants hold here too.
//!
//! Not here on purpose: no unsafe code.

use std::sync::Arc;

use super::{AT_ONCE_BYTES, BATCH_MAX, RingLane};
use crate::disk::{Disk, Done, FileId, Found, Op, OpKind, SubmitError, Wait, Waker};
use crate::mem::Arena;

impl Disk for RingLane {
    fn list(&mut self) -> std::io::Result<Vec<Found>> {
        self.dir.list()
    }

    fn open(&mut self, name: &str) -> std::io::Result<FileId> {
        let file = self.dir.open_file(name)?;
        self.adopt(file)
    }

    fn create(&mut self, name: &str, len: u64) -> std::io::Result<FileId> {
        let file = self.dir.create_file(name, len)?;
        self.adopt(file).inspect_err(|_| self.dir.unmake(name))
    }

    fn remove(&mut self, file: FileId) -> std::io::Result<()> {
        self.retire(file)
            .map_or(Ok(()), |gone| self.dir.unlink(&gone))
    }

    fn close(&mut self, file: FileId) {
        self.retire(file);
    }

    fn submit(&mut self, op: Op) -> Result<(), (Op, SubmitError)> {
        let in_flight = self.in_flight();
        let depth = u32::try_from(in_flight).unwrap_or(u32::MAX);
        let full = |op| Err((op, SubmitError::Full { depth }));
        if in_flight >= self.depth {
            return full(op);
        }
        if !self.bind() {
            return Err((op, SubmitError::Failed));
        }
        if let Err(refused) = self.dir.check(&op) {
            self.ready.push_back(op.done(Err(refused)));
            return Ok(());
        }
        let at_once = op.kind == OpKind::Sync || op.total() >= AT_ONCE_BYTES;
        let number = match self.slots.insert(op) {
            Ok(number) => number,
            Err(op) => return full(op),
        };
        if !self.push(number) {
            return self.slots.take(number).map_or(Ok(()), |held| full(held.op));
        }
        if at_once || self.io.submission().len() >= BATCH_MAX {
            self.enter(0, None);
        }
        self.until_sweep -= 1;
        if self.until_sweep == 0 {
            self.sweep();
        }
        Ok(())
    }

    fn reap(&mut self, wait: Wait, done: &mut Vec<Done>) {
        let before = done.len();
        if self.bind() {
            self.turn(wait, done);
        }
        done.extend(self.ready.drain(..));
        if self.failed && done.len() == before {
            match wait {
                Wait::No => {}
                Wait::One => self.bell.wait(None),
                Wait::For(most) => self.bell.wait(Some(most)),
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.slots.len() + self.ready.len()
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn files_max(&self) -> u64 {
        u64::from(self.dir.files_max())
    }

    fn align(&self) -> usize {
        self.dir.align()
    }

    fn attach(&mut self, arena: &Arc<Arena>) -> Option<String> {
        if !self.buffers || self.failed || self.arenas.contains(arena) {
            return None;
        }
        if self.owner.is_some() && !self.bind() {
            return None;
        }
        self.sweep();
        self.register(arena)
    }

    fn waker(&self) -> Waker {
        let bell = Arc::clone(&self.bell);
        Waker::new(move || bell.ring())
    }

    fn lane(&self) -> &'static str {
        "io_uring"
    }
}

impl Drop for RingLane {
    fn drop(&mut self) {
        let mut done = Vec::new();
        while self.slots.len() > 0 && self.bind() {
            self.enter(1, None);
            self.collect(&mut done);
            done.clear();
        }
    }
}
