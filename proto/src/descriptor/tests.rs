//! Tests of descriptors: every layout of the design is expressible, every field is hashed.

use super::*;

/// SmolLM2-135M, the model of the demo.
pub(crate) fn small_llama() -> ModelDescriptor {
    ModelDescriptor {
        model: "SmolLM2-135M-Instruct".into(),
        revision: "q4_1".into(),
        weights_fingerprint: vec![7; 32],
        adapter: String::new(),
        element: Element::Bf16,
        layers: vec![
            LayerSpec::Attention {
                kv_heads: 3,
                k_dim: 64,
                v_dim: 64,
                sliding_window: 0
            };
            30
        ],
        d_model: 576,
        rope: Some(Rope {
            theta: 100_000.0,
            rotary_dim: 64,
            rotate_half: true,
            scaling: "none".into(),
        }),
        block_tokens: 256,
        order: PartOrder::TokenMajor,
        shard: Shard::WHOLE,
        k_after_rope: true,
    }
}

#[test]
fn validate_accepts_every_layout_of_the_design() {
    let attention = |kv_heads, k_dim, v_dim, sliding_window| LayerSpec::Attention {
        kv_heads,
        k_dim,
        v_dim,
        sliding_window,
    };
    let layouts: Vec<Vec<LayerSpec>> = vec![
        vec![attention(8, 128, 128, 0), attention(1, 128, 128, 0)],
        vec![attention(4, 192, 128, 0)],
        vec![
            LayerSpec::Latent {
                latent_dim: 512,
                rope_dim: 64
            };
            4
        ],
        vec![attention(2, 64, 64, 1024), attention(2, 64, 64, 0)],
        vec![
            attention(2, 64, 64, 0),
            LayerSpec::SharesWith(0),
            LayerSpec::SharesWith(0),
        ],
        vec![LayerSpec::State { bytes: 1 << 20 }, attention(2, 64, 64, 0)],
        vec![LayerSpec::Opaque {
            bytes_per_token: 16,
            bytes_per_block: 128,
        }],
    ];
    for layers in layouts {
        let model = ModelDescriptor {
            layers,
            ..small_llama()
        };
        assert_eq!(model.validate(), vec![], "{:?}", model.layers);
    }
}

#[test]
fn validate_names_every_problem_at_once_with_the_accepted_range() {
    let mut model = small_llama();
    model.model = String::new();
    model.block_tokens = 8;
    model.d_model = 0;
    model.shard.tp_rank = 4;
    model.layers[1] = LayerSpec::SharesWith(1);
    model.layers[2] = LayerSpec::Attention {
        kv_heads: 0,
        k_dim: 64,
        v_dim: 0,
        sliding_window: 0,
    };
    let problems: Vec<String> = model.validate().iter().map(ToString::to_string).collect();
    let expected = [
        "model.model is 0 bytes long",
        "model.d_model is 0; accepted: 1 to 65536",
        "model.block_tokens is 8; accepted: 16 to 2048",
        "model.shard.tp_rank is 4; accepted: 0 to 0",
        "model.layers[1].shares_with is 1; accepted: an earlier layer",
        "model.layers[2].kv_heads is 0",
        "model.layers[2].v_dim is 0",
    ];
    assert_eq!(problems.len(), expected.len(), "{problems:#?}");
    for (problem, start) in problems.iter().zip(expected) {
        assert!(
            problem.starts_with(start),
            "{problem} does not start with {start}"
        );
    }
}

#[test]
fn validate_refuses_blocks_above_the_limit() {
    let mut model = small_llama();
    model.block_tokens = 2048;
    model.layers = vec![
        LayerSpec::Attention {
            kv_heads: 128,
            k_dim: 256,
            v_dim: 256,
            sliding_window: 0
        };
        64
    ];
    let problems = model.validate();
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].accepted.contains("1 GiB"), "{}", problems[0]);
}

// Museum row 7 (LMCache#4463, dynamo#14416): the engine changed its KV layout and the cache gave
// back garbage. Every field that changes what bytes mean changes the fingerprint.
#[test]
fn museum_07_fingerprint_changes_with_every_field_but_the_adapter() {
    let base = small_llama();
    let change = |edit: fn(&mut ModelDescriptor)| {
        let mut model = base.clone();
        edit(&mut model);
        model.fingerprint()
    };
    let all = [
        base.fingerprint(),
        change(|m| m.model.push('x')),
        change(|m| m.revision.push('x')),
        change(|m| m.weights_fingerprint.push(0)),
        change(|m| m.element = Element::F16),
        change(|m| m.order = PartOrder::HeadMajor),
        change(|m| m.k_after_rope = false),
        change(|m| m.d_model += 1),
        change(|m| m.block_tokens = 128),
        change(|m| m.shard.tp_size = 2),
        change(|m| m.shard.pp_size = 2),
        change(|m| m.rope = None),
        change(|m| m.rope.as_mut().unwrap().theta = 10_000.0),
        change(|m| m.rope.as_mut().unwrap().rotary_dim = 32),
        change(|m| m.rope.as_mut().unwrap().rotate_half = false),
        change(|m| m.rope.as_mut().unwrap().scaling = "llama3 factor=8".into()),
        change(|m| {
            m.layers.pop();
        }),
        change(|m| {
            m.layers[3] = LayerSpec::Attention {
                kv_heads: 3,
                k_dim: 64,
                v_dim: 32,
                sliding_window: 0,
            };
        }),
        change(|m| {
            m.layers[3] = LayerSpec::Attention {
                kv_heads: 3,
                k_dim: 64,
                v_dim: 64,
                sliding_window: 9,
            };
        }),
        change(|m| m.layers[3] = LayerSpec::SharesWith(0)),
        change(|m| m.layers[3] = LayerSpec::State { bytes: 3 }),
        change(|m| {
            m.layers[3] = LayerSpec::Latent {
                latent_dim: 3,
                rope_dim: 0,
            }
        }),
        change(|m| {
            m.layers[3] = LayerSpec::Opaque {
                bytes_per_token: 3,
                bytes_per_block: 0,
            }
        }),
    ];
    for (i, a) in all.iter().enumerate() {
        for (j, b) in all.iter().enumerate().skip(i + 1) {
            assert_ne!(a, b, "changes {i} and {j} look alike");
        }
    }
    assert_eq!(base.fingerprint(), change(|m| m.adapter.push('x')));
}

// Goal: a frozen value: a change of the hashed fields would orphan every block on every disk.
#[test]
fn fingerprint_of_the_demo_model_is_golden() {
    assert_eq!(
        crate::key::BlockKey(small_llama().fingerprint().0).to_hex(),
        GOLDEN
    );
}

const GOLDEN: &str = "4ab4b41a20219ce848e5172e92825444ee02ded92e1c10b74178b0ed3154c82a";
