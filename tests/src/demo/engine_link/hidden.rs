//! Hidden states through kvtier: taken while the engine computes, restored instead of its KV.
//!
//! Upstairs:   tests; whoever drives a restore that mixes kinds ([`place`]).
//! Downstairs: the SDK's capture and restores on one side, the engine's intake on the other.
//!
//! Invariants kept here
//!   N1  The position moves over restored tokens only after the daemon has confirmed that every
//!       lease was alive while it was read; on any error what was put in is forgotten.
//!
//! Not here on purpose: the choice between kinds, which is a planner's. Hidden states of most
//! models are larger than their KV, and rebuilding costs what loading does not.

use std::ops::Range;

use kvtier_client::{
    Acknowledge, FillError, HiddenCapture, LayerCost, LeasedBlock, PayloadKind, ReaderSpec,
    RestoreOptions,
};

use super::{EngineLink, Problem, engine_part, index};
use crate::engine::{
    Attention, EngineError, Intake, KvCache, Model, ModelConfig, Observer, Part, Sequence,
    SequenceOptions,
};

/// Takes the input of every layer out of the cache as it is computed.
struct Inputs<'a> {
    capture: &'a mut HiddenCapture,
    failed: Option<Problem>,
}

impl Observer for Inputs<'_> {
    fn layer_done(&mut self, cache: &KvCache, layer: usize, tokens: Range<usize>) {
        let take = |capture: &mut HiddenCapture| -> Result<(), Problem> {
            let bytes = cache.bytes(layer, Part::Hidden, tokens.clone())?;
            let number = |value| u32::try_from(value).unwrap_or(u32::MAX);
            let taken = capture.layer_input(number(layer), number(tokens.start), bytes);
            taken.map_err(|problem: FillError| Problem::Client(problem.into()))
        };
        if let Err(problem) = take(self.capture) {
            self.failed.get_or_insert(problem);
        }
    }
}

impl EngineLink {
    /// Prefills all of `prompt` in an empty `sequence` and saves the hidden states of each block
    /// as it is computed. Returns how many blocks are durable.
    pub async fn prefill_saving_hidden(
        &self,
        sequence: &mut Sequence,
        prompt: &[u32],
    ) -> Result<usize, Problem> {
        let block_tokens = index(self.session.model().block_tokens);
        let mut capture = self.session.capture_hidden(prompt, b"");
        while let Some(rest) = prompt
            .get(sequence.position()..)
            .filter(|rest| !rest.is_empty())
        {
            let block = sequence.position() / block_tokens;
            capture.reserve(block..block + 1).await?;
            let mut inputs = Inputs {
                capture: &mut capture,
                failed: None,
            };
            sequence.step(rest, &mut inputs)?;
            if let Some(problem) = inputs.failed {
                return Err(problem);
            }
            capture.commit(Acknowledge::Durable).await?;
        }
        let outcomes = capture.finish(Acknowledge::Durable).await?;
        let mut outcomes = outcomes.into_iter().flatten();
        Ok(outcomes
            .by_ref()
            .filter(|one| one.is_stored(Acknowledge::Durable))
            .count())
    }

    /// Fills the cache of an empty `sequence` with the leading blocks whose hidden states are
    /// stored, rebuilt, and moves its position there. Returns the tokens that need no prefill.
    pub async fn restore_hidden(
        &self,
        sequence: &mut Sequence,
        prompt: &[u32],
    ) -> Result<usize, Problem> {
        let outcome = self.rebuild(sequence, prompt).await;
        // Whatever came before an error proves nothing (N1).
        let tokens = outcome.as_ref().copied().unwrap_or_default();
        if outcome.is_ok() {
            sequence.resume_at(tokens)?;
        }
        sequence.rewind(sequence.position())?;
        outcome
    }

    async fn rebuild(&self, sequence: &mut Sequence, prompt: &[u32]) -> Result<usize, Problem> {
        let keys = self.session.prefix_keys(prompt, b"");
        let found = self.session.lookup(&keys, PayloadKind::Hidden).await?;
        let present = keys.get(..found.prefix_blocks).unwrap_or(&keys);
        if present.is_empty() {
            return Ok(0);
        }
        let restorable = prompt.len().saturating_sub(1);
        let options = RestoreOptions::default();
        let restore = self
            .session
            .restore(present, PayloadKind::Hidden, options)
            .await?;
        let mut failed = None;
        let block_tokens = index(self.session.model().block_tokens);
        let read = |block: &LeasedBlock, payload: &[u8]| {
            let start = block.index() * block_tokens;
            let placed = place(&mut sequence.intake(), block, payload, start, restorable);
            if let Err(problem) = placed {
                failed.get_or_insert(problem);
            }
        };
        let summary = restore.for_each(read).await?;
        match failed {
            Some(problem) => Err(problem.into()),
            None => Ok((summary.usable_blocks * block_tokens).min(restorable)),
        }
    }
}

/// Puts a block of KV or of hidden states in, as far as it lies below `restorable`; hidden states
/// are rebuilt at once. `start` is the position of its first token. Parts are token-major, so the
/// first tokens of a part are its first bytes.
pub fn place(
    intake: &mut Intake<'_>,
    block: &LeasedBlock,
    payload: &[u8],
    start: usize,
    restorable: usize,
) -> Result<(), EngineError> {
    let end = (start + index(block.tokens())).min(restorable);
    if end <= start {
        return Ok(());
    }
    for part in block.layout().parts() {
        let (layer, code) = (index(part.layer), engine_part(part.code));
        let len = intake.part_bytes(layer, code, end - start)?;
        let bytes = payload.get(part.offset..part.offset + len.min(part.len));
        intake.import(layer, code, start..end, bytes.unwrap_or_default())?;
        if code == Part::Hidden {
            intake.rebuild(layer, start..end)?;
        }
    }
    Ok(())
}

/// What this engine does with restores, and what its layers cost.
pub fn reader(model: &Model, options: &SequenceOptions) -> ReaderSpec {
    let config = model.config();
    let costs = config.layers.iter().map(|layer| cost(config, layer));
    let reader = ReaderSpec::default()
        .two_ended()
        .layer_events()
        .layers(costs.collect());
    if options.keep_hidden {
        return reader.hidden_projection();
    }
    reader
}

/// A multiplication and an addition are two operations; norms, RoPE and the like are left out.
fn cost(config: &ModelConfig, layer: &Attention) -> LayerCost {
    let hidden = config.hidden;
    let feed_forward = 3 * hidden * config.intermediate;
    let (attention, pair, projection) = match *layer {
        Attention::Heads {
            query_heads,
            kv_heads,
            key_dim,
            value_dim,
            ..
        } => {
            let projection = hidden * kv_heads * (key_dim + value_dim);
            let queries = hidden * query_heads * key_dim;
            let out = query_heads * value_dim * hidden;
            let pair = query_heads * (key_dim + value_dim);
            (projection + queries + out, pair, projection)
        }
        Attention::Latent {
            query_heads,
            latent_dim,
            rope_dim,
            nope_dim,
            value_dim,
        } => {
            let projection = hidden * (latent_dim + rope_dim);
            let queries = query_heads * (hidden * (nope_dim + rope_dim) + nope_dim * latent_dim);
            let out = query_heads * value_dim * (latent_dim + hidden);
            let pair = query_heads * (2 * latent_dim + rope_dim);
            (projection + queries + out, pair, projection)
        }
    };
    let flop = |products: usize| 2 * products as u64;
    LayerCost {
        token_flop: flop(attention + feed_forward),
        pair_flop: flop(pair),
        projection_flop: flop(projection),
    }
}
