//! Saving: reserve places, fill them, commit them.
//!
//! Upstairs:   engines, through `Session`.
//! Downstairs: `Save` and `Commit` for staged slots; `Lookup` and `PutInline` where no region can
//!             be shared.
//!
//! Invariants kept here
//!   V1  What the daemon grants is held, committed or released, also when the caller goes away
//!       in the middle: grants and commits are seen through by a task.
//!   V2  A slot is committed over the link that granted it, or not at all.
//!
//! Not here on purpose
//!   No second attempt of a commit whose outcome is unknown: saving again answers `Already` when
//!   it did happen.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use kvtier_proto::limits::BLOCK_BYTES_MAX;
use kvtier_proto::{BlockKey, BlockLayout, PayloadKind, Quality, v1};
use tokio::sync::Semaphore;

use crate::check;
use crate::error::{Call, Error, Happened};
use crate::lineage::Lineage;
use crate::link::{Link, Region};
use crate::session::Session;
use crate::shm::Staging;
use crate::slot::{FilledSlot, OwnedSlot, Place, ReservedSlot, StagedSlot};
use crate::values::{Acknowledge, BlockStatus, CommitFailure, SaveRefusal, Tier};

pub(crate) const SAVE: Call = Call::changes("Save");
const COMMIT: Call = Call::changes("Commit");

/// A block to save: its name, place in the prefix and size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SaveBlock {
    /// Name of the block.
    pub key: BlockKey,
    /// Name of the block before; [`BlockKey::ROOT`] for the first.
    pub parent: BlockKey,
    /// Index of its first token in the prefix.
    pub position: u32,
    /// Tokens in it: 1 to the model's `block_tokens`.
    pub tokens: u32,
    /// What its bytes are.
    pub kind: PayloadKind,
    /// Payload bytes of an opaque block; 0 for kinds whose size the descriptor gives.
    pub opaque_bytes: u64,
}

impl SaveBlock {
    /// Blocks of one prefix from their keys, `block_tokens` tokens each, the last one shorter
    /// where `tokens` ends.
    pub fn chain(
        keys: &[BlockKey],
        tokens: usize,
        block_tokens: u32,
        kind: PayloadKind,
    ) -> Vec<Self> {
        let mut parent = BlockKey::ROOT;
        let mut position = 0u32;
        let total = u32::try_from(tokens).unwrap_or(u32::MAX);
        let mut blocks = Vec::with_capacity(keys.len());
        for key in keys {
            let tokens = total.saturating_sub(position).min(block_tokens);
            blocks.push(Self {
                key: *key,
                parent,
                position,
                tokens,
                kind,
                opaque_bytes: 0,
            });
            parent = *key;
            position = position.saturating_add(block_tokens);
        }
        blocks
    }

    pub(crate) fn to_wire(self, lineage: &Lineage) -> v1::BlockToSave {
        let through = lineage.of_save(self.key, &self.parent);
        v1::BlockToSave {
            key: check::key_to_wire(&self.key),
            parent: check::key_to_wire(&self.parent),
            position: self.position,
            tokens: self.tokens,
            kind: v1::PayloadKind::from(self.kind).into(),
            opaque_bytes: self.opaque_bytes,
            through: v1::Quality::from(through).into(),
            slot: 0,
        }
    }
}

/// Answer for one block of a reserve.
#[derive(Debug)]
pub enum Reservation {
    /// Fill this and commit it.
    Slot(ReservedSlot),
    /// Stored already, or on its way: nothing to do.
    Already(Acknowledge),
    /// Not now; the engine goes on without saving this block.
    Refused(SaveRefusal),
}

/// What became of one block of a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommitOutcome {
    /// Stored, and what that promises.
    Stored(Acknowledge),
    /// Not stored as asked.
    Failed(CommitFailure),
}

