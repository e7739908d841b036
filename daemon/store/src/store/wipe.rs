//! Wiping a namespace, and the clean end.
//!
//! Upstairs:   the daemon's wipe call; `Store::close`.
//! Downstairs: `superblock`, `catalog`.
//!
//! Invariants kept here
//!   W1  The wipe is in both slots of the superblock before it is acknowledged. It names a
//!       sequence that every record written before is below, so a rebuild drops them, whatever
//!       segment, copy or catalog they are found in.
//!
//! Not here on purpose: bytes are not overwritten. They lie on the device until their segment is
//! recycled; encryption at rest is what makes them unreadable.

use kvtier_proto::NamespaceId;

use crate::disk::Disk;
use crate::events::{Counter, Event, PutError, WipeError};
use crate::format::CleanClose;
use crate::format::superblock::WIPED_MAX;
use crate::index::Stored;
use crate::planted::{Bug, planted};

use super::Store;
use super::append::{Origin, Queued};

/// What a namespace forgot in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forgotten {
    /// Records of it with a lower sequence are gone.
    pub below: u64,
    /// Blocks that went.
    pub blocks: u64,
}

impl<D: Disk> Store<D> {
    /// Forgets every record of `namespace` that was put before, here and after any restart.
    /// Blocks for two syncs of the superblock; returns how many blocks went.
    ///
    /// Puts of the namespace that are not durable yet end as [`PutError::Wiped`], reads under way
    /// as a miss. Bytes that were handed out as [`crate::Unverified`] or later are the caller's.
    pub fn wipe(
        &mut self,
        namespace: NamespaceId,
        events: &mut Vec<Event>,
    ) -> Result<u64, WipeError> {
        let gone = self.forget_namespace(namespace, None, events);
        self.keep_wipes(namespace, events)?;
        Ok(gone.blocks)
    }

    /// First half of [`Store::wipe`]: forgets in this process. A restart brings back what was
    /// forgotten, unless [`Store::keep_wipes`] comes first. `below` repeats a wipe of an earlier
    /// process: what was put since then stays.
    ///
    /// Walks through the whole index, unless nothing was put since the last time.
    pub fn forget_namespace(
        &mut self,
        namespace: NamespaceId,
        below: Option<u64>,
        events: &mut Vec<Event>,
    ) -> Forgotten {
        let all = below.is_none();
        if all && self.blank.contains(&namespace) {
            self.drop_queued(namespace, events);
            let below = self.superfile.now().wiped_below(namespace);
            return Forgotten { below, blocks: 0 };
        }
        let below = below.unwrap_or(self.next_sequence).min(self.next_sequence);
        self.superfile.change(|now| now.wipe(namespace, below));
        let gone: Vec<Stored> = self
            .index
            .iter()
            .filter(|stored| {
                self.superfile
                    .now()
                    .is_wiped(stored.namespace, stored.place.sequence)
            })
            .collect();
        for stored in &gone {
            self.forget(stored.namespace, &stored.key);
        }
        if all {
            self.drop_queued(namespace, events);
            if self.blank.len() >= WIPED_MAX {
                self.blank.clear();
            }
            self.blank.insert(namespace);
        }
        Forgotten {
            below,
            blocks: gone.len() as u64,
        }
    }

    /// Second half of [`Store::wipe`]: makes durable what was forgotten. Blocks for two syncs,
    /// unless it is durable.
    pub fn keep_wipes(
        &mut self,
        namespace: NamespaceId,
        events: &mut Vec<Event>,
    ) -> Result<(), WipeError> {
        if self.poisoned.is_some() {
            return Err(WipeError::Poisoned { namespace });
        }
        if planted(Bug::WipeUnwritten) {
            return Ok(());
        }
        if let Err(failed) = self.superfile.write(&mut self.lane) {
            if failed.sync_failed {
                self.counters.add(Counter::SyncErrors, 1);
                tracing::error!(problem = %failed.problem, "superblock not synced: the log is poisoned");
                self.poison(events);
            }
            let source = failed.problem;
            return Err(WipeError::Superblock { namespace, source });
        }
        self.counters.add(Counter::Wipes, 1);
        Ok(())
    }

    /// Sequence below which every record of `namespace` counts as wiped.
    pub fn wiped_below(&self, namespace: NamespaceId) -> u64 {
        self.superfile.now().wiped_below(namespace)
    }

    /// Records without a sequence would get one above the wipe: they go now.
    fn drop_queued(&mut self, namespace: NamespaceId, events: &mut Vec<Event>) {
        let queued: Vec<Queued> = self.queue.drain(..).collect();
        for queued in queued {
            if queued.image.summary().namespace == namespace {
                self.fail(
                    queued.origin,
                    Some(queued.image),
                    PutError::Wiped { namespace },
                    events,
                );
            } else {
                self.queue.push_back(queued);
            }
        }
        let forwards: Vec<Queued> = self.forwards.drain(..).collect();
        for queued in forwards {
            let Origin::Forward { from } = queued.origin else {
                continue;
            };
            if self.index.get(from.namespace, &from.key).is_some() {
                self.forwards.push_back(queued);
            } else {
                if let Some(drain) = self.drain.as_mut() {
                    drain.release(u64::from(from.place.len));
                }
                self.drain_settled(&from);
            }
        }
    }

    /// Closes the catalog and says so in the superblock: only then may the next opening trust it.
    pub(super) fn close_catalog(&mut self) {
        let Some(mut catalog) = self.catalog.take() else {
            return;
        };
        let stamp = crate::catalog::Stamp::of(self.superfile.now(), &self.index);
        let closed = self
            .changed
            .write(catalog.as_mut(), &self.index)
            .and_then(|()| catalog.close(&stamp));
        drop(catalog);
        let CleanClose { rows, digest } = stamp.close;
        let outcome = closed
            .map_err(|problem| std::io::Error::other(problem.to_string()))
            .and_then(|()| {
                self.superfile
                    .change(|now| now.clean = Some(CleanClose { rows, digest }));
                let written = self.superfile.write(&mut self.lane);
                written.map_err(|failed| failed.problem)
            });
        if let Err(problem) = outcome {
            tracing::warn!(%problem, "catalog not closed in order; the next opening rebuilds it");
        }
    }
}
