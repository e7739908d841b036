//! What becomes of the transfers of an operation that came back.
//!
//! Upstairs:   `lane`.
//! Downstairs: nothing.
//!
//! Invariants kept here: D2 and D4 of `lane`.

use std::io::{Error, ErrorKind};

use super::Lane;
use crate::disk::{Disk, Done, OpKind};
use crate::mem::IoBuf;
use crate::planted::{Bug, planted};

/// Most times that one transfer is resumed after an interruption or a short count. A device that
/// needs more is broken, and the transfer fails.
const RESUMES_MAX: u32 = 256;

impl<D: Disk> Lane<D> {
    /// One operation came back: its transfers end, or what is left of them goes out again.
    pub(super) fn advance(&mut self, done: Done) {
        let Done {
            user,
            kind,
            buf,
            more,
            moved,
        } = done;
        // A lane keeps memory only when it cannot tell any more what the device does with it.
        self.failed |= kind != OpKind::Sync && buf.is_none();
        let Some(followers) = self.merged.remove(&user) else {
            return self.advance_one(user, buf, moved);
        };
        let bufs = buf.into_iter().chain(more.into_iter().map(|run| run.buf));
        let mut bufs = bufs.map(Some).chain(std::iter::repeat_with(|| None));
        let (mut left, problem) = match moved {
            Ok(moved) => (moved, None),
            Err(problem) => (0, Some(problem)),
        };
        for user in std::iter::once(user).chain(followers) {
            let buf = bufs.next().flatten();
            let want = self.rests.get(&user).map_or(0, |rest| rest.len);
            let (here, kept) = (left.min(want), buf.is_none());
            left -= here;
            let moved = match &problem {
                Some(problem) if kept => Err(Error::new(problem.kind(), problem.to_string())),
                _ => Ok(here),
            };
            if here < want && !kept {
                self.again(user, buf, here);
            } else {
                self.advance_one(user, buf, moved);
            }
        }
    }

    fn advance_one(&mut self, user: u64, buf: Option<IoBuf>, moved: Result<usize, Error>) {
        let Some(rest) = self.rests.get(&user) else {
            return;
        };
        let again = |problem: &Error| {
            matches!(
                problem.kind(),
                ErrorKind::Interrupted | ErrorKind::WouldBlock
            )
        };
        match moved {
            Ok(moved) if moved > rest.sent => {
                let problem = Error::other(format!("{moved} of {} bytes moved", rest.sent));
                self.finish(user, buf, Err(problem));
            }
            Ok(moved) if moved == rest.len => self.finish(user, buf, Ok(())),
            Ok(moved) if moved == rest.sent => self.go_on(user, buf, moved),
            Ok(_) if planted(Bug::ShortIsWhole) => self.finish(user, buf, Ok(())),
            Ok(0) => self.finish(user, buf, Err(Error::from(ErrorKind::UnexpectedEof))),
            Ok(moved) => self.again(user, buf, moved),
            Err(problem) if again(&problem) && rest.resumes < RESUMES_MAX => {
                self.again(user, buf, 0);
            }
            Err(_) if planted(Bug::WriteErrorIgnored) && rest.kind == OpKind::Write => {
                self.finish(user, buf, Ok(()));
            }
            Err(problem) => self.finish(user, buf, Err(problem)),
        }
    }

    /// It did not go well, and `moved` bytes are there: the rest goes out again, alone.
    fn again(&mut self, user: u64, buf: Option<IoBuf>, moved: usize) {
        let Some(rest) = self.rests.get_mut(&user) else {
            return;
        };
        rest.resumes += 1;
        rest.alone = true;
        if rest.resumes > RESUMES_MAX {
            let problem = Error::other("the device moves no more bytes");
            return self.finish(user, buf, Err(problem));
        }
        // A piece that ends inside an aligned unit is moved again from that unit's start.
        self.go_on(user, buf, moved - moved % self.disk.align().max(1));
    }

    /// `moved` bytes of a transfer are there: the rest goes out, unless nothing is written any
    /// more (L3).
    fn go_on(&mut self, user: u64, buf: Option<IoBuf>, moved: usize) {
        let poisoned = self.poisoned;
        let Some(rest) = self.rests.get_mut(&user) else {
            return;
        };
        rest.at += moved as u64;
        if !planted(Bug::ResumedElsewhere) {
            rest.buf_at += moved;
        }
        rest.len -= moved;
        let class = rest.class;
        if poisoned && rest.kind != OpKind::Read {
            return self.finish(user, buf, Err(Error::other("the log is poisoned")));
        }
        // Before others of its class: many halves of records make none durable.
        if let Some(op) = self.op_of(user, buf) {
            self.outbox(class).push_front(op);
        }
    }
}
