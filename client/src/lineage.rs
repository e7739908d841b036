//! What the engine's KV of each block was made of, as far as this session has seen.
//!
//! Upstairs:   restores say what was handed out at which quality; saves ask what to declare.
//! Downstairs: nothing.
//!
//! A block that is computed after one that lost something is no better than that, whatever the
//! level it is stored at: its attention has read the loss. Whoever asks for exact bytes must not
//! get it. The keys tell which block follows which, so that the session can say it by itself.
//!
//! Invariants kept here
//!   Q1  What is saved is declared no better than anything that it was computed from, when the
//!       engine got that from this session or saved it here: a doubt makes it worse, never better.
//!   Q2  Memory is bounded. Where a session knows of too many keys, every save counts as the
//!       worst that it has restored.
//!
//! Not here on purpose: nothing is taken back by itself. Another sequence of the engine may still
//! hold the worse bytes; only the engine knows when nobody does.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use kvtier_proto::{BlockKey, Quality};

use crate::restore::Asked;

/// Keys that are remembered: 12 MiB, and at 256 tokens a block 67 million tokens.
const KEYS_MAX: usize = 1 << 18;

/// The memory of one session. Exact keys are not in it.
#[derive(Debug, Default)]
pub(crate) struct Lineage(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    of: HashMap<BlockKey, Quality>,
    /// What every key is at least.
    floor: Quality,
}

impl Lineage {
    /// A block of a restore was handed out: what is computed behind it is no better. `behind` is
    /// what this restore has said of each of its keys so far.
    pub(crate) fn raise(
        &self,
        asked: &Asked,
        behind: &mut [Quality],
        (index, quality): (usize, Quality),
    ) {
        let before = asked.after.map(|key| self.of(&key));
        let quality = quality.max(before.unwrap_or_default());
        let reach = if asked.one_prefix { usize::MAX } else { 1 };
        let from_it_on = asked.keys.iter().zip(behind).skip(index).take(reach);
        self.spread(from_it_on, quality);
    }

