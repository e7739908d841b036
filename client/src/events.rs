//! Watching what happens to the namespace's blocks.
//!
//! Upstairs:   routers and engines that mirror what the daemon holds.
//! Downstairs: the `WatchEvents` stream of one link.

use std::sync::Arc;

use kvtier_proto::{BlockKey, Miss, key_from_wire, v1};
use tonic::Streaming;

use crate::error::{Call, Error};
use crate::link::Link;
use crate::values::{Tier, miss_from_wire};

const WATCH: Call = Call::reads("WatchEvents");

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BlockChange {
    /// The block is on this tier now.
    Stored(Tier),
    /// The block left this tier.
    Removed(Tier),
    /// The watcher was too slow and missed this many events: look up what matters.
    Dropped(u64),
}

/// One event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockEvent {
    /// The block; [`BlockKey::ROOT`] when events were dropped.
    pub key: BlockKey,
    /// What happened to it.
    pub change: BlockChange,
    /// Why it was removed, when that is known.
    pub reason: Option<Miss>,
}

/// A stream of events. Dropping it ends the watch.
pub struct Events {
    stream: Streaming<v1::BlockEvent>,
    link: Arc<Link>,
}

impl Events {
    pub(crate) fn new(stream: Streaming<v1::BlockEvent>, link: Arc<Link>) -> Self {
        Self { stream, link }
    }

    /// The next event; `None` when the daemon ends the stream. Waits as long as nothing happens
    /// and the session lives.
    /// Errors: `SessionLost` (watch again, and look up what matters), `BadReply`.
    /// Cancel safety: dropping the future loses no event. Blocks: no.
    ///
    /// ```no_run
    /// # async fn watch(session: kvtier_client::Session) -> Result<(), kvtier_client::Error> {
    /// let mut events = session.watch_events().await?;
    /// while let Some(event) = events.next().await? {
    ///     println!("{} {:?}", event.key, event.change);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn next(&mut self) -> Result<Option<BlockEvent>, Error> {
        loop {
            let event = tokio::select! {
                event = self.stream.message() => event,
                reason = self.link.life.lost() => return Err(WATCH.lost(reason)),
            };
            let event = event.map_err(|status| self.link.noticed(WATCH.failed(&status)))?;
            let Some(event) = event else {
                return Ok(None);
            };
            if let Some(event) = read(&event)? {
                return Ok(Some(event));
            }
        }
    }
}

/// `None` for an event of a later protocol.
pub(crate) fn read(event: &v1::BlockEvent) -> Result<Option<BlockEvent>, Error> {
    use v1::block_event::Event;
    let change = match event.event {
        Some(Event::Stored(tier)) => BlockChange::Stored(Tier::from_wire(WATCH, tier)?),
        Some(Event::Removed(tier)) => BlockChange::Removed(Tier::from_wire(WATCH, tier)?),
        Some(Event::Dropped(count)) => BlockChange::Dropped(count),
        None => return Ok(None),
    };
    let key = match event.key.is_empty() {
        true => BlockKey::ROOT,
        false => key_from_wire("key", &event.key).map_err(|e| WATCH.bad_reply(e.to_string()))?,
    };
    let reason = match event.reason {
        0 => None,
        reason => Some(miss_from_wire(WATCH, reason)?),
    };
    Ok(Some(BlockEvent {
        key,
        change,
        reason,
    }))
}
