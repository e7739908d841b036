//! What each level of the ladder costs in predictions, and what it saves in bytes.
//!
//! Upstairs:   `kvtier-judge quality`.
//! Downstairs: `coded` (the codec), `compare` (the statistics), the engine.
//!
//! A document's first tokens are computed; their KV goes through the codec and into another
//! sequence; that one is then given the tokens that follow in the text, and its scores are
//! compared with those over exact KV. Everything else of the two runs is the same to the bit
//! (E2), so every difference is the codec's.
//!
//! Not here on purpose: choosing documents, tables and figures; telling people.

use std::sync::Arc;

use kvtier_benches::report::Problem;
use kvtier_kernels::Codec;

use super::coded::{Which, code};
use super::compare::{Change, likeliest};
use super::subject::{Tokens, prefilled};
use crate::engine::{Model, Part, Sequence, SequenceOptions};

/// How a document is cut.
#[derive(Debug, Clone, Copy)]
pub struct Cut {
    /// Tokens restored.
    pub context: usize,
    /// Tokens given after them.
    pub targets: usize,
    /// Tokens continued greedily instead, for the agreement of continuations.
    pub greedy: usize,
}

impl Cut {
    /// Tokens that a document must have.
    pub const fn tokens(&self) -> usize {
        self.context + self.targets + 1
    }
}

/// One level over one document.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Judged {
    /// Bits a number, every stored byte counted.
    pub bits: f64,
    /// How predictions changed.
    pub change: Change,
    /// Share of the greedy continuation before the first other token.
    pub greedy: f64,
}

/// A document with its run over exact KV, and a sequence to restore into.
pub struct Bench {
    model: Arc<Model>,
    cut: Cut,
    exact: Sequence,
    restored: Sequence,
    /// Given after the context, one more than are scored.
    text: Vec<u32>,
    scores: Vec<f32>,
    /// The first token after the context and the greedy ones after it.
    greedy: Vec<u32>,
}

impl Bench {
    /// Runs the document over exact KV.
    pub fn new(model: &Arc<Model>, document: &Tokens, cut: Cut) -> Result<Self, Problem> {
        let ids = document.ids.get(..cut.tokens());
        let (context, text) = ids
            .and_then(|ids| ids.split_at_checked(cut.context))
            .ok_or_else(|| format!("document {} is too short", document.name))?;
        let room = cut.targets.max(cut.greedy) + 1;
        let mut exact = prefilled(model, context, room)?;
        let first = text.first().copied().unwrap_or_default();
        exact.decode(first)?;
        let mut greedy = vec![first];
        greedy.extend(exact.generate(cut.greedy, None)?);
        exact.rewind(cut.context)?;
        let scores = exact.prefill_scored(text.get(..cut.targets).unwrap_or_default())?;
        let options = SequenceOptions::new(cut.context + room);
        Ok(Self {
            model: Arc::clone(model),
            cut,
            restored: Sequence::new(Arc::clone(model), options)?,
            exact,
            text: text.to_vec(),
            scores,
            greedy,
        })
    }

    /// The same run over KV that went through `codec`.
    pub fn judge(&mut self, codec: &dyn Codec) -> Result<Judged, Problem> {
        let (bits, change) = self.change(codec, Which::Every)?;
        self.restored.rewind(self.cut.context)?;
        Ok(Judged {
            bits,
            change,
            greedy: self.agreement()?,
        })
    }

    /// How predictions change when only one part of one layer goes through `codec`.
    pub fn sensitivity(
        &mut self,
        codec: &dyn Codec,
        layer: usize,
        part: Part,
    ) -> Result<Change, Problem> {
        Ok(self.change(codec, Which::One(layer, part))?.1)
    }

    fn change(&mut self, codec: &dyn Codec, which: Which) -> Result<(f64, Change), Problem> {
        let config = self.model.config();
        let coded = code(config, self.exact.cache(), self.cut.context, codec, which)?;
        coded.restore_into(config, &mut self.restored)?;
        let (given, next) = (self.text.get(..self.cut.targets), self.text.get(1..));
        let scores = self.restored.prefill_scored(given.unwrap_or_default())?;
        let next = next.unwrap_or_default();
        let change = Change::between(&self.scores, &scores, config.vocab, next);
        Ok((coded.bits(), change))
    }

    /// Share of the greedy tokens that the restored sequence, at the context's end, would give
    /// before its first other one. Given the exact run's tokens at once, because a step's size
    /// changes no bit (E2).
    fn agreement(&mut self) -> Result<f64, Problem> {
        let Some((_, want)) = self.greedy.split_first() else {
            return Ok(1.0);
        };
        let given = self.greedy.get(..want.len()).unwrap_or_default();
        let scores = self.restored.prefill_scored(given)?;
        let rows = scores.chunks_exact(self.model.config().vocab);
        let agree = rows
            .zip(want)
            .take_while(|(row, want)| likeliest(row) == **want);
        let (agree, all) = (u32::try_from(agree.count())?, u32::try_from(want.len())?);
        Ok(f64::from(agree) / f64::from(all.max(1)))
    }
}
