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

pub mod calibrate;
pub mod codec;
pub mod directory;
pub mod disk;
pub mod host;
pub mod load;
pub mod save;
pub mod scratch;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvtier_kernels::Registry;
use kvtier_proto::{BlockKey, LayoutFingerprint, Level, Miss, PayloadKind};
use kvtier_store::DeviceState;
use kvtier_store::mem::IoBuf;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout_at};

use crate::block::{BlockId, HostBlock};
use crate::metrics::Metrics;
pub use crate::metrics::{Device, Tier};
use disk::{DiskTier, OnDisk, Wiped};
use host::{HostTier, Life};
use scratch::Scratch;

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
    /// On a device, which does like this.
    Disk(Device, DeviceState),
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
/// Loads under way.
type Loads = HashMap<(BlockId, LayoutFingerprint), watch::Receiver<Loaded>>;
/// How a write ended: true when the block is durable.
type Written = Option<bool>;
/// Writes under way. By life as well: what was saved after a wipe is another write.
type Writes = HashMap<(BlockId, Life), watch::Receiver<Written>>;

/// See the module.
#[derive(Debug)]
pub struct Tiers {
    disk: Option<DiskTier>,
    codecs: Registry,
    level: Level,
    scratch: Scratch,
    /// One permit for each core that may encode or decode.
    cpu: Semaphore,
    /// By layout as well: a reader of another layout must not answer for this one's.
    loads: Mutex<Loads>,
    writes: Mutex<Writes>,
    metrics: Arc<Metrics>,
}

/// How long a save or a load waits for host memory before it gives up: time for the writes in
/// flight to finish, not for a client to release its leases.
const ROOM_WAIT: Duration = Duration::from_secs(5);
/// How long a caller waits for a wipe. A device that hangs takes longer than that, or for ever.
const WIPE_WAIT: Duration = Duration::from_secs(30);

impl Tiers {
    /// Tiers over a disk, or over host memory alone.
    pub fn new(
        disk: Option<DiskTier>,
        level: Level,
        scratch: Scratch,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Arc::new(Self {
            disk,
            codecs: Registry::builtin(),
            level,
            scratch,
            cpu: Semaphore::new(cores),
            loads: Mutex::default(),
            writes: Mutex::default(),
            metrics,
        })
    }

    /// The disk tier, when there is one.
    pub fn disk(&self) -> Option<&DiskTier> {
        self.disk.as_ref()
    }

    /// Codecs this daemon knows.
    pub fn codecs(&self) -> &Registry {
        &self.codecs
    }

    /// Where each block is, in order. With `prefix_only` the answer ends at the first miss.
    pub async fn locate(
        &self,
        host: &HostTier,
        kind: PayloadKind,
        keys: &[BlockKey],
        prefix_only: bool,
    ) -> Vec<Result<Located, Miss>> {
        let names: Vec<_> = keys.iter().map(|key| (kind, *key)).collect();
        let mut found = host.each(&names, |directory, name| {
            if directory.contains(name) {
                Ok(Located::Host)
            } else {
                Err(Miss::Absent)
            }
        });
        let missing: Vec<usize> = (0..found.len())
            .filter(|at| found.get(*at) == Some(&Err(Miss::Absent)))
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
                    let located = |one: OnDisk| Located::Disk(one.device, one.state);
                    *place = stored.map(located).ok_or_else(|| disk.why_not(id));
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
    /// before is served meanwhile. Or an earlier wipe of the namespace hangs.
    pub async fn wipe(self: &Arc<Self>, host: &Arc<HostTier>) -> Result<Wiped, String> {
        let late = || "a device does not answer".to_owned();
        let limit = Instant::now() + WIPE_WAIT;
        let turn = Arc::clone(&host.lines.wipes).acquire_owned();
        let turn = timeout_at(limit, turn).await.map_err(|_| late())?;
        let (tiers, host) = (Arc::clone(self), Arc::clone(host));
        let wiping = tokio::spawn(async move {
            let wiped = tiers.wipe_to_the_end(&host).await;
            drop(turn);
            wiped
        });
        let wiped = timeout_at(limit, wiping).await.map_err(|_| late())?;
        wiped.unwrap_or_else(|lost| Err(lost.to_string()))
    }

    async fn wipe_to_the_end(&self, host: &HostTier) -> Result<Wiped, String> {
        let gone = host.clear();
        let blocks = gone.len() as u64;
        for block in gone {
            host.announce(BlockEvent {
                key: block.id().key,
                tier: Tier::Host,
                removed: Some(Miss::Evicted),
            });
        }
        let mut wiped = match &self.disk {
            Some(disk) => disk.wipe(host.namespace()).await?,
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

    fn lock_writes(&self) -> MutexGuard<'_, Writes> {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_loads(&self) -> MutexGuard<'_, Loads> {
        self.loads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
