//! Save, Commit and Release: slots out, filled slots in, leases back.
//!
//! Upstairs:   `server`, and `inline` for the part after the bytes are here.
//! Downstairs: `session`, `region`, `tier::save`.

use std::sync::Arc;
use std::time::Instant;

use kvtier_proto::limits::KEYS_PER_CALL_MAX;
use kvtier_proto::{BlockKey, Quality, key_from_wire, quality_from_wire, v1};
use tonic::{Request, Status};

use super::{Shared, convert, kind};
use crate::block::{BlockFacts, BlockId, PlannedBlock};
use crate::metrics::{Acknowledge, Saved};
use crate::region::engine::EngineRegion;
use crate::region::{SlotName, Staging};
use crate::session::Session;
use crate::tier::Located;
use crate::tier::save::{Payload, SaveFailed};

/// A block that is here, and the quality of what it was made of.
pub type Kept = (BlockId, Quality);
/// How each block of a commit was accepted: what is here of it now.
pub type Accepted = Vec<(BlockKey, Result<Vec<Kept>, v1::CommitFailure>)>;

/// Reserves staging slots for blocks that are not stored yet.
pub async fn save(
    shared: &Shared,
    request: Request<v1::SaveRequest>,
) -> Result<v1::SaveReply, Status> {
    use v1::save_grant::Grant;
    let session = shared.session(&request, &request.get_ref().session)?;
    let asked = request.into_inner();
    check_count("blocks", asked.blocks.len())?;
    let room = Room::of(&session, asked.region)?;
    let planned = asked.blocks.iter().enumerate();
    let planned: Vec<_> = planned
        .map(|(at, block)| {
            let field = format!("blocks[{at}]");
            let planned = plan(&session, &field, block)?;
            room.check(&field, &planned, block.slot)?;
            Ok(planned)
        })
        .collect::<Result<_, Status>>()?;
    let present = present(shared, &session, &planned).await;
    let quota = session.tenant.host.arena().capacity();
    let mut grants = Vec::with_capacity(planned.len());
    let slots = asked.blocks.iter().map(|block| block.slot);
    for ((block, slot), present) in planned.into_iter().zip(slots).zip(present) {
        let grant = if let Some(acknowledge) = present {
            shared.metrics.save_blocks.of(Saved::Already).inc();
            Grant::Already(acknowledge as i32)
        } else if shared.draining() {
            refuse(shared, v1::SaveRefusal::Draining, Saved::Draining)
        } else if block.facts.layout.payload_len() > quota {
            refuse(shared, v1::SaveRefusal::OverQuota, Saved::OverQuota)
        } else {
            match room.grant(block, slot) {
                Some(slot) => Grant::Slot(convert::slot(slot)),
                None => refuse(shared, v1::SaveRefusal::RegionFull, Saved::RegionFull),
            }
        };
        grants.push(v1::SaveGrant { grant: Some(grant) });
    }
    Ok(v1::SaveReply { grants })
}

/// Where a save's blocks are, or will be.
enum Room {
    Staging(Arc<Staging>),
    Engine(Arc<EngineRegion>),
}

impl Room {
    fn of(session: &Session, number: u32) -> Result<Self, Status> {
        let staging = session.region(number).map(Self::Staging);
        let room = staging.or_else(|| session.engine(number).map(Self::Engine));
        let accepted = "a region of this session; RegisterRegion";
        room.ok_or_else(|| convert::bad_field("region", number, accepted))
    }

    /// An engine's slot must be there, and of the block's size.
    fn check(&self, field: &str, block: &PlannedBlock, slot: u32) -> Result<(), Status> {
        let Self::Engine(region) = self else {
            return Ok(());
        };
        if block.id.kind != region.kind() {
            let (kind, accepted) = (block.id.kind.as_str(), region.kind().as_str());
            let accepted = format!("{accepted}, the kind of the region's slots");
            return Err(convert::bad_field(format!("{field}.kind"), kind, accepted));
        }
        let (bytes, slot_bytes) = (block.facts.layout.payload_len(), region.slot_bytes());
        if bytes != slot_bytes {
            let accepted = format!("exactly {slot_bytes}, a slot of the region");
            return Err(convert::bad_field(
                field,
                format!("{bytes} bytes long"),
                accepted,
            ));
        }
        let accepted = "a slot of the region";
        let refused = |bad| convert::bad_field(format!("{field}.slot"), bad, accepted);
        region.check(slot).map_err(refused)
    }

    fn grant(&self, block: PlannedBlock, slot: u32) -> Option<SlotName> {
        match self {
            Self::Staging(staging) => staging.grant(block),
            Self::Engine(region) => region.grant(block, slot),
        }
    }
}

fn refuse(shared: &Shared, refusal: v1::SaveRefusal, saved: Saved) -> v1::save_grant::Grant {
    shared.metrics.save_blocks.of(saved).inc();
    v1::save_grant::Grant::Refused(refusal as i32)
}

