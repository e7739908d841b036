//! What threads share, named once: `models/` compiles the same sources with loom's in its place.
//!
//! Upstairs:   files that `models/` runs: `disk::rung`, `mem::runs`.
//! Downstairs: the standard library.

pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
pub(crate) use std::sync::{Mutex, MutexGuard};
