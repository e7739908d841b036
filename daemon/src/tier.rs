//! The tier manager: blocks in host memory and on disk, and every way between the two.
//!
//! Upstairs:   `restore` asks for blocks, the server's calls save, pin, prefetch and explain.
//! Downstairs: `host` (arenas), `disk` (the stores' threads), `codec` (CPU work).
//!
//! ```text
//!   save:  payload -> host arena (accepted) -> encode -> scratch -> store (durable)
//!   load:  store -> scratch -> verify -> decode -> host arena -> whoever waits
//!          store -> host arena -> verify             (raw records: no copy at all)
//! ```
//!
//! Work on a block is a task of its own: whoever asked may go away, and the block still arrives.
//! A second request for a block that is on its way waits for the first.
//!
//! Invariants kept here
//!   H1  A block that is handed out has the identity and layout that were asked for.
//!   L1  A block is called durable only after the store said so.
//!   A1  Nobody is served, from any tier, what went through a level of a worse quality than he
//!       accepts.
//!   A3  Nothing is stored at a worse quality than its namespace tolerates.

pub mod calibrate;
pub mod codec;
pub mod codecs;
pub mod directory;
pub mod disk;
pub mod host;
pub mod load;
mod named;
pub mod policy;
pub mod recode;
mod runs;
pub mod save;
pub mod scratch;
pub mod tables;
pub mod unreadable;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvtier_proto::{BlockKey, LayoutFingerprint, Level, Miss, PayloadKind, Quality};
use kvtier_store::DeviceState;
use kvtier_store::mem::IoBuf;
use tokio::sync::{AcquireError, Semaphore, SemaphorePermit, watch};
use tokio::time::{Instant, timeout_at};

use crate::block::{BlockId, HostBlock};
pub use crate::metrics::{Device, Tier};
use crate::metrics::{Metrics, Rung, Stage};
use codecs::{Codecs, Coding};
use disk::{DiskTier, OnDisk, Wiped};
use host::{HostTier, Life};
use policy::Cold;
use scratch::Scratch;
use unreadable::Unreadable;

/// What happened to a block, for watchers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockEvent {
    /// Which block.
    pub key: BlockKey,
    /// Where.
    pub tier: Tier,
    /// `None`: it is there now. Otherwise why it left.
    pub removed: Option<Miss>,
}

/// Where a block was found, for the plan of a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Located {
    /// In host memory.
    Host,
    /// On a device, which does like this, coded at this level.
    Disk(Device, DeviceState, Level),
}

impl Located {
    /// The tier.
    pub fn tier(self) -> Tier {
        match self {
            Self::Host => Tier::Host,
            Self::Disk(..) => Tier::Disk,
        }
    }
}

/// How a load ended, for everybody who waits for it.
type Loaded = Option<Result<Arc<HostBlock>, Miss>>;
/// What a load is known by.
type LoadName = (BlockId, LayoutFingerprint, Quality);
/// Loads under way. A load has as many receivers as there are that wait for it.
type Loads = HashMap<LoadName, watch::Sender<Loaded>>;
/// How a write ended: true when the block is durable.
type Written = Option<bool>;
/// Writes under way. By life as well: what was saved after a wipe is another write.
type Writes = HashMap<(BlockId, Life), watch::Receiver<Written>>;

/// See the module.
#[derive(Debug)]
pub struct Tiers {
    disk: Option<DiskTier>,
    codecs: Codecs,
    level: Level,
    cold: Option<Cold>,
    unreadable: Unreadable,
    scratch: Scratch,
    /// One permit for each core that may encode or decode.
    cpu: Semaphore,
    /// By layout and by what is accepted as well: a reader of another layout must not answer for
    /// this one's.
    loads: Mutex<Loads>,
    writes: Mutex<Writes>,
    wipe_wait: Duration,
    metrics: Arc<Metrics>,
}

/// Why a wipe was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WipeFailed {
    /// Nothing of before is served; a restart may bring it back. It may yet become durable.
    #[error("the wipe is not durable, repeat it: {0}")]
    NotDurable(String),
    /// Nothing happened.
    #[error("an earlier wipe of this namespace is still under way; nothing was wiped by this call")]
    Waited,
}

/// How long a save or a load waits for host memory before it gives up: time for the writes in
/// flight to finish, not for a client to release its leases.
const ROOM_WAIT: Duration = Duration::from_secs(5);
/// How long a caller waits for a wipe, unless a test says otherwise. A device that hangs takes
/// longer than that, or for ever.
const WIPE_WAIT: Duration = Duration::from_secs(30);

