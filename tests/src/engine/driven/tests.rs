//! Tests of every way to read a restore: each ends in the bits of a cold run.
//!
//! Upstairs:   nobody.
//! Downstairs: the engine's public face, on small random models of every shape.

use super::super::tests::{BLOCK_TOKENS, assert_same_cache, bits, model, options, prompt, shapes};
use super::*;
use crate::engine::{Attention, ModelConfig, PartSpec, SequenceOptions};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use std::time::Duration;

const PROMPT_TOKENS: usize = 90;
/// Five blocks and a piece; the rest of the prompt is left to compute.
const RESTORED: usize = 83;

/// How a cell that is not computed comes to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Load,
    Hidden,
}

/// Everything that a cold run left, to restore from.
struct Saved {
    cold: Sequence,
    tokens: Vec<u32>,
    logits: Vec<u32>,
    continuation: Vec<u32>,
}

impl Saved {
    fn new(layers: Vec<Attention>, keep_hidden: bool) -> Self {
        let tokens = prompt(PROMPT_TOKENS);
        let options = SequenceOptions {
            keep_hidden,
            ..options()
        };
        let mut cold = Sequence::new(model(layers), options).unwrap();
        cold.prefill(&tokens).unwrap();
        let mut run = Sequence::new(Arc::clone(cold.model()), options).unwrap();
        run.prefill(&tokens).unwrap();
        let logits = bits(&run.logits().unwrap());
        let continuation = run.generate(24, None).unwrap();
        Self {
            cold,
            tokens,
            logits,
            continuation,
        }
    }

    fn layers(&self) -> usize {
        self.cold.model().config().layers.len()
    }

    fn fresh(&self, keep_hidden: bool) -> Sequence {
        let options = SequenceOptions {
            keep_hidden,
            ..options()
        };
        Sequence::new(Arc::clone(self.cold.model()), options).unwrap()
    }

    /// Puts one cell in as `way` says.
    fn bring(&self, intake: &mut Intake<'_>, layer: usize, block: usize, way: Way) {
        let tokens = span(block);
        match way {
            Way::Hidden => {
                let bytes = self.bytes(layer, Part::Hidden, &tokens);
                intake
                    .import(layer, Part::Hidden, tokens.clone(), &bytes)
                    .unwrap();
                intake.rebuild(layer, tokens).unwrap();
            }
            Way::Load => {
                for PartSpec { part, .. } in self.cold.model().config().layers[layer].parts() {
                    let bytes = self.bytes(layer, part, &tokens);
                    intake.import(layer, part, tokens.clone(), &bytes).unwrap();
                }
            }
        }
    }

    fn bytes(&self, layer: usize, part: Part, tokens: &Range<usize>) -> Vec<u8> {
        let bytes = self.cold.cache().bytes(layer, part, tokens.clone());
        bytes.unwrap().to_vec()
    }

    /// The run ended where the cold one did: cache, scores and 24 more tokens.
    fn assert_same(&self, mut run: Sequence, what: &str) {
        assert_eq!(run.position(), PROMPT_TOKENS);
        assert_eq!(bits(&run.logits().unwrap()), self.logits, "{what}");
        assert_same_cache(&run, &self.cold, what);
        assert_eq!(run.generate(24, None).unwrap(), self.continuation, "{what}");
    }
}

/// Tokens of a restored block; the last one is short.
fn span(block: usize) -> Range<usize> {
    block * BLOCK_TOKENS..((block + 1) * BLOCK_TOKENS).min(RESTORED)
}

fn blocks() -> usize {
    RESTORED.div_ceil(BLOCK_TOKENS)
}

/// Deals cells in the order that it was made with: `compute` front to back, `arrive` whenever.
struct Script<'a> {
    saved: &'a Saved,
    compute: Vec<Cells>,
    /// Cells that are put in before the computation of this number; the others wait for their
    /// layer, or for the end.
    arrive: Vec<(usize, usize, usize, Way)>,
    by_layer: bool,
    done: Vec<(Cells, PrefillCost)>,
    waited: Vec<usize>,
}

