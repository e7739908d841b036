//! Restoring: a stream of leased blocks.
//!
//! Upstairs:   engines, through `Session::restore`.
//! Downstairs: `mux` (leases of the arena) or `inline` (bytes in the stream) feed the same type.
//!
//! Invariants kept here
//!   G1  A block is handed out only when its slot lies in the arena, is exactly as long as its
//!       layout, was asked for and did not come before.
//!   G2  `usable_blocks` never counts a block that was neither handed out nor computed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use kvtier_proto::{BlockKey, Miss, PayloadKind, Quality};
use tokio::time::Instant;

use crate::error::Error;
use crate::layouts::Layouts;
use crate::lease::LeasedBlock;
use crate::lineage::Lineage;
use crate::link::Link;
use crate::maps::Place;
use crate::mux::{Feed, RESTORE};
use crate::session::Session;
use crate::two_ended::{Meeting, Outlook, TwoEnded};
use crate::values::BlockStatus;

mod arrivals;
mod end;
mod placed;
mod source;

pub use placed::PlacedBlock;

pub(crate) use source::Source;

/// What a restore says next.
#[derive(Debug)]
#[non_exhaustive]
pub enum RestoreEvent {
    /// What will happen to each block asked for, in order. Comes first, once, unless the deadline
    /// passed before anything was known.
    Plan(Vec<BlockStatus>),
    /// What a two-ended restore is expected to take. Comes after the plan, once, from a daemon that
    /// looks ahead.
    Outlook(Outlook),
    /// A block can be read. Blocks come in any order.
    Ready(LeasedBlock),
    /// A block is in its slot of an [`EngineRegion`](crate::EngineRegion), of a restore into one.
    Placed(PlacedBlock),
    /// Nothing more comes. Comes last, once.
    Done(RestoreSummary),
}

/// How a restore ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RestoreSummary {
    /// Leading blocks that all arrived, or that the engine had computed by its own
    /// [`progress`](Restore::progress).
    pub usable_blocks: usize,
    /// Index and reason of the blocks that did not arrive.
    pub missed: Vec<(usize, Miss)>,
    /// True when it ended by [`Restore::cancel`].
    pub cancelled: bool,
}

/// All blocks of a restore, as [`Restore::collect`] returns them.
#[derive(Debug)]
#[non_exhaustive]
pub struct Restored {
    /// Blocks that arrived, by index. The first `usable_blocks` are the prefix.
    pub blocks: Vec<LeasedBlock>,
    /// The same of a restore into an [`EngineRegion`](crate::EngineRegion).
    pub placed: Vec<PlacedBlock>,
    /// Leading blocks that all arrived.
    pub usable_blocks: usize,
    /// Index and reason of the blocks that did not arrive.
    pub missed: Vec<(usize, Miss)>,
}

/// What a restore was asked for.
pub(crate) struct Asked {
    pub(crate) keys: Vec<BlockKey>,
    pub(crate) kind: PayloadKind,
    pub(crate) accept: Quality,
    /// The block before the first, where the engine has that already.
    pub(crate) after: Option<BlockKey>,
    /// Each key follows the one before it.
    pub(crate) one_prefix: bool,
    /// Region and slots that the blocks go to.
    pub(crate) into: Option<(u32, Vec<u32>)>,
    pub(crate) two_ended: Option<TwoEnded>,
    pub(crate) idle: Duration,
    /// The daemon ends it by then, and this side a little later.
    pub(crate) until: Option<Instant>,
}

/// A running restore. Dropping it cancels; blocks that were handed out stay readable.
pub struct Restore {
    asked: Asked,
    source: Source,
    link: Arc<Link>,
    layouts: Arc<Layouts>,
    lineage: Arc<Lineage>,
    ready: VecDeque<RestoreEvent>,
    /// Blocks handed out, and how good what is computed behind each can be; one a key.
    came: Vec<bool>,
    behind: Vec<Quality>,
    /// What the engine's end shares with this one.
    meeting: Arc<Meeting>,
    reported: usize,
    ended: bool,
}

impl Restore {
    pub(crate) fn new(
        session: &Session,
        link: Arc<Link>,
        asked: Asked,
        source: Source,
        place: Option<Arc<Place>>,
    ) -> Self {
        Self {
            meeting: Meeting::new(place, asked.keys.len()),
            came: vec![false; asked.keys.len()],
            behind: vec![Quality::Exact; asked.keys.len()],
            asked,
            source,
            link,
            layouts: Arc::clone(&session.inner.layouts),
            lineage: Arc::clone(&session.inner.lineage),
            ready: VecDeque::new(),
            reported: 0,
            ended: false,
        }
    }

