//! What fuzz targets are made of, and the bodies of this package's own.
//!
//! Upstairs:   `fuzz/` runs every package's targets under libFuzzer; `tests/tests/corpus.rs` runs
//!             the same bodies over the committed corpus, with every `cargo test`.
//! Downstairs: the decoders.
//!
//! A body takes any bytes and panics when a promise is broken. Where a checksum keeps changed
//! bytes out, the body mends it in a copy and tries that as well, so that the checks behind it are
//! reached. Seeds are valid encodings, from which the corpus is made.
//!
//! Not here on purpose: no mutation and no files; those who run the bodies have their own.

pub use prost::Message;
use strum::IntoEnumIterator;

use crate::descriptor::{LayerSpec, ModelDescriptor, PartOrder, Rope, Shard};
use crate::element::Element;
use crate::key::BlockKey;
use crate::layout::BlockLayout;
use crate::limits::{BLOCK_BYTES_MAX, KEYS_PER_CALL_MAX, PARTS_MAX};
use crate::reader::ReaderSpec;
use crate::region::{Handover, Piece, RegionGeometry};
use crate::units::Bytes;
use crate::v1;
use crate::vocabulary::{Miss, PayloadKind};
use crate::wire::{WireError, keys_from_wire};

/// One decoder, or several that belong together.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Name of the target and of its folder in `fuzz/corpus`.
    pub name: &'static str,
    /// Panics when a promise is broken. Answers for any bytes.
    pub run: fn(&[u8]),
    /// Inputs worth starting from.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// What the body may allocate in all beside [`Target::GROWTH`] for each byte of its input: a
    /// decoder that believes a length would take more. Unit: bytes.
    pub allocates: usize,
}

impl Target {
    /// What a body may allocate in all for each byte of its input. Unit: bytes.
    pub const GROWTH: usize = 512;

    /// A target that may allocate 1 MiB beside what its input accounts for.
    pub const fn new(name: &'static str, run: fn(&[u8]), seeds: fn() -> Vec<Vec<u8>>) -> Self {
        let allocates = 1 << 20;
        Self {
            name,
            run,
            seeds,
            allocates,
        }
    }

    /// The same, and so many bytes that the body takes for itself.
    #[must_use]
    pub const fn allocating(mut self, bytes: usize) -> Self {
        self.allocates += bytes;
        self
    }
}

/// Targets of this package.
pub const TARGETS: [Target; 4] = [
    Target::new("model_descriptor", model_descriptor, descriptor_seeds),
    Target::new("wire_values", wire_values, wire_seeds),
    Target::new("text_values", text_values, text_seeds),
    Target::new("region_geometry", region_geometry, geometry_seeds).allocating(4 << 20),
];

/// Longest text of a refusal. It travels in a header of the reply, whose size is bounded too.
const REFUSAL_BYTES_MAX: usize = 8192;

fn refused(problem: &WireError) {
    let text = problem.to_string();
    assert!(text.contains("accepted: "), "no way out is named: {text}");
    let len = text.len();
    assert!(
        len <= REFUSAL_BYTES_MAX,
        "a refusal of {len} bytes: {problem:?}"
    );
}

/// A descriptor is refused by name, or lays out every block of it within the limits (F1, F2, B1).
fn model_descriptor(data: &[u8]) {
    let Ok(wire) = v1::ModelDescriptor::decode(data) else {
        return;
    };
    let model = match ModelDescriptor::try_from(&wire) {
        Ok(model) => model,
        Err(problem) => return refused(&problem),
    };
    assert_eq!(model.validate(), Vec::new(), "what was taken is not usable");
    let back = v1::ModelDescriptor::from(&model);
    assert_eq!(ModelDescriptor::try_from(&back).as_ref(), Ok(&model));
    let other = ModelDescriptor {
        d_model: model.d_model ^ 1,
        ..model.clone()
    };
    assert_ne!(model.fingerprint(), other.fingerprint());
    for kind in PayloadKind::iter() {
        for tokens in [1, model.block_tokens / 2 + 1, model.block_tokens] {
            match BlockLayout::new(&model, kind, tokens) {
                Ok(layout) => laid_out(&layout, kind, tokens),
                Err(problem) => {
                    let must = [PayloadKind::Kv, PayloadKind::Hidden].contains(&kind);
                    assert!(!must, "{kind:?} of {tokens} tokens: {problem}");
                }
            }
        }
        assert!(BlockLayout::new(&model, kind, 0).is_err());
        assert!(BlockLayout::new(&model, kind, model.block_tokens + 1).is_err());
    }
}

