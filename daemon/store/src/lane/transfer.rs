//! What to move, and how it ended.
//!
//! Upstairs:   everybody who starts transfers.
//! Downstairs: nothing.

use std::io::Error;

use super::pace::Class;
use crate::disk::{FileId, OpKind};
use crate::mem::IoBuf;

/// What to move. For a sync `at`, `buf_at` and `len` are 0.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub(crate) kind: OpKind,
    pub(crate) class: Class,
    pub(crate) file: FileId,
    pub(crate) at: u64,
    pub(crate) buf: Option<IoBuf>,
    pub(crate) buf_at: usize,
    pub(crate) len: usize,
}

impl Transfer {
    /// A read that somebody waits for.
    pub(crate) fn read(file: FileId, at: u64, buf: IoBuf, len: usize) -> Self {
        Self {
            kind: OpKind::Read,
            class: Class::Read,
            file,
            at,
            buf: Some(buf),
            buf_at: 0,
            len,
        }
    }

    /// A write that somebody waits for: one of the few of opening, wiping and closing.
    pub(crate) fn write(file: FileId, at: u64, buf: IoBuf, len: usize) -> Self {
        let kind = OpKind::Write;
        Self {
            kind,
            ..Self::read(file, at, buf, len)
        }
    }

    /// A sync. It moves nothing, so that there is nothing to hold.
    pub(crate) fn sync(file: FileId) -> Self {
        Self {
            kind: OpKind::Sync,
            class: Class::Read,
            file,
            at: 0,
            buf: None,
            buf_at: 0,
            len: 0,
        }
    }

    /// The same as work of `class`.
    pub(crate) fn of(self, class: Class) -> Self {
        Self { class, ..self }
    }
}

/// A transfer that came to its end; the buffer comes home whatever happened.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) user: u64,
    pub(crate) buf: Option<IoBuf>,
    pub(crate) result: Result<(), Error>,
}

/// What is left of a transfer, with the device or on its way there.
#[derive(Debug)]
pub(super) struct Rest {
    pub(super) kind: OpKind,
    pub(super) class: Class,
    pub(super) file: FileId,
    pub(super) at: u64,
    pub(super) buf_at: usize,
    pub(super) len: usize,
    /// How much of it is with the device. Less than all where a class goes in pieces.
    pub(super) sent: usize,
    pub(super) resumes: u32,
    /// It is not merged any more: what it was part of did not go well.
    pub(super) alone: bool,
}

impl Rest {
    /// Whether it makes its class count as present: syncs and the blocks of a wipe do not.
    pub(super) fn counts(&self) -> bool {
        self.class != Class::Read || self.kind == OpKind::Read
    }
}
