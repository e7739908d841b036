//! Many reads on their way at a time, each handed over as soon as it is there.
//!
//! Upstairs:   `recover::survey` and `recover::rebuild`.
//! Downstairs: `lane`.
//!
//! While the caller works on what came, the next reads are with the device: an opening takes as
//! long as the slower of the two, not as long as both.
//!
//! Not here on purpose: no order. Results come as the device finishes them.

use std::collections::{BTreeMap, VecDeque};
use std::io::Error;
use std::sync::Arc;

use crate::disk::{Disk, FileId, Wait};
use crate::format::index;
use crate::lane::{Finished, Lane, Transfer};
use crate::mem::{Arena, IoBuf};

/// A read, and what it is for.
#[derive(Debug)]
pub(crate) struct Ask<T> {
    pub(crate) what: T,
    pub(crate) file: FileId,
    pub(crate) at: u64,
    /// Unit: bytes, at least 1.
    pub(crate) len: u64,
}

/// Reads that wait, that are on their way, and that came.
#[derive(Debug)]
pub(crate) struct Flow<T> {
    arena: Arc<Arena>,
    waiting: VecDeque<Ask<T>>,
    flying: BTreeMap<u64, T>,
    finished: VecDeque<(T, Result<IoBuf, Error>)>,
    came: Vec<Finished>,
}

impl<T> Flow<T> {
    /// Reads to be made into memory of `arena`, which bounds how many are on their way. One that
    /// is longer than the arena gets memory of its own.
    pub(crate) fn new(arena: &Arc<Arena>, asks: impl IntoIterator<Item = Ask<T>>) -> Self {
        Self {
            arena: Arc::clone(arena),
            waiting: asks.into_iter().collect(),
            flying: BTreeMap::new(),
            finished: VecDeque::new(),
            came: Vec::new(),
        }
    }

    /// The next read that came to its end, and its memory; `None` when all have. The memory is
    /// best dropped before the next call.
    pub(crate) fn next<D: Disk>(
        &mut self,
        lane: &mut Lane<D>,
    ) -> Option<(T, Result<IoBuf, Error>)> {
        loop {
            let started = self.start(lane);
            if started || self.finished.is_empty() {
                let wait = if self.finished.is_empty() && !self.flying.is_empty() {
                    Wait::One
                } else {
                    Wait::No
                };
                self.collect(lane, wait);
            }
            if let Some(done) = self.finished.pop_front() {
                return Some(done);
            }
            if self.flying.is_empty() && self.waiting.is_empty() {
                return None;
            }
        }
    }

    /// Starts as many reads as there is memory and use for.
    fn start<D: Disk>(&mut self, lane: &mut Lane<D>) -> bool {
        // Twice the depth, so that neighbours find each other and can go as one operation.
        let most = lane.disk_ref().depth().max(1) * 2;
        let mut started = false;
        while self.flying.len() < most
            && let Some(ask) = self.waiting.pop_front()
        {
            let idle = self.flying.is_empty() && self.finished.is_empty();
            let room = self.arena.alloc(index(ask.len));
            let buf = match room {
                Some(buf) => buf,
                None if idle => match self.arena.alloc_or_own(index(ask.len)) {
                    Ok(buf) => buf,
                    Err(problem) => {
                        self.finished.push_back((ask.what, Err(problem)));
                        break;
                    }
                },
                None => {
                    self.waiting.push_front(ask);
                    break;
                }
            };
            let user = lane.start(Transfer::read(ask.file, ask.at, buf, index(ask.len)));
            self.flying.insert(user, ask.what);
            started = true;
        }
        started
    }

    fn collect<D: Disk>(&mut self, lane: &mut Lane<D>, wait: Wait) {
        lane.collect(wait, &mut self.came);
        for Finished { user, buf, result } in self.came.drain(..) {
            let Some(what) = self.flying.remove(&user) else {
                continue;
            };
            let lost = || Error::other("the device kept a buffer");
            let result = result.and_then(|()| buf.ok_or_else(lost));
            self.finished.push_back((what, result));
        }
        if lane.busy() == 0 {
            let lost = |what| (what, Err(Error::other("the disk lost an operation")));
            self.finished
                .extend(std::mem::take(&mut self.flying).into_values().map(lost));
        }
    }
}