/// What became of one block of [`Session::save_blocks`] or [`Session::save_prefix`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SaveOutcome {
    /// Stored now.
    Stored(Acknowledge),
    /// Was stored before.
    Already(Acknowledge),
    /// Not saved: refused before it was filled.
    Refused(SaveRefusal),
    /// Not saved as asked: it failed at the commit.
    Failed(CommitFailure),
}

impl From<CommitOutcome> for SaveOutcome {
    fn from(outcome: CommitOutcome) -> Self {
        match outcome {
            CommitOutcome::Stored(got) => Self::Stored(got),
            CommitOutcome::Failed(why) => Self::Failed(why),
        }
    }
}

impl SaveOutcome {
    /// True when the block is at the daemon now, with this acknowledgement at least.
    pub fn is_stored(self, at_least: Acknowledge) -> bool {
        matches!(self, Self::Stored(got) | Self::Already(got) if got >= at_least)
    }
}

impl Session {
    /// Reserves a place for each block that is not stored yet.
    ///
    /// Units: `blocks` are 1 to 4096 blocks; a place is as large as the block's layout.
    /// Returns one [`Reservation`] a block, in order.
    /// Errors: `Invalid` (a size out of range, a session without staging memory; nothing
    /// happened), `Timeout` and `SessionLost` (what was granted is given back), `BadReply`.
    /// Cancel safety: dropping the future gives back what is granted. Blocks: no.
    ///
    /// ```no_run
    /// # use kvtier_client::{Error, Reservation, SaveBlock, Session};
    /// # async fn reserve(session: Session, blocks: Vec<SaveBlock>) -> Result<(), Error> {
    /// for reservation in session.reserve(&blocks).await? {
    ///     if let Reservation::Slot(slot) = reservation {
    ///         println!("fill {:?}", slot.missing());
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn reserve(&self, blocks: &[SaveBlock]) -> Result<Vec<Reservation>, Error> {
        check::count(blocks.len())?;
        let layouts = self.save_layouts(blocks)?;
        if self.inner.recipe.session.staging_bytes.get() == 0 {
            return Err(Error::invalid(
                "staging_bytes of this session is 0; accepted for saving: at least 64 KiB",
            ));
        }
        let link = self.link().await?;
        let limit = self.timeouts().control;
        let checksum = self.inner.recipe.session.checksum;
        let blocks: Vec<_> = blocks.iter().copied().zip(layouts).collect();
        if link.staging.is_none() {
            return self.reserve_owned(blocks).await;
        }
        let wire = blocks.iter().map(|(block, _)| self.to_wire(block));
        let wire = wire.collect();
        let work = {
            let link = Arc::clone(&link);
            async move { reserve_staged(&link, blocks, wire, checksum).await }
        };
        link.see_through(SAVE, limit, work).await
    }

    pub(crate) fn to_wire(&self, block: &SaveBlock) -> v1::BlockToSave {
        block.to_wire(&self.inner.lineage)
    }

    fn save_layouts(&self, blocks: &[SaveBlock]) -> Result<Vec<Arc<BlockLayout>>, Error> {
        let layouts = &self.inner.layouts;
        let layout = |(index, block): (usize, &SaveBlock)| {
            let layout = layouts.sized(block.kind, block.tokens, block.opaque_bytes);
            layout.map_err(|error| Error::invalid(format!("blocks[{index}]: {error}")))
        };
        blocks.iter().enumerate().map(layout).collect()
    }