fn laid_out(layout: &BlockLayout, kind: PayloadKind, tokens: u32) {
    assert_eq!((layout.kind(), layout.tokens()), (kind, tokens));
    assert!((1..=PARTS_MAX).contains(&layout.parts().len()));
    let mut end = 0;
    for part in layout.parts() {
        assert_eq!(part.offset, end, "{part:?}");
        let values = u64::from(part.rows) * u64::from(part.width);
        let bytes = values * part.element.bytes() as u64;
        assert_eq!(part.len as u64, bytes, "{part:?}");
        assert!(part.len > 0 && part.width.is_multiple_of(part.heads));
        end += part.len;
    }
    // A few: each is looked for from the first on.
    for part in layout.parts().iter().take(8) {
        assert_eq!(layout.part(part.layer, part.code), Some(part));
        let page = layout.page(part.layer).unwrap_or_default();
        assert!(page.start <= part.offset && part.offset + part.len <= page.end);
    }
    assert_eq!(layout.payload_len(), end);
    assert!(end as u64 <= BLOCK_BYTES_MAX.get());
}

/// Keys, kinds and reasons: each is exactly what was sent, or refused.
fn wire_values(data: &[u8]) {
    if let Ok(wire) = v1::ReaderSpec::decode(data) {
        match ReaderSpec::from_wire(Some(&wire), &model()) {
            Ok(reader) => assert_eq!(v1::ReaderSpec::from(&reader), wire),
            Err(problem) => refused(&problem),
        }
    }
    let Ok(asked) = v1::LookupRequest::decode(data) else {
        return;
    };
    match keys_from_wire("keys", &asked.keys) {
        Ok(keys) => {
            assert!((1..=KEYS_PER_CALL_MAX).contains(&keys.len()));
            assert!(keys.iter().map(|key| &key.0[..]).eq(asked.keys.iter()));
        }
        Err(problem) => refused(&problem),
    }
    let kind = v1::PayloadKind::try_from(asked.kind);
    match PayloadKind::try_from(kind.unwrap_or_default()) {
        Ok(kind) => {
            assert_eq!(v1::PayloadKind::from(kind) as i32, asked.kind);
            let number = u8::try_from(asked.kind).unwrap_or_default();
            assert_eq!(PayloadKind::from_number(number), Some(kind));
        }
        Err(problem) => refused(&problem),
    }
    if let Ok(reason) = v1::MissReason::try_from(asked.kind)
        && let Ok(miss) = Miss::try_from(reason)
    {
        assert_eq!(v1::MissReason::from(miss), reason);
    }
}

/// A geometry is refused by name, or every byte of its slots has one place inside (Z1, Z2).
fn region_geometry(data: &[u8]) {
    for byte in data.iter().take(4) {
        let answer = Handover::from_byte(*byte);
        assert!(answer.is_none_or(|answer| answer as u8 == *byte));
    }
    let Ok(wire) = v1::RegisterRegionRequest::decode(data) else {
        return;
    };
    let geometry = match RegionGeometry::from_wire(wire.geometry.as_ref()) {
        Ok(geometry) => geometry,
        Err(problem) => return refused(&problem),
    };
    assert_eq!(Some(v1::RegionGeometry::from(&geometry)), wire.geometry);
    if let Err(problem) = geometry.check(wire.bytes, None) {
        return refused(&problem);
    }
    let payload = geometry.slot_bytes().unwrap_or_default();
    assert!((1..=BLOCK_BYTES_MAX.get()).contains(&payload));
    for other in [payload - 1, payload + 1] {
        assert!(geometry.check(wire.bytes, Some(other)).is_err());
    }
    for slot in [0, geometry.slots / 2, geometry.slots - 1] {
        let (mut from, mut taken) = (0, Vec::new());
        for run in geometry.runs(slot) {
            assert_eq!(run.from, from);
            let end = run.at.checked_add(run.len as u64);
            assert!(end.is_some_and(|end| end <= wire.bytes), "{run:?}");
            from += run.len;
            taken.push((run.at, run.len as u64));
        }
        assert_eq!(from as u64, payload);
        taken.sort_unstable();
        let mut pairs = taken.iter().zip(taken.iter().skip(1));
        let apart = pairs.all(|((at, len), (next, _))| at + len <= *next);
        assert!(apart || slot > 0, "rows of slot 0 share bytes");
    }
}

