//! The disk thread: commands in, steps of the store, events out.
//!
//! Upstairs:   `device` sends commands.
//! Downstairs: `kvtier_store`.
//!
//! Invariants kept here
//!   T4  Every command is answered, or its channel is dropped: nobody waits for ever.

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvtier_proto::{Miss, NamespaceId};
use kvtier_store::catalog::SledCatalog;
use kvtier_store::disk::lane::open_lane;
use kvtier_store::disk::{Disk, Wait};
use kvtier_store::mem::Arena;
use kvtier_store::{
    Counter, DeviceState, DistrustReason, Event, IndexSource, PutError, RecordImage,
    RecoveryReport, Store, StoreOptions, Want,
};
use rand::TryRngCore;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::answers::{Answers, unstored};
use super::device::{Alarm, As, Command, DiskOptions, DiskStatus, Opened, Unstored};
use super::pins::Pins;
use super::post::Sent;
use super::roll::Roll;
use super::scrub::Scrubber;
use super::touched::Touched;
use crate::block::BlockId;
use crate::health::Progress;
use crate::log::chain;
use crate::metrics::{CatalogReason, Device, Direction, Metrics};
use crate::sync::{AtomicU64, Ordering};
use crate::tier::host::{HostTier, Life};

mod cold;

pub(super) type AnyStore = Store<Box<dyn Disk + Send>>;

/// Directory of the catalog, beside the segments.
const CATALOG: &str = "catalog";
/// Commands handled between two looks at the device.
const COMMANDS_AT_ONCE: usize = 256;

/// Opens the store, says so, and serves until it is closed or its handle is gone.
pub(super) fn main(
    options: DiskOptions,
    commands: Receiver<Sent>,
    alarm: &Alarm,
    opened: oneshot::Sender<Opened>,
    threads: Option<Handle>,
) {
    let (store, lane) = match open(&options, &alarm.roll) {
        Ok(opened) => opened,
        Err(problem) => return drop(opened.send(Err(problem))),
    };
    let (waker, id) = (store.disk().waker(), store.id());
    let scrubber = Scrubber::new(options.scrub, threads, waker.clone());
    let status = Arc::clone(&alarm.status);
    let mut served = Served::new(store, &alarm.roll, status, &options.hosts, scrubber);
    let touched = |after| Touched::new(after, Instant::now());
    served.touched = options.cold_after.map(touched);
    served.status().lane = lane;
    served.report();
    if opened.send(Ok((waker, id))).is_ok() {
        served.run(&commands);
    }
}

/// The store, and what drives its device.
fn open(options: &DiskOptions, roll: &Roll) -> Result<(AnyStore, String), String> {
    let path = options.path.display().to_string();
    let say = |what: &str, problem: &dyn std::fmt::Display| format!("{what} {path}: {problem}");
    let mut id = [0; 16];
    rand::rngs::OsRng
        .try_fill_bytes(&mut id)
        .map_err(|problem| say("no randomness for", &problem))?;
    let lane = open_lane(
        &options.path,
        options.lane,
        options.queue_depth,
        // Memory comes when it is populated: pinned before, it would be taken page by page here.
        &[],
    )
    .map_err(|problem| say("cannot open", &problem))?;
    let how = match lane.report.direct {
        true => "direct",
        false => "buffered",
    };
    let mut about = format!("{}, {how}", lane.report.lane);
    for without in &lane.report.without {
        tracing::warn!(path, without, "the lane does without something");
        about = format!("{about}; {without}");
    }
    #[cfg(test)]
    let disk = super::faulty::on(&options.path, lane.disk);
    #[cfg(not(test))]
    let disk = lane.disk;
    let mut store = StoreOptions::new(options.capacity.get(), id);
    store.segment_size = options.segment_size.get();
    let catalog = SledCatalog::new(options.path.join(CATALOG));
    let begin = Instant::now();
    let (mut store, report) = Store::open(disk, store, Some(Box::new(catalog)), &mut |progress| {
        let (done, total) = (progress.segments_done, progress.segments_total);
        roll.recovered(options.device, Progress { done, total });
    })
    .map_err(|problem| say("cannot open the store in", &chain(&problem)))?;
    store.limit_reads(options.read_limit.map(|limit| limit.get()));
    let seconds = begin.elapsed().as_secs_f64();
    tell(&report, &path, seconds, &roll.metrics);
    Ok((store, about))
}

