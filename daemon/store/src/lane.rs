//! Whole transfers over a disk that moves pieces: short counts, interruptions, a full queue.
//!
//! Upstairs:   `store`, `superblock`, `recover` and `verify` start transfers and hear of the end.
//! Downstairs: `disk::Disk`.
//!
//! Two ways to use it. The store starts transfers and collects what finished; opening, wiping and
//! closing run one transfer to its end ([`Lane::run`]), while others that finish meanwhile wait
//! in a backlog for the next [`Lane::collect`].
//!
//! Small transfers that lie behind one another in a file go to the device as one operation
//! (`merge`): a device moves few large pieces faster than many small ones.
//!
//! Invariants kept here
//!   D2  A transfer succeeds only when every byte moved.
//!   D4  A transfer fails by its own fault only: when an operation of several fails or comes back
//!       short, each of them is tried alone.
//!
//! Not here on purpose: no retry of an error. Interrupted and would-block are not errors: they
//! are tried again, a bounded number of times.

mod merge;

use std::collections::{BTreeMap, VecDeque};
use std::io::{Error, ErrorKind};

use crate::disk::{Disk, Done, FileId, Op, OpKind, SubmitError, Wait};
use crate::mem::IoBuf;
use crate::planted::{Bug, planted};

/// Most times that one transfer is resumed after an interruption or a short count. A device that
/// needs more is broken, and the transfer fails.
const RESUMES_MAX: u32 = 256;

/// What to move. For a sync `at`, `buf_at` and `len` are 0.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub(crate) kind: OpKind,
    pub(crate) file: FileId,
    pub(crate) at: u64,
    pub(crate) buf: Option<IoBuf>,
    pub(crate) buf_at: usize,
    pub(crate) len: usize,
}

impl Transfer {
    pub(crate) fn read(file: FileId, at: u64, buf: IoBuf, len: usize) -> Self {
        Self {
            kind: OpKind::Read,
            file,
            at,
            buf: Some(buf),
            buf_at: 0,
            len,
        }
    }

    pub(crate) fn write(file: FileId, at: u64, buf: IoBuf, len: usize) -> Self {
        Self {
            kind: OpKind::Write,
            file,
            at,
            buf: Some(buf),
            buf_at: 0,
            len,
        }
    }

    pub(crate) fn sync(file: FileId) -> Self {
        Self {
            kind: OpKind::Sync,
            file,
            at: 0,
            buf: None,
            buf_at: 0,
            len: 0,
        }
    }
}

/// A transfer that came to its end; the buffer comes home whatever happened.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) user: u64,
    pub(crate) buf: Option<IoBuf>,
    pub(crate) result: Result<(), Error>,
}

/// What is left of a transfer whose piece is with the device.
#[derive(Debug)]
struct Rest {
    kind: OpKind,
    file: FileId,
    at: u64,
    buf_at: usize,
    len: usize,
    resumes: u32,
    /// It is not merged any more: what it was part of did not go well.
    alone: bool,
}

/// A disk and the transfers on it.
#[derive(Debug)]
pub(crate) struct Lane<D> {
    disk: D,
    next_user: u64,
    rests: BTreeMap<u64, Rest>,
    outbox: VecDeque<Op>,
    /// Transfers that went out with another, by the number of that one, in order.
    merged: BTreeMap<u64, Vec<u64>>,
    backlog: Vec<Finished>,
    done: Vec<Done>,
    failed: bool,
}

impl<D: Disk> Lane<D> {
    pub(crate) fn new(disk: D) -> Self {
        Self {
            disk,
            next_user: 1,
            rests: BTreeMap::new(),
            outbox: VecDeque::new(),
            merged: BTreeMap::new(),
            backlog: Vec::new(),
            done: Vec::new(),
            failed: false,
        }
    }

    /// The disk, for its cold lane.
    pub(crate) fn disk(&mut self) -> &mut D {
        &mut self.disk
    }

    pub(crate) fn disk_ref(&self) -> &D {
        &self.disk
    }

    pub(crate) fn into_disk(self) -> D {
        self.disk
    }

