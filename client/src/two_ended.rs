//! The engine's end of a two-ended restore: it computes blocks from the front while others load
//! from the back, until the two meet.
//!
//! Upstairs:   engines, through [`Restore::compute_end`](crate::Restore::compute_end).
//! Downstairs: `maps`, the bytes in which both ends claim blocks.
//!
//! Invariants kept here
//!   W1  A block is given out to compute once, and only when every block before it was handed to
//!       the engine or computed by it.
//!   W2  A block is given out only if nobody else brings it: claimed in the map, where it may be
//!       taken over from a load that is too slow, or the restore has ended.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvtier_proto::claims::{Claim, Gate, HEAD};
use tokio::time::Instant;

use crate::maps::Place;
use crate::reports::Reports;
use pace::Pace;

mod modelled;
mod outlook;
mod pace;

#[doc(hidden)]
pub use modelled::ModelledPace;
pub(crate) use outlook::OfBlock;
pub use outlook::Outlook;

/// What an engine that computes while blocks load says of itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TwoEnded {
    /// Tokens of the prompt before the first key.
    pub first_token: u32,
    /// Tokens that are computed after the last block.
    pub suffix_tokens: u32,
}

impl TwoEnded {
    /// A restore of the front of a prompt, of which so many tokens come after the last block.
    pub fn new(suffix_tokens: u32) -> Self {
        Self {
            first_token: 0,
            suffix_tokens,
        }
    }

    /// The same for blocks that come after so many tokens of the prompt.
    #[must_use]
    pub fn after(mut self, first_token: u32) -> Self {
        self.first_token = first_token;
        self
    }
}

/// What the engine does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextCompute {
    /// Compute this block, then say [`ComputeEnd::computed`].
    Block(usize),
    /// The next block is being loaded, or it is better loaded: [`wait`](crate::Restore::wait).
    Wait,
    /// Every block is here.
    Finished,
}

/// One prefill step and how long it took: what restores are planned with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefillStep {
    /// Tokens of the prompt whose KV was there before.
    pub before: u32,
    /// Tokens that were computed.
    pub tokens: u32,
    /// How long the engine took.
    pub took: Duration,
}

/// How one block stands on this side.
const WAITED_FOR: u8 = 0;
const GIVEN_OUT: u8 = 1;
const HERE: u8 = 2;

/// What both halves of a restore on this side share.
pub(crate) struct Meeting {
    /// The map; none when the daemon cannot share one.
    place: Option<Arc<Place>>,
    blocks: Vec<AtomicU8>,
    /// Nothing comes from the daemon any more.
    ended: AtomicBool,
    pace: Mutex<Pace>,
}

/// The engine's end of a restore. Cheap to clone; use it from any thread.
///
/// ```no_run
/// # use kvtier_client::{BlockKey, ComputeEnd, Error, NextCompute, PayloadKind, PrefillStep};
/// # use kvtier_client::{RestoreEvent, RestoreOptions, Session, TwoEnded};
/// # async fn restore(session: Session, keys: Vec<BlockKey>, prefill: fn(usize) -> PrefillStep)
/// # -> Result<(), Error> {
/// let options = RestoreOptions::default().two_ended(TwoEnded::new(64));
/// let mut restore = session.restore(&keys, PayloadKind::Kv, options).await?;
/// let compute = restore.compute_end();
/// loop {
///     // Whatever has arrived goes to its place in the engine's cache first.
///     while let Some(event) = restore.try_next()? {
///         if let RestoreEvent::Ready(block) = event {
///             println!("block {} was loaded", block.index());
///         }
///     }
///     match compute.next() {
///         NextCompute::Block(index) => compute.computed(index, Some(prefill(index))),
///         NextCompute::Wait => restore.wait().await?,
///         NextCompute::Finished => break,
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct ComputeEnd {
    meeting: Arc<Meeting>,
    reports: Arc<Reports>,
}

impl Meeting {
    pub(crate) fn new(place: Option<Arc<Place>>, blocks: usize) -> Arc<Self> {
        Arc::new(Self {
            place,
            blocks: (0..blocks).map(|_| AtomicU8::new(WAITED_FOR)).collect(),
            ended: AtomicBool::new(false),
            pace: Mutex::new(Pace::new(Instant::now())),
        })
    }

    /// A block was handed to the engine.
    pub(crate) fn came(&self, index: usize) {
        if let Some(block) = self.blocks.get(index) {
            block.store(HERE, Ordering::Release);
        }
    }

    /// A block came from a device then.
    pub(crate) fn loaded(&self, at: Instant) {
        self.pace(|pace| pace.came(at));
    }

    /// What the daemon expects of a block.
    pub(crate) fn expect(&self, expected: OfBlock) {
        self.pace(|pace| pace.expect(expected));
    }

