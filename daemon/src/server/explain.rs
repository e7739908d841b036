//! Explain: where a block is, and why a lookup of it misses.
//!
//! Upstairs:   `server`; `kvtier explain` speaks to it.
//! Downstairs: `tenant`, `tier`.
//!
//! A session may ask about its own namespace and nobody else's; operators may ask about all.

use std::sync::Arc;

use kvtier_proto::{
    BlockKey, LayoutFingerprint, Level, Miss, NamespaceId, PayloadKind, Quality, key_from_wire, v1,
};
use strum::IntoEnumIterator;
use tonic::{Request, Status};

use super::operate::operator;
use super::{Shared, convert};
use crate::block::BlockId;
use crate::tenant::Tenant;

/// Says where a block is, and why a lookup of it misses.
pub async fn explain(
    shared: &Shared,
    request: Request<v1::ExplainRequest>,
) -> Result<v1::ExplainReply, Status> {
    let asked = request.get_ref();
    let tenant = if asked.session.is_empty() {
        operator(shared, &request)?;
        let tenant = shared.tenants.numbered(NamespaceId(asked.namespace_id));
        Arc::clone(tenant.ok_or_else(|| {
            convert::bad_field(
                "namespace_id",
                asked.namespace_id,
                "a number that status shows",
            )
        })?)
    } else {
        Arc::clone(&shared.session(&request, &asked.session)?.tenant)
    };
    let key = key_from_wire("key", &asked.key).map_err(convert::invalid)?;
    let mut reply = v1::ExplainReply::default();
    let mut best = None;
    for kind in PayloadKind::iter() {
        let id = BlockId {
            namespace: tenant.id,
            kind,
            key,
        };
        let here = explain_kind(shared, &tenant, id, &mut reply).await;
        best = here.into_iter().chain(best).min();
    }
    match reply.variants.is_empty() {
        true => explain_miss(shared, tenant.id, key, &mut reply),
        false => explain_unfit(best, &mut reply),
    }
    Ok(reply)
}

/// Why a request that accepts nothing but exact bytes gets none of what is there, of which this is
/// the best that can be read.
fn explain_unfit(best: Option<Quality>, reply: &mut v1::ExplainReply) {
    match best {
        None => reply.miss = convert::miss(Miss::NoTables),
        Some(Quality::Exact) => {}
        Some(best) => {
            reply.miss = convert::miss(Miss::Quality);
            let best = best.as_str();
            reply.notes.push(format!(
                "what is stored lost something, or was made of what had: a request gets it when it accepts {best} or worse"
            ));
        }
    }
}

/// Says what model a block is of, where somebody has said what has this layout.
fn tell_model(shared: &Shared, layout: &LayoutFingerprint, reply: &mut v1::ExplainReply) {
    let Some(known) = shared.tiers.codecs().known(|name| name == layout) else {
        return;
    };
    // The adapter is no part of a layout: it may be another tenant's.
    reply.model = Some(v1::ModelDescriptor {
        adapter: String::new(),
        ..known.layouts.model().into()
    });
}

/// Name of a level, as this daemon knows it.
pub(super) fn level_name(shared: &Shared, level: Level) -> String {
    shared
        .tiers
        .codecs()
        .name(level)
        .unwrap_or("unknown")
        .into()
}

fn explain_miss(
    shared: &Shared,
    namespace: NamespaceId,
    key: BlockKey,
    reply: &mut v1::ExplainReply,
) {
    let Some(disk) = shared.tiers.disk() else {
        reply.miss = convert::miss(Miss::Absent);
        reply.notes.push(NOWHERE.to_owned());
        let alone = "there is no disk tier: blocks do not survive a restart";
        reply.notes.push(alone.to_owned());
        return;
    };
    // What KV would miss for: most blocks are nothing else.
    let kind = PayloadKind::Kv;
    let miss = disk.why_not(&BlockId {
        namespace,
        kind,
        key,
    });
    reply.miss = convert::miss(miss);
    reply.notes.push(match miss {
        Miss::Device => OUT.to_owned(),
        _ => NOWHERE.to_owned(),
    });
}

