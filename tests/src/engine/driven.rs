//! A prefill that computes what a restore does not bring, while it brings the rest.
//!
//! Upstairs:   whoever drives restores implements [`Driver`].
//! Downstairs: `sequence` runs cells, `cache` knows which are there.
//!
//! A *cell* is one layer of one block: its keys and values. Each of them comes to be in one of
//! three ways, and bits do not say which: loaded ([`Intake::import`]), rebuilt from the layer's
//! input ([`Intake::rebuild`]), or computed. A driver says what is computed and puts in what
//! arrives; the engine calls it and never waits by itself.
//!
//! ```text
//!   prefill_driven                                       driver
//!     next_compute  ---------------------------------->  puts in what arrived; waits if it must
//!     computes the cells  <---- Some(block, layers) ---
//!     computed  -------------------------------------->  what it took
//!     ... until           <---- None ------------------  the rest is there, or comes by layer
//!     first step of the rest of the prompt:
//!       wait_layer(0)  ------------------------------->  puts in layer 0 of what is missing
//!       runs layer 0
//!       wait_layer(1) ...
//! ```
//!
//! The ways to read a restore are ways to drive:
//!   prefix only    `next_compute` waits for everything and answers `None`.
//!   two-ended      it answers block 0, 1, ... while later blocks are put in from the back. They
//!                  lie at their place, where no attention sees them before the gap is closed.
//!   layer events   it answers `None` early; `wait_layer` waits for one layer after the other.
//!   hidden         inputs are put in as [`Part::Hidden`], and rebuilt, block by block or layer by
//!                  layer. Blocks that were computed up to some layer only leave its input behind.
//!
//! Invariants kept here
//!   C1  A layer runs only when all that it attends to is there; a driver that promised too much
//!       gets an error, not a wrong answer.
//!   D1  What arrives never replaces what is there: of a cell that was computed or loaded before,
//!       the first one is kept. Only a computation that a driver asks for replaces.
//!
//! Not here on purpose: a way to take back what was put in. Bytes that turn out to be wrong have
//! been attended to, perhaps: [`Sequence::rewind`] and begin again.

use std::ops::Range;
use std::sync::Arc;

use super::cache::KvCache;
use super::config::Part;
use super::cost::{PrefillCost, SlowEngine, Stopwatch};
use super::error::EngineError;
use super::model::Model;
use super::sequence::{Gate, Nobody, Sequence};

/// Some layers of one block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cells {
    /// Index of the block.
    pub block: usize,
    /// Its layers. The first is 0, or one whose input is there.
    pub layers: Range<usize>,
}

/// Says what an engine computes while a restore brings the rest.
pub trait Driver {
    /// What to compute next. `None`: nothing more; all restored tokens are there, or come by
    /// [`Driver::wait_layer`]. May wait, and puts into `intake` what has arrived.
    fn next_compute(&mut self, intake: &mut Intake<'_>) -> Result<Option<Cells>, EngineError>;

    /// These cells are computed. The time is that of the layers which ran.
    fn computed(&mut self, cells: &Cells, cost: PrefillCost);

    /// Returns when `layer` of every restored token is in `intake`. Called before each layer of
    /// the first step after them.
    fn wait_layer(&mut self, _intake: &mut Intake<'_>, _layer: usize) -> Result<(), EngineError> {
        Ok(())
    }
}

/// Where a driver puts what arrives.
#[derive(Debug)]
pub struct Intake<'a> {
    pub(super) cache: &'a mut KvCache,
    pub(super) model: &'a Arc<Model>,
    pub(super) slow: Option<SlowEngine>,
    /// Where the sequence had arrived before.
    pub(super) position: usize,
}