    fn pace<T>(&self, with: impl FnOnce(&mut Pace) -> T) -> T {
        with(&mut self.pace.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// When the block that [`next`](Self::next) waits for is to be computed after all.
    pub(crate) fn overdue_at(&self) -> Option<Instant> {
        let mut states = self
            .blocks
            .iter()
            .map(|block| block.load(Ordering::Acquire));
        let index = states.position(|state| state != HERE)?;
        // What the engine has in hand ends by itself.
        let waits = self.blocks.get(index)?.load(Ordering::Acquire) == WAITED_FOR;
        let place = self.place.as_ref().filter(|_| waits)?;
        let open = is_open(place);
        let comes = matches!(claim_of(place, index), Claim::Loading | Claim::Empty);
        comes.then(|| self.pace(|pace| pace.overdue_at(open)))?
    }

    /// The restore has ended: what is not here is for the engine to compute.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// True when the engine has computed a block or has it in hand.
    pub(crate) fn has(&self, index: usize) -> bool {
        let block = self.blocks.get(index);
        block.is_some_and(|block| block.load(Ordering::Acquire) != WAITED_FOR)
    }

    fn next(&self) -> NextCompute {
        for (index, block) in self.blocks.iter().enumerate() {
            match block.load(Ordering::Acquire) {
                HERE => {}
                GIVEN_OUT => return NextCompute::Wait,
                _ if self.claim(index) => {
                    // Of two threads that ask one gets it (W1).
                    let given = block.compare_exchange(
                        WAITED_FOR,
                        GIVEN_OUT,
                        Ordering::AcqRel,
                        Ordering::Acquire,
                    );
                    return match given {
                        Ok(_) => {
                            self.pace(|pace| pace.given(Instant::now()));
                            NextCompute::Block(index)
                        }
                        Err(_) => NextCompute::Wait,
                    };
                }
                _ => return NextCompute::Wait,
            }
        }
        NextCompute::Finished
    }

    /// Takes a block that nobody else brings (W2).
    fn claim(&self, index: usize) -> bool {
        if self.ended.load(Ordering::Acquire) {
            return true;
        }
        let Some(place) = &self.place else {
            return false;
        };
        let swap = |from: Claim| place.swap(HEAD + index, from as u8, Claim::Computing as u8);
        let (open, now) = (is_open(place), Instant::now());
        let comes =
            |index: &usize| matches!(claim_of(place, *index), Claim::Empty | Claim::Loading);
        let left = || (index..self.blocks.len()).filter(comes).count();
        match claim_of(place, index) {
            Claim::Missed => swap(Claim::Missed),
            Claim::Empty => {
                self.pace(|pace| pace.is_worth(left(), open, now)) && swap(Claim::Empty)
            }
            Claim::Loading => {
                self.pace(|pace| pace.is_slow(left(), open, now)) && swap(Claim::Loading)
            }
            Claim::Ready | Claim::Computing | Claim::Computed => false,
        }
    }

    fn computed(&self, index: usize) {
        if let Some(place) = &self.place {
            let (from, to) = (Claim::Computing as u8, Claim::Computed as u8);
            place.swap(HEAD + index, from, to);
        }
        self.pace(|pace| pace.computed(Instant::now()));
        self.came(index);
    }
}

fn is_open(place: &Place) -> bool {
    Gate::from_byte(place.get(0)) == Gate::Open
}

fn claim_of(place: &Place, index: usize) -> Claim {
    Claim::from_byte(place.get(HEAD + index))
}

impl ComputeEnd {
    pub(crate) fn new(meeting: Arc<Meeting>, reports: Arc<Reports>) -> Self {
        Self { meeting, reports }
    }

    /// What the engine does next. Never waits. A block that is given out belongs to the caller,
    /// who computes it and says so.
    pub fn next(&self) -> NextCompute {
        self.meeting.next()
    }

    /// True when the engine may compute blocks that can be loaded. The daemon lets it in where both
    /// ends together are faster, and when a device is late.
    pub fn is_let_in(&self) -> bool {
        self.meeting.place.as_deref().is_some_and(is_open)
    }

    /// A block that was given out is in the engine's cache. With how long it took, later restores
    /// are planned better. Never waits.
    pub fn computed(&self, index: usize, step: Option<PrefillStep>) {
        self.meeting.computed(index);
        if let Some(step) = step {
            self.reports.put(step);
        }
    }
}

impl std::fmt::Debug for ComputeEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let here = |block: &&AtomicU8| block.load(Ordering::Acquire) == HERE;
        f.debug_struct("ComputeEnd")
            .field("blocks", &self.meeting.blocks.len())
            .field("here", &self.meeting.blocks.iter().filter(here).count())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
