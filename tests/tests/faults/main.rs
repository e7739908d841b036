//! Crashes, damage and devices that fail, on the real daemon: acknowledged is kept, and never a
//! wrong byte.
//!
//! Upstairs:   `cargo test`.
//! Downstairs: `kvtier_tests::harness`.
//!
//! Longer campaigns: `KVTIER_TEST_ROUNDS` (kill -9), `KVTIER_TEST_POWER_CUTS`,
//! `KVTIER_TEST_NOISE_ROUNDS`.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is the failure report"
)]

mod damage;
mod device;
mod disks;
mod files;
mod kill;
mod lane;
mod power;

use std::time::Duration;

/// Longest time of one test. They take a few seconds; a loaded machine takes more.
const LIMIT: Duration = Duration::from_secs(120);