/// Why a block is nowhere.
const NOWHERE: &str = "no tier has a block of this key in this namespace: it was never saved, or \
    made room for others, or its record was damaged (kvtier_corrupt_total, and the log)";
/// Why nobody knows.
const OUT: &str = "the disk that a block of this key belongs to is out of service, and no other \
    tier has it: it may be there, or may never have been saved (status says which disk and why)";

/// What there is of one kind, and the best quality of it that can be read.
async fn explain_kind(
    shared: &Shared,
    tenant: &Tenant,
    id: BlockId,
    reply: &mut v1::ExplainReply,
) -> Option<Quality> {
    let in_memory = explain_host(shared, tenant, id, reply);
    let on_disk = explain_disk(shared, id, reply).await;
    in_memory.into_iter().chain(on_disk).min()
}

fn explain_host(
    shared: &Shared,
    tenant: &Tenant,
    id: BlockId,
    reply: &mut v1::ExplainReply,
) -> Option<Quality> {
    let wire_kind = v1::PayloadKind::from(id.kind) as i32;
    let info = tenant.host.info(&(id.kind, id.key))?;
    let quality = info.block.quality();
    let block = &info.block;
    let bytes = block.payload().len() as u64;
    reply.variants.push(v1::VariantInfo {
        kind: wire_kind,
        tier: v1::Tier::Host as i32,
        level: block.level().0.into(),
        level_name: level_name(shared, block.level()),
        stored_bytes: bytes,
        raw_bytes: bytes,
        leases: convert::count(info.holders),
        tokens: block.facts().layout.tokens(),
        parent: block.facts().parent.0.to_vec().into(),
        pinned: info
            .pinned_until
            .is_some_and(|until| until > std::time::Instant::now()),
        place: format!("arena offset {}", block.arena_offset()),
        device: None,
        quality: v1::Quality::from(quality) as i32,
        tables: 0,
        position: block.facts().position,
    });
    tell_model(shared, &block.facts().fingerprint, reply);
    if shared.tiers.is_writing(&tenant.host, id) {
        reply
            .notes
            .push("a write of this block to the disk tier is on its way".to_owned());
    } else if !info.durable {
        reply
            .notes
            .push("this block is in host memory only".to_owned());
    }
    Some(quality)
}

async fn explain_disk(
    shared: &Shared,
    id: BlockId,
    reply: &mut v1::ExplainReply,
) -> Option<Quality> {
    let wire_kind = v1::PayloadKind::from(id.kind) as i32;
    let disk = shared.tiers.disk()?;
    let stored = disk.find(vec![id]).await.into_iter().next().flatten()?;
    let quality = stored.quality();
    let head = shared.tiers.head(id, &stored).await;
    let missing = shared.tiers.missing_tables(id, &stored, head.as_ref());
    let block = head.map(|head| head.summary);
    reply.variants.push(v1::VariantInfo {
        kind: wire_kind,
        tier: v1::Tier::Disk as i32,
        level: stored.level.0.into(),
        level_name: level_name(shared, stored.level),
        stored_bytes: stored.place.len.into(),
        raw_bytes: head.map_or(0, |head| head.raw_len.into()),
        leases: 0,
        tokens: block.map_or(0, |block| block.tokens),
        parent: block
            .map_or_else(Vec::new, |block| block.parent.0.to_vec())
            .into(),
        pinned: stored.pinned,
        place: format!(
            "segment {} offset {}",
            stored.place.segment, stored.place.offset
        ),
        device: Some(stored.device.number()),
        quality: v1::Quality::from(quality) as i32,
        tables: missing.unwrap_or(0),
        position: block.map_or(0, |block| block.position),
    });
    if let Some(block) = block {
        tell_model(shared, &block.layout, reply);
    }
    if let Some(tables) = missing {
        let which = match tables {
            0 => "tables of its model".to_owned(),
            tables => format!("tables {tables:08x}"),
        };
        reply.notes.push(format!(
            "the record on disk was coded with {which}, which are not loaded (codec.tables); until \
             they are, it is a miss, and a save replaces it"
        ));
    }
    missing.is_none().then_some(quality)
}
