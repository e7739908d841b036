//! The SDK against a small daemon of its own that can be told to misbehave.
//!
//! Upstairs:   `cargo test -p kvtier-client`.
//! Downstairs: `fake`, the daemon; the public face of the SDK and nothing else of it.
//!
//! Not here on purpose
//!   No real daemon: the end-to-end tests of the workspace have that.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is the failure report"
)]

mod capture;
mod fake;
mod inline;
mod restores;
mod saves;
mod sessions;
mod two_ended;
