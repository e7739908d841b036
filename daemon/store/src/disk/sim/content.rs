//! The bytes of a simulated file, and what unfinished writes make of them.
//!
//! Upstairs:   `disk::sim`.
//! Downstairs: nothing.

use std::sync::Arc;

use super::Seeded;
use crate::disk::{Op, OpKind};
use crate::format::index;

/// A write that no sync has covered.
#[derive(Debug, Clone)]
pub(super) struct Loose {
    pub(super) at: u64,
    pub(super) data: Vec<u8>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct File {
    pub(super) name: String,
    /// What a read sees now. Copied when it is written and somebody else has it too: a disk that
    /// a crash leaves shares what the crash did not touch.
    pub(super) now: Arc<Vec<u8>>,
    /// What a power cut leaves for certain.
    pub(super) durable: Arc<Vec<u8>>,
    /// Completed writes that a sync would make durable, in order.
    pub(super) loose: Vec<Loose>,
    /// What a stale read sees: the content before the last write.
    pub(super) before: Option<Loose>,
}

/// The bytes that a write carries, when it is one.
pub(super) fn loose_of(op: &Op) -> Option<Loose> {
    if op.kind != OpKind::Write {
        return None;
    }
    let first = op.buf.as_ref()?.get(op.buf_at..op.buf_at + op.len)?;
    let mut data = first.to_vec();
    for run in &op.more {
        data.extend_from_slice(run.buf.get(run.buf_at..run.buf_at + run.len)?);
    }
    Some(Loose { at: op.at, data })
}

/// Fills the runs of a read, in order, as far as `bytes` go.
pub(super) fn fill_runs(op: &mut Op, bytes: &[u8]) -> Option<()> {
    let (first, mut rest) = bytes.split_at(bytes.len().min(op.len));
    let to = op.buf.as_mut()?;
    to.get_mut(op.buf_at..op.buf_at + first.len())?
        .copy_from_slice(first);
    for run in &mut op.more {
        let (now, later) = rest.split_at(rest.len().min(run.len));
        let to = run.buf.get_mut(run.buf_at..run.buf_at + now.len())?;
        to.copy_from_slice(now);
        rest = later;
    }
    Some(())
}

/// Copies what `write` and `bytes`, which begin at offset `base`, have in common.
pub(super) fn overlay(bytes: &mut [u8], base: u64, write: &Loose) {
    let end = (base + bytes.len() as u64).min(write.at + write.data.len() as u64);
    let start = base.max(write.at);
    if start < end {
        let from = write
            .data
            .get(index(start - write.at)..index(end - write.at));
        let to = bytes.get_mut(index(start - base)..index(end - base));
        if let (Some(from), Some(to)) = (from, to) {
            to.copy_from_slice(from);
        }
    }
}

/// Applies a seeded subset of the pieces of `write` that are `sector` bytes long.
pub(super) fn tear(bytes: &mut [u8], write: &Loose, sector: usize, random: &mut Seeded) {
    for (number, data) in write.data.chunks(sector).enumerate() {
        if random.below(2) == 0 {
            let at = write.at + (number * sector) as u64;
            overlay(
                bytes,
                0,
                &Loose {
                    at,
                    data: data.to_vec(),
                },
            );
        }
    }
}

/// What a power cut makes of a write that no sync covered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Nothing of it is there.
    Lost,
    /// It is there.
    Whole,
    /// Some of its sectors are there.
    Torn {
        /// Length of a sector. Unit: bytes.
        sector: usize,
        /// Decides which.
        seed: u64,
    },
}

impl Fate {
    /// One of them, by chance.
    pub fn some(random: &mut Seeded) -> Self {
        match random.below(3) {
            0 => Self::Lost,
            1 => Self::Whole,
            _ => Self::Torn {
                sector: if random.below(2) == 0 { 512 } else { 4096 },
                seed: random.draw(),
            },
        }
    }
}

/// Gives a write its fate.
pub(super) fn survive(bytes: &mut Arc<Vec<u8>>, write: &Loose, fate: Fate) {
    match fate {
        Fate::Lost => {}
        Fate::Whole => overlay(Arc::make_mut(bytes).as_mut_slice(), 0, write),
        Fate::Torn { sector, seed } => {
            tear(
                Arc::make_mut(bytes).as_mut_slice(),
                write,
                sector,
                &mut Seeded::new(seed),
            );
        }
    }
}

pub(super) fn flip(bytes: &mut [u8], random: &mut Seeded) {
    let at = index(random.below(bytes.len() as u64));
    let bit = random.below(8);
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= 1 << bit;
    }
}
