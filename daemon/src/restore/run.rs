//! Running a restore: lease what is there, load the rest, tell the reader as blocks arrive.
//!
//! Upstairs:   the server's Restore stream and GetInline; one task a restore. A session is the
//!             reader that holds the leases.
//! Downstairs: `plan` before it runs, `decide` while it does, `tier::load`.
//!
//! Invariants kept here
//!   A1  A block of a worse quality than the request accepts is a miss.
//!   P1  A block is announced only when it is leased: whole, verified and unchangeable.
//!   E4  A restore ends: when all is there or missed, at its deadline, when it is cancelled, or
//!       when nobody listens any more. Whatever was handed over by then stays usable.
//!   E5  A lease that was not handed over ends with the event that carries it, wherever that is
//!       dropped: in a queue, with a stream, or because nobody listens.
//!   P2  Of a two-ended restore a block is announced only if nobody took it over meanwhile, and
//!       one that is not brought is left to the engine.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kvtier_proto::{BlockKey, Miss, PayloadKind, Quality};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::Learned;
use super::claims::Claims;
use super::decide::Course;
use super::outlook::Outlook;
use super::plan::found::{Plan, plan};
use crate::block::{BlockId, HostBlock, Layouts};
use crate::metrics::Metrics;
use crate::tier::host::HostTier;
use crate::tier::{Located, Tier, Tiers};

mod loads;
mod meeting;
mod seen;

pub use meeting::TwoEnded;

use loads::Loads;
use meeting::Meeting;
use seen::Seen;

/// What a reader asks for.
#[derive(Debug, Clone)]
pub struct Request {
    /// Oldest first.
    pub keys: Vec<BlockKey>,
    /// What the bytes are.
    pub kind: PayloadKind,
    /// Give up on what has not arrived this long after the start.
    pub deadline: Option<Duration>,
    /// Every block on its own, also after a miss.
    pub scattered: bool,
    /// The worst quality that is taken.
    pub accept: Quality,
    /// The engine computes meanwhile.
    pub two_ended: Option<TwoEnded>,
}

/// What a reader says while its restore runs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Control {
    /// Stop; nobody wants the rest.
    pub cancelled: bool,
    /// Leading blocks that the engine has computed itself: no longer needed.
    pub computed: usize,
}

/// A block the reader may read now.
#[derive(Debug)]
pub struct Leased {
    /// Index into the request's keys.
    pub index: usize,
    /// The bytes.
    pub block: Arc<HostBlock>,
    /// Keeps the bytes.
    pub hold: Hold,
    /// Where it came from.
    pub tier: Tier,
}

/// A lease that the reader has not been told of: dropped, it is given back (E5).
#[derive(Debug)]
pub struct Hold {
    reader: Arc<dyn Reader>,
    lease: Option<u64>,
}

impl Hold {
    /// Number of the lease in the session.
    pub fn number(&self) -> u64 {
        self.lease.unwrap_or(0)
    }

    /// The reader knows of the lease now, and gives it back itself.
    pub fn hand_over(mut self) {
        self.lease = None;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(lease) = self.lease {
            self.reader.release(lease);
        }
    }
}

/// How a restore ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Leading blocks that are leased or were computed meanwhile.
    pub usable: usize,
    /// Blocks that did not arrive.
    pub missed: Vec<(usize, Miss)>,
    /// The reader stopped it.
    pub cancelled: bool,
}

/// What happens in a restore, in order: one plan, blocks, one end.
#[derive(Debug)]
pub enum Event {
    /// Where each block was found, and what a two-ended restore is expected to take.
    Plan(Vec<Result<Tier, Miss>>, Option<Outlook>),
    /// Blocks that arrived.
    Ready(Vec<Leased>),
    /// The map of a two-ended restore says something new.
    Hint,
    /// The end.
    Done(Summary),
}

