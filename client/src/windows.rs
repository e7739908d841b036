//! Saving more blocks than the staging memory holds: windows of reserve, fill, commit.
//!
//! Upstairs:   engines that save a whole prefix with one call.
//! Downstairs: `Session::reserve` and `Session::commit`.
//!
//! A window is half the staging memory: while one is committed the next one fills. When the
//! daemon says that the region is full, what is filled is committed first, and then the rest is
//! asked for again.
//!
//! Invariants kept here
//!   Y1  At most two windows are reserved at a time, however many blocks there are.
//!   Y2  Every round stores a block, waits for a commit or release to end, or gives up: no loop
//!       without progress.

use std::collections::VecDeque;

use kvtier_proto::limits::KEYS_PER_CALL_MAX;
use kvtier_proto::{BlockKey, Part, PayloadKind};
use tokio::task::JoinHandle;

use crate::error::{Call, Error};
use crate::save::{CommitOutcome, Reservation, SaveBlock, SaveOutcome};
use crate::session::Session;
use crate::slot::FilledSlot;
use crate::values::{Acknowledge, SaveRefusal};

/// Most blocks of one window, so that small blocks too are committed in batches.
const WINDOW_BLOCKS: usize = 64;

/// A block on its way and its place in the answer.
type Numbered = (usize, SaveBlock);

/// A commit that runs while the next window fills.
struct Committing {
    indices: Vec<usize>,
    task: JoinHandle<Result<Vec<CommitOutcome>, Error>>,
}

struct Windows<'a> {
    session: &'a Session,
    wait: Acknowledge,
    /// Blocks that someone else saved and that are not durable yet, when that is asked for.
    on_their_way: Vec<(usize, BlockKey)>,
    outcomes: Vec<Option<SaveOutcome>>,
    committing: Option<Committing>,
    /// The region was full with nothing of ours to commit, and releases were waited for.
    flushed: bool,
}

impl Session {
    /// Saves the KV of a prefix: derives keys, skips what is stored, fills and commits the rest.
    ///
    /// Units: `tokens` are token ids from the start of the prompt; `extra` goes into every key.
    /// `fill` writes one part (K or V of one layer) of one block at a time, all of it.
    /// Returns one [`SaveOutcome`] a block; the last block may be short.
    /// Errors and cancel safety: as [`save_blocks`](Self::save_blocks). Blocks: while `fill` runs.
    ///
    /// ```no_run
    /// # use kvtier_client::{Acknowledge, Error, PartCode, Session};
    /// # type Cache = fn(u32, u32, bool) -> Vec<u8>;
    /// # async fn save(session: Session, tokens: Vec<u32>, cache: Cache) -> Result<(), Error> {
    /// let wait = Acknowledge::Durable;
    /// let outcomes = session.save_prefix(&tokens, b"", wait, |block, part, bytes| {
    ///     let is_k = part.code == PartCode::K;
    ///     bytes.copy_from_slice(&cache(block.position, part.layer, is_k));
    /// });
    /// let stored = outcomes.await?.iter().filter(|outcome| outcome.is_stored(wait)).count();
    /// # Ok(())
    /// # }
    /// ```
    pub async fn save_prefix(
        &self,
        tokens: &[u32],
        extra: &[u8],
        wait: Acknowledge,
        fill: impl FnMut(&SaveBlock, &Part, &mut [u8]),
    ) -> Result<Vec<SaveOutcome>, Error> {
        let keys = self.prefix_keys(tokens, extra);
        self.save_keys(&keys, tokens.len(), wait, fill).await
    }

    /// As [`save_prefix`](Self::save_prefix), for keys that were derived before.
    pub async fn save_keys(
        &self,
        keys: &[BlockKey],
        tokens: usize,
        wait: Acknowledge,
        fill: impl FnMut(&SaveBlock, &Part, &mut [u8]),
    ) -> Result<Vec<SaveOutcome>, Error> {
        let block_tokens = self.model().block_tokens;
        let blocks = SaveBlock::chain(keys, tokens, block_tokens, PayloadKind::Kv);
        self.save_blocks(blocks, wait, fill).await
    }

    /// Saves any number of blocks in windows that fit the staging memory.
    ///
    /// `fill` writes one part of one block at a time, all of it, and is called only for blocks
    /// that are not stored yet.
    /// Returns one [`SaveOutcome`] a block, in order. A block larger than the staging memory is
    /// [`SaveRefusal::RegionFull`].
    /// Errors: as [`reserve`](Self::reserve) and [`commit`](Self::commit); blocks of windows
    /// before are stored, of the current one perhaps, of later ones not. Saving all again is
    /// harmless: what is stored is skipped.
    /// Cancel safety: dropping the future gives back what is filled and not committed; commits
    /// under way go on. Blocks: while `fill` runs.
    pub async fn save_blocks(
        &self,
        blocks: impl IntoIterator<Item = SaveBlock>,
        wait: Acknowledge,
        mut fill: impl FnMut(&SaveBlock, &Part, &mut [u8]),
    ) -> Result<Vec<SaveOutcome>, Error> {
        let mut windows = Windows {
            session: self,
            wait,
            on_their_way: Vec::new(),
            outcomes: Vec::new(),
            committing: None,
            flushed: false,
        };
        let mut blocks = blocks.into_iter();
        let mut next = VecDeque::new();
        loop {
            windows.top_up(&mut next, &mut blocks)?;
            if next.is_empty() {
                break;
            }
            let asked: Vec<_> = next.iter().map(|(_, block)| *block).collect();
            let reservations = self.reserve(&asked).await?;
            let numbered = next.drain(..).zip(reservations);
            let (filled, refused) = windows.fill(numbered, &mut fill)?;
            windows.round(filled, refused, &mut next).await?;
        }
        windows.settle().await?;
        windows.make_durable().await?;
        Ok(windows.outcomes.into_iter().flatten().collect())
    }
}

