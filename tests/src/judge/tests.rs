//! Tests of the judge on small random models: it must itself be beyond doubt.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a panic is the failure report"
)]

use std::sync::Arc;

use kvtier_kernels::{Codec, Registry};
use kvtier_proto::Level;

use super::coded::{Which, code};
use super::compare::Change;
use super::fisher::{FisherOptions, fisher};
use super::quality::{Bench, Cut};
use super::subject::{Tokens, prefilled};
use super::*;
use crate::engine::{Attention, Backward, Model, ModelConfig, Part, context};

const CUT: Cut = Cut {
    context: 300,
    targets: 24,
    greedy: 8,
};

fn model(layers: usize, width: usize, vocab: usize) -> Arc<Model> {
    let attention = Attention::Heads {
        query_heads: 4,
        kv_heads: 2,
        key_dim: width,
        value_dim: width,
        window: None,
    };
    let config = ModelConfig {
        name: "tiny".into(),
        vocab,
        hidden: 48,
        intermediate: 80,
        rope_theta: 10_000.0,
        norm_epsilon: 1e-5,
        max_positions: 512,
        layers: vec![attention; layers],
    };
    Arc::new(Model::random(config, 11).unwrap())
}

fn document(name: &str, count: u32, vocab: u32) -> Tokens {
    let ids = (0..count).map(|at| (at * at + 7 * at) % vocab).collect();
    Tokens {
        name: name.to_owned(),
        ids,
    }
}

#[test]
fn exact_levels_change_no_prediction_and_lossy_ones_do() {
    let model = model(2, 32, 101);
    let mut bench = Bench::new(&model, &document("one", 325, 101), CUT).unwrap();
    for codec in Registry::with_baselines().iter() {
        let name = codec.name();
        let judged = bench.judge(codec).unwrap();
        let change = judged.change;
        assert_eq!(change.positions, 24, "{name}");
        if codec.exact() {
            assert_eq!(change.kl(), 0.0, "{name}");
            assert_eq!((change.top1(), change.perplexity()), (100.0, 0.0), "{name}");
            assert_eq!(judged.greedy, 1.0, "{name}");
        } else {
            assert!(change.kl() > 0.0, "{name}");
            assert!(judged.bits < 10.0, "{name}: {} bits", judged.bits);
        }
    }
}

// Goal: a coarser level is judged to be worse, or the figures say nothing.
#[test]
fn divergence_grows_when_bits_are_taken_away() {
    let model = model(2, 32, 101);
    let mut bench = Bench::new(&model, &document("one", 325, 101), CUT).unwrap();
    let levels = Registry::with_baselines();
    let mut kl = |level| bench.judge(levels.get(level).unwrap()).unwrap().change.kl();
    let (eight, four, two) = (kl(Level::INT8), kl(Level::INT4), kl(Level::KIVI2));
    assert!(eight * 10.0 < four && four < two, "{eight} {four} {two}");
}

// Goal: J2.
// Method: raw stores what there is; 300 tokens are a whole block and a piece of one.
#[test]
fn every_stored_byte_counts_and_only_those_of_chosen_parts() {
    let model = model(3, 32, 101);
    let sequence = prefilled(&model, &document("one", 300, 101).ids, 0).unwrap();
    let levels = Registry::with_baselines();
    let through = |level, which| {
        let codec = levels.get(level).unwrap();
        code(model.config(), sequence.cache(), 300, codec, which).unwrap()
    };
    let raw = through(Level::RAW, Which::Every);
    let bytes = 300 * u64::try_from(model.config().bytes_per_token()).unwrap();
    assert_eq!((raw.stored_bytes, raw.values), (bytes, bytes / 2));
    assert_eq!(raw.bits(), 16.0);
    let one = through(Level::RAW, Which::One(1, Part::Value));
    assert_eq!(one.stored_bytes * 6, bytes);
    let int8 = through(Level::INT8, Which::Every).bits();
    assert!((8.0..9.5).contains(&int8), "{int8}");
}

