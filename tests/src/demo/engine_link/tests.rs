//! Tests of the descriptor: it says exactly what the engine's bytes mean.
//!
//! Upstairs:   nobody.
//! Downstairs: `engine_link`. Saving and restoring need a daemon: see `tests/demo.rs`.

use std::sync::Arc;

use kvtier_client::BlockLayout;

use super::*;
use crate::demo::job;
use crate::engine::ModelConfig;

fn tiny() -> (Arc<Model>, SequenceOptions) {
    let (model, _) = job::ModelSource::Tiny.load().unwrap();
    (model, SequenceOptions::new(64))
}

#[test]
fn descriptor_lays_a_block_out_in_exactly_the_bytes_of_the_cache() {
    let (model, options) = tiny();
    let descriptor = descriptor(&model, &options).unwrap();
    assert_eq!(descriptor.validate(), []);
    for tokens in [1, 100, 256] {
        let layout = BlockLayout::new(&descriptor, PayloadKind::Kv, tokens).unwrap();
        let expected = model.config().bytes_per_token() * index(tokens);
        assert_eq!(layout.payload_len(), expected);
    }
    let sequence = Sequence::new(Arc::clone(&model), options).unwrap();
    let layout = BlockLayout::new(&descriptor, PayloadKind::Kv, 64).unwrap();
    for part in layout.parts() {
        let code = engine_part(part.code);
        let bytes = sequence.cache().part_bytes(index(part.layer), code, 64);
        assert_eq!(bytes.unwrap(), part.len, "{part:?}");
    }
}

#[test]
fn descriptor_differs_for_other_weights_dtype_and_block_size() {
    let (model, options) = tiny();
    let print = |model: &Model, options: &SequenceOptions| {
        descriptor(model, options).unwrap().fingerprint()
    };
    let here = print(&model, &options);
    let other = Model::random(model.config().clone(), 99).unwrap();
    assert_ne!(print(&other, &options), here);
    let halves = SequenceOptions {
        dtype: CacheDtype::F16,
        ..options
    };
    assert_ne!(print(&model, &halves), here);
    let blocks = SequenceOptions {
        block_tokens: 128,
        ..options
    };
    assert_ne!(print(&model, &blocks), here);
    let rounded = SequenceOptions {
        keep_hidden: true,
        ..options
    };
    assert_ne!(print(&model, &rounded), here);
    assert_eq!(print(&model, &options), here);
}

// Goal: a planner that believes these numbers plans right: they are the products of the matrices.
// Method: SmolLM2-135M, whose parameters are published: 134,515,008 with the embedding, which is
// 49,152 rows, of 576; norms are no products.
#[test]
fn reader_counts_the_operations_of_a_layer() {
    let (model, options) = tiny();
    let spec = reader(&model, &options);
    assert_eq!(spec.check(&descriptor(&model, &options).unwrap()), Ok(()));
    assert!(spec.two_ended && spec.layer_events && !spec.hidden_projection);
    let keeping = SequenceOptions {
        keep_hidden: true,
        ..options
    };
    assert!(reader(&model, &keeping).hidden_projection);

    let smol = Attention::Heads {
        query_heads: 9,
        kv_heads: 3,
        key_dim: 64,
        value_dim: 64,
        window: None,
    };
    let config = ModelConfig {
        vocab: 16,
        hidden: 576,
        intermediate: 1536,
        layers: vec![smol; 1],
        ..model.config().clone()
    };
    let costs = reader(&Model::random(config, 1).unwrap(), &options).layers;
    let norms = 30 * 2 * 576 + 576;
    assert_eq!(
        30 * costs[0].token_flop / 2,
        134_515_008 - 49_152 * 576 - norms
    );
    assert_eq!(costs[0].pair_flop, 2 * 9 * 128);
    assert_eq!(costs[0].projection_flop, 2 * 576 * 3 * 128);
}
