//! Saving: a client's bytes into host memory, and from there to the device.
//!
//! Upstairs:   the server's Commit and PutInline.
//! Downstairs: `host`, `codec`, `disk`.
//!
//! Invariants kept here
//!   S6  What a client can still write is copied once, and only the copy is checked and stored.
//!   L1  `durable` resolves to true only after the store made the record durable.
//!   A3  Nothing is stored at a worse quality than its namespace tolerates, and what went through
//!       a lossy level is never stored as if it had not.

use std::sync::Arc;

use kvtier_proto::{BlockKey, PayloadKind, Quality};
use kvtier_store::RecordImage;
use tokio::sync::watch;

use super::codec::Source;
use super::disk::{DiskTier, OnDisk};
use super::host::{HostTier, Life};
use super::policy::{level_to_store, quality_of_saves};
use super::scratch::Line;
use super::{BlockEvent, Tier, Tiers, Written, codec};
use crate::block::{BlockId, HostBlock, PlannedBlock};
use crate::metrics::{Saved, Stage};

/// A payload that is copied into host memory exactly once.
pub trait Payload: Send + 'static {
    /// Fills `into`, which is as long as the planned layout says.
    ///
    /// # Errors
    /// What is wrong with the payload, for the log.
    fn copy_into(&self, into: &mut [u8]) -> Result<(), String>;
}

impl Payload for Vec<u8> {
    fn copy_into(&self, into: &mut [u8]) -> Result<(), String> {
        if self.len() != into.len() {
            return Err(format!(
                "{} payload bytes where {} belong",
                self.len(),
                into.len()
            ));
        }
        into.copy_from_slice(self);
        Ok(())
    }
}

/// Why a block was not accepted. Nothing is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SaveFailed {
    /// Host memory is held by leases, pins and writes in flight.
    #[error("no room in host memory")]
    NoSpace,
    /// The bytes do not have the checksum the client gave, or cannot be read.
    #[error("the payload does not have its checksum")]
    Checksum,
    /// The namespace was wiped meanwhile.
    #[error("the namespace was wiped")]
    Wiped,
}

impl Tiers {
    /// Takes a block into host memory and starts its way to the device. Accepted on return.
    ///
    /// Cancel safety: dropped early, the block is either not stored or accepted.
    pub async fn save(
        self: &Arc<Self>,
        host: &Arc<HostTier>,
        block: PlannedBlock,
        payload: impl Payload,
        crc32: Option<u32>,
    ) -> Result<Arc<HostBlock>, SaveFailed> {
        let len = block.facts.layout.payload_len();
        let life = host.life();
        let outcome = async {
            let room = self.room(host, len).await;
            let mut image = room.ok_or(SaveFailed::NoSpace)?;
            let copy = tokio::task::spawn_blocking(move || {
                if let Err(problem) = payload.copy_into(&mut image) {
                    tracing::warn!(%problem, "a client's payload could not be copied");
                    return Err(SaveFailed::Checksum);
                }
                if crc32.is_some_and(|crc32| crc32 != crc32fast::hash(&image)) {
                    return Err(SaveFailed::Checksum);
                }
                Ok(image)
            });
            copy.await.map_err(|_| SaveFailed::Checksum)?
        };
        let image = outcome
            .await
            .inspect_err(|failed| self.count_failed(*failed))?;
        let (id, through) = (block.id, block.facts.through);
        let fresh = HostBlock::new(id, block.facts, image, 0).ok_or(SaveFailed::NoSpace)?;
        let kept = host.insert(fresh, false, life).ok_or(SaveFailed::Wiped)?;
        self.metrics.save_blocks.of(Saved::Accepted).inc();
        self.metrics.saved_through.of(through).inc();
        self.metrics.saved_bytes.of(Stage::Raw).inc_by(len as u64);
        host.announce(BlockEvent {
            key: id.key,
            tier: Tier::Host,
            removed: None,
        });
        self.start_write(host, &kept, life);
        Ok(kept)
    }

