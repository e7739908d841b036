//! From the best mix to one assignment: a staircase, whole cells, within the damage accepted.
//!
//! Upstairs:   `plan` asks for the best draft of a table.
//! Downstairs: `solve` brings the mix, `draft` is what is changed.
//!
//! 1. Fractions of recompute are levelled so that they fall along chunks and layers: in the order
//!    of falling fractions every front part is a staircase. The best one is taken.
//! 2. The other cells take the choices of the mix, each so that work and damage stay near to what
//!    the fractions say (the error of a cell is carried to the next).
//! 3. While too much damage is done, the change that costs least for it is made; then, as long as
//!    one helps, the change that lowers the end most. Changes that the mix does not see, two cells
//!    at a time, are tried where there are few cells: there a cell weighs more than the mix knows.

use super::draft::{Draft, Move, score};
use super::request::{GPU, RESOURCES_MAX};
use super::solve::{Assignment, RECOMPUTE, Relaxed, Shape, cheapest, relax};
use super::table::{NEVER_S, Seconds, Table, add};

/// Up to so many cells every front part is tried, and two changes at a time.
const CELLS_FEW: usize = 48;
/// Changes at most, of many cells and of few.
const CHANGES_MAX: usize = 48;
/// No change is made for less than this part of the end.
const WORTH: f64 = 1e-9;
/// A draft this near to the bound is good enough.
const NEAR: f64 = 2e-3;

/// In which order cells of equal fractions join the stairs. Where all layers of far chunks behind
/// near ones are half recomputed, half of the layers do what the mix wants, half of the chunks do
/// not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ties {
    Chunks,
    Layers,
}

/// What the mix does on average with a cell that is brought.
#[derive(Debug, Clone, Copy)]
struct Wish {
    cost: Seconds,
    damage: f64,
}

/// The best draft that this mix leads to.
pub(super) fn round(table: &Table, relaxed: &Relaxed) -> Option<Draft> {
    let spare = cheapest(table, Shape::Free, &relaxed.prices)?;
    let spare = brought(table, &spare);
    let fractions = levelled(table, relaxed);
    let wishes = wishes(table, relaxed, &spare);
    let mut best: Option<(f64, Draft)> = None;
    for ties in [Ties::Chunks, Ties::Layers] {
        let order = order(table, &fractions, ties);
        for front in fronts(table, &order, &wishes)? {
            let recomputed = order.get(..front).unwrap_or_default();
            let assignment = diffuse(table, relaxed, &spare, &wishes, recomputed);
            let mut draft = Draft::new(table, assignment);
            if !mend(table, &mut draft) {
                continue;
            }
            polish(table, &mut draft, relaxed.bound_s);
            let score = draft.score(table);
            if best.as_ref().is_none_or(|(least, _)| score < *least) {
                best = Some((score, draft));
            }
        }
        let near = relaxed.bound_s * (1.0 + NEAR);
        if best.as_ref().is_some_and(|(score, _)| *score <= near) {
            break;
        }
    }
    best.map(|(_, draft)| draft)
}

/// The best draft among those that recompute what the draft or one assignment of the mix does.
pub(super) fn refine(table: &Table, relaxed: &Relaxed, draft: Draft) -> Draft {
    let mut best = (draft.score(table), draft.clone());
    let of_mix = relaxed.mix.iter().map(|(assignment, _)| assignment);
    for assignment in of_mix.chain([&draft.assignment]) {
        let given = table.recomputing(|cell| assignment.get(cell) == Some(&RECOMPUTE));
        let Some(mix) = relax(&given, Shape::Free) else {
            continue;
        };
        let Some(mut draft) = round(&given, &mix) else {
            continue;
        };
        polish(table, &mut draft, relaxed.bound_s);
        let score = draft.score(table);
        if score < best.0 {
            best = (score, draft);
        }
    }
    best.1
}

/// The choice of each cell should it be brought: the one of `picks`, else the first without damage.
fn brought(table: &Table, picks: &[u8]) -> Assignment {
    let exact = |cell| {
        let choices = (0..).zip(table.choices(cell));
        let least = choices.min_by(|a, b| a.1.damage.total_cmp(&b.1.damage));
        least.map_or(RECOMPUTE, |(index, _)| index)
    };
    let picks = picks.iter().enumerate();
    let pick = |(cell, pick): (usize, &u8)| match *pick {
        RECOMPUTE => exact(cell),
        index => index,
    };
    picks.map(pick).collect()
}

