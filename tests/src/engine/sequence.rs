//! One sequence: a cache, a position, and the steps that move it.
//!
//! Upstairs:   the demo and the end-to-end tests.
//! Downstairs: `model` (weights, shared), `cache` (owned).
//!
//! Invariants kept here
//!   E2  Steps end on block boundaries where they can, so that whoever resumes at one repeats the
//!       same steps; nothing depends on it, because a step's size changes no bit.
//!   S1  The position moves only over tokens whose keys and values are all present.
//!   S2  Restored bytes are refused for tokens at which the sequence has already arrived:
//!       history is never rewritten under an attention that has read it.
//!
//! Not here on purpose: sampling other than greedy; a continuation has to be comparable.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::cache::KvCache;
use super::config::{CacheDtype, DEFAULT_BLOCK_TOKENS, Part, refusal};
use super::cost::{PrefillCost, SlowEngine, Stopwatch};
use super::driven::Intake;
use super::error::EngineError;
use super::model::Model;

/// Steps whose cost is kept for whoever asks; of more, the last ones.
const COSTS_KEPT: usize = 1024;

/// How a sequence is set up.
#[derive(Debug, Clone, Copy)]
pub struct SequenceOptions {
    /// Room in the cache. Unit: tokens. Range: 1 ..= the model's positions.
    pub max_tokens: usize,
    /// Largest step, and the grid that steps keep to. Unit: tokens. Range: 1 ..= 2048.
    pub block_tokens: usize,
    /// How the cache stores numbers.
    pub dtype: CacheDtype,
    /// Also keep the input of every layer, in the same dtype. Layers then read the rounded input
    /// (E4), so that keys and values differ from those of a sequence that does not keep it.
    pub keep_hidden: bool,
    /// Times of a slower machine, for tests.
    pub slow: Option<SlowEngine>,
}

impl SequenceOptions {
    /// Largest accepted block. Unit: tokens.
    pub const BLOCK_TOKENS_MAX: usize = 2048;

    /// Default blocks and dtype, no hidden states, room for `max_tokens`.
    pub const fn new(max_tokens: usize) -> Self {
        Self {
            max_tokens,
            block_tokens: DEFAULT_BLOCK_TOKENS,
            dtype: CacheDtype::Bf16,
            keep_hidden: false,
            slow: None,
        }
    }
}

/// Told about work as it completes, for saving while computing.
pub trait Observer {
    /// All keys and values of `tokens` in `layer` are in the cache.
    fn layer_done(&mut self, cache: &KvCache, layer: usize, tokens: Range<usize>);
}

/// Asked before each layer of a step.
pub(super) trait Gate {
    /// Returns when the layer may run.
    fn before_layer(&mut self, intake: &mut Intake<'_>, layer: usize) -> Result<(), EngineError>;
}

/// An observer that looks away, and a gate that stands open.
pub(super) struct Nobody;

impl Observer for Nobody {
    fn layer_done(&mut self, _cache: &KvCache, _layer: usize, _tokens: Range<usize>) {}
}

impl Gate for Nobody {
    fn before_layer(&mut self, _: &mut Intake<'_>, _: usize) -> Result<(), EngineError> {
        Ok(())
    }
}

/// How many leading tokens of a prompt are worth restoring: whole blocks that leave at least the
/// last token to compute, without which there would be no logits.
pub const fn restorable_tokens(prompt_tokens: usize, block_tokens: usize) -> usize {
    prompt_tokens.saturating_sub(1) / block_tokens * block_tokens
}

/// A running sequence.
pub struct Sequence {
    model: Arc<Model>,
    cache: KvCache,
    options: SequenceOptions,
    position: usize,
    /// Output of the last layer for the token before `position`, if this sequence computed it.
    last: Option<Vec<f32>>,
    costs: VecDeque<PrefillCost>,
}

impl Sequence {
    /// An empty sequence with its whole cache allocated and touched.
    pub fn new(model: Arc<Model>, options: SequenceOptions) -> Result<Self, EngineError> {
        let positions = model.config().max_positions;
        if !(1..=positions).contains(&options.max_tokens) {
            let accepted = format!("1 ..= {positions}, the positions of this model");
            return Err(refusal("max_tokens", options.max_tokens, accepted));
        }
        if !(1..=SequenceOptions::BLOCK_TOKENS_MAX).contains(&options.block_tokens) {
            let accepted = format!("1 ..= {}", SequenceOptions::BLOCK_TOKENS_MAX);
            return Err(refusal("block_tokens", options.block_tokens, accepted));
        }
        let SequenceOptions {
            max_tokens,
            dtype,
            keep_hidden,
            ..
        } = options;
        let cache = KvCache::new(model.config(), dtype, max_tokens, keep_hidden);
        Ok(Self {
            model,
            cache,
            options,
            position: 0,
            last: None,
            costs: VecDeque::new(),
        })
    }

