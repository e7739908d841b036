//! The disk thread: commands in, steps of the store, events out.
//!
//! Upstairs:   `DiskTier` sends commands.
//! Downstairs: `kvtier_store`.
//!
//! Invariants kept here
//!   T4  Every command is answered, or its channel is dropped: nobody waits for ever.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvtier_proto::{BlockKey, Miss, NamespaceId, PayloadKind};
use kvtier_store::catalog::SledCatalog;
use kvtier_store::disk::lane::open_lane;
use kvtier_store::disk::{Disk, Wait, Waker};
use kvtier_store::{
    Counter, DeviceState, DistrustReason, Event, IndexSource, PutError, RecordImage,
    RecoveryReport, Store, StoreOptions, Want,
};
use rand::TryRngCore;
use tokio::sync::oneshot;

use super::pins::Pins;
use super::{Command, DiskOptions, DiskStatus, GetDone, PutDone};
use crate::block::BlockId;
use crate::health::{Health, Progress};
use crate::log::chain;
use crate::metrics::{CatalogReason, Direction, DiskState, Metrics, Tier};
use crate::sync::{AtomicU64, Ordering};
use crate::tier::BlockEvent;
use crate::tier::host::{HostTier, Life};

type Opened = oneshot::Sender<Result<(Waker, Arc<Mutex<DiskStatus>>), String>>;
type AnyStore = Store<Box<dyn Disk + Send>>;

/// Directory of the catalog, beside the segments.
const CATALOG: &str = "catalog";
/// Commands handled between two looks at the device.
const COMMANDS_AT_ONCE: usize = 256;

/// Opens the store, says so, and serves until it is closed or its handle is gone.
pub(super) fn main(
    options: DiskOptions,
    commands: Receiver<Command>,
    health: &Health,
    metrics: &Metrics,
    opened: Opened,
) {
    let (store, status) = match open(&options, health, metrics) {
        Ok(opened) => opened,
        Err(problem) => return drop(opened.send(Err(problem))),
    };
    let status = Arc::new(Mutex::new(status));
    let waker = store.disk().waker();
    let served = Served::new(store, health, metrics, Arc::clone(&status), &options.hosts);
    if opened.send(Ok((waker, status))).is_ok() {
        served.run(&commands);
    }
}

fn open(
    options: &DiskOptions,
    health: &Health,
    metrics: &Metrics,
) -> Result<(AnyStore, DiskStatus), String> {
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
        &options.arenas,
    )
    .map_err(|problem| say("cannot open", &problem))?;
    let mut about = format!(
        "{}, {}",
        lane.report.lane,
        if lane.report.direct {
            "direct"
        } else {
            "buffered"
        }
    );
    for without in &lane.report.without {
        tracing::warn!(path, without, "the lane does without something");
        about = format!("{about}; {without}");
    }
    let mut store = StoreOptions::new(options.capacity.get(), id);
    store.segment_size = options.segment_size.get();
    let catalog = SledCatalog::new(options.path.join(CATALOG));
    let begin = Instant::now();
    let (store, report) = Store::open(lane.disk, store, Some(Box::new(catalog)), &mut |progress| {
        let (done, total) = (progress.segments_done, progress.segments_total);
        health.recovered(Progress { done, total });
    })
    .map_err(|problem| say("cannot open the store in", &chain(&problem)))?;
    let seconds = begin.elapsed().as_secs_f64();
    tell(&report, &path, seconds, metrics);
    let status = DiskStatus {
        path,
        lane: about,
        state: store.state(),
        capacity_bytes: options.capacity.get(),
        used_bytes: 0,
        blocks: report.blocks,
    };
    Ok((store, status))
}

fn tell(report: &RecoveryReport, path: &str, seconds: f64, metrics: &Metrics) {
    metrics.recovery_seconds.of(()).set(seconds);
    metrics
        .recovered_blocks
        .of(())
        .set(i64::try_from(report.blocks).unwrap_or(i64::MAX));
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
    /// Lives counted, and the one that the bytes belong to.
    lives: Arc<AtomicU64>,
    life: Life,
}

struct Served<'a> {
    store: AnyStore,
    health: &'a Health,
    metrics: &'a Metrics,
    status: Arc<Mutex<DiskStatus>>,
    answers: Answers<'a>,
    /// In the order they came. The store's queue may have no room for them.
    puts: VecDeque<Put>,
    pins: Pins,
    tags: u64,
    counted: BTreeMap<&'static str, u64>,
}

/// Who waits for what the store reports.
struct Answers<'a> {
    metrics: &'a Metrics,
    puts: HashMap<u64, oneshot::Sender<PutDone>>,
    gets: HashMap<u64, oneshot::Sender<GetDone>>,
    hosts: HashMap<NamespaceId, Arc<HostTier>>,
}

impl<'a> Served<'a> {
    fn new(
        store: AnyStore,
        health: &'a Health,
        metrics: &'a Metrics,
        status: Arc<Mutex<DiskStatus>>,
        hosts: &[Arc<HostTier>],
    ) -> Self {
        let hosts = hosts
            .iter()
            .map(|host| (host.namespace(), Arc::clone(host)));
        Self {
            store,
            health,
            metrics,
            status,
            answers: Answers {
                metrics,
                puts: HashMap::new(),
                gets: HashMap::new(),
                hosts: hosts.collect(),
            },
            puts: VecDeque::new(),
            pins: Pins::default(),
            tags: 0,
            counted: BTreeMap::new(),
        }
    }