impl<'a> Script<'a> {
    fn new(saved: &'a Saved) -> Self {
        Self {
            saved,
            compute: Vec::new(),
            arrive: Vec::new(),
            by_layer: false,
            done: Vec::new(),
            waited: Vec::new(),
        }
    }

    fn take(&mut self, intake: &mut Intake<'_>, now: impl Fn(usize, usize) -> bool) {
        for (when, layer, block, way) in std::mem::take(&mut self.arrive) {
            if now(when, layer) {
                self.saved.bring(intake, layer, block, way);
            } else {
                self.arrive.push((when, layer, block, way));
            }
        }
    }
}

impl Driver for Script<'_> {
    fn next_compute(&mut self, intake: &mut Intake<'_>) -> Result<Option<Cells>, EngineError> {
        let step = self.done.len();
        let last = step == self.compute.len() && !self.by_layer;
        self.take(intake, |when, _| when <= step || last);
        Ok(self.compute.get(step).cloned())
    }

    fn computed(&mut self, cells: &Cells, cost: PrefillCost) {
        self.done.push((cells.clone(), cost));
    }

    fn wait_layer(&mut self, intake: &mut Intake<'_>, layer: usize) -> Result<(), EngineError> {
        self.waited.push(layer);
        self.take(intake, |_, of| of == layer);
        Ok(())
    }
}

fn whole(block: usize, layers: usize) -> Cells {
    Cells {
        block,
        layers: 0..layers,
    }
}

// Goal: a reader that computes from the front while blocks arrive from the back ends as a cold
// run does, wherever the two meet and whenever each block comes.
// Method: every shape, every meeting point; blocks behind it arrive before a computation that is
// drawn at random, last block first; one block arrives although it is computed.
#[test]
fn two_ended_reader_continues_as_a_cold_run_wherever_front_and_back_meet() {
    let mut random = ChaCha8Rng::seed_from_u64(11);
    for (name, layers) in shapes() {
        let saved = Saved::new(layers, false);
        for meet in 0..=blocks() {
            let mut script = Script::new(&saved);
            script.compute = (0..meet)
                .map(|block| whole(block, saved.layers()))
                .collect();
            let twice = meet.saturating_sub(1);
            for block in (twice..blocks()).rev() {
                let when = random.random_range(0..=meet);
                let cells = (0..saved.layers()).map(|layer| (when, layer, block, Way::Load));
                script.arrive.extend(cells);
            }
            let mut run = saved.fresh(false);
            run.prefill_driven(&saved.tokens, RESTORED, &mut script)
                .unwrap();
            assert_eq!(script.done.len(), meet);
            saved.assert_same(run, &format!("{name}, meeting at {meet}"));
        }
    }
}

// Goal: a suffix may start at layer 0 while deeper layers of the prefix are on their way.
#[test]
fn layer_event_reader_continues_as_a_cold_run_when_layers_come_one_after_the_other() {
    for (name, layers) in shapes() {
        let saved = Saved::new(layers, false);
        let mut script = Script::new(&saved);
        script.by_layer = true;
        for layer in (0..saved.layers()).rev() {
            let cells = (0..blocks()).rev();
            let cells = cells.map(|block| (usize::MAX, layer, block, Way::Load));
            script.arrive.extend(cells);
        }
        let mut run = saved.fresh(false);
        run.prefill_driven(&saved.tokens, RESTORED, &mut script)
            .unwrap();
        assert_eq!(script.waited, (0..saved.layers()).collect::<Vec<_>>());
        saved.assert_same(run, name);
    }
}

// Goal: keys and values that are rebuilt from hidden states are the computed ones, bit by bit, in
// any order and without what stands before them.
#[test]
fn rebuilt_keys_and_values_have_the_bits_of_computed_ones() {
    for (name, layers) in shapes() {
        let saved = Saved::new(layers, true);
        let mut run = saved.fresh(true);
        let mut intake = run.intake();
        for block in (0..blocks()).rev() {
            for layer in (0..saved.layers()).rev() {
                saved.bring(&mut intake, layer, block, Way::Hidden);
            }
        }
        for (layer, attention) in saved.cold.model().config().layers.iter().enumerate() {
            for PartSpec { part, .. } in attention.parts() {
                let rebuilt = run.cache().bytes(layer, part, 0..RESTORED).unwrap();
                let computed = saved.bytes(layer, part, &(0..RESTORED));
                assert!(rebuilt == computed, "{name}: layer {layer} {part:?}");
            }
        }
    }
}

