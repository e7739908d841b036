//! The storage engine: from encoded blocks down to the device.
//!
//! Upstairs:   `kvtierd::tier` owns one store per device, on a thread of its own.
//! Downstairs: files, through `disk::Disk`.
//!
//! Not here on purpose: no async runtime, no clock, no RPC, no tenant, no codec.
#![deny(missing_docs)]
#![deny(unsafe_code)]

pub mod disk;
#[allow(
    unsafe_code,
    reason = "a named room: makes mappings and hands out slices of them"
)]
pub mod mem;