impl Windows<'_> {
    /// Takes blocks until half the staging memory would be used, at least one.
    fn top_up(
        &mut self,
        next: &mut VecDeque<Numbered>,
        blocks: &mut impl Iterator<Item = SaveBlock>,
    ) -> Result<(), Error> {
        let half = self.session.staging_len() / 2;
        let mut used = 0;
        for (_, block) in next.iter() {
            used += self.size(block)?;
        }
        while next.len() < WINDOW_BLOCKS && (next.is_empty() || used < half) {
            let Some(block) = blocks.next() else { break };
            used += self.size(&block)?;
            next.push_back((self.outcomes.len(), block));
            self.outcomes.push(None);
        }
        Ok(())
    }

    fn size(&self, block: &SaveBlock) -> Result<usize, Error> {
        let layouts = &self.session.inner.layouts;
        let layout = layouts.sized(block.kind, block.tokens, block.opaque_bytes)?;
        Ok(layout.payload_len())
    }

    /// Fills what was granted. Returns it with what the region had no room for.
    #[expect(clippy::type_complexity, reason = "two lists, used once")]
    fn fill(
        &mut self,
        reservations: impl Iterator<Item = (Numbered, Reservation)>,
        fill: &mut impl FnMut(&SaveBlock, &Part, &mut [u8]),
    ) -> Result<(Vec<(usize, FilledSlot)>, Vec<Numbered>), Error> {
        let mut filled = Vec::new();
        let mut refused = Vec::new();
        for ((index, block), reservation) in reservations {
            match reservation {
                Reservation::Already(level) => {
                    self.set(index, SaveOutcome::Already(level));
                    if level < self.wait {
                        self.on_their_way.push((index, block.key));
                    }
                }
                Reservation::Refused(SaveRefusal::RegionFull) => refused.push((index, block)),
                Reservation::Refused(why) => self.set(index, SaveOutcome::Refused(why)),
                Reservation::Slot(mut slot) => {
                    slot.fill_all(&mut *fill);
                    filled.push((index, slot.finish()?));
                }
            }
        }
        Ok((filled, refused))
    }

    /// Commits what was filled, and decides about what was refused for want of room (Y2).
    async fn round(
        &mut self,
        filled: Vec<(usize, FilledSlot)>,
        refused: Vec<Numbered>,
        next: &mut VecDeque<Numbered>,
    ) -> Result<(), Error> {
        if !filled.is_empty() {
            self.settle().await?;
            self.commit(filled);
            self.flushed = false;
            if !refused.is_empty() {
                self.settle().await?;
            }
        } else if !refused.is_empty() {
            if self.committing.is_some() {
                self.settle().await?;
            } else if !self.flushed {
                self.session.flush().await?;
                self.flushed = true;
            } else {
                for (index, _) in refused {
                    self.set(index, SaveOutcome::Refused(SaveRefusal::RegionFull));
                }
                return Ok(());
            }
        }
        next.extend(refused);
        Ok(())
    }

    fn commit(&mut self, filled: Vec<(usize, FilledSlot)>) {
        let (indices, slots) = filled.into_iter().unzip();
        let (session, wait) = (self.session.clone(), self.wait);
        let task = tokio::spawn(async move { session.commit(slots, wait).await });
        self.committing = Some(Committing { indices, task });
    }

    /// Waits for the commit under way.
    async fn settle(&mut self) -> Result<(), Error> {
        let Some(Committing { indices, task }) = self.committing.take() else {
            return Ok(());
        };
        let outcomes = match task.await {
            Ok(outcomes) => outcomes?,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => return Err(Call::changes("Commit").lost("the runtime is shutting down")),
        };
        for (index, outcome) in indices.into_iter().zip(outcomes) {
            let outcome = match outcome {
                CommitOutcome::Stored(level) => SaveOutcome::Stored(level),
                CommitOutcome::Failed(why) => SaveOutcome::Failed(why),
            };
            self.set(index, outcome);
        }
        Ok(())
    }

    /// Waits for blocks that were accepted from someone else. Those that will not become durable
    /// stay what they are: accepted.
    async fn make_durable(&mut self) -> Result<(), Error> {
        let waiting = std::mem::take(&mut self.on_their_way);
        for batch in waiting.chunks(KEYS_PER_CALL_MAX) {
            let keys: Vec<_> = batch.iter().map(|(_, key)| *key).collect();
            let outcomes = self.session.wait_durable(&keys).await?;
            for ((index, _), outcome) in batch.iter().zip(outcomes) {
                if let CommitOutcome::Stored(level) = outcome {
                    self.set(*index, SaveOutcome::Already(level));
                }
            }
        }
        Ok(())
    }

    fn set(&mut self, index: usize, outcome: SaveOutcome) {
        if let Some(place) = self.outcomes.get_mut(index) {
            *place = Some(outcome);
        }
    }
}
