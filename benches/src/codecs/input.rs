//! Input of the suite `codecs`: real KV from safetensors files, a committed sample, or seeded.
//!
//! Upstairs:   [`super`].
//! Downstairs: files that the user names; the format's header is JSON behind an 8-byte length.
//!
//! Not here on purpose: no memory map and no library for the format. The files are small, and
//! three fields of the header are all that is needed.

use std::path::{Path, PathBuf};

use kvtier_kernels::PartShape;
use kvtier_kernels::shape::ShapeError;
use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::element::Element;
use kvtier_proto::layout::PartCode;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Longest header that is read. Unit: bytes. Real ones have a few kilobytes.
const HEADER_BYTES_MAX: u64 = 16 << 20;

/// Parts of one size.
pub(super) struct Input {
    /// Middle of the row names: `kv`, `hidden`, `synthetic`, ....
    pub(super) name: String,
    /// What all parts have in common.
    pub(super) shape: PartShape,
    /// The shape of each part, with its layer and tensor where these are known.
    pub(super) shapes: Vec<PartShape>,
    pub(super) parts: Vec<Vec<u8>>,
}

impl Input {
    /// Parts of which nothing but their shape is known.
    fn plain(name: &str, shape: PartShape, parts: Vec<Vec<u8>>) -> Self {
        Self {
            name: name.to_owned(),
            shape,
            shapes: vec![shape; parts.len()],
            parts,
        }
    }

    pub(super) fn raw_bytes(&self) -> usize {
        self.parts.len() * self.shape.raw_bytes()
    }

    /// The same values as fp16, named `..._f16`; `None` for what is not bf16.
    ///
    /// A bf16 has three bits of mantissa less. Zeros there would make fp16 look as if it shrank
    /// like bf16, to coders that see bytes: so the three are drawn, seeded.
    pub(super) fn as_f16(&self) -> Result<Option<Self>, ShapeError> {
        if self.shape.element() != Element::Bf16 {
            return Ok(None);
        }
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let mut half = |bytes: &[u8; 2]| {
            let value = half::f16::from_f32(half::bf16::from_le_bytes(*bytes).to_f32());
            let drawn = if value.is_normal() {
                random.random_range(0..8)
            } else {
                0
            };
            (value.to_bits() | drawn).to_le_bytes()
        };
        let mut convert = |part: &Vec<u8>| part.as_chunks().0.iter().flat_map(&mut half).collect();
        let of = |shape: &PartShape| {
            PartShape::new(Element::F16, shape.tokens(), shape.width())?
                .of_layer(shape.layer(), shape.code())
                .among_layers(shape.layers())
                .with_heads(shape.heads(), shape.order())
        };
        Ok(Some(Self {
            name: format!("{}_f16", self.name),
            shape: of(&self.shape)?,
            shapes: self.shapes.iter().map(of).collect::<Result<_, _>>()?,
            parts: self.parts.iter().map(&mut convert).collect(),
        }))
    }
}

/// The sample that is committed beside the codecs: K and V of two layers, 128 tokens.
pub(super) fn sample() -> Result<Input, String> {
    const SAMPLE: &[u8] = include_bytes!("../../../kernels/tests/data/prose-kv.bf16");
    let shape = PartShape::new(Element::Bf16, 128, 192).map_err(|e| e.to_string())?;
    let parts = SAMPLE
        .chunks_exact(shape.raw_bytes())
        .map(<[u8]>::to_vec)
        .collect();
    Ok(Input::plain("kv", shape, parts))
}

/// Seeded bf16 of the size of an 8-billion-parameter model's part: 256 tokens, 8 heads of 128.
///
/// Normally distributed with a scale a channel, so that exponents fill a few values, as they do
/// in KV. It is no KV: ratios on it say nothing about a model.
pub(super) fn synthetic(parts: usize) -> Result<Input, String> {
    let (tokens, width) = (256, 1024);
    let shape = PartShape::new(Element::Bf16, tokens, width).map_err(|e| e.to_string())?;
    let mut random = ChaCha8Rng::seed_from_u64(2);
    let parts = (0..parts)
        .map(|_| {
            let scales: Vec<f32> = (0..width)
                .map(|_| random.random_range(-2.0_f32..2.0).exp2())
                .collect();
            let row = scales.iter().cycle().take((tokens * width) as usize);
            let value = |scale| (0..12).map(|_| random.random::<f32>() - 0.5).sum::<f32>() * scale;
            row.map(value)
                .flat_map(|v| [v.to_le_bytes()[2], v.to_le_bytes()[3]])
                .collect()
        })
        .collect();
    Ok(Input::plain("synthetic", shape, parts))
}

