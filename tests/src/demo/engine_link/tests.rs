//! Tests of the descriptor: it says exactly what the engine's bytes mean.
//!
//! Upstairs:   nobody.
//! Downstairs: `engine_link`. Saving and restoring need a daemon: see `tests/demo.rs`.

use std::sync::Arc;

use kvtier_client::BlockLayout;

use super::*;
use crate::demo::job;

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
    assert_eq!(print(&model, &options), here);
}
