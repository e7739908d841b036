//! Sessions: what one connected client holds, and how all of it ends with the connection.
//!
//! Upstairs:   `server` finds the session of a call here.
//! Downstairs: `tenant` (who), `region` (staging), `block` (leased bytes).
//!
//! Invariants kept here
//!   E1  A session's namespace, user and model never change after it opened.
//!   E2  When the session ends, every lease and region of it ends too, whoever ended it: after
//!       `end` nothing is copied from or to its engine's memory.
//!   E3  A token is 128 random bits and is good only for the user it was given to.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use kvtier_proto::limits::{CLAIMS_REGIONS_MAX, ENGINE_REGIONS_MAX};
use kvtier_proto::{ModelDescriptor, ReaderSpec};
use rand::TryRngCore;
use tokio::sync::{Semaphore, watch};

use crate::block::{HostBlock, Layouts};
use crate::config::LimitsConfig;
use crate::planted::{Bug, planted};
use crate::region::engine::EngineRegion;
use crate::region::{HandedOver, SlotName, Staging, StaleSlot};
use crate::restore::run::Reader;
use crate::shm::SharedMemory;
use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering};
use crate::tenant::{Peer, Tenant};
use crate::tier::host::HostTier;

/// Names a session. Secret: whoever shows it acts for the session.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token([u8; 16]);

impl Token {
    /// A new random token.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        rand::rngs::OsRng
            .try_fill_bytes(&mut bytes)
            .map_err(std::io::Error::other)?;
        Ok(Self(bytes))
    }

    /// Reads a token from the wire.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The bytes, for the one peer that it is for.
    pub fn expose(&self) -> &[u8; 16] {
        &self.0
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(hidden)")
    }
}

/// Most event streams that one session watches at a time.
const WATCHERS_MAX: usize = 8;

/// There may be no more of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what}: at most {max}")]
pub struct TooMany {
    /// What there are too many of.
    pub what: &'static str,
    /// How many there may be.
    pub max: usize,
}

/// One connected client.
#[derive(Debug)]
pub struct Session {
    /// Names the session on the wire.
    pub token: Token,
    /// Whose it is.
    pub tenant: Arc<Tenant>,
    /// Who opened it.
    pub peer: Peer,
    /// What the client calls itself.
    pub client: String,
    /// What its blocks hold.
    pub layouts: Arc<Layouts>,
    /// What it does with restores while they run.
    pub spec: ReaderSpec,
    /// When it opened.
    pub opened: Instant,
    /// One permit for each restore that may run.
    pub restores: Arc<Semaphore>,
    /// One permit for each event stream that may be watched.
    pub watchers: Arc<Semaphore>,
    restores_max: u32,
    leases_max: usize,
    held: Mutex<Held>,
    leases_given: AtomicU64,
    ended: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Held {
    regions: HashMap<u32, Arc<Staging>>,
    claims: HashMap<u32, Arc<SharedMemory>>,
    engines: HashMap<u32, Arc<EngineRegion>>,
    region_bytes: u64,
    next_region: u32,
    leases: HashMap<u64, Arc<HostBlock>>,
    ended: bool,
}

/// Memory is shared in whole pages. Unit: bytes.
const PAGE: usize = 4096;

/// Number of the region that a tenant's arena has in every session.
pub const ARENA_REGION: u32 = 0;

impl Session {
    /// A session of `tenant` that holds nothing yet.
    pub fn new(
        token: Token,
        tenant: Arc<Tenant>,
        peer: Peer,
        client: String,
        model: ModelDescriptor,
        limits: &LimitsConfig,
    ) -> Self {
        let count = |n: u32| usize::try_from(n).unwrap_or(usize::MAX);
        Self {
            token,
            tenant,
            peer,
            client,
            layouts: Arc::new(Layouts::new(model)),
            spec: ReaderSpec::default(),
            opened: Instant::now(),
            restores: Arc::new(Semaphore::new(count(limits.restores_per_session))),
            watchers: Arc::new(Semaphore::new(WATCHERS_MAX)),
            restores_max: limits.restores_per_session,
            leases_max: count(limits.leases_per_session),
            held: Mutex::new(Held {
                next_region: ARENA_REGION + 1,
                ..Held::default()
            }),
            leases_given: AtomicU64::new(1),
            ended: watch::channel(false).0,
        }
    }

    /// The same for an engine that reads restores in this way.
    #[must_use]
    pub fn reading(mut self, spec: ReaderSpec) -> Self {
        self.spec = spec;
        self
    }

