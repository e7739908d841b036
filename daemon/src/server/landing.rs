//! Blocks of a restore on their way into an engine's slots, instead of into its hands.
//!
//! Upstairs:   the Restore stream, between a restore's events and the wire.
//! Downstairs: `region::engine`.
//!
//! A restore runs as any other and leases what arrives. Here each block is copied into the slot
//! that the engine named for it, and its lease ends at once: the engine gets a copy, of which the
//! daemon keeps nothing.
//!
//! Invariants kept here
//!   R3  The slots are the daemon's until the end of the restore is told, however it ends: they are
//!       given back with the last copy, before that end is on its way.
//!   P4  A block is announced only when all of its bytes are in its slot. One that could not be
//!       copied is missed for `region`, and no block from there on counts as usable.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvtier_proto::{Miss, v1};
use tokio::sync::watch;

use super::convert;
use crate::metrics::Metrics;
use crate::region::engine::Reserved;
use crate::restore::run::{Control, Leased, Summary};

/// Bytes of blocks that are told together: the engine starts with them while others are copied.
const TOLD_BYTES: usize = 8 << 20;

/// Where the blocks of one restore go.
#[derive(Debug)]
pub(super) struct Landing {
    slots: Arc<Reserved>,
    control: watch::Receiver<Control>,
    metrics: Arc<Metrics>,
    /// What did not come into its slot, with a reason unless the restore was cancelled.
    absent: BTreeMap<usize, Option<Miss>>,
}

impl Landing {
    pub(super) fn new(
        slots: Reserved,
        control: watch::Receiver<Control>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let slots = Arc::new(slots);
        let absent = BTreeMap::new();
        Self {
            slots,
            control,
            metrics,
            absent,
        }
    }

    /// Blocks that arrived, in groups to be landed one after the other.
    pub(super) fn groups(ready: Vec<Leased>) -> Vec<Vec<Leased>> {
        let mut groups: Vec<Vec<Leased>> = Vec::new();
        let mut room = 0;
        for leased in ready {
            let bytes = leased.block.payload().len();
            match groups.last_mut().filter(|_| bytes <= room) {
                Some(group) => {
                    room -= bytes;
                    group.push(leased);
                }
                None => {
                    room = TOLD_BYTES.saturating_sub(bytes);
                    groups.push(vec![leased]);
                }
            }
        }
        groups
    }

    /// Copies blocks into their slots and says which are there now (P4).
    pub(super) async fn land(&mut self, group: Vec<Leased>) -> Vec<v1::LeasedBlock> {
        if self.control.borrow().cancelled {
            let absent = group.iter().map(|leased| (leased.index, None));
            self.absent.extend(absent);
            return Vec::new();
        }
        let indices: Vec<usize> = group.iter().map(|leased| leased.index).collect();
        let slots = Arc::clone(&self.slots);
        let work = tokio::task::spawn_blocking(move || {
            let land = |leased: Leased| {
                let landed = slots.write(leased.index, leased.block.payload());
                // The lease ends here: with `leased`.
                landed.is_ok().then(|| wire(&slots, &leased))
            };
            group.into_iter().map(land).collect::<Vec<_>>()
        });
        let landed = work.await.unwrap_or_default();
        let here: Vec<v1::LeasedBlock> = landed.into_iter().flatten().collect();
        for index in indices {
            let number = convert::count(index);
            if !here.iter().any(|block| block.index == number) {
                self.metrics.misses.of(Miss::Region).inc();
                self.absent.insert(index, Some(Miss::Region));
            }
        }
        here
    }

    /// Gives the slots back, and corrects the end of the restore (R3).
    pub(super) fn end(self, summary: &mut Summary) {
        if let Some(first) = self.absent.keys().next() {
            summary.usable = summary.usable.min(*first);
        }
        let missed = self.absent.iter();
        let missed = missed.filter_map(|(index, miss)| miss.map(|miss| (*index, miss)));
        summary.missed.extend(missed);
        summary.missed.sort_unstable_by_key(|(index, _)| *index);
    }
}

fn wire(slots: &Reserved, leased: &Leased) -> v1::LeasedBlock {
    let block = &leased.block;
    v1::LeasedBlock {
        index: convert::count(leased.index),
        slot: Some(v1::Slot {
            region: slots.region().number(),
            offset: slots.slot(leased.index).map_or(0, u64::from),
            length: block.payload().len() as u64,
            generation: 0,
        }),
        lease: 0,
        tier: convert::tier(leased.tier) as i32,
        level: block.level().0.into(),
        tokens: block.facts().layout.tokens(),
        quality: v1::Quality::from(leased.block.quality()) as i32,
    }
}