/// Whoever reads: it holds the leases.
pub trait Reader: Send + Sync + std::fmt::Debug + 'static {
    /// Host memory that the blocks come to.
    fn host(&self) -> &Arc<HostTier>;
    /// Layouts that the blocks must have.
    fn layouts(&self) -> &Arc<Layouts>;
    /// Keeps a block for the reader. `None` when it may hold no more.
    fn lease(&self, block: Arc<HostBlock>) -> Option<u64>;
    /// Ends a lease. False when there was none of that number.
    fn release(&self, lease: u64) -> bool;
}

/// Everything one restore works with.
#[derive(Debug)]
pub struct Restore {
    /// Who reads; holds the leases.
    pub reader: Arc<dyn Reader>,
    /// Where the blocks are.
    pub tiers: Arc<Tiers>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// What earlier restores have seen.
    pub learned: Arc<Learned>,
    /// What is asked for.
    pub request: Request,
    /// What the reader says meanwhile.
    pub control: watch::Receiver<Control>,
    /// Where events go. When the receiver is gone the restore ends.
    pub events: mpsc::Sender<Event>,
}

struct State {
    arrived: Vec<bool>,
    missed: BTreeMap<usize, Miss>,
    /// Blocks from here on are of no use: one before them is missing.
    end: usize,
    cancelled: bool,
    meeting: Option<Meeting>,
    seen: Seen,
    /// Something was missed since the reader last heard of the map.
    news: bool,
    /// When the last block arrived, and the slowest tier that any came from.
    last: Option<(Duration, Tier)>,
}

impl Restore {
    /// Runs to the end. Sends one `Plan`, any number of `Ready`, and one `Done` while somebody
    /// listens.
    ///
    /// Cancel safety: dropped early, leases handed over so far stay with the session; loads whose
    /// read has begun end in host memory for the next reader.
    pub async fn run(mut self) {
        let begin = Instant::now();
        let deadline = self.request.deadline.map(|deadline| begin + deadline);
        let request = &self.request;
        let (host, prefix_only) = (self.reader.host(), !request.scattered);
        let found = self
            .tiers
            .locate(
                host,
                request.kind,
                &request.keys,
                prefix_only,
                request.accept,
            )
            .await;
        let todo = plan(&found, request.scattered);
        let mut state = State::new(request.keys.len());
        for (index, miss) in &todo.missed {
            self.miss(&mut state, *index, *miss);
        }
        state.seen = Seen::new(&found);
        let (meeting, mut course) = match self.meeting(&found, &todo).await {
            Some((meeting, course)) => (Some(meeting), course),
            None => (None, Course::forward(todo.load.clone())),
        };
        state.meeting = meeting;
        let outlook = state.meeting.as_ref();
        let outlook = outlook.map(|meeting| meeting.outlook.clone());
        let tiers = found.into_iter().map(|place| place.map(Located::tier));
        let planned = Event::Plan(tiers.collect(), outlook);
        let heard = self.events.send(planned).await.is_ok();
        if heard && self.lease_residents(&todo, &mut state, begin).await {
            self.load(&mut course, &mut state, begin, deadline).await;
        }
        self.met(&state, begin.elapsed());
        self.finish(state).await;
    }

    /// Leases what is in host memory already. False when nobody listens any more.
    async fn lease_residents(&self, todo: &Plan, state: &mut State, begin: Instant) -> bool {
        let mut ready = Vec::with_capacity(todo.resident.len());
        for index in &todo.resident {
            let Some(id) = self.id(*index) else { continue };
            let block = self.reader.host().get(&(id.kind, id.key));
            let same = |block: &HostBlock| block.facts().fingerprint == self.fingerprint();
            match block {
                Some(block) if !self.request.accept.accepts(block.quality()) => {
                    self.miss(state, *index, Miss::Quality);
                }
                Some(block) if same(&block) => {
                    self.lease(*index, block, Tier::Host, state, &mut ready);
                }
                Some(_) => self.miss(state, *index, Miss::WrongLayout),
                None => self.miss(state, *index, Miss::Evicted),
            }
        }
        // What turned out not to be there may be what the engine waits for.
        self.announce(ready, state, begin).await && self.hint(state).await
    }

