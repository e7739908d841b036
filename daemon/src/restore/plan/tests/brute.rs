//! Small requests beside every assignment that there is.

use super::cases::{random, raw, simple};
use crate::restore::plan::request::RESOURCES_MAX;
use crate::restore::plan::solve::{RECOMPUTE, work};
use crate::restore::plan::table::{Seconds, Table, add};
use crate::restore::plan::{Bounds, GPU, Prefill, Tier, exact, search};

/// The earliest end over all staircases and all choices of the other cells.
fn brute(table: &Table) -> f64 {
    let mut best = f64::INFINITY;
    let mut depths = vec![0; table.chunks];
    each_staircase(table, 0, table.layers, &mut depths, &mut best);
    best
}

fn each_staircase(
    table: &Table,
    chunk: usize,
    most: usize,
    depths: &mut Vec<usize>,
    best: &mut f64,
) {
    if chunk == table.chunks {
        let mut work = [0.0; RESOURCES_MAX];
        let mut rest = Vec::new();
        for cell in 0..table.cells() {
            if cell % table.layers < depths[cell / table.layers] {
                work[GPU] += table.recompute_s(cell);
            } else {
                rest.push(cell);
            }
        }
        each_choice(table, &rest, work, 0.0, best);
        return;
    }
    for depth in 0..=most {
        depths[chunk] = depth;
        each_staircase(table, chunk + 1, depth, depths, best);
    }
}

fn each_choice(table: &Table, rest: &[usize], work: Seconds, damage: f64, best: &mut f64) {
    if damage > table.budget || table.end_s(&work) >= *best {
        return;
    }
    let Some((cell, rest)) = rest.split_first() else {
        *best = table.end_s(&work);
        return;
    };
    for choice in table.choices(*cell) {
        let mut more = work;
        add(&mut more, &choice.cost, 1.0);
        each_choice(table, rest, more, damage + choice.damage, best);
    }
}

#[test]
fn sorting_equals_brute_force_on_12_cells() {
    for (chunks, layers) in [(12, 1), (6, 2), (4, 3), (3, 4), (1, 12)] {
        for io in 1..40 {
            let variant = raw(Tier::Device).through(1, f64::from(io) * 0.07);
            let mut request = simple(chunks, layers, vec![variant]);
            request.prefill = Prefill {
                per_token_s: 1e-3,
                attention_s: 1e-7,
                ..Prefill::default()
            };
            let table = Table::new(&request, chunks, true);
            let draft = exact::two_resources(&table).unwrap();
            let (end, best) = (table.end_s(&draft.work), brute(&table));
            assert!(
                (end - best).abs() < 1e-9,
                "{chunks} x {layers}, {io}: {end} {best}"
            );
        }
    }
}

#[test]
fn general_solver_is_within_2_percent_of_brute_force_on_12_cells() {
    let (mut equal, mut worst) = (0, (1.0_f64, 0));
    for seed in 0..300 {
        let layers = 1 + (seed % 4) as usize;
        let chunks = 12 / layers;
        let (request, _) = random(seed, (1, chunks), (layers, layers));
        let mut table = Table::new(&request, request.chunks.len(), true);
        table.passed.fill(false);
        let mut bounds = Bounds {
            fluid_s: f64::INFINITY,
            chain_s: f64::INFINITY,
        };
        let drafts = search(&table, &mut bounds);
        let ends = drafts.iter().map(|draft| table.end_s(&draft.work));
        let (end, best) = (ends.fold(f64::INFINITY, f64::min), brute(&table));
        for draft in &drafts {
            let (again, damage) = work(&table, &draft.assignment);
            assert!(damage <= table.budget);
            assert!((table.end_s(&again) - table.end_s(&draft.work)).abs() < 1e-9);
            assert!(
                draft
                    .assignment
                    .iter()
                    .filter(|one| **one == RECOMPUTE)
                    .count()
                    <= 12
            );
        }
        assert!(bounds.fluid_s <= best * (1.0 + 1e-9), "seed {seed}");
        equal += usize::from(end <= best * (1.0 + 1e-9));
        worst = if end / best > worst.0 {
            (end / best, seed)
        } else {
            worst
        };
    }
    println!("{equal} of 300 equal brute force, worst {worst:?}");
    assert!(worst.0 <= 1.02, "{equal} equal, worst {worst:?}");
}