impl Tiers {
    /// Tiers over a disk, or over host memory alone.
    pub fn new(
        disk: Option<DiskTier>,
        coding: impl Into<Coding>,
        scratch: Scratch,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let Coding {
            level,
            cold,
            tables,
        } = coding.into();
        let mut disk = disk;
        if let Some(disk) = &mut disk {
            disk.share_scratch(scratch.arena().capacity());
        }
        Arc::new(Self {
            disk,
            codecs: Codecs::new(tables),
            level,
            cold,
            unreadable: Unreadable::default(),
            scratch,
            cpu: Semaphore::new(cores),
            loads: Mutex::default(),
            writes: Mutex::default(),
            wipe_wait: WIPE_WAIT,
            metrics,
        })
    }

    /// The disk tier, when there is one.
    pub fn disk(&self) -> Option<&DiskTier> {
        self.disk.as_ref()
    }

    /// Codecs this daemon knows.
    pub fn codecs(&self) -> &Codecs {
        &self.codecs
    }

    /// Level of what is saved.
    pub fn level(&self) -> Level {
        self.level
    }

    /// What becomes of cold blocks, if anything.
    pub fn cold(&self) -> Option<Cold> {
        self.cold
    }

    /// Why a stored block is a miss for whoever accepts this, as far as is known.
    pub fn why_unfit(&self, id: &BlockId, stored: &OnDisk, accept: Quality) -> Option<Miss> {
        if !accept.accepts(stored.quality()) {
            return Some(Miss::Quality);
        }
        if !stored.level.needs_tables() {
            return None;
        }
        let at = (stored.device, stored.place);
        let found = self.unreadable.tables(id, &at).is_some();
        let lacks = || !self.codecs.decodes(stored, None);
        (found || lacks()).then_some(Miss::NoTables)
    }

    /// Where each block is that is as good as `accept`, in order. With `prefix_only` the answer
    /// ends at the first miss.
    pub async fn locate(
        &self,
        host: &HostTier,
        kind: PayloadKind,
        keys: &[BlockKey],
        prefix_only: bool,
        accept: Quality,
    ) -> Vec<Result<Located, Miss>> {
        let names: Vec<_> = keys.iter().map(|key| (kind, *key)).collect();
        let mut found = host.each(&names, |directory, name| {
            let block = directory.get(name).ok_or(Miss::Absent)?;
            // The disk may have a better one.
            let fit = accept.accepts(block.quality());
            fit.then_some(Located::Host).ok_or(Miss::Quality)
        });
        let missing: Vec<usize> = (0..found.len())
            .filter(|at| found.get(*at).is_some_and(Result::is_err))
            .collect();
        if let (Some(disk), false) = (&self.disk, missing.is_empty()) {
            let ids = missing.iter().filter_map(|at| keys.get(*at));
            let ids = ids.map(|key| BlockId {
                namespace: host.namespace(),
                kind,
                key: *key,
            });
            let ids: Vec<BlockId> = ids.collect();
            let stored = disk.find(ids.clone()).await;
            for ((at, id), stored) in missing.into_iter().zip(&ids).zip(stored) {
                if let Some(place) = found.get_mut(at) {
                    *place = match (stored, &place) {
                        (Some(one), _) => match self.why_unfit(id, &one, accept) {
                            Some(miss) => Err(miss),
                            None => Ok(Located::Disk(one.device, one.state, one.level)),
                        },
                        // It is in host memory, and not good enough.
                        (None, Err(Miss::Quality)) => Err(Miss::Quality),
                        (None, _) => Err(disk.why_not(id)),
                    };
                }
            }
        }
        if prefix_only && let Some(end) = found.iter().position(Result::is_err) {
            found.truncate(end + 1);
        }
        host.touch_prefix(&names);
        found
    }

    /// Keeps blocks for `ttl` on every tier, or takes the pin away. Returns how many exist.
    pub async fn pin(
        &self,
        host: &HostTier,
        kind: PayloadKind,
        keys: &[BlockKey],
        ttl: Option<Duration>,
    ) -> u32 {
        let mut pinned = vec![false; keys.len()];
        for (key, pinned) in keys.iter().zip(&mut pinned) {
            *pinned = host.pin(&(kind, *key), ttl);
        }
        if let Some(disk) = &self.disk {
            let id = |key: &BlockKey| BlockId {
                namespace: host.namespace(),
                kind,
                key: *key,
            };
            let stored = disk.pin(keys.iter().map(id).collect(), ttl).await;
            for (pinned, stored) in pinned.iter_mut().zip(stored) {
                *pinned |= stored;
            }
        }
        u32::try_from(pinned.into_iter().filter(|pinned| *pinned).count()).unwrap_or(u32::MAX)
    }