    async fn load(
        &mut self,
        course: &mut Course,
        state: &mut State,
        begin: Instant,
        deadline: Option<Instant>,
    ) {
        let first = Instant::now();
        let mut loads = Loads::default();
        loop {
            let control = *self.control.borrow();
            if control.cancelled {
                state.cancelled = true;
                return;
            }
            self.leave_what_was_taken_over(course, &mut loads, begin.elapsed());
            let wanted = control.computed..state.end;
            while let Some(index) = course.next(begin.elapsed(), &wanted, |at| self.take(at)) {
                self.start(&mut loads, index);
            }
            if loads.is_empty() {
                return;
            }
            tokio::select! {
                biased;
                changed = self.control.changed() => {
                    // The sender is gone with the stream: nobody wants the rest.
                    state.cancelled |= changed.is_err();
                    if changed.is_err() { return; }
                }
                () = sleep_until(deadline) => {
                    let engines = |index| self.is_engines(index);
                    return state.give_up(control.computed, engines);
                }
                () = sleep_until(course.late_at().map(|after| begin + after)) => {
                    self.late(course, state, begin.elapsed());
                    if !self.hint(state).await { return; }
                }
                ended = loads.ended() => {
                    let mut ready = Vec::new();
                    for (index, loaded) in ended {
                        course.landed(begin.elapsed(), index, loaded.is_ok());
                        self.land(index, loaded, (state, first), &mut ready);
                    }
                    self.turn_gate(course, state, begin.elapsed());
                    if !self.announce(ready, state, begin).await || !self.hint(state).await {
                        return;
                    }
                }
            }
        }
    }

    /// Blocks that the engine computes after all are not waited for.
    fn leave_what_was_taken_over(&self, course: &mut Course, loads: &mut Loads, now: Duration) {
        for index in course.under_way() {
            if self.is_engines(index) {
                loads.abandon(index);
                course.landed(now, index, false);
            }
        }
    }

    /// Takes a block to load it. False when the engine has it.
    fn take(&self, index: usize) -> bool {
        self.claims().is_none_or(|claims| claims.take(index))
    }

    fn start(&self, loads: &mut Loads, index: usize) {
        let Some(id) = self.id(index) else { return };
        let (tiers, reader) = (Arc::clone(&self.tiers), Arc::clone(&self.reader));
        let accept = self.request.accept;
        loads.start(index, async move {
            let (host, layouts) = (reader.host(), reader.layouts());
            (index, tiers.fetch(host, layouts, id, accept).await)
        });
    }

    fn land(
        &self,
        index: usize,
        loaded: Result<(Arc<HostBlock>, Tier), Miss>,
        (state, first): (&mut State, Instant),
        ready: &mut Vec<Leased>,
    ) {
        match loaded {
            Ok((block, tier)) => {
                let bytes = block.payload().len();
                state.seen.landed(index, bytes, first.elapsed());
                self.lease(index, block, tier, state, ready);
            }
            Err(miss) => self.miss(state, index, miss),
        }
    }

    fn lease(
        &self,
        index: usize,
        block: Arc<HostBlock>,
        tier: Tier,
        state: &mut State,
        ready: &mut Vec<Leased>,
    ) {
        let lease = self.reader.lease(Arc::clone(&block));
        // The engine has lost patience and computes it (P2).
        let taken_over = || {
            let claims = self.claims();
            claims.is_some_and(|claims| !claims.ready(index))
        };
        match lease {
            Some(lease) if taken_over() => {
                self.reader.release(lease);
            }
            Some(lease) => {
                if let Some(arrived) = state.arrived.get_mut(index) {
                    *arrived = true;
                }
                let (reader, lease) = (Arc::clone(&self.reader), Some(lease));
                ready.push(Leased {
                    index,
                    block,
                    hold: Hold { reader, lease },
                    tier,
                });
            }
            None => self.miss(state, index, Miss::NoSpace),
        }
    }