// Goal: the test above would notice a wrong bit of a hidden state.
#[test]
fn rebuilt_keys_and_values_differ_when_one_bit_of_a_hidden_state_does() {
    for (name, layers) in shapes() {
        let saved = Saved::new(layers, true);
        for layer in 0..saved.layers() {
            let mut run = saved.fresh(true);
            let mut bytes = saved.bytes(layer, Part::Hidden, &(0..16));
            bytes[5 * 48 * 2 + 8] ^= 0x40;
            let mut intake = run.intake();
            intake.import(layer, Part::Hidden, 0..16, &bytes).unwrap();
            intake.rebuild(layer, 0..16).unwrap();
            let [first, _] = saved.cold.model().config().layers[layer].parts();
            let rebuilt = run.cache().bytes(layer, first.part, 0..16).unwrap();
            let computed = saved.bytes(layer, first.part, &(0..16));
            assert!(rebuilt != computed, "{name}: layer {layer}");
            // Tokens beside it are their own.
            let token = first.bytes();
            assert!(rebuilt[..5 * token] == computed[..5 * token]);
            assert!(rebuilt[6 * token..] == computed[6 * token..]);
        }
    }
}

// Goal: without rounding the residual stream the promise above would be false, so the test above
// can fail: the engine does not round when nothing is kept.
#[test]
fn keeping_hidden_states_rounds_the_residual_stream_and_not_keeping_them_does_not() {
    let layers = shapes().swap_remove(0).1;
    let (kept, dropped) = (Saved::new(layers.clone(), true), Saved::new(layers, false));
    assert_ne!(kept.logits, dropped.logits);
    let mut run = kept.fresh(true);
    kept.bring(&mut run.intake(), 1, 0, Way::Hidden);
    let rebuilt = run.cache().bytes(1, Part::Key, 0..BLOCK_TOKENS).unwrap();
    assert!(rebuilt != dropped.bytes(1, Part::Key, &(0..BLOCK_TOKENS)));
}

// Goal: loaded, rebuilt and computed cells may be mixed, block by block and layer by layer: what a
// planner may decide, as far as it keeps to precedence (computed cells are a staircase).
// Method: every shape, plans drawn at random: a depth for each block that never grows towards the
// back, loads and rebuilds above it, in random order.
#[test]
fn mixed_reader_continues_as_a_cold_run_for_random_staircases_of_computed_cells() {
    let mut random = ChaCha8Rng::seed_from_u64(5);
    for (name, layers) in shapes() {
        let saved = Saved::new(layers, true);
        for round in 0..12 {
            let mut script = Script::new(&saved);
            let mut depth = saved.layers();
            for block in 0..blocks() {
                depth = random.random_range(0..=depth);
                if depth > 0 {
                    script.compute.push(whole(block, depth));
                }
                for layer in depth..saved.layers() {
                    let way = [Way::Load, Way::Hidden][random.random_range(0..2)];
                    let when = random.random_range(0..blocks());
                    script.arrive.push((when, layer, block, way));
                }
            }
            script.by_layer = round % 2 == 0;
            let mut run = saved.fresh(true);
            run.prefill_driven(&saved.tokens, RESTORED, &mut script)
                .unwrap();
            saved.assert_same(run, &format!("{name}, round {round}"));
        }
    }
}

