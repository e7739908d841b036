//! Hidden states on their way out of a prefill: what an engine calls before each layer.
//!
//! Upstairs:   engines, while they compute a prompt.
//! Downstairs: `save` reserves and commits; `slot` takes rows.
//!
//! Hidden states exist only while a layer runs: no cache keeps them, so that they have to be taken
//! then, for a step that may begin and end in the middle of blocks. Taking them is a copy and
//! never waits; waiting for places and for the daemon is done between steps.
//!
//! Invariants kept here
//!   T1  A block is committed only when every row of every layer of it was written.
//!   U1  Whatever goes wrong, the prefill goes on: a block that finds no place, or of which rows
//!       are missing, is not saved and its place is given back.
//!
//! Not here on purpose: KV. It stays in the engine's cache, so that `save_prefix` can take it
//! afterwards.

use std::collections::BTreeMap;
use std::ops::Range;

use kvtier_proto::limits::KEYS_PER_CALL_MAX;
use kvtier_proto::{PartCode, PayloadKind};

use crate::error::Error;
use crate::save::{CommitOutcome, Reservation, SaveBlock, SaveOutcome};
use crate::session::Session;
use crate::slot::{FillError, ReservedSlot};
use crate::values::{Acknowledge, SaveRefusal};

/// Takes the hidden states of one prompt. Dropping it gives back what is not committed.
#[derive(Debug)]
pub struct HiddenCapture {
    session: Session,
    blocks: Vec<SaveBlock>,
    outcomes: Vec<Option<SaveOutcome>>,
    slots: BTreeMap<usize, ReservedSlot>,
    /// Bytes of one token's input of one layer.
    row: usize,
}

impl Session {
    /// Begins to take the hidden states of a prompt: the input of each decoder layer, before its
    /// norm, in the descriptor's element type.
    ///
    /// Units: `tokens` are token ids from the start of the prompt; `extra` goes into every key, as
    /// in [`prefix_keys`](Self::prefix_keys): hidden states have the keys of their block's KV.
    /// Blocks: no; asks nothing.
    ///
    /// ```no_run
    /// # use kvtier_client::{Acknowledge, Error, Session};
    /// # type Layer = fn(u32, &mut Vec<u8>);
    /// # async fn prefill(session: Session, tokens: Vec<u32>, layers: [Layer; 2])
    /// # -> Result<(), Error> {
    /// let mut capture = session.capture_hidden(&tokens, b"");
    /// for (block, position) in (0..tokens.len() / 16).zip((0..).step_by(16)) {
    ///     // Between steps: places for what comes next.
    ///     capture.reserve(block..block + 1).await?;
    ///     let mut input = Vec::new();
    ///     for (layer, run) in (0..).zip(layers) {
    ///         // In the step: one copy.
    ///         capture.layer_input(layer, position, &input)?;
    ///         run(layer, &mut input);
    ///     }
    ///     // Between steps again: what is whole goes.
    ///     capture.commit(Acknowledge::Accepted).await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn capture_hidden(&self, tokens: &[u32], extra: &[u8]) -> HiddenCapture {
        let keys = self.prefix_keys(tokens, extra);
        let model = self.model();
        let kind = PayloadKind::Hidden;
        let blocks = SaveBlock::chain(&keys, tokens.len(), model.block_tokens, kind);
        let width = usize::try_from(model.d_model).unwrap_or(usize::MAX);
        HiddenCapture {
            session: self.clone(),
            outcomes: vec![None; blocks.len()],
            blocks,
            slots: BTreeMap::new(),
            row: width.saturating_mul(model.element.bytes()),
        }
    }
}

impl HiddenCapture {
    /// Asks for places for those of `blocks` that are not stored yet and have none.
    ///
    /// Returns how many of `blocks` have a place now and want their bytes. Where staging memory is
    /// full they have none: commit what is whole and ask again, or go on without.
    /// Errors: as [`Session::reserve`]; places that were there stay. Cancel safety: yes.
    /// Blocks: no.
    pub async fn reserve(&mut self, blocks: Range<usize>) -> Result<usize, Error> {
        let end = blocks.end.min(self.blocks.len());
        let all = blocks.start.min(end)..end;
        let open = |at: &usize| {
            let known = self.outcomes.get(*at).copied().flatten();
            known.is_none() && !self.slots.contains_key(at)
        };
        let wanted: Vec<usize> = all.clone().filter(open).collect();
        for wanted in wanted.chunks(KEYS_PER_CALL_MAX) {
            let asked = wanted.iter().filter_map(|at| self.blocks.get(*at).copied());
            let asked: Vec<SaveBlock> = asked.collect();
            let reserved = self.session.reserve(&asked).await?;
            for (at, reservation) in wanted.iter().zip(reserved) {
                match reservation {
                    Reservation::Slot(slot) => _ = self.slots.insert(*at, slot),
                    Reservation::Already(level) => self.set(*at, SaveOutcome::Already(level)),
                    // Room comes back with the next commit.
                    Reservation::Refused(SaveRefusal::RegionFull) => {}
                    Reservation::Refused(why) => self.set(*at, SaveOutcome::Refused(why)),
                }
            }
        }
        Ok(self.slots.range(all).count())
    }

