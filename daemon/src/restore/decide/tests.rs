//! Tests of the decisions: a restore played by hand, with a map of claims and time as a number.

use std::cell::RefCell;
use std::collections::VecDeque;

use super::*;

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Who has each block.
struct Map(RefCell<Vec<Claim>>);

impl Map {
    fn new(blocks: usize) -> Self {
        Self(RefCell::new(vec![Claim::Empty; blocks]))
    }

    fn of(&self, index: usize) -> Claim {
        self.0.borrow()[index]
    }

    fn set(&self, index: usize, claim: Claim) {
        self.0.borrow_mut()[index] = claim;
    }

    fn take(&self, index: usize) -> bool {
        let free = self.of(index) == Claim::Empty;
        if free {
            self.set(index, Claim::Loading);
        }
        free
    }
}

/// Blocks of 256 tokens that take this long to compute, on a device that takes so long for one.
fn known(open: bool, load_s: Option<f64>, compute_s: f64) -> Known {
    let prefill = Prefill {
        per_token_s: compute_s / 256.0,
        ..Prefill::default()
    };
    let steps = Some(Steps {
        prefill,
        block_tokens: 256,
    });
    Known {
        open,
        load_s: vec![load_s],
        steps,
    }
}

/// Blocks of one device.
fn on(blocks: &[usize]) -> Vec<Load> {
    let load = |index: &usize| Load {
        index: *index,
        device: 0,
    };
    blocks.iter().map(load).collect()
}

fn all(course: &mut Course, now: Duration, wanted: Range<usize>, map: &Map) -> Vec<usize> {
    std::iter::from_fn(|| course.next(now, &wanted, |index| map.take(index))).collect()
}

#[test]
fn next_goes_from_the_front_and_passes_over_what_nobody_wants() {
    let mut course = Course::forward(vec![0, 1, 3, 4, 7]);
    let named = std::iter::from_fn(|| course.next(ms(0), &(1..5), |_| true));
    assert_eq!(named.collect::<Vec<_>>(), [1, 3, 4]);
    assert_eq!((course.loading(), course.late_at()), (3, None));
    let mut many = Course::forward((0..100).collect());
    let map = Map::new(100);
    assert_eq!(all(&mut many, ms(0), 0..100, &map).len(), LOADS_MAX);
}

#[test]
fn next_goes_from_the_back_and_leaves_what_the_engine_has() {
    let map = Map::new(8);
    let load = [0, 1, 2, 3, 5, 6];
    let mut course = Course::two_ended(&on(&load), &[], &known(true, None, 10e-3));
    map.set(0, Claim::Computing);
    assert_eq!(all(&mut course, ms(0), 0..8, &map), [6, 5]);
    map.set(1, Claim::Computing);
    map.set(2, Claim::Computing);
    for index in [6, 5] {
        map.set(index, Claim::Ready);
        course.landed(ms(1), index, true);
    }
    assert_eq!(
        all(&mut course, ms(1), 0..8, &map),
        [3],
        "the two ends meet"
    );
}

// Goal: the engine has to compute what is missing, when all before it are here. Those come first.
#[test]
fn next_brings_what_lies_before_a_missing_block_before_what_lies_behind_it() {
    let map = Map::new(9);
    let load = [0, 1, 2, 4, 5, 7, 8];
    let mut course = Course::two_ended(&on(&load), &[3, 6], &known(true, Some(1e-6), 1.0));
    assert_eq!(all(&mut course, ms(0), 0..9, &map), [2, 1, 0, 5, 4, 8, 7]);
}

