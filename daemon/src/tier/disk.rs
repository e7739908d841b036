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
//! `device`, and may be saved again to another. So is one that hangs, until it answers again.
//!
//! Invariants kept here
//!   P3  A wipe is forgotten by every device in service, then in the ledger, then in every
//!       superblock, and only then answered. A device that was away takes it before it serves.

mod answers;
mod budget;
mod cold;
mod device;
#[cfg(test)]
pub(crate) mod faulty;
mod late;
mod ledger;
mod open;
mod pins;
mod place;
mod post;
mod roll;
mod scrub;
mod thread;
mod touched;
mod wipes;

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use kvtier_proto::{LayoutFingerprint, Miss};
use kvtier_store::mem::{Arena, IoBuf};
use kvtier_store::{DeviceState, Place, RecordImage, Stored, Unverified};
use tokio::sync::{Mutex, Notify};
use tokio::time::{Instant, timeout_at};

use super::host::Life;
use crate::block::BlockId;
use crate::metrics::Device;
use crate::sync::AtomicU64;

pub use budget::Held;
pub use device::{DiskOptions, DiskStatus};
pub use ledger::{Ledger, LedgerError, Seen, ledger_after, ledger_mended};
pub use open::is_apart;
pub use scrub::ScrubOptions;
pub use wipes::{Forgetting, Wiped};

use budget::Budget;
use device::{As, Command, Handle, Unstored};
use late::Silent;
use place::Share;

/// How long a device may take for what others wait for.
#[derive(Debug, Clone, Copy)]
struct Patience {
    /// To say what it holds: its thread knows that without the device, and is busy for less than
    /// this with one that works.
    look: Duration,
    /// To read what it holds, with a queue before it.
    get: Duration,
    /// To store a record, behind all that scratch memory holds and beside restores, which go
    /// first. It is not given up then.
    put: Duration,
    /// To open, since the recovery moved on: many times what the largest catalog takes
    /// (docs/SCALE.md), and less than a service manager waits.
    open: Duration,
}

impl Patience {
    const USUAL: Self = Self {
        look: Duration::from_secs(1),
        get: Duration::from_secs(30),
        put: Duration::from_secs(300),
        open: Duration::from_secs(300),
    };
}

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

/// A device as it is configured, whether it is in service or not.
#[derive(Debug)]
struct Slot {
    /// What is known of it while it has no thread.
    status: DiskStatus,
    handle: Option<Handle>,
}

impl Slot {
    /// The device, unless it is out of service or does not answer.
    fn serving(&self) -> Option<&Handle> {
        let handle = self.handle.as_ref()?;
        (handle.state() != DeviceState::Failed && !handle.is_late()).then_some(handle)
    }

