//! The reference engine on the real model: right, and restorable.
//!
//! Upstairs:   nobody.
//! Downstairs: `kvtier_tests::engine`, with the weights that `kvtier_tests::weights` fetches once.
//!
//! Comparison with KV computed by another implementation needs its files: set KVTIER_TEST_KV to
//! the folder that holds them. Without it one line says that the comparison was skipped.
//!
//! Not here on purpose: speed (see the example `engine_speed`).
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a panic is the failure report"
)]

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use kvtier_tests::engine::{self, Model, Part, Sequence, SequenceOptions, Tokenizer};
use kvtier_tests::harness::skip;
use kvtier_tests::{text, weights};

/// The model, loaded once for all tests of this file.
fn reference() -> &'static (Arc<Model>, Tokenizer) {
    static REFERENCE: OnceLock<(Arc<Model>, Tokenizer)> = OnceLock::new();
    REFERENCE.get_or_init(|| {
        let file = weights::model_file(None).unwrap_or_else(|error| panic!("{error}"));
        let (model, tokenizer) = engine::load(&file.path, file.sha256).unwrap();
        (Arc::new(model), tokenizer)
    })
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|score| score.to_bits()).collect()
}

// Goal: the demo's promise, without a daemon between.
// Method: 600 real tokens cold; restore 512 of them into a fresh sequence; compare logits bit by
// bit and 32 tokens.
#[test]
fn a_restored_run_of_the_real_model_continues_bit_identically() {
    let (model, tokenizer) = reference();
    let tokens = tokenizer.encode(text::CONSTITUTION).unwrap()[..600].to_vec();
    let mut cold = Sequence::new(Arc::clone(model), SequenceOptions::new(700)).unwrap();
    cold.prefill(&tokens).unwrap();

    let mut restored = Sequence::new(Arc::clone(model), SequenceOptions::new(700)).unwrap();
    for layer in (0..model.config().layers.len()).rev() {
        for part in [Part::Value, Part::Key] {
            let bytes = cold.cache().bytes(layer, part, 0..512).unwrap();
            restored.import(layer, part, 0..512, bytes).unwrap();
        }
    }
    restored.resume_at(512).unwrap();
    restored.prefill(&tokens[512..]).unwrap();

    assert_eq!(
        bits(&restored.logits().unwrap()),
        bits(&cold.logits().unwrap())
    );
    assert_eq!(
        restored.generate(32, None).unwrap(),
        cold.generate(32, None).unwrap()
    );
}

// Goal: hidden states of the real model are enough too, though they are larger than its KV.
// Method: 300 real tokens cold; in a fresh sequence, layers 0..20 rebuilt and the others loaded,
// from the last block on; compare as above, and with what rounding the layers' inputs costs.
#[test]
fn the_real_model_continues_bit_identically_from_hidden_states_and_kv_mixed() {
    let (model, tokenizer) = reference();
    let tokens = tokenizer.encode(text::CONSTITUTION).unwrap()[..300].to_vec();
    let options = SequenceOptions {
        block_tokens: 64,
        keep_hidden: true,
        ..SequenceOptions::new(400)
    };
    let mut cold = Sequence::new(Arc::clone(model), options).unwrap();
    cold.prefill(&tokens).unwrap();
    let mut restored = Sequence::new(Arc::clone(model), options).unwrap();
    for block in (0..4).rev().map(|block| block * 64..(block + 1) * 64) {
        for layer in 0..30 {
            let parts: &[Part] = match layer < 20 {
                true => &[Part::Hidden],
                false => &[Part::Key, Part::Value],
            };
            let mut intake = restored.intake();
            for part in parts {
                let bytes = cold.cache().bytes(layer, *part, block.clone()).unwrap();
                intake.import(layer, *part, block.clone(), bytes).unwrap();
            }
            intake.rebuild(layer, block.clone()).unwrap();
        }
    }
    restored.resume_at(256).unwrap();
    restored.prefill(&tokens[256..]).unwrap();
    let scores = cold.logits().unwrap();
    assert_eq!(bits(&restored.logits().unwrap()), bits(&scores));
    let continuation = cold.generate(16, None).unwrap();
    assert_eq!(restored.generate(16, None).unwrap(), continuation);

    let config = model.config();
    assert_eq!(
        config.hidden_bytes_per_token() * 2,
        config.bytes_per_token() * 3
    );
    // Activations of 16 bits, as serving engines have them, say nearly the same.
    let mut unrounded = Sequence::new(Arc::clone(model), SequenceOptions::new(400)).unwrap();
    unrounded.prefill(&tokens).unwrap();
    let spread = |scores: &[f32]| {
        scores
            .iter()
            .fold(0.0_f32, |most, score| most.max(score.abs()))
    };
    let apart = unrounded.logits().unwrap();
    let apart: Vec<f32> = apart.iter().zip(&scores).map(|(a, b)| a - b).collect();
    assert!(
        spread(&apart) > 0.0 && spread(&apart) < 0.05 * spread(&scores),
        "{}",
        spread(&apart)
    );
}