// Goal: a device that is slower than another one neither waits for it nor keeps it waiting.
#[test]
fn next_keeps_every_device_busy_from_its_own_back() {
    let map = Map::new(12);
    let loads: Vec<Load> = (0..12)
        .map(|index| Load {
            index,
            device: usize::from(index < 10),
        })
        .collect();
    let known = Known {
        load_s: vec![Some(1.0), Some(1.0)],
        ..known(true, None, 1.0)
    };
    let mut course = Course::two_ended(&loads, &[], &known);
    assert_eq!(all(&mut course, ms(0), 0..12, &map), [11, 10, 9, 8]);
    course.landed(ms(10), 9, true);
    assert_eq!(all(&mut course, ms(10), 0..12, &map), [7]);
    // The other one alone is late.
    let late = course.late_at().unwrap();
    assert_eq!(course.give_back(late), [10, 11]);
    assert!(course.late_at().unwrap() > late);
}

#[test]
fn depth_grows_with_what_the_device_brings_within_bounds() {
    let blocks = || (0..100).collect::<Vec<usize>>();
    let depth = |block_s: f64| {
        let map = Map::new(100);
        let known = known(true, Some(block_s), 1.0);
        let mut course = Course::two_ended(&on(&blocks()), &[], &known);
        all(&mut course, ms(0), 0..100, &map).len()
    };
    assert_eq!(depth(1.0), 2, "one on the device, one behind it");
    assert_eq!(depth(0.25e-3), 21, "20 blocks take 5 ms");
    assert_eq!(depth(1e-6), LOADS_MAX);
    let map = Map::new(100);
    let mut course = Course::two_ended(&on(&blocks()), &[], &known(true, None, 1.0));
    assert_eq!(all(&mut course, ms(0), 0..100, &map).len(), 2);
}

// Goal: a device that is far away brings as much as one that is near, once it is known to be far:
// what is under way is its rate by its latency.
#[test]
fn depth_grows_until_a_far_device_is_busy() {
    let map = Map::new(1000);
    let blocks: Vec<usize> = (0..1000).collect();
    let mut course = Course::two_ended(&on(&blocks), &[], &known(true, None, 1.0));
    // 40 ms away, and a block every 2 ms: 20 are under way when it is busy.
    let (mut ends, mut busy_until, mut deepest) = (VecDeque::new(), ms(0), 0);
    let mut now = ms(0);
    for _ in 0..400 {
        while let Some(index) = course.next(now, &(0..1000), |index| map.take(index)) {
            busy_until = busy_until.max(now + ms(38)) + ms(2);
            ends.push_back((busy_until, index));
        }
        deepest = deepest.max(course.loading());
        let (end, index) = ends.pop_front().unwrap();
        now = end;
        course.landed(now, index, true);
    }
    assert!((20..=30).contains(&deepest), "{deepest}");
}

#[test]
fn turn_gate_closes_where_the_rest_comes_before_a_step_ends() {
    let map = Map::new(20);
    let blocks: Vec<usize> = (0..20).collect();
    let mut course = Course::two_ended(&on(&blocks), &[], &known(true, Some(10e-3), 55e-3));
    let mut now = ms(0);
    map.set(0, Claim::Computing);
    let mut closed_with = None;
    while let Some(index) = course.next(now, &(0..20), |index| map.take(index)) {
        now += ms(10);
        map.set(index, Claim::Ready);
        course.landed(now, index, true);
        if course.turn_gate(now, |index| map.of(index)) == Some(Gate::Closed) {
            closed_with = Some((1..20).filter(|at| map.of(*at) != Claim::Ready).count());
        }
    }
    assert_eq!(closed_with, Some(5), "50 ms to load, 55 to compute one");
    assert_eq!(course.gate(), Gate::Closed);
}

#[test]
fn turn_gate_opens_when_the_device_becomes_slow() {
    let map = Map::new(64);
    let blocks: Vec<usize> = (0..64).collect();
    let mut course = Course::two_ended(&on(&blocks), &[], &known(false, Some(1e-3), 50e-3));
    let (mut now, mut opened) = (ms(0), None);
    for at in 0..24 {
        let index = course.next(now, &(0..64), |index| map.take(index)).unwrap();
        now += ms(if at < 8 { 1 } else { 10 });
        map.set(index, Claim::Ready);
        course.landed(now, index, true);
        if course.turn_gate(now, |index| map.of(index)) == Some(Gate::Open) {
            opened = opened.or(Some(at));
        }
    }
    let opened = opened.unwrap();
    assert!(
        (9..16).contains(&opened),
        "after {} slow blocks",
        opened - 8
    );
}

