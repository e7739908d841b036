//! Every fault at once: whatever is found is right, and when the faults end the store gets well.

use strum::IntoEnumIterator;

use super::*;
use crate::disk::sim::{Fault, Faults, SimOptions};

/// One run with `faults`, two crashes, and recovery under the same faults.
pub(super) fn storm(seed: u64, faults: &Faults, counts: &mut Counts) -> Option<Run> {
    let options = SimOptions {
        seed,
        faults: faults.clone(),
        ..SimOptions::default()
    };
    let mut run = Run::new(seed, SimDisk::new(options))?;
    for round in 0..3 {
        run.act(300);
        run.rest();
        counts.disk(run.store.disk());
        // Damage may take what was promised; that is a miss, not a broken promise.
        run.model.durable.clear();
        run = run.reopen(|disk| {
            let mut after = disk.crash(seed + round);
            after.set_faults(faults.clone());
            after
        })?;
    }
    counts.add(&run);
    Some(run)
}

/// A device that fails and misreads, and keeps what it said that it has: when it is well again,
/// everything promised is there.
pub(super) fn honest(seed: u64, counts: &mut Counts) {
    let faults = Faults::default()
        .with(Fault::Short, 50_000)
        .with(Fault::Interrupted, 20_000)
        .with(Fault::Slow, 100_000)
        .with(Fault::ReadError, 20_000)
        .with(Fault::WriteError, 10_000)
        .with(Fault::NoSpace, 100_000)
        .with(Fault::SyncError, 8_000)
        .with(Fault::MisdirectedRead, 10_000)
        .with(Fault::StaleRead, 10_000)
        .with(Fault::FlipOnRead, 10_000);
    let options = SimOptions {
        seed,
        faults,
        ..SimOptions::default()
    };
    let Some(mut run) = Run::new(seed, SimDisk::new(options)) else {
        return;
    };
    run.act(500);
    counts.add(&run);
    run.model.damage = 0;
    let mut run = run
        .reopen(|disk| disk.crash(seed))
        .expect("no faults any more");
    assert_eq!(run.store.state(), DeviceState::Healthy, "P6: seed {seed}");
    run.read_all();
    assert_eq!(run.model.damage, 0, "seed {seed}");
    counts.hits += run.model.hits;
}

/// Many pinned blocks on a device that misreads: what moved is what was put.
pub(super) fn copies(seed: u64) {
    let faults = Faults::default().with(Fault::FlipOnRead, 50_000);
    let options = SimOptions {
        seed,
        faults,
        ..SimOptions::default()
    };
    let mut run = Run::new(seed, SimDisk::new(options)).unwrap();
    for _ in 0..10 {
        run.act(40);
        (0..10).for_each(|_| run.pin());
    }
    run.rest();
    run.model.damage = 0;
    let mut run = run.reopen(|disk| disk.crash(seed)).expect("a store");
    run.read_all();
    assert_eq!(run.model.damage, 0, "seed {seed}");
}

/// A run over a device that is slow and moves pieces, and makes no error.
pub(super) fn harmless(seed: u64, counts: &mut Counts) {
    let faults = Faults::default()
        .with(Fault::Short, 300_000)
        .with(Fault::Interrupted, 200_000)
        .with(Fault::Slow, 600_000);
    let options = SimOptions {
        seed,
        faults,
        ..SimOptions::default()
    };
    let mut run = Run::new(seed, SimDisk::new(options)).unwrap();
    run.act(900);
    run.rest();
    run.read_all();
    assert_eq!(run.model.damage, 0, "seed {seed}");
    let fine = [DeviceState::Healthy, DeviceState::Slow];
    assert!(fine.contains(&run.store.state()));
    counts.add(&run);
}

