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
//!   P3  After a wipe no block of the life before is published, however late it arrives. Nobody
//!       sees a new life before every device was told of the wipe, so that whatever a device is
//!       asked in it comes behind the wipe.
//!   A2  A block makes room for a better one of its name, and never for a worse one.
//!   S1  Nobody but the daemon can write an arena (`Share::ReadOnly`).

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

use kvtier_proto::{NamespaceId, Quality};
use kvtier_store::mem::{Arena, IoBuf, Pages, Share};
use tokio::sync::{Notify, Semaphore, broadcast};

use super::BlockEvent;
use super::directory::{Directory, Name, ResidentInfo};
use crate::block::{BlockId, HostBlock, Lender, RawBlock};
use crate::planted::{Bug, planted};
use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering};

/// Events a slow watcher may fall behind before it is told that it missed some.
const EVENTS_KEPT: usize = 4096;
/// Loads of one namespace under way: what fills the queue of a device, twice what one restore
/// asks for at a time.
const LOADS_MAX: usize = 64;
/// Of them, those that nobody waits for yet.
const PREFETCHED_MAX: usize = 32;
/// Prefetch calls under way; another starts nothing.
const PREFETCHES_MAX: usize = 16;
/// Encoders of one namespace at work or waiting for memory, for each core.
const ENCODES_PER_CORE: usize = 2;

/// See the module.
#[derive(Debug)]
pub struct HostTier {
    namespace: NamespaceId,
    arena: Arc<Arena>,
    home: Arc<Home>,
    wipes: Arc<AtomicU64>,
    events: broadcast::Sender<BlockEvent>,
    lowest: Quality,
    /// Where work of this namespace waits for its turn.
    pub lines: Lines,
}

/// Work of one namespace that may be under way at a time. What is beyond waits here, where it
/// holds nothing yet and no neighbour waits behind it.
#[derive(Debug)]
pub struct Lines {
    /// Blocks on their way from the device.
    pub loads: Semaphore,
    /// Of them, those that were prefetched.
    pub prefetched: Arc<Semaphore>,
    /// Calls of Prefetch that still have blocks to start.
    pub prefetches: Arc<Semaphore>,
    /// Blocks being encoded.
    pub encodes: Semaphore,
    /// The wipe under way.
    pub wipes: Arc<Semaphore>,
}

/// Where blocks that were handed out come back to.
#[derive(Debug)]
struct Home {
    shelf: Mutex<Shelf>,
    /// Memory was freed, or a block may leave that could not before.
    freed: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Shelf {
    directory: Directory,
    /// Resident blocks that somebody holds. An entry goes when its last holder has gone.
    lent: HashMap<Name, Weak<HostBlock>>,
}

/// One life of a namespace: from a wipe to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
    pub fn create(
        namespace: NamespaceId,
        name: &str,
        quota: usize,
        pages: Pages,
    ) -> std::io::Result<Self> {
        let arena = Arena::create_on(&format!("kvtier-{name}"), quota, Share::ReadOnly, pages)?;
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        let freed = Arc::new(Notify::new());
        let heard = Arc::clone(&freed);
        arena.on_freed(move || heard.notify_waiters());
        let shelf = Mutex::default();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let line = |places| Arc::new(Semaphore::new(places));
        Ok(Self {
            namespace,
            arena,
            home: Arc::new(Home { shelf, freed }),
            wipes: Arc::default(),
            events,
            lowest: Quality::Exact,
            lines: Lines {
                loads: Semaphore::new(LOADS_MAX),
                prefetched: line(PREFETCHED_MAX),
                prefetches: line(PREFETCHES_MAX),
                encodes: Semaphore::new(ENCODES_PER_CORE * cores),
                wipes: line(1),
            },
        })
    }

    /// The same tier of a namespace whose blocks may be stored as badly as this.
    #[must_use]
    pub fn tolerating(mut self, lowest: Quality) -> Self {
        self.lowest = lowest;
        self
    }