#[test]
fn the_model_answers_a_question_sensibly() {
    let (model, tokenizer) = reference();
    let prompt = tokenizer
        .encode(&Tokenizer::chat("What is the capital of France?"))
        .unwrap();
    let mut sequence = Sequence::new(Arc::clone(model), SequenceOptions::new(100)).unwrap();
    sequence.prefill(&prompt).unwrap();
    let answer = sequence.generate(24, tokenizer.end_of_turn()).unwrap();
    let answer = tokenizer.decode(&answer).unwrap();
    assert!(answer.contains("Paris"), "{answer:?}");
}

#[test]
fn the_shape_of_the_model_is_the_one_its_kv_sizes_are_computed_from() {
    let config = reference().0.config();
    assert_eq!(config.layers.len(), 30);
    assert_eq!(config.bytes_per_token(), 23_040);
    assert_eq!(
        (config.hidden, config.vocab, config.max_positions),
        (576, 49_152, 8192)
    );
}

#[test]
fn the_shipped_text_fits_the_model_with_room_to_continue() {
    let tokens = reference().1.encode(text::CONSTITUTION).unwrap().len();
    assert!((6_000..=7_900).contains(&tokens), "{tokens} tokens");
}

#[test]
fn texts_of_the_judging_sets_fill_the_samples() {
    for set in [text::calibration(), text::heldout(), text::foreign()] {
        for document in set {
            let tokens = reference().1.encode(&document.text).unwrap().len();
            assert!(tokens >= 1024, "{}: {tokens} tokens", document.name);
        }
    }
}

#[test]
fn encoding_round_trips_text_of_every_sort() {
    let tokenizer = &reference().1;
    for sample in [
        text::CONSTITUTION,
        "",
        " leading and trailing \n\n",
        "digits 1234567890, 3.14",
        "na\u{ef}ve caf\u{e9} \u{1f600} \u{4f60}\u{597d}\ttabs\r\n",
        "def f(x):\n    return x ** 2\n",
    ] {
        let tokens = tokenizer.encode(sample).unwrap();
        assert_eq!(tokenizer.decode(&tokens).unwrap(), sample);
    }
}

// Goal: the tokens are those of the model's own tokenizer.
// Method: texts whose tokens another implementation recorded: titles of the Jargon File (public
// domain) and a comment of CPython's heapq.py (PSF-2.0).
#[test]
fn encoding_gives_the_tokens_another_implementation_recorded() {
    let titles = "Hackish Ingenuity\n\n A Story About \u{2018}Magic'\n\n Some AI Koans\n\n";
    let comment = "it in the current tournament (because the value \"wins\" over\nthe last output";
    let recorded: [(&str, &[u32]); 2] = [
        (
            titles,
            &[
                56, 580, 621, 533, 1639, 10998, 1116, 330, 10124, 6810, 1551, 41229, 23, 1116,
                2015, 5646, 24358, 487, 1116,
            ],
        ),
        (
            comment,
            &[
                269, 281, 260, 1574, 33681, 365, 17587, 260, 1685, 476, 103, 927, 18, 690, 198,
                1195, 1596, 3124,
            ],
        ),
    ];
    for (text, tokens) in recorded {
        assert_eq!(reference().1.encode(text).unwrap(), tokens);
    }
}

