//! Host tier of one namespace: an arena of raw blocks that its clients read in place.
//!
//! Upstairs:   `tier::Tiers`.
//! Downstairs: `directory` decides who leaves; `kvtier_store::mem` holds the bytes.
//!
//! Each namespace has an arena of its own: its quota is the size of the arena, so no neighbour
//! can take its room, and the one descriptor a client gets shows it nobody else's blocks.
//!
//! Invariants kept here
//!   Q1  A namespace never holds more than its quota in host memory.
//!   P3  After a wipe no block of the life before is published, however late it arrives.
//!   S1  Nobody but the daemon can write an arena (`Share::ReadOnly`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvtier_proto::{Miss, NamespaceId};
use kvtier_store::mem::{Arena, IoBuf, Share};
use tokio::sync::{Notify, broadcast};

use super::directory::{Directory, Name, ResidentInfo};
use super::{BlockEvent, Tier};
use crate::block::HostBlock;

/// Events a slow watcher may fall behind before it is told that it missed some.
const EVENTS_KEPT: usize = 4096;
/// Leases end without a word; who waits for room looks again at least this often.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// See the module.
#[derive(Debug)]
pub struct HostTier {
    namespace: NamespaceId,
    arena: Arc<Arena>,
    directory: Mutex<Directory>,
    wipes: Arc<AtomicU64>,
    freed: Notify,
    events: broadcast::Sender<BlockEvent>,
}

/// One life of a namespace: from a wipe to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life(pub u64);

/// What making room cost.
#[derive(Debug, Default)]
pub struct Room {
    /// The memory; `None` when everything is held.
    pub image: Option<IoBuf>,
    /// Blocks that left for it.
    pub evicted: Vec<Name>,
}

impl HostTier {
    /// An empty tier of `quota` bytes.
    pub fn create(namespace: NamespaceId, name: &str, quota: usize) -> std::io::Result<Self> {
        let arena = Arena::create(&format!("kvtier-{name}"), quota, Share::ReadOnly)?;
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        let (directory, wipes, freed) = Default::default();
        Ok(Self {
            namespace,
            arena,
            directory,
            wipes,
            freed,
            events,
        })
    }

    /// Whose blocks these are.
    pub fn namespace(&self) -> NamespaceId {
        self.namespace
    }

    /// Tells the watchers of this namespace.
    pub fn announce(&self, event: BlockEvent) {
        // Nobody watching is no error.
        let _ = self.events.send(event);
    }

    /// A new watcher; it sees what happens from now on.
    pub fn watch(&self) -> broadcast::Receiver<BlockEvent> {
        self.events.subscribe()
    }

    /// Says that memory was freed, so that waiters look at once.
    pub fn freed(&self) {
        self.freed.notify_waiters();
    }

    /// Memory for `len` bytes, by eviction where needed; waits until `limit` for it.
    ///
    /// Cancel safety: dropped early, nothing is taken, though blocks may have been evicted.
    pub async fn room_wait(&self, len: usize, limit: tokio::time::Instant) -> Option<IoBuf> {
        loop {
            let freed = self.freed.notified();
            let room = self.room(len);
            for (_, key) in &room.evicted {
                let removed = Some(Miss::Evicted);
                self.announce(BlockEvent {
                    key: *key,
                    tier: Tier::Host,
                    removed,
                });
            }
            if room.image.is_some() || len > self.arena.capacity() {
                return room.image;
            }
            if tokio::time::Instant::now() >= limit {
                return None;
            }
            let _ = tokio::time::timeout(LOOK_AGAIN, freed).await;
        }
    }

    /// The arena, to pass to clients and to register with the ring.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// Memory for `len` bytes, by eviction where needed.
    pub fn room(&self, len: usize) -> Room {
        let mut evicted = Vec::new();
        if len > self.arena.capacity() {
            return Room {
                image: None,
                evicted,
            };
        }
        loop {
            if let Some(image) = self.arena.alloc(len) {
                return Room {
                    image: Some(image),
                    evicted,
                };
            }
            let Some(block) = self.lock().evict(Instant::now()) else {
                return Room {
                    image: None,
                    evicted,
                };
            };
            evicted.push((block.id().kind, block.id().key));
        }
    }

    /// The block, counted as used now.
    pub fn get(&self, name: &Name) -> Option<Arc<HostBlock>> {
        self.lock().get(name)
    }

    /// Facts about a block, not counted as use.
    pub fn info(&self, name: &Name) -> Option<ResidentInfo> {
        self.lock().info(name)
    }

    /// Calls `look` for each name, under one lock, with what is known of it.
    pub fn each<T>(&self, names: &[Name], look: impl Fn(&Directory, &Name) -> T) -> Vec<T> {
        let directory = self.lock();
        names.iter().map(|name| look(&directory, name)).collect()
    }

    /// Counts the use of a prefix: its last block first, so that leaves are always the oldest.
    pub fn touch_prefix(&self, names: &[Name]) {
        let mut directory = self.lock();
        for name in names.iter().rev() {
            directory.touch(name);
        }
    }

    /// Publishes a block; when one of that name is there already, that one is returned. `None`
    /// when the namespace was wiped since `life` was read: the block belongs to what is gone.
    pub fn insert(&self, block: HostBlock, durable: bool, life: Life) -> Option<Arc<HostBlock>> {
        let mut directory = self.lock();
        let current = self.wipes.load(Ordering::SeqCst) == life.0;
        current.then(|| directory.insert(Arc::new(block), durable))
    }

    /// The life of the namespace between two wipes. Read it before the first byte of a block is
    /// looked at, and show it when the block is published or stored.
    pub fn life(&self) -> Life {
        Life(self.wipes.load(Ordering::SeqCst))
    }

    /// Lives counted, for whoever must check one without this tier at hand.
    pub fn lives(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.wipes)
    }

    /// The disk tier has it too (or no longer).
    pub fn set_durable(&self, name: &Name, durable: bool) {
        self.lock().set_durable(name, durable);
    }

    /// Keeps a block for `ttl`; `None` takes the pin away. False when it is not here.
    pub fn pin(&self, name: &Name, ttl: Option<Duration>) -> bool {
        let until = ttl.map(|ttl| Instant::now() + ttl);
        self.lock().pin(name, until)
    }

    /// Takes a block out.
    pub fn remove(&self, name: &Name) -> Option<Arc<HostBlock>> {
        self.lock().remove(name)
    }

    /// Takes every block out and begins a new life: nothing of the old one is published again.
    pub fn clear(&self) -> Vec<Arc<HostBlock>> {
        let mut directory = self.lock();
        self.wipes.fetch_add(1, Ordering::SeqCst);
        directory.clear()
    }

    /// Blocks held.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// True when no block is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Memory taken, fragments included. Unit: bytes.
    pub fn used(&self) -> usize {
        self.arena.capacity() - self.arena.free_bytes()
    }

    fn lock(&self) -> MutexGuard<'_, Directory> {
        self.directory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
