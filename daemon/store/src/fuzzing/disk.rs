//! A disk in memory that does what it is told, at once.
//!
//! Upstairs:   the target `store_open`, which writes what it likes into the files.
//! Downstairs: nothing.

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind};

use crate::disk::{Disk, Done, FileId, Found, Op, OpKind, SubmitError, Wait, Waker};
use crate::format::index;

/// Files by name, and those that are open.
#[derive(Debug, Default)]
pub(super) struct Memory {
    pub(super) files: BTreeMap<String, Vec<u8>>,
    open: Vec<Option<String>>,
    waiting: Vec<Op>,
}

impl Memory {
    /// The files alone, as a new process finds them.
    pub(super) fn again(self) -> Self {
        Self {
            files: self.files,
            ..Self::default()
        }
    }

    fn file(&mut self, file: FileId) -> std::io::Result<&mut Vec<u8>> {
        let name = self.open.get(file.0 as usize).cloned().flatten();
        let found = name.and_then(|name| self.files.get_mut(&name));
        found.ok_or_else(|| Error::from(ErrorKind::NotFound))
    }

    fn transfer(&mut self, op: &mut Op) -> std::io::Result<usize> {
        let kind = op.kind;
        let file = self.file(op.file)?;
        let first = op.buf.as_deref_mut().map(|buf| (buf, op.buf_at, op.len));
        let more = op
            .more
            .iter_mut()
            .map(|run| (&mut *run.buf, run.buf_at, run.len));
        let (mut at, mut moved) = (index(op.at), 0);
        for (buf, from, len) in first.into_iter().chain(more) {
            let end = file.len().min(at.saturating_add(len));
            let there = file.get_mut(at..end).unwrap_or_default();
            let here = buf.get_mut(from..from + there.len());
            let here = here.ok_or_else(|| Error::from(ErrorKind::InvalidInput))?;
            match kind {
                OpKind::Read => here.copy_from_slice(there),
                OpKind::Write => there.copy_from_slice(here),
                OpKind::Sync => {}
            }
            (at, moved) = (at + there.len(), moved + there.len());
        }
        Ok(moved)
    }
}

impl Disk for Memory {
    fn list(&mut self) -> std::io::Result<Vec<Found>> {
        let found = |(name, bytes): (&String, &Vec<u8>)| Found {
            name: name.clone(),
            len: bytes.len() as u64,
        };
        Ok(self.files.iter().map(found).collect())
    }

    fn open(&mut self, name: &str) -> std::io::Result<FileId> {
        if !self.files.contains_key(name) {
            return Err(ErrorKind::NotFound.into());
        }
        self.open.push(Some(name.to_owned()));
        Ok(FileId(
            u32::try_from(self.open.len() - 1).unwrap_or(u32::MAX),
        ))
    }

    fn create(&mut self, name: &str, len: u64) -> std::io::Result<FileId> {
        self.files.insert(name.to_owned(), vec![0; index(len)]);
        self.open(name)
    }

    fn remove(&mut self, file: FileId) -> std::io::Result<()> {
        let slot = self.open.get_mut(file.0 as usize);
        if let Some(name) = slot.and_then(Option::take) {
            self.files.remove(&name);
        }
        Ok(())
    }

    fn close(&mut self, file: FileId) {
        if let Some(slot) = self.open.get_mut(file.0 as usize) {
            *slot = None;
        }
    }

    fn submit(&mut self, op: Op) -> Result<(), (Op, SubmitError)> {
        self.waiting.push(op);
        Ok(())
    }

    fn reap(&mut self, _wait: Wait, done: &mut Vec<Done>) {
        for mut op in std::mem::take(&mut self.waiting) {
            let moved = self.transfer(&mut op);
            done.push(op.done(moved));
        }
    }

    fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    fn depth(&self) -> usize {
        64
    }

    fn align(&self) -> usize {
        4096
    }

    fn waker(&self) -> Waker {
        Waker::new(|| {})
    }

    fn lane(&self) -> &'static str {
        "memory"
    }
}