// Goal: the layer at which a block's computation stopped costs a projection and no load, and a
// computation goes on from a layer whose input is there.
#[test]
fn a_block_that_was_computed_up_to_a_layer_leaves_its_input_to_go_on_from() {
    let saved = Saved::new(vec![shapes().swap_remove(0).1[0].clone(); 4], true);
    let mut run = saved.fresh(true);
    let mut script = Script::new(&saved);
    script.compute = (0..blocks()).map(|block| whole(block, 2)).collect();
    script.compute.extend((0..blocks()).map(|block| Cells {
        block,
        layers: 2..4,
    }));
    run.prefill_driven(&saved.tokens, RESTORED, &mut script)
        .unwrap();
    saved.assert_same(run, "layers 2..4 later");

    let mut run = saved.fresh(true);
    run.run_cells(&saved.tokens[..16], 0, 0..2, &mut Nobody, &mut Nobody)
        .unwrap();
    assert!(run.intake().has(1, &(0..16)) && !run.intake().has(2, &(0..16)));
    assert!(run.intake().rebuild(2, 0..16).unwrap());
    let rebuilt = run.cache().bytes(2, Part::Value, 0..16).unwrap();
    assert!(rebuilt == saved.bytes(2, Part::Value, &(0..16)));
}

// Goal: a driver that promises what is not there gets an error that names it, never tokens.
#[test]
fn a_promise_that_is_not_kept_is_an_error_and_not_a_wrong_answer() {
    let saved = Saved::new(vec![shapes().swap_remove(0).1[0].clone(); 2], true);
    let hole = |script: &mut Script<'_>| {
        let mut run = saved.fresh(true);
        let outcome = run.prefill_driven(&saved.tokens, RESTORED, script);
        assert_eq!(run.position(), 0);
        outcome.unwrap_err().to_string()
    };
    // Layer 1 of block 3 never comes.
    let mut script = Script::new(&saved);
    let all = (0..2).flat_map(|layer| (0..blocks()).map(move |block| (layer, block)));
    let all = all.map(|(layer, block)| (0, layer, block, Way::Load));
    script.arrive = all.filter(|cell| (cell.1, cell.2) != (1, 3)).collect();
    let text = hole(&mut script);
    assert_eq!(
        text,
        "layer 1, Key: token 48 was neither computed nor restored"
    );
    // Block 1 is computed before block 0 is there.
    let mut script = Script::new(&saved);
    script.compute = vec![whole(1, 2)];
    assert!(hole(&mut script).contains("layer 0, Key: token 0 was neither"));
    // A computation from a layer whose input nobody brought.
    script = Script::new(&saved);
    script.compute = vec![Cells {
        block: 0,
        layers: 1..2,
    }];
    assert!(hole(&mut script).contains("layer 1, Hidden: token 0 was neither"));
    // Cells that do not exist.
    for cells in [whole(6, 2), whole(0, 3), whole(0, 0)] {
        script = Script::new(&saved);
        script.compute = vec![cells];
        let text = hole(&mut script);
        assert!(
            text.contains("accepted: blocks 0..6, layers within 0..2"),
            "{text}"
        );
    }
    let mut run = saved.fresh(true);
    let all = run.prefill_driven(&saved.tokens, PROMPT_TOKENS, &mut Script::new(&saved));
    assert!(all.unwrap_err().to_string().contains("within 0..89"));
}

// Goal: a driver learns in the middle that a block will not come after all, and has it computed.
#[test]
fn a_reader_goes_on_after_a_load_that_failed_late() {
    struct Late<'a>(Script<'a>, bool);
    impl Driver for Late<'_> {
        fn next_compute(&mut self, intake: &mut Intake<'_>) -> Result<Option<Cells>, EngineError> {
            self.0.next_compute(intake)
        }
        fn computed(&mut self, cells: &Cells, cost: PrefillCost) {
            self.0.computed(cells, cost);
        }
        fn wait_layer(&mut self, intake: &mut Intake<'_>, layer: usize) -> Result<(), EngineError> {
            if layer == 1 && !self.1 {
                self.1 = true;
                return Err(EngineError::Driver("block 2 is lost".into()));
            }
            self.0.wait_layer(intake, layer)
        }
    }
    let saved = Saved::new(vec![shapes().swap_remove(0).1[0].clone(); 3], false);
    let mut script = Script::new(&saved);
    script.by_layer = true;
    let all = (0..3).flat_map(|layer| (0..blocks()).map(move |block| (layer, block)));
    let all = all.map(|(layer, block)| (usize::MAX, layer, block, Way::Load));
    script.arrive = all.collect();
    let mut late = Late(script, false);
    let mut run = saved.fresh(false);
    let lost = run.prefill_driven(&saved.tokens, RESTORED, &mut late);
    assert!(matches!(lost, Err(EngineError::Driver(_))));
    // What is before the lost block is brought first, then it is computed; the rest still comes.
    late.0.arrive.retain(|cell| cell.2 != 2);
    late.0
        .arrive
        .iter_mut()
        .filter(|cell| cell.2 < 2)
        .for_each(|cell| cell.0 = 0);
    late.0.compute = vec![whole(2, 3)];
    run.prefill_driven(&saved.tokens, RESTORED, &mut late)
        .unwrap();
    saved.assert_same(run, "after a loss");
}

