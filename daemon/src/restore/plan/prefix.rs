//! Readers that take a loaded prefix and compute what follows: how long a prefix to load.
//!
//! Upstairs:   `plan`, for readers that are not two-ended.
//! Downstairs: `solve` and `round` say how to load all of it, `order` when a part of it is there.
//!
//! What is loaded of a shorter prefix is what would be of the whole: the mix of tiers and levels is
//! worked out once, and every length is predicted with it.

use super::draft::Draft;
use super::order::Layers;
use super::request::{GPU, PlanRequest};
use super::solve::{Relaxed, Shape, relax};
use super::table::{Table, add};
use super::{pure_load, round};

/// The length with the earliest first token: its table and draft, and the bound over all lengths.
pub(super) fn best(request: &PlanRequest, loads: &Table) -> (Table, Draft, f64) {
    let relaxed = relax(loads, Shape::Free);
    let rounded = relaxed.as_ref().and_then(|one| round::round(loads, one));
    let whole = rounded.unwrap_or_else(|| pure_load(loads));
    let (mut best, mut bound_s) = ((f64::INFINITY, 0), f64::INFINITY);
    let mut layers = Layers::none(loads.layers);
    let mut least_s = 0.0; // at these prices, of the cells so far
    for length in 0..=loads.chunks {
        let ends = Table::ends(request, length);
        let predicted = layers.predict(&ends);
        let ttft_s = predicted.layers_s.min(predicted.from_the_back_s);
        if ttft_s < best.0 {
            best = (ttft_s, length);
        }
        if let Some(relaxed) = &relaxed {
            bound_s = bound_s.min(at_prices(&ends, relaxed, least_s, loads.budget));
        }
        let cells = (length * loads.layers..).take(loads.layers);
        for (cell, layer) in cells.zip(&mut layers.loads) {
            let pick = whole.assignment.get(cell);
            if let Some(choice) = pick.and_then(|pick| loads.choice(cell, *pick)) {
                add(layer, &choice.cost, 1.0);
            }
            least_s += relaxed
                .as_ref()
                .map_or(0.0, |one| cheapest_s(loads, one, cell));
        }
    }
    let table = loads.front(request, best.1);
    let cells = whole.assignment.into_iter().take(table.cells());
    let mut draft = Draft::new(&table, cells.collect());
    if draft.damage > table.budget {
        // A shorter prefix may do less damage in all.
        draft = pure_load(&table);
    }
    if draft.damage > table.budget {
        let nothing = loads.front(request, 0);
        let draft = Draft::new(&nothing, Vec::new());
        return (nothing, draft, bound_s.min(best.0));
    }
    (table, draft, bound_s.min(best.0))
}

/// No prefix ends before the suffix of the whole one has run.
pub(super) fn chain_s(loads: &Table) -> f64 {
    loads.suffix.iter().sum()
}

/// What a cell costs at least at the prices of the whole prefix.
fn cheapest_s(table: &Table, relaxed: &Relaxed, cell: usize) -> f64 {
    let price = |choice: &super::table::Choice| {
        let pairs = choice.cost.iter().zip(&relaxed.prices.second);
        let seconds: f64 = pairs.map(|(cost, price)| cost * price).sum();
        seconds + choice.damage * relaxed.prices.damage
    };
    let prices = table.choices(cell).iter().map(price);
    prices.fold(f64::INFINITY, f64::min)
}

/// The dual bound of a length: work at its prices, and what follows on each resource. Without loads
/// it is the engine's step alone.
fn at_prices(ends: &Table, relaxed: &Relaxed, least_s: f64, budget: f64) -> f64 {
    let whole = ends.after[GPU];
    let pairs = ends.after.iter().zip(&relaxed.prices.second);
    let after: f64 = pairs.map(|(after, price)| after * price).sum();
    whole.max(least_s + after - budget * relaxed.prices.damage)
}
