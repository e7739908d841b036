//! Promises of every plan, whatever the request.

use proptest::prelude::*;

use super::cases::{ABLE, random, raw, simple};
use crate::restore::plan::{
    Action, Invalid, LoadOrder, PlanRequest, Prefill, Reader, RestorePlan, Tier, plan,
};

/// What holds for any plan of this request.
fn check(request: &PlanRequest, plan: &RestorePlan) {
    let layers = request.layers;
    let mut seen = vec![0; request.cells.len()];
    plan.recompute
        .iter()
        .chain(&plan.load)
        .for_each(|cell| seen[*cell] += 1);
    for (cell, action) in plan.actions.iter().enumerate() {
        let ordered = !matches!(action, Action::Resident | Action::Tail);
        assert_eq!(seen[cell], usize::from(ordered), "cell {cell} {action:?}");
        assert_eq!(*action == Action::Tail, cell / layers >= plan.tail_from);
        let below = cell % layers < plan.depths[cell / layers];
        assert_eq!(*action == Action::Recompute, below, "cell {cell}");
        if let Action::Load(index) | Action::Project(index) = action {
            assert!(usize::from(*index) < request.cells[cell].len());
        }
    }
    let damage: f64 = (plan.actions.iter().zip(&request.cells))
        .map(|(action, variants)| match action {
            Action::Load(index) => variants[usize::from(*index)].damage,
            _ => 0.0,
        })
        .sum();
    let accepted = request.damage_max * (plan.tail_from * layers) as f64;
    assert!(damage <= accepted * (1.0 + 1e-12), "{damage} of {accepted}");
    // What the engine needs to recompute a layer of a chunk: that layer of all chunks before.
    let far = |chunk: usize| {
        let cells = chunk * layers..(chunk + 1) * layers;
        cells.into_iter().any(|cell| {
            let near = |one: &crate::restore::plan::Variant| one.tier <= Tier::Memory;
            !request.cells[cell].iter().any(near)
        })
    };
    let mut most = layers;
    for (chunk, depth) in plan.depths.iter().enumerate() {
        assert!(
            *depth <= most || !far(chunk),
            "chunk {chunk}: {:?}",
            plan.depths
        );
        if far(chunk) || *depth > 0 {
            assert!(*depth <= most, "chunk {chunk}: {:?}", plan.depths);
            most = *depth;
        }
    }
    assert!(plan.ttft_s.is_finite() && plan.ttft_s >= 0.0);
    assert!(plan.ttft_s <= plan.otherwise.better_s() * (1.0 + 1e-9));
    assert!(plan.bounds.fluid_s <= plan.ttft_s * (1.0 + 1e-6));
    assert!(plan.bounds.both_s() <= plan.ttft_s * (1.0 + 1e-6));
}

fn any_reader() -> impl Strategy<Value = Reader> {
    any::<[bool; 5]>().prop_map(|[a, b, c, d, e]| Reader {
        prefix_only: a,
        two_ended: b,
        layer_events: c,
        hidden_proj: d,
        gpu_decode: e,
    })
}

