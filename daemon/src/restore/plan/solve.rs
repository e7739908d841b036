//! The Lagrangian solver: the best mix of whole assignments, and a bound that no plan beats.
//!
//! Upstairs:   `round` makes one assignment of the mix.
//! Downstairs: `master` prices a second of each resource, `table` says what cells cost.
//!
//! At given prices every cell is on its own (or every staircase, by a table of best ends), and the
//! sum of the cheapest choices is a lower bound of the end. The cheapest assignment joins the mix,
//! the mix gives new prices, until both ends are within `GAP`. It is the subgradient method with
//! its step worked out: some ten to thirty rounds where the method takes hundreds, the optimal
//! fractions beside the bound, and damage is a resource like any other.
//!
//! Invariants kept here
//!   Q4  A bound is the value of the dual at prices that were tried: valid however early it ended.

use super::master::{Master, Prices};
use super::request::{GPU, RESOURCES_MAX};
use super::table::{NEVER_S, Seconds, Table, add};

/// What is done with each cell: the index of a choice, or `RECOMPUTE`.
pub(super) type Assignment = Vec<u8>;
/// The cell is recomputed.
pub(super) const RECOMPUTE: u8 = u8::MAX;
/// The mix is good enough when its end is this near to the bound.
const GAP: f64 = 1e-3;
/// Rounds at most; the bound is valid after any.
const ROUNDS_MAX: usize = 80;

/// Which sets of cells may be recomputed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// Any: what the engine needs before it can is left out. This is the fluid bound.
    Free,
    /// Layers from 0 up, never more of a later chunk.
    Staircase,
}

/// The relaxed problem's solution.
#[derive(Debug)]
pub(super) struct Relaxed {
    /// No assignment of this shape ends earlier.
    pub(super) bound_s: f64,
    /// End of the mix.
    pub(super) end_s: f64,
    /// Assignments and their weights, which sum to 1.
    pub(super) mix: Vec<(Assignment, f64)>,
    pub(super) prices: Prices,
}

/// Work of each resource and damage of an assignment.
pub(super) fn work(table: &Table, assignment: &[u8]) -> (Seconds, f64) {
    let (mut work, mut damage) = ([0.0; RESOURCES_MAX], 0.0);
    let mut recompute = 0.0;
    for (cell, picked) in assignment.iter().enumerate() {
        if *picked == RECOMPUTE {
            recompute += table.recompute_s(cell);
        } else if let Some(choice) = table.choice(cell, *picked) {
            add(&mut work, &choice.cost, 1.0);
            damage += choice.damage;
        }
    }
    work[GPU] += recompute;
    (work, damage)
}

/// Solves the relaxed problem. `None` when a cell can neither be brought nor recomputed, or damage
/// cannot be kept within what is accepted.
pub(super) fn relax(table: &Table, shape: Shape) -> Option<Relaxed> {
    let even = 1.0 / table.resources as f64;
    let mut prices = Prices {
        second: [even; RESOURCES_MAX],
        damage: NEVER_S,
        end_s: 0.0,
    };
    let mut known = vec![cheapest(table, shape, &prices)?];
    let first = known.first()?;
    let (ends, damage) = ends_of(table, first);
    if damage > table.budget {
        return None;
    }
    let mut master = Master::new(table.resources, table.budget, ends, damage);
    let mut bound_s = 0.0_f64;
    for _ in 0..ROUNDS_MAX {
        prices = master.solve()?;
        let found = cheapest(table, shape, &prices)?;
        let (ends, damage) = ends_of(table, &found);
        let paid = ends.iter().zip(&prices.second);
        let paid: f64 = paid.map(|(end, price)| end * price).sum();
        bound_s = bound_s.max(paid + prices.damage * (damage - table.budget));
        if prices.end_s - bound_s <= GAP * prices.end_s || known.contains(&found) {
            break;
        }
        master.add(ends, damage);
        known.push(found);
    }
    let weights = master.weights();
    let mix = weights
        .into_iter()
        .filter_map(|(index, weight)| Some((known.get(index)?.clone(), weight)));
    Some(Relaxed {
        bound_s,
        end_s: prices.end_s,
        mix: mix.collect(),
        prices,
    })
}

fn ends_of(table: &Table, assignment: &[u8]) -> (Seconds, f64) {
    let (mut ends, damage) = work(table, assignment);
    for (end, after) in ends.iter_mut().zip(&table.after).take(table.resources) {
        *end += after;
    }
    (ends, damage)
}

