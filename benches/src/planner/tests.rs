//! Tests of the simulator itself: closed forms where there is one, and a bound that holds.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is the failure report"
)]

use kvtierd::restore::plan::Prefill;

use super::scenes::Kind;
use super::trace::Trace;
use super::world::{Learned, Line, Place, Scene, Went, run};
use super::{bound, quantile};

/// Blocks of a megabyte and 256 tokens, no latency anywhere, a suffix that takes as long as a
/// quarter of a block.
fn scene(blocks: usize, load_s: f64, compute_s: f64) -> (Scene, Learned) {
    let prefill = Prefill {
        per_token_s: compute_s / 256.0,
        ..Prefill::default()
    };
    let line = Line {
        trace: Trace::steady(1e6 / load_s),
        latency_s: 0.0,
    };
    let scene = Scene {
        places: vec![Place::Device(0); blocks],
        block_tokens: 256,
        block_bytes: 1e6,
        suffix_tokens: 64,
        prefill,
        devices: vec![line],
        link: Trace::steady(1e15),
        gpu: Trace::steady(1.0),
        hop_s: 0.0,
    };
    let learned = Learned {
        rates: vec![1e6 / load_s],
        prefill: Some(prefill),
    };
    (scene, learned)
}

fn near(value: f64, wanted: f64) -> bool {
    (value - wanted).abs() <= 1e-6 * wanted
}

#[test]
fn trace_says_when_something_is_done_as_what_was_done_by_then() {
    let trace = Trace::new([(1.0, 2.0), (0.5, 0.0), (1.0, 4.0)], 1.0);
    assert_eq!(trace.done_by(1.25), 2.0);
    assert_eq!(trace.after(0.0, 2.0), 1.0, "not after the pause");
    assert_eq!(trace.after(0.5, 2.0), 1.75);
    assert_eq!(trace.after(1.2, 0.0), 1.2);
    for amount in [0.1, 1.9, 2.1, 5.0, 6.5, 100.0] {
        let done = trace.after(0.3, amount);
        assert!(
            near(trace.done_by(done) - trace.done_by(0.3), amount),
            "{amount}"
        );
    }
}

// Goal: at constant rates both ends meet where arithmetic says, to a block.
#[test]
fn run_takes_what_the_closed_form_says_at_constant_rates() {
    for (blocks, load_ms, compute_ms) in [(100, 10.0, 10.0), (90, 5.0, 40.0), (90, 40.0, 5.0)] {
        let (load_s, compute_s) = (load_ms / 1e3, compute_ms / 1e3);
        let (scene, learned) = scene(blocks, load_s, compute_s);
        let went = run(&scene, &learned).unwrap();
        let all = blocks as f64;
        let fluid_s = all * load_s * compute_s / (load_s + compute_s) + compute_s / 4.0;
        let most_s = fluid_s + load_s.max(compute_s);
        assert!(
            went.ttft_s >= fluid_s * 0.9999 && went.ttft_s <= most_s,
            "{blocks} {load_ms} {compute_ms}: {went:?}, not {fluid_s} to {most_s}"
        );
        assert!(near(bound::clairvoyant_s(&scene), fluid_s));
        assert!(near(bound::load_s(&scene), all * load_s + compute_s / 4.0));
        assert!(near(bound::compute_s(&scene), (all + 0.25) * compute_s));
        assert_eq!(went.computed + went.loaded, blocks);
    }
}

// Goal: where one end alone is as good, it is that one's time to the last digit.
#[test]
fn run_is_pure_load_or_pure_recompute_at_the_extremes() {
    let (fast, learned) = scene(50, 1e-3, 1.0);
    let went = run(&fast, &learned).unwrap();
    assert!(near(went.ttft_s, bound::load_s(&fast)), "{went:?}");
    assert_eq!((went.computed, went.loaded), (0, 50));
    let (slow, learned) = scene(50, 10.0, 2e-3);
    let went = run(&slow, &learned).unwrap();
    assert!(near(went.ttft_s, bound::compute_s(&slow)), "{went:?}");
    assert_eq!(went.computed, 50);
}

// Goal: the bound is one: no restore of any kind, no pure strategy, is ever below it.
#[test]
fn clairvoyant_is_never_above_any_strategy() {
    for kind in Kind::all() {
        for seed in 1000..1040 {
            let (scene, learned) = kind.draw(seed);
            let bound_s = bound::clairvoyant_s(&scene) * (1.0 - 1e-6);
            let went = run(&scene, &learned).unwrap();
            let pure_s = bound::load_s(&scene).min(bound::compute_s(&scene));
            assert!(
                bound_s <= went.ttft_s && bound_s <= pure_s,
                "{} {seed}: {bound_s} beside {went:?} and {pure_s}",
                kind.name
            );
        }
    }
}

#[test]
fn run_says_the_same_of_the_same_seed() {
    let kind = Kind::all()[2];
    let once = || -> Went {
        let (scene, learned) = kind.draw(7);
        run(&scene, &learned).unwrap()
    };
    assert_eq!(once(), once());
}

#[test]
fn quantile_takes_the_value_that_so_many_are_not_above() {
    let values: Vec<f64> = (1..=20).rev().map(f64::from).collect();
    assert_eq!(quantile(&values, 0.95), 19.0);
    assert_eq!(quantile(&values, 1.0), 20.0);
    assert!(quantile(&[], 0.5).is_nan());
}