#[test]
fn under_every_fault_at_once_no_hit_is_wrong_and_the_store_gets_well() {
    let mut counts = Counts::default();
    let (mut hits, mut damage, mut scrub_bad, mut opened) = (0, 0, 0, 0);
    // Syncs and creates are rarer than reads, so they fail more often when they happen.
    let faults = Faults::all(8_000)
        .with(Fault::NoSpace, 60_000)
        .with(Fault::SyncError, 15_000);
    for seed in 0..60 {
        let Some(mut run) = storm(seed, &faults, &mut counts) else {
            continue;
        };
        opened += 1;
        scrub_bad += run.model.scrub_bad;
        run.store.disk_mut().set_faults(Faults::default());
        run.rest();
        run.model.durable.clear();
        let mut run = run
            .reopen(|disk| disk.restart(seed))
            .expect("no faults any more");
        assert_eq!(run.store.state(), DeviceState::Healthy, "P6: seed {seed}");
        run.act(300);
        run.rest();
        run.read_all();
        assert!(run.model.acked > 0, "P6: seed {seed}");
        (hits, damage) = (hits + run.model.hits, damage + run.model.damage);
    }
    assert!(opened >= 40, "only {opened} of 60 stores could be opened");
    assert!(
        hits > 1000 && damage > 10,
        "{hits} hits and {damage} refusals show too little"
    );
    assert!(scrub_bad > 0, "the scrub found nothing of it");
    for fault in Fault::iter() {
        let name: &str = fault.into();
        assert!(counts.faults[name] > 0, "{name} never happened");
    }
}

#[test]
fn each_fault_alone_leaves_right_bytes_or_a_miss() {
    for fault in Fault::iter() {
        let rare = matches!(fault, Fault::NoSpace | Fault::SyncError);
        let faults = Faults::default().with(fault, if rare { 150_000 } else { 30_000 });
        let mut counts = Counts::default();
        let hits: u64 = (0..6)
            .filter_map(|seed| storm(seed, &faults, &mut counts))
            .map(|run| run.model.hits)
            .sum();
        let name: &str = fault.into();
        assert!(counts.faults[name] > 0, "{name} never happened");
        assert!(hits > 0, "{name}: everything missed");
    }
}

// Short counts, interruptions and delays are no errors: nothing may be lost by them.
#[test]
fn harmless_faults_cost_no_promise() {
    (0..10).for_each(|seed| harmless(seed, &mut Counts::default()));
}

// Goal: errors and wrong reads cost a miss now and nothing later.
// Method: everything but lies about writes; then a power cut, and a device that is well.
#[test]
fn a_device_that_keeps_what_it_has_loses_nothing_that_was_promised() {
    let mut counts = Counts::default();
    (0..60).for_each(|seed| honest(seed, &mut counts));
    assert!(counts.hits > 1000 && counts.acknowledged > 1000);
}

#[test]
fn the_same_seed_gives_the_same_faults_and_the_same_run_under_them() {
    let fingerprint = |seed| {
        let mut counts = Counts::default();
        let run = storm(seed, &Faults::all(6_000), &mut counts);
        let end = run.map(|mut run| (run.random.draw(), run.index(), run.model.hits));
        (serde_json::to_string(&counts).unwrap(), end)
    };
    for seed in 0..6 {
        assert_eq!(fingerprint(seed), fingerprint(seed), "seed {seed}");
    }
    assert_ne!(fingerprint(1), fingerprint(2));
}

/// A device that fails while it is recovered: what it does not deliver is only absent until it
/// does. True when something was absent.
pub(super) fn half_read(seed: u64) -> bool {
    let options = SimOptions {
        seed,
        ..SimOptions::default()
    };
    let mut run = Run::new(seed, SimDisk::new(options)).unwrap();
    run.act(300);
    run.rest();
    let mut failing = run.store.disk().crash(seed);
    failing.set_faults(Faults::default().with(Fault::ReadError, 350_000));
    let Some(mut half) = run.fork(failing) else {
        return false;
    };
    let degraded = half.index().len() < run.index().len();
    half.store.disk_mut().set_faults(Faults::default());
    // That life ends in order, and nothing was put in it.
    let mut last = half.close(seed * 2);
    last.read_all();
    assert_eq!(last.model.damage, 0, "seed {seed}");
    degraded
}

#[test]
fn a_recovery_over_failing_reads_forgets_nothing_for_good() {
    let degraded = (0..80).filter(|seed| half_read(*seed)).count();
    assert!(
        degraded > 10,
        "{degraded} of 80 recoveries missed something"
    );
}
