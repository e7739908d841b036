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
//!   E4  Where layer inputs are kept, a layer reads its input back from what is kept, rounded.
//!
//! Not here on purpose: blocks, keys, layouts with pages; those belong to kvtier itself.

use std::hint::black_box;
use std::ops::Range;

use half::{bf16, f16};

use super::config::{CacheDtype, ModelConfig, Part, PartSpec};
use super::error::EngineError;
use super::prepared::{Prepared, widen};

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
        let hidden_spec = PartSpec {
            part: Part::Hidden,
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

    /// True when every one of `tokens` is there in this part. A range out of the cache is not.
    pub fn has(&self, layer: usize, part: Part, tokens: &Range<usize>) -> bool {
        let cache = self.part(layer, part);
        cache.is_ok_and(|cache| cache.readable(layer, tokens).is_ok())
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
        if let Some(prepared) = prepared {
            prepared.lower(tokens.start);
        }
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
        (0..self.layers.len()).try_for_each(|layer| self.check_layer(layer, &(0..end)))
    }

    /// Succeeds when what `layer` attends to holds all of `tokens`.
    pub(super) fn check_layer(
        &self,
        layer: usize,
        tokens: &Range<usize>,
    ) -> Result<(), EngineError> {
        let parts = self.layers.get(layer).map(|store| &store.parts);
        let mut parts = parts.into_iter().flatten();
        parts.try_for_each(|cache| cache.readable(layer, tokens))
    }

    pub(super) fn layer_mut(&mut self, layer: usize) -> Option<LayerCache<'_>> {
        let dtype = self.dtype;
        self.layers
            .get_mut(layer)
            .map(|store| LayerCache { store, dtype })
    }

    /// Keeps what enters `layer`, if that is wanted, and leaves in `values` what was kept (E4).
    pub(super) fn keep_input(&mut self, layer: usize, start: usize, values: &mut [f32]) {
        let dtype = self.dtype;
        let hidden = self.hidden.as_mut();
        if let Some(cache) = hidden.and_then(|layers| layers.get_mut(layer)) {
            let tokens = cache.put(dtype, start, values);
            let kept = cache.run(&tokens).as_chunks().0;
            let kept = kept.iter().zip(values);
            kept.for_each(|(bytes, value)| *value = widen(dtype, *bytes));
        }
    }

    /// What enters `layer` for `tokens`, as it was kept or restored.
    pub(super) fn input(
        &self,
        layer: usize,
        tokens: &Range<usize>,
    ) -> Result<Vec<f32>, EngineError> {
        let cache = self.part(layer, Part::Hidden)?;
        cache.readable(layer, tokens)?;
        let kept = cache.run(tokens).as_chunks().0.iter();
        Ok(kept.map(|bytes| widen(self.dtype, *bytes)).collect())
    }

    fn part(&self, layer: usize, part: Part) -> Result<&PartCache, EngineError> {
        if part == Part::Hidden {
            let hidden = self.hidden.as_ref().ok_or(EngineError::NoHidden)?;
            return hidden.get(layer).ok_or(EngineError::NoSuchPart {
                layer,
                part,
                layers: self.layers.len(),
            });
        }
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
    ) -> Result<(&mut PartCache, Option<&mut Prepared>), EngineError> {
        let layers = self.layers.len();
        let missing = EngineError::NoSuchPart {
            layer,
            part,
            layers,
        };
        if part == Part::Hidden {
            let hidden = self.hidden.as_mut().ok_or(EngineError::NoHidden)?;
            return Ok((hidden.get_mut(layer).ok_or(missing)?, None));
        }
        let Some(LayerStore { parts, prepared }) = self.layers.get_mut(layer) else {
            return Err(missing);
        };
        let found = parts.iter_mut().find(|cache| cache.spec.part == part);
        Ok((found.ok_or(missing)?, Some(prepared)))
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

    /// Rounds and stores `values` from token `start` on; returns the tokens they are of.
    fn put(&mut self, dtype: CacheDtype, start: usize, values: &[f32]) -> Range<usize> {
        let tokens = start..start + values.len() / self.spec.elements();
        narrow(dtype, values, self.run_mut(&tokens));
        self.mark(tokens.clone(), true);
        tokens
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