/// What each block is acknowledged as already.
async fn present(
    shared: &Shared,
    session: &Session,
    planned: &[PlannedBlock],
) -> Vec<Option<v1::Acknowledge>> {
    let host = &session.tenant.host;
    let mut present = vec![None; planned.len()];
    // Blocks of one request are alike as a rule; ask for each run of a kind and quality together.
    let mut at = 0;
    let of = |block: &PlannedBlock| (block.id.kind, block.facts.through);
    for run in planned.chunk_by(|a, b| of(a) == of(b)) {
        let keys: Vec<BlockKey> = run.iter().map(|block| block.id.key).collect();
        let Some((kind, through)) = run.first().map(of) else {
            continue;
        };
        // What is stored worse than a save would store it is not there yet.
        let (tiers, accept) = (&shared.tiers, shared.tiers.quality_of_saves(host, through));
        let found = tiers.locate(host, kind, &keys, false, accept).await;
        let durable = tiers.still_durable(host, kind, &keys, through).await;
        for (place, durable) in found.into_iter().zip(durable) {
            let durable = match place {
                Err(_) => None,
                Ok(Located::Disk(..)) => Some(true),
                Ok(Located::Host) => Some(durable),
            };
            if let Some(place) = present.get_mut(at) {
                *place = durable.map(|durable| match durable {
                    true => v1::Acknowledge::Durable,
                    false => v1::Acknowledge::Accepted,
                });
            }
            at += 1;
        }
    }
    present
}

/// Checks what a client says of a block it wants to save.
pub fn plan(
    session: &Session,
    field: &str,
    block: &v1::BlockToSave,
) -> Result<PlannedBlock, Status> {
    let at = |name: &str| format!("{field}.{name}");
    let key = key_from_wire(&at("key"), &block.key).map_err(convert::invalid)?;
    let parent = key_from_wire(&at("parent"), &block.parent).map_err(convert::invalid)?;
    if key == parent {
        return Err(convert::bad_field(
            at("parent"),
            key.short(),
            "another block's key",
        ));
    }
    let kind = kind(block.kind)?;
    let through = quality_from_wire(&at("through"), block.through).map_err(convert::invalid)?;
    let layouts = &session.layouts;
    let layout = layouts
        .get(kind, block.tokens, block.opaque_bytes)
        .map_err(|problem| {
            Status::invalid_argument(format!("{field} cannot be laid out: {problem}"))
        })?;
    let id = BlockId {
        namespace: session.tenant.id,
        kind,
        key,
    };
    let facts = BlockFacts {
        parent,
        position: block.position,
        fingerprint: layouts.fingerprint(),
        layout,
        order: layouts.model().order,
        through,
    };
    Ok(PlannedBlock { id, facts })
}

/// Hands filled slots over, and waits for what was asked.
pub async fn commit(
    shared: &Shared,
    request: Request<v1::CommitRequest>,
) -> Result<v1::CommitReply, Status> {
    let session = shared.session(&request, &request.get_ref().session)?;
    let asked = request.into_inner();
    check_count("blocks", asked.blocks.len())?;
    let wait_for = wait_for(asked.wait_for)?;
    let begin = Instant::now();
    // All of them first: a call that is refused has done nothing.
    let keys = asked.blocks.iter().enumerate().map(|(at, block)| {
        let key = key_from_wire(&format!("blocks[{at}].key"), &block.key);
        let through = quality_from_wire(&format!("blocks[{at}].through"), block.through);
        key.and_then(|key| Ok((key, through?)))
            .map_err(convert::invalid)
    });
    let keys = keys.collect::<Result<Vec<_>, _>>()?;
    let gate = shared.saving().await?;
    let mut accepted = Vec::with_capacity(asked.blocks.len());
    for ((key, through), block) in keys.into_iter().zip(&asked.blocks) {
        let outcome = accept(shared, &session, (key, through), block).await;
        if outcome == Err(v1::CommitFailure::StaleSlot) {
            shared.metrics.save_blocks.of(Saved::StaleSlot).inc();
        }
        accepted.push((key, outcome));
    }
    drop(gate);
    Ok(settle(shared, &session, accepted, wait_for, begin).await)
}

async fn accept(
    shared: &Shared,
    session: &Session,
    (key, through): (BlockKey, Quality),
    block: &v1::FilledSlot,
) -> Result<Vec<Kept>, v1::CommitFailure> {
    let stale = v1::CommitFailure::StaleSlot;
    let Some(slot) = &block.slot else {
        let here = waiting(shared, session, key).await.ok_or(stale)?;
        return Ok(here.into_iter().map(|id| (id, through)).collect());
    };
    let taken = session
        .take(&convert::slot_name(slot), key.as_bytes())
        .map_err(|_| stale)?;
    let planned = taken.block().clone();
    store(shared, session, planned, taken, block.crc32).await
}