    /// False when nobody listens any more.
    async fn announce(&self, ready: Vec<Leased>, state: &mut State, begin: Instant) -> bool {
        if ready.is_empty() {
            return !self.events.is_closed();
        }
        for leased in &ready {
            let (metrics, tier) = (&self.metrics, leased.tier);
            let bytes = leased.block.payload().len() as u64;
            metrics.restore_blocks.of(tier).inc();
            metrics.restore_bytes.of(tier).inc_by(bytes);
            state.came_from(tier, begin.elapsed());
        }
        self.events.send(Event::Ready(ready)).await.is_ok()
    }

    /// An engine may wait for a block that turned out not to come. False when nobody listens.
    async fn hint(&self, state: &mut State) -> bool {
        let news = std::mem::take(&mut state.news);
        !news || self.claims().is_none() || self.events.send(Event::Hint).await.is_ok()
    }

    async fn finish(self, state: State) {
        state.seen.tell(&self.learned.rates);
        let computed = self.control.borrow().computed;
        let has = |index: &usize| *index < computed || state.has(*index) || self.is_engines(*index);
        let usable = (0..state.arrived.len()).take_while(has).count();
        for miss in state.missed.values() {
            self.metrics.misses.of(*miss).inc();
        }
        if let Some((after, slowest)) = state.last {
            let seconds = self.metrics.restore_seconds.of(slowest);
            seconds.observe(after.as_secs_f64());
        }
        let summary = Summary {
            usable,
            missed: state.missed.into_iter().collect(),
            cancelled: state.cancelled,
        };
        // Nobody listening any more is a way to end, not an error.
        let _ = self.events.send(Event::Done(summary)).await;
    }

    /// The first reason stays; the engine has to compute the block (P2).
    fn miss(&self, state: &mut State, index: usize, miss: Miss) {
        state.miss(index, miss, self.request.scattered);
        if let Some(claims) = self.claims() {
            claims.missed(index);
        }
    }

    fn claims(&self) -> Option<&Claims> {
        let two_ended = self.request.two_ended.as_ref();
        two_ended.map(|two_ended| &two_ended.claims)
    }

    /// True when the engine computes a block, or has.
    fn is_engines(&self, index: usize) -> bool {
        self.claims().is_some_and(|claims| claims.is_engines(index))
    }

    fn id(&self, index: usize) -> Option<BlockId> {
        let (namespace, kind) = (self.reader.host().namespace(), self.request.kind);
        self.request.keys.get(index).map(|key| BlockId {
            namespace,
            kind,
            key: *key,
        })
    }

    fn fingerprint(&self) -> kvtier_proto::LayoutFingerprint {
        self.reader.layouts().fingerprint()
    }
}

impl State {
    fn new(blocks: usize) -> Self {
        Self {
            arrived: vec![false; blocks],
            missed: BTreeMap::new(),
            end: blocks,
            cancelled: false,
            meeting: None,
            seen: Seen::default(),
            news: false,
            last: None,
        }
    }

    fn has(&self, index: usize) -> bool {
        self.arrived.get(index).copied().unwrap_or(false)
    }

    /// The first reason stays: a block is missed once.
    fn miss(&mut self, index: usize, miss: Miss, scattered: bool) {
        self.missed.entry(index).or_insert(miss);
        self.news = true;
        if !scattered {
            self.end = self.end.min(index);
        }
    }

    /// The deadline has passed: what is still wanted and not here is late.
    fn give_up(&mut self, computed: usize, engines: impl Fn(usize) -> bool) {
        for index in computed..self.end {
            if !self.has(index) && !engines(index) {
                self.miss(index, Miss::Deadline, true);
            }
        }
    }

    fn came_from(&mut self, tier: Tier, after: Duration) {
        let slowest = self.last.map_or(tier, |(_, before)| before.max(tier));
        self.last = Some((after, slowest));
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
