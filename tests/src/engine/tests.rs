//! Tests of the whole engine on small random models of every shape.
//!
//! Upstairs:   nobody.
//! Downstairs: the engine's public face.

use std::ops::Range;
use std::sync::Arc;

use super::*;

pub(super) const BLOCK_TOKENS: usize = 16;
const PROMPT_TOKENS: usize = 90;

fn heads(query_heads: usize, kv_heads: usize, key_dim: usize, value_dim: usize) -> Attention {
    Attention::Heads {
        query_heads,
        kv_heads,
        key_dim,
        value_dim,
        window: None,
    }
}

fn window(window: usize) -> Attention {
    Attention::Heads {
        query_heads: 4,
        kv_heads: 2,
        key_dim: 16,
        value_dim: 16,
        window: Some(window),
    }
}

const LATENT: Attention = Attention::Latent {
    query_heads: 4,
    latent_dim: 24,
    rope_dim: 8,
    nope_dim: 16,
    value_dim: 12,
};

fn config(layers: Vec<Attention>) -> ModelConfig {
    ModelConfig {
        name: "tiny".into(),
        vocab: 211,
        hidden: 48,
        intermediate: 80,
        rope_theta: 10_000.0,
        norm_epsilon: 1e-5,
        max_positions: 2048,
        layers,
    }
}

/// Every shape the engine knows, by name.
pub(super) fn shapes() -> Vec<(&'static str, Vec<Attention>)> {
    vec![
        ("MHA", vec![heads(4, 4, 16, 16); 2]),
        ("GQA", vec![heads(6, 2, 16, 16); 3]),
        ("MQA", vec![heads(4, 1, 16, 16); 2]),
        ("wide keys", vec![heads(4, 2, 24, 8); 2]),
        ("wide values", vec![heads(4, 2, 8, 20); 2]),
        ("sliding window", vec![window(20); 2]),
        ("MLA", vec![LATENT; 2]),
        // No width is a whole number of vectors.
        ("odd widths", vec![heads(3, 1, 10, 6); 2]),
        (
            "all kinds",
            vec![heads(4, 2, 16, 16), window(7), LATENT, heads(4, 1, 8, 16)],
        ),
    ]
}

pub(super) fn model(layers: Vec<Attention>) -> Arc<Model> {
    Arc::new(Model::random(config(layers), 7).unwrap())
}

pub(super) fn options() -> SequenceOptions {
    SequenceOptions {
        block_tokens: BLOCK_TOKENS,
        ..SequenceOptions::new(160)
    }
}

pub(super) fn prompt(length: usize) -> Vec<u32> {
    (0..2000)
        .take(length)
        .map(|i| (i * i * 31 + i * 17 + 5) % 211)
        .collect()
}

fn prefilled(model: &Arc<Model>, options: SequenceOptions, tokens: &[u32]) -> Sequence {
    let mut sequence = Sequence::new(Arc::clone(model), options).unwrap();
    sequence.prefill(tokens).unwrap();
    sequence
}

/// Copies `tokens` of every part of every layer, as a restore would.
fn copy(from: &Sequence, to: &mut Sequence, tokens: Range<usize>) {
    for (layer, attention) in from.model().config().layers.iter().enumerate() {
        for spec in attention.parts() {
            let mut bytes = vec![0; spec.bytes() * tokens.len()];
            from.cache()
                .export(layer, spec.part, tokens.clone(), &mut bytes)
                .unwrap();
            to.import(layer, spec.part, tokens.clone(), &bytes).unwrap();
        }
    }
}

pub(super) fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|score| score.to_bits()).collect()
}

