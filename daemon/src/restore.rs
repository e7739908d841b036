//! Restores: from a list of keys to leased blocks, as one run with a plan.
//!
//! Upstairs:   the server's Restore stream and GetInline.
//! Downstairs: `plan` and `decide` decide, `run` acts, `tier` has the blocks.

pub mod claims;
pub mod decide;
pub mod engines;
pub mod history;
pub mod outlook;
pub mod plan;
pub mod rates;
pub mod run;

/// What was learned of engines and devices, for plans.
#[derive(Debug, Default)]
pub struct Learned {
    /// How fast engines are.
    pub engines: engines::Engines,
    /// How fast blocks come.
    pub rates: rates::Rates,
    /// What came of the last two-ended restores.
    pub history: history::History,
}