// Goal: the restored sequence holds what decoding gave, in its place.
// Method: a run over a cache of which one part was coded differs from the exact run; the parts
// that were not coded are the exact ones, and so are their bytes after a second restore.
#[test]
fn only_the_chosen_part_is_another_after_a_restore() {
    let model = model(2, 32, 101);
    let ids = document("one", 300, 101).ids;
    let exact = prefilled(&model, &ids, 8).unwrap();
    let mut restored = prefilled(&model, &ids[..5], 320).unwrap();
    let levels = Registry::with_baselines();
    let codec = levels.get(Level::INT4).unwrap();
    let which = Which::One(1, Part::Key);
    let coded = code(model.config(), exact.cache(), 300, codec, which).unwrap();
    coded.restore_into(model.config(), &mut restored).unwrap();
    assert_eq!(restored.position(), 300);
    for layer in 0..2 {
        for part in [Part::Key, Part::Value] {
            let bytes = |of: &crate::engine::Sequence| {
                of.cache().bytes(layer, part, 0..300).unwrap().to_vec()
            };
            let same = bytes(&exact) == bytes(&restored);
            assert_eq!(same, (layer, part) != (1, Part::Key), "{layer} {part:?}");
        }
    }
}

#[test]
fn change_is_nothing_for_equal_scores_and_known_for_others() {
    let exact = [0.0, 1.0, 2.0, 3.0, -1.0, 0.5];
    let same = Change::between(&exact, &exact, 3, &[2, 0]);
    assert_eq!(
        (same.kl(), same.top1(), same.perplexity()),
        (0.0, 100.0, 0.0)
    );

    // Even odds against three to one: KL is 0.5 ln(0.5/0.75) + 0.5 ln(0.5/0.25).
    let other = [3_f32.ln(), 0.0];
    let change = Change::between(&[0.0, 0.0], &other, 2, &[1]);
    assert!((change.kl() - 0.5 * (4.0_f64 / 3.0).ln()).abs() < 1e-6);
    assert!((change.perplexity() - 100.0).abs() < 1e-4, "half as likely");
    assert_eq!(change.top1(), 100.0, "the first of equals");
    assert_eq!(Change::between(&[0.0, 0.1], &other, 2, &[1]).top1(), 0.0);
}