// Goal: the promise the whole project is judged by, for every shape and both dtypes.
// Method: compute a prompt cold; for each block boundary restore a fresh sequence up to it,
// compute the rest, compare logits bit by bit and 32 greedy tokens.
#[test]
fn a_restored_run_continues_bit_identically_from_every_block_boundary() {
    let tokens = prompt(PROMPT_TOKENS);
    for (name, layers) in shapes() {
        for dtype in [CacheDtype::Bf16, CacheDtype::F16] {
            let model = model(layers.clone());
            let options = SequenceOptions { dtype, ..options() };
            let mut cold = prefilled(&model, options, &tokens);
            let cold_logits = bits(&cold.logits().unwrap());
            let mut restored_runs = Vec::new();
            for boundary in (0..PROMPT_TOKENS).step_by(BLOCK_TOKENS) {
                let mut run = Sequence::new(Arc::clone(&model), options).unwrap();
                copy(&cold, &mut run, 0..boundary);
                run.resume_at(boundary).unwrap();
                run.prefill(&tokens[boundary..]).unwrap();
                assert_eq!(
                    bits(&run.logits().unwrap()),
                    cold_logits,
                    "{name} from {boundary}"
                );
                restored_runs.push(run);
            }
            let continuation = cold.generate(32, None).unwrap();
            for mut run in restored_runs {
                assert_eq!(run.generate(32, None).unwrap(), continuation, "{name}");
            }
        }
    }
}

// Goal: the test above would notice wrong bytes.
// Method: flip one mantissa bit of one number of one restored part, for every layer and part.
#[test]
fn a_restored_run_differs_when_one_bit_of_the_cache_does() {
    let tokens = prompt(PROMPT_TOKENS);
    let model = model(vec![heads(4, 2, 16, 16), LATENT]);
    let cold = prefilled(&model, options(), &tokens);
    for (layer, attention) in model.config().layers.iter().enumerate() {
        for spec in attention.parts() {
            let mut run = Sequence::new(Arc::clone(&model), options()).unwrap();
            copy(&cold, &mut run, 0..80);
            let mut bytes = cold
                .cache()
                .bytes(layer, spec.part, 0..80)
                .unwrap()
                .to_vec();
            let place = 40 * spec.bytes();
            bytes[place] ^= 0x40;
            run.import(layer, spec.part, 0..80, &bytes).unwrap();
            run.resume_at(80).unwrap();
            run.prefill(&tokens[80..]).unwrap();
            let (got, cold) = (run.logits().unwrap(), cold.logits().unwrap());
            assert_ne!(bits(&got), bits(&cold), "layer {layer} {:?}", spec.part);
        }
    }
}

// Goal: a step's size changes no bit, so a prefix may be restored up to any token, and tokens
// that were decoded one by one may be saved like those of a prompt.
#[test]
fn the_cache_is_the_same_bytes_however_the_prompt_is_cut() {
    let tokens = prompt(PROMPT_TOKENS);
    for (name, layers) in shapes() {
        let model = model(layers);
        let whole = prefilled(&model, options(), &tokens);
        for cut in [1, 7, 16, 50] {
            let mut run = Sequence::new(Arc::clone(&model), options()).unwrap();
            tokens
                .chunks(cut)
                .for_each(|tokens| run.prefill(tokens).unwrap());
            assert_same_cache(&run, &whole, &format!("{name} cut by {cut}"));
        }
        let one_step = SequenceOptions {
            block_tokens: 128,
            ..options()
        };
        let run = prefilled(&model, one_step, &tokens);
        assert_same_cache(&run, &whole, &format!("{name} in one step"));
    }
}

pub(super) fn assert_same_cache(run: &Sequence, whole: &Sequence, what: &str) {
    assert_eq!(
        bits(&run.logits().unwrap()),
        bits(&whole.logits().unwrap()),
        "{what}"
    );
    for (layer, attention) in run.model().config().layers.iter().enumerate() {
        for PartSpec { part, .. } in attention.parts() {
            let all = |s: &Sequence| s.cache().bytes(layer, part, 0..90).unwrap().to_vec();
            assert!(all(run) == all(whole), "{what}: layer {layer} {part:?}");
        }
    }
}