    /// These keys follow each other: what makes one so bad goes on to the next. What else is known
    /// of a key stops nothing: it need not have reached those behind it.
    fn spread<'a>(
        &self,
        keys: impl Iterator<Item = (&'a BlockKey, &'a mut Quality)>,
        quality: Quality,
    ) {
        let mut seen = self.lock();
        // Where this restore has said as much, it has said it of all that follow.
        for (key, behind) in keys.take_while(|(_, behind)| **behind < quality) {
            *behind = quality;
            seen.raise(*key, quality);
        }
    }

    /// What to declare of a block that is to be saved. Remembers it for those that follow.
    pub(crate) fn of_save(&self, key: BlockKey, parent: &BlockKey) -> Quality {
        let mut seen = self.lock();
        let quality = seen.quality(&key).max(seen.quality(parent));
        seen.raise(key, quality);
        quality
    }

    /// What the engine's bytes of a block are, as far as is known.
    pub(crate) fn of(&self, key: &BlockKey) -> Quality {
        self.lock().quality(key)
    }

    /// The engine says what its bytes of these blocks are.
    pub(crate) fn set(&self, keys: &[BlockKey], quality: Quality) {
        let mut seen = self.lock();
        for key in keys {
            seen.of.remove(key);
            seen.raise(*key, quality);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seen {
    fn quality(&self, key: &BlockKey) -> Quality {
        let known = self.of.get(key).copied().unwrap_or_default();
        known.max(self.floor)
    }

    fn raise(&mut self, key: BlockKey, quality: Quality) {
        if quality <= self.quality(&key) {
            return;
        }
        if self.of.len() < KEYS_MAX || self.of.contains_key(&key) {
            self.of.insert(key, quality);
            return;
        }
        let worst = self.of.values().copied().max().unwrap_or_default();
        self.floor = worst.max(quality);
        self.of.clear();
        tracing::warn!(
            keys = KEYS_MAX,
            quality = self.floor.as_str(),
            "too many keys of lossy blocks to remember: from now on every save of this session is \
             declared as if it were computed from them"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u32) -> BlockKey {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&number.to_le_bytes());
        BlockKey(key)
    }

    fn chain(len: u32) -> Vec<BlockKey> {
        (1..=len).map(key).collect()
    }

    fn raise(lineage: &Lineage, keys: &[BlockKey], quality: Quality) {
        let mut behind = vec![Quality::Exact; keys.len()];
        lineage.spread(keys.iter().zip(&mut behind), quality);
    }

    #[test]
    fn a_key_that_is_bad_by_itself_does_not_shield_those_behind_it() {
        let (lineage, keys) = (Lineage::default(), chain(4));
        lineage.set(&keys[1..2], Quality::Small);
        raise(&lineage, &keys, Quality::Balanced);
        let found: Vec<_> = keys.iter().map(|key| lineage.of(key)).collect();
        let balanced = Quality::Balanced;
        assert_eq!(found, [balanced, Quality::Small, balanced, balanced]);
    }

    #[test]
    fn what_follows_a_lossy_block_is_declared_as_bad_and_what_comes_before_is_not() {
        let (lineage, keys) = (Lineage::default(), chain(4));
        raise(&lineage, &keys[1..], Quality::Balanced);
        raise(&lineage, &keys[2..], Quality::Exact);
        let found: Vec<_> = keys.iter().map(|key| lineage.of(key)).collect();
        let balanced = Quality::Balanced;
        assert_eq!(found, [Quality::Exact, balanced, balanced, balanced]);
        // Computed behind the restore, then behind that.
        assert_eq!(lineage.of_save(key(5), &keys[3]), balanced);
        assert_eq!(lineage.of_save(key(6), &key(5)), balanced);
        // Another branch of the same prompt.
        assert_eq!(lineage.of_save(key(7), &keys[0]), Quality::Exact);
    }

    #[test]
    fn the_worst_of_a_chain_counts_in_whatever_order_blocks_arrive() {
        use Quality::{Balanced, Exact, Small, Transparent};
        let came = [Exact, Transparent, Exact, Small, Balanced];
        let keys = chain(5);
        let expected = [Exact, Transparent, Transparent, Small, Small];
        for first in 0..came.len() {
            let lineage = Lineage::default();
            for at in (0..came.len()).map(|at| (at + first) % came.len()) {
                raise(&lineage, &keys[at..], came[at]);
            }
            let found: Vec<_> = keys.iter().map(|key| lineage.of(key)).collect();
            assert_eq!(found, expected, "from {first}");
        }
    }

    #[test]
    fn the_engine_has_the_last_word() {
        let (lineage, keys) = (Lineage::default(), chain(2));
        raise(&lineage, &keys, Quality::Small);
        lineage.set(&keys[..1], Quality::Exact);
        assert_eq!(lineage.of(&keys[0]), Quality::Exact);
        assert_eq!(lineage.of(&keys[1]), Quality::Small);
        lineage.set(&keys, Quality::Transparent);
        assert_eq!(lineage.of(&keys[1]), Quality::Transparent);
    }

    #[test]
    fn too_many_keys_make_every_save_as_bad_as_the_worst_of_them() {
        let lineage = Lineage::default();
        let most = u32::try_from(KEYS_MAX).unwrap();
        raise(&lineage, &[key(1)], Quality::Small);
        for number in 2..=most {
            raise(&lineage, &[key(number)], Quality::Transparent);
        }
        let saved = |number| lineage.of_save(key(number), &BlockKey::ROOT);
        assert_eq!(saved(most + 1), Quality::Exact);
        raise(&lineage, &[key(most + 1)], Quality::Transparent);
        assert_eq!(saved(most + 2), Quality::Small);
        assert_eq!(lineage.of(&key(1)), Quality::Small);
    }
}
