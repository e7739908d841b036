//! Loading: a record from the device into host memory, read once however many ask.
//!
//! Upstairs:   `restore`, and Prefetch.
//! Downstairs: `disk`, `codec`, `host`.
//!
//! Invariants kept here
//!   H1  A block is published only after its record was verified against namespace, key, kind,
//!       level and layout, and its parts are those of the layout.
//!   H2  Decoded bytes are published whole or not at all.
//!   A1  A block of a worse quality than is accepted is neither handed out nor read.

use std::sync::Arc;

use kvtier_kernels::Registry;
use kvtier_proto::{BlockLayout, Level, Miss, Quality};
use kvtier_store::mem::IoBuf;
use kvtier_store::{Record, Stored, Unverified};
use tokio::sync::{AcquireError, watch};
use tokio::task::{JoinError, JoinSet};

use super::codec::DecodeFailed;
use super::disk::{DiskTier, Held, OnDisk};
use super::host::HostTier;
use super::scratch::Line;
use super::{BlockEvent, LoadName, Loaded, Tier, Tiers, codec};
use crate::block::{BlockFacts, BlockId, HostBlock, Layouts};
use crate::metrics::Damage;

impl Tiers {
    /// The block in host memory, at least as good as `accept`; loaded when it is not there. Says
    /// which tier had it.
    ///
    /// Cancel safety: dropped early, a load whose read has begun goes on for whoever asks next. One
    /// that still waits for its turn ends there, unless somebody else waits for it.
    pub async fn fetch(
        self: &Arc<Self>,
        host: &Arc<HostTier>,
        layouts: &Arc<Layouts>,
        id: BlockId,
        accept: Quality,
    ) -> Result<(Arc<HostBlock>, Tier), Miss> {
        let here = host.get(&(id.kind, id.key));
        let (fit, unfit) = match here {
            Some(block) if accept.accepts(block.quality()) => (Some(block), false),
            here => (None, here.is_some()),
        };
        if let Some(block) = fit {
            return same_layout(block, layouts).map(|block| (block, Tier::Host));
        }
        let absent = |miss| match (miss, unfit) {
            // It is here, and not good enough.
            (Miss::Absent, true) => Miss::Quality,
            _ => miss,
        };
        let mut load = self
            .join_or_start(host, layouts, id, accept)
            .map_err(absent)?;
        let loaded = load
            .wait_for(Option::is_some)
            .await
            .map_err(|_| Miss::Device)?
            .clone();
        let block = loaded.unwrap_or(Err(Miss::Device)).map_err(absent)?;
        if !accept.accepts(block.quality()) {
            return Err(Miss::Quality);
        }
        same_layout(block, layouts).map(|block| (block, Tier::Disk))
    }

    /// Starts loading what is not there, in this order and a few at a time; restores do not wait
    /// behind it. Returns how many blocks are to come. It gives up when host memory is held.
    pub fn prefetch(
        self: &Arc<Self>,
        host: &Arc<HostTier>,
        layouts: &Arc<Layouts>,
        ids: impl IntoIterator<Item = BlockId>,
        accept: Quality,
    ) -> u32 {
        let Ok(call) = Arc::clone(&host.lines.prefetches).try_acquire_owned() else {
            return 0;
        };
        let absent = |id: &BlockId| {
            let here = host.info(&(id.kind, id.key));
            here.is_none_or(|here| !accept.accepts(here.block.quality()))
        };
        let wanted: Vec<BlockId> = ids.into_iter().filter(absent).collect();
        if self.disk.is_none() || wanted.is_empty() {
            return 0;
        }
        let count = u32::try_from(wanted.len()).unwrap_or(u32::MAX);
        let (tiers, host, layouts) = (Arc::clone(self), Arc::clone(host), Arc::clone(layouts));
        tokio::spawn(async move {
            let mut loads = JoinSet::new();
            for id in wanted {
                let line = Arc::clone(&host.lines.prefetched);
                let Ok(turn) = line.acquire_owned().await else {
                    return;
                };
                let (tiers, host) = (Arc::clone(&tiers), Arc::clone(&host));
                let layouts = Arc::clone(&layouts);
                loads.spawn(async move {
                    let loaded = tiers.fetch(&host, &layouts, id, accept).await;
                    drop(turn);
                    loaded.err()
                });
                while let Some(ended) = loads.try_join_next() {
                    if matches!(ended, Ok(Some(Miss::NoSpace))) {
                        return loads.detach_all();
                    }
                }
            }
            loads.detach_all();
            drop(call);
        });
        count
    }