    /// The device, if it takes writes, whether it answers or not.
    fn writable(&self) -> Option<&Handle> {
        let handle = self.handle.as_ref()?;
        (handle.state() < DeviceState::ReadOnly).then_some(handle)
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
    /// Held while it is changed and written, and never while a device is waited for.
    ledger: Mutex<Ledger>,
    /// A record that was to be written has left some device.
    left: Notify,
    patience: Patience,
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

    /// Asks each device for those blocks, by their places in `ids`; all devices at once. One that
    /// does not answer has none of them.
    async fn look(&self, ids: &[BlockId], wanted: Vec<Vec<usize>>, found: &mut [Option<OnDisk>]) {
        let until = Instant::now() + self.patience.look;
        let mut asked = Vec::new();
        for (slot, places) in self.slots.iter().zip(wanted) {
            let Some(handle) = slot.serving().filter(|_| !places.is_empty()) else {
                continue;
            };
            let ids = places
                .iter()
                .filter_map(|at| ids.get(*at).copied())
                .collect();
            let answer = handle.ask(|reply| Command::Find { ids, reply });
            asked.push((slot.status.device, handle, places, answer));
        }
        for (device, handle, places, answer) in asked {
            let answer = handle.answer(until, answer).await.unwrap_or_default();
            let state = handle.state();
            for (at, stored) in places.into_iter().zip(answer) {
                let Some((stored, place)) = stored.zip(found.get_mut(at)) else {
                    continue;
                };
                place.get_or_insert(OnDisk {
                    device,
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

    /// Appends a record to the device that it belongs to, or the next that takes it; one that does
    /// not answer comes last. One that lies at `over` cannot be read, and is no answer. Returns
    /// when it is durable.
    ///
    /// # Errors
    /// Why it is not stored, for the log. The block stays where it was.
    pub async fn put(
        &self,
        image: RecordImage,
        over: Option<Place>,
        lives: Arc<AtomicU64>,
        life: Life,
    ) -> Result<Device, String> {
        let until = Instant::now() + self.patience.put;
        let order = place::order(&image.summary().key, &self.shares);
        let (mut refused, mut image) = (Vec::new(), image);
        let mut tried = Vec::new();
        loop {
            let left = self.left.notified();
            let slots = order.iter().filter_map(|at| self.slots.get(*at));
            let (quick, late): (Vec<_>, Vec<_>) = slots
                .filter_map(Slot::writable)
                .filter(|handle| !tried.contains(&handle.id))
                .partition(|handle| !handle.is_late());
            let open = if quick.is_empty() { late } else { quick };
            let len = image.layout().image_len as usize;
            let mut open_now = open.iter().copied();
            let held = open_now.find_map(|handle| Some((handle, handle.puts.try_take(len)?)));
            let Some((handle, held)) = held else {
                // All of them hold as much as they may: the next that gives some back has it.
                if open.is_empty() || timeout_at(until, left).await.is_err() {
                    break;
                }
                continue;
            };
            let device = handle.device();
            tried.push(handle.id);
            let how = over.map_or(As::New, As::Over);
            let lives = Arc::clone(&lives);
            let put = handle.put(image, how, (lives, life), self.patience.put);
            let put = put.await;
            drop(held);
            self.left.notify_waiters();
            match put {
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

    /// Memory that everything in flight takes together, in bytes: of several devices, none may hold
    /// so much of it that the others could do nothing.
    pub fn share_scratch(&mut self, bytes: usize) {
        let devices = self.slots.len();
        if devices > 1 {
            for handle in self
                .slots
                .iter_mut()
                .filter_map(|slot| slot.handle.as_mut())
            {
                handle.puts = Budget::new(bytes / (2 * devices));
                handle.gets = Budget::new(bytes / (2 * devices));
            }
        }
    }

    /// A device's leave to hold `len` bytes of scratch memory for a read: to be had before the
    /// memory, and given to [`DiskTier::get`] with it.
    pub async fn may_hold(&self, device: Device, len: usize) -> Result<Held, Miss> {
        let handle = self.handle(device).ok_or(Miss::Device)?;
        let until = Instant::now() + self.patience.get;
        let held = timeout_at(until, handle.gets.take(len)).await;
        held.ok().flatten().ok_or(Miss::Deadline)
    }

    /// Reads a record that was found into `buf`, which is at least as long as the place says. One
    /// that does not come in time is no damage: a miss for `deadline`.
    pub async fn get(
        &self,
        id: BlockId,
        layout: LayoutFingerprint,
        buf: IoBuf,
        device: Device,
        held: Option<Held>,
    ) -> Result<Unverified, Miss> {
        self.get_as(id, layout, buf, (device, false), held).await
    }

    /// The same for nobody who waits: it is no use of the block.
    pub async fn get_in_background(
        &self,
        id: BlockId,
        layout: LayoutFingerprint,
        buf: IoBuf,
        device: Device,
    ) -> Result<Unverified, Miss> {
        self.get_as(id, layout, buf, (device, true), None).await
    }

    /// Reads what a record says of itself, and none of its parts, into `buf`: at least as long as
    /// the head that its place names. For nobody who waits for the block.
    pub async fn head(&self, id: BlockId, buf: IoBuf, device: Device) -> Result<Unverified, Miss> {
        let handle = self.handle(device).ok_or(Miss::Device)?;
        let asked = handle.ask_within(self.patience.get, |reply| Command::Head { id, buf, reply });
        asked.await.unwrap_or(Err(Miss::Deadline))
    }

    async fn get_as(
        &self,
        id: BlockId,
        layout: LayoutFingerprint,
        buf: IoBuf,
        (device, background): (Device, bool),
        held: Option<Held>,
    ) -> Result<Unverified, Miss> {
        let handle = self.handle(device).ok_or(Miss::Device)?;
        let get = |reply| Command::Get {
            id,
            layout,
            buf,
            background,
            reply,
        };
        let until = Instant::now() + self.patience.get;
        let asked = handle.ask(get);
        // The device has the memory until it answers, however late.
        let asked = Box::pin(async move {
            let answer = asked.await;
            drop(held);
            answer
        });
        let got = handle.answer(until, asked).await;
        got.unwrap_or_else(|silent| match silent {
            Silent::Ended => Err(Miss::Device),
            Silent::Late => Err(Miss::Deadline),
        })
    }

    /// Takes a record that cannot be served out of the index. False when it stays, because the
    /// device as a whole has failed and nothing is known of the record.
    pub async fn condemn(&self, id: BlockId, found: &OnDisk, miss: Miss) -> bool {
        let Some(handle) = self.handle(found.device) else {
            return false;
        };
        let place = found.place;
        let condemn = |reply| Command::Condemn {
            id,
            place,
            miss,
            reply,
        };
        let done = handle.ask_within(self.patience.look, condemn);
        done.await.unwrap_or(false)
    }

    fn handle(&self, device: Device) -> Option<&Handle> {
        self.slots.get(device.position())?.handle.as_ref()
    }

    /// Keeps blocks when their segments are recycled; `None` ends that. Says which exist.
    pub async fn pin(&self, ids: Vec<BlockId>, ttl: Option<Duration>) -> Vec<bool> {
        let mut pinned = vec![false; ids.len()];
        let until = Instant::now() + self.patience.look;
        let mut asked = Vec::new();
        for handle in self.slots.iter().filter_map(Slot::serving) {
            let ids = ids.clone();
            asked.push((handle, handle.ask(|reply| Command::Pin { ids, ttl, reply })));
        }
        for (handle, answer) in asked {
            let stored = handle.answer(until, answer).await.unwrap_or_default();
            for (pinned, stored) in pinned.iter_mut().zip(stored) {
                *pinned |= stored;
            }
        }
        pinned
    }

    /// Registers memory that I/O will go to and from, where a device can use that. It is to be
    /// populated.
    pub async fn attach(&self, arenas: &[Arc<Arena>]) {
        let until = Instant::now() + self.patience.open;
        let mut asked = Vec::new();
        for handle in self.handles() {
            let arenas = arenas.to_vec();
            asked.push((
                handle,
                handle.ask(|reply| Command::Attach { arenas, reply }),
            ));
        }
        for (handle, done) in asked {
            // Without it every operation takes longer, and that is all.
            let _ = handle.answer(until, done).await;
        }
    }

    /// Makes everything durable, closes the stores in order and ends the threads.
    pub async fn close(&self) {
        let close = |handle: &Handle| handle.ask_at_once(|reply| Command::Close { reply });
        // All are told before anybody is waited for.
        let closing: Vec<_> = self.handles().map(close).collect();
        for closed in closing {
            let _ = closed.await;
        }
    }

    /// Devices that were opened.
    fn handles(&self) -> impl Iterator<Item = &Handle> {
        self.slots.iter().filter_map(|slot| slot.handle.as_ref())
    }

    /// What each device is, holds and did.
    pub fn status(&self) -> Vec<DiskStatus> {
        self.slots.iter().map(Slot::status).collect()
    }
}

impl Slot {
    /// As people know it.
    fn name(&self) -> String {
        format!("{} ({})", self.status.device, self.status.path)
    }
}

#[cfg(test)]
mod tests;
