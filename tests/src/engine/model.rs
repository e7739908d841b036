//! A model: its shape and its weights, shared by all sequences that run it.
//!
//! Upstairs:   `sequence`; the demo holds one in an `Arc`.
//! Downstairs: `layer`.
//!
//! Invariant: a model that exists was checked: weights have the shapes the configuration says.
//!
//! Not here on purpose: anything that changes while running.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::config::{Attention, ModelConfig, refusal};
use super::error::EngineError;
use super::layer::{HeadsMixer, LatentMixer, Layer, Mixer};
use super::math::{Rope, rms_norm};
use super::matrix::Weight;

/// Weights and shape of one model. Immutable.
#[derive(Debug)]
pub struct Model {
    pub(super) config: ModelConfig,
    pub(super) layers: Vec<Layer>,
    embedding: Weight,
    norm: Vec<f32>,
    /// Absent when the head is the embedding.
    head: Option<Weight>,
    fingerprint: [u8; 32],
}

/// Where weights come from: a file, or a seed.
///
/// Names are those of llama models in GGUF; matrices are `[outputs, inputs]`, row major.
pub(super) trait Source {
    /// The values of `name`, which has this shape.
    fn matrix(
        &mut self,
        name: &str,
        outputs: usize,
        inputs: usize,
    ) -> Result<Vec<f32>, EngineError>;

    /// The gains of a norm.
    fn norm(&mut self, name: &str, width: usize) -> Result<Vec<f32>, EngineError>;

    /// Whether the model has a head of its own.
    fn has_own_head(&self) -> bool;

    /// What tells these weights from others.
    fn fingerprint(&self) -> [u8; 32];
}

impl Model {
    /// Reads all weights of `config` from `source`.
    pub(super) fn build(
        config: ModelConfig,
        source: &mut impl Source,
    ) -> Result<Self, EngineError> {
        config.check()?;
        let mut ropes: BTreeMap<usize, Arc<Rope>> = BTreeMap::new();
        let mut layers = Vec::with_capacity(config.layers.len());
        for (index, attention) in config.layers.iter().enumerate() {
            let rope = ropes
                .entry(attention.rope_width())
                .or_insert_with_key(|width| {
                    Arc::new(Rope::new(*width, config.max_positions, config.rope_theta))
                });
            layers.push(build_layer(
                &config,
                index,
                attention,
                Arc::clone(rope),
                source,
            )?);
        }
        let (vocab, hidden) = (config.vocab, config.hidden);
        let embedding = weight(source, "token_embd", vocab, hidden)?;
        let head = if source.has_own_head() {
            Some(weight(source, "output", vocab, hidden)?)
        } else {
            None
        };
        let norm = source.norm("output_norm", hidden)?;
        Ok(Self {
            config,
            layers,
            embedding,
            norm,
            head,
            fingerprint: source.fingerprint(),
        })
    }

    /// The model's shape.
    pub const fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What tells these weights from others: the SHA-256 of their file, or of shape and seed.
    pub const fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// The rows of the embedding for `tokens`.
    pub(super) fn embed(&self, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        let (vocab, hidden) = (self.config.vocab, self.config.hidden);
        let mut out = Vec::with_capacity(tokens.len() * hidden);
        for &token in tokens {
            let row = usize::try_from(token).ok().filter(|row| *row < vocab);
            let row = row.ok_or(EngineError::Vocabulary { token, vocab })?;
            self.embedding.append_row(row, &mut out);
        }
        Ok(out)
    }

    /// Scores of the whole vocabulary after each row of the last layer.
    pub(super) fn logits(&self, last: &[f32]) -> Vec<f32> {
        let normed = rms_norm(last, &self.norm, self.config.norm_epsilon);
        self.output().apply(&normed)
    }