/// Fraction of recompute of each cell, at most that of the layer below and of the chunk before.
fn levelled(table: &Table, relaxed: &Relaxed) -> Vec<f64> {
    let mut fractions = vec![0.0; table.cells()];
    for (assignment, weight) in &relaxed.mix {
        for (fraction, pick) in fractions.iter_mut().zip(assignment) {
            *fraction += if *pick == RECOMPUTE { *weight } else { 0.0 };
        }
    }
    let mut above = vec![1.0_f64; table.layers];
    for (chunk, fractions) in fractions.chunks_mut(table.layers).enumerate() {
        if table.is_passed(chunk) {
            fractions.fill(0.0);
            continue;
        }
        let mut below = 1.0_f64;
        for (fraction, above) in fractions.iter_mut().zip(&mut above) {
            // Weights are sums of roundings: what differs by less is equal.
            let level = (*fraction * 1e6).round() / 1e6;
            *fraction = level.min(below).min(*above);
            (below, *above) = (*fraction, *fraction);
        }
    }
    fractions
}

/// Cells by falling fraction, equal ones chunk by chunk or layer by layer: every front part is a
/// staircase.
fn order(table: &Table, fractions: &[f64], ties: Ties) -> Vec<usize> {
    let free = |cell: &usize| {
        table.recompute_s(*cell) < NEVER_S && !table.is_passed(*cell / table.layers.max(1))
    };
    let mut order: Vec<usize> = (0..table.cells()).filter(free).collect();
    let of = |cell: &usize| fractions.get(*cell).copied().unwrap_or(0.0);
    let layer = |cell: &usize| match ties {
        Ties::Chunks => 0,
        Ties::Layers => cell % table.layers.max(1),
    };
    order.sort_by(|a, b| {
        let by_layer = layer(a).cmp(&layer(b));
        of(b).total_cmp(&of(a)).then(by_layer).then(a.cmp(b))
    });
    order
}

fn wishes(table: &Table, relaxed: &Relaxed, spare: &[u8]) -> Vec<Wish> {
    let wish = |(cell, spare): (usize, &u8)| {
        let (mut cost, mut damage, mut whole) = ([0.0; RESOURCES_MAX], 0.0, 0.0);
        for (assignment, weight) in &relaxed.mix {
            let pick = assignment.get(cell).copied().unwrap_or(RECOMPUTE);
            if let Some(choice) = table.choice(cell, pick) {
                add(&mut cost, &choice.cost, *weight);
                damage += choice.damage * weight;
                whole += weight;
            }
        }
        if whole > 1e-6 {
            cost.iter_mut().for_each(|cost| *cost /= whole);
            damage /= whole;
        } else if let Some(choice) = table.choice(cell, *spare) {
            (cost, damage) = (choice.cost, choice.damage);
        }
        Wish { cost, damage }
    };
    spare.iter().enumerate().map(wish).collect()
}

/// How many cells of the order to recompute: the best count, or all of them where cells are few.
/// Cells that cannot be brought are among them; `None` when they cannot be.
fn fronts(table: &Table, order: &[usize], wishes: &[Wish]) -> Option<Vec<usize>> {
    let missing = |cell: &usize| table.choices(*cell).is_empty();
    let least = order.iter().rposition(missing).map_or(0, |at| at + 1);
    let needed = (0..table.cells()).filter(missing).count();
    let covered = order.iter().take(least).filter(|cell| missing(cell));
    if covered.count() < needed {
        return None;
    }
    if table.cells() <= CELLS_FEW {
        return Some((least..=order.len()).collect());
    }
    let mut work = [0.0; RESOURCES_MAX];
    for wish in wishes {
        add(&mut work, &wish.cost, 1.0);
    }
    let mut best: Option<(f64, usize)> = None;
    for front in 0..=order.len() {
        if front >= least {
            let end = score(table, &work);
            if best.is_none_or(|(least, _)| end < least) {
                best = Some((end, front));
            }
        }
        let Some(cell) = order.get(front) else { break };
        work[GPU] += table.recompute_s(*cell);
        if let Some(wish) = wishes.get(*cell) {
            add(&mut work, &wish.cost, -1.0);
        }
    }
    best.map(|(_, front)| vec![front])
}

