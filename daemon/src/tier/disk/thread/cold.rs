//! What the disk thread knows of blocks that nobody uses.
//!
//! Upstairs:   `thread`.
//! Downstairs: `touched`, and the store, which has the blocks.
//!
//! Invariants kept here
//!   T7  A block that was used less than a period ago is not cold.

use std::time::Instant;

use kvtier_proto::{BlockKey, NamespaceId};
use kvtier_store::Stored;

use super::Served;

impl Served<'_> {
    pub(super) fn touch(&mut self, namespace: NamespaceId, key: BlockKey) {
        if let Some(touched) = &mut self.touched {
            touched.touch(namespace, &key, Instant::now());
        }
    }

    /// True while nobody has used or pinned a block that was found cold. It takes time to encode it
    /// again.
    pub(super) fn is_cold(&mut self, found: &Stored) -> bool {
        let pinned = self.store.peek(found.namespace, &found.key);
        let pinned = pinned.is_some_and(|stored| stored.pinned);
        let touched = self.touched.as_mut();
        let cold = touched
            .is_none_or(|touched| touched.is_cold(found.namespace, &found.key, Instant::now()));
        cold && !pinned
    }

    /// Blocks of the next sealed segment that are cold.
    pub(super) fn cold_after(&mut self, epoch: u64) -> Option<(u64, Vec<Stored>)> {
        let touched = self.touched.as_mut()?;
        let now = Instant::now();
        let (next, mut blocks) = self.store.sealed_after(epoch)?;
        blocks.retain(|one| touched.is_cold(one.namespace, &one.key, now));
        blocks.sort_unstable_by_key(|one| one.place.offset);
        Some((next, blocks))
    }
}