    /// What makes scores of the normed last layer.
    pub(super) fn output(&self) -> &Weight {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Gains of the norm before it.
    pub(super) fn output_norm(&self) -> &[f32] {
        &self.norm
    }
}

fn build_layer(
    config: &ModelConfig,
    index: usize,
    attention: &Attention,
    rope: Arc<Rope>,
    source: &mut impl Source,
) -> Result<Layer, EngineError> {
    let prefix = format!("blk.{index}");
    let (hidden, inner) = (config.hidden, config.intermediate);
    let mixer = match attention {
        Attention::Heads { .. } => heads_mixer(hidden, &prefix, attention, source)?,
        Attention::Latent { .. } => latent_mixer(hidden, &prefix, attention, source)?,
    };
    let mut gate_up = source.matrix(&format!("{prefix}.ffn_gate"), inner, hidden)?;
    gate_up.extend(source.matrix(&format!("{prefix}.ffn_up"), inner, hidden)?);
    Ok(Layer {
        attention_norm: source.norm(&format!("{prefix}.attn_norm"), hidden)?,
        mixer,
        rope,
        feed_forward_norm: source.norm(&format!("{prefix}.ffn_norm"), hidden)?,
        gate_up: Weight::new(&gate_up, hidden),
        down: weight(source, &format!("{prefix}.ffn_down"), hidden, inner)?,
    })
}

fn heads_mixer(
    hidden: usize,
    prefix: &str,
    attention: &Attention,
    source: &mut impl Source,
) -> Result<Mixer, EngineError> {
    let Attention::Heads {
        query_heads,
        kv_heads,
        key_dim,
        value_dim,
        window,
    } = *attention
    else {
        return Err(refusal(prefix, "latent", "grouped heads"));
    };
    let mut fused = source.matrix(&format!("{prefix}.attn_q"), query_heads * key_dim, hidden)?;
    fused.extend(source.matrix(&format!("{prefix}.attn_k"), kv_heads * key_dim, hidden)?);
    fused.extend(source.matrix(&format!("{prefix}.attn_v"), kv_heads * value_dim, hidden)?);
    Ok(Mixer::Heads(HeadsMixer {
        query_key_value: Weight::new(&fused, hidden),
        out: weight(
            source,
            &format!("{prefix}.attn_output"),
            hidden,
            query_heads * value_dim,
        )?,
        query_heads,
        kv_heads,
        key_dim,
        value_dim,
        window,
    }))
}

fn latent_mixer(
    hidden: usize,
    prefix: &str,
    attention: &Attention,
    source: &mut impl Source,
) -> Result<Mixer, EngineError> {
    let Attention::Latent {
        query_heads,
        latent_dim,
        rope_dim,
        nope_dim,
        value_dim,
    } = *attention
    else {
        return Err(refusal(prefix, "grouped heads", "latent"));
    };
    let query_width = query_heads * (nope_dim + rope_dim);
    let query = weight(source, &format!("{prefix}.attn_q"), query_width, hidden)?;
    let compressed = latent_dim + rope_dim;
    let compress = weight(
        source,
        &format!("{prefix}.attn_kv_a_mqa"),
        compressed,
        hidden,
    )?;
    let latent_norm = source.norm(&format!("{prefix}.attn_kv_a_norm"), latent_dim)?;
    let mut query_to_latent = Vec::with_capacity(query_heads);
    let mut latent_to_value = Vec::with_capacity(query_heads);
    for head in 0..query_heads {
        let name = format!("{prefix}.attn_k_b.{head}");
        query_to_latent.push(weight(source, &name, latent_dim, nope_dim)?);
        let name = format!("{prefix}.attn_v_b.{head}");
        latent_to_value.push(weight(source, &name, value_dim, latent_dim)?);
    }
    let out = weight(
        source,
        &format!("{prefix}.attn_output"),
        hidden,
        query_heads * value_dim,
    )?;
    Ok(Mixer::Latent(LatentMixer {
        query,
        compress,
        latent_norm,
        query_to_latent,
        latent_to_value,
        out,
        latent_dim,
        rope_dim,
        nope_dim,
    }))
}

fn weight(
    source: &mut impl Source,
    name: &str,
    outputs: usize,
    inputs: usize,
) -> Result<Weight, EngineError> {
    Ok(Weight::new(&source.matrix(name, outputs, inputs)?, inputs))
}