/// Numbers as no sane caller sends them.
fn odd() -> impl Strategy<Value = f64> {
    prop_oneof![
        Just(0.0),
        Just(1.0),
        Just(-1.0),
        Just(f64::NAN),
        Just(f64::INFINITY),
        Just(1e300),
        Just(1e-300),
        Just(1e18),
        Just(0.5),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn plans_keep_their_promises_of_any_request(
        seed in any::<u64>(), reader in any_reader(),
        gone in proptest::collection::vec(any::<u16>(), 0..4),
        fixed_s in 0.0..0.01, poor in any::<bool>(),
    ) {
        let (mut request, _) = random(seed, (1, 12), (1, 6));
        request.reader = reader;
        request.prefill.fixed_s = fixed_s;
        request.rates_are_poor = poor;
        for gone in gone {
            let cell = usize::from(gone) % request.cells.len();
            request.cells[cell].clear();
        }
        let plan = plan(&request).unwrap();
        check(&request, &plan);
    }

    #[test]
    fn absurd_numbers_are_an_error_or_a_sound_plan(
        seed in any::<u64>(), reader in any_reader(), values in proptest::collection::vec(odd(), 8),
        which in 0_usize..8,
    ) {
        let (mut request, _) = random(seed, (1, 6), (1, 4));
        request.reader = reader;
        match which {
            0 => request.resources[0].share = values[0],
            1 => request.resources[1].rate = values[1],
            2 => request.prefill = Prefill { fixed_s: values[0], per_context_s: values[1],
                per_token_s: values[2], attention_s: values[3] },
            3 => request.damage_max = values[0],
            4 => request.cells[0][0].uses[0].as_mut().unwrap().amount = values[0],
            5 => request.cells[0][0].damage = values[0],
            6 => request.layer_weights = values[..request.layers].to_vec(),
            _ => {
                let all = request.resources.iter_mut().zip(&values);
                all.for_each(|(one, value)| one.rate = *value);
            }
        }
        if let Ok(plan) = plan(&request) {
            assert!(plan.ttft_s >= 0.0 && !plan.ttft_s.is_nan());
            assert_eq!(plan.actions.len(), request.cells.len());
        }
    }
}

#[test]
fn counts_that_do_not_fit_are_named() {
    let sound = simple(2, 2, vec![raw(Tier::Device).through(1, 1.0)]);
    let wrong = |change: fn(&mut PlanRequest)| {
        let mut request = sound.clone();
        change(&mut request);
        plan(&request).unwrap_err()
    };
    assert!(matches!(
        wrong(|one| one.layers = 0),
        Invalid::Count { what: "layers", .. }
    ));
    assert!(matches!(
        wrong(|one| one.layers = usize::MAX),
        Invalid::Count { what: "cells", .. }
    ));
    assert!(matches!(
        wrong(|one| one.resources.clear()),
        Invalid::Count {
            what: "resources",
            ..
        }
    ));
    assert!(matches!(
        wrong(|one| one.chunks[1] = 0),
        Invalid::Count {
            what: "tokens of a chunk",
            ..
        }
    ));
    let far = |one: &mut PlanRequest| one.cells[3][0] = raw(Tier::Device).through(7, 1.0);
    assert!(matches!(
        wrong(far),
        Invalid::Count {
            what: "resource",
            ..
        }
    ));
    let nan = |one: &mut PlanRequest| one.prefill.per_token_s = f64::NAN;
    assert!(matches!(wrong(nan), Invalid::Number { .. }));
}

#[test]
fn an_empty_prefix_has_an_empty_plan() {
    let plan = plan(&simple(0, 4, vec![])).unwrap();
    assert_eq!((plan.actions.len(), plan.ttft_s), (0, 0.0));
}

#[test]
fn nothing_stored_means_compute_everything() {
    let mut request = simple(8, 4, vec![]);
    request.prefill.per_token_s = 1e-4;
    let plan = plan(&request).unwrap();
    assert_eq!(plan.tail_from, 0);
    assert!((plan.ttft_s - 8.0 * 512.0 * 1e-4).abs() < 1e-9);
}

#[test]
fn poor_rates_keep_the_order_that_meets() {
    let mut request = simple(16, 8, vec![raw(Tier::Device).through(1, 1e-3)]);
    request.prefill.per_token_s = 2e-5;
    request.suffix_tokens = 512;
    request.reader.layer_events = true;
    assert_eq!(plan(&request).unwrap().order, LoadOrder::Layers);
    request.rates_are_poor = true;
    assert_eq!(plan(&request).unwrap().order, LoadOrder::FromTheBack);
}

#[test]
fn chunks_of_host_memory_in_front_are_loaded_first_and_do_not_end_the_stairs() {
    let mut request = simple(16, 4, vec![raw(Tier::Device).through(1, 4e-3)]);
    request.prefill.per_token_s = 2e-5;
    let near = vec![raw(Tier::Memory).through(2, 1e-4)];
    request.cells[..4 * 4].fill(near);
    let plan = plan(&request).unwrap();
    assert_eq!(plan.depths[..4], [0; 4]);
    assert!(plan.depths[4] == 4, "{:?}", plan.depths);
    assert_eq!(plan.load[..16], (0..16).collect::<Vec<_>>());
    check(&request, &plan);
}

// Two-ended readers compute the front: what is stored of it saves little. Readers of a prefix need
// it.
#[test]
fn the_front_is_worth_little_to_two_ended_readers_and_most_to_the_others() {
    let mut request = simple(16, 1, vec![raw(Tier::Device).through(1, 5e-3)]);
    request.prefill.per_token_s = 2e-5;
    request.reader = ABLE;
    let of = |request: &PlanRequest, chunks: std::ops::Range<usize>| {
        let mut without = request.clone();
        without.cells[chunks].fill(Vec::new());
        plan(&without).unwrap().ttft_s - plan(request).unwrap().ttft_s
    };
    let (front, back) = (of(&request, 0..2), of(&request, 14..16));
    assert!(front < 1e-9 && back > 1e-3, "{front} {back}");
    request.reader.two_ended = false;
    let (front, back) = (of(&request, 0..2), of(&request, 14..16));
    assert!(front > back && back > 1e-3, "{front} {back}");
}
