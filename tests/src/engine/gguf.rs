//! Reading a llama model and its tokenizer from a GGUF file.
//!
//! Upstairs:   the demo and tests call [`load`] with a file that `weights` found or fetched.
//! Downstairs: `candle_core::quantized::gguf_file` parses and dequantises.
//!
//! Invariant: every weight is dequantised to f32 once, here. Quantised products would save
//! memory and cost more than ten times the prefill speed.
//!
//! Not here on purpose: other architectures, RoPE scaling, expert layers: refused by name.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, Value};

use super::config::{Attention, ModelConfig};
use super::error::EngineError;
use super::model::{Model, Source};
use super::tokenizer::Tokenizer;

/// Loads model and tokenizer. `fingerprint` tells these weights from others; callers pass the
/// SHA-256 of the file.
pub fn load(path: &Path, fingerprint: [u8; 32]) -> Result<(Model, Tokenizer), EngineError> {
    let mut source = GgufSource::open(path, fingerprint)?;
    let metadata = Metadata {
        content: &source.content,
        path,
    };
    let tokenizer = Tokenizer::from_metadata(&metadata)?;
    let config = config_from(&metadata)?;
    Ok((Model::build(config, &mut source)?, tokenizer))
}

/// The metadata of an open file, with errors that name it.
pub(super) struct Metadata<'a> {
    content: &'a Content,
    path: &'a Path,
}

impl<'a> Metadata<'a> {
    pub(super) fn problem(&self, problem: impl Into<String>) -> EngineError {
        EngineError::ModelFile {
            path: self.path.to_owned(),
            problem: problem.into(),
        }
    }

    pub(super) fn optional(&self, key: &str) -> Option<&'a Value> {
        self.content.metadata.get(key)
    }

    pub(super) fn required(&self, key: &str) -> Result<&'a Value, EngineError> {
        self.optional(key)
            .ok_or_else(|| self.problem(format!("metadata key {key} is missing")))
    }

    pub(super) fn text(&self, key: &str) -> Result<&'a str, EngineError> {
        match self.required(key)? {
            Value::String(text) => Ok(text),
            _ => Err(self.problem(format!("metadata key {key} is not a text"))),
        }
    }

    pub(super) fn list(&self, key: &str) -> Result<&'a [Value], EngineError> {
        match self.required(key)? {
            Value::Array(list) => Ok(list),
            _ => Err(self.problem(format!("metadata key {key} is not a list"))),
        }
    }

    fn number(&self, key: &str) -> Result<usize, EngineError> {
        let number = match self.required(key)? {
            Value::U8(n) => u64::from(*n),
            Value::U16(n) => u64::from(*n),
            Value::U32(n) => u64::from(*n),
            Value::U64(n) => *n,
            Value::I32(n) => u64::try_from(*n).unwrap_or(u64::MAX),
            Value::I64(n) => u64::try_from(*n).unwrap_or(u64::MAX),
            _ => return Err(self.problem(format!("metadata key {key} is not a whole number"))),
        };
        usize::try_from(number).map_err(|_| self.problem(format!("{key} is out of range")))
    }

    fn real(&self, key: &str) -> Result<f32, EngineError> {
        let value = self.required(key)?.to_f32();
        value.map_err(|_| self.problem(format!("metadata key {key} is not an f32")))
    }
}