#[test]
fn control_tokens_are_one_token_each_and_digits_stand_alone() {
    let tokenizer = &reference().1;
    assert_eq!(tokenizer.encode("<|im_start|>").unwrap(), [1]);
    assert_eq!(tokenizer.encode("<|im_end|>").unwrap(), [2]);
    assert_eq!(tokenizer.end_of_turn(), Some(2));
    let digits = tokenizer.encode("2026").unwrap();
    let one_by_one: Vec<u32> = ["2", "0", "2", "6"]
        .iter()
        .flat_map(|d| tokenizer.encode(d).unwrap())
        .collect();
    assert_eq!(digits, one_by_one);
}

/// One document whose KV another implementation computed in bf16.
struct Recorded {
    tokens: Vec<u32>,
    key: Vec<f32>,
    value: Vec<f32>,
}

impl Recorded {
    /// Reads a safetensors file: an 8-byte length, a JSON header, the data.
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
        let data = |name: &str| {
            let offset = |i: usize| json[name]["data_offsets"][i].as_u64().unwrap() as usize;
            &bytes[8 + header + offset(0)..8 + header + offset(1)]
        };
        let bf16 = |name| {
            data(name)
                .chunks(2)
                .map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32())
                .collect()
        };
        let tokens = data("token_ids").chunks(4);
        let tokens = tokens
            .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        Self {
            tokens,
            key: bf16("K"),
            value: bf16("V"),
        }
    }
}

fn recorded_folder() -> Option<PathBuf> {
    let folder = std::env::var_os("KVTIER_TEST_KV").map(PathBuf::from);
    if folder.is_none() {
        let test = "keys_and_values_agree_with_recorded_ones_of_another_implementation";
        skip(test, "KVTIER_TEST_KV is not set");
    }
    folder
}

/// Relative distance of two vectors: |a - b| / |b|.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (difference / b.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
}

// Goal: the model is the model: KV as another implementation computes it from the same weights.
// Method: that one rounded weights and every intermediate to bf16, so equality is not to be had;
// a wrong rotation, norm, head order or layer shows as a distance near 1.
#[test]
fn keys_and_values_agree_with_recorded_ones_of_another_implementation() {
    let Some(folder) = recorded_folder() else {
        return;
    };
    let (model, tokenizer) = reference();
    for name in ["prose", "code", "mixed"] {
        let recorded = Recorded::read(&folder.join(format!("{name}.kv.safetensors")));
        let text = tokenizer.decode(&recorded.tokens).unwrap();
        assert_eq!(tokenizer.encode(&text).unwrap(), recorded.tokens, "{name}");
        let count = recorded.tokens.len();
        let mut sequence = Sequence::new(Arc::clone(model), SequenceOptions::new(count)).unwrap();
        sequence.prefill(&recorded.tokens).unwrap();
        let (mut worst, layer_len) = ((0.0, 0, Part::Key), count * 192);
        for layer in 0..model.config().layers.len() {
            for (part, all) in [(Part::Key, &recorded.key), (Part::Value, &recorded.value)] {
                let bytes = sequence.cache().bytes(layer, part, 0..count).unwrap();
                let ours = bytes
                    .chunks(2)
                    .map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32());
                let ours: Vec<f32> = ours.collect();
                let off = distance(&ours, &all[layer * layer_len..(layer + 1) * layer_len]);
                if off > worst.0 {
                    worst = (off, layer, part);
                }
            }
        }
        println!(
            "{name}: worst relative distance {:.4} in layer {} {:?}",
            worst.0, worst.1, worst.2
        );
        assert!(worst.0 < 0.06, "{name}: {worst:?}");
    }
}