    /// True when bytes of this block are wanted: it has a place and is not whole.
    pub fn wants(&self, block: usize) -> bool {
        let slot = self.slots.get(&block);
        slot.is_some_and(|slot| !slot.missing().is_empty())
    }

    /// Takes the input of `layer` for a run of tokens, the first of which stands at `position`.
    /// Tokens of blocks without a place are passed over.
    ///
    /// Units: `bytes` are whole tokens of `d_model` elements. Tokens of one layer come in the
    /// order of their positions, as prefill computes them; a block of which tokens were left out,
    /// computed before it had a place or restored, is given up.
    /// Errors: [`FillError`], and what the step brings is not taken; the prefill can go on.
    /// Blocks: for one copy.
    pub fn layer_input(
        &mut self,
        layer: u32,
        position: u32,
        bytes: &[u8],
    ) -> Result<(), FillError> {
        if !bytes.len().is_multiple_of(self.row) {
            let (wanted, given) = (bytes.len().next_multiple_of(self.row), bytes.len());
            return Err(FillError::WrongLength {
                layer,
                wanted,
                given,
            });
        }
        let block_tokens = self.session.model().block_tokens.max(1);
        let (mut at, mut bytes) = (position, bytes);
        while !bytes.is_empty() {
            let first = at % block_tokens;
            let rows = usize::try_from(block_tokens - first).unwrap_or(usize::MAX);
            let len = rows.saturating_mul(self.row).min(bytes.len());
            let (piece, rest) = bytes.split_at(len);
            let block = usize::try_from(at / block_tokens).unwrap_or(usize::MAX);
            if let Some(slot) = self.slots.get_mut(&block) {
                match slot.write_rows(layer, PartCode::Hidden, first, piece) {
                    // Rows before these were computed and not taken: it is never whole (U1).
                    Err(FillError::Rows { first, next, .. }) if first > next => {
                        self.slots.remove(&block);
                    }
                    outcome => outcome?,
                }
            }
            bytes = rest;
            at = at.saturating_add(block_tokens - first);
        }
        Ok(())
    }

    /// Hands over every block that is whole and waits until it is stored as `wait` asks.
    ///
    /// Returns how many blocks it handed over. Errors and cancel safety: as [`Session::commit`].
    /// Blocks: for a pass over each payload, where the session sends checksums.
    pub async fn commit(&mut self, wait: Acknowledge) -> Result<usize, Error> {
        let whole = |(at, slot): (&usize, &ReservedSlot)| slot.missing().is_empty().then_some(*at);
        let whole: Vec<usize> = self.slots.iter().filter_map(whole).collect();
        for blocks in whole.chunks(KEYS_PER_CALL_MAX) {
            let slots = blocks.iter().filter_map(|at| self.slots.remove(at));
            let filled = slots.map(ReservedSlot::finish);
            let filled = filled.collect::<Result<Vec<_>, _>>()?;
            let outcomes = self.session.commit(filled, wait).await?;
            for (at, outcome) in blocks.iter().zip(outcomes) {
                self.set(
                    *at,
                    match outcome {
                        CommitOutcome::Stored(level) => SaveOutcome::Stored(level),
                        CommitOutcome::Failed(why) => SaveOutcome::Failed(why),
                    },
                );
            }
        }
        Ok(whole.len())
    }

    /// Ends it: commits what is whole, gives the other places back.
    ///
    /// Returns one outcome a block, in order; `None` for a block that had no place or was not
    /// computed whole. Errors: as [`commit`](Self::commit).
    pub async fn finish(mut self, wait: Acknowledge) -> Result<Vec<Option<SaveOutcome>>, Error> {
        self.commit(wait).await?;
        Ok(std::mem::take(&mut self.outcomes))
    }

    fn set(&mut self, block: usize, outcome: SaveOutcome) {
        if let Some(place) = self.outcomes.get_mut(block) {
            *place = Some(outcome);
        }
    }
}
