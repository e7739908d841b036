//! What every plan promises, over random requests, brute force, linear programs and closed forms.
//!
//! Upstairs:   `cargo test`.
//! Downstairs: `plan`; `cases` makes requests.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a panic is the failure report, and test numbers are small"
)]

mod bounds;
mod brute;
mod cases;
mod forms;
mod promises;
