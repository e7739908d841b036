//! Tests of loading tables: a file that cannot be used is named, and a model gets its own only.

use kvtier_kernels::profile::{
    LevelTables, Matrix16, PartTables, Plain, TokenPredictor, Transform, scales,
};
use kvtier_proto::descriptor::{PartOrder, Rope, Shard};
use kvtier_proto::{Element, PartCode};

use super::*;

/// Tables for `layers` layers of the test model of the tier: two heads of 32 channels, that
/// nothing is known of.
pub(in crate::tier) fn profile(layers: u32, step: f32) -> Profile {
    let unit: Vec<f64> = (0..64 * 64)
        .map(|at| if at / 64 == at % 64 { 1.0 } else { 0.0 })
        .collect();
    let matrix = || Matrix16::quantise(&unit, 64, 64).unwrap();
    let tables = |layer, code| PartTables {
        layer,
        code,
        heads: 2,
        dim: 32,
        input: None,
        plain: Plain {
            mean: vec![0.0; 64],
            transform: Transform {
                forward: matrix(),
                inverse: matrix(),
            },
            levels: [
                None,
                Some(LevelTables {
                    step,
                    scales: vec![scales::nearest(16.0); 64],
                    predictor: TokenPredictor::Mean,
                }),
                None,
            ],
        },
        crosses: Vec::new(),
    };
    let parts = (0..layers).flat_map(|layer| {
        let codes = [PartCode::K, PartCode::V];
        codes.map(|code| tables(layer, code))
    });
    Profile {
        model: "test".into(),
        revision: String::new(),
        weights_fingerprint: Vec::new(),
        element: Element::Bf16,
        rope: None,
        k_after_rope: true,
        sinks: 4,
        parts: parts.collect(),
        measured: Vec::new(),
        exact: Vec::new(),
    }
}

fn model() -> ModelDescriptor {
    let layer = LayerSpec::Attention {
        kv_heads: 2,
        k_dim: 32,
        v_dim: 32,
        sliding_window: 0,
    };
    ModelDescriptor {
        model: "test".into(),
        revision: String::new(),
        weights_fingerprint: vec![7; 8],
        adapter: String::new(),
        element: Element::Bf16,
        layers: vec![layer; 2],
        d_model: 128,
        rope: None,
        block_tokens: 16,
        order: PartOrder::TokenMajor,
        shard: Shard::WHOLE,
        k_after_rope: true,
    }
}

#[test]
fn load_takes_files_and_the_tables_of_a_directory_and_names_what_it_cannot_use() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("a.kvtables"), profile(2, 0.1).to_bytes().unwrap()).unwrap();
    std::fs::write(at("b.other"), "no tables").unwrap();
    let loaded = load(&[dir.path().to_owned()]).unwrap();
    assert_eq!(loaded.len(), 1);
    assert_eq!(loaded[0].model, "test");
    assert_ne!(loaded[0].id, 0);
    let refused = |paths: &[PathBuf]| load(paths).unwrap_err();
    assert!(refused(&[at("b.other")]).contains("b.other"));
    assert!(refused(&[at("c")]).contains("c: cannot be read"));
    let twice = refused(&[dir.path().to_owned(), at("a.kvtables")]);
    assert!(twice.contains("is the same as"), "{twice}");
    let mut bytes = profile(2, 0.1).to_bytes().unwrap();
    bytes.truncate(bytes.len() / 2);
    std::fs::write(at("b.kvtables"), bytes).unwrap();
    assert!(refused(&[dir.path().to_owned()]).contains("b.kvtables"));
}

#[test]
fn tables_fit_the_model_that_they_are_of_and_no_other() {
    let tables = profile(2, 0.1);
    assert!(fits(&tables, &model()));
    let others: [fn(&mut ModelDescriptor); 5] = [
        |model| (model.shard.pp_rank, model.shard.pp_size) = (1, 2),
        |model| model.model = "another".into(),
        |model| model.element = Element::F16,
        |model| model.layers.truncate(1),
        |model| {
            model.layers[1] = LayerSpec::Opaque {
                bytes_per_token: 1,
                bytes_per_block: 0,
            }
        },
    ];
    for (number, change) in others.iter().enumerate() {
        let mut other = model();
        change(&mut other);
        assert!(!fits(&tables, &other), "change {number}");
    }
    let mut turned = profile(2, 0.1);
    turned.rope = Some(kvtier_kernels::profile::Rope::plain(10_000.0, 32, true));
    let rope = Rope {
        theta: 10_000.0,
        rotary_dim: 32,
        rotate_half: true,
        scaling: String::new(),
    };
    let with = |change: fn(&mut Rope)| {
        let mut rope = rope.clone();
        change(&mut rope);
        let rope = Some(rope);
        fits(&turned, &ModelDescriptor { rope, ..model() })
    };
    assert!(fits(&turned, &model()), "a model may not say how it turns");
    let before = |rope| ModelDescriptor {
        k_after_rope: false,
        rope,
        ..model()
    };
    assert!(!fits(&turned, &before(None)) && !fits(&turned, &before(Some(rope.clone()))));
    assert!(with(|_| {}));
    assert!(with(
        |rope| (rope.theta, rope.scaling) = (1.0, "yarn".into())
    ));
    assert!(!with(|rope| rope.theta = 500_000.0));
    assert!(!with(|rope| rope.rotary_dim = 16));
    assert!(!with(|rope| rope.rotate_half = false));
    let mut own = profile(2, 0.1);
    own.revision = "a".into();
    let of = |revision: &str| ModelDescriptor {
        revision: revision.into(),
        ..model()
    };
    assert!(fits(&own, &of("a")) && fits(&own, &of("")));
    assert!(!fits(&own, &of("b")));
    let mut own = profile(2, 0.1);
    own.weights_fingerprint = vec![7; 8];
    assert!(fits(&own, &model()));
    own.weights_fingerprint = vec![8; 8];
    assert!(!fits(&own, &model()));
}

// Goal: what calibration makes of K that is not rotated is used where engines hand over such K.
// Method: tables as `--rope none` makes them, and every way in which a descriptor speaks of RoPE.
#[test]
fn tables_of_k_that_nothing_turned_fit_models_without_rope_and_k_from_before_it() {
    let mut tables = profile(2, 0.1);
    (tables.rope, tables.k_after_rope) = (None, false);
    let fits = |rope: Option<f64>, k_after_rope| {
        let rope = rope.map(|theta| Rope {
            theta,
            rotary_dim: 32,
            rotate_half: true,
            scaling: String::new(),
        });
        let model = ModelDescriptor {
            rope,
            k_after_rope,
            ..model()
        };
        fits(&tables, &model)
    };
    assert!(fits(None, true), "a model without RoPE");
    assert!(fits(None, false));
    assert!(fits(Some(10_000.0), false), "K from before RoPE");
    assert!(!fits(Some(10_000.0), true), "K is turned");
}
