//! The disk tier: one store for each device, and every block on one of them.
//!
//! Upstairs:   `tier::save`, `tier::load`, and the calls that explain, pin and wipe.
//! Downstairs: `device` (a thread with a store), `place` (who owns a block), `ledger` (what a
//!             device that is away has missed).
//!
//! A block goes to the device that owns it, or to the next in its order that takes writes. It is
//! looked for on its owner first, and on the others when it is not there: it may have been written
//! while the owner was away, or before the owner came. Which device has it never matters to what
//! is read, since a record proves itself.
//!
//! A device that does not open, or fails later, is out of service: it serves nothing until a
//! restart, and keeps its share. A block that is found nowhere and belongs to it is a miss for
//! `device`, and may be saved again to another.
//!
//! Invariants kept here
//!   P3  A wipe is forgotten by every device in service, then in the ledger, then in every
//!       superblock, and only then answered. A device that was away takes it before it serves.

mod answers;
mod device;
#[cfg(test)]
mod faulty;
mod ledger;
mod open;
mod pins;
mod place;
mod roll;
mod scrub;
mod thread;

use std::ops::Deref;
use std::sync::Arc;

use std::time::Duration;

use kvtier_proto::{LayoutFingerprint, Miss, NamespaceId};
use kvtier_store::mem::IoBuf;
use kvtier_store::{DeviceState, Forgotten, RecordImage, Stored, Unverified};
use tokio::sync::Mutex;

use super::host::Life;
use crate::block::BlockId;
use crate::metrics::Device;
use crate::sync::AtomicU64;

pub use device::{DiskOptions, DiskStatus};
pub use ledger::{Ledger, LedgerError, Seen, ledger_after};
pub use open::is_apart;
pub use scrub::ScrubOptions;

use device::{Command, Handle, Unstored};
use place::Share;

/// A block that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OnDisk {
    /// On which device.
    pub device: Device,
    /// How the device does.
    pub state: DeviceState,
    /// Where on it, and as what.
    pub stored: Stored,
}

impl Deref for OnDisk {
    type Target = Stored;

    fn deref(&self) -> &Stored {
        &self.stored
    }
}

/// What a wipe did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wiped {
    /// Blocks that went.
    pub blocks: u64,
    /// Devices that are out of service, and take the wipe before they serve again.
    pub waiting: Vec<String>,
}

/// A device as it is configured, whether it is in service or not.
#[derive(Debug)]
struct Slot {
    /// What is known of it while it has no thread.
    status: DiskStatus,
    handle: Option<Handle>,
}

impl Slot {
    /// The device, unless it is out of service.
    fn serving(&self) -> Option<&Handle> {
        let handle = self.handle.as_ref()?;
        (handle.state() != DeviceState::Failed).then_some(handle)
    }

    fn status(&self) -> DiskStatus {
        let handle = self.handle.as_ref();
        handle.map_or_else(|| self.status.clone(), Handle::status)
    }
}

/// See the module.
#[derive(Debug)]
pub struct DiskTier {
    slots: Vec<Slot>,
    /// By position, for devices whose identity is known.
    shares: Vec<Option<Share>>,
    /// One wipe at a time: each tells the ledger what the devices said.
    ledger: Mutex<Ledger>,
}

impl DiskTier {
    /// Where each block lies, in order.
    pub async fn find(&self, ids: Vec<BlockId>) -> Vec<Option<OnDisk>> {
        let mut found = vec![None; ids.len()];
        let owners: Vec<_> = ids.iter().map(|id| self.owner(id)).collect();
        let owned = |slot| {
            let owner = owners.iter().enumerate();
            owner.filter(move |(_, owner)| **owner == Some(slot))
        };
        let first = (0..self.slots.len()).map(|slot| owned(slot).map(|(at, _)| at).collect());
        self.look(&ids, first.collect(), &mut found).await;
        let others = |slot| {
            let missing = found.iter().zip(&owners).enumerate();
            let missing = missing.filter(|(_, (found, _))| found.is_none());
            let missing = missing.filter(|(_, (_, owner))| **owner != Some(slot));
            missing.map(|(at, _)| at).collect()
        };
        let rest: Vec<Vec<usize>> = (0..self.slots.len()).map(others).collect();
        self.look(&ids, rest, &mut found).await;
        found
    }