fn geometry_seeds() -> Vec<Vec<u8>> {
    let strided = |offset| Piece {
        offset,
        slot_stride: 4096,
        rows: 16,
        row_bytes: 128,
        row_stride: 192,
    };
    let pieces = [
        vec![Piece::row(0, 2 << 20, 2 << 20)],
        vec![strided(0), strided(1 << 20)],
        vec![Piece::row(u64::MAX, 1, 1), strided(8)],
    ];
    let request = |pieces: Vec<Piece>| {
        let geometry = RegionGeometry {
            kind: PayloadKind::Kv,
            slots: 8,
            pieces,
        };
        let request = v1::RegisterRegionRequest {
            bytes: 16 << 20,
            purpose: v1::RegionPurpose::Engine.into(),
            geometry: Some((&geometry).into()),
            ..v1::RegisterRegionRequest::default()
        };
        request.encode_to_vec()
    };
    pieces.map(request).into()
}

/// Sizes and keys as people write them.
fn text_values(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    match text.parse::<Bytes>() {
        Ok(bytes) => {
            assert_eq!(bytes.get().to_string().parse(), Ok(bytes));
            let shown = bytes.to_string();
            assert!(shown.contains('.') || shown.parse() == Ok(bytes), "{shown}");
        }
        Err(problem) => assert!(problem.to_string().contains("256 MiB")),
    }
    if let Some(key) = BlockKey::from_hex(text) {
        assert_eq!(key.to_hex(), text.to_ascii_lowercase());
        assert_eq!(BlockKey::from_slice(key.as_bytes()), Some(key));
    }
    let key = BlockKey::from_slice(data);
    assert_eq!(key.is_some(), data.len() == 32);
}

/// A small model with every kind of layer.
pub fn model() -> ModelDescriptor {
    ModelDescriptor {
        model: "fuzz/model".into(),
        revision: "main".into(),
        weights_fingerprint: vec![1, 2, 3],
        adapter: String::new(),
        element: Element::Bf16,
        layers: vec![
            LayerSpec::Attention {
                kv_heads: 2,
                k_dim: 4,
                v_dim: 8,
                sliding_window: 0,
            },
            LayerSpec::Latent {
                latent_dim: 16,
                rope_dim: 4,
            },
            LayerSpec::SharesWith(0),
            LayerSpec::State { bytes: 100 },
            LayerSpec::Opaque {
                bytes_per_token: 3,
                bytes_per_block: 7,
            },
        ],
        d_model: 32,
        rope: None,
        block_tokens: 16,
        order: PartOrder::TokenMajor,
        shard: Shard::WHOLE,
        k_after_rope: true,
    }
}

fn descriptor_seeds() -> Vec<Vec<u8>> {
    let plain = model();
    let large = ModelDescriptor {
        element: Element::F32,
        layers: vec![
            plain
                .layers
                .first()
                .copied()
                .unwrap_or(LayerSpec::SharesWith(0));
            200
        ],
        rope: Some(Rope {
            theta: 1e4,
            rotary_dim: 4,
            rotate_half: true,
            scaling: "yarn".into(),
        }),
        block_tokens: 2048,
        order: PartOrder::HeadMajor,
        shard: Shard {
            tp_rank: 1,
            tp_size: 4,
            pp_rank: 0,
            pp_size: 2,
        },
        ..plain.clone()
    };
    // Everything about it is wrong.
    let wrong = ModelDescriptor {
        layers: vec![
            LayerSpec::Attention {
                kv_heads: 0,
                k_dim: u32::MAX,
                v_dim: 0,
                sliding_window: 0
            };
            1000
        ],
        d_model: 0,
        block_tokens: 0,
        ..plain.clone()
    };
    let wire = |model: &ModelDescriptor| v1::ModelDescriptor::from(model).encode_to_vec();
    [plain, large, wrong].iter().map(wire).collect()
}

fn wire_seeds() -> Vec<Vec<u8>> {
    let request = |keys: usize, kind| v1::LookupRequest {
        session: vec![7; 16].into(),
        keys: vec![vec![9; 32].into(); keys],
        kind,
        prefix_only: true,
        accept: 0,
    };
    [(1, 1), (3, 5), (0, 0), (2, 14)]
        .map(|(keys, kind)| request(keys, kind).encode_to_vec())
        .into()
}

fn text_seeds() -> Vec<Vec<u8>> {
    let texts = [
        "4096",
        "256 MiB",
        "16777215 TiB",
        "1.5 GiB",
        "-1",
        "00112233445566778899AABBCCDDEEFF00112233445566778899aabbccddeeff",
        "0123456789abcdef0123456789abcdef",
    ];
    texts.map(|text| text.as_bytes().to_vec()).into()
}
