//! What a test has beside the daemon under test: a limit, children in other roles, raw calls.
//!
//! Upstairs:   the end-to-end tests; every test has daemons of its own, in folders of its own.
//! Downstairs: `kvtier_benches::harness`, which the suite `crash` shares; the SDK.
//!
//! Invariants kept here
//!   H1  Nothing hangs: every wait has a limit and fails with a sentence.
//!   H2  No process outlives its test: a child dies with the value that started it.
//!
//! Not here on purpose
//!   No result type: a test that cannot go on panics with what it knows.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is the failure report of a test"
)]

pub mod child;
pub mod raw;

use std::io::Write as _;
use std::time::{Duration, Instant};

pub use kvtier_benches::harness::{
    Daemon, Options, Scrape, binary, blocks, crash, daemon, journal, kill, mounts, options, power,
    scrape,
};

/// Runs a test on a runtime of its own and fails it when it takes longer than `limit`.
pub fn run<T>(limit: Duration, test: impl Future<Output = T>) -> T {
    // A build of the daemon, where one is due, is not the test's time; nor a child's to make.
    if child::role().is_none() {
        binary::kvtierd();
    }
    kvtier_benches::harness::limited(limit, test)
}

/// Asks until `check` is content. Fails with its last complaint after `limit`.
pub async fn eventually(limit: Duration, mut check: impl AsyncFnMut() -> Result<(), String>) {
    let begin = Instant::now();
    loop {
        match check().await {
            Ok(()) => return,
            Err(complaint) if begin.elapsed() > limit => {
                panic!("after {limit:?} still: {complaint}")
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

/// Says that a test could not run here, so that a green line never means that nothing ran.
pub fn skip(test: &str, why: &str) {
    tell(&format!("SKIPPED {test}: {why}"));
}

/// Says something that is shown also when the test passes.
pub fn tell(text: &str) {
    // The test runner keeps what the print macros write to itself.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// True when this process may do what only root may.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A count from the environment, for campaigns longer than the suite's.
pub fn rounds(variable: &str, usual: u32) -> u32 {
    match std::env::var(variable) {
        Err(_) => usual,
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is {text:?}; accepted: a whole number")),
    }
}