// Goal: bytes of another size or kind are refused, and history stays.
#[test]
fn intake_refuses_hidden_parts_of_a_wrong_size_and_keeps_what_is_there() {
    let saved = Saved::new(vec![shapes().swap_remove(0).1[0].clone(); 2], true);
    let mut run = saved.fresh(true);
    let bytes = saved.bytes(0, Part::Hidden, &(0..16));
    let mut intake = run.intake();
    for wrong in [&bytes[1..], &[]] {
        let refused = intake.import(0, Part::Hidden, 0..16, wrong).unwrap_err();
        assert!(
            refused.to_string().ends_with("expected exactly 1536"),
            "{refused}"
        );
        assert!(matches!(
            intake.rebuild(0, 0..16),
            Err(EngineError::Hole { .. })
        ));
    }
    // A hidden state is no key: the sizes differ, and there is no other way in.
    assert!(intake.import(0, Part::Key, 0..16, &bytes).is_err());
    assert!(intake.import(2, Part::Hidden, 0..16, &bytes).is_err());
    assert!(intake.import(0, Part::Hidden, 0..16, &bytes).unwrap());
    assert!(!intake.import(0, Part::Hidden, 0..16, &[0; 1536]).unwrap());
    assert!(intake.rebuild(0, 0..16).unwrap() && !intake.rebuild(0, 0..16).unwrap());
    assert!(
        saved
            .fresh(false)
            .intake()
            .import(0, Part::Hidden, 0..16, &bytes)
            .is_err()
    );
    let mut ahead = saved.fresh(true);
    ahead.prefill(&saved.tokens[..20]).unwrap();
    assert!(
        ahead
            .intake()
            .import(0, Part::Hidden, 0..16, &bytes)
            .is_err()
    );
    assert!(ahead.intake().rebuild(0, 0..16).is_err());
}

// Goal: a planner hears what computing costs: every block and every step, with what stood before.
#[test]
fn costs_say_how_many_tokens_were_computed_behind_how_many_and_how_long_it_took() {
    let saved = Saved::new(vec![shapes().swap_remove(0).1[0].clone(); 2], false);
    let slow = SlowEngine {
        token: Duration::from_micros(300),
        ..SlowEngine::default()
    };
    let options = SequenceOptions {
        slow: Some(slow),
        ..options()
    };
    let mut run = Sequence::new(Arc::clone(saved.cold.model()), options).unwrap();
    let mut script = Script::new(&saved);
    script.compute = (0..2).map(|block| whole(block, 2)).collect();
    let rest = (2..blocks()).flat_map(|block| (0..2).map(move |layer| (layer, block)));
    script.arrive = rest
        .map(|(layer, block)| (0, layer, block, Way::Load))
        .collect();
    run.prefill_driven(&saved.tokens, RESTORED, &mut script)
        .unwrap();
    let told: Vec<_> = script.done.iter().map(|(_, cost)| *cost).collect();
    let steps = run.take_costs();
    let points = |costs: &[PrefillCost]| -> Vec<_> {
        costs
            .iter()
            .map(|cost| (cost.before, cost.tokens))
            .collect()
    };
    assert_eq!(points(&told), [(0, 16), (16, 16)]);
    assert_eq!(points(&steps), [(83, 7)]);
    for cost in told.iter().chain(&steps) {
        assert!(
            cost.took >= slow.prefill(cost.before, cost.tokens),
            "{cost:?}"
        );
    }
    assert!(run.take_costs().is_empty());
    saved.assert_same(run, "slowly");
}

