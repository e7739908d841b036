//! Many lives of one store, each ended in another way, its catalog spoiled in between.
//!
//! P7 in full: the index that a catalog gives is the one that the segments give, and a catalog
//! that is not what the last end in order left is not believed.

use super::catalog::Spoil;
use super::life::found_after_end;
use super::*;
use crate::format::segment::segment_name;

/// Most operations of an end in order before its power goes: more than it has, now and then.
const OPERATIONS_OF_AN_END: u64 = 60;

/// How the life before ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    Cut,
    /// While it ended in order: from some operation on its catalog may be trusted.
    HalfInOrder,
    InOrder {
        /// The catalog failed or was deleted while it was in use.
        gave_up: bool,
    },
}

/// Six lives of the store of `seed`.
pub(super) fn run(seed: u64, counts: &mut Counts) {
    let mut run = Run::new(seed, SimDisk::new(device(seed))).unwrap();
    for life in 0..6 {
        run.act(120);
        let gave_up = run.gave_up;
        let how = run.random.below(6);
        let salt = seed ^ life;
        let ended;
        (run, ended) = match how {
            0 => {
                counts.disk(run.store.disk());
                (run.reopen(|disk| disk.crash(salt)).unwrap(), Ended::Cut)
            }
            1 => {
                counts.disk(run.store.disk());
                let mut next = run.reopen(|disk| disk.killed(salt)).unwrap();
                next.read_all();
                next.promise_what_is_here();
                (next, Ended::Cut)
            }
            2 => {
                let after = run.random.below(OPERATIONS_OF_AN_END);
                let (disk, past) = run.end(Some(after));
                counts.disk(&disk);
                let next = Run::open(disk.crash(salt), past).unwrap();
                (next, Ended::HalfInOrder)
            }
            _ => {
                let (disk, past) = run.end(None);
                counts.disk(&disk);
                let next = Run::open(found_after_end(&disk, salt), past).unwrap();
                (next, Ended::InOrder { gave_up })
            }
        };
        *counts.catalogs.entry(run.spoil.into()).or_default() += 1;
        judge(&mut run, ended, seed);
    }
    counts.add(&run);
}

/// Lives behind a header that was lost for good: every one knows what the last one knew.
pub(super) fn lost_header(seed: u64) {
    let mut run = Run::new(seed, SimDisk::new(device(seed))).unwrap();
    run.act(500);
    run.rest();
    let active = run.store.active();
    let some: Vec<u32> = run.store.segments.iter().map(|one| one.number).collect();
    let some = some[run.random.below(some.len() as u64) as usize];
    let lost = segment_name(active.filter(|_| !seed.is_multiple_of(4)).unwrap_or(some));
    run = run
        .reopen(|disk| {
            let mut after = disk.crash(seed);
            after.content(&lost).unwrap()[..4096].fill(0);
            after.restart(seed)
        })
        .unwrap();
    for life in 0..3 {
        run.read_all();
        run.promise_what_is_here();
        assert_eq!(run.model.damage, 0, "seed {seed}, life {life}");
        run.act(20);
        run = run.close(seed ^ life);
    }
    run.read_all();
    assert_eq!(run.model.damage, 0, "seed {seed}");
}

#[test]
fn a_lost_header_costs_no_promise_in_any_later_life() {
    (0..20).for_each(lost_header);
}

/// The index of the present life against the one that the segments alone give.
pub(super) fn judge(run: &mut Run, ended: Ended, seed: u64) {
    let context = format!("seed {seed}, {:?}, {:?}", run.spoil, run.report.source);
    let trusted = run.report.source == IndexSource::Catalog;
    let crashed = ended == Ended::Cut;
    assert!(!crashed || !trusted, "P7: trusted after a crash: {context}");
    if ended == (Ended::InOrder { gave_up: false }) && run.spoil == Spoil::Intact {
        assert!(trusted, "P7: a whole catalog was not trusted: {context}");
    }
    let disk = run.store.disk().restart(seed);
    let (rebuilt, _) = Store::open(disk, options(), None, &mut |_| {}).unwrap();
    let rebuilt: BTreeMap<_, _> = rebuilt
        .blocks()
        .map(|one| ((one.namespace, one.key), one.place))
        .collect();
    for (name, place) in run.index() {
        assert_eq!(rebuilt.get(&name), Some(&place), "P7: {context}");
    }
    run.read_all();
    assert_eq!(run.model.damage, 0, "{context}");
}

#[test]
fn whatever_the_catalog_comes_back_as_nothing_durable_is_lost() {
    let mut counts = Counts::default();
    (0..40).for_each(|seed| run(seed, &mut counts));
    for spoil in <Spoil as strum::IntoEnumIterator>::iter() {
        let name: &str = spoil.into();
        assert!(counts.catalogs.contains_key(name), "{name} never happened");
    }
}
