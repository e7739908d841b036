//! What the kernel is told of an operation: opcode, file, place and memory.
//!
//! Upstairs:   `disk::ring`, which queues it.
//! Downstairs: `ring::arenas` knows what is registered.
//!
//! Not here on purpose: no unsafe code. Addresses are written down here; the kernel reads them
//! only after `push`, which says why it may.

use io_uring::{opcode, squeue, types};

use super::{FIRST_FILE, RingLane};
use crate::disk::{Op, OpKind};

impl RingLane {
    /// The submission for a slot. `None` when its file was closed meanwhile.
    pub(super) fn entry(&mut self, number: u64) -> Option<squeue::Entry> {
        let held = self.slots.get_mut(number)?;
        let op = &mut held.op;
        let fd = types::Fixed(self.dir.get(op.file)?.slot + FIRST_FILE);
        if op.kind == OpKind::Sync {
            let sync = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC);
            return Some(sync.build().user_data(number));
        }
        let entry = if op.more.is_empty() {
            let fixed = self.arenas.entry(op.buf.as_ref()?, op.buf_at, op.len);
            single(op, fd, fixed)?
        } else {
            let fixed = self.fixed_runs.then(|| same_entry(&self.arenas, op));
            held.runs = runs(op)?;
            vectored(op, fd, &held.runs, fixed.flatten())?
        };
        Some(entry.user_data(number))
    }
}

fn single(op: &mut Op, fd: types::Fixed, fixed: Option<u16>) -> Option<squeue::Entry> {
    let (kind, at, buf_at) = (op.kind, op.at, op.buf_at);
    let len = u32::try_from(op.len).ok()?;
    let start = op.buf.as_mut()?.as_mut_ptr().wrapping_add(buf_at);
    Some(match (kind, fixed) {
        (OpKind::Read, Some(entry)) => opcode::ReadFixed::new(fd, start, len, entry)
            .offset(at)
            .build(),
        (OpKind::Read, None) => opcode::Read::new(fd, start, len).offset(at).build(),
        (_, Some(entry)) => opcode::WriteFixed::new(fd, start, len, entry)
            .offset(at)
            .build(),
        (_, None) => opcode::Write::new(fd, start, len).offset(at).build(),
    })
}

fn vectored(
    op: &Op,
    fd: types::Fixed,
    runs: &[[usize; 2]],
    fixed: Option<u16>,
) -> Option<squeue::Entry> {
    let (list, count) = (runs.as_ptr().cast(), u32::try_from(runs.len()).ok()?);
    Some(match (op.kind, fixed) {
        (OpKind::Read, Some(entry)) => opcode::ReadvFixed::new(fd, list, count, entry)
            .offset(op.at)
            .build(),
        (OpKind::Read, None) => opcode::Readv::new(fd, list, count).offset(op.at).build(),
        (_, Some(entry)) => opcode::WritevFixed::new(fd, list, count, entry)
            .offset(op.at)
            .build(),
        (_, None) => opcode::Writev::new(fd, list, count).offset(op.at).build(),
    })
}

/// Address and length of every run.
fn runs(op: &mut Op) -> Option<Vec<[usize; 2]>> {
    let first = op.buf.as_mut()?.as_mut_ptr().wrapping_add(op.buf_at);
    let mut runs = vec![[first.expose_provenance(), op.len]];
    for run in &mut op.more {
        let start = run.buf.as_mut_ptr().wrapping_add(run.buf_at);
        runs.push([start.expose_provenance(), run.len]);
    }
    Some(runs)
}

/// The entry of the buffer table that covers all runs, if one does.
fn same_entry(arenas: &super::ArenaTable, op: &Op) -> Option<u16> {
    let first = arenas.entry(op.buf.as_ref()?, op.buf_at, op.len)?;
    let mut more = op.more.iter();
    more.all(|run| arenas.entry(&run.buf, run.buf_at, run.len) == Some(first))
        .then_some(first)
}
