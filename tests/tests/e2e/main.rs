//! End-to-end tests on the real daemon: what it promises to engines, tenants and operators.
//!
//! Upstairs:   `cargo test`.
//! Downstairs: `kvtier_tests::harness`; every test starts daemons of its own.
//!
//! One binary with a module a theme: linking is what costs time here. Crashes and damage are in
//! `tests/faults`.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is the failure report"
)]

mod clients;
mod driven;
mod engine_region;
mod hidden;
mod identity;
mod model;
mod operate;
mod quality;
mod requests;
mod restores;
mod room;
mod roundtrip;
mod slots;
mod together;
mod two_ended;

use std::time::Duration;

/// Longest time of one test. They take a few seconds; a loaded machine takes more.
const LIMIT: Duration = Duration::from_secs(120);
