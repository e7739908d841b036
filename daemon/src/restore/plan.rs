//! The plan of a restore: for every cell, whether to load it and in which form, to project it from
//! hidden states, or to let the engine compute it again, so that all of it ends as early as it can.
//!
//! Upstairs:   `restore::run` uses `found`, for readers that only take a loaded prefix; `outlook`
//!             the rest, for engines that compute meanwhile.
//! Downstairs: nothing: no I/O, no clock, no hidden state. The same request gives the same plan.
//!
//! `request` says what is known, `table` makes seconds of it. `exact` answers simple cases by
//! sorting; `solve` and `master` the others, with a bound that no plan beats; `round` makes whole
//! cells and a staircase of their mix, `order` puts them in order and predicts the first token.
//! `docs/PLANNER.md` has the formulas and what was measured.
//!
//! Invariants kept here
//!   Q6  Every cell has exactly one action, and stands in exactly one of the two orders unless it
//!       is resident or of the tail.
//!   Q7  The sum of damage is at most what the request accepts.
//!   Q8  A plan is predicted to end no later than loading everything exactly, and no later than
//!       computing everything: both are among the candidates.
//!
//! Not here on purpose
//!   No boundary action (hidden states of one middle layer, layers above recomputed): it wants a
//!   stored form that nothing writes yet.
//!   No free projection of the first layer above the stairs: its hidden states are there, but no
//!   engine hands them out half-way.

pub mod found;
pub mod order;
pub mod request;

mod draft;
mod exact;
mod master;
mod prefix;
mod round;
mod solve;
mod table;

pub use order::LoadOrder;
pub use request::{Form, GPU, Invalid, PlanRequest, Prefill, Reader, Resource, Tier, Use, Variant};

use draft::Draft;
use order::predict;
use solve::{RECOMPUTE, Shape, relax};
use table::{NEVER_S, Seconds, Table};

/// A plan whose end is this near to the fluid bound is not improved by the costlier search.
const NEAR: f64 = 5e-3;

/// What is done with a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It is in the engine's memory.
    Resident,
    /// The variant of this index is brought.
    Load(u8),
    /// The variant of this index is brought, hidden states, and projected.
    Project(u8),
    /// The engine computes it, from the front, while others are brought.
    Recompute,
    /// The engine computes it with its suffix, when everything before is there.
    Tail,
}

/// What no plan is faster than. Unit: seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    /// Cells may be split and nothing waits for anything: the most loaded resource still takes
    /// this.
    pub fluid_s: f64,
    /// The slowest single cell, and the suffix.
    pub chain_s: f64,
}

impl Bounds {
    /// The larger one.
    pub fn both_s(&self) -> f64 {
        self.fluid_s.max(self.chain_s)
    }
}

/// What would have been otherwise: first tokens of the plans that decide nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Otherwise {
    /// Every cell that is stored is loaded in its fastest exact form, the rest is computed after
    /// that. Unit: seconds.
    pub load_s: f64,
    /// The engine computes everything, in one step. Unit: seconds.
    pub recompute_s: f64,
}

impl Otherwise {
    /// The better of the two. Unit: seconds.
    pub fn better_s(&self) -> f64 {
        self.load_s.min(self.recompute_s)
    }
}

/// A whole plan.
#[derive(Debug, Clone, PartialEq)]
pub struct RestorePlan {
    /// What is done with each cell: all layers of the first chunk, then those of the second.
    pub actions: Vec<Action>,
    /// Layers of each chunk that are recomputed, from 0 up. Falls from chunk to chunk, but for
    /// chunks of host memory that are loaded before anything behind them is computed.
    pub depths: Vec<usize>,
    /// Cells to recompute, in order. A cell is chunk by layers plus layer.
    pub recompute: Vec<usize>,
    /// Cells to bring, in order.
    pub load: Vec<usize>,
    /// How `load` is ordered.
    pub order: LoadOrder,
    /// Chunks from here on are computed with the suffix, when all before are there.
    pub tail_from: usize,
    /// Predicted time to the first token. Unit: seconds.
    pub ttft_s: f64,
    /// What else could have been done.
    pub otherwise: Otherwise,
    /// What nothing beats.
    pub bounds: Bounds,
    /// Sum of the damage of all cells.
    pub damage: f64,
    /// Work of each resource, without the suffix. Unit: seconds.
    pub work_s: Vec<f64>,
}

