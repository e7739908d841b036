//! Tests of what a block is called and how it is laid out.

use kvtier_proto::Element;
use kvtier_proto::descriptor::{LayerSpec, Shard};
use strum::IntoEnumIterator;

use super::*;

// Goal: saving the hidden states of a block never replaces its KV.
#[test]
fn record_key_differs_for_every_kind_and_key() {
    let mut seen = std::collections::BTreeSet::new();
    for (kind, byte) in PayloadKind::iter().flat_map(|kind| [(kind, 1u8), (kind, 2)]) {
        let id = BlockId {
            namespace: NamespaceId(1),
            kind,
            key: BlockKey([byte; 32]),
        };
        assert!(seen.insert(id.record_key()), "{id:?}");
    }
    let kv = BlockId {
        namespace: NamespaceId(1),
        kind: PayloadKind::Kv,
        key: BlockKey([7; 32]),
    };
    assert_eq!(
        kv.record_key(),
        kv.key,
        "an operator finds KV under its own key"
    );
}

fn layouts() -> Layouts {
    Layouts::new(ModelDescriptor {
        model: "test".into(),
        revision: String::new(),
        weights_fingerprint: Vec::new(),
        adapter: String::new(),
        element: Element::Bf16,
        layers: vec![LayerSpec::Attention {
            kv_heads: 1,
            k_dim: 4,
            v_dim: 4,
            sliding_window: 0,
        }],
        d_model: 8,
        rope: None,
        block_tokens: 1024,
        order: PartOrder::TokenMajor,
        shard: Shard::WHOLE,
        k_after_rope: true,
    })
}

#[test]
fn layouts_refuse_opaque_blocks_with_more_tokens_than_a_block_has_or_none() {
    for tokens in [0, 1025, u32::MAX] {
        let refused = layouts().get(PayloadKind::Opaque, tokens, 100);
        let wanted = LayoutError::Tokens { tokens, max: 1024 };
        assert_eq!(refused.unwrap_err(), wanted);
    }
    let whole = layouts().get(PayloadKind::Opaque, 1024, 100).unwrap();
    assert_eq!(whole.payload_len(), 100);
}

// Goal: a client that names every length there is does not make the daemon remember all of them.
#[test]
fn layouts_keep_those_of_full_blocks_and_few_others() {
    let layouts = layouts();
    for tokens in 1..=1024 {
        let layout = layouts.get(PayloadKind::Kv, tokens, 0).unwrap();
        assert_eq!(layout.tokens(), tokens);
    }
    let kept = layouts.made.lock().unwrap().len();
    assert!(kept <= SHORT_LAYOUTS_KEPT + 1, "{kept} layouts");
    let full = layouts.get(PayloadKind::Kv, 1024, 0).unwrap();
    let again = layouts.get(PayloadKind::Kv, 1024, 0).unwrap();
    assert!(Arc::ptr_eq(&full, &again), "a full block's layout is kept");
}
