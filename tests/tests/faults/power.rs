//! Real power cuts: the file system stops in the middle and forgets what was not made durable.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness, in private mounts; root only. `kvtier-bench crash` runs the same
//!             campaign for longer.

use kvtier_tests::harness::child;
use kvtier_tests::harness::mounts::loop_args;
use kvtier_tests::harness::power::{IMAGE_MIB, campaign};
use kvtier_tests::harness::rounds;

use super::LIMIT;
use super::device::{in_private_mounts, told_and_mounted};

/// The third one follows an end in order.
const CUTS: u32 = 3;

#[test]
fn a_power_cut_loses_no_durable_block() {
    let rounds = rounds("KVTIER_TEST_POWER_CUTS", CUTS);
    in_private_mounts("power::child_power_cut", LIMIT + LIMIT / 4 * rounds);
}

#[test]
#[ignore = "a role that another test starts"]
fn child_power_cut() {
    let Some(at) = told_and_mounted(|scratch| loop_args(scratch, IMAGE_MIB)) else {
        return;
    };
    let rounds = rounds("KVTIER_TEST_POWER_CUTS", CUTS);
    let seed = u64::from(std::process::id());
    child::say(&format!("seed {seed}, {rounds} power cuts"));
    match campaign(rounds, seed, &at, &mut child::say) {
        Err(why) => child::say(&format!(
            "SKIPPED a_power_cut_loses_no_durable_block: {why}"
        )),
        Ok(tally) => {
            child::say(&format!("power cuts: {tally:?}"));
            assert!(tally.holds(), "seed {seed}: {tally:?}");
            assert!(tally.control_lost > 0 || !cfg!(debug_assertions));
        }
    }
}
