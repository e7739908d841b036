//! The disk thread: commands in, steps of the store, events out.
//!
//! Upstairs:   `DiskTier` sends commands.
//! Downstairs: `kvtier_store`.
//!
//! Invariants kept here
//!   T4  Every command is answered, or its channel is dropped: nobody waits for ever.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvtier_proto::{BlockKey, NamespaceId};
use kvtier_store::catalog::SledCatalog;
use kvtier_store::disk::lane::open_lane;
use kvtier_store::disk::{Disk, Wait, Waker};
use kvtier_store::{
    Counter, DeviceState, Event, IndexSource, PutError, RecordImage, RecoveryReport, Store,
    StoreOptions, Want,
};
use rand::TryRngCore;
use tokio::sync::oneshot;

use super::{Command, DiskOptions, DiskStatus, GetDone, PutDone};
use crate::block::BlockId;
use crate::health::{Health, Progress};
use crate::log::chain;
use crate::metrics::{CatalogReason, Direction, DiskState, Metrics, Tier};

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
    let served = Served {
        store,
        metrics,
        status: Arc::clone(&status),
        puts: HashMap::new(),
        gets: HashMap::new(),
        held_back: VecDeque::new(),
        pins: BTreeMap::new(),
        tags: 0,
        counted: BTreeMap::new(),
    };
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
        IndexSource::SegmentsAfter(why) => {
            metrics.catalog_rebuilt.of(reason(why)).inc();
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

/// Which of the few reasons a sentence speaks of.
fn reason(why: &str) -> CatalogReason {
    if why.contains("folder is not there") {
        CatalogReason::Missing
    } else if ["unsound", "add up", "names a segment"]
        .iter()
        .any(|part| why.contains(part))
    {
        CatalogReason::Mismatch
    } else {
        CatalogReason::Unreadable
    }
}

struct Served<'a> {
    store: AnyStore,
    metrics: &'a Metrics,
    status: Arc<Mutex<DiskStatus>>,
    puts: HashMap<u64, oneshot::Sender<PutDone>>,
    gets: HashMap<u64, oneshot::Sender<GetDone>>,
    /// Puts that the store's queue had no room for.
    held_back: VecDeque<(u64, RecordImage)>,
    pins: BTreeMap<(Instant, NamespaceId, BlockKey), ()>,
    tags: u64,
    counted: BTreeMap<&'static str, u64>,
}

impl Served<'_> {
    fn run(mut self, commands: &Receiver<Command>) {
        let mut events = Vec::new();
        loop {
            for _ in 0..COMMANDS_AT_ONCE {
                match commands.try_recv() {
                    Ok(Command::Close { reply }) => return self.close(Some(reply)),
                    Ok(command) => self.command(command, &mut events),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return self.close(None),
                }
            }
            self.unpin_expired();
            self.store.step(Wait::One, &mut events);
            self.settle(&mut events);
            self.retry_held_back();
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
                if lives.load(Ordering::SeqCst) != life.0 {
                    return drop(reply.send(Err("the namespace was wiped".into())));
                }
                self.tags += 1;
                self.puts.insert(self.tags, reply);
                self.put(self.tags, image);
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
                    Ok(()) => drop(self.gets.insert(self.tags, reply)),
                    Err((_, miss)) => drop(reply.send(Err(miss))),
                }
            }
            Command::Condemn {
                id,
                place,
                miss,
                reply,
            } => {
                self.store
                    .condemn(id.namespace, &id.record_key(), &place, miss);
                let _ = reply.send(());
            }
            Command::Pin { ids, ttl, reply } => {
                let _ = reply.send(ids.iter().map(|id| self.pin(id, ttl)).collect());
            }
            Command::Wipe { namespace, reply } => {
                let done = self
                    .store
                    .wipe(namespace, events)
                    .map_err(|problem| chain(&problem));
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

    fn put(&mut self, tag: u64, image: RecordImage) {
        match self.store.put(tag, image) {
            Ok(()) => {}
            Err((image, PutError::Busy { .. })) => self.held_back.push_back((tag, image)),
            Err((_, problem)) => self.answer_put(tag, Err(chain(&problem))),
        }
    }

    fn retry_held_back(&mut self) {
        for _ in 0..self.held_back.len() {
            if let Some((tag, image)) = self.held_back.pop_front() {
                self.put(tag, image);
            }
        }
    }

    fn answer_put(&mut self, tag: u64, done: PutDone) {
        if let Some(reply) = self.puts.remove(&tag) {
            let _ = reply.send(done);
        }
    }

    fn pin(&mut self, id: &BlockId, ttl: Option<std::time::Duration>) -> bool {
        let Some(_) = self.peek(id) else { return false };
        self.pins.retain(|(_, namespace, key), ()| {
            (*namespace, *key) != (id.namespace, id.record_key())
        });
        match ttl {
            Some(ttl) => {
                self.pins
                    .insert((Instant::now() + ttl, id.namespace, id.record_key()), ());
                self.store.pin(id.namespace, &id.record_key())
            }
            None => {
                self.store.unpin(id.namespace, &id.record_key());
                true
            }
        }
    }

    fn unpin_expired(&mut self) {
        while let Some(first) = self.pins.first_entry()
            && first.key().0 <= Instant::now()
        {
            let ((_, namespace, key), ()) = first.remove_entry();
            self.store.unpin(namespace, &key);
        }
    }

    fn settle(&mut self, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            match event {
                Event::Put { tag, result, .. } => {
                    let done = result.map(|_| ()).map_err(|problem| chain(&problem));
                    if let Some(reply) = self.puts.remove(&tag) {
                        let _ = reply.send(done);
                    }
                }
                Event::Got { tag, result } => {
                    if let Some(reply) = self.gets.remove(&tag) {
                        let _ = reply.send(result.map_err(|(_, miss)| miss));
                    }
                }
                Event::Evicted { .. } => self.metrics.evicted_blocks.of(Tier::Disk).inc(),
                Event::Device(state) => tracing::warn!(state = state.as_str(), "device state"),
            }
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
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        status.state = state;
        status.blocks = usage.blocks;
        status.used_bytes = usage.segments * usage.segment_size;
    }

    fn close(mut self, reply: Option<oneshot::Sender<()>>) {
        let mut events = Vec::new();
        while !self.held_back.is_empty() {
            self.store.step(Wait::One, &mut events);
            self.settle(&mut events);
            self.retry_held_back();
        }
        let (puts, gets) = (
            std::mem::take(&mut self.puts),
            std::mem::take(&mut self.gets),
        );
        drop(self.store.close(&mut events));
        answer_last(events, puts, gets);
        if let Some(reply) = reply {
            let _ = reply.send(());
        }
    }
}

/// Answers what the closing store still reported.
fn answer_last(
    events: Vec<Event>,
    mut puts: HashMap<u64, oneshot::Sender<PutDone>>,
    mut gets: HashMap<u64, oneshot::Sender<GetDone>>,
) {
    for event in events {
        match event {
            Event::Put { tag, result, .. } => {
                if let Some(reply) = puts.remove(&tag) {
                    let _ = reply.send(result.map(|_| ()).map_err(|problem| chain(&problem)));
                }
            }
            Event::Got { tag, result } => {
                if let Some(reply) = gets.remove(&tag) {
                    let _ = reply.send(result.map_err(|(_, miss)| miss));
                }
            }
            _ => {}
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