    fn join_or_start(
        self: &Arc<Self>,
        host: &Arc<HostTier>,
        layouts: &Arc<Layouts>,
        id: BlockId,
        accept: Quality,
    ) -> Result<watch::Receiver<Loaded>, Miss> {
        if self.disk.is_none() {
            return Err(Miss::Absent);
        }
        let name = (id, layouts.fingerprint(), accept);
        let mut loads = self.lock_loads();
        if let Some(load) = loads.get(&name) {
            return Ok(load.subscribe());
        }
        let (done, load) = watch::channel::<Loaded>(None);
        loads.insert(name, done.clone());
        let (tiers, host, layouts) = (Arc::clone(self), Arc::clone(host), Arc::clone(layouts));
        tokio::spawn(async move {
            let turn = host.lines.loads.acquire().await;
            if tiers.is_given_up(&name) {
                return;
            }
            let loaded = match turn {
                Ok(_turn) => tiers.load(&host, &layouts, id, accept).await,
                Err(closed) => Err(stopping(closed)),
            };
            tiers.lock_loads().remove(&name);
            done.send_replace(Some(loaded));
        });
        Ok(load)
    }

    /// True when nobody waits for a load any more: then nobody can begin to.
    fn is_given_up(&self, name: &LoadName) -> bool {
        let mut loads = self.lock_loads();
        let given_up = loads
            .get(name)
            .is_some_and(|done| done.receiver_count() == 0);
        if given_up {
            loads.remove(name);
        }
        given_up
    }

