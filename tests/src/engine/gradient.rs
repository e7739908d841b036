//! How much what a model predicts depends on every cached key and value.
//!
//! Upstairs:   `judge` makes Fisher information of it, which calibration weighs errors by.
//! Downstairs: [`attention`] and [`steps`] go backwards; weights and norms are the engine's.
//!
//! The question is that of a restore: the cache of a context is given, the tokens after it are
//! computed over it. So cached keys and values are inputs, nothing of the context is computed
//! again, and only the rows of the tokens after it go through the layers, forwards and back.
//! Gradients of weights are not formed.
//!
//! Invariants kept here
//!   G1  The forward pass is the engine's in f32, except that the keys and values of its own
//!       tokens are not rounded: rounding has no slope.
//!   G2  Gradients of keys are those before RoPE, where codecs quantise them; a rotation keeps
//!       every length, so those after it are the same numbers turned.
//!
//! Not here on purpose: MLA; which gradient of the scores to start from, that is statistics.

use std::sync::Arc;

use half::{bf16, f16};

use super::cache::KvCache;
use super::config::{CacheDtype, Part, refusal};
use super::error::EngineError;
use super::layer::{HeadsMixer, Layer, Mixer};
use super::math::{add, gated, rms_norm};
use super::matrix::Weight;
use super::model::Model;
use attention::{Head, Own};

mod attention;
mod steps;

/// Numbers of one layer for a run of tokens: the cached ones, or how the result depends on them.
#[derive(Debug, Clone, PartialEq)]
pub struct KeysValues {
    /// `[tokens, kv_heads, key_dim]`.
    pub keys: Vec<f32>,
    /// `[tokens, kv_heads, value_dim]`.
    pub values: Vec<f32>,
}

/// A model that can be run backwards.
#[derive(Debug)]
pub struct Backward {
    model: Arc<Model>,
    layers: Vec<Transposed>,
    head: Weight,
}

/// Weights of one layer with inputs and outputs exchanged.
#[derive(Debug)]
struct Transposed {
    query_key_value: Weight,
    out: Weight,
    gate_up: Weight,
    down: Weight,
}

/// One forward pass with what going back needs.
#[derive(Debug)]
pub struct Tape {
    context: usize,
    rows: usize,
    layers: Vec<Kept>,
    /// Output of the last layer.
    last: Vec<f32>,
    logits: Vec<f32>,
}

/// What one layer had.
#[derive(Debug)]
struct Kept {
    input: Vec<f32>,
    heads: Vec<Head>,
    after_attention: Vec<f32>,
    gate_up: Vec<f32>,
}

impl Tape {
    /// Scores of the vocabulary after each token: `[rows, vocab]`.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }
}

/// The leading `tokens` of a cache as numbers, layer by layer.
pub fn context(
    model: &Model,
    cache: &KvCache,
    tokens: usize,
) -> Result<Vec<KeysValues>, EngineError> {
    let both = |layer| -> Result<KeysValues, EngineError> {
        Ok(KeysValues {
            keys: numbers(cache, layer, Part::Key, tokens)?,
            values: numbers(cache, layer, Part::Value, tokens)?,
        })
    };
    (0..model.config().layers.len()).map(both).collect()
}

fn numbers(
    cache: &KvCache,
    layer: usize,
    part: Part,
    tokens: usize,
) -> Result<Vec<f32>, EngineError> {
    let bytes = cache.bytes(layer, part, 0..tokens)?;
    let (pairs, _) = bytes.as_chunks::<{ CacheDtype::BYTES }>();
    let widen = |pair: &[u8; CacheDtype::BYTES]| match cache.dtype() {
        CacheDtype::Bf16 => bf16::from_le_bytes(*pair).to_f32(),
        CacheDtype::F16 => f16::from_le_bytes(*pair).to_f32(),
    };
    Ok(pairs.iter().map(widen).collect())
}

impl Backward {
    /// Turns the weights of `model` round. Takes as much memory again as the model.
    ///
    /// # Errors
    /// Refuses layers that cache no keys and values by head.
    pub fn new(model: Arc<Model>) -> Result<Self, EngineError> {
        let mut layers = Vec::with_capacity(model.layers.len());
        for (index, layer) in model.layers.iter().enumerate() {
            let mixer = heads(index, layer)?;
            layers.push(Transposed {
                query_key_value: mixer.query_key_value.transposed(),
                out: mixer.out.transposed(),
                gate_up: layer.gate_up.transposed(),
                down: layer.down.transposed(),
            });
        }
        let head = model.output().transposed();
        Ok(Self {
            model,
            layers,
            head,
        })
    }

