//! An engine's own host pool as a region: the daemon copies blocks from and to its slots.
//!
//! Upstairs:   engines that keep blocks in a memfd or a file on tmpfs; `Session::register_region`.
//! Downstairs: `link` registers and hands the descriptor over; `save` and `restore` do the rest.
//!
//! No byte of a block is copied on this side, and the pool is not mapped here. What a slot may be
//! used for is a question of who has it:
//!
//! ```text
//!   the engine's --- restore, save ---> the daemon's --- their end is told ---> the engine's
//! ```
//!
//! Invariants kept here
//!   W1  A slot is in one transfer at a time, and stays in it until the daemon has told its end,
//!       also when the restore or the future was dropped.
//!   W2  A transfer whose end was never told, since the session is lost, is over once the region is
//!       registered again: the daemon ends the lost session first, and copies nothing for it after.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use kvtier_proto::{BlockKey, PayloadKind, RegionGeometry, v1};
use tokio::sync::Notify;

use crate::check;
use crate::error::{Call, Error};
use crate::link::Link;
use crate::options::RestoreOptions;
use crate::restore::Restore;
use crate::save::{SAVE, SaveBlock, SaveOutcome, commit_whole};
use crate::session::Session;
use crate::values::{Acknowledge, SaveRefusal};

/// Who has the slots of a region, in one incarnation of its session.
#[derive(Debug, Default)]
struct Slots {
    taken: Mutex<HashSet<u32>>,
    freed: Notify,
}

impl Slots {
    fn lock(&self) -> MutexGuard<'_, HashSet<u32>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of these slots or none (W1).
    fn take(self: &Arc<Self>, names: &[u32]) -> Result<Taken, Error> {
        let mut taken = self.lock();
        let mut own = Taken {
            slots: Arc::clone(self),
            names: Vec::with_capacity(names.len()),
        };
        for name in names {
            if !taken.insert(*name) {
                drop(taken);
                return Err(Error::Busy {
                    message: format!("slot {name} is in another transfer, or named twice"),
                });
            }
            own.names.push(*name);
        }
        drop(taken);
        Ok(own)
    }
}

/// Slots of a transfer; free again when it is dropped.
#[derive(Debug)]
pub(crate) struct Taken {
    slots: Arc<Slots>,
    names: Vec<u32>,
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut taken = self.slots.lock();
        for name in &self.names {
            taken.remove(name);
        }
        drop(taken);
        self.slots.freed.notify_waiters();
    }
}

/// Where the blocks of a restore go.
pub(crate) struct Target {
    pub(crate) region: u32,
    pub(crate) slots: Vec<u32>,
    pub(crate) taken: Arc<Taken>,
}

impl Target {
    pub(crate) fn to_wire(&self) -> v1::IntoSlots {
        v1::IntoSlots {
            region: self.region,
            slots: self.slots.clone(),
        }
    }
}

/// The region in one incarnation of the session.
#[derive(Clone)]
struct Registered {
    link: Arc<Link>,
    number: u32,
    slots: Arc<Slots>,
}

/// A registered pool. It goes with the session: dropping this ends nothing at the daemon.
///
/// ```no_run
/// # use std::fs::File;
/// # use kvtier_client::{Acknowledge, Error, PayloadKind, Piece, RegionGeometry};
/// # use kvtier_client::{RestoreOptions, SaveBlock, Session};
/// # async fn engine(session: Session, pool: File, tokens: Vec<u32>) -> Result<(), Error> {
/// // 1000 slots, one behind the other, of a block that is 2 MiB.
/// let geometry = RegionGeometry {
///     kind: PayloadKind::Kv,
///     slots: 1000,
///     pieces: vec![Piece::row(0, 2 << 20, 2 << 20)],
/// };
/// let region = session.register_region(&pool, 1000 * (2 << 20), geometry).await?;
///
/// // The first block of a prompt is in slot 7: save it, and restore it into slot 8.
/// let keys = session.prefix_keys(&tokens, b"");
/// let blocks = SaveBlock::chain(&keys[..1], tokens.len(), 256, PayloadKind::Kv);
/// region.save(&[(blocks[0], 7)], Acknowledge::Durable).await?;
/// let restore = region.restore(&keys[..1], &[8], RestoreOptions::default()).await?;
/// println!("{} blocks are in their slots", restore.collect().await?.usable_blocks);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct EngineRegion {
    inner: Arc<Inner>,
}

struct Inner {
    session: Session,
    fd: OwnedFd,
    bytes: u64,
    geometry: RegionGeometry,
    current: tokio::sync::Mutex<Option<Registered>>,
}

