//! Loading: a record from the device into host memory, read once however many ask.
//!
//! Upstairs:   `restore`, and Prefetch.
//! Downstairs: `disk`, `codec`, `host`.
//!
//! Invariants kept here
//!   H1  A block is published only after its record was verified against namespace, key, kind
//!       and layout, and its parts are those of the layout.
//!   H2  Decoded bytes are published whole or not at all.

use std::sync::Arc;

use kvtier_proto::{LayoutFingerprint, Level, Miss};
use kvtier_store::{Record, Stored, Unverified};
use tokio::sync::watch;
use tokio::time::Instant;

use super::host::HostTier;
use super::{BlockEvent, Loaded, ROOM_WAIT, Tier, Tiers, codec};
use crate::block::{BlockFacts, BlockId, HostBlock, Layouts};
use crate::metrics::{Damage, Rung};

impl Tiers {
    /// The block in host memory, loaded when it is not there. Says which tier had it.
    ///
    /// Cancel safety: dropped early, a load that has started goes on for whoever asks next.
    pub async fn fetch(
        self: &Arc<Self>,
        host: &Arc<HostTier>,
        layouts: &Arc<Layouts>,
        id: BlockId,
    ) -> Result<(Arc<HostBlock>, Tier), Miss> {
        if let Some(block) = host.get(&(id.kind, id.key)) {
            return same_layout(block, layouts).map(|block| (block, Tier::Host));
        }
        let mut load = self.join_or_start(host, layouts, id)?;
        let loaded = load
            .wait_for(Option::is_some)
            .await
            .map_err(|_| Miss::Device)?
            .clone();
        let block = loaded.unwrap_or(Err(Miss::Device))?;
        same_layout(block, layouts).map(|block| (block, Tier::Disk))
    }

    /// Starts loading what is not there. Returns how many loads started.
    pub fn prefetch(
        self: &Arc<Self>,
        host: &Arc<HostTier>,
        layouts: &Arc<Layouts>,
        ids: impl IntoIterator<Item = BlockId>,
    ) -> u32 {
        let mut started = 0;
        for id in ids {
            let absent = host.info(&(id.kind, id.key)).is_none();
            if absent && self.join_or_start(host, layouts, id).is_ok() {
                started += 1;
            }
        }
        started
    }

    fn join_or_start(
        self: &Arc<Self>,
        host: &Arc<HostTier>,
        layouts: &Arc<Layouts>,
        id: BlockId,
    ) -> Result<watch::Receiver<Loaded>, Miss> {
        if self.disk.is_none() {
            return Err(Miss::Absent);
        }
        let name = (id, layouts.fingerprint());
        let mut loads = self.lock_loads();
        if let Some(load) = loads.get(&name) {
            return Ok(load.clone());
        }
        let (done, load) = watch::channel::<Loaded>(None);
        loads.insert(name, load.clone());
        let (tiers, host, layouts) = (Arc::clone(self), Arc::clone(host), Arc::clone(layouts));
        tokio::spawn(async move {
            let loaded = tiers.load(&host, &layouts, id).await;
            tiers.lock_loads().remove(&name);
            done.send_replace(Some(loaded));
        });
        Ok(load)
    }

    async fn load(
        self: &Arc<Self>,
        host: &Arc<HostTier>,
        layouts: &Arc<Layouts>,
        id: BlockId,
    ) -> Result<Arc<HostBlock>, Miss> {
        let disk = self.disk.as_ref().ok_or(Miss::Absent)?;
        let life = host.life();
        let stored = disk
            .find(vec![id])
            .await
            .into_iter()
            .next()
            .flatten()
            .ok_or(Miss::Absent)?;
        // Sound, and of another layout: nothing is read, and nothing is wrong with the record.
        if stored.layout_tag != tag(&layouts.fingerprint()) {
            return Err(Miss::WrongLayout);
        }
        let raw = stored.level == Level::RAW;
        let len = stored.place.len as usize;
        let buf = if raw {
            host.room_wait(len, Instant::now() + ROOM_WAIT).await
        } else {
            self.scratch.take(len).await
        };
        let unverified = disk
            .get(id, layouts.fingerprint(), buf.ok_or(Miss::NoSpace)?)
            .await?;
        let loaded = if raw {
            self.land_raw(layouts, id, unverified).await
        } else {
            self.land_decoded(host, layouts, id, unverified).await
        };
        self.scratch.freed();
        match loaded {
            Ok(block) => {
                let kept = host.insert(block, true, life).ok_or(Miss::Evicted)?;
                host.announce(BlockEvent {
                    key: id.key,
                    tier: Tier::Host,
                    removed: None,
                });
                Ok(kept)
            }
            Err(miss) => {
                self.refuse(host, disk, id, &stored, miss).await;
                Err(miss)
            }
        }
    }

