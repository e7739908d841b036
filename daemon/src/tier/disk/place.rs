//! Which device a block belongs to: rendezvous hashing, weighted by capacity. A pure function.
//!
//! Upstairs:   `DiskTier` asks for the owner of a block, and for who comes after it.
//! Downstairs: nothing.
//!
//! Every device draws a number for the block from the block's name and its own identity, and the
//! highest one owns it. A device that joins takes its share from all the others and moves nothing
//! between them; when one leaves, its blocks go to whoever drew the next number.
//!
//! The identity is the store's own: it is kept on the device, so that neither the order in the
//! configuration nor the path matters, and it is secret, so that no tenant can make up keys that
//! all belong to one device.
//!
//! Not here on purpose: no word on whether a device works. A block's owner is the same while the
//! owner is away, and has it again when it comes back.

use kvtier_proto::{BlockKey, Bytes};
use kvtier_store::StoreId;

/// What a device draws with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Share {
    seed: [u64; 2],
    weight: f64,
}

impl Share {
    /// The share of the store `id` with room for `capacity`.
    pub(super) fn new(id: StoreId, capacity: Bytes) -> Self {
        let word = |at: usize| word(&id.0, at);
        Self {
            seed: [word(0), word(1)],
            weight: capacity.get() as f64,
        }
    }

    /// The number that this device draws for a block: exponentially distributed with the device's
    /// weight as its rate, inverted, so that each is the highest as often as its weight says.
    fn draw(&self, key: &BlockKey) -> f64 {
        let [first, last] = self.seed;
        let words = (0..4).map(|at| word(key.as_bytes(), at));
        let hash = mixed(words.fold(first, |hash, word| mixed(hash ^ word)) ^ last);
        // 52 bits and a half: never 0, never 1.
        let uniform = ((hash >> 12) as f64 + 0.5) / (1u64 << 52) as f64;
        self.weight / -uniform.ln()
    }
}

/// Positions of the devices in the order in which they are to have the block. One without a share
/// is not among them.
pub(super) fn order(key: &BlockKey, shares: &[Option<Share>]) -> Vec<usize> {
    let drawn = shares.iter().enumerate();
    let drawn = drawn.filter_map(|(at, share)| share.as_ref().map(|one| (one.draw(key), at)));
    let mut drawn: Vec<(f64, usize)> = drawn.collect();
    drawn.sort_by(|(one, _), (other, _)| other.total_cmp(one));
    drawn.into_iter().map(|(_, at)| at).collect()
}

/// Position of the device that the block belongs to: the first of [`order`].
pub(super) fn owner(key: &BlockKey, shares: &[Option<Share>]) -> Option<usize> {
    let mut best: Option<(f64, usize)> = None;
    for (at, share) in shares.iter().enumerate() {
        let Some(share) = share else { continue };
        let drawn = share.draw(key);
        if best.is_none_or(|(highest, _)| drawn > highest) {
            best = Some((drawn, at));
        }
    }
    best.map(|(_, at)| at)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let bytes = bytes.get(8 * at..8 * at + 8);
    bytes.map_or(0, |bytes| {
        bytes
            .iter()
            .rev()
            .fold(0, |word, byte| (word << 8) | u64::from(*byte))
    })
}

/// A bijection that changes half of the bits of its result for each bit of `x` (splitmix64).
fn mixed(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests;