/// A block that Save said is there already: nothing is handed over, only waited for. It may have
/// left host memory since, when the device has it. The message names no kind, so that every kind
/// of the key is waited for.
async fn waiting(shared: &Shared, session: &Session, key: BlockKey) -> Option<Vec<BlockId>> {
    use strum::IntoEnumIterator;
    let (namespace, host) = (session.tenant.id, &session.tenant.host);
    let ids = kvtier_proto::PayloadKind::iter().map(|kind| BlockId {
        namespace,
        kind,
        key,
    });
    let (mut here, elsewhere): (Vec<_>, Vec<_>) = ids
        .partition(|id| shared.tiers.is_writing(host, *id) || host.info(&(id.kind, key)).is_some());
    if let Some(disk) = shared.tiers.disk() {
        let stored = disk.find(elsewhere.clone()).await;
        let stored = elsewhere.into_iter().zip(stored);
        here.extend(stored.filter_map(|(id, stored)| stored.map(|_| id)));
    }
    (!here.is_empty()).then_some(here)
}

/// Takes bytes into host memory.
pub async fn store(
    shared: &Shared,
    session: &Session,
    planned: PlannedBlock,
    payload: impl Payload,
    crc32: Option<u32>,
) -> Result<Vec<Kept>, v1::CommitFailure> {
    let kept = (planned.id, planned.facts.through);
    match shared
        .tiers
        .save(&session.tenant.host, planned, payload, crc32)
        .await
    {
        Ok(_) => Ok(vec![kept]),
        Err(SaveFailed::NoSpace | SaveFailed::Wiped) => Err(v1::CommitFailure::NoSpace),
        Err(SaveFailed::Checksum) => Err(v1::CommitFailure::Checksum),
    }
}

/// Waits for what the client asked for and says how each block ended.
pub async fn settle(
    shared: &Shared,
    session: &Session,
    accepted: Accepted,
    wait_for: v1::Acknowledge,
    begin: Instant,
) -> v1::CommitReply {
    use v1::commit_result::Result as Wire;
    shared
        .metrics
        .commit_seconds
        .of(Acknowledge::Accepted)
        .observe(begin.elapsed().as_secs_f64());
    let mut results = Vec::with_capacity(accepted.len());
    for (key, outcome) in accepted {
        let result = match outcome {
            Err(failure) => Wire::Failed(failure as i32),
            Ok(_) if wait_for == v1::Acknowledge::Accepted => Wire::Acknowledged(wait_for as i32),
            Ok(kept) => match all_durable(shared, session, kept).await {
                true => Wire::Acknowledged(v1::Acknowledge::Durable as i32),
                false => Wire::Failed(v1::CommitFailure::NotDurable as i32),
            },
        };
        results.push(v1::CommitResult {
            key: key.0.to_vec().into(),
            result: Some(result),
        });
    }
    if wait_for == v1::Acknowledge::Durable {
        shared
            .metrics
            .commit_seconds
            .of(Acknowledge::Durable)
            .observe(begin.elapsed().as_secs_f64());
    }
    v1::CommitReply { results }
}

async fn all_durable(shared: &Shared, session: &Session, kept: Vec<Kept>) -> bool {
    let (mut all, host) = (true, &session.tenant.host);
    for (id, through) in kept {
        all &= shared.tiers.durable(host, id, through).await;
    }
    all
}

/// What a client waits for.
pub fn wait_for(number: i32) -> Result<v1::Acknowledge, Status> {
    match v1::Acknowledge::try_from(number) {
        Ok(v1::Acknowledge::Accepted) => Ok(v1::Acknowledge::Accepted),
        Ok(v1::Acknowledge::Durable) => Ok(v1::Acknowledge::Durable),
        _ => Err(convert::bad_field(
            "wait_for",
            number,
            "ACCEPTED or DURABLE",
        )),
    }
}

/// Gives leases and unused slots back.
pub async fn release(
    shared: &Shared,
    request: Request<v1::ReleaseRequest>,
) -> Result<v1::ReleaseReply, Status> {
    let session = shared.session(&request, &request.get_ref().session)?;
    let asked = request.into_inner();
    let names = asked.leases.len() + asked.slots.len();
    if names > KEYS_PER_CALL_MAX {
        let value = format!("{names} names long in all");
        let accepted = format!("at most {KEYS_PER_CALL_MAX}");
        return Err(convert::bad_field("leases and slots", value, accepted));
    }
    let leases = asked
        .leases
        .iter()
        .filter(|lease| session.release(**lease))
        .count();
    let slots = asked.slots.iter().map(convert::slot_name);
    let slots = slots
        .filter(|slot| session.release_slot(slot).is_ok())
        .count();
    Ok(v1::ReleaseReply {
        released: convert::count(leases + slots),
    })
}

fn check_count(field: &str, count: usize) -> Result<(), Status> {
    if count == 0 || count > KEYS_PER_CALL_MAX {
        let (value, most) = (format!("{count} entries long"), KEYS_PER_CALL_MAX);
        return Err(convert::bad_field(
            field,
            value,
            format!("1 to {most} entries"),
        ));
    }
    Ok(())
}
