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
//! (`merge`): a device moves few large pieces faster than many small ones. Reads go first; what
//! saves and background work may do beside them is `pace`'s to say, from what `gauge` has seen
//! of the device. A transfer of theirs may be cut into pieces then, one after the other.
//!
//! Invariants kept here
//!   D2  A transfer succeeds only when every byte moved.
//!   D4  A transfer fails by its own fault only: when an operation of several fails or comes back
//!       short, each of them is tried alone.
//!
//! Not here on purpose: no retry of an error. Interrupted and would-block are not errors: they
//! are tried again, a bounded number of times.

mod gauge;
mod merge;
mod pace;
mod settle;
mod throttle;
mod transfer;

use std::collections::{BTreeMap, VecDeque};
use std::io::Error;
use std::time::Duration;

pub(crate) use self::gauge::Slow;
pub(crate) use self::pace::Class;
pub(crate) use self::transfer::{Finished, Transfer};

use self::gauge::Gauge;
use self::pace::{Pace, Turn};
use self::throttle::Throttle;
use self::transfer::Rest;
use crate::disk::{Disk, Done, Op, OpKind, SubmitError, Wait};
use crate::format::index;
use crate::mem::IoBuf;
use crate::planted::{Bug, planted};

/// A disk and the transfers on it.
#[derive(Debug)]
pub(crate) struct Lane<D> {
    disk: D,
    next_user: u64,
    rests: BTreeMap<u64, Rest>,
    /// What the disk has not seen, by class.
    reads: VecDeque<Op>,
    saves: VecDeque<Op>,
    background: VecDeque<Op>,
    /// Transfers that went out with another, by the number of that one, in order.
    merged: BTreeMap<u64, Vec<u64>>,
    backlog: Vec<Finished>,
    done: Vec<Done>,
    pace: Pace,
    gauge: Gauge,
    throttle: Throttle,
    /// When something that is held has its turn.
    turn_at: Option<Duration>,
    /// No write is sent any more (L3).
    poisoned: bool,
    failed: bool,
}

impl<D: Disk> Lane<D> {
    pub(crate) fn new(disk: D) -> Self {
        Self {
            disk,
            next_user: 1,
            rests: BTreeMap::new(),
            reads: VecDeque::new(),
            saves: VecDeque::new(),
            background: VecDeque::new(),
            merged: BTreeMap::new(),
            backlog: Vec::new(),
            done: Vec::new(),
            pace: Pace::default(),
            gauge: Gauge::default(),
            throttle: Throttle::default(),
            turn_at: None,
            poisoned: false,
            failed: false,
        }
    }

    /// Saves and background work go like reads from now on.
    #[cfg(test)]
    pub(crate) fn never_hold(&mut self) {
        self.pace.off = true;
    }

    /// Reads take no more than this of the device from now on. Unit: bytes a second.
    pub(crate) fn limit_reads(&mut self, rate: Option<u64>) {
        self.throttle.set(rate);
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

    /// The disk's clock.
    pub(crate) fn now(&self) -> Duration {
        self.disk.now()
    }

    /// Whether the device is slow now, and what shows it.
    pub(crate) fn slow(&mut self) -> Option<Slow> {
        self.gauge.slow(self.disk.now())
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
            class,
            file,
            at,
            buf,
            buf_at,
            len,
        } = transfer;
        let rest = Rest {
            kind,
            class,
            file,
            at,
            buf_at,
            len,
            sent: 0,
            resumes: 0,
            alone: false,
        };
        if rest.counts() {
            self.pace.begin(class);
        }
        self.rests.insert(user, rest);
        if let Some(op) = self.op_of(user, buf) {
            self.outbox(class).push_back(op);
        }
        user
    }

    fn outbox(&mut self, class: Class) -> &mut VecDeque<Op> {
        match class {
            Class::Read => &mut self.reads,
            Class::Save => &mut self.saves,
            Class::Background => &mut self.background,
        }
    }

    fn outbox_ref(&self, class: Class) -> &VecDeque<Op> {
        match class {
            Class::Read => &self.reads,
            Class::Save => &self.saves,
            Class::Background => &self.background,
        }
    }

    /// What is left of a transfer as one operation.
    fn op_of(&self, user: u64, buf: Option<IoBuf>) -> Option<Op> {
        let rest = self.rests.get(&user)?;
        Some(Op {
            user,
            kind: rest.kind,
            file: rest.file,
            at: rest.at,
            buf,
            buf_at: rest.buf_at,
            len: rest.len,
            more: Vec::new(),
        })
    }

