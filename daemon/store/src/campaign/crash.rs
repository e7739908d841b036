//! The power goes at every operation, and again while the store recovers.

use super::*;
use crate::disk::sim::SimOptions;

const ACTIONS: u64 = 300;

fn disk(seed: u64, crash_at: Option<u64>) -> SimDisk {
    SimDisk::new(SimOptions {
        seed,
        crash_at,
        ..SimOptions::default()
    })
}

/// Runs until the power goes and gives the run as it stood.
fn cut(seed: u64, at: u64) -> Option<Run> {
    let mut run = Run::new(seed, disk(seed, Some(at)))?;
    for _ in 0..ACTIONS {
        run.act(1);
        if run.store.disk().has_crashed() {
            break;
        }
    }
    Some(run)
}

fn operations(seed: u64) -> u64 {
    let mut run = Run::new(seed, disk(seed, None)).unwrap();
    run.act(ACTIONS);
    run.store.disk().taken()
}

/// P1, P2, P3 after a crash at operation `at`. With `kill` the writer dies before the power goes,
/// and another recovers what it left in between.
fn check(seed: u64, at: u64, kill: bool) {
    let Some(mut run) = cut(seed, at) else { return };
    if kill {
        let again = run.reopen(|disk| disk.killed(seed ^ at)).expect("a store");
        run = again;
        run.model.damage = 0;
        run.read_all();
        run.promise_what_is_here();
    }
    let mut run = run
        .reopen(|disk| disk.crash(seed ^ at))
        .expect("a crash leaves a store");
    // Reads that the power cut off were device errors.
    run.model.damage = 0;
    run.read_all();
    assert_eq!(run.model.damage, 0, "seed {seed}, operation {at}");
    run.act(40);
    run.rest();
    run.read_all();
    assert_eq!(run.model.damage, 0, "seed {seed}, operation {at}, later");
}

/// Crashes and kills at seeded operations of one run.
pub(super) fn run(seed: u64) {
    let (last, mut random) = (operations(seed), Seeded::new(seed));
    (0..6).for_each(|round| check(seed, random.below(last), round % 2 == 0));
    rounds(seed);
}

/// Four crashes with work between.
fn rounds(seed: u64) {
    let mut run = Run::new(seed, disk(seed, None)).unwrap();
    for round in 0..4 {
        run.act(150);
        run = run.reopen(|disk| disk.crash(seed + round)).unwrap();
        run.read_all();
        assert_eq!(run.model.damage, 0, "seed {seed}, round {round}");
    }
}

#[test]
fn a_crash_at_every_operation_loses_nothing_that_was_promised() {
    let last = operations(1);
    assert!(last > 200, "{last} operations are too few to show anything");
    (0..last).for_each(|at| check(1, at, false));
    (0..last).step_by(3).for_each(|at| check(1, at, true));
}

#[test]
fn a_crash_at_some_operation_of_many_runs_loses_nothing_that_was_promised() {
    for seed in 2..42 {
        let (last, mut random) = (operations(seed), Seeded::new(seed));
        (0..6).for_each(|_| check(seed, random.below(last), seed % 2 == 0));
    }
}

// P4: recovery is cut short at every operation, then repeated.
#[test]
fn recovery_cut_short_at_every_operation_ends_like_one_recovery() {
    for seed in 50..56 {
        let run = cut(seed, operations(seed) - 20).unwrap();
        let found = run.store.abandon().crash(seed);
        let open = |disk| Store::open(disk, options(), None, &mut |_| {});
        let index = |store: &Store<SimDisk>| -> BTreeMap<_, _> {
            store
                .blocks()
                .map(|one| ((one.namespace, one.key), one.place))
                .collect()
        };
        let (once, _) = open(found.restart(1)).unwrap();
        let (want, steps) = (index(&once), once.disk().taken());
        assert!(!want.is_empty());
        for at in 0..steps {
            let options = SimOptions {
                seed,
                crash_at: Some(at),
                ..SimOptions::default()
            };
            let cut = open(found.clone_with(options))
                .ok()
                .map(|(store, _)| store.abandon());
            let Some(cut) = cut else { continue };
            let (again, _) = open(cut.crash(at)).unwrap();
            assert_eq!(index(&again), want, "P4: seed {seed}, cut at {at}");
        }
    }
}

#[test]
fn three_crashes_in_a_row_with_work_between_lose_nothing_that_was_promised() {
    (100..120).for_each(rounds);
}
