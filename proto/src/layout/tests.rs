//! Tests of block layouts: the arithmetic of a token's bytes and the stored bytes agree.

use proptest::prelude::*;

use super::*;
use crate::descriptor::tests::small_llama;
use crate::descriptor::{PartOrder, Shard};

#[test]
fn new_lays_out_the_demo_model_as_its_arithmetic_says() {
    let layout = BlockLayout::new(&small_llama(), PayloadKind::Kv, 256).unwrap();
    assert_eq!(layout.payload_len(), 23_040 * 256);
    assert_eq!(layout.parts().len(), 60);
    assert_eq!(layout.page(1), Some(196_608 / 2 * 2..196_608 * 2));
    let v = layout.part(0, PartCode::V).unwrap();
    assert_eq!(
        (v.offset, v.len, v.heads, v.width),
        (98_304, 98_304, 3, 192)
    );
}

#[test]
fn new_refuses_tokens_out_of_range_and_kinds_nobody_stores() {
    let model = small_llama();
    for tokens in [0, 257, u32::MAX] {
        let problem = BlockLayout::new(&model, PayloadKind::Kv, tokens).unwrap_err();
        assert_eq!(problem, LayoutError::Tokens { tokens, max: 256 });
    }
    let problem = BlockLayout::new(&model, PayloadKind::State, 4).unwrap_err();
    assert_eq!(
        problem,
        LayoutError::NothingStored {
            kind: PayloadKind::State
        }
    );
}

#[test]
fn opaque_takes_the_size_the_message_gives_within_the_limit() {
    assert_eq!(BlockLayout::opaque(5, 999).unwrap().payload_len(), 999);
    for bytes in [0, (1 << 30) + 1, u64::MAX] {
        assert_eq!(
            BlockLayout::opaque(5, bytes),
            Err(LayoutError::Opaque { bytes })
        );
    }
}

fn any_layer() -> impl Strategy<Value = LayerSpec> {
    prop_oneof![
        (1u32..9, 1u32..257, 1u32..257, 0u32..5).prop_map(
            |(kv_heads, k_dim, v_dim, sliding_window)| {
                LayerSpec::Attention {
                    kv_heads,
                    k_dim,
                    v_dim,
                    sliding_window,
                }
            }
        ),
        (1u32..600, 0u32..65).prop_map(|(latent_dim, rope_dim)| LayerSpec::Latent {
            latent_dim,
            rope_dim
        }),
        (1u32..100_000).prop_map(|bytes| LayerSpec::State { bytes }),
        (0u32..300, 1u32..300).prop_map(|(bytes_per_token, bytes_per_block)| {
            LayerSpec::Opaque {
                bytes_per_token,
                bytes_per_block,
            }
        }),
        Just(LayerSpec::SharesWith(0)),
    ]
}

pub(crate) fn any_model() -> impl Strategy<Value = ModelDescriptor> {
    let element = prop_oneof![
        Just(Element::Bf16),
        Just(Element::F16),
        Just(Element::F32),
        Just(Element::F8E4m3),
        Just(Element::U8)
    ];
    let layers = proptest::collection::vec(any_layer(), 0..12);
    (element, layers, 1u32..3000, 16u32..600, any::<bool>()).prop_map(
        |(element, mut layers, d_model, block_tokens, head_major)| {
            // Layer 0 stores KV itself, so that later layers may share with it.
            let first = LayerSpec::Attention {
                kv_heads: 2,
                k_dim: 8,
                v_dim: 8,
                sliding_window: 0,
            };
            layers.insert(0, first);
            ModelDescriptor {
                element,
                layers,
                d_model,
                block_tokens,
                order: if head_major {
                    PartOrder::HeadMajor
                } else {
                    PartOrder::TokenMajor
                },
                shard: Shard {
                    tp_rank: 0,
                    tp_size: 2,
                    pp_rank: 0,
                    pp_size: 1,
                },
                ..small_llama()
            }
        },
    )
}

/// Bytes of a block by a formula written a second time, from the model's point of view.
fn formula(model: &ModelDescriptor, kind: PayloadKind, tokens: u64) -> u64 {
    let element = model.element.bytes() as u64;
    let bytes = |layer: &LayerSpec| match (*layer, kind) {
        (_, PayloadKind::Hidden) => tokens * u64::from(model.d_model) * element,
        (
            LayerSpec::Attention {
                kv_heads,
                k_dim,
                v_dim,
                ..
            },
            PayloadKind::Kv,
        ) => tokens * u64::from(kv_heads) * u64::from(k_dim + v_dim) * element,
        (
            LayerSpec::Latent {
                latent_dim,
                rope_dim,
            },
            PayloadKind::Kv | PayloadKind::Latent,
        ) => tokens * u64::from(latent_dim + rope_dim) * element,
        (LayerSpec::State { bytes }, PayloadKind::Kv | PayloadKind::State) => u64::from(bytes),
        (
            LayerSpec::Opaque {
                bytes_per_token,
                bytes_per_block,
            },
            PayloadKind::Kv | PayloadKind::Opaque,
        ) => tokens * u64::from(bytes_per_token) + u64::from(bytes_per_block),
        _ => 0,
    };
    model.layers.iter().map(bytes).sum()
}

proptest! {
    // Goal: bytes a token by the model's formula equal the bytes that are stored, for random
    // descriptors, kinds and short last blocks; and B1.
    #[test]
    fn new_stores_exactly_the_bytes_of_the_formula(
        model in any_model(), kind in 1u8..6, short in any::<proptest::sample::Index>(),
    ) {
        prop_assert_eq!(model.validate(), vec![]);
        let kind = PayloadKind::from_number(kind).unwrap();
        let tokens = u32::try_from(short.index(model.block_tokens as usize)).unwrap() + 1;
        let expected = formula(&model, kind, u64::from(tokens));
        match BlockLayout::new(&model, kind, tokens) {
            Err(problem) => {
                prop_assert_eq!(expected, 0);
                prop_assert_eq!(problem, LayoutError::NothingStored { kind });
            }
            Ok(layout) => {
                prop_assert_eq!(layout.payload_len() as u64, expected);
                let mut end = 0;
                for part in layout.parts() {
                    prop_assert_eq!(part.offset, end);
                    let values = part.rows as usize * part.width as usize;
                    prop_assert_eq!(part.len, values * part.element.bytes());
                    prop_assert!(part.len > 0);
                    end += part.len;
                }
                prop_assert_eq!(end, layout.payload_len());
            }
        }
    }
}