/// Whole choices, near to the wishes in sum.
fn diffuse(
    table: &Table,
    relaxed: &Relaxed,
    spare: &[u8],
    wishes: &[Wish],
    recomputed: &[usize],
) -> Assignment {
    let mut assignment = spare.to_vec();
    for cell in recomputed {
        if let Some(pick) = assignment.get_mut(*cell) {
            *pick = RECOMPUTE;
        }
    }
    // A unit of damage as seconds, so that both errors can be compared.
    let rate = match table.budget > 0.0 {
        true => relaxed.end_s / table.budget,
        false => 0.0,
    };
    let (mut error, mut error_damage) = ([0.0; RESOURCES_MAX], 0.0);
    let cells = assignment.iter_mut().zip(wishes).enumerate();
    for (cell, (pick, wish)) in cells.filter(|(_, (pick, _))| **pick != RECOMPUTE) {
        let of_mix = relaxed.mix.iter().filter_map(|(one, _)| one.get(cell));
        let after = |index: u8| {
            let choice = table.choice(cell, index)?;
            let mut carried = error;
            add(&mut carried, &wish.cost, -1.0);
            add(&mut carried, &choice.cost, 1.0);
            let damage = error_damage + choice.damage - wish.damage;
            let squares: f64 = carried.iter().map(|error| error * error).sum();
            let of_damage = damage * rate;
            Some((
                of_damage.mul_add(of_damage, squares),
                index,
                carried,
                damage,
            ))
        };
        let tried = of_mix.copied().chain([*pick]).filter_map(after);
        if let Some((_, index, carried, damage)) = tried.min_by(|a, b| a.0.total_cmp(&b.0)) {
            *pick = index;
            (error, error_damage) = (carried, damage);
        }
    }
    assignment
}

/// Changes that differ: cells of one class that are brought alike are one.
fn changes(table: &Table, draft: &Draft) -> Vec<Move> {
    let grow = draft.may_grow(table).into_iter();
    let mut changes: Vec<Move> = grow.map(|cell| (cell, RECOMPUTE).into()).collect();
    let mut to_choices = |cell: usize, now: u8| {
        let picks = (0..).zip(table.choices(cell)).map(|(index, _)| index);
        changes.extend(picks.filter(|to| *to != now).map(|to| Move { cell, to }));
    };
    for cell in draft.may_shrink(table) {
        to_choices(cell, RECOMPUTE);
    }
    let mut seen = vec![0_u32; table.classes.len()];
    let cells = draft.assignment.iter().zip(&table.class).enumerate();
    for (cell, (now, class)) in cells.filter(|(_, (now, _))| **now != RECOMPUTE) {
        let Some(seen) = seen.get_mut(*class) else {
            continue;
        };
        let bit = 1_u32 << (*now & 31);
        if *seen & bit == 0 {
            *seen |= bit;
            to_choices(cell, *now);
        }
    }
    changes
}

impl From<(usize, u8)> for Move {
    fn from((cell, to): (usize, u8)) -> Self {
        Self { cell, to }
    }
}

fn is_accepted(table: &Table, damage: f64) -> bool {
    damage <= table.budget
}

/// Takes damage back until it is accepted. False when that is not possible.
fn mend(table: &Table, draft: &mut Draft) -> bool {
    for _ in 0..=table.cells() {
        draft.sum(table);
        if is_accepted(table, draft.damage) {
            return true;
        }
        let before = draft.score(table);
        let price = |change: &Move| {
            let (work, damage) = draft.after(table, *change);
            let less = draft.damage - damage;
            (less > 0.0).then(|| ((score(table, &work) - before) / less, *change))
        };
        let priced = changes(table, draft);
        let priced = priced.iter().filter_map(price);
        let Some((_, change)) = priced.min_by(|a, b| a.0.total_cmp(&b.0)) else {
            return false;
        };
        draft.make(table, change);
    }
    false
}

/// Makes changes as long as they lower the end.
fn polish(table: &Table, draft: &mut Draft, bound_s: f64) {
    for _ in 0..CHANGES_MAX {
        let now = draft.score(table);
        if now <= bound_s * (1.0 + NEAR) {
            break;
        }
        let least = now * (1.0 - WORTH);
        if let Some((_, change)) = best_change(table, draft, least) {
            draft.make(table, change);
        } else if let Some(two) = best_two(table, draft, least) {
            two.into_iter().for_each(|change| draft.make(table, change));
        } else {
            break;
        }
        draft.sum(table);
    }
}

fn best_change(table: &Table, draft: &Draft, least: f64) -> Option<(f64, Move)> {
    let scored = changes(table, draft).into_iter().filter_map(|change| {
        let (work, damage) = draft.after(table, change);
        let score = score(table, &work);
        (is_accepted(table, damage) && score < least).then_some((score, change))
    });
    scored.min_by(|a, b| a.0.total_cmp(&b.0))
}

fn best_two(table: &Table, draft: &Draft, least: f64) -> Option<[Move; 2]> {
    if table.cells() > CELLS_FEW {
        return None;
    }
    let mut best: Option<(f64, [Move; 2])> = None;
    for first in changes(table, draft) {
        let mut changed = draft.clone();
        changed.make(table, first);
        let most = best.map_or(least, |(score, _)| score);
        if let Some((score, second)) = best_change(table, &changed, most) {
            best = Some((score, [first, second]));
        }
    }
    best.map(|(_, two)| two)
}
