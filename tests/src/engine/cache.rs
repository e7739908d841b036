//! The KV cache of one sequence: bytes in canonical order, open to reading and writing.
//!
//! Upstairs:   `sequence` (compute), the demo and tests (save and restore).
//! Downstairs: nothing.
//!
//! Each part of each layer is one run of bytes, token-major `[tokens, heads, width]`, two bytes a
//! number, little endian: what an engine puts on the wire, and what attention reads here.
//!
//! Invariants kept here
//!   E1  The only copy of keys and values is the stored, rounded one.
//!   C1  A token that was neither computed nor restored can be neither read nor exported.
//!
//! Not here on purpose: blocks, keys, layouts with pages; those belong to kvtier itself.

use std::hint::black_box;
use std::ops::Range;

use half::{bf16, f16};

use super::config::{CacheDtype, ModelConfig, Part, PartSpec};
use super::error::EngineError;
use super::prepared::Prepared;

const PAGE_BYTES: usize = 4096;

/// Keys and values of one sequence, all layers.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerStore>,
    /// Input of every decoder layer, if kept: `[layer][tokens, hidden]`.
    hidden: Option<Vec<PartCache>>,
    dtype: CacheDtype,
    max_tokens: usize,
}

/// One layer: the bytes, and what attention makes of them.
#[derive(Debug)]
struct LayerStore {
    parts: [PartCache; 2],
    prepared: Prepared,
}

#[derive(Debug)]
struct PartCache {
    spec: PartSpec,
    bytes: Vec<u8>,
    filled: Vec<bool>,
}

impl KvCache {
    pub(super) fn new(
        config: &ModelConfig,
        dtype: CacheDtype,
        max_tokens: usize,
        keep_hidden: bool,
    ) -> Self {
        let layers = config
            .layers
            .iter()
            .map(|layer| LayerStore {
                parts: layer.parts().map(|spec| PartCache::new(spec, max_tokens)),
                prepared: Prepared::new(layer, max_tokens),
            })
            .collect();
        // Hidden states have no heads; the part's name only serves error messages.
        let hidden_spec = PartSpec {
            part: Part::Value,
            heads: 1,
            width: config.hidden,
        };
        let hidden = keep_hidden.then(|| {
            config
                .layers
                .iter()
                .map(|_| PartCache::new(hidden_spec, max_tokens))
                .collect()
        });
        Self {
            layers,
            hidden,
            dtype,
            max_tokens,
        }
    }

    /// Tokens the cache has room for.
    pub const fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// How numbers are stored.
    pub const fn dtype(&self) -> CacheDtype {
        self.dtype
    }

    /// Bytes of `tokens` tokens of one part.
    pub fn part_bytes(
        &self,
        layer: usize,
        part: Part,
        tokens: usize,
    ) -> Result<usize, EngineError> {
        Ok(self.part(layer, part)?.spec.bytes() * tokens)
    }

    /// The stored bytes of a run of tokens, borrowed.
    pub fn bytes(
        &self,
        layer: usize,
        part: Part,
        tokens: Range<usize>,
    ) -> Result<&[u8], EngineError> {
        let cache = self.part(layer, part)?;
        cache.readable(layer, &tokens)?;
        Ok(cache.run(&tokens))
    }

    /// Copies the stored bytes of a run of tokens into `into`, which has exactly their size.
    pub fn export(
        &self,
        layer: usize,
        part: Part,
        tokens: Range<usize>,
        into: &mut [u8],
    ) -> Result<(), EngineError> {
        copy_exactly("export", self.bytes(layer, part, tokens)?, into)
    }