    /// Appends finished transfers, waiting for one as `wait` says when there is none. There may be
    /// none all the same: the turn of what was held has come, or the disk's waker was used, and the
    /// lane cannot tell which.
    pub(crate) fn collect(&mut self, wait: Wait, finished: &mut Vec<Finished>) {
        self.pump();
        let quiet = self.backlog.is_empty();
        self.reap(if quiet { wait } else { Wait::No });
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

    /// Ends every write and sync that the disk has not seen yet, and sends none any more (L3).
    /// Reads stay.
    pub(crate) fn drop_unsent_writes(&mut self) {
        self.poisoned = true;
        for class in Class::ALL {
            for op in std::mem::take(self.outbox(class)) {
                if op.kind == OpKind::Read {
                    self.outbox(class).push_back(op);
                } else {
                    self.finish(op.user, op.buf, Err(Error::other("the log is poisoned")));
                }
            }
        }
    }

    /// Hands to the device what may go. Whoever is held asks first: it has no more than its turn,
    /// and reads could take every place in the queue.
    fn pump(&mut self) {
        self.turn_at = None;
        for class in Class::ALL {
            while self.pump_one(class) {}
        }
    }

    /// The turn of the next read, where reads are limited: each goes by itself then.
    fn limited(&mut self, now: Duration) -> Option<Turn> {
        let bytes = self.reads.front()?.total() as u64;
        let limited = self.throttle.is_set();
        limited.then(|| match self.throttle.wait(bytes, now) {
            Some(at) => Turn::At(at),
            None => Turn::Go(index(bytes)),
        })
    }

    /// True when an operation of `class` went out, or ended on the way.
    fn pump_one(&mut self, class: Class) -> bool {
        if !self.has_place(class) || self.outbox(class).is_empty() {
            return false;
        }
        let (now, rate) = (self.disk.now(), self.gauge.rate());
        let turn = match class {
            Class::Read => self.limited(now),
            Class::Save | Class::Background => None,
        };
        let most = match turn.unwrap_or_else(|| self.pace.turn(class, now, rate)) {
            Turn::Go(most) => most,
            Turn::Full => return false,
            Turn::At(at) => {
                self.turn_at = Some(self.turn_at.map_or(at, |before| before.min(at)));
                return false;
            }
        };
        let Some(op) = self.outbox(class).pop_front() else {
            return false;
        };
        let op = self.shape(class, op, most);
        let (user, kind, bytes) = (op.user, op.kind, op.total() as u64);
        match self.disk.submit(op) {
            Ok(()) => {
                if class == Class::Read {
                    self.throttle.sent();
                }
                self.gauge.sent(user, (class, kind, bytes), now);
                self.pace
                    .sent(class, bytes, now, self.gauge.cost(kind, bytes));
                true
            }
            Err((op, SubmitError::Full { .. })) if self.disk.in_flight() > 0 => {
                let whole = self.split(op);
                let outbox = self.outbox(class);
                whole.into_iter().rev().for_each(|op| outbox.push_front(op));
                false
            }
            Err((op, problem)) => {
                self.failed = true;
                for op in self.split(op) {
                    self.finish(op.user, op.buf, Err(Error::other(problem)));
                }
                true
            }
        }
    }

    /// Whether the queue of the device has a place for an operation of `class`. The last quarter is
    /// kept for a read that may come; but reads may fill the queue by themselves, and then a held
    /// class still has its share of the places.
    fn has_place(&self, class: Class) -> bool {
        let (depth, taken) = (self.disk.depth().max(1), self.disk.in_flight());
        let own = depth / index(pace::ONE_IN);
        let held = class != Class::Read;
        taken < depth && (!held || taken < depth - depth / 4 || self.pace.ops(class) < own.max(1))
    }

    /// The operation for the front of a queue: with its neighbours, or a piece of it.
    fn shape(&mut self, class: Class, mut op: Op, most: usize) -> Op {
        op.len = op.len.min(most);
        if let Some(rest) = self.rests.get_mut(&op.user) {
            rest.sent = op.len;
        }
        self.merge(class, op, most)
    }

    /// How long a wait may last: not past the turn of what is held, nor past the moment at which
    /// a device that does not answer counts as slow.
    fn patience(&self, wait: Wait) -> Wait {
        let now = self.disk.now();
        let until = [self.turn_at, self.gauge.look_again(now)]
            .into_iter()
            .flatten()
            .min();
        match (wait, until.map(|at| at.saturating_sub(now))) {
            (Wait::One, Some(most)) => Wait::For(most),
            (Wait::For(asked), Some(most)) => Wait::For(asked.min(most)),
            (wait, _) => wait,
        }
    }

    fn reap(&mut self, wait: Wait) {
        let mut done = std::mem::take(&mut self.done);
        let wait = self.patience(wait);
        #[cfg(test)]
        if wait == Wait::One && self.disk.in_flight() == 0 && !self.failed {
            assert!(self.rests.is_empty(), "asleep for ever: {:?}", self.rests);
        }
        self.disk.reap(wait, &mut done);
        let now = self.disk.now();
        for one in done.drain(..) {
            if let Some(sent) = self.gauge.back(one.user, one.moved.is_ok(), now) {
                self.pace.back(sent.class, sent.bytes);
            }
            self.advance(one);
        }
        self.done = done;
    }

    fn finish(&mut self, user: u64, buf: Option<IoBuf>, result: Result<(), Error>) {
        if let Some(rest) = self.rests.remove(&user)
            && rest.counts()
        {
            self.pace.end(rest.class, self.disk.now());
        }
        self.backlog.push(Finished { user, buf, result });
    }
}

#[cfg(test)]
mod tests;