    /// Places in this process for a daemon that cannot share memory: asks what is stored, and
    /// counts places against the staging size.
    async fn reserve_owned(
        &self,
        blocks: Vec<(SaveBlock, Arc<BlockLayout>)>,
    ) -> Result<Vec<Reservation>, Error> {
        let mut found: HashMap<(PayloadKind, BlockKey), BlockStatus> = HashMap::new();
        let lineage = &self.inner.lineage;
        let alike = |(block, _): &(SaveBlock, _)| {
            let through = lineage.of_save(block.key, &block.parent);
            ((block.kind, through), block.key)
        };
        let mut groups: BTreeMap<(PayloadKind, Quality), Vec<BlockKey>> = BTreeMap::new();
        for (of, key) in blocks.iter().map(alike) {
            groups.entry(of).or_default().push(key);
        }
        for ((kind, through), keys) in groups {
            let lookup = self.look(&keys, kind, false, through).await?;
            let keyed = keys.into_iter().zip(lookup.blocks);
            found.extend(keyed.map(|(key, status)| ((kind, key), status)));
        }
        let checksum = self.inner.recipe.session.checksum;
        let reserve = |(block, layout): (SaveBlock, Arc<BlockLayout>)| {
            match found.get(&(block.kind, block.key)) {
                Some(BlockStatus::Present(Tier::Disk)) => {
                    return Reservation::Already(Acknowledge::Durable);
                }
                Some(BlockStatus::Present(_)) => {
                    return Reservation::Already(Acknowledge::Accepted);
                }
                _ => {}
            }
            match own(&self.inner.own_room, layout.payload_len()) {
                Some(slot) => {
                    let place = Place::Owned(slot);
                    Reservation::Slot(ReservedSlot::new(block, layout, place, checksum))
                }
                None => Reservation::Refused(SaveRefusal::RegionFull),
            }
        };
        Ok(blocks.into_iter().map(reserve).collect())
    }

    /// Hands filled blocks over and waits until each is stored as `wait` asks.
    ///
    /// Units: at most 4096 slots; none is fine. Returns one [`CommitOutcome`] a slot, in order.
    /// A slot of a session that was lost since is [`CommitFailure::StaleSlot`].
    /// Errors: `Invalid` (too many; all are given back), `Timeout` and `SessionLost` with
    /// [`Happened::Unknown`](crate::Happened::Unknown): the blocks may be stored or not; look
    /// them up, or save them again.
    /// Cancel safety: the commit goes on without its caller. Blocks: no.
    ///
    /// ```no_run
    /// # use kvtier_client::{Acknowledge, CommitOutcome, Error, FilledSlot, Session};
    /// # async fn commit(session: Session, filled: Vec<FilledSlot>) -> Result<(), Error> {
    /// for outcome in session.commit(filled, Acknowledge::Durable).await? {
    ///     if let CommitOutcome::Failed(why) = outcome {
    ///         println!("one block is not durable: {why:?}");
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn commit(
        &self,
        slots: Vec<FilledSlot>,
        wait: Acknowledge,
    ) -> Result<Vec<CommitOutcome>, Error> {
        if slots.is_empty() {
            return Ok(Vec::new());
        }
        check::count(slots.len())?;
        let stale = CommitOutcome::Failed(CommitFailure::StaleSlot);
        let mut outcomes = vec![stale; slots.len()];
        let mut staged: Option<(Arc<Link>, Vec<usize>, Vec<v1::FilledSlot>)> = None;
        let mut owned = (Vec::new(), Vec::new());
        for (index, slot) in slots.into_iter().enumerate() {
            let (key, crc32) = (slot.block.key, slot.crc32);
            match slot.place {
                Place::Owned(_) => {
                    owned.0.push(index);
                    owned.1.push(slot);
                }
                Place::Staged(place) => {
                    let link = Arc::clone(place.link());
                    if link.life.is_lost() {
                        continue;
                    }
                    // A new link exists only when the one before is lost: all that are not
                    // stale are of one link (V2).
                    let batch = staged.get_or_insert_with(|| (link, Vec::new(), Vec::new()));
                    let key = check::key_to_wire(&key);
                    let slot = Some(place.hand_over());
                    batch.1.push(index);
                    batch.2.push(v1::FilledSlot {
                        key,
                        slot,
                        crc32,
                        through: 0,
                    });
                }
            }
        }
        if let Some((link, indices, blocks)) = staged {
            let results = commit_staged(&link, blocks, wait, self.timeouts().commit).await?;
            place(&mut outcomes, indices, results);
        }
        if !owned.1.is_empty() {
            let results = self.put_filled(owned.1, wait).await?;
            place(&mut outcomes, owned.0, results);
        }
        Ok(outcomes)
    }
}