    /// The worst quality at which blocks of the namespace may be stored.
    pub fn lowest(&self) -> Quality {
        self.lowest
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

    /// Resolves when memory was freed after this call, or a block may leave that could not before.
    /// The end of a pin is not heard.
    pub fn freed(&self) -> impl Future<Output = ()> + '_ {
        self.home.freed.notified()
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
            let Some(block) = self.lock().directory.evict(Instant::now()) else {
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
        let mut shelf = self.lock();
        shelf.directory.touch(name);
        shelf.lend(name, &self.home)
    }

    /// The block, held, and not counted as used.
    pub fn hold(&self, name: &Name) -> Option<Arc<HostBlock>> {
        self.lock().lend(name, &self.home)
    }

    /// Facts about a block, not counted as use.
    pub fn info(&self, name: &Name) -> Option<ResidentInfo> {
        let shelf = self.lock();
        let holders = shelf.lent.get(name).map_or(0, Weak::strong_count);
        let info = shelf.directory.info(name)?;
        Some(ResidentInfo { holders, ..info })
    }

    /// Calls `look` for each name, under one lock, with what is known of it.
    pub fn each<T>(&self, names: &[Name], look: impl Fn(&Directory, &Name) -> T) -> Vec<T> {
        let shelf = self.lock();
        names
            .iter()
            .map(|name| look(&shelf.directory, name))
            .collect()
    }

    /// Counts the use of a prefix: its last block first, so that leaves are the oldest.
    pub fn touch_prefix(&self, names: &[Name]) {
        let mut shelf = self.lock();
        for name in names.iter().rev() {
            shelf.directory.touch(name);
        }
    }

    /// Publishes a block; when one of that name is there already that is as good, that one is
    /// returned. `None` when the namespace was wiped since `life` was read: the block belongs to
    /// what is gone.
    pub fn insert(&self, block: HostBlock, durable: bool, life: Life) -> Option<Arc<HostBlock>> {
        let name = (block.id().kind, block.id().key);
        let mut shelf = self.lock();
        if self.begun() != life && !planted(Bug::PublishAcrossWipe) {
            return None;
        }
        let replaced = shelf.directory.insert(Arc::clone(block.raw()), durable);
        if replaced.is_some() {
            // Whoever holds it keeps it; the next one gets the better block.
            shelf.lent.remove(&name);
        }
        shelf.lend(&name, &self.home)
    }

    /// The life of the namespace between two wipes. Read it before the first byte of a block is
    /// looked at, and show it when the block is published or stored.
    pub fn life(&self) -> Life {
        // A wipe that has the shelf is still telling the devices.
        let _shelf = (!planted(Bug::LifeBeforeForget)).then(|| self.lock());
        self.begun()
    }

    fn begun(&self) -> Life {
        Life(self.wipes.load(Ordering::SeqCst))
    }

    /// Lives counted, for whoever must check one without this tier at hand.
    pub fn lives(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.wipes)
    }

    /// The disk tier has the block of this life too (or no longer). Nothing is said of a block
    /// that was saved after a wipe.
    pub fn set_durable(&self, name: &Name, durable: bool, life: Life) {
        let mut shelf = self.lock();
        if self.begun() == life {
            shelf.directory.set_durable(name, durable);
        }
    }

    /// Keeps a block for `ttl`; `None` takes the pin away. False when it is not here.
    pub fn pin(&self, name: &Name, ttl: Option<Duration>) -> bool {
        let until = ttl.map(|ttl| Instant::now() + ttl);
        self.lock().directory.pin(name, until)
    }

    /// Takes every block out and begins a new life: nothing of the old one is published again.
    /// `forget` tells the devices, and does not wait for them. A record of the old life is refused
    /// before it begins, and the new life is seen once it has ended.
    pub fn clear<T>(&self, forget: impl FnOnce() -> T) -> (Vec<Arc<RawBlock>>, T) {
        let mut shelf = self.lock();
        self.wipes.fetch_add(1, Ordering::SeqCst);
        let told = forget();
        shelf.lent.clear();
        (shelf.directory.clear(), told)
    }

    /// Blocks held.
    pub fn len(&self) -> usize {
        self.lock().directory.len()
    }

    /// True when no block is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Memory taken, fragments included. Unit: bytes.
    pub fn used(&self) -> usize {
        self.arena.capacity() - self.arena.free_bytes()
    }

    fn lock(&self) -> MutexGuard<'_, Shelf> {
        self.home.lock()
    }
}

impl Shelf {
    /// Hands a block out: to everybody the same one, so that the last of them brings it back.
    /// The caller must not drop what it gets before it gives up the lock.
    fn lend(&mut self, name: &Name, home: &Arc<Home>) -> Option<Arc<HostBlock>> {
        if let Some(held) = self.lent.get(name).and_then(Weak::upgrade) {
            return Some(held);
        }
        let raw = Arc::clone(self.directory.get(name)?);
        let lender = Arc::clone(home);
        let held = Arc::new(HostBlock::lent(raw, lender));
        self.lent.insert(*name, Arc::downgrade(&held));
        self.directory.set_held(name, true);
        Some(held)
    }
}

impl Home {
    fn lock(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lender for Home {
    fn returned(&self, id: BlockId) {
        let name = (id.kind, id.key);
        {
            let mut shelf = self.lock();
            // Handed out again meanwhile, or the name of a later life: that one ends on its own.
            let last = |held: &Weak<HostBlock>| held.strong_count() == 0;
            let last = shelf.lent.get(&name).is_some_and(last);
            if last || planted(Bug::ReturnWhileLent) {
                shelf.lent.remove(&name);
                shelf.directory.set_held(&name, false);
            }
        }
        self.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests;