    /// Copies the hidden states that entered `layer`, before its norm, into `into`.
    pub fn export_hidden(
        &self,
        layer: usize,
        tokens: Range<usize>,
        into: &mut [u8],
    ) -> Result<(), EngineError> {
        let hidden = self.hidden.as_ref().ok_or(EngineError::NoHidden)?;
        let no_layer = || EngineError::NoSuchPart {
            layer,
            part: Part::Value,
            layers: self.layers.len(),
        };
        let cache = hidden.get(layer).ok_or_else(no_layer)?;
        cache.readable(layer, &tokens)?;
        copy_exactly("export_hidden", cache.run(&tokens), into)
    }

    /// Stores restored bytes. The caller (`Sequence`) has checked that they are not in use.
    pub(super) fn import(
        &mut self,
        layer: usize,
        part: Part,
        tokens: Range<usize>,
        from: &[u8],
    ) -> Result<(), EngineError> {
        let (cache, prepared) = self.part_mut(layer, part)?;
        cache.in_room("import", &tokens)?;
        prepared.lower(tokens.start);
        copy_exactly_from(from, cache.run_mut(&tokens))?;
        cache.mark(tokens, true);
        Ok(())
    }

    /// Forgets everything from token `from` on.
    pub(super) fn forget(&mut self, from: usize) {
        let max_tokens = self.max_tokens;
        for layer in &mut self.layers {
            layer.prepared.lower(from);
            layer
                .parts
                .iter_mut()
                .for_each(|part| part.mark(from..max_tokens, false));
        }
        self.hidden
            .iter_mut()
            .flatten()
            .for_each(|part| part.mark(from..max_tokens, false));
    }

    /// Succeeds when every part of every layer holds all tokens below `end`.
    pub(super) fn check_whole(&self, end: usize) -> Result<(), EngineError> {
        for (layer, store) in self.layers.iter().enumerate() {
            for cache in &store.parts {
                cache.readable(layer, &(0..end))?;
            }
        }
        Ok(())
    }

    pub(super) fn layer_mut(&mut self, layer: usize) -> Option<LayerCache<'_>> {
        let dtype = self.dtype;
        self.layers
            .get_mut(layer)
            .map(|store| LayerCache { store, dtype })
    }

    pub(super) fn put_hidden(&mut self, layer: usize, start: usize, values: &[f32]) {
        let dtype = self.dtype;
        if let Some(cache) = self
            .hidden
            .as_mut()
            .and_then(|layers| layers.get_mut(layer))
        {
            cache.put(dtype, start, values);
        }
    }

    fn part(&self, layer: usize, part: Part) -> Result<&PartCache, EngineError> {
        let parts = self.layers.get(layer).map(|store| &store.parts);
        let found = parts.and_then(|parts| parts.iter().find(|cache| cache.spec.part == part));
        found.ok_or(EngineError::NoSuchPart {
            layer,
            part,
            layers: self.layers.len(),
        })
    }

    fn part_mut(
        &mut self,
        layer: usize,
        part: Part,
    ) -> Result<(&mut PartCache, &mut Prepared), EngineError> {
        let layers = self.layers.len();
        let missing = EngineError::NoSuchPart {
            layer,
            part,
            layers,
        };
        let Some(LayerStore { parts, prepared }) = self.layers.get_mut(layer) else {
            return Err(missing);
        };
        let found = parts.iter_mut().find(|cache| cache.spec.part == part);
        Ok((found.ok_or(missing)?, prepared))
    }
}

/// One layer of the cache, as its attention sees it.
#[derive(Debug)]
pub(super) struct LayerCache<'a> {
    store: &'a mut LayerStore,
    dtype: CacheDtype,
}

impl LayerCache<'_> {
    /// Rounds and stores `values` for the tokens from `start` on: first part, second part.
    pub(super) fn put(&mut self, start: usize, first: &[f32], second: &[f32]) {
        self.store.prepared.lower(start);
        let [a, b] = &mut self.store.parts;
        a.put(self.dtype, start, first);
        b.put(self.dtype, start, second);
    }

    /// Everything stored below `end`, ready for attention.
    pub(super) fn prepare(&mut self, end: usize) -> &Prepared {
        let parts = self.store.parts.each_ref();
        let parts = parts.map(|part| (part.bytes.as_slice(), part.spec.bytes()));
        self.store.prepared.raise(end, self.dtype, parts);
        &self.store.prepared
    }
}