/// Cheapest choice of each class: its price and index.
fn choices(table: &Table, prices: &Prices) -> Vec<Option<(f64, u8)>> {
    let price = |choice: &super::table::Choice| {
        let pairs = choice.cost.iter().zip(&prices.second);
        let seconds: f64 = pairs.map(|(cost, price)| cost * price).sum();
        if choice.damage > 0.0 {
            seconds + prices.damage * choice.damage
        } else {
            seconds
        }
    };
    let cheapest = |choices: &Vec<super::table::Choice>| {
        let priced = (0..).zip(choices).map(|(index, one)| (price(one), index));
        priced.min_by(|a, b| a.0.total_cmp(&b.0))
    };
    table.classes.iter().map(cheapest).collect()
}

/// The assignment that costs least at these prices.
pub(super) fn cheapest(table: &Table, shape: Shape, prices: &Prices) -> Option<Assignment> {
    let classes = choices(table, prices);
    let of = |class: &usize| classes.get(*class).copied().flatten();
    let gpu = prices.second[GPU];
    match shape {
        Shape::Free => {
            let cells = table.class.iter().zip(&table.recompute);
            let pick = |(class, recompute): (&usize, &f64)| match of(class) {
                Some((price, _)) if *recompute < NEVER_S && gpu * recompute < price => {
                    Some(RECOMPUTE)
                }
                Some((_, index)) => Some(index),
                None => (*recompute < NEVER_S).then_some(RECOMPUTE),
            };
            cells.map(pick).collect()
        }
        Shape::Staircase => {
            let depths = staircase(table, gpu, of)?;
            let mut assignment = Vec::with_capacity(table.cells());
            for (chunk, depth) in depths.iter().enumerate() {
                let cells = table.class.iter().skip(chunk * table.layers);
                for (layer, class) in cells.take(table.layers).enumerate() {
                    let recomputed = layer < *depth;
                    let index = if recomputed { RECOMPUTE } else { of(class)?.1 };
                    assignment.push(index);
                }
            }
            Some(assignment)
        }
    }
}

/// Layers to recompute of each chunk, never more than of the one before: the cheapest such stairs.
/// Chunks that are passed over are none of the stairs. `best[b]` is what the chunks from here on
/// cost when none goes deeper than `b`.
fn staircase(
    table: &Table,
    gpu: f64,
    of: impl Fn(&usize) -> Option<(f64, u8)>,
) -> Option<Vec<usize>> {
    let steps = table.layers + 1;
    let mut best = vec![0.0; steps];
    let mut picked: Vec<Vec<usize>> = Vec::with_capacity(table.chunks);
    for chunk in (0..table.chunks).rev() {
        if table.is_passed(chunk) {
            picked.push(Vec::new());
            continue;
        }
        let cells = table.class.iter().zip(&table.recompute);
        let cells = cells.skip(chunk * table.layers).take(table.layers);
        // What `depth` layers cost more than none, as far as they can be recomputed at all.
        let (mut more, mut needed) = (Vec::with_capacity(steps), 0);
        let mut sum = 0.0;
        more.push(sum);
        for (depth, (class, recompute)) in (1..).zip(cells) {
            let brought = of(class);
            if brought.is_none() {
                needed = depth;
            }
            if *recompute >= NEVER_S || more.len() < depth {
                continue;
            }
            sum += gpu * recompute - brought.map_or(0.0, |(price, _)| price);
            more.push(sum);
        }
        let mut least: Option<(f64, usize)> = None;
        let mut choice = Vec::with_capacity(steps);
        for (depth, behind) in best.iter_mut().enumerate() {
            let sum = more.get(depth).filter(|_| depth >= needed);
            let sum = sum.map_or(f64::INFINITY, |sum| sum + *behind);
            if least.is_none_or(|(cost, _)| sum < cost) {
                least = Some((sum, depth));
            }
            let (cost, depth) = least?;
            *behind = cost;
            choice.push(depth);
        }
        picked.push(choice);
    }
    let mut bound = table.layers;
    best.last().filter(|cost| cost.is_finite())?;
    let depths = picked.iter().rev().map(|choice| {
        let Some(depth) = choice.get(bound) else {
            return Some(0);
        };
        bound = *depth;
        Some(*depth)
    });
    depths.collect()
}
