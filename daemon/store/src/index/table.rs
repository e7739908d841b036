//! The hash table over the slab: 8-byte buckets, looked through one by one.
//!
//! Upstairs:   `index`.
//! Downstairs: nothing.

use std::hash::Hasher;

use kvtier_proto::{BlockKey, NamespaceId};

use super::{Index, NONE};

#[derive(Debug, Clone, Copy)]
pub(super) struct Bucket {
    pub(super) hash: u32,
    pub(super) entry: u32,
}

pub(super) const EMPTY: Bucket = Bucket {
    hash: 0,
    entry: NONE,
};

/// Buckets for so many blocks: at most three of four are taken.
pub(super) fn buckets_for(blocks: usize) -> usize {
    (blocks * 4).div_ceil(3).next_power_of_two().max(64)
}

impl Index {
    pub(super) fn hash(&self, namespace: NamespaceId, key: &BlockKey) -> u32 {
        let mut hasher = self.hasher.clone();
        hasher.write(&key.0);
        hasher.write(&namespace.0.to_le_bytes());
        let [a, b, c, d, ..] = hasher.finish().to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }

    pub(super) fn home(&self, hash: u32) -> usize {
        hash as usize & (self.buckets.len() - 1)
    }

    pub(super) fn find(
        &self,
        hash: u32,
        namespace: NamespaceId,
        key: &BlockKey,
    ) -> Option<(usize, u32)> {
        let mut at = self.home(hash);
        loop {
            let bucket = self.buckets.get(at)?;
            if bucket.entry == NONE {
                return None;
            }
            if bucket.hash == hash
                && let Some(entry) = self.entries.get(bucket.entry as usize)
                && entry.key == *key
                && entry.namespace == namespace
            {
                return Some((at, bucket.entry));
            }
            at = (at + 1) & (self.buckets.len() - 1);
        }
    }

    pub(super) fn put_bucket(&mut self, bucket: Bucket) {
        if buckets_for(self.len + 1) > self.buckets.len() {
            self.spread_over(self.buckets.len() * 2);
        }
        self.place_bucket(bucket);
    }

    pub(super) fn spread_over(&mut self, buckets: usize) {
        let old = std::mem::replace(&mut self.buckets, vec![EMPTY; buckets]);
        for bucket in old.into_iter().filter(|bucket| bucket.entry != NONE) {
            self.place_bucket(bucket);
        }
    }

    fn place_bucket(&mut self, bucket: Bucket) {
        let mut at = self.home(bucket.hash);
        while let Some(place) = self.buckets.get_mut(at) {
            if place.entry == NONE {
                *place = bucket;
                return;
            }
            at = (at + 1) & (self.buckets.len() - 1);
        }
    }

    /// Empties a bucket and moves those behind it that the gap would hide.
    pub(super) fn close_gap(&mut self, mut gap: usize) {
        let mask = self.buckets.len() - 1;
        let mut at = gap;
        loop {
            at = (at + 1) & mask;
            let Some(&bucket) = self.buckets.get(at) else {
                return;
            };
            if bucket.entry == NONE {
                break;
            }
            let distance_of = |from: usize| at.wrapping_sub(from) & mask;
            if distance_of(self.home(bucket.hash)) >= distance_of(gap) {
                if let Some(place) = self.buckets.get_mut(gap) {
                    *place = bucket;
                }
                gap = at;
            }
        }
        if let Some(place) = self.buckets.get_mut(gap) {
            *place = EMPTY;
        }
    }
}
