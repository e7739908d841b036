//! A session: the handle engines hold, over one link at a time.
//!
//! Upstairs:   engines; cloned freely between tasks.
//! Downstairs: `link`, one incarnation. Calls live next door: `save` and `windows`, `restore` and
//!             `inline`, `hints`; lookup and the start of a restore are here. `reconnect` finds
//!             another link when one is lost.
//!
//! Invariants kept here
//!   S1  Keys, layouts and namespace are the same in every incarnation, or the session says so.

use std::sync::{Arc, RwLock};

use kvtier_proto::{
    BlockKey, BlockLayout, KeyDeriver, ModelDescriptor, NamespaceId, PayloadKind, Quality, v1,
};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::Instant;

use crate::check;
use crate::engine_region::Target;
use crate::error::{Call, Error};
use crate::layouts::Layouts;
use crate::lineage::Lineage;
use crate::link::{Identity, Link, Recipe};
use crate::maps::Place;
use crate::mux::Keeps;
use crate::options::{RestoreOptions, Timeouts};
use crate::restore::{Asked, Restore, Source};
use crate::two_ended::PrefillStep;
use crate::values::Lookup;

mod reconnect;

use reconnect::Pause;

/// What is known about the daemon's side of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SessionState {
    /// It works.
    Open,
    /// The daemon is about to stop: finish restores, save nothing new.
    Draining {
        /// The daemon's sentence.
        reason: String,
    },
    /// It is gone; the next call opens it again.
    Lost {
        /// What ended it.
        reason: String,
    },
}

pub(crate) struct Inner {
    pub(crate) recipe: Recipe,
    pub(crate) layouts: Arc<Layouts>,
    /// Room for slots in this process, in KiB, where no region can be shared.
    pub(crate) own_room: Arc<Semaphore>,
    /// What the engine's blocks were made of.
    pub(crate) lineage: Arc<Lineage>,
    identity: Identity,
    keys: KeyDeriver,
    link: RwLock<Arc<Link>>,
    /// Held during an attempt to reconnect (S2).
    pause: Mutex<Pause>,
}

/// A session of one model in one namespace. Cheap to clone; the daemon's side ends with the last
/// clone and the last slot, block and restore that came from it.
#[derive(Clone)]
pub struct Session {
    pub(crate) inner: Arc<Inner>,
}

impl Session {
    pub(crate) fn new(recipe: Recipe, model: ModelDescriptor, link: Arc<Link>) -> Self {
        let identity = link.identity.clone();
        let secret = identity.secret.clone();
        let keys = KeyDeriver::new(secret, recipe.fingerprint, model.adapter.clone());
        let kib = usize::try_from(recipe.session.staging_bytes.get() / 1024).unwrap_or(usize::MAX);
        let room = kib.min(Semaphore::MAX_PERMITS);
        let inner = Inner {
            recipe,
            layouts: Arc::new(Layouts::new(model)),
            own_room: Arc::new(Semaphore::new(room)),
            lineage: Arc::default(),
            identity,
            keys,
            link: RwLock::new(link),
            pause: Mutex::new(Pause::new()),
        };
        let inner = Arc::new(inner);
        Self { inner }
    }

    /// Derives block keys of this model in this namespace. They hold for the life of the session.
    pub fn keys(&self) -> &KeyDeriver {
        &self.inner.keys
    }

    /// Keys of all blocks of a prompt; the last block may be short. `extra` goes into every key.
    pub fn prefix_keys(&self, tokens: &[u32], extra: &[u8]) -> Vec<BlockKey> {
        let block_tokens = usize::try_from(self.model().block_tokens).unwrap_or(usize::MAX);
        self.inner.keys.chain(tokens, block_tokens, extra)
    }

    /// The model whose blocks this session holds.
    pub fn model(&self) -> &ModelDescriptor {
        self.inner.layouts.model()
    }

    /// Where each part of a block of `tokens` tokens lies. Errors: `Invalid`.
    pub fn layout(&self, kind: PayloadKind, tokens: u32) -> Result<Arc<BlockLayout>, Error> {
        self.inner.layouts.get(kind, tokens)
    }

    /// Name of the namespace the daemon put this peer in.
    pub fn namespace(&self) -> &str {
        &self.inner.identity.name
    }

    /// Number of that namespace, as metrics and tools show it.
    pub fn namespace_id(&self) -> NamespaceId {
        NamespaceId(self.inner.identity.namespace)
    }

    /// True when blocks can reach a durable tier.
    pub fn is_durable(&self) -> bool {
        self.current().identity.durable
    }

    /// Version of the daemon that answered last.
    pub fn daemon_version(&self) -> String {
        self.current().identity.daemon_version.clone()
    }

    /// True when payload travels through shared memory, false when inline.
    pub fn is_shared(&self) -> bool {
        self.current().arena.is_some()
    }

