//! Cold blocks go down the ladder: what nobody has used for long is encoded again, smaller.
//!
//! Upstairs:   `process` starts it; it runs as long as the daemon.
//! Downstairs: `disk` knows what is cold, `policy` what may be done, `codec` does it.
//!
//! ```text
//!   oldest sealed segment first, one block at a time, at a rate in bytes a second:
//!   cold? tolerated? ---> read (background) ---> verify, decode ---> encode ---> recode (durable)
//!                                                               not smaller, or used or pinned
//!                                                               meanwhile: stays as it is
//! ```
//!
//! The new form is written before the old one is left, and takes its number (`Store::recode`), so
//! that a crash, a newer save and a wipe each find what they would have found without it. Whatever
//! fails, the block stays as it was.
//!
//! Invariants kept here
//!   A3  Nothing is stored at a worse quality than its namespace tolerates.
//!   M4  Nobody waits for scratch memory while holding some: the raw bytes are between the two in
//!       memory of their own, of one block at a time.
//!
//! Not here on purpose
//!   No kinds but KV: of any other only the name of its record is known, not the block's key.
//!   No models that nobody has opened a session for since the start: how a block is laid out, only
//!   a session says.
//!   No state: a restart begins anew, and finds what was done.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use kvtier_proto::{Level, Miss, NamespaceId, PayloadKind};
use kvtier_store::{DeviceState, RecordImage, Stored};

use super::codec::{DecodeFailed, Source};
use super::codecs::Known;
use super::disk::{DiskTier, OnDisk};
use super::host::HostTier;
use super::policy::{Cold, may_go_down};
use super::scratch::Line;
use super::{Tiers, codec};
use crate::block::{BlockFacts, BlockId};
use crate::metrics::{Form, Recoded};

/// Pauses between two passes: a part of the time after which a block is cold.
const PAUSE_MIN: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(600);

/// A cold block as it was before.
struct Raw {
    facts: BlockFacts,
    payload: Vec<u8>,
}

impl Tiers {
    /// Re-encodes cold blocks of these namespaces for ever; returns when none ever are.
    pub async fn recode_cold(self: Arc<Self>, hosts: Vec<Arc<HostTier>>) {
        let (Some(cold), Some(disk)) = (self.cold, self.disk.as_ref()) else {
            return;
        };
        let hosts = hosts.into_iter().map(|host| (host.namespace(), host));
        let hosts: HashMap<NamespaceId, Arc<HostTier>> = hosts.collect();
        let pause = (cold.after / 4).clamp(PAUSE_MIN, PAUSE_MAX);
        loop {
            tokio::time::sleep(pause).await;
            self.recode_pass(disk, &cold, &hosts).await;
        }
    }

    /// Goes through all sealed segments of all devices once.
    async fn recode_pass(
        self: &Arc<Self>,
        disk: &DiskTier,
        cold: &Cold,
        hosts: &HashMap<NamespaceId, Arc<HostTier>>,
    ) {
        let serving = disk.serving().into_iter();
        for (device, state) in serving.filter(|(_, state)| *state < DeviceState::ReadOnly) {
            let mut epoch = 0;
            while let Some((next, blocks)) = disk.cold_after(device, epoch).await {
                epoch = next;
                for stored in blocks {
                    let host = hosts.get(&stored.namespace);
                    let Some(host) = host.filter(|host| is_wanted(&stored, cold, host)) else {
                        continue;
                    };
                    let found = OnDisk {
                        device,
                        state,
                        stored,
                    };
                    let outcome = self.recode_block(disk, cold, host, &found).await;
                    self.metrics.recoded_blocks.of(outcome).inc();
                    if outcome.has_read() {
                        let seconds = f64::from(stored.place.len) / cold.rate.get().max(1) as f64;
                        tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
                    } else {
                        tokio::task::yield_now().await;
                    }
                }
            }
        }
    }