    /// Asks each device for those blocks, by their places in `ids`; all devices at once.
    async fn look(&self, ids: &[BlockId], wanted: Vec<Vec<usize>>, found: &mut [Option<OnDisk>]) {
        let mut asked = Vec::new();
        for (slot, places) in self.slots.iter().zip(wanted) {
            let Some(handle) = slot.serving().filter(|_| !places.is_empty()) else {
                continue;
            };
            let ids = places
                .iter()
                .filter_map(|at| ids.get(*at).copied())
                .collect();
            let answer = handle.send(|reply| Command::Find { ids, reply }).await;
            asked.push((slot, handle.state(), places, answer));
        }
        for (slot, state, places, answer) in asked {
            let answer = answer.await.unwrap_or_default();
            for (at, stored) in places.into_iter().zip(answer) {
                let Some((stored, place)) = stored.zip(found.get_mut(at)) else {
                    continue;
                };
                place.get_or_insert(OnDisk {
                    device: slot.status.device,
                    state,
                    stored,
                });
            }
        }
    }

    /// Why a block that was found nowhere is a miss: its device may have it, and is out of
    /// service, or nobody has it.
    pub fn why_not(&self, id: &BlockId) -> Miss {
        let owner = self.owner(id).and_then(|at| self.slots.get(at));
        match owner.map(Slot::serving) {
            Some(None) => Miss::Device,
            _ => Miss::Absent,
        }
    }

    /// The device that a block belongs to.
    fn owner(&self, id: &BlockId) -> Option<usize> {
        // Nobody waits for a hash where there is nothing to choose.
        match self.slots.len() {
            1 => Some(0),
            _ => place::owner(&id.record_key(), &self.shares),
        }
    }

    /// Appends a record to the device that it belongs to, or the next that takes it. Returns when
    /// it is durable.
    ///
    /// # Errors
    /// Why it is not stored, for the log. The block stays where it was.
    pub async fn put(
        &self,
        image: RecordImage,
        lives: Arc<AtomicU64>,
        life: Life,
    ) -> Result<Device, String> {
        let mut refused = Vec::new();
        let mut image = image;
        for at in place::order(&image.summary().key, &self.shares) {
            let Some((slot, handle)) = self.slots.get(at).and_then(|slot| {
                let handle = slot.serving()?;
                (handle.state() < DeviceState::ReadOnly).then_some((slot, handle))
            }) else {
                continue;
            };
            let device = slot.status.device;
            match handle.put(image, Arc::clone(&lives), life).await {
                Ok(()) => return Ok(device),
                Err(Unstored {
                    problem,
                    image: back,
                }) => {
                    refused.push(format!("{device}: {problem}"));
                    let Some(back) = back else { break };
                    image = back;
                }
            }
        }
        if refused.is_empty() {
            refused.push("no device takes writes".to_owned());
        }
        Err(refused.join("; "))
    }

    /// Reads a record that was found into `buf`, which is at least as long as the place says.
    pub async fn get(
        &self,
        id: BlockId,
        layout: LayoutFingerprint,
        buf: IoBuf,
        device: Device,
    ) -> Result<Unverified, Miss> {
        let handle = self.handle(device).ok_or(Miss::Device)?;
        let done = handle.ask(|reply| Command::Get {
            id,
            layout,
            buf,
            reply,
        });
        done.await.unwrap_or(Err(Miss::Device))
    }

    /// Takes a record that cannot be served out of the index. False when it stays, because the
    /// device as a whole has failed and nothing is known of the record.
    pub async fn condemn(&self, id: BlockId, found: &OnDisk, miss: Miss) -> bool {
        let Some(handle) = self.handle(found.device) else {
            return false;
        };
        let place = found.place;
        let done = handle.ask(|reply| Command::Condemn {
            id,
            place,
            miss,
            reply,
        });
        done.await.unwrap_or(false)
    }

