//! Tests of the disk thread, driven step by step.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kvtier_proto::{BlockKey, Bytes, LayoutFingerprint, Level, PayloadKind, Quality};
use kvtier_store::disk::lane::LaneKind;
use kvtier_store::mem::{Arena, Share};
use kvtier_store::{PartCode, PartSpec, RecordBuilder, RecordMeta};
use tokio::sync::oneshot::error::TryRecvError as NotYet;

use super::super::ScrubOptions;
use super::super::device::{As, PutDone};
use super::*;

const SEGMENT: u64 = 1 << 20;

/// A store that queues one put only.
fn store(dir: &Path) -> AnyStore {
    let lane = open_lane(dir, LaneKind::Pread, 8, &[]).unwrap();
    let mut options = StoreOptions::new(8 * SEGMENT, [3; 16]);
    options.segment_size = SEGMENT;
    options.queue_max = 1;
    Store::open(lane.disk, options, None, &mut |_| {})
        .unwrap()
        .0
}

fn status() -> Arc<Mutex<DiskStatus>> {
    Arc::new(Mutex::new(DiskStatus::new(&DiskOptions {
        device: Device::FIRST,
        path: PathBuf::new(),
        capacity: Bytes::mib(8),
        segment_size: Bytes(SEGMENT),
        queue_depth: 8,
        lane: LaneKind::Pread,
        read_limit: None,
        scrub: ScrubOptions::OFF,
        cold_after: None,
        hosts: Vec::new(),
        unusable: None,
    })))
}

fn roll() -> Roll {
    Roll::new(1, Arc::default(), Arc::default())
}

fn id(number: u8) -> BlockId {
    BlockId {
        namespace: NamespaceId(1),
        kind: PayloadKind::Kv,
        key: BlockKey([number; 32]),
    }
}

fn image(arena: &Arc<Arena>, number: u8, len: u32) -> RecordImage {
    let meta = RecordMeta {
        namespace: NamespaceId(1),
        key: id(number).record_key(),
        parent: BlockKey::ROOT,
        layout: LayoutFingerprint([1; 32]),
        kind: PayloadKind::Kv,
        level: Level::RAW,
        through: Quality::Exact,
        tokens: 16,
        position: 0,
        codec_tables: 0,
    };
    let part = PartSpec {
        layer: 0,
        code: PartCode::K,
        flags: 0,
        stored_len: len,
        raw_len: len,
    };
    let builder = RecordBuilder::new(&meta, std::slice::from_ref(&part));
    let len = builder.layout().unwrap().image_len;
    builder.build(arena.alloc(len as usize).unwrap()).unwrap()
}

struct Driven<'a> {
    served: Served<'a>,
    arena: Arc<Arena>,
    lives: Arc<AtomicU64>,
    events: Vec<Event>,
}

impl<'a> Driven<'a> {
    fn new(dir: &Path, roll: &'a Roll) -> Self {
        let store = store(dir);
        let scrubber = Scrubber::new(ScrubOptions::OFF, None, store.disk().waker());
        Self {
            served: Served::new(store, roll, status(), &[], scrubber),
            arena: Arena::create("test", 8 << 20, Share::Private).unwrap(),
            lives: Arc::default(),
            events: Vec::new(),
        }
    }

    fn put(&mut self, number: u8, len: u32) -> oneshot::Receiver<PutDone> {
        let (reply, done) = oneshot::channel();
        let (image, lives) = (image(&self.arena, number, len), Arc::clone(&self.lives));
        let life = Life(lives.load(Ordering::SeqCst));
        let put = Command::Put {
            image,
            how: As::New,
            lives,
            life,
            reply,
        };
        self.served.command(put, &mut self.events);
        done
    }

    fn wipe(&mut self) {
        let namespace = NamespaceId(1);
        self.lives.fetch_add(1, Ordering::SeqCst);
        let (reply, mut forgotten) = oneshot::channel();
        let forget = Command::Forget {
            namespace,
            below: None,
            reply,
        };
        self.served.command(forget, &mut self.events);
        forgotten.try_recv().unwrap();
        let (reply, mut kept) = oneshot::channel();
        let keep = Command::KeepWipes { namespace, reply };
        self.served.command(keep, &mut self.events);
        kept.try_recv().unwrap().unwrap();
    }

    fn step_until(&mut self, done: &mut oneshot::Receiver<PutDone>) -> PutDone {
        for _ in 0..1000 {
            self.served.settle(&mut self.events);
            self.served.hand_over_puts();
            match done.try_recv() {
                Ok(done) => return done,
                Err(NotYet::Empty) => self.served.store.step(Wait::One, &mut self.events),
                Err(NotYet::Closed) => panic!("nobody answers"),
            }
        }
        panic!("no answer");
    }
}

// Goal: P3 for a put that the store's queue had no room for when the wipe came: it does not come
// back, in this run or the next.
#[test]
fn a_put_that_waited_for_the_queue_does_not_outlive_a_wipe() {
    let dir = tempfile::tempdir().unwrap();
    let roll = roll();
    let mut driven = Driven::new(dir.path(), &roll);
    let (mut first, mut second) = (driven.put(1, 5000), driven.put(2, 5000));
    assert_eq!(driven.served.puts.len(), 1, "the second waits");
    driven.wipe();
    let mut later = driven.put(3, 5000);
    assert!(driven.step_until(&mut first).is_err());
    assert!(driven.step_until(&mut second).is_err());
    assert!(driven.step_until(&mut later).is_ok(), "of the new life");
    let here = |driven: &Driven<'_>| [1, 2, 3].map(|key| driven.served.peek(&id(key)).is_some());
    assert_eq!(here(&driven), [false, false, true]);
    driven.served.close(None);
    let driven = Driven::new(dir.path(), &roll);
    assert_eq!(here(&driven), [false, false, true], "after a restart");
}

#[test]
fn puts_that_waited_for_the_queue_are_taken_in_order_and_before_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let roll = roll();
    let mut driven = Driven::new(dir.path(), &roll);
    let mut waiting: Vec<_> = (1..6).map(|number| driven.put(number, 5000)).collect();
    assert_eq!(driven.served.puts.len(), 4);
    driven.served.close(None);
    for done in &mut waiting {
        assert!(matches!(done.try_recv(), Ok(Ok(()))));
    }
}

// Goal: a pin that the store refuses costs nothing and says so.
#[test]
fn a_pin_beyond_half_of_the_device_is_refused_and_not_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let roll = roll();
    let mut driven = Driven::new(dir.path(), &roll);
    for number in 1..=5 {
        let mut done = driven.put(number, 900 << 10);
        assert!(driven.step_until(&mut done).is_ok());
    }
    let hour = Some(Duration::from_secs(3600));
    let pinned = [1, 2, 3, 4, 5, 6].map(|number| driven.served.pin(&id(number), hour));
    assert_eq!(pinned, [true, true, true, true, false, false]);
    assert_eq!(driven.served.pins.len(), 4);
    assert!(driven.served.pin(&id(1), hour), "again");
    assert_eq!(driven.served.pins.len(), 4);
    assert!(driven.served.pin(&id(1), None));
    assert!(driven.served.pin(&id(5), hour), "there is room again");
    driven.wipe();
    assert_eq!(driven.served.pins.len(), 0);
}
