//! The power goes at every operation, and again while the store recovers.
//!
//! An image is one disk that a power cut may leave: of the writes that no sync covered, each is
//! lost, whole or torn. Up to [`SUBSETS_MAX`] of them give every subset; more give a sample.

use super::*;
use crate::disk::sim::{Fate, SimOptions};
use crate::disk::{Op, OpKind};

const ACTIONS: u64 = 300;
/// Most unsynced writes of which every subset is made.
const SUBSETS_MAX: usize = 6;
/// Images of a larger number, and images with torn writes beside the subsets of a small one.
const SAMPLE: usize = 64;
const TORN: usize = 8;

/// How much of it is done.
pub(super) struct Effort {
    /// Most images of one crash.
    pub(super) images: usize,
    /// A crash at every operation, or at every second, ...
    pub(super) every: usize,
}

/// All images, everywhere.
const ALL: Effort = Effort {
    images: SAMPLE,
    every: 1,
};

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

/// Fates of the unsynced writes of `disk`, one list an image, at most `most`.
fn images(disk: &SimDisk, seed: u64, most: usize) -> Vec<Vec<Fate>> {
    let (writes, mut random) = (disk.unsynced(), Seeded::new(seed));
    let mut some =
        |_: usize| -> Vec<Fate> { (0..writes).map(|_| Fate::some(&mut random)).collect() };
    let mut all: Vec<Vec<Fate>> = match writes {
        0 => vec![Vec::new()],
        1..=SUBSETS_MAX => {
            let fate = |set: usize, write: usize| match (set >> write) & 1 {
                0 => Fate::Lost,
                _ => Fate::Whole,
            };
            let subset = |set| -> Vec<Fate> { (0..writes).map(|write| fate(set, write)).collect() };
            let subsets = (0..1 << writes).map(subset);
            subsets.chain((0..TORN).map(&mut some)).collect()
        }
        _ => (0..SAMPLE).map(&mut some).collect(),
    };
    while all.len() > most {
        all.swap_remove(random.below(all.len() as u64) as usize);
    }
    all
}

/// P1, P2, P3 after a crash at operation `at`, whatever it leaves. With `kill` the writer dies
/// before the power goes, and another recovers what it left in between.
fn check(seed: u64, at: u64, kill: bool, most: usize, counts: &mut Counts) {
    let Some(mut run) = cut(seed, at) else { return };
    if kill {
        run = run.reopen(|disk| disk.killed(seed ^ at)).expect("a store");
        run.model.damage = 0;
        run.read_all();
        run.promise_what_is_here();
        counts.kills += 1;
    }
    // Reads that the power cut off were device errors.
    run.model.damage = 0;
    let images = images(run.store.disk(), seed ^ at, most);
    let goes_on = Seeded::new(at).below(images.len() as u64) as usize;
    for (number, fates) in images.iter().enumerate() {
        let after = run.store.disk().crash_with(seed ^ at, |write| fates[write]);
        let mut again = run.fork(after).expect("a crash leaves a store");
        again.read_all();
        let context = || format!("seed {seed}, operation {at}, image {number}: {fates:?}");
        assert_eq!(again.model.damage, 0, "{}", context());
        if number == goes_on {
            again.act(40);
            again.rest();
            again.read_all();
            assert_eq!(again.model.damage, 0, "later, {}", context());
        }
        counts.hits += again.model.hits - run.model.hits;
        counts.image(fates);
    }
    counts.disk(run.store.disk());
    counts.crash_points += 1;
}

/// Crashes at the operations of one run, every third behind a kill.
pub(super) fn everywhere(seed: u64, effort: &Effort, counts: &mut Counts) {
    let first = Seeded::new(seed).below(effort.every as u64);
    for at in (first..operations(seed)).step_by(effort.every) {
        check(seed, at, false, effort.images, counts);
        if at % 3 == 0 {
            check(seed, at, true, effort.images.div_ceil(4), counts);
        }
    }
}

/// P4: recovery from one crash is cut short at every operation, then repeated.
pub(super) fn in_recovery(seed: u64, effort: &Effort, counts: &mut Counts) {
    let found = {
        let run = cut(seed, operations(seed) - 20).unwrap();
        run.store.abandon().crash(seed)
    };
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
        let cut = open(found.clone_with(options));
        let Ok((cut, _)) = cut else { continue };
        counts.crashes_in_recovery += 1;
        for fates in images(cut.disk(), at, effort.images) {
            let after = cut.disk().crash_with(at, |write| fates[write]);
            let (again, _) = open(after).unwrap();
            assert_eq!(
                index(&again),
                want,
                "P4: seed {seed}, cut at {at}, {fates:?}"
            );
            counts.image(&fates);
        }
    }
}

/// Crashes and kills at seeded operations of one run.
pub(super) fn run(seed: u64) {
    let (last, mut random) = (operations(seed), Seeded::new(seed));
    let mut counts = Counts::default();
    (0..6).for_each(|round| check(seed, random.below(last), round % 2 == 0, 2, &mut counts));
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

/// A disk with so many writes that no sync covered.
fn unsynced(writes: usize) -> SimDisk {
    let mut disk = disk(1, None);
    let file = disk.create("file", 1 << 20).unwrap();
    let memory = arena();
    for number in 0..writes {
        let op = Op {
            user: 1,
            kind: OpKind::Write,
            file,
            at: number as u64 * 8192,
            buf: memory.alloc(8192),
            buf_at: 0,
            len: 8192,
            more: Vec::new(),
        };
        disk.submit(op).unwrap();
    }
    disk.reap(Wait::One, &mut Vec::new());
    assert_eq!(disk.unsynced(), writes);
    disk
}

#[test]
fn images_of_a_crash_are_every_subset_of_a_few_writes_and_a_sample_of_many() {
    for writes in 0..12 {
        let images = images(&unsynced(writes), 1, usize::MAX);
        assert!(images.iter().all(|fates| fates.len() == writes));
        let torn = |fate: &Fate| matches!(fate, Fate::Torn { .. });
        let whole = |fates: &&Vec<Fate>| !fates.iter().any(torn);
        let mut subsets: Vec<_> = images.iter().filter(whole).collect();
        subsets.sort_by_key(|fates| format!("{fates:?}"));
        subsets.dedup();
        match writes {
            0 => assert_eq!(images.len(), 1),
            1..=SUBSETS_MAX => assert_eq!(subsets.len(), 1 << writes),
            _ => assert_eq!(images.len(), SAMPLE),
        }
    }
    let some = images(&unsynced(5), 1, 7);
    assert_eq!(some.len(), 7);
}

#[test]
fn a_crash_at_every_operation_loses_nothing_that_was_promised() {
    let last = operations(1);
    assert!(last > 200, "{last} operations are too few to show anything");
    everywhere(1, &ALL, &mut Counts::default());
}

#[test]
fn a_crash_at_some_operation_of_many_runs_loses_nothing_that_was_promised() {
    for seed in 2..42 {
        let (last, mut random) = (operations(seed), Seeded::new(seed));
        let mut counts = Counts::default();
        (0..6).for_each(|_| check(seed, random.below(last), seed % 2 == 0, 1, &mut counts));
    }
}

#[test]
fn recovery_cut_short_at_every_operation_ends_like_one_recovery() {
    (50..56).for_each(|seed| in_recovery(seed, &ALL, &mut Counts::default()));
}

#[test]
fn three_crashes_in_a_row_with_work_between_lose_nothing_that_was_promised() {
    (100..120).for_each(rounds);
}