    /// The model this sequence runs.
    pub const fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Tokens computed or restored so far; the position of the next one.
    pub const fn position(&self) -> usize {
        self.position
    }

    /// The cache, for exporting.
    pub const fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// Tokens of a full block.
    pub(super) const fn block_tokens(&self) -> usize {
        self.options.block_tokens
    }

    /// The place for what arrives between steps and layers. See [`Intake`].
    pub const fn intake(&mut self) -> Intake<'_> {
        Intake {
            cache: &mut self.cache,
            model: &self.model,
            slow: self.options.slow,
            position: self.position,
        }
    }

    /// What the last steps cost, oldest first; each is told once.
    pub fn take_costs(&mut self) -> Vec<PrefillCost> {
        self.costs.drain(..).collect()
    }

    /// Stores restored bytes of tokens that lie ahead of the position, in any order.
    pub fn import(
        &mut self,
        layer: usize,
        part: Part,
        tokens: Range<usize>,
        bytes: &[u8],
    ) -> Result<(), EngineError> {
        if tokens.start < self.position {
            let accepted = self.position..self.options.max_tokens;
            return Err(EngineError::Tokens {
                what: "import",
                got: tokens,
                accepted,
            });
        }
        self.cache.import(layer, part, tokens, bytes)
    }

    /// Moves the position forward over restored tokens. Refused, and nothing moves, if any part
    /// of any layer below `position` is missing.
    pub fn resume_at(&mut self, position: usize) -> Result<(), EngineError> {
        if position < self.position {
            let accepted = self.position..self.options.max_tokens;
            let got = position..position;
            return Err(EngineError::Tokens {
                what: "resume_at",
                got,
                accepted,
            });
        }
        self.cache.check_whole(position)?;
        if position > self.position {
            self.last = None;
        }
        self.position = position;
        Ok(())
    }

    /// Moves the position back and forgets what lies at or after it, restored or computed.
    pub fn rewind(&mut self, position: usize) -> Result<(), EngineError> {
        if position > self.position {
            let (got, accepted) = (position..position, 0..self.position);
            return Err(EngineError::Tokens {
                what: "rewind",
                got,
                accepted,
            });
        }
        self.cache.forget(position);
        self.position = position;
        self.last = None;
        Ok(())
    }