impl Session {
    /// Registers memory of this engine: the first `bytes` bytes of `file`, a memfd or a file on
    /// tmpfs that is open for reading and writing. A memfd that is sealed against shrinking is
    /// copied to fastest.
    ///
    /// The daemon takes it from users that its operator trusts only.
    /// Errors: `Invalid` (the geometry; what is wrong with it and what is accepted), `Refused` (the
    /// user is not trusted), `Busy`, `Region` (the file is not one that can be used; why),
    /// `Timeout`, `SessionLost`, `Unavailable`. Cancel safety: what was registered stays with the
    /// session. Blocks: no. An example is at [`EngineRegion`].
    pub async fn register_region(
        &self,
        file: impl AsFd,
        bytes: u64,
        geometry: RegionGeometry,
    ) -> Result<EngineRegion, Error> {
        geometry
            .check(bytes, None)
            .map_err(|problem| Error::invalid(problem.to_string()))?;
        let fd = file.as_fd().try_clone_to_owned();
        let fd = fd.map_err(|error| Error::region_io(NAME, "dup", error))?;
        let inner = Inner {
            session: self.clone(),
            fd,
            bytes,
            geometry,
            current: tokio::sync::Mutex::new(None),
        };
        let inner = Arc::new(inner);
        inner.registered().await?;
        Ok(EngineRegion { inner })
    }
}

const NAME: &str = "engine";

impl Inner {
    /// The region in the session as it is now, registered again when that is a new one (W2).
    async fn registered(&self) -> Result<Registered, Error> {
        let mut current = self.current.lock().await;
        let link = self.session.link().await?;
        let before = current.as_ref();
        if let Some(before) = before.filter(|before| Arc::ptr_eq(&before.link, &link)) {
            return Ok(before.clone());
        }
        let request = v1::RegisterRegionRequest {
            session: link.session.clone(),
            bytes: self.bytes,
            purpose: v1::RegionPurpose::Engine.into(),
            geometry: Some((&self.geometry).into()),
            replaces: before.map_or_else(Bytes::new, |before| before.link.session.clone()),
        };
        let limit = self.session.timeouts().control;
        let number = link.hand_over(request, self.fd.as_fd(), limit).await?;
        let registered = Registered {
            link,
            number,
            slots: Arc::default(),
        };
        *current = Some(registered.clone());
        Ok(registered)
    }

    fn check(&self, slots: impl IntoIterator<Item = u32>) -> Result<(), Error> {
        let most = self.geometry.slots;
        match slots.into_iter().find(|slot| *slot >= most) {
            None => Ok(()),
            Some(slot) => Err(Error::invalid(format!(
                "slot {slot}; accepted: less than {most}, the slots of the region"
            ))),
        }
    }
}

impl EngineRegion {
    /// Where the slots lie.
    pub fn geometry(&self) -> &RegionGeometry {
        &self.inner.geometry
    }

    /// Starts restoring blocks into slots, one for each key. They arrive as
    /// [`RestoreEvent::Placed`](crate::RestoreEvent::Placed): a block is whole in its slot then,
    /// and nothing has to be released.
    ///
    /// **The slots are the daemon's until the restore's `Done` came**, whatever came of each block:
    /// one that is a miss may have been written in part. When the restore was dropped, or failed,
    /// [`settle`](Self::settle) says when they are the engine's again.
    ///
    /// Units and options: as [`Session::restore`]. The kind is the geometry's.
    /// Errors: as there; `Invalid` and `Busy` for slots that there are not, or that are in another
    /// transfer. Nothing started. Cancel safety: dropping the future or the `Restore` cancels.
    /// Blocks: no.
    pub async fn restore(
        &self,
        keys: &[BlockKey],
        slots: &[u32],
        options: RestoreOptions,
    ) -> Result<Restore, Error> {
        check::count(keys.len())?;
        if slots.len() != keys.len() {
            let (slots, keys) = (slots.len(), keys.len());
            return Err(Error::invalid(format!(
                "{slots} slots; accepted: {keys}, one for each key"
            )));
        }
        self.inner.check(slots.iter().copied())?;
        let now = self.inner.registered().await?;
        let target = Target {
            region: now.number,
            slots: slots.to_vec(),
            taken: Arc::new(now.slots.take(slots)?),
        };
        let (session, kind) = (&self.inner.session, self.kind());
        session
            .restore_over(now.link, keys, kind, options, Some(target))
            .await
    }

    /// Saves blocks that lie in slots, and waits until each is stored as `wait` asks.
    ///
    /// **The slots are the daemon's until this returns**; what is written there meanwhile may be
    /// what is stored. After an error, or a dropped future, see [`settle`](Self::settle).
    ///
    /// Units: 1 to 4096 blocks, each as large as a slot. Returns one [`SaveOutcome`] a block, in
    /// order; a block whose slot could not be read is
    /// [`CommitFailure::Checksum`](crate::CommitFailure::Checksum).
    /// Errors: `Invalid`, `Busy` (slots, as in [`restore`](Self::restore)); as
    /// [`Session::commit`]. Cancel safety: the save goes on without its caller. Blocks: no.
    pub async fn save(
        &self,
        blocks: &[(SaveBlock, u32)],
        wait: Acknowledge,
    ) -> Result<Vec<SaveOutcome>, Error> {
        check::count(blocks.len())?;
        let names: Vec<u32> = blocks.iter().map(|(_, slot)| *slot).collect();
        self.inner.check(names.iter().copied())?;
        let now = self.inner.registered().await?;
        let taken = now.slots.take(&names)?;
        let limit = self.inner.session.timeouts().commit;
        let session = &self.inner.session;
        let to_wire = |(block, slot): &(SaveBlock, u32)| v1::BlockToSave {
            slot: *slot,
            ..session.to_wire(block)
        };
        let wire = blocks.iter().map(to_wire).collect();
        let blocks = blocks.to_vec();
        let (link, region) = (Arc::clone(&now.link), now.number);
        let work = async move {
            let saved = save(&link, region, (&blocks, wire), wait).await;
            if saved.is_err() && !link.life.is_lost() {
                // What the daemon granted and did not take it still has to give up.
                let _ = link.releases.flushed(SAVE, limit).await;
            }
            // Until here, whoever has gone away meanwhile (W1).
            drop(taken);
            saved
        };
        now.link.see_through(SAVE, limit, work).await
    }