    /// Runs `tokens`, which stand behind the context, whose keys are those after RoPE.
    ///
    /// # Errors
    /// Refuses a context that is not this model's, tokens outside of the vocabulary and more
    /// tokens than the model has positions.
    pub fn forward(&self, context: &[KeysValues], tokens: &[u32]) -> Result<Tape, EngineError> {
        let (start, rows) = (self.tokens_of(context)?, tokens.len());
        let config = self.model.config();
        if start + rows > config.max_positions {
            let accepted = 0..config.max_positions;
            return Err(EngineError::Tokens {
                what: "forward",
                got: start..start + rows,
                accepted,
            });
        }
        let mut x = self.model.embed(tokens)?;
        let mut layers = Vec::with_capacity(self.layers.len());
        for (index, (layer, cached)) in self.model.layers.iter().zip(context).enumerate() {
            let mixer = heads(index, layer)?;
            let input = x.clone();
            let normed = rms_norm(&x, &layer.attention_norm, config.norm_epsilon);
            let projected = mixer.query_key_value.apply(&normed);
            let (heads, mixed) =
                attention::forward(mixer, &layer.rope, cached, &Own { projected, start });
            add(&mut x, &mixer.out.apply(&mixed));
            let after_attention = x.clone();
            let normed = rms_norm(&x, &layer.feed_forward_norm, config.norm_epsilon);
            let gate_up = layer.gate_up.apply(&normed);
            let inner = gated(&gate_up, layer.gate_up.outputs() / 2);
            add(&mut x, &layer.down.apply(&inner));
            layers.push(Kept {
                input,
                heads,
                after_attention,
                gate_up,
            });
        }
        let logits = self.model.logits(&x);
        Ok(Tape {
            context: start,
            rows,
            layers,
            last: x,
            logits,
        })
    }

    /// How a function of the scores, whose gradient with respect to them is `scores`
    /// (`[rows, vocab]`), depends on every key (before RoPE) and value of the context.
    ///
    /// # Errors
    /// Refuses gradients of another size than the scores of `tape`.
    pub fn gradients(&self, tape: &Tape, scores: &[f32]) -> Result<Vec<KeysValues>, EngineError> {
        if scores.len() != tape.logits.len() {
            return Err(EngineError::BufferSize {
                what: "gradients of scores",
                got: scores.len(),
                expected: tape.logits.len(),
            });
        }
        let epsilon = self.model.config().norm_epsilon;
        let back = self.head.apply(scores);
        let mut x = steps::rms_norm_back(&tape.last, self.model.output_norm(), epsilon, &back);
        let mut gradients = Vec::with_capacity(self.layers.len());
        let layers = self.model.layers.iter().zip(&self.layers);
        for (index, ((layer, back), kept)) in layers.zip(&tape.layers).enumerate().rev() {
            let inner = back.down.apply(&x);
            let width = layer.gate_up.outputs() / 2;
            let gate_up = steps::gated_back(&kept.gate_up, width, &inner);
            let normed = back.gate_up.apply(&gate_up);
            let gain = &layer.feed_forward_norm;
            let more = steps::rms_norm_back(&kept.after_attention, gain, epsilon, &normed);
            add(&mut x, &more);

            let mixer = heads(index, layer)?;
            let mixed = back.out.apply(&x);
            let (cached, own) = attention::backward(mixer, &layer.rope, &kept.heads, &mixed, tape);
            let normed = back.query_key_value.apply(&own);
            let gain = &layer.attention_norm;
            let more = steps::rms_norm_back(&kept.input, gain, epsilon, &normed);
            add(&mut x, &more);
            gradients.push(cached);
        }
        gradients.reverse();
        Ok(gradients)
    }

    /// How many tokens a context has, once it was found to be one of this model.
    fn tokens_of(&self, context: &[KeysValues]) -> Result<usize, EngineError> {
        let layers = &self.model.config().layers;
        let mut tokens = None;
        for (layer, cached) in layers.iter().zip(context) {
            let [key, value] = layer.parts().map(|part| part.elements());
            let here = cached.keys.len() / key;
            let whole = cached.keys.len() == here * key && cached.values.len() == here * value;
            if !whole || *tokens.get_or_insert(here) != here {
                let got = format!("{} and {} numbers", cached.keys.len(), cached.values.len());
                return Err(refusal("context", got, "as many tokens in every layer"));
            }
        }
        if context.len() != layers.len() {
            let accepted = format!("{} layers", layers.len());
            return Err(refusal("context", context.len(), accepted));
        }
        Ok(tokens.unwrap_or(0))
    }
}

fn heads(index: usize, layer: &Layer) -> Result<&HeadsMixer, EngineError> {
    match &layer.mixer {
        Mixer::Heads(mixer) => Ok(mixer),
        Mixer::Latent(_) => {
            let field = format!("layers[{index}]");
            Err(refusal(field, "latent attention", "grouped heads"))
        }
    }
}

#[cfg(test)]
mod tests;