    /// Resolves when no restore of this session runs. None starts meanwhile or later, so that
    /// only whoever ends the daemon asks.
    pub async fn no_restores(&self) {
        if let Ok(all) = self.restores.acquire_many(self.restores_max).await {
            all.forget();
        }
    }

    /// Resolves when the session has ended.
    pub async fn ended(&self) {
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    /// Makes a staging region of `bytes`.
    pub fn add_region(&self, bytes: u64) -> std::io::Result<Result<Arc<Staging>, TooMany>> {
        let max = self.tenant.staging_max.get();
        let mut held = self.held();
        if held.ended || held.region_bytes.saturating_add(bytes) > max {
            let max = usize::try_from(max).unwrap_or(usize::MAX);
            return Ok(Err(TooMany {
                what: "bytes of staging regions in one session",
                max,
            }));
        }
        let number = held.next_region;
        let len = usize::try_from(bytes).unwrap_or(usize::MAX);
        let staging = Arc::new(Staging::create(number, len)?);
        held.next_region += 1;
        held.region_bytes += bytes;
        held.regions.insert(number, Arc::clone(&staging));
        Ok(Ok(staging))
    }

    /// Makes a region of `bytes` for maps of two-ended restores, and says its number.
    pub fn add_claims(
        &self,
        bytes: usize,
    ) -> std::io::Result<Result<(u32, Arc<SharedMemory>), TooMany>> {
        let mut held = self.held();
        if held.ended || held.claims.len() >= CLAIMS_REGIONS_MAX {
            return Ok(Err(TooMany {
                what: "regions for claims in one session",
                max: CLAIMS_REGIONS_MAX,
            }));
        }
        let memory = Arc::new(SharedMemory::create(bytes.next_multiple_of(PAGE))?);
        let number = held.next_region;
        held.next_region += 1;
        held.claims.insert(number, Arc::clone(&memory));
        Ok(Ok((number, memory)))
    }

    /// The region for claims of this number.
    pub fn claims(&self, number: u32) -> Option<Arc<SharedMemory>> {
        self.held().claims.get(&number).cloned()
    }

    /// Makes a region of an engine's own memory, which the engine has yet to hand over. All of the
    /// session together have at most `max` bytes.
    pub fn add_engine(
        &self,
        bytes: u64,
        max: u64,
        make: impl FnOnce(u32) -> EngineRegion,
    ) -> Result<Arc<EngineRegion>, TooMany> {
        let mut held = self.held();
        // One that was never handed over is nothing that an engine could use.
        held.engines.retain(|_, region| region.is_usable());
        if held.ended || held.engines.len() >= ENGINE_REGIONS_MAX {
            return Err(TooMany {
                what: "regions of an engine's memory in one session",
                max: ENGINE_REGIONS_MAX,
            });
        }
        let sum: u64 = held.engines.values().map(|region| region.bytes()).sum();
        if sum.saturating_add(bytes) > max {
            return Err(TooMany {
                what: "bytes of an engine's memory in one session (regions.session_max)",
                max: usize::try_from(max).unwrap_or(usize::MAX),
            });
        }
        let region = Arc::new(make(held.next_region));
        held.next_region += 1;
        held.engines.insert(region.number(), Arc::clone(&region));
        Ok(region)
    }

    /// The region of an engine's memory of this number.
    pub fn engine(&self, number: u32) -> Option<Arc<EngineRegion>> {
        self.held().engines.get(&number).cloned()
    }

    /// The engine's memory that is registered. Unit: bytes.
    pub fn engine_bytes(&self) -> u64 {
        let held = self.held();
        held.engines.values().map(|region| region.bytes()).sum()
    }

    /// The staging region of this number.
    pub fn region(&self, number: u32) -> Option<Arc<Staging>> {
        self.held().regions.get(&number).cloned()
    }

    /// Takes a filled slot over.
    pub fn take(&self, slot: &SlotName, key: &[u8]) -> Result<HandedOver, StaleSlot> {
        if let Some(engine) = self.engine(slot.region) {
            return engine.take(slot, key).map(HandedOver::Lent);
        }
        let staging = self.region(slot.region).ok_or(StaleSlot)?;
        staging.take(slot, key).map(HandedOver::Staged)
    }

    /// Gives an unused slot back.
    pub fn release_slot(&self, slot: &SlotName) -> Result<(), StaleSlot> {
        if let Some(engine) = self.engine(slot.region) {
            return engine.release(slot);
        }
        self.region(slot.region).ok_or(StaleSlot)?.release(slot)
    }

    /// Keeps a block for the client until it releases the lease or goes away.
    pub fn lease(&self, block: Arc<HostBlock>) -> Result<u64, TooMany> {
        let mut held = self.held();
        let ended = held.ended && !planted(Bug::LeaseAfterEnd);
        if ended || held.leases.len() >= self.leases_max {
            return Err(TooMany {
                what: "leases in one session",
                max: self.leases_max,
            });
        }
        let lease = self.leases_given.fetch_add(1, Ordering::Relaxed);
        held.leases.insert(lease, block);
        Ok(lease)
    }

    /// Ends a lease. False when there was none of that number.
    pub fn release(&self, lease: u64) -> bool {
        let block = self.held().leases.remove(&lease);
        block.is_some()
    }

    /// Leases held now.
    pub fn leases(&self) -> usize {
        self.held().leases.len()
    }

    /// Staging memory. Unit: bytes.
    pub fn region_bytes(&self) -> u64 {
        self.held().region_bytes
    }

    /// Lets everything go (E2). Later leases and regions are refused. Of two who end it each
    /// returns only when nothing moves in its engine's memory any more.
    pub fn end(&self) {
        let engines: Vec<_> = {
            let mut held = self.held();
            held.ended = true;
            match planted(Bug::EngineOfOneEnd) {
                true => held.engines.drain().map(|(_, region)| region).collect(),
                false => held.engines.values().map(Arc::clone).collect(),
            }
        };
        self.restores.close();
        engines.iter().for_each(|region| region.close());
        let ended = {
            let mut held = self.held();
            let nothing = Held {
                ended: true,
                ..Held::default()
            };
            std::mem::replace(&mut *held, nothing)
        };
        drop(ended);
        self.ended.send_replace(true);
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reader for Session {
    fn host(&self) -> &Arc<HostTier> {
        &self.tenant.host
    }

    fn layouts(&self) -> &Arc<Layouts> {
        &self.layouts
    }

    fn lease(&self, block: Arc<HostBlock>) -> Option<u64> {
        Session::lease(self, block).ok()
    }

    fn release(&self, lease: u64) -> bool {
        Session::release(self, lease)
    }
}

/// All sessions of the daemon.
#[derive(Debug)]
pub struct Sessions {
    max: usize,
    /// Most of one namespace, so that none can keep the others out.
    share: usize,
    by_token: Mutex<HashMap<Token, Arc<Session>>>,
}

impl Sessions {
    /// Room for `max` sessions, shared evenly by so many namespaces.
    pub fn new(max: u32, namespaces: usize) -> Self {
        let max = usize::try_from(max).unwrap_or(usize::MAX);
        Self {
            max,
            share: (max / namespaces.max(1)).max(1),
            by_token: Mutex::default(),
        }
    }

    /// Adds a session.
    pub fn open(&self, session: Session) -> Result<Arc<Session>, TooMany> {
        let mut sessions = self.lock();
        let own = |other: &&Arc<Session>| other.tenant.id == session.tenant.id;
        let (all, own) = (sessions.len(), sessions.values().filter(own).count());
        for (what, open, max) in [
            ("sessions", all, self.max),
            ("sessions of one namespace", own, self.share),
        ] {
            if open >= max {
                return Err(TooMany { what, max });
            }
        }
        let session = Arc::new(session);
        sessions.insert(session.token, Arc::clone(&session));
        Ok(session)
    }

    /// The session of a token, if `peer` is the user it was given to (E3).
    pub fn find(&self, token: &[u8], peer: Peer) -> Option<Arc<Session>> {
        let session = self.lock().get(&Token::from_slice(token)?).cloned()?;
        let same = match (session.peer, peer) {
            (Peer::Unix { uid: a, .. }, Peer::Unix { uid: b, .. }) => a == b,
            (Peer::Tcp, Peer::Tcp) => true,
            _ => false,
        };
        same.then_some(session)
    }

    /// Ends a session and everything it holds. A session that is no longer here has ended wholly.
    pub fn close(&self, token: Token) {
        let session = self.lock().get(&token).cloned();
        if let Some(session) = session {
            session.end();
            self.lock().remove(&token);
        }
    }

    /// All sessions.
    pub fn all(&self) -> Vec<Arc<Session>> {
        self.lock().values().cloned().collect()
    }

    /// Sessions open.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// True when nobody is connected.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Token, Arc<Session>>> {
        self.by_token.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
pub(crate) mod tests;