    /// Forgets every block of a namespace, durably, before it returns. Leases that clients hold
    /// keep their bytes until they are released; nothing else can be reached.
    ///
    /// Cancel safety: dropped early, a wipe that has begun goes on.
    ///
    /// # Errors
    /// A device, or the state directory, did not take it, or not in time; nothing that was saved
    /// before is served meanwhile. Or an earlier wipe of the namespace hangs, and this one did
    /// nothing.
    pub async fn wipe(self: &Arc<Self>, host: &Arc<HostTier>) -> Result<Wiped, WipeFailed> {
        let limit = Instant::now() + self.wipe_wait;
        let turn = Arc::clone(&host.lines.wipes).acquire_owned();
        let Ok(Ok(turn)) = timeout_at(limit, turn).await else {
            return Err(WipeFailed::Waited);
        };
        let (tiers, host) = (Arc::clone(self), Arc::clone(host));
        let wiping = tokio::spawn(async move {
            let wiped = tiers.wipe_to_the_end(&host).await;
            drop(turn);
            wiped
        });
        let wiped = match timeout_at(limit, wiping).await {
            Ok(Ok(wiped)) => wiped,
            Ok(Err(lost)) => Err(lost.to_string()),
            Err(_) => Err("a device does not answer".to_owned()),
        };
        wiped.map_err(WipeFailed::NotDurable)
    }

    async fn wipe_to_the_end(&self, host: &HostTier) -> Result<Wiped, String> {
        let forget = |disk| DiskTier::forget(disk, host.namespace());
        let (gone, forgetting) = host.clear(|| self.disk.as_ref().map(forget));
        let blocks = gone.len() as u64;
        for block in gone {
            host.announce(BlockEvent {
                key: block.id().key,
                tier: Tier::Host,
                removed: Some(Miss::Evicted),
            });
        }
        let mut wiped = match self.disk.as_ref().zip(forgetting) {
            Some((disk, forgetting)) => disk.wipe(forgetting).await?,
            None => Wiped::default(),
        };
        wiped.blocks = wiped.blocks.max(blocks);
        Ok(wiped)
    }

    /// Waits until every write that has started is durable or has failed. Returns how many
    /// became durable.
    pub async fn flush(&self) -> u64 {
        let waiting: Vec<_> = self.lock_writes().values().cloned().collect();
        let mut durable = 0;
        for mut write in waiting {
            if let Ok(done) = write.wait_for(Option::is_some).await {
                durable += u64::from(*done == Some(true));
            }
        }
        durable
    }

    /// Numbers for status and metrics.
    pub fn pending_writes(&self) -> usize {
        self.lock_writes().len()
    }

    /// Memory that everything in flight may take together. Unit: bytes.
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// Memory for `len` bytes in the arena, by eviction where needed. What is held, pinned or
    /// followed by such a block stays.
    fn room_now(&self, host: &HostTier, len: usize) -> Option<IoBuf> {
        let room = host.room(len);
        for (_, key) in room.evicted {
            self.metrics.evicted_blocks.of(Tier::Host).inc();
            host.announce(BlockEvent {
                key,
                tier: Tier::Host,
                removed: Some(Miss::Evicted),
            });
        }
        room.image
    }

    /// The same, after a while of waiting if need be. Hold no scratch memory meanwhile (M4).
    ///
    /// Cancel safety: dropped early, nothing is taken, though blocks may have been evicted.
    async fn room(&self, host: &HostTier, len: usize) -> Option<IoBuf> {
        let limit = Instant::now() + ROOM_WAIT;
        loop {
            let freed = host.freed();
            let room = self.room_now(host, len);
            if room.is_some() || len > host.arena().capacity() {
                return room;
            }
            if timeout_at(limit, freed).await.is_err() {
                // Once more: nobody says when a pin ends.
                return self.room_now(host, len);
            }
        }
    }

    /// Leave to run on as many cores as a block of `raw_len` bytes is worth: one, and of those
    /// that nobody waits for a few more.
    async fn cores(&self, raw_len: usize) -> Result<SemaphorePermit<'_>, AcquireError> {
        let mut cores = self.cpu.acquire().await?;
        let more = (raw_len / runs::BYTES_A_WORKER).saturating_sub(1);
        for _ in 0..more {
            let Ok(one) = self.cpu.try_acquire() else {
                break;
            };
            cores.merge(one);
        }
        Ok(cores)
    }

    fn count_encoded(&self, level: Level, (raw, stored): (usize, u32), time: Duration) {
        let (rung, metrics) = (Rung::from(level), &self.metrics);
        let bytes = &metrics.encoded_bytes;
        bytes.of((rung, Stage::Raw)).inc_by(raw as u64);
        bytes.of((rung, Stage::Stored)).inc_by(stored.into());
        metrics.encode_seconds.of(rung).inc_by(time.as_secs_f64());
    }

    fn count_decoded(&self, level: Level, (raw, stored): (usize, u32), time: Duration) {
        let (rung, metrics) = (Rung::from(level), &self.metrics);
        let bytes = &metrics.decoded_bytes;
        bytes.of((rung, Stage::Raw)).inc_by(raw as u64);
        bytes.of((rung, Stage::Stored)).inc_by(stored.into());
        metrics.decode_seconds.of(rung).inc_by(time.as_secs_f64());
    }

    fn lock_writes(&self) -> MutexGuard<'_, Writes> {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_loads(&self) -> MutexGuard<'_, Loads> {
        self.loads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
