//! The file of a sample: K and V of a prefix as safetensors, `[layers, tokens, heads, dim]` each.
//!
//! Upstairs:   [`super`] hands over block after block.
//! Downstairs: a file.
//!
//! A block has all layers of a few tokens, the file has all tokens of a layer side by side: each
//! part is written to its own place, and no more than a block is in memory.
//!
//! Invariants kept here
//!   F1  A sample appears under its name whole or not at all.

use std::borrow::Cow;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::layout::{BlockLayout, PartCode};
use kvtier_proto::{Bytes, Element, LayerSpec, ModelDescriptor};
use serde_json::json;

use crate::tier::calibrate::FILE_BYTES_MAX;

/// Alignment of the data. Unit: bytes.
const ALIGNMENT: usize = 8;

/// What every layer of a model stores of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    element: Element,
    order: PartOrder,
    layers: u32,
    k: Heads,
    v: Heads,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Heads {
    heads: u32,
    dim: u32,
}

impl Shape {
    /// The shape of the K and V of a model.
    ///
    /// # Errors
    /// Why the model has none that `calibrate` reads, in a sentence.
    pub(super) fn of(model: &ModelDescriptor) -> Result<Self, String> {
        let element = model.element;
        if !matches!(element, Element::Bf16 | Element::F16 | Element::F32) {
            let element = element.as_str();
            return Err(format!(
                "the model's elements are {element}; accepted: bf16, f16, f32"
            ));
        }
        let mut shape: Option<Self> = None;
        for (layer, spec) in model.layers.iter().enumerate() {
            let own = match *spec {
                LayerSpec::Attention {
                    kv_heads: heads,
                    k_dim,
                    v_dim,
                    sliding_window: _,
                } => Ok([k_dim, v_dim].map(|dim| Heads { heads, dim })),
                LayerSpec::Latent { .. } => Err("latents"),
                LayerSpec::SharesWith(_) => Err("nothing of its own"),
                LayerSpec::State { .. } => Err("a state"),
                LayerSpec::Opaque { .. } => Err("bytes that only its engine understands"),
            };
            let [k, v] = own.map_err(|what| {
                format!("layer {layer} stores {what}; accepted: layers that all store K and V")
            })?;
            let own = Self {
                element,
                order: model.order,
                layers: u32::try_from(model.layers.len()).unwrap_or(u32::MAX),
                k,
                v,
            };
            if *shape.get_or_insert(own) != own {
                return Err(format!(
                    "layer {layer} has other heads than layer 0; accepted: layers that are alike"
                ));
            }
        }
        shape.ok_or_else(|| String::from("the model has no layers"))
    }

    fn heads(&self, code: PartCode) -> Heads {
        match code {
            PartCode::V => self.v,
            _ => self.k,
        }
    }

    /// Bytes of a token in one layer.
    fn row(&self, code: PartCode) -> u64 {
        let Heads { heads, dim } = self.heads(code);
        u64::from(heads) * u64::from(dim) * self.element.bytes() as u64
    }

    /// Bytes of a tensor of so many tokens.
    fn tensor(&self, code: PartCode, tokens: u32) -> u64 {
        u64::from(self.layers) * u64::from(tokens) * self.row(code)
    }

    /// What a file of so many tokens begins with.
    fn header(&self, tokens: u32) -> Vec<u8> {
        let dtype = self.element.as_str().to_ascii_uppercase();
        let [k, v] = [PartCode::K, PartCode::V].map(|code| {
            let Heads { heads, dim } = self.heads(code);
            ([self.layers, tokens, heads, dim], self.tensor(code, tokens))
        });
        let (end, all) = (k.1, k.1 + v.1);
        let header = json!({
            "K": { "dtype": dtype, "shape": k.0, "data_offsets": [0, end] },
            "V": { "dtype": dtype, "shape": v.0, "data_offsets": [end, all] },
        });
        let mut header = header.to_string().into_bytes();
        header.resize(header.len().next_multiple_of(ALIGNMENT), b' ');
        [&(header.len() as u64).to_le_bytes()[..], &header].concat()
    }
}

/// A file that is being written, beside its name.
#[derive(Debug)]
pub(super) struct Sample {
    path: PathBuf,
    beside: PathBuf,
    file: File,
    shape: Shape,
    tokens: u32,
    /// Bytes before the data.
    lead: u64,
}