    /// Loads a block, when it is its turn.
    async fn load(
        self: &Arc<Self>,
        host: &Arc<HostTier>,
        layouts: &Arc<Layouts>,
        id: BlockId,
        accept: Quality,
    ) -> Result<Arc<HostBlock>, Miss> {
        let disk = self.disk.as_ref().ok_or(Miss::Absent)?;
        let life = host.life();
        let stored = disk
            .find(vec![id])
            .await
            .into_iter()
            .next()
            .flatten()
            .ok_or_else(|| disk.why_not(&id))?;
        // Sound, and of another layout: nothing is read, and nothing is wrong with the record.
        if !stored.has_layout(&layouts.fingerprint()) {
            return Err(Miss::WrongLayout);
        }
        // Sound as well, and nothing is wrong with it but that this reader cannot have it.
        if let Some(miss) = self.why_unfit(&id, &stored, accept) {
            return Err(miss);
        }
        let mut loaded = self.load_once(host, disk, layouts, id, &stored).await;
        if loaded
            .as_ref()
            .err()
            .is_some_and(|miss| may_be_misread(*miss))
        {
            // One failed or wrong read is not yet a record that cannot be read.
            loaded = self.load_once(host, disk, layouts, id, &stored).await;
        }
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

    pub(super) async fn load_once(
        self: &Arc<Self>,
        host: &HostTier,
        disk: &DiskTier,
        layouts: &Arc<Layouts>,
        id: BlockId,
        stored: &OnDisk,
    ) -> Result<HostBlock, Miss> {
        if stored.level == Level::RAW {
            self.load_raw(host, disk, layouts, id, stored).await
        } else {
            self.load_encoded(host, disk, layouts, id, stored).await
        }
    }

    /// A record that cannot be served leaves the index, is counted, and is logged once. Otherwise
    /// its block would be called durable for ever: every restore would miss, and no save of it
    /// would be written again. That holds for a read that failed twice as well: the block is lost
    /// until it is saved again, and its next acknowledgement is good. A device that has failed as
    /// a whole says nothing of the record; the disk tier then keeps it.
    async fn refuse(
        &self,
        host: &HostTier,
        disk: &DiskTier,
        id: BlockId,
        stored: &OnDisk,
        miss: Miss,
    ) {
        let damage = Damage::of(miss);
        if damage.is_none() && miss != Miss::Unsupported {
            return;
        }
        if !disk.condemn(id, stored, miss).await {
            return;
        }
        if let Some(damage) = damage {
            self.metrics.corrupt.of(damage).inc();
            tracing::error!(
                key = %id.key, namespace = %id.namespace, reason = miss.as_str(),
                device = stored.device.number(), segment = stored.place.segment,
                offset = stored.place.offset,
                "a stored record is damaged; the block is a miss"
            );
        }
        host.announce(BlockEvent {
            key: id.key,
            tier: Tier::Disk,
            removed: Some(miss),
        });
    }

    /// A raw record is read straight into the arena, verified there and kept.
    async fn load_raw(
        self: &Arc<Self>,
        host: &HostTier,
        disk: &DiskTier,
        layouts: &Arc<Layouts>,
        id: BlockId,
        stored: &OnDisk,
    ) -> Result<HostBlock, Miss> {
        let room = self.room(host, stored.place.len as usize).await;
        let buf = room.ok_or(Miss::NoSpace)?;
        let unverified = get_found(disk, id, layouts, stored, buf, None).await?;
        let _permit = self.cpu.acquire().await.map_err(stopping)?;
        let (layouts, stored) = (Arc::clone(layouts), **stored);
        let work = tokio::task::spawn_blocking(move || {
            let record = unverified.verify().map_err(|(_, miss)| miss)?;
            let facts = facts(&layouts, id, &stored, &record)?;
            let payload_at = record.head().header.summary.place.head_len as usize;
            let mut image = record.into_buf();
            // Clients map the arena: what the store writes for itself is not for them.
            image.get_mut(..payload_at).unwrap_or_default().fill(0);
            HostBlock::new(id, facts, image, payload_at).ok_or(Miss::WrongLayout)
        });
        ended(work.await)
    }

    /// An encoded record is read into scratch memory, verified, and decoded into the arena.
    async fn load_encoded(
        self: &Arc<Self>,
        host: &HostTier,
        disk: &DiskTier,
        layouts: &Arc<Layouts>,
        id: BlockId,
        stored: &OnDisk,
    ) -> Result<HostBlock, Miss> {
        let codecs = self.codecs.of(layouts);
        let mut reserved = None;
        loop {
            let held = disk
                .may_hold(stored.device, stored.place.len as usize)
                .await?;
            let scratch = self.scratch.take(stored.place.len as usize, Line::Load);
            let buf = scratch.await.ok_or(Miss::NoSpace)?;
            let unverified = get_found(disk, id, layouts, stored, buf, Some(held)).await?;
            let verified = self.verify(layouts, id, stored, unverified);
            let (record, facts) = verified.await?;
            let len = facts.layout.payload_len();
            // How large the block is, only the record says.
            let image = match reserved.take() {
                Some(image) => Some(image),
                None => self.room_now(host, len),
            };
            if let Some(image) = image.filter(|image| image.len() == len) {
                let decoded = self.decode(&codecs, id, record, facts, image).await?;
                return decoded.map_err(|tables| {
                    self.unreadable
                        .add(id, (stored.device, stored.place), tables);
                    Miss::NoTables
                });
            }
            // Waiting for room may take long: the record is given up, and read again (M4).
            drop(record);
            reserved = Some(self.room(host, len).await.ok_or(Miss::NoSpace)?);
        }
    }

    /// Decodes a record into `image`. The inner error is the tables that it needs and that are not
    /// loaded.
    async fn decode(
        self: &Arc<Self>,
        codecs: &Arc<Registry>,
        id: BlockId,
        record: Record,
        facts: BlockFacts,
        mut image: IoBuf,
    ) -> Result<Result<HostBlock, u32>, Miss> {
        let raw = facts.layout.payload_len();
        let cores = self.cores(raw).await.map_err(stopping)?;
        let (workers, codecs) = (cores.num_permits(), Arc::clone(codecs));
        let tiers = Arc::clone(self);
        let work = tokio::task::spawn_blocking(move || {
            let header = &record.head().header.summary;
            let (level, stored) = (header.level, header.place.len);
            let time = match codec::decode(&codecs, &record, &facts, &mut image, workers) {
                Ok(time) => time,
                Err(DecodeFailed::Tables(tables)) => return Ok(Err(tables)),
                Err(DecodeFailed::Miss(miss)) => return Err(miss),
            };
            tiers.count_decoded(level, (raw, stored), time);
            let block = HostBlock::restored(id, facts, level, (image, 0));
            block.map(Ok).ok_or(Miss::WrongLayout)
        });
        ended(work.await)
    }

    pub(super) async fn verify(
        self: &Arc<Self>,
        layouts: &Arc<Layouts>,
        id: BlockId,
        stored: &OnDisk,
        unverified: Unverified,
    ) -> Result<(Record, BlockFacts), Miss> {
        let _permit = self.cpu.acquire().await.map_err(stopping)?;
        let (layouts, stored) = (Arc::clone(layouts), **stored);
        let work = tokio::task::spawn_blocking(move || {
            let record = unverified.verify().map_err(|(_, miss)| miss)?;
            let facts = facts(&layouts, id, &stored, &record)?;
            Ok((record, facts))
        });
        ended(work.await)
    }
}

/// Reads the record that was found. Another may have taken its place meanwhile, of another level
/// perhaps: read as if it were this one, its bytes would be wrong.
pub(super) async fn get_found(
    disk: &DiskTier,
    id: BlockId,
    layouts: &Layouts,
    stored: &OnDisk,
    buf: IoBuf,
    held: Option<Held>,
) -> Result<Unverified, Miss> {
    let unverified = disk
        .get(id, layouts.fingerprint(), buf, stored.device, held)
        .await?;
    if unverified.place() == stored.place {
        Ok(unverified)
    } else {
        Err(Miss::Evicted)
    }
}

/// True for a miss that another read of the same record may not meet. Not for one that speaks of
/// bytes which passed their checksums: they would be the same.
fn may_be_misread(miss: Miss) -> bool {
    let of_sound_bytes = matches!(miss, Miss::Undecodable | Miss::WrongLayout | Miss::WrongKey);
    Damage::of(miss).is_some() && !of_sound_bytes
}

/// A daemon that stops has nothing to say against the record.
fn stopping(_: AcquireError) -> Miss {
    Miss::Deadline
}

/// How work on another thread ended. A decoder that panicked has refused its bytes.
fn ended<T>(work: Result<Result<T, Miss>, JoinError>) -> Result<T, Miss> {
    work.unwrap_or_else(|lost| match lost.is_panic() {
        true => Err(Miss::Undecodable),
        false => Err(Miss::Deadline),
    })
}

fn same_layout(block: Arc<HostBlock>, layouts: &Layouts) -> Result<Arc<HostBlock>, Miss> {
    if block.facts().fingerprint == layouts.fingerprint() {
        Ok(block)
    } else {
        Err(Miss::WrongLayout)
    }
}

/// What the record says of itself, as far as this model can have written it. Of another level or
/// origin than the index says, it is not the record that was found: a lossy one would pass as
/// exact.
fn facts(
    layouts: &Layouts,
    id: BlockId,
    stored: &Stored,
    record: &Record,
) -> Result<BlockFacts, Miss> {
    let header = &record.head().header.summary;
    let found = (stored.level, stored.through);
    if header.kind != id.kind || (header.level, header.through) != found {
        return Err(Miss::WrongKey);
    }
    // The descriptor's layout where the parts are those of it; else it is a payload that the
    // descriptor says nothing of, which may happen to be as long.
    let alike = |layout: &Arc<BlockLayout>| codec::check_parts(record, layout).is_ok();
    let declared = layouts.get(id.kind, header.tokens, 0).ok().filter(alike);
    let sizes = record.head().parts().iter();
    let raw_len = sizes.map(|part| u64::from(part.raw_len)).sum();
    let layout = match declared {
        Some(layout) => layout,
        None => layouts
            .get(id.kind, header.tokens, raw_len)
            .ok()
            .filter(alike)
            .ok_or(Miss::WrongLayout)?,
    };
    Ok(BlockFacts {
        parent: header.parent,
        position: header.position,
        fingerprint: header.layout,
        layout,
        order: layouts.model().order,
        through: header.through,
    })
}
