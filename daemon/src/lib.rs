//! The daemon: one process per host that keeps attention KV and gives it back.
//!
//! Upstairs:   `bin/kvtierd.rs` (the daemon) and `bin/kvtier.rs` (its operator's command line).
//! Downstairs: `kvtier-store`, `kvtier-kernels`, `kvtier-proto`.
//!
//! Layers, each calling only those below it: server, session, tenant, restore, tier. Beside them
//! stands what every layer may use: blocks, configuration, logging, health and metrics.
#![deny(unsafe_code)]

pub mod block;
pub mod cli;
pub mod config;
#[doc(hidden)]
pub mod fuzzing;
#[cfg(test)]
mod golden;
pub mod health;
pub mod http;
mod keep;
pub mod log;
pub mod metrics;
mod planted;
pub mod process;
pub mod region;
pub mod restore;
pub mod server;
pub mod session;
#[allow(
    unsafe_code,
    reason = "a room of its own: it copies from memory that clients write"
)]
pub mod shm;
mod sync;
pub mod tenant;
pub mod tier;
