//! Every fault at once: whatever is found is right, and when the faults end the store gets well.

use strum::IntoEnumIterator;

use super::*;
use crate::disk::sim::{Fault, Faults, SimOptions};

fn failing(seed: u64, faults: &Faults) -> SimDisk {
    SimDisk::new(SimOptions {
        faults: faults.clone(),
        ..device(seed)
    })
}

/// One run with `faults`, two crashes, and recovery under the same faults.
pub(super) fn storm(seed: u64, faults: &Faults, counts: &mut Counts) -> Option<Run> {
    let mut run = Run::new(seed, failing(seed, faults))?;
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
        .with(Fault::WriteError, 8_000)
        .with(Fault::WriteNoSpace, 4_000)
        .with(Fault::NoSpace, 100_000)
        .with(Fault::SyncError, 8_000)
        .with(Fault::MisdirectedRead, 10_000)
        .with(Fault::StaleRead, 10_000)
        .with(Fault::FlipOnRead, 10_000);
    let Some(mut run) = Run::new(seed, failing(seed, &faults)) else {
        return;
    };
    run.act(500);
    counts.disk(run.store.disk());
    counts.refused_as_damaged += std::mem::take(&mut run.model.damage);
    let mut run = run
        .reopen(|disk| disk.crash(seed))
        .expect("no faults any more");
    run.read_all();
    gets_well(&mut run, seed);
    assert_eq!(run.model.damage, 0, "seed {seed}");
    counts.add(&run);
}

/// P6: with the faults off, and behind a new opening, everything works again.
fn gets_well(run: &mut Run, seed: u64) {
    assert_eq!(run.store.state(), DeviceState::Healthy, "P6: seed {seed}");
    assert!(run.is_sound());
    let (hits, acked) = (run.model.hits, run.model.acked);
    run.act(300);
    run.rest();
    let acked = run.model.acked - acked;
    assert!(acked > 30, "P6: seed {seed}: {acked} of some 130 puts");
    run.read_all();
    assert!(run.model.hits - hits >= run.model.durable.len() as u64);
}