impl Session {
    /// Waits until blocks that were accepted before are durable.
    ///
    /// Units: `keys` are 1 to 4096 blocks that a commit or a reserve said are accepted.
    /// Returns one [`CommitOutcome`] a block, in order: [`CommitFailure::NotDurable`] when it will
    /// not become durable, [`CommitFailure::StaleSlot`] when the daemon does not have it.
    /// Errors: `Invalid`, `Timeout`, `SessionLost`. Cancel safety: yes. Blocks: no.
    ///
    /// ```no_run
    /// # use kvtier_client::{BlockKey, Error, Session};
    /// # async fn settle(session: Session, saved: Vec<BlockKey>) -> Result<(), Error> {
    /// let outcomes = session.wait_durable(&saved).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn wait_durable(&self, keys: &[BlockKey]) -> Result<Vec<CommitOutcome>, Error> {
        check::count(keys.len())?;
        let link = self.link().await?;
        let name = |key| v1::FilledSlot {
            key: check::key_to_wire(key),
            slot: None,
            crc32: None,
            through: v1::Quality::from(self.quality_of(key)).into(),
        };
        let blocks = keys.iter().map(name).collect();
        commit_staged(&link, blocks, Acknowledge::Durable, self.timeouts().commit).await
    }
}

fn place(outcomes: &mut [CommitOutcome], indices: Vec<usize>, results: Vec<CommitOutcome>) {
    for (index, result) in indices.into_iter().zip(results) {
        if let Some(outcome) = outcomes.get_mut(index) {
            *outcome = result;
        }
    }
}

/// Room for one payload in this process, counted in KiB; `None` when it is used up.
fn own(room: &Arc<Semaphore>, len: usize) -> Option<OwnedSlot> {
    let kib = u32::try_from(len.div_ceil(1024)).ok()?;
    let permit = Arc::clone(room).try_acquire_many_owned(kib).ok()?;
    debug_assert!(u64::try_from(len).is_ok_and(|len| len <= BLOCK_BYTES_MAX.get()));
    Some(OwnedSlot {
        bytes: vec![0; len],
        _room: permit,
    })
}

async fn reserve_staged(
    link: &Arc<Link>,
    blocks: Vec<(SaveBlock, Arc<BlockLayout>)>,
    wire: Vec<v1::BlockToSave>,
    checksum: bool,
) -> Result<Vec<Reservation>, Error> {
    let region = link.staging.as_ref();
    let region = region.ok_or_else(|| SAVE.bad_reply("the staging region is gone"))?;
    let request = v1::SaveRequest {
        session: link.session.clone(),
        region: region.number,
        blocks: wire,
    };
    let mut rpc = link.rpc.clone();
    let reply = link.answer(SAVE, rpc.save(request)).await?;
    if reply.grants.len() != blocks.len() {
        let (got, asked) = (reply.grants.len(), blocks.len());
        let problem = format!("{got} grants for {asked} blocks");
        link.life.lose(&problem);
        return Err(SAVE.bad_reply(problem));
    }
    let mut reservations = Vec::with_capacity(blocks.len());
    for ((block, layout), grant) in blocks.into_iter().zip(reply.grants) {
        let reservation = granted(link, region, block, layout, grant, checksum);
        // A daemon that grants what cannot be is not one to leave slots with: the session ends
        // and takes all its slots along.
        reservations.push(reservation.inspect_err(|error| link.life.lose(&error.to_string()))?);
    }
    Ok(reservations)
}