impl Sample {
    /// Begins a file for so many tokens.
    ///
    /// # Errors
    /// Why it cannot be, in a sentence.
    pub(super) fn create(path: &Path, shape: Shape, tokens: u32) -> Result<Self, String> {
        let header = shape.header(tokens);
        let lead = header.len() as u64;
        let data = shape.tensor(PartCode::K, tokens) + shape.tensor(PartCode::V, tokens);
        let all = Bytes(lead + data);
        if all > FILE_BYTES_MAX {
            return Err(format!(
                "the sample would have {all}; accepted: at most {FILE_BYTES_MAX}. Export a \
                 shorter prefix"
            ));
        }
        let mut beside = path.as_os_str().to_owned();
        beside.push(".part");
        let beside = PathBuf::from(beside);
        let file = File::create(&beside).map_err(|error| failed(&beside, &error))?;
        let sample = Self {
            path: path.to_owned(),
            beside,
            file,
            shape,
            tokens,
            lead,
        };
        sample.write(0, &header)?;
        Ok(sample)
    }

    /// Writes the payload of a block whose first token is `first`.
    ///
    /// # Errors
    /// Why it cannot be, in a sentence.
    pub(super) fn put(
        &mut self,
        layout: &BlockLayout,
        first: u32,
        payload: &[u8],
    ) -> Result<(), String> {
        for part in layout.parts() {
            let bytes = payload.get(part.offset..part.offset + part.len);
            let size = (part.rows as usize, part.heads as usize);
            let bytes = token_major(bytes.unwrap_or_default(), self.shape.order, size);
            let before = match part.code {
                PartCode::V => self.shape.tensor(PartCode::K, self.tokens),
                _ => 0,
            };
            let row = u64::from(part.layer) * u64::from(self.tokens) + u64::from(first);
            let at = self.lead + before + row * self.shape.row(part.code);
            self.write(at, &bytes)?;
        }
        Ok(())
    }

    /// Gives the file its name, and says how large it is. Unit: bytes.
    ///
    /// # Errors
    /// Why it cannot be, in a sentence.
    pub(super) fn finish(self) -> Result<u64, String> {
        let len = self.file.metadata().map(|file| file.len());
        let named = std::fs::rename(&self.beside, &self.path).and(len);
        named.map_err(|error| failed(&self.path, &error))
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), String> {
        let written = self.file.write_all_at(bytes, at);
        written.map_err(|error| failed(&self.beside, &error))
    }
}

impl Drop for Sample {
    fn drop(&mut self) {
        // Once it has its name there is nothing beside it; a piece is of no use.
        let _ = std::fs::remove_file(&self.beside);
    }
}

/// The bytes of a part of so many tokens and heads, token after token.
fn token_major(part: &[u8], order: PartOrder, (tokens, heads): (usize, usize)) -> Cow<'_, [u8]> {
    if order == PartOrder::TokenMajor {
        return Cow::Borrowed(part);
    }
    let len = part.len() / (tokens * heads).max(1);
    let mut turned = Vec::with_capacity(part.len());
    for token in 0..tokens {
        for head in 0..heads {
            let from = (head * tokens + token) * len;
            turned.extend_from_slice(part.get(from..from + len).unwrap_or_default());
        }
    }
    Cow::Owned(turned)
}