    fn run(mut self, commands: &Receiver<Command>) {
        let mut events = Vec::new();
        loop {
            // Commands that are left over rang the bell already: nobody waits before they are done.
            let mut wait = Wait::No;
            for _ in 0..COMMANDS_AT_ONCE {
                match commands.try_recv() {
                    Ok(Command::Close { reply }) => return self.close(Some(reply)),
                    Ok(command) => self.command(command, &mut events),
                    Err(TryRecvError::Empty) => {
                        wait = Wait::One;
                        break;
                    }
                    Err(TryRecvError::Disconnected) => return self.close(None),
                }
            }
            self.unpin_expired();
            self.store.step(wait, &mut events);
            self.answers.settle(&mut events);
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
            Command::Put {
                image,
                lives,
                life,
                reply,
            } => {
                self.tags += 1;
                let tag = self.tags;
                self.answers.puts.insert(tag, reply);
                self.puts.push_back(Put {
                    tag,
                    image,
                    lives,
                    life,
                });
                self.hand_over_puts();
            }
            Command::Get {
                id,
                layout,
                buf,
                reply,
            } => {
                self.tags += 1;
                let want = Want {
                    namespace: id.namespace,
                    key: id.record_key(),
                    layout,
                };
                match self.store.get(self.tags, &want, buf) {
                    Ok(()) => drop(self.answers.gets.insert(self.tags, reply)),
                    Err((_, miss)) => drop(reply.send(Err(miss))),
                }
            }
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
            Command::Wipe { namespace, reply } => {
                let done = self
                    .store
                    .wipe(namespace, events)
                    .map_err(|problem| chain(&problem));
                self.pins.forget(namespace);
                let _ = reply.send(done);
            }
            Command::Close { reply } => drop(reply.send(())),
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
                let wiped = "the namespace was wiped".to_owned();
                self.answers.put(put.tag, Err(wiped));
                continue;
            }
            match self.store.put(put.tag, put.image) {
                Ok(()) => {}
                Err((image, PutError::Busy { .. })) => {
                    return self.puts.push_front(Put { image, ..put });
                }
                Err((_, problem)) => self.answers.put(put.tag, Err(chain(&problem))),
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
        let (bytes, ops) = (&self.metrics.disk_bytes, &self.metrics.disk_ops);
        bytes.of(Direction::Read).inc_by(delta(Counter::BytesRead));
        bytes
            .of(Direction::Write)
            .inc_by(delta(Counter::BytesWritten) + delta(Counter::BytesForwarded));
        ops.of(Direction::Read).inc_by(delta(Counter::Reads));
        ops.of(Direction::Write).inc_by(delta(Counter::PutsDurable));
        let errors = delta(Counter::WriteErrors) + delta(Counter::SyncErrors);
        self.metrics.disk_errors.of(()).inc_by(errors);
        let (state, usage) = (self.store.state(), self.store.usage());
        self.metrics.set_disk_state(label(state));
        if state == DeviceState::Failed {
            self.health.fail("the device of the disk tier failed");
        }
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        status.state = state;
        status.blocks = usage.blocks;
        status.used_bytes = usage.segments * usage.segment_size;
    }

    fn close(mut self, reply: Option<oneshot::Sender<()>>) {
        let mut events = Vec::new();
        while !self.puts.is_empty() {
            self.store.step(Wait::One, &mut events);
            self.answers.settle(&mut events);
            self.hand_over_puts();
        }
        drop(self.store.close(&mut events));
        self.answers.settle(&mut events);
        if let Some(reply) = reply {
            let _ = reply.send(());
        }
    }
}

impl Answers<'_> {
    fn put(&mut self, tag: u64, done: PutDone) {
        if let Some(reply) = self.puts.remove(&tag) {
            let _ = reply.send(done);
        }
    }

    /// Passes on what the store reported.
    fn settle(&mut self, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            match event {
                Event::Put { tag, result, .. } => {
                    self.put(tag, result.map(|_| ()).map_err(|problem| chain(&problem)));
                }
                Event::Got { tag, result } => {
                    if let Some(reply) = self.gets.remove(&tag) {
                        let _ = reply.send(result.map_err(|(_, miss)| miss));
                    }
                }
                Event::Evicted {
                    namespace,
                    key,
                    kind,
                    ..
                } => self.evicted(namespace, key, kind),
                Event::Device(state) => tracing::warn!(state = state.as_str(), "device state"),
            }
        }
    }

    /// A block made room on the device. Of a kind other than KV only the name of its record is
    /// known, which says nothing to a watcher.
    fn evicted(&self, namespace: NamespaceId, key: BlockKey, kind: PayloadKind) {
        self.metrics.evicted_blocks.of(Tier::Disk).inc();
        let Some(host) = self.hosts.get(&namespace) else {
            return;
        };
        if kind == PayloadKind::Kv {
            host.set_durable(&(kind, key), false, host.life());
            host.announce(BlockEvent {
                key,
                tier: Tier::Disk,
                removed: Some(Miss::Evicted),
            });
        }
    }
}

fn label(state: DeviceState) -> DiskState {
    match state {
        DeviceState::Healthy => DiskState::Healthy,
        DeviceState::Full => DiskState::Full,
        DeviceState::Slow => DiskState::Slow,
        DeviceState::ReadOnly => DiskState::ReadOnly,
        DeviceState::Failed => DiskState::Failed,
    }
}

#[cfg(test)]
mod tests;
