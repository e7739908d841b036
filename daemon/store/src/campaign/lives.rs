//! Many lives of one store, each ended in another way, its catalog spoiled in between.
//!
//! P7 in full: the index that a catalog gives is the one that the segments give, and a catalog
//! that is not what the last end in order left is not believed.

use super::catalog::Spoil;
use super::*;
use crate::disk::sim::SimOptions;

/// Six lives of the store of `seed`.
pub(super) fn run(seed: u64, counts: &mut Counts) {
    let options = SimOptions {
        seed,
        ..SimOptions::default()
    };
    let mut run = Run::new(seed, SimDisk::new(options)).unwrap();
    for life in 0..6 {
        run.act(120);
        let gave_up = run.gave_up;
        let how = run.random.below(6);
        run = match how {
            0 => run.reopen(|disk| disk.crash(seed ^ life)).unwrap(),
            1 => {
                let mut next = run.reopen(|disk| disk.killed(seed ^ life)).unwrap();
                next.read_all();
                next.promise_what_is_here();
                next
            }
            _ => run.close(seed ^ life),
        };
        *counts.catalogs.entry(run.spoil.into()).or_default() += 1;
        judge(&mut run, how > 1, gave_up, seed);
    }
    counts.add(&run);
}

/// The index of the present life against the one that the segments alone give. The life before
/// ended `in_order`, and perhaps `gave_up` its catalog.
fn judge(run: &mut Run, in_order: bool, gave_up: bool, seed: u64) {
    let context = format!("seed {seed}, {:?}, {:?}", run.spoil, run.report.source);
    let trusted = run.report.source == IndexSource::Catalog;
    assert!(in_order || !trusted, "P7: trusted after a crash: {context}");
    if in_order && run.spoil == Spoil::Intact && !gave_up {
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
