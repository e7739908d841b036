//! A device whose queue is always full of reads, and one that was rung for somebody else.

use super::*;
use crate::disk::{Found, Waker};

/// Serves in order, a few operations a reap, each in a moment, and moves nothing.
#[derive(Debug, Default)]
struct InOrder {
    flying: VecDeque<Op>,
    now: Duration,
    reaps: u64,
}

const DEPTH: usize = 64;
/// As many as a ring delivers at a time.
const A_FEW: usize = 16;

impl Disk for InOrder {
    fn list(&mut self) -> std::io::Result<Vec<Found>> {
        Ok(Vec::new())
    }

    fn open(&mut self, _name: &str) -> std::io::Result<FileId> {
        Ok(FileId(1))
    }

    fn create(&mut self, name: &str, _len: u64) -> std::io::Result<FileId> {
        self.open(name)
    }

    fn remove(&mut self, _file: FileId) -> std::io::Result<()> {
        Ok(())
    }

    fn close(&mut self, _file: FileId) {}

    fn submit(&mut self, op: Op) -> Result<(), (Op, SubmitError)> {
        assert!(self.flying.len() < DEPTH);
        self.flying.push_back(op);
        Ok(())
    }

    fn reap(&mut self, wait: Wait, done: &mut Vec<Done>) {
        self.reaps += 1;
        if let (true, Wait::For(most)) = (self.flying.is_empty(), wait) {
            self.now += most;
        }
        for op in self.flying.drain(..self.flying.len().min(A_FEW)) {
            self.now += Duration::from_micros(20);
            let moved = Ok(op.total());
            done.push(op.done(moved));
        }
    }

    fn in_flight(&self) -> usize {
        self.flying.len()
    }

    fn depth(&self) -> usize {
        DEPTH
    }

    fn align(&self) -> usize {
        512
    }

    fn waker(&self) -> Waker {
        Waker::new(|| {})
    }

    fn lane(&self) -> &'static str {
        "in order"
    }

    fn now(&self) -> Duration {
        self.now
    }
}

fn arena() -> std::sync::Arc<Arena> {
    Arena::create("test", 16 << 20, Share::Private).unwrap()
}

// F2: a queue that reads keep full, with as many waiting behind them, has a place for everybody.
#[test]
fn reads_that_fill_the_queue_and_wait_for_it_keep_nobody_out() {
    for class in [Class::Save, Class::Background] {
        let (mut lane, arena) = (Lane::new(InOrder::default()), arena());
        let write = |len: usize| {
            let buf = arena.alloc(len).unwrap();
            Transfer::write(FileId(1), 0, buf, len).of(class)
        };
        let held = lane.start(write(32 * pace::PIECE));
        let (mut reads, mut at, mut ended) = (0, 0, Vec::new());
        while !ended.iter().any(|one: &Finished| one.user == held) {
            ended.clear();
            while lane.busy() <= 3 * DEPTH {
                at += 1 << 20;
                let buf = arena.alloc(4096).unwrap();
                lane.start(Transfer::read(FileId(1), at, buf, 4096));
            }
            lane.collect(Wait::One, &mut ended);
            reads += ended.len();
            assert!(reads < 100 * DEPTH, "F2: {class:?} starves");
        }
    }
}

// A ring that ends the wait for a turn is the caller's: what it was told of meanwhile waits.
#[test]
fn a_wait_that_ends_without_anything_returns() {
    let (mut lane, arena) = (Lane::new(InOrder::default()), arena());
    let mut ended = Vec::new();
    let buf = arena.alloc(4096).unwrap();
    let (_, result) = lane.run(Transfer::read(FileId(1), 0, buf, 4096));
    result.unwrap();
    let buf = arena.alloc(2 * pace::PIECE).unwrap();
    lane.start(Transfer::write(FileId(1), 0, buf, 2 * pace::PIECE).of(Class::Save));
    // The first piece comes back, and the second has no turn yet.
    lane.collect(Wait::One, &mut ended);
    assert!(ended.is_empty() && lane.disk_ref().flying.is_empty());
    let before = lane.disk_ref().reaps;
    lane.collect(Wait::One, &mut ended);
    assert_eq!(lane.disk_ref().reaps, before + 1);
    assert!(ended.is_empty() && lane.disk_ref().in_flight() == 1);
}
