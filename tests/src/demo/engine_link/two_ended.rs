//! A restore that drives a prefill: what comes is put in, what does not come is computed.
//!
//! Upstairs:   tests; whoever integrates an engine that can compute while blocks load.
//! Downstairs: the SDK's restore and compute end on one side, the engine's intake on the other.
//!
//! One driver serves both ways to read. Two-ended, the SDK gives out blocks while others load.
//! Prefix only, it gives out what did not come when the restore has ended.
//!
//! Invariants kept here
//!   N3  Nothing is computed on bytes whose leases the daemon has not confirmed: a block whose
//!       lease was not is computed instead.
//!
//! Not here on purpose: layer events. The daemon loads whole blocks, so that all layers of a block
//! come at once, and waiting by layer would wait for the same bytes.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use kvtier_client::{
    ComputeEnd, Error, LeasedBlock, NextCompute, Outlook, PayloadKind, PrefillStep, Restore,
    RestoreEvent, RestoreOptions, Session, TwoEnded,
};
use tokio::runtime::Handle;

use super::{EngineLink, Problem, index, narrow, place};
use crate::engine::{Cells, Driver, EngineError, Intake, PrefillCost, Sequence};

/// How a restore is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The engine computes from the front while blocks load from the back.
    TwoEnded,
    /// The engine waits for everything, then computes what did not come.
    PrefixOnly,
}

/// Who brought the blocks of a prompt.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Met {
    /// Blocks that were loaded and confirmed.
    pub loaded: BTreeSet<usize>,
    /// Blocks that the engine computed.
    pub computed: BTreeSet<usize>,
    /// What the daemon expected of a two-ended restore.
    pub outlook: Option<Outlook>,
    /// True when the engine could compute what can be loaded, at any time.
    pub let_in: bool,
    /// Time in which the engine had nothing to do but to wait for loads.
    pub waited: Duration,
    /// Time from the request of the restore until the scores after the prompt were there.
    pub took: Duration,
}

/// See the module.
struct Driven<'a> {
    session: &'a Session,
    runtime: Handle,
    restore: Restore,
    compute: ComputeEnd,
    block_tokens: usize,
    /// Tokens that may be restored: all but the last.
    restorable: usize,
    layers: usize,
    /// Put in, but the daemon did not confirm their leases (N3).
    doubtful: BTreeSet<usize>,
    /// Given out by the SDK, while a doubtful block before it is computed.
    given: Option<usize>,
    met: Met,
}

impl EngineLink {
    /// Prefills all of `prompt` in an empty `sequence`, of which as much is loaded as is worth it.
    /// Waits: call it where that is allowed, with the runtime that the session lives in.
    pub fn prefill(
        &self,
        runtime: &Handle,
        sequence: &mut Sequence,
        prompt: &[u32],
        way: Way,
    ) -> Result<Met, Problem> {
        let begin = Instant::now();
        let keys = self.session.prefix_keys(prompt, b"");
        let options = match way {
            Way::TwoEnded => RestoreOptions::default().two_ended(TwoEnded::new(1)),
            Way::PrefixOnly => RestoreOptions::default(),
        };
        let start = self.session.restore(&keys, PayloadKind::Kv, options);
        let restore = runtime.block_on(start)?;
        let restorable = prompt.len().saturating_sub(1);
        let mut driver = Driven {
            session: &self.session,
            runtime: runtime.clone(),
            compute: restore.compute_end(),
            restore,
            block_tokens: index(self.session.model().block_tokens),
            restorable,
            layers: sequence.model().config().layers.len(),
            doubtful: BTreeSet::new(),
            given: None,
            met: Met::default(),
        };
        sequence.prefill_driven(prompt, restorable, &mut driver)?;
        driver.met.took = begin.elapsed();
        Ok(driver.met)
    }
}

impl Driven<'_> {
    /// Puts in whatever has come, and has the leases confirmed before anything is computed on it.
    fn take(&mut self, intake: &mut Intake<'_>) -> Result<(), EngineError> {
        let mut read = Vec::new();
        // An error is an end: the compute end gives out the rest.
        while let Ok(Some(event)) = self.restore.try_next() {
            match event {
                RestoreEvent::Ready(block) => {
                    let start = block.index() * self.block_tokens;
                    match block.payload() {
                        Ok(bytes) => place(intake, &block, bytes, start, self.restorable)?,
                        Err(_) => _ = self.doubtful.insert(block.index()),
                    }
                    read.push(block);
                }
                RestoreEvent::Outlook(outlook) => self.met.outlook = Some(outlook),
                _ => {}
            }
        }
        self.confirm(read);
        Ok(())
    }

    fn confirm(&mut self, read: Vec<LeasedBlock>) {
        if read.is_empty() {
            return;
        }
        let blocks: Vec<usize> = read.iter().map(LeasedBlock::index).collect();
        let confirmed: Result<(), Error> = self.runtime.block_on(self.session.release(read));
        for block in blocks {
            if confirmed.is_err() || self.doubtful.contains(&block) {
                self.doubtful.insert(block);
            } else {
                self.met.loaded.insert(block);
            }
        }
    }

    /// The next block to compute: what the SDK gives out, after any doubtful one before it.
    fn next(&mut self) -> NextCompute {
        let next = match self.given.take() {
            Some(block) => NextCompute::Block(block),
            None => self.compute.next(),
        };
        let doubtful = self.doubtful.first().copied();
        match (next, doubtful) {
            (NextCompute::Block(block), Some(first)) if first < block => {
                self.given = Some(block);
                NextCompute::Block(first)
            }
            (NextCompute::Finished, Some(first)) => NextCompute::Block(first),
            (next, _) => next,
        }
    }
}

impl Driver for Driven<'_> {
    fn next_compute(&mut self, intake: &mut Intake<'_>) -> Result<Option<Cells>, EngineError> {
        loop {
            self.take(intake)?;
            self.met.let_in |= self.compute.is_let_in();
            match self.next() {
                // The last token of the prompt may be a block of its own: the engine computes it.
                NextCompute::Block(block) if block * self.block_tokens >= self.restorable => {
                    self.doubtful.remove(&block);
                    self.compute.computed(block, None);
                }
                NextCompute::Block(block) => {
                    let layers = 0..self.layers;
                    return Ok(Some(Cells { block, layers }));
                }
                NextCompute::Wait => {
                    let begin = Instant::now();
                    // An error is an end here too.
                    let _ = self.runtime.block_on(self.restore.wait());
                    self.met.waited += begin.elapsed();
                }
                NextCompute::Finished => return Ok(None),
            }
        }
    }

    fn computed(&mut self, cells: &Cells, cost: PrefillCost) {
        let step = || -> Result<PrefillStep, Problem> {
            Ok(PrefillStep {
                before: narrow("tokens before", cost.before)?,
                tokens: narrow("tokens", cost.tokens)?,
                took: cost.took,
            })
        };
        self.doubtful.remove(&cells.block);
        self.met.computed.insert(cells.block);
        self.compute.computed(cells.block, step().ok());
    }
}
