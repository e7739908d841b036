//! Every fault at once: whatever is found is right, and when the faults end the store gets well.

use strum::IntoEnumIterator;

use super::*;
use crate::disk::sim::{Fault, Faults, Fired, SimOptions};

/// One run with `faults`, two crashes, and recovery under the same faults.
pub(super) fn storm(seed: u64, faults: &Faults, fired: &mut Fired) -> Option<Run> {
    let options = SimOptions {
        seed,
        faults: faults.clone(),
        ..SimOptions::default()
    };
    let mut run = Run::new(seed, SimDisk::new(options))?;
    for round in 0..3 {
        run.act(300);
        run.rest();
        fired.add(run.store.disk().fired());
        // Damage may take what was promised; that is a miss, not a broken promise.
        run.model.durable.clear();
        run = run.reopen(|disk| {
            let mut after = disk.crash(seed + round);
            after.set_faults(faults.clone());
            after
        })?;
        fired.add(run.store.disk().fired());
    }
    Some(run)
}

#[test]
fn under_every_fault_at_once_no_hit_is_wrong_and_the_store_gets_well() {
    let mut fired = Fired::default();
    let (mut hits, mut damage, mut opened) = (0, 0, 0);
    // Syncs and creates are rarer than reads, so they fail more often when they happen.
    let faults = Faults::all(8_000)
        .with(Fault::NoSpace, 60_000)
        .with(Fault::SyncError, 15_000);
    for seed in 0..60 {
        let Some(mut run) = storm(seed, &faults, &mut fired) else {
            continue;
        };
        opened += 1;
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
    for fault in Fault::iter() {
        assert!(fired.times(fault) > 0, "{fault:?} never happened");
    }
}

#[test]
fn each_fault_alone_leaves_right_bytes_or_a_miss() {
    for fault in Fault::iter() {
        let rare = matches!(fault, Fault::NoSpace | Fault::SyncError);
        let faults = Faults::default().with(fault, if rare { 150_000 } else { 30_000 });
        let mut fired = Fired::default();
        let hits: u64 = (0..6)
            .filter_map(|seed| storm(seed, &faults, &mut fired))
            .map(|run| run.model.hits)
            .sum();
        assert!(fired.times(fault) > 0, "{fault:?} never happened");
        assert!(hits > 0, "{fault:?}: everything missed");
    }
}

/// A run over a device that is slow and moves pieces, and makes no error.
pub(super) fn harmless(seed: u64) {
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
    assert_eq!(run.store.state(), DeviceState::Healthy);
}

// Short counts, interruptions and delays are no errors: nothing may be lost by them.
#[test]
fn harmless_faults_cost_no_promise() {
    (0..10).for_each(harmless);
}
