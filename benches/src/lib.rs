//! What measurements share: facts about the machine, rows and result files, a daemon to measure.
//!
//! Upstairs:   `kvtier-bench`, and the demo and the tests in `tests/`.
//! Downstairs: a terminal, result files, cargo, the daemon.
//!
//! Not here on purpose: nothing that measures. The suites are modules of the program.
#![forbid(unsafe_code)]

pub mod harness;
pub mod launch;
pub mod machine;
pub mod report;