impl Intake<'_> {
    /// True when keys and values of all of `tokens` are there in `layer`.
    pub fn has(&self, layer: usize, tokens: &Range<usize>) -> bool {
        layer < self.model.config().layers.len() && self.cache.check_layer(layer, tokens).is_ok()
    }

    /// Bytes of `tokens` tokens of one part.
    pub fn part_bytes(
        &self,
        layer: usize,
        part: Part,
        tokens: usize,
    ) -> Result<usize, EngineError> {
        self.cache.part_bytes(layer, part, tokens)
    }

    /// Stores restored bytes of one part. False, and nothing changed, when all of these tokens
    /// were there (D1).
    pub fn import(
        &mut self,
        layer: usize,
        part: Part,
        tokens: Range<usize>,
        bytes: &[u8],
    ) -> Result<bool, EngineError> {
        self.ahead("import", &tokens)?;
        if self.cache.has(layer, part, &tokens) {
            return Ok(false);
        }
        self.cache.import(layer, part, tokens, bytes)?;
        Ok(true)
    }

    /// Makes keys and values of `tokens` in `layer` from the layer's input, which was put in or
    /// left behind. Needs nothing of the tokens before. False when they were there (D1).
    pub fn rebuild(&mut self, layer: usize, tokens: Range<usize>) -> Result<bool, EngineError> {
        self.ahead("rebuild", &tokens)?;
        if self.has(layer, &tokens) {
            return Ok(false);
        }
        let input = self.cache.input(layer, &tokens)?;
        let config = self.model.config();
        let time = self.slow.map(|slow| slow.projection(tokens.len()));
        let layers = config.layers.len();
        let time = time.map(|all| all / u32::try_from(layers).unwrap_or(u32::MAX).max(1));
        if let (Some(weights), Some(cache)) =
            (self.model.layers.get(layer), self.cache.layer_mut(layer))
        {
            let run = || weights.rebuild(&input, tokens.start, config.norm_epsilon, cache);
            Stopwatch::new(time, 1).layer(|| rayon::scope(|_| run()));
        }
        Ok(true)
    }

    /// History is never rewritten under an attention that has read it.
    fn ahead(&self, what: &'static str, tokens: &Range<usize>) -> Result<(), EngineError> {
        let accepted = self.position..self.cache.max_tokens();
        if tokens.start <= tokens.end && tokens.start >= accepted.start {
            return Ok(());
        }
        let got = tokens.clone();
        Err(EngineError::Tokens {
            what,
            got,
            accepted,
        })
    }
}

/// Lets a driver wait before each layer.
struct ByLayer<'a>(&'a mut dyn Driver);

impl Gate for ByLayer<'_> {
    fn before_layer(&mut self, intake: &mut Intake<'_>, layer: usize) -> Result<(), EngineError> {
        self.0.wait_layer(intake, layer)
    }
}

impl Sequence {
    /// Prefills `tokens`, which stand at the position and after. Of these, `driver` answers for
    /// the leading `restored`: it says which of their blocks are computed, and brings the others.
    ///
    /// At least one token is left, without which there would be no scores to continue from. After
    /// an error what was put in proves nothing: [`Sequence::rewind`] to the position, which has
    /// not moved, unless the driver knows better and this is called again.
    pub fn prefill_driven(
        &mut self,
        tokens: &[u32],
        restored: usize,
        driver: &mut dyn Driver,
    ) -> Result<(), EngineError> {
        if restored >= tokens.len() {
            return Err(EngineError::Tokens {
                what: "prefill_driven",
                got: 0..restored,
                accepted: 0..tokens.len().saturating_sub(1),
            });
        }
        let begin = self.position();
        let end = begin + restored;
        while let Some(cells) = driver.next_compute(&mut self.intake())? {
            let range = self.cells(&cells, end)?;
            let of_block = range.start - begin..range.end - begin;
            let of_block = tokens.get(of_block).unwrap_or_default();
            let layers = cells.layers.clone();
            let (_, took) =
                self.run_cells(of_block, range.start, layers, &mut Nobody, &mut Nobody)?;
            let (before, tokens) = (range.start, range.len());
            let cost = PrefillCost {
                before,
                tokens,
                took,
            };
            driver.computed(&cells, cost);
        }
        let rest = tokens.get(restored..).unwrap_or_default();
        let done = self.step_gated(rest, end, &mut ByLayer(driver), &mut Nobody)?;
        self.prefill(rest.get(done..).unwrap_or_default())
    }

    /// The tokens of `cells`, which lie between the position and `end`.
    fn cells(&self, cells: &Cells, end: usize) -> Result<Range<usize>, EngineError> {
        let block_tokens = self.block_tokens();
        let start = cells.block.saturating_mul(block_tokens);
        let range = start.max(self.position())..start.saturating_add(block_tokens).min(end);
        let model_layers = self.model().config().layers.len();
        if range.is_empty() || cells.layers.is_empty() || cells.layers.end > model_layers {
            return Err(EngineError::Cells {
                block: cells.block,
                layers: cells.layers.clone(),
                blocks: end.div_ceil(block_tokens),
                model_layers,
            });
        }
        Ok(range)
    }
}

#[cfg(test)]
mod tests;