fn tell(report: &RecoveryReport, path: &str, seconds: f64, metrics: &Metrics) {
    let source = match &report.source {
        IndexSource::Catalog => "catalog".to_owned(),
        IndexSource::Segments => "segments".to_owned(),
        IndexSource::SegmentsAfter(distrust) => {
            let why = &distrust.what;
            metrics.catalog_rebuilt.of(reason(distrust.reason)).inc();
            tracing::warn!(path, why, "the catalog was rebuilt from the segments");
            format!("segments, because {why}")
        }
    };
    tracing::info!(
        path, seconds, source, blocks = report.blocks, segments = report.segments,
        by_footer = report.by_footer, scanned = report.scanned, records = report.records,
        refused = ?report.refused, "store opened"
    );
}

fn reason(reason: DistrustReason) -> CatalogReason {
    match reason {
        DistrustReason::Missing => CatalogReason::Missing,
        DistrustReason::Unreadable => CatalogReason::Unreadable,
        DistrustReason::Mismatch => CatalogReason::Mismatch,
    }
}

/// A record that the store has not taken yet.
struct Put {
    tag: u64,
    image: RecordImage,
    how: As,
    /// Lives counted, and the one that the bytes belong to.
    lives: Arc<AtomicU64>,
    life: Life,
}

struct Served<'a> {
    store: AnyStore,
    device: Device,
    roll: &'a Roll,
    status: Arc<Mutex<DiskStatus>>,
    told: Option<DeviceState>,
    answers: Answers<'a>,
    /// In the order they came. The store's queue may have no room for them.
    puts: VecDeque<Put>,
    pins: Pins,
    scrubber: Scrubber,
    touched: Option<Touched>,
    tags: u64,
    counted: BTreeMap<&'static str, u64>,
}

impl<'a> Served<'a> {
    fn new(
        store: AnyStore,
        roll: &'a Roll,
        status: Arc<Mutex<DiskStatus>>,
        hosts: &[Arc<HostTier>],
        scrubber: Scrubber,
    ) -> Self {
        let device = status.lock().unwrap_or_else(PoisonError::into_inner).device;
        Self {
            store,
            device,
            roll,
            status,
            told: None,
            answers: Answers::new(device, &roll.metrics, hosts),
            puts: VecDeque::new(),
            pins: Pins::default(),
            scrubber,
            touched: None,
            tags: 0,
            counted: BTreeMap::new(),
        }
    }

    fn run(mut self, commands: &Receiver<Sent>) {
        let mut events = Vec::new();
        loop {
            // Commands that are left over rang the bell already: nobody waits before they are done.
            let mut wait = Wait::No;
            for _ in 0..COMMANDS_AT_ONCE {
                match commands.try_recv().map(Sent::take) {
                    Ok(Command::Close { reply }) => return self.close(Some(reply)),
                    Ok(command) => self.command(command, &mut events),
                    Err(TryRecvError::Empty) => {
                        wait = self.scrubber.due_in().map_or(Wait::One, Wait::For);
                        break;
                    }
                    Err(TryRecvError::Disconnected) => return self.close(None),
                }
            }
            self.unpin_expired();
            self.scrub_on();
            self.store.step(wait, &mut events);
            self.settle(&mut events);
            self.hand_over_puts();
            self.report();
        }
    }