    /// What is known about the daemon's side. Never waits, asks nothing.
    pub fn state(&self) -> SessionState {
        self.current().life.state()
    }

    /// Waits until the session is draining or lost. Cancel safe.
    pub async fn until_not_open(&self) -> SessionState {
        let mut states = self.current().life.watch();
        let changed = states
            .wait_for(|state| !matches!(state, SessionState::Open))
            .await;
        changed.map_or_else(|_| self.state(), |state| state.clone())
    }

    /// Opens the session again if it is lost, and keeps trying as long as
    /// [`ReconnectOptions::reopen`](crate::ReconnectOptions) says. Calls do this by themselves,
    /// with a single attempt each.
    ///
    /// Errors: `Connect`, `Unavailable` (still away), `NamespaceChanged`, `Refused`, `Region`.
    /// Cancel safety: dropping the future stops trying. Blocks: no.
    ///
    /// ```no_run
    /// # async fn back(session: kvtier_client::Session) -> Result<(), kvtier_client::Error> {
    /// session.until_not_open().await;
    /// session.reopen().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn reopen(&self) -> Result<(), Error> {
        let wait = self.inner.recipe.connect.reconnect.reopen;
        self.reconnect(wait).await.map(|_| ())
    }

    /// Says how much of a prefix can be restored now. Takes no lease and moves nothing.
    ///
    /// Units: `keys` are 1 to 4096 blocks, oldest first.
    /// Returns the leading blocks that are present and a status for each, up to and including the
    /// first that is missing. Zero is a normal answer.
    /// Errors: `Invalid`, `Timeout`, `SessionLost`, `Unavailable`; a lookup changes nothing.
    /// Cancel safety: yes. Blocks: no.
    ///
    /// ```no_run
    /// # use kvtier_client::{Error, PayloadKind, Session};
    /// # async fn hits(session: Session, tokens: Vec<u32>) -> Result<(), Error> {
    /// let keys = session.prefix_keys(&tokens, b"");
    /// let lookup = session.lookup(&keys, PayloadKind::Kv).await?;
    /// println!("{} of {} blocks", lookup.prefix_blocks, keys.len());
    /// # Ok(())
    /// # }
    /// ```
    pub async fn lookup(&self, keys: &[BlockKey], kind: PayloadKind) -> Result<Lookup, Error> {
        self.look(keys, kind, true, Quality::Exact).await
    }

    /// As [`lookup`](Self::lookup), for whoever takes blocks as bad as `accept`: what is stored
    /// worse is missing with reason [`Miss::Quality`](crate::Miss::Quality).
    pub async fn lookup_accepting(
        &self,
        keys: &[BlockKey],
        kind: PayloadKind,
        accept: Quality,
    ) -> Result<Lookup, Error> {
        self.look(keys, kind, true, accept).await
    }

    /// As [`lookup`](Self::lookup), with a status for every key.
    pub async fn lookup_each(&self, keys: &[BlockKey], kind: PayloadKind) -> Result<Lookup, Error> {
        self.look(keys, kind, false, Quality::Exact).await
    }

    pub(crate) async fn look(
        &self,
        keys: &[BlockKey],
        kind: PayloadKind,
        prefix_only: bool,
        accept: Quality,
    ) -> Result<Lookup, Error> {
        const LOOKUP: Call = Call::reads("Lookup");
        let wire = check::keys_to_wire(keys)?;
        let link = self.link().await?;
        let request = v1::LookupRequest {
            session: link.session.clone(),
            keys: wire,
            kind: v1::PayloadKind::from(kind).into(),
            prefix_only,
            accept: v1::Quality::from(accept).into(),
        };
        let mut rpc = link.rpc.clone();
        let limit = self.timeouts().control;
        let reply = link.call(LOOKUP, limit, rpc.lookup(request)).await?;
        Lookup::from_wire(LOOKUP, keys.len(), prefix_only, &reply)
    }

    /// Starts restoring blocks. Many restores of a session run side by side, at most 64.
    ///
    /// Units: `keys` are 1 to 4096 blocks, oldest first.
    /// Returns a [`Restore`]: blocks arrive as events. A block that is not there is a miss in its
    /// summary.
    /// Errors: `Invalid`, `Busy` (64 are running), `SessionLost`, `Unavailable`; nothing started.
    /// Cancel safety: dropping the future or the `Restore` cancels and gives back every lease that
    /// was not handed out. Blocks: no.
    ///
    /// An example is at [`Restore::next`].
    pub async fn restore(
        &self,
        keys: &[BlockKey],
        kind: PayloadKind,
        options: RestoreOptions,
    ) -> Result<Restore, Error> {
        check::count(keys.len())?;
        let link = self.link().await?;
        self.restore_over(link, keys, kind, options, None).await
    }

    /// The same over a link, into slots of the engine's own if any.
    pub(crate) async fn restore_over(
        &self,
        link: Arc<Link>,
        keys: &[BlockKey],
        kind: PayloadKind,
        options: RestoreOptions,
        target: Option<Target>,
    ) -> Result<Restore, Error> {
        let wire = check::keys_to_wire(keys)?;
        if link.arena.is_none() && target.is_none() {
            return Ok(self.start_inline(link, keys, kind, &options));
        }
        let place = match options.two_ended {
            Some(_) => self.place(&link, keys.len()).await?,
            None => None,
        };
        let two_ended = options.two_ended.zip(place.as_deref());
        let start = v1::RestoreStart {
            session: link.session.clone(),
            keys: wire,
            kind: v1::PayloadKind::from(kind).into(),
            deadline_ms: options.deadline_ms(),
            scattered: options.scattered,
            accept: v1::Quality::from(options.accept).into(),
            two_ended: two_ended.map(|(engine, place)| v1::TwoEnded {
                map: Some(place.slot()),
                first_token: engine.first_token,
                suffix_tokens: engine.suffix_tokens,
            }),
            into: target.as_ref().map(Target::to_wire),
        };
        let keeps = Keeps {
            place: place.clone(),
            slots: target.as_ref().map(|target| Arc::clone(&target.taken)),
        };
        let running = link.mux.start(start, keeps)?;
        let mut asked = self.asked(keys, kind, &options);
        asked.into = target.map(|target| (target.region, target.slots));
        let source = Source::Mux(running);
        Ok(Restore::new(self, link, asked, source, place))
    }

    /// Where the map of a two-ended restore lies; `None` where no memory can be shared, and when
    /// failed streams have taken all of it: such a restore loads all it can, then computes.
    async fn place(&self, link: &Link, blocks: usize) -> Result<Option<Arc<Place>>, Error> {
        let Some(maps) = link.maps(self.timeouts().control).await? else {
            return Ok(None);
        };
        let place = maps.place(blocks);
        if place.is_none() {
            tracing::warn!(
                "no room for the map of a two-ended restore: nothing is computed beside"
            );
        }
        Ok(place)
    }

    /// Tells the daemon how long prefill steps took, so that it can say when loading is faster:
    /// steps of ordinary prompts as well, not only those of restores. Never waits; what cannot be
    /// sent is lost.
    pub fn report_prefill(&self, steps: &[PrefillStep]) {
        let link = self.current();
        steps.iter().for_each(|step| link.reports.put(*step));
    }

    /// What the engine's bytes of a block are, as far as this session knows: what it restored lost
    /// nothing, or something, and what it saved behind that is no better. A save declares it.
    pub fn quality_of(&self, key: &BlockKey) -> Quality {
        self.inner.lineage.of(key)
    }

    /// Says what the engine's bytes of these blocks are, where it knows better than the session:
    /// exact when it has computed all of a prefix anew and holds no other copy of it; worse when
    /// another session restored them.
    ///
    /// ```no_run
    /// # use kvtier_client::{BlockKey, Quality, Session};
    /// # fn recomputed(session: &Session, prefix: &[BlockKey]) {
    /// session.set_quality(prefix, Quality::Exact);
    /// # }
    /// ```
    pub fn set_quality(&self, keys: &[BlockKey], quality: Quality) {
        self.inner.lineage.set(keys, quality);
    }

    pub(crate) fn asked(
        &self,
        keys: &[BlockKey],
        kind: PayloadKind,
        options: &RestoreOptions,
    ) -> Asked {
        let timeouts = self.timeouts();
        // The daemon answers by the deadline; its answer gets the time of any other call.
        let until = options
            .deadline
            .map(|deadline| deadline.saturating_add(timeouts.control));
        Asked {
            keys: keys.to_vec(),
            kind,
            accept: options.accept,
            after: options.after,
            // Both ends of a two-ended restore are of one prefix.
            one_prefix: !options.scattered || options.two_ended.is_some(),
            into: None,
            two_ended: options.two_ended,
            idle: timeouts.restore_idle,
            until: until.and_then(|until| Instant::now().checked_add(until)),
        }
    }

    /// Waits until everything dropped before this call has been given back to the daemon.
    ///
    /// Errors: `Timeout`, `SessionLost` (the daemon takes all of it back itself).
    /// Cancel safety: yes. Blocks: no.
    pub async fn flush(&self) -> Result<(), Error> {
        let link = self.link().await?;
        let limit = self.timeouts().control;
        link.releases.flushed(Call::reads("Release"), limit).await
    }

    pub(crate) fn timeouts(&self) -> &Timeouts {
        &self.inner.recipe.connect.timeouts
    }

    /// Memory to fill blocks in. Unit: bytes.
    pub(crate) fn staging_len(&self) -> usize {
        let asked = self.inner.recipe.session.staging_bytes.get();
        let staging = self
            .current()
            .staging
            .as_ref()
            .map(|region| region.map.len());
        staging.unwrap_or(usize::try_from(asked).unwrap_or(usize::MAX))
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("namespace", &self.namespace())
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}