// Goal: nobody waits for a device that hangs, and nobody begins a long step for one that pauses.
#[test]
fn late_is_four_blocks_and_no_less_than_a_step() {
    let late = |load_s, compute_s| {
        let known = known(false, load_s, compute_s);
        let mut course = Course::two_ended(&on(&[0, 1, 2]), &[], &known);
        assert_eq!(course.late_at(), None, "nothing is awaited");
        assert_eq!(course.next(ms(7), &(0..3), |_| true), Some(2));
        course.late_at().unwrap() - ms(7)
    };
    assert_eq!(late(Some(10e-3), 1e-3), ms(40));
    assert_eq!(late(Some(1e-3), 1e-3), ms(20));
    assert_eq!(late(Some(1e-3), 300e-3), ms(300));
    assert_eq!(late(None, 1e-3), ms(250));
}

#[test]
fn give_back_opens_the_gate_and_names_what_is_on_its_way() {
    let map = Map::new(4);
    let known = known(false, Some(10e-3), 1e-3);
    let mut course = Course::two_ended(&on(&[0, 1, 2, 3]), &[], &known);
    assert_eq!(all(&mut course, ms(0), 0..4, &map), [3, 2]);
    course.landed(ms(5), 3, true);
    assert_eq!(course.gate(), Gate::Closed);
    assert_eq!(course.late_at(), Some(ms(45)));
    assert!(course.give_back(ms(44)).is_empty(), "not yet");
    assert_eq!(course.give_back(ms(45)), [2]);
    assert_eq!((course.gate(), course.late_at()), (Gate::Open, None));
    course.landed(ms(500), 2, true);
    assert_eq!(all(&mut course, ms(500), 0..4, &map), [1, 0]);
    assert!(course.late_at().unwrap() < ms(700), "one pause is no rate");
}

// Goal: O2. What another device brings says nothing of one that is stuck.
#[test]
fn gate_stays_open_and_a_late_device_gets_nothing_more_until_it_brings_something() {
    let map = Map::new(6);
    let known = Known {
        load_s: vec![Some(10e-3); 2],
        ..known(false, None, 100e-3)
    };
    let load = |index: usize| Load {
        index,
        device: usize::from(index < 4),
    };
    let loads: Vec<Load> = (0..6).map(load).collect();
    let mut course = Course::two_ended(&loads, &[], &known);
    assert_eq!(all(&mut course, ms(0), 0..6, &map), [5, 4, 3, 2]);
    assert_eq!(course.give_back(ms(100)), [4, 5, 2, 3]);
    [2, 3]
        .iter()
        .for_each(|index| map.set(*index, Claim::Empty));
    // One device has come back: all that is left would take it less than computing a block.
    for (at, index) in [(105, 5), (110, 4)] {
        map.set(index, Claim::Ready);
        course.landed(ms(at), index, true);
        assert_eq!(course.turn_gate(ms(at), |index| map.of(index)), None);
        assert_eq!(course.gate(), Gate::Open);
    }
    assert!(
        all(&mut course, ms(110), 0..6, &map).is_empty(),
        "the other is stuck"
    );
    // A read of it fails: still nothing came.
    course.landed(ms(120), 3, false);
    course.turn_gate(ms(120), |index| map.of(index));
    assert_eq!(course.gate(), Gate::Open);
    course.landed(ms(130), 2, true);
    assert_eq!(all(&mut course, ms(130), 0..6, &map), [1, 0]);
    assert!(course.late_at().is_some());
}