    fn handle(&self, device: Device) -> Option<&Handle> {
        self.slots.get(device.position())?.handle.as_ref()
    }

    /// Keeps blocks when their segments are recycled; `None` ends that. Says which exist.
    pub async fn pin(&self, ids: Vec<BlockId>, ttl: Option<Duration>) -> Vec<bool> {
        let mut pinned = vec![false; ids.len()];
        let mut asked = Vec::new();
        for handle in self.slots.iter().filter_map(Slot::serving) {
            let ids = ids.clone();
            asked.push(handle.send(|reply| Command::Pin { ids, ttl, reply }).await);
        }
        for answer in asked {
            let stored = answer.await.unwrap_or_default();
            for (pinned, stored) in pinned.iter_mut().zip(stored) {
                *pinned |= stored;
            }
        }
        pinned
    }

    /// Forgets a namespace, durably, on every device.
    ///
    /// # Errors
    /// Some device in service, or the state directory, did not take it; nothing that was saved
    /// before is served meanwhile.
    pub async fn wipe(&self, namespace: NamespaceId) -> Result<Wiped, String> {
        let mut ledger = self.ledger.lock().await;
        let forgotten = self.forget(namespace).await;
        let mut wiped = Wiped::default();
        let mut bounds = Vec::new();
        for (slot, forgotten) in &forgotten {
            wiped.blocks += forgotten.blocks;
            let handle = slot.handle.as_ref();
            bounds.extend(handle.map(|handle| (handle.id, forgotten.below)));
        }
        ledger.wipe(namespace, bounds);
        let mut problems = Vec::new();
        if let Err(problem) = ledger.write().await {
            problems.push(crate::log::chain(&problem));
        }
        let (mut kept, mut waiting) = (0, Vec::new());
        for slot in &self.slots {
            match slot.keep_wipes(namespace).await {
                Some(Ok(())) => kept += 1,
                Some(Err(problem)) if slot.serving().is_some() => {
                    problems.push(format!("{}: {problem}", slot.status.device));
                }
                _ => waiting.push(slot.name()),
            }
        }
        if kept == 0 && problems.is_empty() {
            problems.push("no device is in service".to_owned());
        }
        wiped.waiting = waiting;
        match problems.is_empty() {
            true => Ok(wiped),
            false => Err(problems.join("; ")),
        }
    }

    /// First half of a wipe, on all devices at once: nothing of the namespace is served any more.
    async fn forget(&self, namespace: NamespaceId) -> Vec<(&Slot, Forgotten)> {
        let mut asked = Vec::new();
        for slot in &self.slots {
            if let Some(handle) = &slot.handle {
                let forget = handle.send(|reply| Command::Forget {
                    namespace,
                    below: None,
                    reply,
                });
                asked.push((slot, forget.await));
            }
        }
        let mut forgotten = Vec::new();
        for (slot, answer) in asked {
            forgotten.extend(answer.await.ok().map(|answer| (slot, answer)));
        }
        forgotten
    }

    /// Makes everything durable, closes the stores in order and ends the threads.
    pub async fn close(&self) {
        let mut closing = Vec::new();
        for handle in self.slots.iter().filter_map(|slot| slot.handle.as_ref()) {
            closing.push(handle.send(|reply| Command::Close { reply }).await);
        }
        for closed in closing {
            let _ = closed.await;
        }
    }

    /// What each device is, holds and did.
    pub fn status(&self) -> Vec<DiskStatus> {
        self.slots.iter().map(Slot::status).collect()
    }
}

impl Slot {
    /// Second half of a wipe. `None` when there is nobody to ask.
    async fn keep_wipes(&self, namespace: NamespaceId) -> Option<Result<(), String>> {
        let handle = self.handle.as_ref()?;
        let ask = handle.ask(|reply| Command::KeepWipes { namespace, reply });
        ask.await
    }

    /// As people know it.
    fn name(&self) -> String {
        format!("{} ({})", self.status.device, self.status.path)
    }
}

#[cfg(test)]
mod tests;
