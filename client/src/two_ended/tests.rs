//! Tests of the engine's end, with the daemon's played by hand.

use super::*;
use crate::maps::tests::maps;

struct Both {
    place: Arc<Place>,
    meeting: Arc<Meeting>,
    engine: ComputeEnd,
}

fn both(blocks: usize, gate: Gate) -> Both {
    let place = maps(4096).place(blocks).unwrap();
    let meeting = Meeting::new(Some(Arc::clone(&place)), blocks);
    // No load is late in these tests, however slowly they run.
    meeting.pace(|pace| *pace = Pace::new(Instant::now() + Duration::from_secs(3600)));
    assert!(place.swap(0, 0, gate as u8));
    let engine = ComputeEnd::new(Arc::clone(&meeting), Arc::default());
    Both {
        place,
        meeting,
        engine,
    }
}

impl Both {
    fn daemon(&self, index: usize, from: Claim, to: Claim) -> bool {
        self.place.swap(HEAD + index, from as u8, to as u8)
    }
}

#[test]
fn next_computes_from_the_front_until_it_meets_what_is_loaded() {
    let both = both(4, Gate::Open);
    assert!(both.daemon(3, Claim::Empty, Claim::Loading));
    for index in 0..2 {
        assert_eq!(both.engine.next(), NextCompute::Block(index));
        assert!(!both.daemon(index, Claim::Empty, Claim::Loading));
        assert_eq!(both.engine.next(), NextCompute::Wait, "one at a time");
        both.engine.computed(index, None);
    }
    assert!(both.daemon(2, Claim::Empty, Claim::Loading));
    assert_eq!(both.engine.next(), NextCompute::Wait);
    assert!(both.daemon(2, Claim::Loading, Claim::Ready));
    assert_eq!(
        both.engine.next(),
        NextCompute::Wait,
        "its event is on the way"
    );
    both.meeting.came(2);
    assert_eq!(both.engine.next(), NextCompute::Wait);
    both.meeting.came(3);
    assert_eq!(both.engine.next(), NextCompute::Finished);
}

// Goal: an engine does not wait for a device that is slower than it, and what it takes over comes
// from nobody else.
#[test]
fn next_takes_a_block_over_from_a_load_that_is_late_unless_it_has_come() {
    let both = both(2, Gate::Open);
    let long_ago = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
    assert!(both.daemon(0, Claim::Empty, Claim::Loading));
    assert!(both.daemon(1, Claim::Empty, Claim::Loading));
    assert_eq!(both.engine.next(), NextCompute::Wait);
    assert!(both.meeting.overdue_at().unwrap() > Instant::now());
    both.meeting.pace(|pace| *pace = Pace::new(long_ago));
    assert!(both.meeting.overdue_at().unwrap() <= Instant::now());
    assert_eq!(both.engine.next(), NextCompute::Block(0));
    assert!(!both.daemon(0, Claim::Loading, Claim::Ready));
    both.engine.computed(0, None);
    assert!(both.daemon(1, Claim::Loading, Claim::Ready));
    assert_eq!(both.engine.next(), NextCompute::Wait, "it has come");
    assert_eq!(both.meeting.overdue_at(), None);
}

// Goal: one loop serves every restore: without a map the engine computes what did not come.
#[test]
fn next_waits_for_the_end_of_a_restore_without_a_map() {
    let meeting = Meeting::new(None, 2);
    assert_eq!(meeting.next(), NextCompute::Wait);
    meeting.came(0);
    meeting.end();
    assert_eq!(meeting.next(), NextCompute::Block(1));
    meeting.computed(1);
    assert_eq!(meeting.next(), NextCompute::Finished);
}

#[test]
fn next_passes_over_a_loaded_front_and_computes_what_cannot_be_loaded() {
    let both = both(3, Gate::Closed);
    assert_eq!(both.engine.next(), NextCompute::Wait, "the gate is closed");
    both.meeting.came(0);
    assert!(both.daemon(1, Claim::Empty, Claim::Missed));
    assert_eq!(both.engine.next(), NextCompute::Block(1));
    both.engine.computed(1, None);
    assert_eq!(both.engine.next(), NextCompute::Wait);
    assert!(both.meeting.has(1) && !both.meeting.has(2));
}

// Goal: an engine is never left waiting for a daemon that is gone.
#[test]
fn next_computes_everything_that_is_not_here_once_the_restore_has_ended() {
    let both = both(3, Gate::Closed);
    assert!(both.daemon(0, Claim::Empty, Claim::Loading));
    both.meeting.came(1);
    both.meeting.end();
    assert_eq!(both.engine.next(), NextCompute::Block(0));
    both.engine.computed(0, None);
    assert_eq!(both.engine.next(), NextCompute::Block(2));
    both.engine.computed(2, None);
    assert_eq!(both.engine.next(), NextCompute::Finished);
}

// Goal: a block has one owner, however many threads of an engine ask (W1, W2).
#[test]
fn next_gives_a_block_to_one_of_many_threads_and_never_to_both_ends() {
    const BLOCKS: usize = 2000;
    let both = both(BLOCKS, Gate::Open);
    let (engine, meeting) = (&both.engine, &both.meeting);
    let computing = || {
        let mut mine = Vec::new();
        loop {
            match engine.next() {
                NextCompute::Block(index) => {
                    mine.push(index);
                    engine.computed(index, None);
                }
                NextCompute::Wait => std::thread::yield_now(),
                NextCompute::Finished => return mine,
            }
        }
    };
    let loading = || {
        let mut mine = Vec::new();
        for index in (0..BLOCKS).rev() {
            if both.daemon(index, Claim::Empty, Claim::Loading) {
                assert!(both.daemon(index, Claim::Loading, Claim::Ready));
                meeting.came(index);
                mine.push(index);
            }
        }
        mine
    };
    let mut all: Vec<usize> = std::thread::scope(|scope| {
        let threads = [scope.spawn(computing), scope.spawn(computing)];
        let loaded = scope.spawn(loading);
        let computed = threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap());
        computed.chain(loaded.join().unwrap()).collect()
    });
    all.sort_unstable();
    assert_eq!(all, (0..BLOCKS).collect::<Vec<_>>());
}
