//! Calls around the blocks: prefetch, pins, explain, wipe, events.
//!
//! Upstairs:   engines, through `Session`.
//! Downstairs: one unary call of the current link each.

use std::time::Duration;

use kvtier_proto::{BlockKey, PayloadKind, Quality, v1};

use crate::check;
use crate::error::{Call, Error};
use crate::events::Events;
use crate::session::Session;
use crate::values::{Explanation, Prefetched};

impl Session {
    /// Starts moving blocks from slower tiers to the daemon's memory. Takes no lease.
    ///
    /// Units: `keys` are 1 to 4096 blocks, oldest first.
    /// Returns what is resident already and what started to move.
    /// Errors: `Invalid`, `Timeout`, `SessionLost`, `Unavailable`; nothing is lost by any.
    /// Cancel safety: yes. Blocks: no.
    ///
    /// ```no_run
    /// # use kvtier_client::{BlockKey, Error, PayloadKind, Session};
    /// # async fn ahead(session: Session, queued: Vec<BlockKey>) -> Result<(), Error> {
    /// let moved = session.prefetch(&queued, PayloadKind::Kv).await?;
    /// println!("{} resident, {} on their way", moved.resident, moved.started);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn prefetch(
        &self,
        keys: &[BlockKey],
        kind: PayloadKind,
    ) -> Result<Prefetched, Error> {
        self.prefetch_accepting(keys, kind, Quality::Exact).await
    }

    /// As [`prefetch`](Self::prefetch), for restores that take blocks as bad as `accept`: what is
    /// stored worse is not moved.
    pub async fn prefetch_accepting(
        &self,
        keys: &[BlockKey],
        kind: PayloadKind,
        accept: Quality,
    ) -> Result<Prefetched, Error> {
        const PREFETCH: Call = Call::reads("Prefetch");
        let wire = check::keys_to_wire(keys)?;
        let link = self.link().await?;
        let request = v1::PrefetchRequest {
            session: link.session.clone(),
            keys: wire,
            kind: v1::PayloadKind::from(kind).into(),
            accept: v1::Quality::from(accept).into(),
        };
        let mut rpc = link.rpc.clone();
        let limit = self.timeouts().control;
        let reply = link.call(PREFETCH, limit, rpc.prefetch(request)).await?;
        let blocks = |count: u32| usize::try_from(count).unwrap_or(usize::MAX).min(keys.len());
        Ok(Prefetched {
            resident: blocks(reply.resident),
            started: blocks(reply.started),
        })
    }

    /// Keeps blocks from eviction for `ttl`, rounded up to whole seconds.
    ///
    /// Units: `keys` are 1 to 4096 blocks. Returns how many exist and are pinned now.
    /// Errors: `Invalid` (a `ttl` of zero, or above the daemon's limit), `Timeout` and
    /// `SessionLost` (perhaps pinned; pinning again is harmless).
    /// Cancel safety: perhaps pinned. Blocks: no.
    ///
    /// ```no_run
    /// # use kvtier_client::{BlockKey, Error, PayloadKind, Session};
    /// # async fn keep(session: Session, system_prompt: Vec<BlockKey>) -> Result<(), Error> {
    /// let hour = std::time::Duration::from_secs(3600);
    /// let pinned = session.pin(&system_prompt, PayloadKind::Kv, hour).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn pin(
        &self,
        keys: &[BlockKey],
        kind: PayloadKind,
        ttl: Duration,
    ) -> Result<usize, Error> {
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let seconds = u32::try_from(seconds).unwrap_or(u32::MAX);
        if seconds == 0 {
            return Err(Error::invalid(
                "ttl is 0; accepted: at least 1 s; or call unpin",
            ));
        }
        self.set_pin(keys, kind, seconds).await
    }

    /// Lets blocks be evicted again. Returns how many exist. Errors: as [`pin`](Self::pin).
    pub async fn unpin(&self, keys: &[BlockKey], kind: PayloadKind) -> Result<usize, Error> {
        self.set_pin(keys, kind, 0).await
    }

    async fn set_pin(
        &self,
        keys: &[BlockKey],
        kind: PayloadKind,
        ttl_s: u32,
    ) -> Result<usize, Error> {
        let wire = check::keys_to_wire(keys)?;
        let link = self.link().await?;
        let request = v1::PinRequest {
            session: link.session.clone(),
            keys: wire,
            kind: v1::PayloadKind::from(kind).into(),
            ttl_s,
        };
        let mut rpc = link.rpc.clone();
        let limit = self.timeouts().control;
        let reply = link
            .call(Call::changes("Pin"), limit, rpc.pin(request))
            .await?;
        let pinned = usize::try_from(reply.blocks).unwrap_or(usize::MAX);
        Ok(pinned.min(keys.len()))
    }

    /// Says where a block is, and why a restore of it would miss.
    ///
    /// Errors: `Timeout`, `SessionLost`, `Unavailable`. Cancel safety: yes. Blocks: no.
    ///
    /// ```no_run
    /// # use kvtier_client::{BlockKey, Error, Session};
    /// # async fn why(session: Session, key: BlockKey) -> Result<(), Error> {
    /// let explanation = session.explain(&key).await?;
    /// println!("{:?}: {}", explanation.miss, explanation.notes.join(" "));
    /// # Ok(())
    /// # }
    /// ```
    pub async fn explain(&self, key: &BlockKey) -> Result<Explanation, Error> {
        const EXPLAIN: Call = Call::reads("Explain");
        let link = self.link().await?;
        let request = v1::ExplainRequest {
            session: link.session.clone(),
            namespace_id: 0,
            key: check::key_to_wire(key),
        };
        let mut rpc = link.rpc.clone();
        let limit = self.timeouts().control;
        let reply = link.call(EXPLAIN, limit, rpc.explain(request)).await?;
        Explanation::from_wire(EXPLAIN, reply)
    }

    /// Forgets every block of this session's namespace. Returns how many there were.
    ///
    /// Errors: `Daemon`, `Timeout` and `SessionLost` (perhaps forgotten, perhaps only until the
    /// daemon restarts; wiping again is harmless).
    /// Cancel safety: perhaps forgotten. Blocks: no.
    ///
    /// ```no_run
    /// # async fn wipe(session: kvtier_client::Session) -> Result<(), kvtier_client::Error> {
    /// println!("{} blocks forgotten", session.wipe().await?);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn wipe(&self) -> Result<u64, Error> {
        let link = self.link().await?;
        let request = v1::WipeRequest {
            session: link.session.clone(),
            namespace_name: String::new(),
        };
        let mut rpc = link.rpc.clone();
        // Forgetting durable blocks writes to the device.
        let limit = self.timeouts().commit;
        let reply = link
            .call(Call::changes_by_parts("Wipe"), limit, rpc.wipe(request))
            .await?;
        Ok(reply.blocks)
    }

    /// Watches what happens to the namespace's blocks. An example is at [`Events::next`].
    ///
    /// Errors: `Timeout`, `SessionLost`, `Unavailable`. Cancel safety: yes. Blocks: no.
    pub async fn watch_events(&self) -> Result<Events, Error> {
        let link = self.link().await?;
        let session = link.session.clone();
        let mut rpc = link.rpc.clone();
        let answer = rpc.watch_events(v1::WatchEventsRequest { session });
        let limit = self.timeouts().control;
        let stream = link.call(Call::reads("WatchEvents"), limit, answer).await?;
        Ok(Events::new(stream, link))
    }
}