    fn command(&mut self, command: Command, events: &mut Vec<Event>) {
        match command {
            Command::Find { ids, reply } => {
                let found = ids.iter().map(|id| self.peek(id)).collect();
                let _ = reply.send(found);
            }
            io @ (Command::Put { .. } | Command::Get { .. } | Command::Head { .. }) => self.io(io),
            Command::Condemn {
                id,
                place,
                miss,
                reply,
            } => {
                let known = miss != Miss::Device || self.store.state() != DeviceState::Failed;
                if known {
                    self.store
                        .condemn(id.namespace, &id.record_key(), &place, miss);
                }
                let _ = reply.send(known);
            }
            Command::Pin { ids, ttl, reply } => {
                let _ = reply.send(ids.iter().map(|id| self.pin(id, ttl)).collect());
            }
            Command::Cold { epoch, reply } => drop(reply.send(self.cold_after(epoch))),
            Command::Touch {
                namespace,
                key,
                reply,
            } => {
                self.touch(namespace, key);
                let _ = reply.send(());
            }
            wipe @ (Command::WipedBelow { .. }
            | Command::Forget { .. }
            | Command::KeepWipes { .. }) => self.wipe(wipe, events),
            Command::Attach { arenas, reply } => {
                self.attach(&arenas);
                let _ = reply.send(());
            }
            Command::Close { reply } => drop(reply.send(())),
        }
    }

    fn io(&mut self, command: Command) {
        match command {
            Command::Put {
                image,
                how,
                lives,
                life,
                reply,
            } => {
                self.tags += 1;
                let tag = self.tags;
                self.answers.puts.insert(tag, reply);
                if let As::Form(from) = &how
                    && !self.is_cold(from)
                {
                    let used = "it was used or pinned since";
                    return self.answers.put(tag, Err(Unstored::for_good(used)));
                }
                let block = image.summary();
                self.touch(block.namespace, block.key);
                self.puts.push_back(Put {
                    tag,
                    image,
                    how,
                    lives,
                    life,
                });
                self.hand_over_puts();
            }
            Command::Get {
                id,
                layout,
                buf,
                background,
                reply,
            } => {
                self.tags += 1;
                let want = Want {
                    namespace: id.namespace,
                    key: id.record_key(),
                    layout,
                };
                let get = match background {
                    true => Store::get_in_background,
                    false => {
                        self.touch(want.namespace, want.key);
                        Store::get
                    }
                };
                let started = get(&mut self.store, self.tags, &want, buf);
                self.answers
                    .get(self.tags, started.map_err(|(_, miss)| miss), reply);
            }
            Command::Head { id, buf, reply } => {
                self.tags += 1;
                let name = (id.namespace, id.record_key());
                let started = self.store.get_head(self.tags, name, buf);
                self.answers
                    .get(self.tags, started.map_err(|(_, miss)| miss), reply);
            }
            _ => {}
        }
    }

    fn attach(&mut self, arenas: &[Arc<Arena>]) {
        for arena in arenas {
            if let Some(without) = self.store.attach(arena) {
                let mut status = self.status();
                status.lane = format!("{}; {without}", status.lane);
            }
        }
    }

    /// The steps of a wipe.
    fn wipe(&mut self, command: Command, events: &mut Vec<Event>) {
        match command {
            Command::WipedBelow { namespaces, reply } => {
                let below = |one: &NamespaceId| self.store.wiped_below(*one);
                let _ = reply.send(namespaces.iter().map(below).collect());
            }
            Command::Forget {
                namespace,
                below,
                reply,
            } => {
                let forgotten = self.store.forget_namespace(namespace, below, events);
                self.pins.forget(namespace);
                let _ = reply.send(forgotten);
            }
            Command::KeepWipes { namespace, reply } => {
                let kept = self.store.keep_wipes(namespace, events);
                let _ = reply.send(kept.map_err(|problem| chain(&problem)));
            }
            _ => {}
        }
    }

    fn peek(&self, id: &BlockId) -> Option<kvtier_store::Stored> {
        self.store
            .peek(id.namespace, &id.record_key())
            .filter(|stored| stored.kind == id.kind)
    }

    /// Gives the store what its queue has room for. A namespace may have been wiped since a put
    /// came in, and the store would give it a number that the wipe does not cover (P3).
    fn hand_over_puts(&mut self) {
        while let Some(put) = self.puts.pop_front() {
            if put.lives.load(Ordering::SeqCst) != put.life.0 {
                let wiped = Unstored::for_good("the namespace was wiped");
                self.answers.put(put.tag, Err(wiped));
                continue;
            }
            let taken = match put.how {
                As::New => self.store.put(put.tag, put.image),
                As::Over(place) => self.store.put_over(put.tag, put.image, place),
                As::Form(from) => self.store.recode(put.tag, put.image, &from),
            };
            match taken {
                Ok(()) => {}
                Err((image, PutError::Busy { .. })) => {
                    return self.puts.push_front(Put { image, ..put });
                }
                Err((image, problem)) => {
                    let refused = unstored(Some(image), &problem);
                    self.answers.put(put.tag, Err(refused));
                }
            }
        }
    }

