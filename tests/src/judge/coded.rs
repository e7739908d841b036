//! A cache through a codec and back, block by block, as a daemon would store and restore it.
//!
//! Upstairs:   `quality`.
//! Downstairs: the codecs, through their trait alone; the engine's cache.
//!
//! Invariants kept here
//!   J2  Every stored byte counts, headers and parts that a codec does not apply to included.
//!   J3  A codec is told what a daemon tells it: shape, layer of how many, heads, position; and the
//!       parts of the same block as decoding gave them, which is what it predicts from.
//!
//! Not here on purpose: no daemon. What lies between a codec and the device keeps every bit.

use std::collections::BTreeMap;

use kvtier_benches::report::Problem;
use kvtier_kernels::codec::Restored;
use kvtier_kernels::{Codec, PartShape};
use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::element::Element;
use kvtier_proto::layout::PartCode;
use rayon::prelude::*;

use crate::engine::{CacheDtype, DEFAULT_BLOCK_TOKENS, KvCache, ModelConfig, Part, PartSpec};
use crate::engine::{EngineError, Sequence};

/// Which parts of a cache go through the codec; the others stay as they are and do not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// All.
    Every,
    /// One part of one layer.
    One(usize, Part),
}

/// A cache that went through a codec.
#[derive(Debug)]
pub struct Coded {
    blocks: Vec<Block>,
    /// Size of the coded parts. Unit: bytes.
    pub stored_bytes: u64,
    /// Numbers in the coded parts.
    pub values: u64,
}

/// One block: its place, and its parts as they were restored.
#[derive(Debug)]
struct Block {
    start: usize,
    tokens: usize,
    /// Layers of the model.
    layers: usize,
    parts: BTreeMap<(u32, u8), Vec<u8>>,
    stored_bytes: u64,
    values: u64,
}

impl Restored for Block {
    fn part(&self, layer: u32, code: PartCode) -> Option<&[u8]> {
        self.parts.get(&(layer, code as u8)).map(Vec::as_slice)
    }
}

/// The leading `tokens` of `cache` through `codec` and back.
pub fn code(
    config: &ModelConfig,
    cache: &KvCache,
    tokens: usize,
    codec: &dyn Codec,
    which: Which,
) -> Result<Coded, Problem> {
    let starts: Vec<usize> = (0..tokens).step_by(DEFAULT_BLOCK_TOKENS).collect();
    let one = |start: &usize| {
        let mut block = Block {
            start: *start,
            tokens: DEFAULT_BLOCK_TOKENS.min(tokens - start),
            layers: config.layers.len(),
            parts: BTreeMap::new(),
            stored_bytes: 0,
            values: 0,
        };
        for (layer, attention) in config.layers.iter().enumerate() {
            for spec in attention.parts() {
                let coded = which == Which::Every || which == Which::One(layer, spec.part);
                block.add(cache, layer, spec, coded.then_some(codec))?;
            }
        }
        Ok(block)
    };
    // A boxed error does not travel between threads; its text does.
    let blocks: Result<Vec<Block>, String> = starts
        .par_iter()
        .map(|start| one(start).map_err(|problem: Problem| problem.to_string()))
        .collect();
    let blocks = blocks?;
    Ok(Coded {
        stored_bytes: blocks.iter().map(|block| block.stored_bytes).sum(),
        values: blocks.iter().map(|block| block.values).sum(),
        blocks,
    })
}

impl Coded {
    /// Bits that a number takes.
    #[expect(clippy::cast_precision_loss, reason = "sizes are far below 2^53")]
    pub fn bits(&self) -> f64 {
        self.stored_bytes as f64 * 8.0 / self.values.max(1) as f64
    }

    /// Makes `sequence` one that restored this cache, whatever it held before.
    pub fn restore_into(
        &self,
        config: &ModelConfig,
        sequence: &mut Sequence,
    ) -> Result<(), EngineError> {
        sequence.rewind(0)?;
        let mut end = 0;
        for block in &self.blocks {
            end = block.start + block.tokens;
            for (layer, attention) in config.layers.iter().enumerate() {
                for spec in attention.parts() {
                    let key = (
                        u32::try_from(layer).unwrap_or(u32::MAX),
                        code_of(spec.part) as u8,
                    );
                    let bytes = block.parts.get(&key).map_or(&[][..], Vec::as_slice);
                    sequence.import(layer, spec.part, block.start..end, bytes)?;
                }
            }
        }
        sequence.resume_at(end)
    }
}

impl Block {
    /// Takes the next part of the cache, through `codec` if there is one.
    fn add(
        &mut self,
        cache: &KvCache,
        layer: usize,
        spec: PartSpec,
        codec: Option<&dyn Codec>,
    ) -> Result<(), Problem> {
        let raw = cache.bytes(layer, spec.part, self.start..self.start + self.tokens)?;
        let (number, code) = (u32::try_from(layer)?, code_of(spec.part));
        let restored = match codec {
            None => raw.to_vec(),
            Some(codec) => {
                let element = match cache.dtype() {
                    CacheDtype::Bf16 => Element::Bf16,
                    CacheDtype::F16 => Element::F16,
                };
                let (rows, width) = (u32::try_from(self.tokens)?, u32::try_from(spec.elements())?);
                let shape = PartShape::new(element, rows, width)?
                    .of_layer(number, code)
                    .with_heads(u32::try_from(spec.heads)?, PartOrder::TokenMajor)?
                    .among_layers(u32::try_from(self.layers)?)
                    .at_position(u32::try_from(self.start)?);
                let (stored_bytes, restored) = self.through(codec, &shape, raw)?;
                self.stored_bytes += u64::try_from(stored_bytes)?;
                self.values += u64::from(rows) * u64::from(width);
                restored
            }
        };
        self.parts.insert((number, code as u8), restored);
        Ok(())
    }

    /// Encodes and decodes one part: its stored size, and what comes back.
    fn through(
        &self,
        codec: &dyn Codec,
        shape: &PartShape,
        raw: &[u8],
    ) -> Result<(usize, Vec<u8>), Problem> {
        if !codec.applies(shape) {
            return Ok((raw.len(), raw.to_vec()));
        }
        let mut stored = vec![0; codec.stored_bytes_max(shape)];
        let len = codec.encode_after(shape, raw, self, &mut stored)?;
        let stored = stored.get(..len).ok_or("a codec wrote more than it may")?;
        let mut out = vec![0; shape.raw_bytes()];
        codec.decode_after(shape, stored, self, &mut out)?;
        if codec.exact() && out != raw {
            return Err(format!("level {} lost bits", codec.name()).into());
        }
        Ok((len, out))
    }
}

/// The number that records give a part.
const fn code_of(part: Part) -> PartCode {
    match part {
        Part::Key => PartCode::K,
        Part::Value => PartCode::V,
        Part::Latent => PartCode::Latent,
        Part::Rope => PartCode::Rope,
        Part::Hidden => PartCode::Hidden,
    }
}
