//! The power goes at every operation, also of an end in order, and again while the store recovers.
//!
//! An image is one disk that a power cut may leave: of the writes that no sync covered, each is
//! lost, whole or torn. Up to [`SUBSETS_MAX`] of them give every subset; more give a sample.

use super::counts::Where;
use super::life::arena;
use super::lives::{Ended, judge};
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
        crash_at,
        ..device(seed)
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
        let _told =
            Where(|| format!("seed {seed}, operation {at}, {kill}, image {number}: {fates:?}"));
        let mut again = run.fork(after).expect("a crash leaves a store");
        again.read_all();
        assert_eq!(again.model.damage, 0);
        if number == goes_on {
            again.act(40);
            again.rest();
            again.read_all();
            assert_eq!(again.model.damage, 0, "later");
        }
        counts.hits += again.model.hits - run.model.hits;
        counts.image(fates);
    }
    if !kill {
        // With a kill it is the same operation of the same run once more.
        counts.disk(run.store.disk());
        counts.crash_points += 1;
    }
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

/// A store with some work behind it, a catalog, and work since: about to end in order.
fn about_to_end(seed: u64) -> Run {
    let mut run = Run::new(seed, disk(seed, None)).unwrap();
    run.act(120);
    let mut run = run.close(seed);
    run.act(60);
    run
}

/// P2, P3, P7: the power goes at the operations of an end in order.
pub(super) fn in_closing(seed: u64, effort: &Effort, counts: &mut Counts) {
    let run = about_to_end(seed);
    let before = run.store.disk().taken();
    let steps = run.end(None).0.taken() - before;
    let first = Seeded::new(seed).below(effort.every as u64);
    for at in (first..steps).step_by(effort.every) {
        let (disk, past) = about_to_end(seed).end(Some(at));
        assert!(disk.has_crashed());
        let images = images(&disk, seed ^ at, effort.images);
        for (number, fates) in images.iter().enumerate() {
            let after = disk.crash_with(seed ^ at, |write| fates[write]);
            let again = Run::open(after, past.fork(number as u64));
            let mut again = again.expect("a crash leaves a store");
            judge(&mut again, Ended::HalfInOrder, seed);
            counts.image(fates);
        }
        counts.disk(&disk);
        counts.crashes_in_closing += 1;
    }
}

/// P4: recovery is cut short at every operation, then repeated: behind a crash, and behind an end
/// in order, whose catalog it trusts.
pub(super) fn in_recovery(seed: u64, effort: &Effort, counts: &mut Counts) {
    let run = cut(seed, operations(seed) - 20).unwrap();
    let found = run.store.abandon().crash(seed);
    recover_in_pieces(seed, &found, None, effort, counts);
    let run = about_to_end(seed);
    let gave_up = run.gave_up;
    let (disk, past) = run.end(None);
    let source = recover_in_pieces(seed, &disk.restart(seed), Some(&past.shelf), effort, counts);
    assert!(gave_up || source == IndexSource::Catalog);
}

type Index = BTreeMap<(NamespaceId, BlockKey), Place>;

/// Returns what a recovery in one go believes.
fn recover_in_pieces(
    seed: u64,
    found: &SimDisk,
    shelf: Option<&Shelf>,
    effort: &Effort,
    counts: &mut Counts,
) -> IndexSource {
    let open = |disk, shelf: Option<&Shelf>| {
        let catalog = shelf.and_then(Shelf::catalog);
        Store::open(disk, options(), catalog, &mut |_| {})
    };
    let index = |store: &Store<SimDisk>| -> Index {
        let blocks = store.blocks();
        blocks
            .map(|one| ((one.namespace, one.key), one.place))
            .collect()
    };
    let copy = || shelf.map(Shelf::copy);
    let (once, report) = open(found.restart(1), copy().as_ref()).unwrap();
    // Without the catalog there may be blocks that were evicted and are not overwritten.
    let (rebuilt, _) = open(found.restart(1), None).unwrap();
    let (least, most) = (index(&once), index(&rebuilt));
    assert!(!least.is_empty());
    let holds = |all: &Index, some: &Index| some.iter().all(|(name, at)| all.get(name) == Some(at));
    for at in 0..once.disk().taken() {
        let options = SimOptions {
            crash_at: Some(at),
            ..device(seed)
        };
        let shelf = copy();
        // What is given up before its first write is found again as it was.
        let Ok((cut, _)) = open(found.clone_with(options), shelf.as_ref()) else {
            continue;
        };
        counts.crashes_in_recovery += 1;
        for fates in images(cut.disk(), at, effort.images) {
            let after = cut.disk().crash_with(at, |write| fates[write]);
            let shelf = shelf.as_ref().map(Shelf::copy);
            let (again, _) = open(after, shelf.as_ref()).unwrap();
            let again = index(&again);
            assert!(
                holds(&again, &least) && holds(&most, &again),
                "P4: seed {seed}, cut at {at}, {fates:?}"
            );
            counts.image(&fates);
        }
    }
    report.source
}

/// Crashes and kills at seeded operations of one run.
pub(super) fn run(seed: u64) {
    let (last, mut random) = (operations(seed), Seeded::new(seed));
    let mut counts = Counts::default();
    (0..6).for_each(|round| check(seed, random.below(last), round % 2 == 0, 2, &mut counts));
    rounds(seed);
    let some = Effort {
        images: 1,
        every: 4,
    };
    in_closing(seed, &some, &mut counts);
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
    let mut disk = SimDisk::new(SimOptions::default());
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
    let last = operations(3);
    assert!(last > 200, "{last} operations are too few to show anything");
    everywhere(3, &ALL, &mut Counts::default());
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
fn an_end_in_order_cut_short_at_every_operation_loses_nothing_that_was_promised() {
    let mut counts = Counts::default();
    (60..66).for_each(|seed| in_closing(seed, &ALL, &mut counts));
    assert!(counts.crashes_in_closing > 60, "{counts:?}");
}

#[test]
fn recovery_cut_short_at_every_operation_ends_like_one_recovery() {
    (50..56).for_each(|seed| in_recovery(seed, &ALL, &mut Counts::default()));
}

#[test]
fn three_crashes_in_a_row_with_work_between_lose_nothing_that_was_promised() {
    (100..120).for_each(rounds);
}
