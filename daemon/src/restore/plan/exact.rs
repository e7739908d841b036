//! Two resources that are used, the GPU and one more: sorting is enough, and exact.
//!
//! Upstairs:   `plan` tries this first.
//! Downstairs: `table`.
//!
//! Cells are sorted by seconds of recompute per second of loading. Where along this order the cost
//! of recompute never falls and that of loading never rises, the first m cells are the cheapest to
//! recompute and leave the cheapest to load, whatever m is: so one of these front parts is best,
//! and the best is where the two ends meet. Columns of a model with equal layers, and Cake's
//! chunks, are like that. Anything else goes to the general solver.

use super::draft::Draft;
use super::request::GPU;
use super::solve::{Assignment, RECOMPUTE};
use super::table::{NEVER_S, Table};

/// The best staircase, if this table is of the simple kind.
pub(super) fn two_resources(table: &Table) -> Option<Draft> {
    let link = link(table)?;
    let load = |cell: usize| table.choice(cell, 0).and_then(|one| one.cost.get(link));
    let mut order: Vec<(f64, f64, usize)> = Vec::with_capacity(table.cells());
    for cell in 0..table.cells() {
        let (recompute, load) = (table.recompute_s(cell), *load(cell)?);
        if recompute >= NEVER_S {
            return None;
        }
        order.push((recompute, load, cell));
    }
    let key = |(recompute, load, _): &(f64, f64, usize)| {
        let ratio = recompute / load;
        if ratio.is_nan() { 0.0 } else { ratio }
    };
    order.sort_by(|a, b| key(a).total_cmp(&key(b)).then(a.2.cmp(&b.2)));
    let is_ordered = order.is_sorted_by(|a, b| a.0 <= b.0 && a.1 >= b.1);
    let cells: Vec<usize> = order.iter().map(|(_, _, cell)| *cell).collect();
    if !is_ordered || !fronts_are_stairs(&cells, table.layers) {
        return None;
    }
    let front = meeting(table, link, &order);
    let mut assignment: Assignment = vec![0; table.cells()];
    for cell in cells.iter().take(front) {
        *assignment.get_mut(*cell)? = RECOMPUTE;
    }
    Some(Draft::new(table, assignment))
}

/// The one other resource, when all cells have one way to be brought and that uses nothing else.
fn link(table: &Table) -> Option<usize> {
    let mut link = None;
    if table.passed.contains(&true) {
        return None;
    }
    for class in &table.classes {
        let [only] = class.as_slice() else {
            return None;
        };
        let used = only
            .cost
            .iter()
            .enumerate()
            .filter(|(_, cost)| **cost > 0.0);
        for (resource, _) in used {
            if resource == GPU || link.is_some_and(|other| other != resource) {
                return None;
            }
            link = Some(resource);
        }
    }
    link
}

/// Whether every front part of the order is a staircase: no cell comes before the layer below it,
/// or the same layer of the chunk before.
fn fronts_are_stairs(order: &[usize], layers: usize) -> bool {
    let mut depths: Vec<usize> = Vec::new();
    order.iter().all(|cell| {
        let (chunk, layer) = (cell / layers, cell % layers);
        if depths.len() == chunk {
            depths.push(0);
        }
        let before = chunk.checked_sub(1).and_then(|before| depths.get(before));
        let deep_enough = before.is_none_or(|before| *before > layer);
        let Some(depth) = depths.get_mut(chunk) else {
            return false;
        };
        let next = *depth == layer && deep_enough;
        *depth += 1;
        next
    })
}

/// How many cells of the order to recompute: recompute's end rises with it, loading's end falls.
fn meeting(table: &Table, link: usize, order: &[(f64, f64, usize)]) -> usize {
    let after = |resource: usize| table.after.get(resource).copied().unwrap_or(0.0);
    let (mut sums, mut recompute, mut loaded) = (vec![(0.0, 0.0)], 0.0, 0.0);
    for (more, load, _) in order {
        recompute += more;
        loaded += load;
        sums.push((recompute, loaded));
    }
    let ends = |front: usize| {
        let (recompute, taken) = sums.get(front).copied().unwrap_or_default();
        (after(GPU) + recompute, after(link) + loaded - taken)
    };
    let fronts: Vec<usize> = (0..sums.len()).collect();
    let first = fronts.partition_point(|front| {
        let (gpu, load) = ends(*front);
        gpu < load
    });
    let end = |front: usize| {
        let (gpu, load) = ends(front);
        gpu.max(load)
    };
    let before = first.saturating_sub(1);
    let first = first.min(order.len());
    if end(before) <= end(first) {
        before
    } else {
        first
    }
}