    /// A record that cannot be served leaves the index, is counted, and is logged once.
    async fn refuse(
        &self,
        host: &HostTier,
        disk: &super::disk::DiskTier,
        id: BlockId,
        stored: &Stored,
        miss: Miss,
    ) {
        if !miss.is_damage() || miss == Miss::Device {
            return;
        }
        tracing::error!(
            key = %id.key, namespace = %id.namespace, reason = miss.as_str(),
            segment = stored.place.segment, offset = stored.place.offset,
            "a stored record is damaged; the block is a miss"
        );
        if let Some(damage) = Damage::of(miss) {
            self.metrics.corrupt.of(damage).inc();
        }
        disk.condemn(id, stored.place, miss).await;
        host.announce(BlockEvent {
            key: id.key,
            tier: Tier::Disk,
            removed: Some(miss),
        });
    }

    /// A raw record was read straight into the arena: verify it there and keep it.
    async fn land_raw(
        self: &Arc<Self>,
        layouts: &Arc<Layouts>,
        id: BlockId,
        unverified: Unverified,
    ) -> Result<HostBlock, Miss> {
        let _permit = self.cpu.acquire().await.map_err(|_| Miss::Device)?;
        let layouts = Arc::clone(layouts);
        let work = tokio::task::spawn_blocking(move || {
            let record = unverified.verify().map_err(|(_, miss)| miss)?;
            let facts = facts(&layouts, id, &record)?;
            codec::check_parts(&record, &facts.layout)?;
            let payload_at = record.head().header.summary.place.head_len as usize;
            HostBlock::new(id, facts, record.into_buf(), payload_at).ok_or(Miss::WrongLayout)
        });
        work.await.unwrap_or(Err(Miss::Undecodable))
    }

    /// An encoded record was read into scratch memory: verify, and decode into the arena.
    async fn land_decoded(
        self: &Arc<Self>,
        host: &Arc<HostTier>,
        layouts: &Arc<Layouts>,
        id: BlockId,
        unverified: Unverified,
    ) -> Result<HostBlock, Miss> {
        let (record, facts) = self.verify(layouts, id, unverified).await?;
        let len = facts.layout.payload_len();
        let room = host.room_wait(len, Instant::now() + ROOM_WAIT).await;
        let mut image = room.ok_or(Miss::NoSpace)?;
        let _permit = self.cpu.acquire().await.map_err(|_| Miss::Device)?;
        let tiers = Arc::clone(self);
        let work = tokio::task::spawn_blocking(move || {
            let begin = std::time::Instant::now();
            codec::decode(&tiers.codecs, &record, &facts, &mut image)?;
            let level = record.head().header.summary.level;
            tiers
                .metrics
                .decode_seconds
                .of(Rung::from(level))
                .inc_by(begin.elapsed().as_secs_f64());
            HostBlock::new(id, facts, image, 0).ok_or(Miss::WrongLayout)
        });
        work.await.unwrap_or(Err(Miss::Undecodable))
    }

    async fn verify(
        self: &Arc<Self>,
        layouts: &Arc<Layouts>,
        id: BlockId,
        unverified: Unverified,
    ) -> Result<(Record, BlockFacts), Miss> {
        let _permit = self.cpu.acquire().await.map_err(|_| Miss::Device)?;
        let layouts = Arc::clone(layouts);
        let work = tokio::task::spawn_blocking(move || {
            let record = unverified.verify().map_err(|(_, miss)| miss)?;
            let facts = facts(&layouts, id, &record)?;
            Ok((record, facts))
        });
        work.await.unwrap_or(Err(Miss::Undecodable))
    }
}

/// What the index keeps of a layout's fingerprint.
fn tag(layout: &LayoutFingerprint) -> u32 {
    let [a, b, c, d, ..] = layout.0;
    u32::from_le_bytes([a, b, c, d])
}

fn same_layout(block: Arc<HostBlock>, layouts: &Layouts) -> Result<Arc<HostBlock>, Miss> {
    if block.facts().fingerprint == layouts.fingerprint() {
        Ok(block)
    } else {
        Err(Miss::WrongLayout)
    }
}

/// What the record says of itself, as far as this model can have written it.
fn facts(layouts: &Layouts, id: BlockId, record: &Record) -> Result<BlockFacts, Miss> {
    let header = &record.head().header.summary;
    if header.kind != id.kind {
        return Err(Miss::WrongKey);
    }
    let raw_len = record
        .head()
        .parts()
        .iter()
        .map(|part| u64::from(part.raw_len))
        .sum();
    let declared = layouts
        .get(id.kind, header.tokens, 0)
        .ok()
        .map(|layout| layout.payload_len());
    let opaque = if declared.is_some_and(|len| len as u64 == raw_len) {
        0
    } else {
        raw_len
    };
    let layout = layouts
        .get(id.kind, header.tokens, opaque)
        .map_err(|_| Miss::WrongLayout)?;
    Ok(BlockFacts {
        parent: header.parent,
        position: header.position,
        fingerprint: header.layout,
        layout,
        order: layouts.model().order,
    })
}
