//! The campaign judged: every planted bug is found within a stated number of seeds, and without
//! one the same seeds find nothing.

use std::panic::{AssertUnwindSafe, catch_unwind};

use strum::IntoEnumIterator;

use super::*;
use crate::disk::sim::{Fault, Faults};
use crate::planted::{Bug, with};

/// Seeds within which every bug must be found.
const SEEDS: u64 = 40;

/// One seed of everything: no faults, crashes, kills, wipes, lost catalogs, every fault.
fn judge(seed: u64) {
    let mut counts = Counts::default();
    sound::run(seed, &mut counts);
    faulty::harmless(seed, &mut counts);
    lives::run(seed, &mut counts);
    crash::run(seed);
    faulty::honest(seed, &mut counts);
    faulty::half_read(seed);
    faulty::half_read_after_a_kill(seed);
    faulty::misread_opening(seed);
    lives::lost_header(seed);
    faulty::copies(seed, 0);
    faulty::copies(seed, 50_000);
    faulty::scrub_of_a_misreading_device(seed);
    let faults = Faults::all(8_000).with(Fault::SyncError, 15_000);
    drop(faulty::storm(seed, &faults, &mut counts));
}

fn found(bug: Option<Bug>, seed: u64) -> bool {
    with(bug, || {
        catch_unwind(AssertUnwindSafe(|| judge(seed))).is_err()
    })
}

#[test]
fn every_planted_bug_is_found_within_its_seeds_and_none_without_a_bug() {
    let (mut missed, mut table, mut last) = (Vec::new(), Vec::new(), 0);
    for bug in Bug::iter() {
        match (0..SEEDS).find(|seed| found(Some(bug), *seed)) {
            Some(seed) => {
                last = last.max(seed);
                table.push(format!("{bug:?} {}", seed + 1));
            }
            None => missed.push(bug),
        }
    }
    let table = table.join(", ");
    counts::tell(&format!("planted bugs, seeds until found: {table}"));
    assert!(missed.is_empty(), "the campaign is blind to {missed:?}");
    assert!(Bug::iter().count() >= 10);
    // Every seed that found something finds nothing where there is nothing.
    for seed in 0..=last {
        assert!(
            !found(None, seed),
            "seed {seed} finds a bug that is not there"
        );
    }
}