    /// Waits until a block that was made of bytes of this quality is durable, or is known not to
    /// become so. A block that left the device to make room, or never got there, is written again
    /// from host memory.
    pub async fn durable(
        self: &Arc<Self>,
        host: &Arc<HostTier>,
        id: BlockId,
        through: Quality,
    ) -> bool {
        let Some(disk) = &self.disk else { return false };
        let (life, name) = (host.life(), (id.kind, id.key));
        if let Some(done) = self.written(id, life).await {
            return done;
        }
        let stored = disk.find(vec![id]).await.into_iter().next().flatten();
        if stored.is_some_and(|stored| self.is_saved(host, &id, &stored, through)) {
            return true;
        }
        host.set_durable(&name, false, life);
        // Not what a lossy level restored, nor what somebody else saved that was made of worse.
        let accept = self.quality_of_saves(host, through);
        let fit = |one: &Arc<HostBlock>| {
            Quality::Exact.accepts(one.level().quality()) && accept.accepts(one.quality())
        };
        let Some(block) = host.hold(&name).filter(fit) else {
            return false;
        };
        self.start_write(host, &block, life);
        self.written(id, life).await.unwrap_or(false)
    }

    /// The worst quality that a save in this namespace is stored at, of bytes that were made of
    /// ones of the quality `through`: a block that is as good is there already. What is worse,
    /// since it was cold or since the configuration was another, is replaced.
    pub fn quality_of_saves(&self, host: &HostTier, through: Quality) -> Quality {
        let stored = match self.disk {
            Some(_) => quality_of_saves(self.level, host.lowest()),
            None => Quality::Exact,
        };
        stored.max(through)
    }

    /// True when a save of the block would change nothing of what is stored.
    fn is_saved(&self, host: &HostTier, id: &BlockId, stored: &OnDisk, through: Quality) -> bool {
        let accept = self.quality_of_saves(host, through);
        self.why_unfit(id, stored, accept).is_none()
    }

    /// How the write of a block ended, when one is on its way.
    async fn written(&self, id: BlockId, life: Life) -> Option<bool> {
        let mut write = self.lock_writes().get(&(id, life)).cloned()?;
        let done = write.wait_for(Option::is_some).await;
        Some(done.is_ok_and(|done| *done == Some(true)))
    }

    /// Which of these blocks are durable now, as good as a save would store them. Host memory
    /// remembers that a block reached the device; the device may have made room since, and its
    /// word is the one that counts.
    pub async fn still_durable(
        &self,
        host: &HostTier,
        kind: PayloadKind,
        keys: &[BlockKey],
        through: Quality,
    ) -> Vec<bool> {
        let names: Vec<_> = keys.iter().map(|key| (kind, *key)).collect();
        let said = host.each(&names, |directory, name| {
            directory.info(name).is_some_and(|info| info.durable)
        });
        let mut durable = vec![false; keys.len()];
        let (Some(disk), true) = (&self.disk, said.contains(&true)) else {
            return durable;
        };
        let namespace = host.namespace();
        let asked = said.iter().zip(keys).filter(|(said, _)| **said);
        let ids = asked.map(|(_, key)| BlockId {
            namespace,
            kind,
            key: *key,
        });
        let ids: Vec<BlockId> = ids.collect();
        let mut stored = ids.iter().zip(disk.find(ids.clone()).await);
        for (durable, _) in durable.iter_mut().zip(said).filter(|(_, said)| *said) {
            let here = stored.next();
            *durable = here.is_some_and(|(id, stored)| {
                stored.is_some_and(|stored| self.is_saved(host, id, &stored, through))
            });
        }
        durable
    }

    /// True while a write of this block is on its way.
    pub fn is_writing(&self, host: &HostTier, id: BlockId) -> bool {
        self.lock_writes().contains_key(&(id, host.life()))
    }

    fn start_write(self: &Arc<Self>, host: &Arc<HostTier>, block: &Arc<HostBlock>, life: Life) {
        let id = block.id();
        let durable = host
            .info(&(id.kind, id.key))
            .is_some_and(|info| info.durable);
        let mut writes = self.lock_writes();
        if self.disk.is_none() || durable || writes.contains_key(&(id, life)) {
            return;
        }
        let (done, written) = watch::channel::<Written>(None);
        writes.insert((id, life), written);
        let (tiers, host, block) = (Arc::clone(self), Arc::clone(host), Arc::clone(block));
        tokio::spawn(async move {
            let durable = tiers.write(&host, &block, life).await;
            if durable {
                host.set_durable(&(id.kind, id.key), true, life);
                host.announce(BlockEvent {
                    key: id.key,
                    tier: Tier::Disk,
                    removed: None,
                });
                tiers.metrics.save_blocks.of(Saved::Durable).inc();
            } else {
                tiers.metrics.save_blocks.of(Saved::NotDurable).inc();
            }
            drop(block);
            tiers.lock_writes().remove(&(id, life));
            done.send_replace(Some(durable));
        });
    }