// Goal: nothing is split by thread.
#[test]
fn one_thread_gives_the_same_bits_as_many() {
    let tokens = prompt(PROMPT_TOKENS);
    let model = model(vec![heads(4, 2, 16, 16), LATENT]);
    let with_threads = |count| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(count)
            .build()
            .unwrap();
        pool.install(|| prefilled(&model, options(), &tokens))
    };
    assert_same_cache(&with_threads(5), &with_threads(1), "five threads");
}

#[test]
fn a_run_repeats_its_bits_after_rewinding() {
    let tokens = prompt(PROMPT_TOKENS);
    let model = model(vec![heads(6, 2, 16, 16), LATENT]);
    let mut sequence = prefilled(&model, options(), &tokens);
    let first = bits(&sequence.logits().unwrap());
    sequence.generate(20, None).unwrap();
    sequence.rewind(32).unwrap();
    sequence.prefill(&tokens[32..]).unwrap();
    assert_eq!(bits(&sequence.logits().unwrap()), first);
}

// Goal: a window hides what lies before it, and only that.
#[test]
fn a_windowed_layer_sees_its_window_and_nothing_before() {
    let model = model(vec![window(20)]);
    let mut tokens = prompt(PROMPT_TOKENS);
    let logits = |tokens: &[u32]| bits(&prefilled(&model, options(), tokens).logits().unwrap());
    let base = logits(&tokens);
    tokens[PROMPT_TOKENS - 21] ^= 1;
    assert_eq!(logits(&tokens), base);
    tokens[PROMPT_TOKENS - 20] ^= 1;
    assert_ne!(logits(&tokens), base);
}

#[test]
fn different_seeds_and_shapes_have_different_fingerprints() {
    let of = |kv_heads, seed| {
        Model::random(config(vec![heads(4, kv_heads, 16, 16)]), seed)
            .unwrap()
            .fingerprint()
    };
    assert_eq!(of(2, 1), of(2, 1));
    assert_ne!(of(2, 1), of(2, 2));
    assert_ne!(of(2, 1), of(4, 1));
}

#[test]
fn hidden_states_are_kept_when_asked_for_and_refused_otherwise() {
    let tokens = prompt(40);
    let model = model(vec![heads(4, 2, 16, 16); 2]);
    let mut bytes = vec![0; 40 * 48 * CacheDtype::BYTES];
    let without = prefilled(&model, options(), &tokens);
    let refused = without.cache().export(0, Part::Hidden, 0..40, &mut bytes);
    assert!(matches!(refused, Err(EngineError::NoHidden)));

    let keeping = SequenceOptions {
        keep_hidden: true,
        ..options()
    };
    let with = prefilled(&model, keeping, &tokens);
    with.cache()
        .export(0, Part::Hidden, 0..40, &mut bytes)
        .unwrap();
    let embedded = model.embed(&tokens).unwrap();
    let expected: Vec<u8> = embedded
        .iter()
        .flat_map(|x| half::bf16::from_f32(*x).to_le_bytes())
        .collect();
    assert!(bytes == expected);
    let layer_0 = bytes.clone();
    with.cache()
        .export(1, Part::Hidden, 0..40, &mut bytes)
        .unwrap();
    assert!(bytes != layer_0);
}

#[test]
fn an_observer_hears_of_every_layer_of_every_step_when_its_bytes_are_there() {
    struct Heard(Vec<(usize, Range<usize>)>);
    impl Observer for Heard {
        fn layer_done(&mut self, cache: &KvCache, layer: usize, tokens: Range<usize>) {
            cache.bytes(layer, Part::Key, 0..tokens.end).unwrap();
            self.0.push((layer, tokens));
        }
    }
    let mut heard = Heard(Vec::new());
    let mut sequence = Sequence::new(model(vec![heads(4, 2, 16, 16); 2]), options()).unwrap();
    sequence.prefill_observed(&prompt(20), &mut heard).unwrap();
    assert_eq!(heard.0, [(0, 0..16), (1, 0..16), (0, 16..20), (1, 16..20)]);
}

