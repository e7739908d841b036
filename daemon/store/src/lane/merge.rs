//! Which transfers go to the device together, and apart again.
//!
//! Upstairs:   `lane`.
//! Downstairs: nothing; it moves buffers between operations.
//!
//! Not here on purpose: no waiting for company. What is queued now is looked at; a transfer that
//! comes later goes with a later operation.

use std::collections::VecDeque;

use super::{Class, Lane};
use crate::disk::{Disk, Op, OpKind, RUNS_MAX, Run};
use crate::planted::{Bug, planted};

/// An operation of this size needs no company. Unit: bytes.
const ENOUGH: usize = 1 << 20;
/// Longest operation that merging makes. Unit: bytes.
const MERGED_MAX: usize = 2 << 20;
/// Transfers behind the first one that are looked at.
const LOOK_AHEAD: usize = 64;

impl<D: Disk> Lane<D> {
    /// Adds the transfers of `class` to `op` that lie directly before or behind it, as far as
    /// `most` bytes go.
    pub(super) fn merge(&mut self, class: Class, op: Op, most: usize) -> Op {
        if !self.may_merge(&op) {
            return op;
        }
        let (enough, most) = (ENOUGH.min(most), MERGED_MAX.min(most));
        let (mut total, mut start) = (op.len, op.at);
        let mut end = op.at + op.len as u64;
        let mut members = VecDeque::from([op]);
        while total < enough && members.len() <= RUNS_MAX {
            let first = members.front();
            let beside = |other: &Op| {
                let same =
                    first.is_some_and(|one| (one.kind, one.file) == (other.kind, other.file));
                let (at, len) = (other.at, other.len as u64);
                same && (at == end || at + len == start) && total + other.len <= most
            };
            let looked_at = self.outbox_ref(class).iter().take(LOOK_AHEAD);
            let found = looked_at
                .enumerate()
                .find(|(_, other)| self.may_merge(other) && beside(other));
            let Some(at) = found.map(|(at, _)| at) else {
                break;
            };
            let Some(other) = self.outbox(class).remove(at) else {
                break;
            };
            total += other.len;
            if other.at == end {
                end += other.len as u64;
                members.push_back(other);
            } else {
                start = other.at;
                members.push_front(other);
            }
        }
        self.join(members)
    }

    fn may_merge(&self, op: &Op) -> bool {
        let rest = self.rests.get(&op.user);
        // A piece of a transfer goes as it is.
        let whole = rest.is_some_and(|rest| !rest.alone && rest.len == op.len);
        op.kind != OpKind::Sync && op.len < ENOUGH && op.more.is_empty() && whole
    }

    fn join(&mut self, members: VecDeque<Op>) -> Op {
        let mut members = members.into_iter();
        let Some(mut first) = members.next() else {
            unreachable!("the operation itself is a member");
        };
        if let Some(rest) = self.rests.get_mut(&first.user) {
            rest.sent = first.len;
        }
        let mut followers = Vec::new();
        for Op {
            user,
            buf,
            buf_at,
            len,
            ..
        } in members
        {
            followers.push(user);
            if let Some(rest) = self.rests.get_mut(&user) {
                rest.sent = len;
            }
            first.more.extend(buf.map(|buf| Run { buf, buf_at, len }));
        }
        if planted(Bug::MergeSwapped) {
            followers.reverse();
        }
        if !followers.is_empty() {
            self.merged.insert(first.user, followers);
        }
        first
    }

    /// The transfers that `op` was made of.
    pub(super) fn split(&mut self, mut op: Op) -> Vec<Op> {
        let followers = self.merged.remove(&op.user).unwrap_or_default();
        let (kind, file) = (op.kind, op.file);
        let mut at = op.at + op.len as u64;
        let mut more = Vec::new();
        for (user, Run { buf, buf_at, len }) in followers.into_iter().zip(op.more.drain(..)) {
            more.push(Op {
                user,
                kind,
                file,
                at,
                buf: Some(buf),
                buf_at,
                len,
                more: Vec::new(),
            });
            at += len as u64;
        }
        std::iter::once(op).chain(more).collect()
    }
}