    async fn write(self: &Arc<Self>, host: &HostTier, block: &Arc<HostBlock>, life: Life) -> bool {
        let Some(disk) = &self.disk else { return false };
        if self.is_stored_better(host, disk, block).await {
            return true;
        }
        let image = match self.encode(host, block).await {
            Ok(image) => image,
            Err(problem) => {
                tracing::warn!(key = %block.id().key, %problem, "block stays in host memory only");
                return false;
            }
        };
        let stored = u64::from(image.layout().image_len);
        let over = self.unreadable.place(&block.id());
        let put = disk.put(image, over, host.lives(), life).await;
        match put {
            Ok(_) => {
                self.metrics.saved_bytes.of(Stage::Stored).inc_by(stored);
                true
            }
            Err(problem) => {
                tracing::warn!(key = %block.id().key, %problem, "block is not durable");
                false
            }
        }
    }

    /// True when the disk has the block better than this save would store it: whoever saves without
    /// having asked takes nothing from others. It counts as a use.
    async fn is_stored_better(&self, host: &HostTier, disk: &DiskTier, block: &HostBlock) -> bool {
        let worst = self.quality_of_saves(host, block.facts().through);
        if worst == Quality::Exact {
            return false;
        }
        let stored = disk.find(vec![block.id()]).await.into_iter().next();
        let better = |stored: &OnDisk| {
            let alike = stored.has_layout(&block.facts().fingerprint);
            alike && stored.quality() < worst
        };
        let Some(stored) = stored.flatten().filter(better) else {
            return false;
        };
        if self.why_unfit(&block.id(), &stored, worst).is_some() {
            return false;
        }
        disk.touch(&stored);
        true
    }

    async fn encode(
        self: &Arc<Self>,
        host: &HostTier,
        block: &Arc<HostBlock>,
    ) -> Result<RecordImage, String> {
        let closed = |problem: tokio::sync::AcquireError| problem.to_string();
        let _turn = host.lines.encodes.acquire().await.map_err(closed)?;
        let (id, facts) = (block.id(), block.facts());
        let codecs = self.codecs.of_layout(&facts.fingerprint);
        let level = level_to_store(self.level, host.lowest(), |level| {
            let codec = codecs.get(level);
            codec.is_ok_and(|codec| codec::applies(codec, facts))
        });
        let codec = codecs.get(level).map_err(|problem| problem.to_string())?;
        let len = codec::image_bound(codec, facts)?.image_len as usize;
        let scratch = self.scratch.take(len, Line::Save).await;
        let scratch = scratch.ok_or_else(|| format!("{len} bytes exceed scratch memory"))?;
        let raw = facts.layout.payload_len();
        let cores = self.cores(raw).await.map_err(closed)?;
        let workers = cores.num_permits();
        let block = Arc::clone(block);
        let work = tokio::task::spawn_blocking(move || {
            let codec = codecs.get(level).map_err(|problem| problem.to_string())?;
            let (facts, payload) = (block.facts(), block.payload());
            let source = Source { id, facts, payload };
            let encoded = codec::encode(codec, source, scratch, workers);
            encoded.map_err(|problem| problem.to_string())
        });
        let (image, time) = work.await.map_err(|problem| problem.to_string())??;
        self.count_encoded(level, (raw, image.layout().image_len), time);
        Ok(image)
    }

    fn count_failed(&self, failed: SaveFailed) {
        let outcome = match failed {
            SaveFailed::NoSpace => Saved::NoSpace,
            SaveFailed::Checksum => Saved::Checksum,
            SaveFailed::Wiped => Saved::Wiped,
        };
        self.metrics.save_blocks.of(outcome).inc();
    }
}
