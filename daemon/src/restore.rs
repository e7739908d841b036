//! Restores: from a list of keys to leased blocks, as one run with a plan.
//!
//! Upstairs:   the server's Restore stream and GetInline.
//! Downstairs: `plan` decides, `run` acts, `tier` has the blocks.

pub mod claims;
pub mod engines;
pub mod plan;
pub mod run;