/// All float tensors `[layers, tokens, ...]` of a safetensors file, or of every one in a folder.
///
/// Tensors `K` and `V` are named `kv`, others by their own name; one input a name and shape.
pub(super) fn from_path(path: &Path) -> Result<Vec<Input>, String> {
    let mut inputs: Vec<Input> = Vec::new();
    for file in files(path)? {
        let at = |problem: String| format!("{}: {problem}", file.display());
        let bytes = std::fs::read(&file).map_err(|e| at(e.to_string()))?;
        add_tensors(&bytes, &mut inputs).map_err(at)?;
    }
    match inputs.is_empty() {
        true => Err(format!(
            "{}: no bf16, f16 or f32 tensor [layers, tokens, ...]",
            path.display()
        )),
        false => Ok(inputs),
    }
}

fn files(path: &Path) -> Result<Vec<PathBuf>, String> {
    let problem = |e: std::io::Error| format!("{}: {e}", path.display());
    if !std::fs::metadata(path).map_err(problem)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(problem)? {
        let file = entry.map_err(problem)?.path();
        if file
            .extension()
            .is_some_and(|extension| extension == "safetensors")
        {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

fn add_tensors(bytes: &[u8], inputs: &mut Vec<Input>) -> Result<(), String> {
    let not = || "is no safetensors file".to_owned();
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or_else(not)?;
    let length = u64::from_le_bytes(*length);
    let length = usize::try_from(length.min(HEADER_BYTES_MAX)).map_err(|_| not())?;
    let (header, data) = rest.split_at_checked(length).ok_or_else(not)?;
    let header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(header).map_err(|e| format!("header of the file: {e}"))?;
    for (name, tensor) in &header {
        let Some((shape, range)) = part_shape(tensor) else {
            continue;
        };
        let data = data
            .get(range)
            .ok_or_else(|| format!("tensor {name} ends behind the file"))?;
        let (name, code) = match &name[..] {
            "K" => ("kv", PartCode::K),
            "V" => ("kv", PartCode::V),
            _ => (&name[..], PartCode::Opaque),
        };
        let parts: Vec<_> = data
            .chunks_exact(shape.raw_bytes())
            .map(<[u8]>::to_vec)
            .collect();
        let layers = u32::try_from(parts.len()).map_err(|_| not())?;
        let shapes = (0..layers).map(|layer| shape.of_layer(layer, code).among_layers(layers));
        let shape = shape.of_layer(0, PartCode::Opaque);
        match inputs
            .iter_mut()
            .find(|input| input.name == name && input.shape == shape)
        {
            Some(input) => {
                input.shapes.extend(shapes);
                input.parts.extend(parts);
            }
            None => {
                inputs.push(Input {
                    name: name.to_owned(),
                    shape,
                    shapes: shapes.collect(),
                    parts,
                });
            }
        }
    }
    Ok(())
}

/// Shape of one layer of a float tensor `[layers, tokens, ...]`; `None` for any other.
fn part_shape(tensor: &serde_json::Value) -> Option<(PartShape, std::ops::Range<usize>)> {
    let element = match tensor.get("dtype")?.as_str()? {
        "BF16" => Element::Bf16,
        "F16" => Element::F16,
        "F32" => Element::F32,
        _ => return None,
    };
    let number = |value: &serde_json::Value| usize::try_from(value.as_u64()?).ok();
    let numbers = |field| {
        tensor
            .get(field)?
            .as_array()?
            .iter()
            .map(number)
            .collect::<Option<Vec<_>>>()
    };
    let (sizes, offsets) = (numbers("shape")?, numbers("data_offsets")?);
    let [_, tokens, width @ ..] = &sizes[..] else {
        return None;
    };
    let width = width
        .iter()
        .try_fold(1_usize, |all, size| all.checked_mul(*size))?;
    let (tokens, width) = (u32::try_from(*tokens).ok()?, u32::try_from(width).ok()?);
    let [start, end] = offsets[..] else {
        return None;
    };
    let shape = PartShape::new(element, tokens, width).ok()?;
    let shape = match sizes[..] {
        // Heads come before their values.
        [_, _, heads, _] => shape.with_heads(u32::try_from(heads).ok()?, PartOrder::TokenMajor),
        _ => Ok(shape),
    };
    Some((shape.ok()?, start..end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let length = (header.len() as u64).to_le_bytes();
        [&length, header.as_bytes(), data].concat()
    }

    #[test]
    fn tensors_become_one_part_a_layer_and_others_are_left_out() {
        let header = r#"{
            "K": {"dtype": "BF16", "shape": [2, 3, 1, 2], "data_offsets": [4, 28]},
            "V": {"dtype": "BF16", "shape": [2, 3, 1, 2], "data_offsets": [28, 52]},
            "token_ids": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}
        }"#;
        let data: Vec<u8> = (0..52).collect();
        let mut inputs = Vec::new();
        add_tensors(&file(header, &data), &mut inputs).unwrap();
        let [kv] = &inputs[..] else {
            panic!("{} inputs", inputs.len())
        };
        assert_eq!(
            (kv.name.as_str(), kv.shape.tokens(), kv.shape.width()),
            ("kv", 3, 2)
        );
        let parts: Vec<&[u8]> = [4..16, 16..28, 28..40, 40..52].map(|at| &data[at]).to_vec();
        assert_eq!(kv.parts, parts);
        let told: Vec<_> = kv
            .shapes
            .iter()
            .map(|s| (s.layer(), s.code(), s.layers()))
            .collect();
        let want = [PartCode::K, PartCode::V].map(|code| [(0, code, 2), (1, code, 2)]);
        assert_eq!(told, want.as_flattened());
    }

    #[test]
    fn files_that_are_cut_or_no_safetensors_are_refused() {
        let header = r#"{"K": {"dtype": "F32", "shape": [1, 2, 2], "data_offsets": [0, 16]}}"#;
        let mut inputs = Vec::new();
        let problem = add_tensors(&file(header, &[0; 15]), &mut inputs).unwrap_err();
        assert_eq!(problem, "tensor K ends behind the file");
        for bytes in [&b""[..], b"PK", &[0xff; 64]] {
            assert_eq!(
                add_tensors(bytes, &mut inputs).unwrap_err(),
                "is no safetensors file"
            );
        }
        assert!(add_tensors(&file("[]", &[]), &mut inputs).is_err());
    }

    #[test]
    fn values_stay_the_same_as_fp16_but_for_bits_that_bf16_has_not() {
        let input = sample().unwrap();
        let halves = input.as_f16().unwrap().unwrap();
        assert_eq!(
            (&halves.name[..], halves.shape.element()),
            ("kv_f16", Element::F16)
        );
        for (part, halves) in input.parts.iter().zip(&halves.parts) {
            for (value, half) in part.as_chunks().0.iter().zip(halves.as_chunks().0) {
                let value = half::bf16::from_le_bytes(*value).to_f32();
                let half = half::f16::from_le_bytes(*half).to_f32();
                assert!(
                    (value - half).abs() <= value.abs() / 128.0 + 1e-7,
                    "{value} {half}"
                );
            }
        }
        assert!(halves.as_f16().unwrap().is_none());
    }

    #[test]
    fn inputs_that_need_no_file_have_whole_parts() {
        for input in [sample().unwrap(), synthetic(2).unwrap()] {
            let whole = input
                .parts
                .iter()
                .all(|part| part.len() == input.shape.raw_bytes());
            assert!(whole && !input.parts.is_empty(), "{}", input.name);
        }
    }
}