impl RestorePlan {
    /// Predicted seconds that the plan saves over the better thing to do without one.
    pub fn saving_s(&self) -> f64 {
        self.otherwise.better_s() - self.ttft_s
    }
}

/// A candidate: a draft of a table, and its prediction.
struct Candidate {
    tail_from: usize,
    table: Table,
    draft: Draft,
    order: LoadOrder,
    ttft_s: f64,
}

impl Candidate {
    fn new(request: &PlanRequest, table: &Table, draft: Draft) -> Self {
        let predicted = predict(table, &draft);
        let recomputes = draft.depths.iter().any(|depth| *depth > 0);
        let meet = recomputes && request.rates_are_poor;
        let by_layers = predicted.layers_s < predicted.from_the_back_s && !meet;
        let (order, ttft_s) = match by_layers {
            true => (LoadOrder::Layers, predicted.layers_s),
            false => (LoadOrder::FromTheBack, predicted.from_the_back_s),
        };
        Self {
            tail_from: table.chunks,
            table: table.clone(),
            draft,
            order,
            ttft_s,
        }
    }
}

/// Plans a restore. An error says what is wrong with the request; a request in which nothing is
/// stored, or no resource does anything, has a plan: compute everything.
pub fn plan(request: &PlanRequest) -> Result<RestorePlan, Invalid> {
    request.check()?;
    let chunks = request.chunks.len();
    let loads = stored(request);
    let stored = loads.chunks;
    let nothing = Table::new(request, 0, false);
    let recompute_s: f64 = nothing.suffix.iter().sum();
    let all_tail = Draft::new(&nothing, Vec::new());
    let mut best = Candidate::new(request, &nothing, all_tail);
    let pure = Candidate::new(request, &loads, pure_load(&loads));
    let load_s = pure.ttft_s;
    let mut bounds = Bounds {
        fluid_s: recompute_s,
        chain_s: recompute_s,
    };
    let mut take = |one: Candidate| {
        // Of two that end together the simpler one stays.
        if one.ttft_s < best.ttft_s * (1.0 - 1e-9) {
            best = one;
        }
    };
    take(pure);
    let two_ended = request.reader.two_ended && !request.reader.prefix_only;
    if two_ended {
        let mut ends = vec![stored];
        ends.extend((stored < chunks).then_some(chunks));
        for end in ends {
            let table = Table::new(request, end, true);
            let mut drafts = search(&table, &mut bounds);
            // Bounds let the engine begin at once; so do drafts that are balanced by them.
            if let Some(late) = table.beginning_after_what_is_passed() {
                drafts.extend(search(&late, &mut { bounds }));
            }
            drafts
                .into_iter()
                .for_each(|draft| take(Candidate::new(request, &table, draft)));
        }
    } else {
        let (table, draft, fluid_s) = prefix::best(request, &loads);
        bounds.fluid_s = bounds.fluid_s.min(fluid_s);
        bounds.chain_s = bounds.chain_s.min(prefix::chain_s(&loads));
        take(Candidate::new(request, &table, draft));
    }
    let otherwise = Otherwise {
        load_s,
        recompute_s,
    };
    Ok(finish(request, best, otherwise, bounds))
}

/// The longest prefix of which every cell is stored in a form that can be used.
fn stored(request: &PlanRequest) -> Table {
    let mut chunks = request.chunks.len();
    loop {
        // A shorter prefix accepts less damage in all, so that it may end even earlier.
        let table = Table::new(request, chunks, false);
        let missing = (0..table.cells()).find(|cell| table.choices(*cell).is_empty());
        let Some(cell) = missing else { return table };
        chunks = cell / request.layers;
    }
}

/// Seconds that no two-ended reader is faster than, who may split cells but computes layers from 0
/// up and never more of a later chunk; chunks of memory in front may be loaded before.
pub fn staircase_bound_s(request: &PlanRequest) -> Result<f64, Invalid> {
    request.check()?;
    let mut table = Table::new(request, request.chunks.len(), true);
    let nothing = Table::new(request, 0, false);
    let all: f64 = nothing.suffix.iter().sum();
    let passing = relax(&table, Shape::Staircase).map(|relaxed| relaxed.bound_s);
    table.passed.fill(false);
    let stairs = relax(&table, Shape::Staircase).map(|relaxed| relaxed.bound_s);
    let bounds = passing.into_iter().chain(stairs);
    Ok(bounds.fold(all, f64::min))
}