// Goal: a model for which hidden states are worth loading, and one for which they are not.
#[test]
fn hidden_states_are_smaller_than_keys_and_values_for_wide_heads_only() {
    let eta = |config: &ModelConfig| {
        config.hidden_bytes_per_token() as f64 / config.bytes_per_token() as f64
    };
    assert!((eta(&ModelConfig::wide_heads(4)) - 0.25).abs() < 1e-9);
    // SmolLM2-135M: 576 wide, three KV heads of 64.
    let narrow = ModelConfig {
        hidden: 576,
        layers: vec![
            Attention::Heads {
                query_heads: 9,
                kv_heads: 3,
                key_dim: 64,
                value_dim: 64,
                window: None,
            };
            30
        ],
        ..ModelConfig::wide_heads(1)
    };
    assert!((eta(&narrow) - 1.5).abs() < 1e-9);
}

// Goal: the projection that kvtier defines for engines is what an engine computes: within the last
// bit of the stored type, where the engine fuses multiplications and the definition does not.
#[test]
fn reference_projection_rebuilds_what_the_engine_computed_to_the_last_bit_or_two() {
    use crate::engine::layer::{Layer, Mixer};
    use kvtier_kernels::profile::Rope;
    use kvtier_kernels::project::{Form, Heads, Norm, Projection, Weights};
    use kvtier_proto::Element;
    use kvtier_proto::descriptor::PartOrder;

    fn weights(config: &ModelConfig, layer: &Layer) -> Weights {
        let Mixer::Heads(mixer) = &layer.mixer else {
            panic!("heads only");
        };
        let rows = |from: usize, count: usize| {
            let mut rows = Vec::new();
            (from..from + count).for_each(|row| mixer.query_key_value.append_row(row, &mut rows));
            rows
        };
        let (queries, keys) = (
            mixer.query_heads * mixer.key_dim,
            mixer.kv_heads * mixer.key_dim,
        );
        let heads = |weights, dim| Heads {
            weights,
            bias: Vec::new(),
            dim,
        };
        let values = rows(queries + keys, mixer.kv_heads * mixer.value_dim);
        let width = u32::try_from(mixer.key_dim).unwrap();
        Weights {
            norm: Norm {
                gain: layer.attention_norm.clone(),
                epsilon: config.norm_epsilon,
            },
            k: heads(rows(queries, keys), mixer.key_dim),
            v: heads(values, mixer.value_dim),
            k_norm: None,
            rope: Some(Rope::plain(config.rope_theta.into(), width, true)),
        }
    }

    let saved = Saved::new(shapes().swap_remove(4).1, true);
    let model = saved.cold.model();
    let form = Form {
        element: Element::Bf16,
        order: PartOrder::TokenMajor,
    };
    for (at, layer) in model.layers.iter().enumerate() {
        let projection = Projection::new(weights(model.config(), layer), form).unwrap();
        let hidden = saved.bytes(at, Part::Hidden, &(16..48));
        let [key, value] = [Part::Key, Part::Value].map(|part| saved.bytes(at, part, &(16..48)));
        let (mut k, mut v) = (vec![0; key.len()], vec![0; value.len()]);
        projection.project(&hidden, 16, &mut k, &mut v).unwrap();
        for (what, got, want) in [("K", k, key), ("V", v, value)] {
            let numbers = |bytes: &[u8]| -> Vec<f32> {
                let pairs = bytes.as_chunks::<2>().0.iter();
                pairs
                    .map(|pair| half::bf16::from_le_bytes(*pair).to_f32())
                    .collect()
            };
            let (got, want) = (numbers(&got), numbers(&want));
            let same = got.iter().zip(&want).filter(|(a, b)| a == b).count();
            assert!(
                same * 100 >= got.len() * 99,
                "{what}: {same} of {}",
                got.len()
            );
            for (a, b) in got.iter().zip(&want) {
                assert!(
                    (a - b).abs() <= 0.008 * b.abs() + 1e-4,
                    "{what}: {a} for {b}"
                );
            }
        }
    }
}