    fn pin(&mut self, id: &BlockId, ttl: Option<std::time::Duration>) -> bool {
        let name = (id.namespace, id.record_key());
        let Some(_) = self.peek(id) else { return false };
        let Some(ttl) = ttl else {
            self.pins.remove(&name);
            self.store.unpin(name.0, &name.1);
            return true;
        };
        let pinned = self.store.pin(name.0, &name.1);
        if pinned {
            self.pins.set(name, Instant::now() + ttl);
        }
        pinned
    }

    /// Passes on what the store reported.
    fn settle(&mut self, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            match event {
                Event::Scrub(to_check) => self.scrubber.check(to_check),
                Event::Scrubbed(pass) => self.scrubber.ended(&pass, self.device, self.roll),
                event => self.answers.tell(event),
            }
        }
    }

    /// Starts a pass that is due, and hears what the checks found.
    fn scrub_on(&mut self) {
        self.scrubber.start_if_due(&mut self.store, self.device);
        while let Some(checked) = self.scrubber.take_checked() {
            if let (true, Err(miss)) = (self.store.scrubbed(&checked), checked.verdict()) {
                self.answers.damaged(&checked, miss);
            }
        }
    }

    fn unpin_expired(&mut self) {
        while let Some((namespace, key)) = self.pins.take_ended(Instant::now()) {
            self.store.unpin(namespace, &key);
        }
    }

    /// Carries the store's numbers to metrics and status.
    fn report(&mut self) {
        let mut delta = |counter: Counter| {
            let (name, now) = (counter.into(), self.store.counters().get(counter));
            let before = self.counted.insert(name, now).unwrap_or(0);
            now.saturating_sub(before)
        };
        let (metrics, device) = (&self.roll.metrics, self.device);
        let (bytes, ops) = (&metrics.disk_bytes, &metrics.disk_ops);
        let (read, write) = ((device, Direction::Read), (device, Direction::Write));
        bytes.of(read).inc_by(delta(Counter::BytesRead));
        bytes
            .of(write)
            .inc_by(delta(Counter::BytesWritten) + delta(Counter::BytesForwarded));
        ops.of(read).inc_by(delta(Counter::Reads));
        ops.of(write).inc_by(delta(Counter::PutsDurable));
        let errors = delta(Counter::WriteErrors) + delta(Counter::SyncErrors);
        metrics.disk_errors.of(device).inc_by(errors);
        self.scrubber.report(&self.store, device, metrics);
        let (state, usage) = (self.store.state(), self.store.usage());
        let failed = "its lane failed; see the log";
        {
            let mut status = self.status();
            status.state = state;
            if state == DeviceState::Failed && status.problem.is_empty() {
                failed.clone_into(&mut status.problem);
            }
            // Nothing can be restored from a device that has failed.
            let serves = state != DeviceState::Failed;
            status.blocks = if serves { usage.blocks } else { 0 };
            status.used_bytes = usage.segments * usage.segment_size;
        }
        if self.told.replace(state) != Some(state) {
            self.roll.state(device, state, failed);
        }
    }

    fn status(&self) -> MutexGuard<'_, DiskStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(mut self, reply: Option<oneshot::Sender<()>>) {
        let mut events = Vec::new();
        while !self.puts.is_empty() {
            self.store.step(Wait::One, &mut events);
            self.settle(&mut events);
            self.hand_over_puts();
        }
        let Self {
            store, mut answers, ..
        } = self;
        drop(store.close(&mut events));
        events.into_iter().for_each(|event| answers.tell(event));
        if let Some(reply) = reply {
            let _ = reply.send(());
        }
    }
}

#[cfg(test)]
mod tests;
