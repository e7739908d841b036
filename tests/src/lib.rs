//! The judge: everything that decides whether kvtier keeps its promises.
//!
//! Upstairs:   the demo, the end-to-end tests and the benches.
//! Downstairs: all packages of the workspace.
//!
//! Not here on purpose: nothing the daemon or the SDK needs; this package is never shipped.
#![forbid(unsafe_code)]

pub mod demo;
pub mod engine;
pub mod harness;
pub mod judge;
pub mod text;
pub mod weights;