    /// Computes all of `tokens`, which stand at the position and after, block by block.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<(), EngineError> {
        self.prefill_observed(tokens, &mut Nobody)
    }

    /// Like [`Sequence::prefill`], telling `observer` about every finished layer of every step.
    pub fn prefill_observed(
        &mut self,
        mut tokens: &[u32],
        observer: &mut dyn Observer,
    ) -> Result<(), EngineError> {
        while !tokens.is_empty() {
            let done = self.step(tokens, observer)?;
            tokens = tokens.get(done..).unwrap_or_default();
        }
        Ok(())
    }

    /// Computes the leading `tokens` up to the next block boundary; returns how many. For callers
    /// that look between steps at what has meanwhile been restored.
    pub fn step(
        &mut self,
        tokens: &[u32],
        observer: &mut dyn Observer,
    ) -> Result<usize, EngineError> {
        let (rows, _) = self.run_step(tokens, observer)?;
        Ok(rows)
    }

    /// Computes all of `tokens` like [`Sequence::prefill`] and returns the scores of the whole
    /// vocabulary after each of them: `[tokens, vocab]`. For judging by a text that is known.
    pub fn prefill_scored(&mut self, mut tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        let mut scores = Vec::with_capacity(tokens.len() * self.model.config().vocab);
        while !tokens.is_empty() {
            let (done, last) = self.run_step(tokens, &mut Nobody)?;
            scores.extend(self.model.logits(&last));
            tokens = tokens.get(done..).unwrap_or_default();
        }
        Ok(scores)
    }

    /// One step: how many tokens it took, and the output of the last layer for each of them.
    fn run_step(
        &mut self,
        tokens: &[u32],
        observer: &mut dyn Observer,
    ) -> Result<(usize, Vec<f32>), EngineError> {
        self.run_gated(tokens, self.position, &mut Nobody, observer)
    }

    /// Like [`Sequence::step`] with tokens that stand at `start`, ahead of the position: what is
    /// missing between comes layer by layer, each before `gate` opens.
    pub(super) fn step_gated(
        &mut self,
        tokens: &[u32],
        start: usize,
        gate: &mut dyn Gate,
        observer: &mut dyn Observer,
    ) -> Result<usize, EngineError> {
        let (rows, _) = self.run_gated(tokens, start, gate, observer)?;
        Ok(rows)
    }

    fn run_gated(
        &mut self,
        tokens: &[u32],
        start: usize,
        gate: &mut dyn Gate,
        observer: &mut dyn Observer,
    ) -> Result<(usize, Vec<f32>), EngineError> {
        let block = self.options.block_tokens;
        let rows = tokens.len().min(block - start % block);
        let layers = 0..self.model.config().layers.len();
        let tokens = tokens.get(..rows).unwrap_or_default();
        let (x, took) = self.run_cells(tokens, start, layers, gate, observer)?;
        if self.costs.len() >= COSTS_KEPT {
            self.costs.pop_front();
        }
        self.costs.push_back(PrefillCost {
            before: start,
            tokens: rows,
            took,
        });
        let hidden = self.model.config().hidden;
        self.last = x.rchunks_exact(hidden).next().map(<[f32]>::to_vec);
        self.position = start + rows;
        Ok((rows, x))
    }

    /// Runs tokens of one block, the first of which stands at `start`, through some layers: from
    /// the first, or from one whose input is there. Returns what comes out, and the time in these
    /// layers. The position stays.
    pub(super) fn run_cells(
        &mut self,
        tokens: &[u32],
        start: usize,
        layers: Range<usize>,
        gate: &mut dyn Gate,
        observer: &mut dyn Observer,
    ) -> Result<(Vec<f32>, Duration), EngineError> {
        let range = start..start + tokens.len();
        if range.end > self.options.max_tokens {
            let accepted = 0..self.options.max_tokens;
            return Err(EngineError::Tokens {
                what: "prefill",
                got: range,
                accepted,
            });
        }
        let model = Arc::clone(&self.model);
        let mut x = match layers.start {
            0 => model.embed(tokens)?,
            layer => self.cache.input(layer, &range)?,
        };
        let slow = self.options.slow;
        let whole = slow.map(|slow| slow.prefill(start, range.len()));
        let mut watch = Stopwatch::new(whole, model.layers.len());
        let weights = model.layers.iter().enumerate();
        for (index, layer) in weights.take(layers.end).skip(layers.start) {
            gate.before_layer(&mut self.intake(), index)?;
            self.cache
                .check_layer(index, &(self.position..range.start))?;
            watch.layer(|| {
                self.cache.keep_input(index, range.start, &mut x);
                if let Some(cache) = self.cache.layer_mut(index) {
                    // Inside the pool, so that each product below starts without waking a thread.
                    let epsilon = model.config().norm_epsilon;
                    rayon::scope(|_| layer.run(&mut x, range.start, epsilon, cache));
                }
            });
            observer.layer_done(&self.cache, index, range.clone());
        }
        self.cache.keep_input(layers.end, range.start, &mut x);
        Ok((x, watch.took()))
    }

    /// Scores of the whole vocabulary for the token at the position.
    pub fn logits(&self) -> Result<Vec<f32>, EngineError> {
        let last = self.last.as_ref().ok_or(EngineError::NothingComputed)?;
        Ok(self.model.logits(last))
    }

    /// Computes one more token.
    pub fn decode(&mut self, token: u32) -> Result<(), EngineError> {
        self.step(&[token], &mut Nobody).map(|_| ())
    }

    /// Continues greedily with at most `count` tokens, ending after `stop` if it comes up. The
    /// last token returned has not been fed back.
    pub fn generate(&mut self, count: usize, stop: Option<u32>) -> Result<Vec<u32>, EngineError> {
        let mut out: Vec<u32> = Vec::with_capacity(count);
        while out.len() < count {
            if let Some(&token) = out.last() {
                if Some(token) == stop {
                    break;
                }
                self.decode(token)?;
            }
            out.push(likeliest(&self.logits()?));
        }
        Ok(out)
    }
}

impl fmt::Debug for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.model.config().name;
        write!(
            f,
            "Sequence({name}, {} of {} tokens)",
            self.position, self.options.max_tokens
        )
    }
}

/// The first of the largest scores.
fn likeliest(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, &score) in (0..).zip(logits) {
        if score > best.1 {
            best = (token, score);
        }
    }
    best.0
}