#[test]
fn restorable_tokens_leaves_at_least_one_token_to_compute() {
    assert_eq!(restorable_tokens(0, 256), 0);
    assert_eq!(restorable_tokens(256, 256), 0);
    assert_eq!(restorable_tokens(257, 256), 256);
    assert_eq!(restorable_tokens(4096, 256), 3840);
}

#[test]
fn resume_is_refused_when_a_part_of_a_layer_is_missing() {
    let model = model(vec![heads(4, 2, 16, 16); 2]);
    let cold = prefilled(&model, options(), &prompt(48));
    let mut run = Sequence::new(Arc::clone(&model), options()).unwrap();
    copy(&cold, &mut run, 0..32);
    let error = run.resume_at(48).unwrap_err();
    assert!(matches!(
        error,
        EngineError::Hole {
            layer: 0,
            part: Part::Key,
            token: 32
        }
    ));
    assert_eq!(run.position(), 0);
    assert!(matches!(run.logits(), Err(EngineError::NothingComputed)));
    run.resume_at(32).unwrap();
}

#[test]
fn import_is_refused_when_it_would_rewrite_what_was_computed_or_does_not_fit() {
    let model = model(vec![heads(4, 2, 16, 16)]);
    let cold = prefilled(&model, options(), &prompt(48));
    let bytes = cold.cache().bytes(0, Part::Key, 16..32).unwrap();
    let mut run = prefilled(&model, options(), &prompt(32));
    assert!(matches!(
        run.import(0, Part::Key, 16..32, bytes),
        Err(EngineError::Tokens { .. })
    ));
    let short = &bytes[1..];
    let error = run.import(0, Part::Key, 32..48, short).unwrap_err();
    assert_eq!(
        error.to_string(),
        "import: the buffer is 1023 bytes; expected exactly 1024"
    );
    assert!(matches!(
        run.import(0, Part::Key, 150..166, bytes),
        Err(EngineError::Tokens { .. })
    ));
    assert!(matches!(
        run.import(0, Part::Rope, 32..48, bytes),
        Err(EngineError::NoSuchPart { .. })
    ));
    assert!(matches!(
        run.import(1, Part::Key, 32..48, bytes),
        Err(EngineError::NoSuchPart { .. })
    ));
    run.import(0, Part::Key, 32..48, bytes).unwrap();
}

#[test]
fn bad_tokens_and_full_caches_are_refused_by_name() {
    let mut run = Sequence::new(model(vec![heads(4, 2, 16, 16)]), options()).unwrap();
    let error = run.prefill(&[5, 211]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "token id 211 is not in the vocabulary; accepted: 0..211"
    );
    let error = run.prefill(&prompt(161)).unwrap_err();
    assert!(
        error.to_string().contains("accepted: within 0..160"),
        "{error}"
    );
}

#[test]
fn bad_shapes_and_options_are_refused_by_name() {
    let refused = |layer: Attention| {
        Model::random(config(vec![layer]), 1)
            .unwrap_err()
            .to_string()
    };
    assert!(refused(heads(5, 2, 16, 16)).contains("layers[0].kv_heads is 2"));
    assert!(refused(heads(4, 2, 15, 16)).contains("an even number"));
    assert!(refused(heads(4, 0, 16, 16)).contains("kv_heads is 0; accepted: 1 ..="));
    assert!(refused(window(0)).contains("window is 0"));
    let model = model(vec![heads(4, 2, 16, 16)]);
    let with = |options| {
        Sequence::new(Arc::clone(&model), options)
            .unwrap_err()
            .to_string()
    };
    assert!(with(SequenceOptions::new(2049)).contains("max_tokens is 2049; accepted: 1 ..= 2048"));
    assert!(
        with(SequenceOptions {
            block_tokens: 0,
            ..options()
        })
        .contains("block_tokens is 0")
    );
}