// Goal: the estimate is the Fisher information.
// Method: on a model of few words, every position and word goes back by itself: the sum over
// words of p * g g^T is exact. The estimate of many draws comes near; that of few does less.
#[test]
fn fisher_of_random_gradients_is_that_of_all_words() {
    let model = model(2, 4, 13);
    let document = document("one", 26, 13);
    let (prompt, rest) = document.ids.split_at(20);
    let sequence = prefilled(&model, prompt, 0).unwrap();
    let cached = context(&model, sequence.cache(), 20).unwrap();
    let backward = Backward::new(Arc::clone(&model)).unwrap();
    let tape = backward.forward(&cached, rest).unwrap();
    let mut want = vec![0.0_f64; 2 * 2 * 2 * 16];
    for row in 0..rest.len() {
        let scores = &tape.logits()[row * 13..][..13];
        let sum: f64 = scores.iter().map(|score| f64::from(*score).exp()).sum();
        let p: Vec<f64> = scores
            .iter()
            .map(|score| f64::from(*score).exp() / sum)
            .collect();
        for word in 0..13 {
            let mut back = vec![0.0; tape.logits().len()];
            for (at, p) in p.iter().enumerate() {
                back[row * 13 + at] = (*p - f64::from(u8::from(at == word))) as f32;
            }
            for (layer, one) in backward.gradients(&tape, &back).unwrap().iter().enumerate() {
                for (kind, all) in [&one.keys, &one.values].into_iter().enumerate() {
                    // Rows of two heads of four; the sinks are the first four tokens.
                    for (at, g) in all.chunks_exact(4).enumerate().skip(4 * 2) {
                        let into = &mut want[((layer * 2 + kind) * 2 + at % 2) * 16..][..16];
                        for (place, sum) in into.iter_mut().enumerate() {
                            let product = f64::from(g[place / 4]) * f64::from(g[place % 4]);
                            *sum += p[word] * product / rest.len() as f64;
                        }
                    }
                }
            }
        }
    }
    let off = |draws| {
        let options = FisherOptions {
            context: 20,
            targets: 6,
            sinks: 4,
            draws,
        };
        let found = fisher(&model, std::slice::from_ref(&document), options, &|_| {}).unwrap();
        assert_eq!(found.tokens, 16);
        let layers = found.layers.iter();
        let got: Vec<f32> = layers
            .flat_map(|layer| layer.keys.iter().chain(&layer.values).flatten().copied())
            .collect();
        assert_eq!(got.len(), want.len());
        let square = |x: f64| x * x;
        let apart: f64 = got
            .iter()
            .zip(&want)
            .map(|(a, b)| square(f64::from(*a) - b))
            .sum();
        (apart / want.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
    };
    let (few, many) = (off(2), off(3000));
    assert!(many < 0.06, "{many}");
    assert!(few > 2.0 * many, "{few} {many}");
}

#[test]
fn samples_are_files_of_the_promised_shape() {
    let model = model(3, 8, 101);
    let folder = tempfile::tempdir().unwrap();
    let documents = [document("one", 40, 101), document("two", 40, 101)];
    export::documents(&model, &documents, folder.path(), "cal", &|_| {}).unwrap();
    let bytes = std::fs::read(folder.path().join("cal-01.safetensors")).unwrap();
    let header = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    assert!(header.is_multiple_of(8));
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    assert_eq!(json["K"]["dtype"], "BF16");
    assert_eq!(json["V"]["shape"], serde_json::json!([3, 40, 2, 8]));
    let at = |name: &str, end: usize| {
        8 + header + usize::try_from(json[name]["data_offsets"][end].as_u64().unwrap()).unwrap()
    };
    assert_eq!(at("token_ids", 1), bytes.len());
    let sequence = prefilled(&model, &documents[1].ids, 0).unwrap();
    let want = sequence.cache().bytes(2, Part::Key, 0..40).unwrap();
    assert_eq!(&bytes[at("K", 1) - want.len()..at("K", 1)], want);

    let options = FisherOptions {
        context: 30,
        targets: 10,
        sinks: 4,
        draws: 1,
    };
    let found = fisher(&model, &documents, options, &|_| {}).unwrap();
    let path = folder.path().join("fisher.safetensors");
    export::fisher(&model, &found, &path).unwrap();
    let bytes = std::fs::read(path).unwrap();
    let header = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    assert_eq!(json["fisher_v"]["shape"], serde_json::json!([3, 2, 8, 8]));
    assert_eq!(bytes.len() - 8 - header, 2 * 3 * 2 * 64 * 4 + 4);
    assert_eq!(bytes[bytes.len() - 4..], 26_f32.to_le_bytes());
}

#[test]
fn documents_too_short_to_be_judged_are_named() {
    let model = model(1, 8, 101);
    let problem = Bench::new(&model, &document("stub", 324, 101), CUT)
        .err()
        .unwrap();
    assert_eq!(problem.to_string(), "document stub is too short");
}

#[test]
fn figures_are_rows_a_table_and_a_picture() {
    let model = model(2, 32, 101);
    let documents = [document("one", 325, 101), document("two", 330, 101)];
    let registry = Registry::with_baselines();
    let chosen: Vec<&dyn Codec> = registry.iter().collect();
    let figures = levels::judge_set(&model, "heldout", &documents, &chosen, CUT).unwrap();
    let mut report = kvtier_benches::report::Report::new("quality", std::path::Path::new("."));
    figures.iter().for_each(|one| one.rows(&mut report));
    assert_eq!(report.median("quality.heldout.raw.bits"), Some(16.0));
    assert_eq!(report.median("quality.heldout.zstd.kl_mean"), Some(0.0));
    assert!(report.median("quality.heldout.int4.kl").unwrap() > 0.0);
    assert!(report.holds());
    assert_eq!(
        verdict::table(&figures).row_count(),
        registry.iter().count()
    );
    let folder = tempfile::tempdir().unwrap();
    let picture = folder.path().join("quality.svg");
    plot::draw(&picture, &figures).unwrap();
    let picture = std::fs::read_to_string(picture).unwrap();
    assert!(picture.contains("int4") && !picture.contains("zstd"));
}

// Goal: a promise of the ladder is checked, and a broken one is seen.
#[test]
fn levels_of_the_ladder_are_held_to_their_promise() {
    let figures = |bits, divergence| verdict::SetFigures {
        set: "heldout",
        name: "balanced",
        level: Level::BALANCED,
        documents: vec![quality::Judged {
            bits,
            change: Change {
                positions: 100,
                divergence,
                same_top: 99,
                exact_loss: 200.0,
                coded_loss: 200.1,
            },
            greedy: 1.0,
        }],
    };
    let holds = |bits, divergence| {
        let mut report = kvtier_benches::report::Report::new("q", std::path::Path::new("."));
        figures(bits, divergence).rows(&mut report);
        report.holds()
    };
    assert!(holds(3.1, 0.09));
    assert!(!holds(3.3, 0.09), "4.8 x");
    assert!(!holds(3.1, 0.11), "KL 1.1e-3");
}
