//! The map of a two-ended restore: one byte a block, claimed by whoever comes first.
//!
//! Upstairs:   the daemon claims blocks that it loads, the SDK those that its engine computes.
//! Downstairs: nothing. The bytes lie in a region for claims that both ends map.
//!
//! ```text
//!   byte 0       the gate: may the engine start to compute?      bytes 1..8   zero
//!   byte 8 + i   block i:
//!
//!                  daemon               daemon
//!       EMPTY ------------> LOADING ------------> READY
//!         |                    | daemon
//!         |  engine            v                engine
//!         |                 MISSED ------+
//!         +--> COMPUTING <---------------+    COMPUTING ------> COMPUTED
//! ```
//!
//! Every arrow is a compare-and-swap, so that of two who want a block one gets it. Neither end
//! believes the other more than that: a byte of no meaning reads as `COMPUTED`, a block that
//! nobody brings, and costs only the engine that wrote it.

/// Bytes before the first block's.
pub const HEAD: usize = 8;

/// Bytes of a map of so many blocks.
pub const fn map_len(blocks: usize) -> usize {
    blocks.saturating_add(HEAD)
}

/// Whether the engine may start to compute blocks that could be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Gate {
    /// Not decided yet.
    Closed = 0,
    /// It may.
    Open = 1,
}

impl Gate {
    /// Reads a byte. Whatever is not [`Open`](Self::Open) is closed.
    pub const fn from_byte(byte: u8) -> Self {
        match byte {
            1 => Self::Open,
            _ => Self::Closed,
        }
    }
}

/// Who has a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Claim {
    /// Nobody yet.
    Empty = 0,
    /// The daemon is loading it.
    Loading = 1,
    /// It is loaded; its event is on the way.
    Ready = 2,
    /// It cannot be loaded: the engine has to compute it.
    Missed = 3,
    /// The engine is computing it.
    Computing = 4,
    /// The engine has computed it.
    Computed = 5,
}

impl Claim {
    /// Reads a byte.
    pub const fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Empty,
            1 => Self::Loading,
            2 => Self::Ready,
            3 => Self::Missed,
            4 => Self::Computing,
            _ => Self::Computed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claim_reads_what_was_written_and_gives_up_on_anything_else() {
        let all = [
            Claim::Empty,
            Claim::Loading,
            Claim::Ready,
            Claim::Missed,
            Claim::Computing,
            Claim::Computed,
        ];
        for claim in all {
            assert_eq!(Claim::from_byte(claim as u8), claim);
        }
        assert_eq!(Claim::from_byte(77), Claim::Computed);
        assert_eq!(Gate::from_byte(Gate::Open as u8), Gate::Open);
        assert_eq!(Gate::from_byte(9), Gate::Closed);
    }
}
