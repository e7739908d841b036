//! What threads share, named once: `models/` compiles the same sources with shuttle's in its place.
//!
//! Upstairs:   the rooms that `models/` runs under many orders of events: `tier`, `region`.
//! Downstairs: the standard library.

pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
pub(crate) use std::sync::{Mutex, MutexGuard, RwLock};