    /// The next event; `None` after [`RestoreEvent::Done`].
    ///
    /// Errors: `Timeout` (no event for the idle limit, or past the deadline), `SessionLost`,
    /// `BadReply`, `Busy`, `Invalid`. The restore has ended then; blocks handed out before can be
    /// read unless the session is lost.
    /// Cancel safety: dropping the future loses no event. Blocks: no.
    ///
    /// ```no_run
    /// # use kvtier_client::{BlockKey, Error, PayloadKind, RestoreEvent, RestoreOptions, Session};
    /// # async fn restore(session: Session, keys: Vec<BlockKey>) -> Result<(), Error> {
    /// let options = RestoreOptions::default();
    /// let mut restore = session.restore(&keys, PayloadKind::Kv, options).await?;
    /// while let Some(event) = restore.next().await? {
    ///     match event {
    ///         RestoreEvent::Ready(block) => println!("block {} is here", block.index()),
    ///         RestoreEvent::Done(summary) => println!("{} usable", summary.usable_blocks),
    ///         _ => {}
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn next(&mut self) -> Result<Option<RestoreEvent>, Error> {
        loop {
            if let Some(event) = self.pop() {
                return Ok(Some(event));
            }
            if self.ended {
                self.meeting.end();
                return Ok(None);
            }
            self.advance().await?;
        }
    }

    /// The next event if there is one already; `None` when there is none at the moment, or the
    /// restore has ended.
    ///
    /// Errors: as [`next`](Self::next). Blocks: no.
    pub fn try_next(&mut self) -> Result<Option<RestoreEvent>, Error> {
        loop {
            if let Some(event) = self.pop() {
                return Ok(Some(event));
            }
            if self.ended {
                self.meeting.end();
                return Ok(None);
            }
            let Some(feed) = self.source.try_next() else {
                return Ok(None);
            };
            self.took(feed)?;
        }
    }

    /// Waits for one message and takes it in.
    async fn advance(&mut self) -> Result<(), Error> {
        let limit = self.patience();
        match tokio::time::timeout(limit, self.source.next()).await {
            Ok(Some(feed)) => self.took(feed),
            Ok(None) => self.took(Feed::Failed(RESTORE.lost("the restore stream ended"))),
            Err(_) => {
                self.stop();
                Err(RESTORE.timeout(limit))
            }
        }
    }

    fn took(&mut self, feed: Feed) -> Result<(), Error> {
        self.take(feed).map_err(|error| {
            self.stop();
            self.link.noticed(error)
        })
    }

    /// Hands one event out: from then on the engine has the block.
    fn pop(&mut self) -> Option<RestoreEvent> {
        let event = self.ready.pop_front()?;
        match &event {
            RestoreEvent::Ready(block) => self.meeting.came(block.index()),
            RestoreEvent::Placed(block) => self.meeting.came(block.index()),
            RestoreEvent::Done(_) => self.meeting.end(),
            RestoreEvent::Plan(_) | RestoreEvent::Outlook(_) => {}
        }
        Some(event)
    }