    /// Waits until no slot is in a transfer: of those that were dropped or failed before, all slots
    /// are the engine's again when this returns `Ok`. Registers the region again when the session
    /// was lost meanwhile.
    ///
    /// Errors: `Timeout`, `SessionLost`, `Unavailable`: slots of transfers whose end is not known
    /// may still be written. Cancel safety: yes. Blocks: no.
    pub async fn settle(&self) -> Result<(), Error> {
        const SETTLE: Call = Call::reads("settle");
        let now = self.inner.registered().await?;
        let limit = self.inner.session.timeouts().control;
        let free = async {
            loop {
                let mut freed = std::pin::pin!(now.slots.freed.notified());
                freed.as_mut().enable();
                if now.slots.lock().is_empty() {
                    return;
                }
                freed.await;
            }
        };
        tokio::select! {
            () = free => {
                // A lost session frees its slots as well: then only its end counts.
                match now.link.life.is_lost() {
                    true => self.inner.registered().await.map(|_| ()),
                    false => Ok(()),
                }
            }
            () = tokio::time::sleep(limit) => Err(SETTLE.timeout(limit)),
        }
    }

    fn kind(&self) -> PayloadKind {
        self.inner.geometry.kind
    }
}

impl std::fmt::Debug for EngineRegion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineRegion")
            .field("bytes", &self.inner.bytes)
            .field("slots", &self.inner.geometry.slots)
            .finish_non_exhaustive()
    }
}

/// Asks for the slots that hold new blocks, and hands those over.
async fn save(
    link: &Arc<Link>,
    region: u32,
    (blocks, wire): (&[(SaveBlock, u32)], Vec<v1::BlockToSave>),
    wait: Acknowledge,
) -> Result<Vec<SaveOutcome>, Error> {
    let request = v1::SaveRequest {
        session: link.session.clone(),
        region,
        blocks: wire,
    };
    let mut rpc = link.rpc.clone();
    let reply = link.answer(SAVE, rpc.save(request)).await?;
    let granted = granted(region, blocks, reply.grants);
    // A daemon that grants what cannot be is not one to leave slots with.
    let (outcomes, filled) = granted.inspect_err(|error| link.life.lose(&error.to_string()))?;
    let committed = match filled.is_empty() {
        true => Vec::new(),
        false => commit_whole(Arc::clone(link), filled, wait).await?,
    };
    let mut committed = committed.into_iter().map(SaveOutcome::from);
    let outcome = |outcome: Option<SaveOutcome>| outcome.or_else(|| committed.next());
    let outcomes: Option<Vec<SaveOutcome>> = outcomes.into_iter().map(outcome).collect();
    outcomes.ok_or_else(|| SAVE.bad_reply("a block without a result"))
}

/// What is known of each block, and the slots to hand over for those of which nothing is.
type Granted = (Vec<Option<SaveOutcome>>, Vec<v1::FilledSlot>);

fn granted(
    region: u32,
    blocks: &[(SaveBlock, u32)],
    grants: Vec<v1::SaveGrant>,
) -> Result<Granted, Error> {
    use v1::save_grant::Grant;
    if grants.len() != blocks.len() {
        let (got, asked) = (grants.len(), blocks.len());
        return Err(SAVE.bad_reply(format!("{got} grants for {asked} blocks")));
    }
    let (mut outcomes, mut filled) = (Vec::with_capacity(blocks.len()), Vec::new());
    for ((block, name), grant) in blocks.iter().zip(grants) {
        outcomes.push(match grant.grant {
            Some(Grant::Already(level)) => {
                Some(SaveOutcome::Already(Acknowledge::from_wire(SAVE, level)?))
            }
            Some(Grant::Refused(why)) => {
                Some(SaveOutcome::Refused(SaveRefusal::from_wire(SAVE, why)?))
            }
            Some(Grant::Slot(slot)) if (slot.region, slot.offset) == (region, (*name).into()) => {
                let key = check::key_to_wire(&block.key);
                filled.push(v1::FilledSlot {
                    key,
                    slot: Some(slot),
                    crc32: None,
                    through: 0,
                });
                None
            }
            _ => return Err(SAVE.bad_reply("a grant of another slot")),
        });
    }
    Ok((outcomes, filled))
}

#[cfg(test)]
mod tests;