fn granted(
    link: &Arc<Link>,
    region: &Region<Staging>,
    block: SaveBlock,
    layout: Arc<BlockLayout>,
    grant: v1::SaveGrant,
    checksum: bool,
) -> Result<Reservation, Error> {
    use v1::save_grant::Grant;
    match grant.grant {
        Some(Grant::Already(level)) => {
            Acknowledge::from_wire(SAVE, level).map(Reservation::Already)
        }
        Some(Grant::Refused(why)) => SaveRefusal::from_wire(SAVE, why).map(Reservation::Refused),
        Some(Grant::Slot(slot)) => {
            let len = region.map.len();
            let range = check::slot_range(Some(&slot), region.number, len, &layout)
                .map_err(|problem| SAVE.bad_reply(problem))?;
            let span = region.map.claim(range).ok_or_else(|| {
                let offset = slot.offset;
                SAVE.bad_reply(format!(
                    "the slot at {offset} overlaps one still being filled"
                ))
            })?;
            let place = Place::Staged(StagedSlot::new(span, slot, Arc::clone(link)));
            Ok(Reservation::Slot(ReservedSlot::new(
                block, layout, place, checksum,
            )))
        }
        None => Err(SAVE.bad_reply("a grant is empty")),
    }
}

async fn commit_staged(
    link: &Arc<Link>,
    blocks: Vec<v1::FilledSlot>,
    wait: Acknowledge,
    limit: std::time::Duration,
) -> Result<Vec<CommitOutcome>, Error> {
    let work = commit_whole(Arc::clone(link), blocks, wait);
    link.see_through(COMMIT, limit, work).await
}

/// Ends when the daemon reads none of the slots any more, or the session is lost. To be seen
/// through: dropping it in the middle leaves slots with the daemon.
pub(crate) async fn commit_whole(
    link: Arc<Link>,
    blocks: Vec<v1::FilledSlot>,
    wait: Acknowledge,
) -> Result<Vec<CommitOutcome>, Error> {
    let keys: Vec<_> = blocks.iter().map(|block| block.key.clone()).collect();
    let slots: Vec<_> = blocks.iter().filter_map(|block| block.slot).collect();
    let request = v1::CommitRequest {
        session: link.session.clone(),
        blocks,
        wait_for: wait.to_wire(),
    };
    let mut rpc = link.rpc.clone();
    let answer = link.answer(COMMIT, rpc.commit(request)).await;
    let outcomes = answer.and_then(|reply| results(COMMIT, &keys, &reply));
    outcomes.inspect_err(|error| take_back(&link, slots, error))
}

/// A commit failed as a whole. Slots that the daemon refused unseen are given back; where it may
/// still read them, releasing one could put another block's bytes under this one's name, so the
/// session ends and takes them along.
fn take_back(link: &Link, slots: Vec<v1::Slot>, error: &Error) {
    match error.happened() {
        Happened::No => slots
            .into_iter()
            .for_each(|slot| link.releases.put_slot(slot)),
        Happened::Unknown => link.life.lose(&error.to_string()),
    }
}

/// Reads results, which must answer for the same keys in the same order.
pub(crate) fn results<K: AsRef<[u8]>>(
    call: Call,
    keys: &[K],
    reply: &v1::CommitReply,
) -> Result<Vec<CommitOutcome>, Error> {
    use v1::commit_result::Result as Outcome;
    let (got, asked) = (reply.results.len(), keys.len());
    if got != asked {
        return Err(call.bad_reply(format!("{got} results for {asked} blocks")));
    }
    let read = |(key, result): (&K, &v1::CommitResult)| {
        if result.key.as_ref() != key.as_ref() {
            return Err(call.bad_reply("a result is of another block"));
        }
        match result.result {
            Some(Outcome::Acknowledged(level)) => {
                Acknowledge::from_wire(call, level).map(CommitOutcome::Stored)
            }
            Some(Outcome::Failed(why)) => {
                CommitFailure::from_wire(call, why).map(CommitOutcome::Failed)
            }
            None => Err(call.bad_reply("a result is empty")),
        }
    };
    keys.iter().zip(&reply.results).map(read).collect()
}
