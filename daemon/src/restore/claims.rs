//! The daemon's end of a two-ended restore's map: which blocks it loads, and which the engine has.
//!
//! Upstairs:   `restore::run`; the server makes one from a message.
//! Downstairs: `shm`. What the bytes say is in `kvtier_proto::claims`.
//!
//! The other end can write anything at any time. So nothing of the daemon's depends on the map
//! but which blocks it spares itself: a lie costs only the engine that tells it.
//!
//! Invariants kept here
//!   K1  The map lies inside its region, whatever the message says.
//!   K2  A block is loaded only after its byte went from EMPTY to LOADING by our hand.

use std::sync::Arc;

use kvtier_proto::claims::{Claim, Gate, HEAD, map_len};

use crate::shm::SharedMemory;

/// The map of one restore.
#[derive(Debug, Clone)]
pub struct Claims {
    memory: Arc<SharedMemory>,
    at: usize,
    blocks: usize,
}

/// Why a message names no map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a map of {blocks} blocks takes {need} bytes; {length} at {offset} of {size} were named")]
pub struct BadMap {
    blocks: usize,
    need: usize,
    length: u64,
    offset: u64,
    size: usize,
}

impl Claims {
    /// The map of `blocks` blocks in `length` bytes at `offset` (K1). The client has zeroed it.
    pub fn new(
        memory: Arc<SharedMemory>,
        (offset, length): (u64, u64),
        blocks: usize,
    ) -> Result<Self, BadMap> {
        let (need, size) = (map_len(blocks), memory.len());
        let at = usize::try_from(offset).ok();
        let end = at.and_then(|at| at.checked_add(need));
        let inside = length == need as u64 && end.is_some_and(|end| end <= size);
        match at.filter(|_| inside) {
            Some(at) => Ok(Self { memory, at, blocks }),
            None => Err(BadMap {
                blocks,
                need,
                length,
                offset,
                size,
            }),
        }
    }

    /// Lets the engine compute, or not yet.
    pub fn set_gate(&self, gate: Gate) {
        self.memory.set_byte(self.at, gate as u8);
    }

    /// Takes a block to load it. False when the engine has it (K2).
    pub fn take(&self, index: usize) -> bool {
        self.swap(index, Claim::Empty, Claim::Loading)
    }

    /// A block that was taken, and perhaps given back, is there. False when the engine has it.
    pub fn ready(&self, index: usize) -> bool {
        self.swap(index, Claim::Loading, Claim::Ready)
            || self.swap(index, Claim::Empty, Claim::Ready)
    }

    /// A block will not be loaded: the engine has to compute it.
    pub fn missed(&self, index: usize) {
        let _ = self.swap(index, Claim::Loading, Claim::Missed)
            || self.swap(index, Claim::Empty, Claim::Missed);
    }

    /// A block that was taken is not loaded, or not soon: the engine may have it.
    pub fn give_back(&self, index: usize) {
        let _ = self.swap(index, Claim::Loading, Claim::Empty);
    }

    /// Who has a block now.
    pub fn of(&self, index: usize) -> Claim {
        match self.byte(index) {
            Some(at) => Claim::from_byte(self.memory.byte(at)),
            None => Claim::Computed,
        }
    }

    /// True when the engine computes a block, or has.
    pub fn is_engines(&self, index: usize) -> bool {
        matches!(self.of(index), Claim::Computing | Claim::Computed)
    }

    fn swap(&self, index: usize, from: Claim, to: Claim) -> bool {
        let byte = self.byte(index);
        byte.is_some_and(|at| self.memory.swap_byte(at, from as u8, to as u8))
    }

    fn byte(&self, index: usize) -> Option<usize> {
        (index < self.blocks).then_some(self.at + HEAD + index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> Arc<SharedMemory> {
        Arc::new(SharedMemory::create(4096).unwrap())
    }

    #[test]
    fn new_refuses_a_map_that_is_not_as_long_as_its_blocks_or_leaves_the_region() {
        let fits = [(0, 18), (4078, 18)];
        for place in fits {
            assert!(Claims::new(memory(), place, 10).is_ok(), "{place:?}");
        }
        let bad = [
            (0, 17),
            (0, 19),
            (4079, 18),
            (4096, 18),
            (u64::MAX, 18),
            (0, u64::MAX),
        ];
        for place in bad {
            let problem = Claims::new(memory(), place, 10).unwrap_err().to_string();
            assert!(problem.contains("10 blocks takes 18 bytes"), "{problem}");
        }
        assert!(Claims::new(memory(), (0, u64::MAX), usize::MAX).is_err());
    }

    // Goal: of two who want a block one gets it, and the other learns of it.
    #[test]
    fn take_loses_to_an_engine_that_came_first_and_keeps_out_one_that_comes_later() {
        let memory = memory();
        let claims = Claims::new(Arc::clone(&memory), (64, 13), 5).unwrap();
        let engine = |index: usize, from: Claim, to: Claim| {
            memory.swap_byte(64 + HEAD + index, from as u8, to as u8)
        };
        assert!(engine(0, Claim::Empty, Claim::Computing));
        assert!(!claims.take(0) && claims.is_engines(0));
        assert!(claims.take(1) && !engine(1, Claim::Empty, Claim::Computing));
        assert!(claims.ready(1) && !claims.ready(1));
        assert_eq!(claims.of(1), Claim::Ready);
        // It waited long enough, and takes over what is still loading.
        assert!(claims.take(2) && engine(2, Claim::Loading, Claim::Computing));
        assert!(!claims.ready(2) && claims.is_engines(2));
        assert!(claims.take(3));
        claims.give_back(3);
        assert!(claims.ready(3), "it came before the engine wanted it");
        assert_eq!(claims.of(3), Claim::Ready);
        claims.missed(4);
        assert!(!claims.take(4) && engine(4, Claim::Missed, Claim::Computing));
        assert!(!claims.take(5) && claims.is_engines(5), "outside");
    }
}
