//! Generated messages and services of `kvtier.v1`. Regenerate with
//! `cargo run -p kvtier-proto --example regenerate`; a test fails when this is not current.
//!
//! Upstairs:   `kvtierd::server` and `kvtier-client` turn these into domain types at the door.
//! Downstairs: `prost`, `tonic`.
#![allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::allow_attributes_without_reason,
    rustdoc::all,
    reason = "generated code"
)]

include!("generated/kvtier.v1.rs");