    async fn recode_block(
        self: &Arc<Self>,
        disk: &DiskTier,
        cold: &Cold,
        host: &Arc<HostTier>,
        found: &OnDisk,
    ) -> Recoded {
        let id = BlockId {
            namespace: found.namespace,
            kind: found.kind,
            key: found.key,
        };
        if host.info(&(id.kind, id.key)).is_some() {
            disk.touch(found);
            return Recoded::InUse;
        }
        let Some(known) = self.codecs.known(|layout| found.has_layout(layout)) else {
            return Recoded::UnknownModel;
        };
        if known.codecs.get(cold.level).is_err() {
            return Recoded::NotApplicable;
        }
        let life = host.life();
        let raw = match self.raw(disk, &known, id, found).await {
            Ok(raw) => raw,
            Err(miss) => {
                // Scrub and restores condemn what is damaged. Not again soon.
                disk.touch(found);
                tracing::debug!(key = %id.key, reason = miss.as_str(), "a cold block was not read");
                return Recoded::Failed;
            }
        };
        let image = match self.smaller(&known, id, raw, cold.level, found).await {
            Ok(image) => image,
            Err(outcome) => {
                // Not again soon: it would come to the same.
                disk.touch(found);
                return outcome;
            }
        };
        let len = image.layout().image_len;
        match disk.recode(image, found, host.lives(), life).await {
            Ok(()) => {
                let bytes = &self.metrics.recoded_bytes;
                bytes.of(Form::Before).inc_by(found.place.len.into());
                bytes.of(Form::After).inc_by(len.into());
                Recoded::Done
            }
            Err(problem) => {
                disk.touch(found);
                tracing::info!(key = %id.key, problem, "a cold block stays as it was");
                Recoded::Failed
            }
        }
    }

    /// Reads and decodes a cold block.
    async fn raw(
        self: &Arc<Self>,
        disk: &DiskTier,
        known: &Known,
        id: BlockId,
        found: &OnDisk,
    ) -> Result<Raw, Miss> {
        let layouts = &known.layouts;
        let scratch = self.scratch.take(found.place.len as usize, Line::Load);
        let buf = scratch.await.ok_or(Miss::NoSpace)?;
        let unverified = disk
            .get_in_background(id, layouts.fingerprint(), buf, found.device)
            .await?;
        if unverified.place() != found.place {
            return Err(Miss::Evicted);
        }
        let verified = self.verify(layouts, id, found, unverified);
        let (record, facts) = verified.await?;
        let _core = self.cpu.acquire().await.map_err(|_| Miss::Deadline)?;
        let (tiers, codecs) = (Arc::clone(self), Arc::clone(&known.codecs));
        let work = tokio::task::spawn_blocking(move || {
            let mut payload = vec![0; facts.layout.payload_len()];
            let decoded = codec::decode(&codecs, &record, &facts, &mut payload, 1);
            let time = decoded.map_err(|failed| match failed {
                DecodeFailed::Miss(miss) => miss,
                DecodeFailed::Tables(_) => Miss::NoTables,
            })?;
            let header = &record.head().header.summary;
            let sizes = (payload.len(), header.place.len);
            tiers.count_decoded(header.level, sizes, time);
            Ok(Raw { facts, payload })
        });
        work.await.unwrap_or(Err(Miss::Undecodable))
    }

    /// Encodes it again; an error when nothing is gained by that.
    async fn smaller(
        self: &Arc<Self>,
        known: &Known,
        id: BlockId,
        raw: Raw,
        level: Level,
        found: &OnDisk,
    ) -> Result<RecordImage, Recoded> {
        let codec = known
            .codecs
            .get(level)
            .map_err(|_| Recoded::NotApplicable)?;
        if !codec::applies(codec, &raw.facts) {
            return Err(Recoded::NotApplicable);
        }
        let bound = codec::image_bound(codec, &raw.facts).map_err(|_| Recoded::Failed)?;
        let scratch = self.scratch.take(bound.image_len as usize, Line::Save);
        let scratch = scratch.await.ok_or(Recoded::Failed)?;
        let _core = self.cpu.acquire().await.map_err(|_| Recoded::Failed)?;
        let codecs = Arc::clone(&known.codecs);
        let work = tokio::task::spawn_blocking(move || {
            let codec = codecs.get(level).map_err(|problem| problem.to_string())?;
            let Raw { facts, payload } = &raw;
            let source = Source { id, facts, payload };
            let encoded = codec::encode(codec, source, scratch, 1);
            let (image, time) = encoded.map_err(|problem| problem.to_string())?;
            Ok::<_, String>((image, time, payload.len()))
        });
        let encoded = work.await.unwrap_or_else(|lost| Err(lost.to_string()));
        let (image, time, len) = encoded.map_err(|problem| {
            tracing::warn!(key = %id.key, problem, "a cold block was not encoded");
            Recoded::Failed
        })?;
        let stored = image.layout().image_len;
        self.count_encoded(level, (len, stored), time);
        match stored < found.place.len {
            true => Ok(image),
            false => Err(Recoded::NotSmaller),
        }
    }
}

/// True when a cold block is to go to the level of cold blocks.
fn is_wanted(stored: &Stored, cold: &Cold, host: &HostTier) -> bool {
    let allowed = may_go_down((stored.level, stored.quality()), cold.level, host.lowest());
    stored.kind == PayloadKind::Kv && !stored.pinned && allowed
}
