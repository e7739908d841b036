//! How a simulated disk is made and how it behaves.
//!
//! Upstairs:   `disk::sim` and the tests that open one.
//! Downstairs: nothing.

use super::Faults;

/// How a simulated disk is made.
#[derive(Debug, Clone)]
pub struct SimOptions {
    /// Decides order and faults.
    pub seed: u64,
    /// Most operations in flight.
    pub depth: usize,
    /// Alignment that operations must keep. Unit: bytes.
    pub align: usize,
    /// Room for files; `create` beyond it answers ENOSPC. Unit: bytes.
    pub space: u64,
    /// Probabilities.
    pub faults: Faults,
    /// The power goes when this many calls and operations have been taken.
    pub crash_at: Option<u64>,
    /// A misshapen operation is answered as a real lane answers it. Else it is a panic: nobody who
    /// knows what a disk promises makes one.
    pub refuses: bool,
}

impl Default for SimOptions {
    fn default() -> Self {
        let faults = Faults::default();
        Self {
            seed: 1,
            depth: 32,
            align: 512,
            space: u64::MAX,
            faults,
            crash_at: None,
            refuses: false,
        }
    }
}