/// Many pinned blocks, on a sound device or on one that misreads: what moved is what was put.
pub(super) fn copies(seed: u64, misreads: u32) {
    let faults = Faults::default().with(Fault::FlipOnRead, misreads);
    let mut run = Run::new(seed, failing(seed, &faults)).unwrap();
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

/// A scrub over a device that misreads for a while: what reads well the second time stays. True
/// when something was misread.
pub(super) fn scrub_of_a_misreading_device(seed: u64) -> bool {
    let mut run = Run::new(seed, SimDisk::new(device(seed))).unwrap();
    run.act(300);
    run.rest();
    let durable = run.model.durable.len();
    let misread = Faults::default().with(Fault::FlipOnRead, 1_000_000);
    run.store.disk_mut().set_faults(misread);
    run.store.scrub(SCRUB_RATE);
    while run.store.disk().fired().times(Fault::FlipOnRead) == 0
        && run.store.scrub_progress().is_some()
    {
        run.step();
    }
    run.store.disk_mut().set_faults(Faults::default());
    while run.store.scrub_progress().is_some() {
        run.step();
    }
    run.rest();
    assert_eq!(run.model.scrub_bad, 0, "seed {seed}: nothing is damaged");
    run.read_all();
    assert_eq!((run.model.durable.len(), run.model.damage), (durable, 0));
    run.store.disk().fired().times(Fault::FlipOnRead) > 0
}

/// A run over a device that is slow and moves pieces, and makes no error.
pub(super) fn harmless(seed: u64, counts: &mut Counts) {
    let faults = Faults::default()
        .with(Fault::Short, 300_000)
        .with(Fault::Interrupted, 200_000)
        .with(Fault::Slow, 600_000);
    let mut run = Run::new(seed, failing(seed, &faults)).unwrap();
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
        gets_well(&mut run, seed);
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
    let mut run = Run::new(seed, SimDisk::new(device(seed))).unwrap();
    run.act(300);
    run.rest();
    let mut failing = run.store.disk().crash(seed);
    failing.set_faults(Faults::default().with(Fault::ReadError, 350_000));
    let Some(mut half) = run.fork(failing) else {
        return false;
    };
    let degraded = half.index().len() < run.index().len();
    half.store.disk_mut().set_faults(Faults::default());
    // That life has a little work, as long as there is room in what it has read, and ends in order.
    let mut work = 0;
    while work < 40 && half.has_victims() {
        half.put();
        half.rest();
        work += 1;
    }
    let mut last = half.close(seed * 2);
    last.read_all();
    assert_eq!(last.model.damage, 0, "seed {seed}");
    degraded
}

/// The writer dies, the next one cannot read everything that it left, and says of what it found
/// that it is durable; then the power goes.
pub(super) fn half_read_after_a_kill(seed: u64) {
    let mut run = Run::new(seed, SimDisk::new(device(seed))).unwrap();
    for round in 0..3 {
        run.act(80);
        let mut failing = run.store.disk().killed(seed ^ round);
        failing.set_faults(Faults::default().with(Fault::ReadError, 150_000));
        let Some(mut half) = run.fork(failing) else {
            continue;
        };
        half.store.disk_mut().set_faults(Faults::default());
        half.promise_what_is_here();
        let mut last = half
            .reopen(|disk| disk.crash(seed ^ round))
            .expect("a store");
        last.read_all();
        assert_eq!(last.model.damage, 0, "seed {seed}");
    }
}

/// A device that misreads while it is recovered, and says of what was found that it is durable: all
/// of that, and all that was promised before, is found by the next life.
pub(super) fn misread_opening(seed: u64) -> u64 {
    let mut run = Run::new(seed, SimDisk::new(device(seed))).unwrap();
    let faults = Faults::default()
        .with(Fault::FlipOnRead, 80_000)
        .with(Fault::MisdirectedRead, 40_000);
    let mut fired = 0;
    for round in 0..4 {
        run.act(120);
        let mut misreading = run.store.disk().crash(seed ^ round);
        misreading.set_faults(faults.clone());
        let Some(mut misread) = run.fork(misreading) else {
            continue;
        };
        let disk = misread.store.disk_mut();
        fired += disk.fired().times(Fault::FlipOnRead);
        fired += disk.fired().times(Fault::MisdirectedRead);
        disk.set_faults(Faults::default());
        misread.promise_what_is_here();
        let mut last = match round % 2 {
            0 => misread.close(seed ^ round),
            _ => misread
                .reopen(|disk| disk.crash(seed ^ round))
                .expect("a store"),
        };
        last.read_all();
        assert_eq!(last.model.damage, 0, "seed {seed}, round {round}");
    }
    fired
}

#[test]
fn an_opening_that_misreads_forgets_nothing_and_promises_nothing_that_is_not_there() {
    let fired: u64 = (0..40).map(misread_opening).sum();
    assert!(fired > 100, "{fired} misreads show too little");
}

#[test]
fn what_a_life_behind_a_kill_found_survives_the_next_power_cut() {
    (0..40).for_each(half_read_after_a_kill);
}

#[test]
fn a_scrub_condemns_nothing_that_was_misread_once() {
    let misread = (0..20).filter(|seed| scrub_of_a_misreading_device(*seed));
    assert!(misread.count() > 15);
}

#[test]
fn pinned_blocks_move_with_their_bytes_and_their_pins() {
    (0..20).for_each(|seed| copies(seed, 0));
    (0..20).for_each(|seed| copies(seed, 50_000));
}

#[test]
fn a_recovery_over_failing_reads_forgets_nothing_for_good() {
    let degraded = (0..80).filter(|seed| half_read(*seed)).count();
    assert!(
        degraded > 10,
        "{degraded} of 80 recoveries missed something"
    );
}