impl PartCache {
    fn new(spec: PartSpec, max_tokens: usize) -> Self {
        let mut bytes = vec![0; spec.bytes() * max_tokens];
        // Serving engines own their cache before the first request; faulting pages in during a
        // restore would be charged to the restore.
        for page in bytes.iter_mut().step_by(PAGE_BYTES) {
            *page = black_box(0);
        }
        Self {
            spec,
            bytes,
            filled: vec![false; max_tokens],
        }
    }

    fn put(&mut self, dtype: CacheDtype, start: usize, values: &[f32]) {
        let tokens = start..start + values.len() / self.spec.elements();
        narrow(dtype, values, self.run_mut(&tokens));
        self.mark(tokens, true);
    }

    fn mark(&mut self, tokens: Range<usize>, filled: bool) {
        if let Some(flags) = self.filled.get_mut(tokens) {
            flags.fill(filled);
        }
    }

    fn in_room(&self, what: &'static str, tokens: &Range<usize>) -> Result<(), EngineError> {
        if tokens.start <= tokens.end && tokens.end <= self.filled.len() {
            return Ok(());
        }
        Err(EngineError::Tokens {
            what,
            got: tokens.clone(),
            accepted: 0..self.filled.len(),
        })
    }

    fn readable(&self, layer: usize, tokens: &Range<usize>) -> Result<(), EngineError> {
        self.in_room("read", tokens)?;
        let flags = self.filled.get(tokens.clone()).unwrap_or(&[]);
        match flags.iter().position(|filled| !filled) {
            None => Ok(()),
            Some(hole) => {
                let token = tokens.start + hole;
                Err(EngineError::Hole {
                    layer,
                    part: self.spec.part,
                    token,
                })
            }
        }
    }

    /// The bytes of `tokens`; callers have checked the range or just computed it.
    #[expect(
        clippy::indexing_slicing,
        reason = "out of range is a bug here, never an input"
    )]
    fn run(&self, tokens: &Range<usize>) -> &[u8] {
        let size = self.spec.bytes();
        &self.bytes[tokens.start * size..tokens.end * size]
    }

    #[expect(
        clippy::indexing_slicing,
        reason = "out of range is a bug here, never an input"
    )]
    fn run_mut(&mut self, tokens: &Range<usize>) -> &mut [u8] {
        let size = self.spec.bytes();
        &mut self.bytes[tokens.start * size..tokens.end * size]
    }
}

fn copy_exactly(what: &'static str, from: &[u8], into: &mut [u8]) -> Result<(), EngineError> {
    if from.len() != into.len() {
        return Err(EngineError::BufferSize {
            what,
            got: into.len(),
            expected: from.len(),
        });
    }
    into.copy_from_slice(from);
    Ok(())
}

fn copy_exactly_from(from: &[u8], into: &mut [u8]) -> Result<(), EngineError> {
    if from.len() != into.len() {
        let (got, expected) = (from.len(), into.len());
        return Err(EngineError::BufferSize {
            what: "import",
            got,
            expected,
        });
    }
    into.copy_from_slice(from);
    Ok(())
}

/// Rounds to the nearest stored number, ties to even.
fn narrow(dtype: CacheDtype, values: &[f32], bytes: &mut [u8]) {
    let (places, _) = bytes.as_chunks_mut::<{ CacheDtype::BYTES }>();
    for (place, value) in places.iter_mut().zip(values) {
        *place = match dtype {
            CacheDtype::Bf16 => bf16::from_f32(*value).to_le_bytes(),
            CacheDtype::F16 => f16::from_f32(*value).to_le_bytes(),
        };
    }
}