fn config_from(metadata: &Metadata<'_>) -> Result<ModelConfig, EngineError> {
    let architecture = metadata.text("general.architecture")?;
    if architecture != "llama" {
        return Err(metadata.problem(format!("architecture is {architecture:?}; accepted: llama")));
    }
    for unsupported in ["llama.rope.scaling.type", "llama.expert_count"] {
        if metadata.optional(unsupported).is_some() {
            return Err(metadata.problem(format!("{unsupported} is set; accepted: models without")));
        }
    }
    let query_heads = metadata.number("llama.attention.head_count")?;
    let kv_heads = metadata.number("llama.attention.head_count_kv")?;
    let hidden = metadata.number("llama.embedding_length")?;
    let head_dim = hidden.checked_div(query_heads).unwrap_or(0);
    let rotated = metadata.number("llama.rope.dimension_count")?;
    if rotated != head_dim || head_dim * query_heads != hidden {
        return Err(metadata.problem(format!(
            "embedding {hidden}, {query_heads} heads, {rotated} rotated dimensions; accepted: \
             rotated == embedding / heads"
        )));
    }
    let layer = Attention::Heads {
        query_heads,
        kv_heads,
        key_dim: head_dim,
        value_dim: head_dim,
        window: None,
    };
    let layers = metadata.number("llama.block_count")?;
    if layers > LAYERS_MAX {
        return Err(metadata.problem(format!("{layers} layers; accepted: 1 ..= {LAYERS_MAX}")));
    }
    let config = ModelConfig {
        name: metadata
            .text("general.name")
            .unwrap_or("unnamed")
            .to_owned(),
        vocab: metadata.list("tokenizer.ggml.tokens")?.len(),
        hidden,
        intermediate: metadata.number("llama.feed_forward_length")?,
        rope_theta: metadata.real("llama.rope.freq_base").unwrap_or(10_000.0),
        norm_epsilon: metadata.real("llama.attention.layer_norm_rms_epsilon")?,
        max_positions: metadata.number("llama.context_length")?,
        layers: vec![layer; layers],
    };
    config.check()?;
    Ok(config)
}

/// More layers than any model we could run; bounds what a corrupt header makes us allocate.
const LAYERS_MAX: usize = 1024;

struct GgufSource {
    content: Content,
    file: BufReader<File>,
    path: std::path::PathBuf,
    fingerprint: [u8; 32],
}

impl GgufSource {
    fn open(path: &Path, fingerprint: [u8; 32]) -> Result<Self, EngineError> {
        let problem = |problem: String| EngineError::ModelFile {
            path: path.to_owned(),
            problem,
        };
        let file = File::open(path).map_err(|error| problem(error.to_string()))?;
        let mut file = BufReader::new(file);
        let content = Content::read(&mut file)
            .map_err(|error| problem(format!("is not a readable GGUF file: {error}")))?;
        Ok(Self {
            content,
            file,
            path: path.to_owned(),
            fingerprint,
        })
    }

    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EngineError> {
        let full = format!("{name}.weight");
        let path = self.path.clone();
        let problem = |problem: String| EngineError::ModelFile { path, problem };
        let tensor = match self.content.tensor(&mut self.file, &full, &Device::Cpu) {
            Ok(tensor) => tensor,
            Err(error) => return Err(problem(format!("tensor {full}: {error}"))),
        };
        if tensor.shape().dims() != shape {
            let got = tensor.shape().dims();
            return Err(problem(format!(
                "tensor {full} is {got:?}; expected {shape:?}"
            )));
        }
        Ok(tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?)
    }

    /// Width of a query or key head, for [`unpermute`].
    fn head_dim(&self) -> Result<usize, EngineError> {
        let metadata = Metadata {
            content: &self.content,
            path: &self.path,
        };
        metadata.number("llama.rope.dimension_count")
    }
}

impl Source for GgufSource {
    fn matrix(
        &mut self,
        name: &str,
        outputs: usize,
        inputs: usize,
    ) -> Result<Vec<f32>, EngineError> {
        let values = self.tensor(name, &[outputs, inputs])?;
        if name.ends_with("attn_q") || name.ends_with("attn_k") {
            return Ok(unpermute(&values, inputs, self.head_dim()?));
        }
        Ok(values)
    }

    fn norm(&mut self, name: &str, width: usize) -> Result<Vec<f32>, EngineError> {
        self.tensor(name, &[width])
    }

    fn has_own_head(&self) -> bool {
        self.content.tensor_infos.contains_key("output.weight")
    }

    fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }
}

/// GGUF stores the rows of a llama query or key head so that RoPE turns neighbours (2i, 2i + 1).
/// Serving engines turn (i, i + half); their order is restored here, because the keys we cache
/// must be the keys they would cache.
fn unpermute(values: &[f32], inputs: usize, head_dim: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for head in values.chunks_exact(head_dim * inputs) {
        for parity in 0..2 {
            for row in head.chunks_exact(inputs).skip(parity).step_by(2) {
                out.extend_from_slice(row);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests;
