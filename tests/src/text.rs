//! The long real text that demo and tests prefill.
//!
//! Upstairs:   the demo, benches and tests.
//! Downstairs: `text/constitution.txt`, compiled in.
//!
//! Not here on purpose: tokens; how many there are depends on the model.

/// The Constitution of the United States with its amendments; see `text/README.md`.
pub const CONSTITUTION: &str = include_str!("text/constitution.txt");
