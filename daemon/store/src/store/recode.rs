//! Another form of a record in its place: what was stored at one level is stored at another.
//!
//! Upstairs:   whoever re-encodes what nobody has used for long, or knows of a record that nobody
//!             can read.
//! Downstairs: `append` places it, `commit` publishes it.
//!
//! ```text
//!   read from ---> (decode, encode) ---> recode: placed, written, synced ---> published
//!                                                  from replaced or gone ---> Superseded
//! ```
//!
//! The new form keeps the number of the old one, as a copy of a pinned block does: it is the same
//! put. A newer put of the block goes before both, whichever of the three is durable first, and so
//! it is after a crash; of the two forms the one in the younger segment counts. That is why the old
//! one must lie in a sealed segment: the open one is younger than all of those.
//!
//! Invariants kept here
//!   L1  The old form is what is read until the new one is durable. Whatever fails, one is there.
//!
//! Not here on purpose: no choice of what to re-encode, and no codec.

use crate::disk::Disk;
use crate::events::PutError;
use crate::format::Place;
use crate::image::RecordImage;
use crate::index::Stored;
use crate::segments::Life;

use super::append::Origin;
use super::{Refused, Store};

impl<D: Disk> Store<D> {
    /// As [`Store::put`], and a record that lies at `over` is replaced even where it looks the
    /// same: the caller knows that it cannot be read.
    ///
    /// Errors: as [`Store::put`].
    pub fn put_over(&mut self, tag: u64, image: RecordImage, over: Place) -> Result<(), Refused> {
        let over = Some(over);
        self.enqueue(Origin::Put { tag, over }, image)
    }

    /// Queues another form of the record `from`, of another level, to take its place. The answer is
    /// an [`crate::Event::Put`] with this `tag`; [`PutError::Superseded`] when `from` was replaced
    /// or has gone meanwhile, and at once when it does not lie in a sealed segment.
    ///
    /// Errors: as [`Store::put`].
    pub fn recode(&mut self, tag: u64, image: RecordImage, from: &Stored) -> Result<(), Refused> {
        let life = self.segments.get(from.place.segment).map(|one| one.life);
        let summary = image.summary();
        let same = (
            summary.namespace,
            summary.key,
            summary.kind,
            summary.through,
        ) == (from.namespace, from.key, from.kind, from.through);
        if life != Some(Life::Sealed) || summary.level == from.level || !same {
            return Err((image, PutError::Superseded));
        }
        let from = *from;
        self.enqueue(Origin::Recode { tag, from }, image)
    }

    /// The oldest sealed segment whose epoch is above `epoch`: its epoch, and what it holds.
    pub fn sealed_after(&self, epoch: u64) -> Option<(u64, Vec<Stored>)> {
        let sealed = self.segments.iter();
        let sealed = sealed.filter(|one| one.life == Life::Sealed && one.epoch > epoch);
        let next = sealed.min_by_key(|one| one.epoch)?;
        Some((next.epoch, self.index.in_segment(next.number).collect()))
    }

    /// True when the block is still the record at this place.
    pub(super) fn is_here(&self, stored: &Stored) -> bool {
        let here = self.index.get(stored.namespace, &stored.key);
        here.is_some_and(|here| here.place == stored.place)
    }
}

#[cfg(test)]
mod tests;