fn failed(path: &Path, error: &std::io::Error) -> String {
    format!("{} cannot be written: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use kvtier_proto::PayloadKind;
    use kvtier_proto::descriptor::Shard;

    use super::*;
    use crate::tier::calibrate::Document;

    fn model(order: PartOrder) -> ModelDescriptor {
        let layer = LayerSpec::Attention {
            kv_heads: 2,
            k_dim: 3,
            v_dim: 1,
            sliding_window: 0,
        };
        ModelDescriptor {
            model: "tiny".to_owned(),
            revision: String::new(),
            weights_fingerprint: Vec::new(),
            adapter: String::new(),
            element: Element::F16,
            layers: vec![layer; 2],
            d_model: 8,
            rope: None,
            block_tokens: 16,
            order,
            shard: Shard::WHOLE,
            k_after_rope: true,
        }
    }

    /// What an engine has at a place: numbers that are all different.
    fn value(code: PartCode, [layer, token, head, at]: [u32; 4]) -> [u8; 2] {
        let number = (((code as u32 * 2 + layer) * 64 + token) * 2 + head) * 4 + at;
        [number.to_le_bytes()[0], number.to_le_bytes()[1]]
    }

    fn payload(layout: &BlockLayout, order: PartOrder, first: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        for part in layout.parts() {
            let (heads, dim) = (part.heads, part.width / part.heads);
            let (outer, inner) = match order {
                PartOrder::TokenMajor => (part.rows, heads),
                PartOrder::HeadMajor => (heads, part.rows),
            };
            for (one, two) in (0..outer).flat_map(|one| (0..inner).map(move |two| (one, two))) {
                let (token, head) = match order {
                    PartOrder::TokenMajor => (one, two),
                    PartOrder::HeadMajor => (two, one),
                };
                for at in 0..dim {
                    bytes.extend(value(part.code, [part.layer, first + token, head, at]));
                }
            }
        }
        bytes
    }

    // Goal: calibration reads what the engine had, in whichever order blocks hold it.
    #[test]
    fn sample_has_every_value_in_its_place_when_blocks_are_of_either_order() {
        for order in [PartOrder::TokenMajor, PartOrder::HeadMajor] {
            let dir = tempfile::tempdir().unwrap();
            let (path, model) = (dir.path().join("one"), model(order));
            let shape = Shape::of(&model).unwrap();
            let mut sample = Sample::create(&path, shape, 21).unwrap();
            for (first, tokens) in [(16, 5), (0, 16)] {
                let layout = BlockLayout::new(&model, PayloadKind::Kv, tokens).unwrap();
                let bytes = payload(&layout, order, first);
                sample.put(&layout, first, &bytes).unwrap();
            }
            assert!(!path.exists(), "it is not whole yet");
            let len = sample.finish().unwrap();
            let bytes = std::fs::read(&path).unwrap();
            assert_eq!(len, bytes.len() as u64);
            let document = Document::parse(&bytes).unwrap();
            assert_eq!((document.tokens(), document.element()), (21, Element::F16));
            for (code, dim) in [(PartCode::K, 3), (PartCode::V, 1)] {
                for layer in 0..2 {
                    let places = (0..21).flat_map(|token| {
                        (0..2).flat_map(move |head| (0..dim).map(move |at| [token, head, at]))
                    });
                    let want: Vec<u8> = places
                        .flat_map(|[token, head, at]| value(code, [layer, token, head, at]))
                        .collect();
                    let got = document.tensor(code).layer_bytes(layer as usize);
                    assert_eq!(got, want, "{order:?} {code:?} of layer {layer}");
                }
            }
        }
    }

    #[test]
    fn sample_that_is_given_up_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let shape = Shape::of(&model(PartOrder::TokenMajor)).unwrap();
        drop(Sample::create(&dir.path().join("one"), shape, 16).unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let problem = Sample::create(&dir.path().join("no/one"), shape, 16).unwrap_err();
        assert!(
            problem.contains("no/one.part cannot be written"),
            "{problem}"
        );
        let problem = Sample::create(&dir.path().join("one"), shape, u32::MAX).unwrap_err();
        assert!(problem.contains("accepted: at most 16 GiB"), "{problem}");
    }

    #[test]
    fn model_without_k_and_v_in_every_layer_is_refused_with_what_it_has() {
        let refused = |change: fn(&mut ModelDescriptor)| {
            let mut model = model(PartOrder::TokenMajor);
            change(&mut model);
            Shape::of(&model).unwrap_err()
        };
        let text = refused(|model| model.element = Element::U8);
        assert!(text.contains("elements are u8; accepted: bf16"), "{text}");
        let text = refused(|model| model.layers[1] = LayerSpec::State { bytes: 8 });
        assert!(text.starts_with("layer 1 stores a state"), "{text}");
        let text = refused(|model| model.layers[1] = LayerSpec::SharesWith(0));
        assert!(
            text.starts_with("layer 1 stores nothing of its own"),
            "{text}"
        );
        let text = refused(|model| {
            model.layers[1] = LayerSpec::Attention {
                kv_heads: 1,
                k_dim: 3,
                v_dim: 1,
                sliding_window: 0,
            };
        });
        assert!(text.starts_with("layer 1 has other heads"), "{text}");
    }
}