/// Drafts of a table where the reader computes from the front. Lowers the bounds to what holds for
/// this table too.
fn search(table: &Table, bounds: &mut Bounds) -> Vec<Draft> {
    let Some(free) = relax(table, Shape::Free) else {
        return Vec::new();
    };
    bounds.fluid_s = bounds.fluid_s.min(free.bound_s);
    bounds.chain_s = bounds.chain_s.min(chain_s(table));
    if let Some(draft) = exact::two_resources(table) {
        return vec![draft];
    }
    let mut drafts: Vec<Draft> = round::round(table, &free).into_iter().collect();
    let near = free.bound_s * (1.0 + NEAR);
    if !drafts.iter().any(|draft| table.end_s(&draft.work) <= near) {
        // What the mix recomputes is no staircase: mix staircases instead.
        if let Some(stairs) = relax(table, Shape::Staircase) {
            let near = stairs.bound_s * (1.0 + NEAR);
            let draft =
                round::round(table, &stairs).map(|draft| match table.end_s(&draft.work) <= near {
                    true => draft,
                    false => round::refine(table, &stairs, draft),
                });
            drafts.extend(draft);
        }
    }
    drafts
}

/// The slowest of the fastest ways to bring a cell, and the least that follows it.
fn chain_s(table: &Table) -> f64 {
    let fastest = |cell: usize| {
        let choices = table.choices(cell).iter();
        let load = choices.map(table::Choice::alone_s).fold(NEVER_S, f64::min);
        load.min(table.recompute_s(cell))
    };
    let slowest = (0..table.cells()).map(fastest).fold(0.0, f64::max);
    let whole: f64 = table.suffix.iter().sum();
    let last = table.suffix.last().copied().unwrap_or(0.0);
    (slowest + last).max(whole)
}

/// Every cell in its fastest form without damage; with the least damage where there is none.
fn pure_load(table: &Table) -> Draft {
    let pick = |cell| {
        let choices = (0..).zip(table.choices(cell));
        let fastest = choices.min_by(|(_, a), (_, b)| {
            let of_damage = a.damage.total_cmp(&b.damage);
            of_damage.then(a.alone_s().total_cmp(&b.alone_s()))
        });
        fastest.map_or(RECOMPUTE, |(index, _)| index)
    };
    Draft::new(table, (0..table.cells()).map(pick).collect())
}

fn finish(
    request: &PlanRequest,
    best: Candidate,
    otherwise: Otherwise,
    bounds: Bounds,
) -> RestorePlan {
    let Candidate {
        tail_from,
        table,
        draft,
        order,
        ttft_s,
    } = best;
    let action = |cell: usize| {
        let Some(pick) = draft.assignment.get(cell) else {
            return Action::Tail;
        };
        let Some(choice) = table.choice(cell, *pick) else {
            return Action::Recompute;
        };
        let variants = request.cells.get(cell);
        let variant = variants.and_then(|all| all.get(usize::from(choice.variant)));
        match variant {
            Some(one) if one.tier == Tier::Resident => Action::Resident,
            Some(one) if one.form == Form::Hidden => Action::Project(choice.variant),
            _ => Action::Load(choice.variant),
        }
    };
    let actions: Vec<Action> = (0..request.cells.len()).map(action).collect();
    let mut load = order::loads(&table, &draft, order);
    load.retain(|cell| actions.get(*cell) != Some(&Action::Resident));
    let mut depths = draft.depths.clone();
    depths.resize(request.chunks.len(), 0);
    RestorePlan {
        actions,
        depths,
        recompute: order::recompute(&draft),
        load,
        order,
        tail_from,
        ttft_s,
        otherwise,
        bounds,
        damage: draft.damage,
        work_s: work(&draft.work, request.resources.len()),
    }
}

fn work(seconds: &Seconds, resources: usize) -> Vec<f64> {
    seconds.iter().copied().take(resources).collect()
}

#[cfg(test)]
mod tests;
