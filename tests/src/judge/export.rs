//! Samples for calibration: K and V of real documents, and Fisher information.
//!
//! Upstairs:   `kvtier-judge export`.
//! Downstairs: `fisher`, `safetensors`, the engine.
//!
//! One file a document: `K` (after RoPE) and `V` of `[layers, tokens, heads, width]` in bf16, from
//! position 0, and `token_ids`. One file `fisher.safetensors` with `fisher_k` and `fisher_v` of
//! `[layers, heads, width, width]` in f32 and the scalar `tokens`.
//!
//! Not here on purpose: models whose layers differ in shape; the files have one shape for all.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use kvtier_benches::report::Problem;

use super::fisher::Fisher;
use super::safetensors::{Tensor, write};
use super::subject::{Tokens, prefilled};
use crate::engine::{Attention, Model, Part};

/// Writes `PREFIX-NN.safetensors` for each document into `folder`.
pub fn documents(
    model: &Arc<Model>,
    documents: &[Tokens],
    folder: &Path,
    prefix: &str,
    tell: &dyn Fn(&str),
) -> Result<(), Problem> {
    let attention = uniform(model)?;
    fs::create_dir_all(folder).map_err(|e| format!("cannot make {}: {e}", folder.display()))?;
    for (number, document) in documents.iter().enumerate() {
        let tokens = document.ids.len();
        let sequence = prefilled(model, &document.ids, 0)?;
        let layers = model.config().layers.len();
        let names = [(Part::Key, "K"), (Part::Value, "V")];
        let mut tensors = Vec::new();
        for ((part, name), spec) in names.into_iter().zip(attention.parts()) {
            let pieces = (0..layers).map(|layer| sequence.cache().bytes(layer, part, 0..tokens));
            tensors.push(Tensor {
                name,
                dtype: "BF16",
                shape: vec![layers, tokens, spec.heads, spec.width],
                data: pieces.collect::<Result<_, _>>()?,
            });
        }
        let ids: Vec<u8> = document
            .ids
            .iter()
            .flat_map(|id| id.to_le_bytes())
            .collect();
        tensors.push(Tensor {
            name: "token_ids",
            dtype: "I32",
            shape: vec![tokens],
            data: vec![&ids],
        });
        write(
            &folder.join(format!("{prefix}-{number:02}.safetensors")),
            &tensors,
        )?;
        tell(&document.name);
    }
    Ok(())
}

/// Writes Fisher matrices to the file `path`.
pub fn fisher(model: &Model, fisher: &Fisher, path: &Path) -> Result<(), Problem> {
    let attention = uniform(model)?;
    let [key, value] = attention.parts();
    let bytes = |heads: &[Vec<f32>]| -> Vec<u8> {
        heads
            .iter()
            .flatten()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    };
    let keys: Vec<_> = fisher
        .layers
        .iter()
        .map(|layer| bytes(&layer.keys))
        .collect();
    let values: Vec<_> = fisher
        .layers
        .iter()
        .map(|layer| bytes(&layer.values))
        .collect();
    #[expect(clippy::cast_precision_loss, reason = "a context is far below 2^24")]
    let tokens = (fisher.tokens as f32).to_le_bytes();
    let layers = fisher.layers.len();
    let matrices = |name, part: crate::engine::PartSpec, data| Tensor {
        name,
        dtype: "F32",
        shape: vec![layers, part.heads, part.width, part.width],
        data,
    };
    let tensors = [
        matrices("fisher_k", key, keys.iter().map(Vec::as_slice).collect()),
        matrices(
            "fisher_v",
            value,
            values.iter().map(Vec::as_slice).collect(),
        ),
        Tensor {
            name: "tokens",
            dtype: "F32",
            shape: vec![],
            data: vec![&tokens],
        },
    ];
    write(path, &tensors)
}

/// The shape that all layers have.
fn uniform(model: &Model) -> Result<&Attention, Problem> {
    let layers = &model.config().layers;
    let first = layers.first().ok_or("the model has no layer")?;
    let heads = matches!(first, Attention::Heads { .. });
    if heads && layers.iter().all(|layer| layer.parts() == first.parts()) {
        Ok(first)
    } else {
        Err("samples need a model whose layers all cache keys and values of one shape".into())
    }
}