    /// True when the lane takes nothing any more.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed
    }

    /// Transfers that were started and not collected.
    pub(crate) fn busy(&self) -> usize {
        self.rests.len() + self.backlog.len()
    }

    /// Takes a transfer and returns its number. It goes to the device with the next call that
    /// collects or waits, together with others that lie beside it.
    pub(crate) fn start(&mut self, transfer: Transfer) -> u64 {
        let user = self.next_user;
        self.next_user += 1;
        if transfer.kind == OpKind::Sync && planted(Bug::NoSync) {
            let result = Ok(());
            self.backlog.push(Finished {
                user,
                buf: None,
                result,
            });
            return user;
        }
        let Transfer {
            kind,
            file,
            at,
            buf,
            buf_at,
            len,
        } = transfer;
        self.rests.insert(
            user,
            Rest {
                kind,
                file,
                at,
                buf_at,
                len,
                resumes: 0,
                alone: false,
            },
        );
        self.queue(user, buf);
        user
    }

    /// Queues what is left of a transfer.
    fn queue(&mut self, user: u64, buf: Option<IoBuf>) {
        let Some(rest) = self.rests.get(&user) else {
            return;
        };
        self.outbox.push_back(Op {
            user,
            kind: rest.kind,
            file: rest.file,
            at: rest.at,
            buf,
            buf_at: rest.buf_at,
            len: rest.len,
            more: Vec::new(),
        });
    }

    /// Appends finished transfers, waiting for one as `wait` says when there is none.
    pub(crate) fn collect(&mut self, wait: Wait, finished: &mut Vec<Finished>) {
        self.pump();
        let wait = if self.backlog.is_empty() {
            wait
        } else {
            Wait::No
        };
        self.reap(wait);
        finished.append(&mut self.backlog);
        self.pump();
    }

    /// Runs one transfer to its end. Others that finish meanwhile stay for `collect`.
    pub(crate) fn run(&mut self, transfer: Transfer) -> (Option<IoBuf>, Result<(), Error>) {
        let user = self.start(transfer);
        self.wait_for(user)
    }

    /// Waits for a transfer that `start` numbered `user`.
    pub(crate) fn wait_for(&mut self, user: u64) -> (Option<IoBuf>, Result<(), Error>) {
        // What was started since goes on its way, even if the one that is waited for has ended.
        self.pump();
        loop {
            if let Some(at) = self
                .backlog
                .iter()
                .position(|finished| finished.user == user)
            {
                let Finished { buf, result, .. } = self.backlog.swap_remove(at);
                return (buf, result);
            }
            if self.rests.is_empty() {
                return (None, Err(Error::other("the disk lost an operation")));
            }
            self.pump();
            self.reap(Wait::One);
        }
    }

    /// Runs many transfers, as many at a time as the disk takes. Results are in their order.
    #[cfg(test)]
    pub(crate) fn run_all(
        &mut self,
        transfers: Vec<Transfer>,
    ) -> Vec<(Option<IoBuf>, Result<(), Error>)> {
        let users: Vec<u64> = transfers.into_iter().map(|one| self.start(one)).collect();
        while users.iter().any(|user| self.rests.contains_key(user)) {
            self.pump();
            self.reap(Wait::One);
        }
        let mut results = Vec::with_capacity(users.len());
        for user in users {
            let at = self
                .backlog
                .iter()
                .position(|finished| finished.user == user);
            results.push(match at.map(|at| self.backlog.swap_remove(at)) {
                Some(finished) => (finished.buf, finished.result),
                None => (None, Err(Error::other("the disk lost an operation"))),
            });
        }
        results
    }

    /// Ends every write and sync that the disk has not seen yet (L3). Reads stay.
    pub(crate) fn drop_unsent_writes(&mut self) {
        let unsent = std::mem::take(&mut self.outbox);
        for op in unsent {
            if op.kind == OpKind::Read {
                self.outbox.push_back(op);
            } else {
                self.finish(op.user, op.buf, Err(Error::other("the log is poisoned")));
            }
        }
    }

    fn pump(&mut self) {
        while self.disk.in_flight() < self.disk.depth().max(1)
            && let Some(op) = self.outbox.pop_front()
        {
            let op = self.merge(op);
            match self.disk.submit(op) {
                Ok(()) => {}
                Err((op, SubmitError::Full { .. })) if self.disk.in_flight() > 0 => {
                    let whole = self.split(op);
                    whole
                        .into_iter()
                        .rev()
                        .for_each(|op| self.outbox.push_front(op));
                    return;
                }
                Err((op, problem)) => {
                    self.failed = true;
                    for op in self.split(op) {
                        self.finish(op.user, op.buf, Err(Error::other(problem)));
                    }
                }
            }
        }
    }

    fn reap(&mut self, wait: Wait) {
        let mut done = std::mem::take(&mut self.done);
        self.disk.reap(wait, &mut done);
        for one in done.drain(..) {
            self.advance(one);
        }
        self.done = done;
    }

    fn finish(&mut self, user: u64, buf: Option<IoBuf>, result: Result<(), Error>) {
        self.rests.remove(&user);
        self.backlog.push(Finished { user, buf, result });
    }

    /// One operation came back: its transfers end, or what is left of them goes out again.
    fn advance(&mut self, done: Done) {
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
            Ok(moved) if moved > rest.len => {
                let problem = Error::other(format!("{moved} of {} bytes moved", rest.len));
                self.finish(user, buf, Err(problem));
            }
            Ok(moved) if moved == rest.len || planted(Bug::ShortIsWhole) => {
                self.finish(user, buf, Ok(()))
            }
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

    /// `moved` bytes of a transfer are there: the rest goes out again, alone.
    fn again(&mut self, user: u64, buf: Option<IoBuf>, moved: usize) {
        let Some(rest) = self.rests.get_mut(&user) else {
            return;
        };
        // A piece that ends inside an aligned unit is moved again from that unit's start.
        let moved = moved - moved % self.disk.align().max(1);
        rest.resumes += 1;
        rest.alone = true;
        rest.at += moved as u64;
        rest.buf_at += moved;
        rest.len -= moved;
        if rest.resumes > RESUMES_MAX {
            let problem = Error::other("the device moves no more bytes");
            return self.finish(user, buf, Err(problem));
        }
        self.queue(user, buf);
    }
}

#[cfg(test)]
mod tests;