    /// Waits for all blocks.
    ///
    /// Holds a lease on every block: for a restore larger than the daemon's memory use
    /// [`next`](Self::next) or [`for_each`](Self::for_each) and let blocks go in between.
    /// Errors and cancel safety: as [`next`](Self::next); on either every lease is given back.
    ///
    /// ```no_run
    /// # use kvtier_client::{BlockKey, Error, PayloadKind, RestoreOptions, Session};
    /// # async fn restore(session: Session, keys: Vec<BlockKey>, kv: &mut [Vec<u8>])
    /// # -> Result<(), Error> {
    /// let options = RestoreOptions::default();
    /// let restored = session.restore(&keys, PayloadKind::Kv, options).await?.collect().await?;
    /// for block in &restored.blocks {
    ///     block.copy_into(&mut kv[block.index()])?;
    /// }
    /// // Confirms that no lease was lost while the copies ran.
    /// session.release(restored.blocks).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn collect(mut self) -> Result<Restored, Error> {
        let (mut blocks, mut placed) = (Vec::new(), Vec::new());
        loop {
            match self.next().await? {
                Some(RestoreEvent::Ready(block)) => blocks.push(block),
                Some(RestoreEvent::Placed(block)) => placed.push(block),
                Some(RestoreEvent::Plan(_) | RestoreEvent::Outlook(_)) => {}
                Some(RestoreEvent::Done(summary)) => {
                    blocks.sort_by_key(LeasedBlock::index);
                    placed.sort_by_key(PlacedBlock::index);
                    let (usable_blocks, missed) = (summary.usable_blocks, summary.missed);
                    return Ok(Restored {
                        blocks,
                        placed,
                        usable_blocks,
                        missed,
                    });
                }
                None => return Err(RESTORE.bad_reply("the restore ended without a result")),
            }
        }
    }

    /// Lets `visit` copy each block out as it arrives, releases it, and confirms that every lease
    /// was alive while it was read: when this returns `Ok`, the copies are right and whole.
    ///
    /// `visit` gets the block and its payload. Blocks come in any order and are released in
    /// batches, so the restore may be larger than the daemon's memory.
    /// Errors: as [`next`](Self::next), and `LeaseLost`. Discard everything that was copied.
    /// Cancel safety: dropping the future cancels the restore; discard what was copied.
    /// Blocks: while `visit` runs.
    ///
    /// ```no_run
    /// # use kvtier_client::{BlockKey, Error, PayloadKind, RestoreOptions, Session};
    /// # async fn restore(session: Session, keys: Vec<BlockKey>, kv: &mut [Vec<u8>])
    /// # -> Result<(), Error> {
    /// let options = RestoreOptions::default();
    /// let restore = session.restore(&keys, PayloadKind::Kv, options).await?;
    /// let copy = |block: &kvtier_client::LeasedBlock, bytes: &[u8]| {
    ///     kv[block.index()].copy_from_slice(bytes);
    /// };
    /// let summary = restore.for_each(copy).await?;
    /// println!("{} leading blocks need no prefill", summary.usable_blocks);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn for_each(
        mut self,
        mut visit: impl FnMut(&LeasedBlock, &[u8]),
    ) -> Result<RestoreSummary, Error> {
        /// Blocks read before their release is confirmed.
        const BATCH: usize = 64;
        let mut read = Vec::new();
        let link = Arc::clone(&self.link);
        loop {
            if read.len() >= BATCH || (!read.is_empty() && self.is_waiting()) {
                crate::lease::release(&link, std::mem::take(&mut read)).await?;
            }
            match self.next().await? {
                Some(RestoreEvent::Ready(block)) => {
                    visit(&block, block.payload()?);
                    read.push(block);
                }
                Some(
                    RestoreEvent::Plan(_) | RestoreEvent::Outlook(_) | RestoreEvent::Placed(_),
                ) => {}
                Some(RestoreEvent::Done(summary)) => {
                    crate::lease::release(&link, read).await?;
                    return Ok(summary);
                }
                None => return Err(RESTORE.bad_reply("the restore ended without a result")),
            }
        }
    }

    /// Tells the daemon how many leading blocks the engine has computed itself meanwhile: it
    /// need not bring those. Never waits. Numbers that do not grow are ignored.
    pub fn progress(&mut self, computed_blocks: usize) {
        let computed_blocks = computed_blocks.min(self.asked.keys.len());
        if computed_blocks > self.reported
            && let Source::Mux(running) = &self.source
        {
            self.reported = computed_blocks;
            running.progress(u32::try_from(computed_blocks).unwrap_or(u32::MAX));
        }
    }

    /// Asks the daemon to stop. Never waits; [`next`](Self::next) still brings what was on its
    /// way, and the end. Dropping the restore cancels too.
    pub fn cancel(&mut self) {
        match &mut self.source {
            Source::Mux(running) => running.cancel(),
            Source::Inline(feed, _) => {
                feed.close();
            }
        }
    }

    /// True when the next event has to be waited for.
    fn is_waiting(&self) -> bool {
        let source = match &self.source {
            Source::Mux(running) => running.events.is_empty(),
            Source::Inline(feed, _) => feed.is_empty(),
        };
        source && self.ready.is_empty() && !self.ended
    }

    fn patience(&self) -> Duration {
        let now = Instant::now();
        let left = self
            .asked
            .until
            .map(|until| until.saturating_duration_since(now));
        left.map_or(self.asked.idle, |left| left.min(self.asked.idle))
    }

    fn stop(&mut self) {
        self.cancel();
        self.ended = true;
        if self.ready.is_empty() {
            self.meeting.end();
        }
    }
}

impl Drop for Restore {
    /// Nothing more comes: an engine that still asks computes the rest.
    fn drop(&mut self) {
        self.meeting.end();
    }
}

impl std::fmt::Debug for Restore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Restore")
            .field("blocks", &self.asked.keys.len())
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}
