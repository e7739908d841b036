//! What every cell costs each resource: the request in seconds, and without what cannot win.
//!
//! Upstairs:   the solver and everything after it.
//! Downstairs: `request`.
//!
//! Cells that can be brought in the same ways at the same costs are of one class: layers are alike
//! as a rule, so that a price is worked out once for many cells.
//!
//! Invariants kept here
//!   Q2  No choice is kept that another one of its cell beats or equals in every resource and in
//!       damage. Hidden states of a model where they are larger than keys and values end here.
//!   Q3  No choice is kept that the reader cannot use, that goes through a resource without a rate,
//!       or whose damage alone is beyond what the request accepts.

use std::collections::HashMap;

use super::request::{Form, GPU, PlanRequest, RESOURCES_MAX, Tier, Variant};

/// Seconds of each resource.
pub(super) type Seconds = [f64; RESOURCES_MAX];

/// No sum of real seconds comes near it, and sums of it stay finite.
pub(super) const NEVER_S: f64 = 1e30;

/// Adds `more` as often as `times` says.
pub(super) fn add(to: &mut Seconds, more: &Seconds, times: f64) {
    for (to, more) in to.iter_mut().zip(more) {
        *to += more * times;
    }
}

/// One way to bring a cell.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Choice {
    pub(super) cost: Seconds,
    pub(super) damage: f64,
    /// Index of the variant in the request.
    pub(super) variant: u8,
}

impl Choice {
    /// Seconds when nothing else runs.
    pub(super) fn alone_s(&self) -> f64 {
        self.cost.iter().copied().fold(0.0, f64::max)
    }

    fn beats(&self, other: &Self) -> bool {
        let costs = self.cost.iter().zip(&other.cost);
        costs.into_iter().all(|(ours, theirs)| ours <= theirs) && self.damage <= other.damage
    }
}

/// The problem in seconds.
#[derive(Debug, Clone)]
pub(super) struct Table {
    /// Chunks that take part: those behind are computed with the suffix.
    pub(super) chunks: usize,
    pub(super) layers: usize,
    /// Resources in use; the first is the GPU.
    pub(super) resources: usize,
    /// What ends after a resource has done its part: the suffix, or the last layer of it.
    pub(super) after: Seconds,
    /// GPU seconds to recompute each cell; `NEVER_S` where nobody may.
    pub(super) recompute: Vec<f64>,
    /// Class of each cell.
    pub(super) class: Vec<usize>,
    pub(super) classes: Vec<Vec<Choice>>,
    /// Sum of damage that is accepted.
    pub(super) budget: f64,
    /// Chunks that are loaded before anything behind them is recomputed.
    pub(super) passed: Vec<bool>,
    /// Seconds of the suffix in each layer.
    pub(super) suffix: Vec<f64>,
    pub(super) layer_events: bool,
}

impl Table {
    /// Costs of the first `chunks` chunks of a sound request. The tokens behind them belong to the
    /// suffix.
    pub(super) fn new(request: &PlanRequest, chunks: usize, may_recompute: bool) -> Self {
        let layers = request.layers;
        let resources = request.resources.len();
        let stretch = request.gpu_stretch();
        let cells = chunks * layers;
        let mut table = Self {
            chunks,
            layers,
            resources,
            after: [0.0; RESOURCES_MAX],
            recompute: vec![NEVER_S; cells],
            class: Vec::with_capacity(cells),
            classes: Vec::new(),
            budget: request.damage_max * cells as f64,
            passed: vec![false; chunks],
            suffix: suffix(request, chunks),
            layer_events: request.reader.layer_events,
        };
        table.fill_after();
        if may_recompute && stretch.is_finite() {
            table.recompute = recompute(request, chunks);
        }
        table.fill_classes(request);
        table.leave_out_what_cannot_be_accepted();
        table.pass_over(request);
        table
    }

    /// Only what follows the loads, for predictions of a prefix of this length.
    pub(super) fn ends(request: &PlanRequest, chunks: usize) -> Self {
        let mut ends = Self {
            chunks,
            layers: request.layers,
            resources: request.resources.len(),
            after: [0.0; RESOURCES_MAX],
            recompute: Vec::new(),
            class: Vec::new(),
            classes: Vec::new(),
            budget: 0.0,
            passed: Vec::new(),
            suffix: suffix(request, chunks),
            layer_events: request.reader.layer_events,
        };
        ends.fill_after();
        ends
    }

    /// The first chunks of this, with the choices that they have here.
    pub(super) fn front(&self, request: &PlanRequest, chunks: usize) -> Self {
        let cells = chunks * self.layers;
        Self {
            recompute: self.recompute.iter().copied().take(cells).collect(),
            class: self.class.iter().copied().take(cells).collect(),
            classes: self.classes.clone(),
            budget: request.damage_max * cells as f64,
            passed: self.passed.iter().copied().take(chunks).collect(),
            ..Self::ends(request, chunks)
        }
    }

    /// Cells that are stored in damaging forms only, and are too many to be accepted, are missing.
    fn leave_out_what_cannot_be_accepted(&mut self) {
        let least = |choices: &Vec<Choice>| {
            let damages = choices.iter().map(|choice| choice.damage);
            damages.reduce(f64::min).unwrap_or(0.0)
        };
        let leasts: Vec<f64> = self.classes.iter().map(least).collect();
        let of_cells = self.class.iter().filter_map(|class| leasts.get(*class));
        if of_cells.sum::<f64>() > self.budget {
            let damaging = leasts.iter().zip(&mut self.classes);
            let damaging = damaging.filter(|(least, _)| **least > 0.0);
            damaging.for_each(|(_, choices)| choices.clear());
        }
    }

    /// The same with exactly these cells recomputed.
    pub(super) fn recomputing(&self, is_recomputed: impl Fn(usize) -> bool) -> Self {
        let mut given = self.clone();
        given.classes.push(Vec::new());
        let none = given.classes.len() - 1;
        let cells = given.class.iter_mut().zip(&mut given.recompute);
        for (cell, (class, recompute)) in cells.enumerate() {
            match is_recomputed(cell) {
                true => *class = none,
                false => *recompute = NEVER_S,
            }
        }
        given
    }

    /// The same for an engine that waits until all that is passed over has been loaded. `None` when
    /// nothing is.
    pub(super) fn beginning_after_what_is_passed(&self) -> Option<Self> {
        let passed = |cell: &usize| self.is_passed(cell / self.layers.max(1));
        let mut first = [0.0; RESOURCES_MAX];
        for cell in (0..self.cells()).filter(passed) {
            let exact = self.choices(cell).iter().filter(|one| one.damage <= 0.0);
            let fastest = exact.min_by(|a, b| a.alone_s().total_cmp(&b.alone_s()))?;
            add(&mut first, &fastest.cost, 1.0);
        }
        let first_s = first.into_iter().fold(0.0, f64::max);
        let mut late = self.clone();
        late.after[GPU] += first_s;
        (first_s > 0.0).then_some(late)
    }

    pub(super) fn cells(&self) -> usize {
        self.class.len()
    }

    /// Ways to bring a cell.
    pub(super) fn choices(&self, cell: usize) -> &[Choice] {
        let class = self.class.get(cell);
        let choices = class.and_then(|class| self.classes.get(*class));
        choices.map_or(&[], Vec::as_slice)
    }

    pub(super) fn choice(&self, cell: usize, index: u8) -> Option<&Choice> {
        self.choices(cell).get(usize::from(index))
    }

    pub(super) fn recompute_s(&self, cell: usize) -> f64 {
        self.recompute.get(cell).copied().unwrap_or(NEVER_S)
    }

    pub(super) fn is_passed(&self, chunk: usize) -> bool {
        self.passed.get(chunk).copied().unwrap_or(false)
    }

    /// The latest end among resources with this much work each.
    pub(super) fn end_s(&self, work: &Seconds) -> f64 {
        let ends = work.iter().zip(&self.after).take(self.resources);
        ends.map(|(work, after)| work + after).fold(0.0, f64::max)
    }

    fn fill_after(&mut self) {
        let whole: f64 = self.suffix.iter().sum();
        let last = self.suffix.last().copied().unwrap_or(0.0);
        let loads = if self.layer_events { last } else { whole };
        self.after = [loads; RESOURCES_MAX];
        if let Some(gpu) = self.after.get_mut(GPU) {
            *gpu = whole;
        }
    }

    fn fill_classes(&mut self, request: &PlanRequest) {
        let mut known: HashMap<Vec<u64>, usize> = HashMap::new();
        let mut before: Option<(&Vec<Variant>, usize)> = None;
        for cell in request.cells.iter().take(self.chunks * self.layers) {
            if let Some((same, class)) = before
                && same == cell
            {
                self.class.push(class);
                continue;
            }
            let choices = choices(request, cell, self.budget);
            let bits = choices.iter().flat_map(|choice| {
                let numbers = choice.cost.iter().chain([&choice.damage]);
                let numbers = numbers.map(|number| number.to_bits());
                numbers.chain([u64::from(choice.variant)])
            });
            let classes = &mut self.classes;
            let class = *known.entry(bits.collect()).or_insert_with(|| {
                classes.push(choices);
                classes.len() - 1
            });
            self.class.push(class);
            before = Some((cell, class));
        }
    }

    /// A chunk that lies in memory, in front of others that do not, is no end to recompute: it is
    /// loaded first where that takes much less than to compute it.
    fn pass_over(&mut self, request: &PlanRequest) {
        let near = |variant: &Variant| variant.tier <= Tier::Memory && variant.exact();
        let cells = request.cells.chunks(self.layers).take(self.chunks);
        let in_memory: Vec<bool> = cells
            .map(|chunk| chunk.iter().all(|cell| cell.iter().any(near)))
            .collect();
        let Some(end) = in_memory.iter().rposition(|near| !near) else {
            return;
        };
        let costs = self.recompute.chunks(self.layers).zip(&in_memory);
        let mut passed = Vec::with_capacity(self.chunks);
        for (chunk, (recompute, near)) in costs.enumerate() {
            let cells = (chunk * self.layers..).take(self.layers);
            let fastest = |cell| {
                let exact = self.choices(cell).iter().filter(|one| one.damage <= 0.0);
                exact.map(Choice::alone_s).fold(NEVER_S, f64::min)
            };
            let load: f64 = cells.map(fastest).sum();
            let cheap = load <= 0.5 * recompute.iter().sum::<f64>();
            passed.push(*near && chunk < end && cheap);
        }
        self.passed = passed;
    }
}

/// Seconds of each layer of what the engine computes after the first `chunks` chunks.
fn suffix(request: &PlanRequest, chunks: usize) -> Vec<f64> {
    let starts = request.starts();
    let context = starts.get(chunks).copied().unwrap_or(0.0);
    let all = starts.last().copied().unwrap_or(0.0);
    let new = all - context + f64::from(request.suffix_tokens);
    let stretch = request.gpu_stretch();
    let stretch = if stretch.is_finite() { stretch } else { 1.0 };
    let step_s = request.prefill.step_s(context, new) * stretch;
    by_layer(request, step_s).collect()
}

/// GPU seconds of each cell. What a step costs whatever its size is its first layer's, since no
/// layer of a chunk is recomputed without that.
fn recompute(request: &PlanRequest, chunks: usize) -> Vec<f64> {
    let (starts, stretch) = (request.starts(), request.gpu_stretch());
    let mut cells = Vec::with_capacity(chunks * request.layers);
    for (start, tokens) in starts.iter().zip(&request.chunks).take(chunks) {
        let column_s = request.prefill.beyond_fixed_s(*start, f64::from(*tokens));
        let mut fixed = Some(request.prefill.fixed_s * stretch);
        let layers = by_layer(request, column_s * stretch);
        cells.extend(layers.map(|layer| layer + fixed.take().unwrap_or(0.0)));
    }
    cells
}

/// Shares `sum` among the layers.
fn by_layer(request: &PlanRequest, sum: f64) -> impl Iterator<Item = f64> {
    let weights = &request.layer_weights;
    let whole: f64 = weights.iter().sum();
    let even = 1.0 / request.layers as f64;
    let part = move |layer| weights.get(layer).map_or(even, |weight| weight / whole);
    (0..request.layers).map(move |layer| part(layer) * sum)
}

/// The ways to bring a cell that the reader can use (Q3) and that no other beats (Q2).
fn choices(request: &PlanRequest, cell: &[Variant], budget: f64) -> Vec<Choice> {
    let mut kept: Vec<Choice> = Vec::with_capacity(cell.len());
    for (index, variant) in (0..).zip(cell) {
        let reader = request.reader;
        let usable = match variant.form {
            Form::Hidden => reader.hidden_proj && !reader.prefix_only,
            Form::Kv(_) => true,
        } && (reader.gpu_decode || !variant.engine_decodes)
            && variant.damage <= budget;
        let Some(cost) = usable.then(|| cost(request, variant)).flatten() else {
            continue;
        };
        let choice = Choice {
            cost,
            damage: variant.damage,
            variant: index,
        };
        if !kept.iter().any(|other| other.beats(&choice)) {
            kept.retain(|other| !choice.beats(other));
            kept.push(choice);
        }
    }
    kept
}

/// Seconds of each resource, or `None` when one of them does nothing now.
fn cost(request: &PlanRequest, variant: &Variant) -> Option<Seconds> {
    let mut cost = [0.0; RESOURCES_MAX];
    for used in variant.uses.iter().flatten() {
        let resource = request.resources.get(used.resource)?;
        let seconds = used.amount / resource.speed() + resource.fixed_s * variant.descriptors;
        if !seconds.is_finite() || seconds >= NEVER_S {
            return None;
        }
        *cost.get_mut(used.resource)? += seconds;
    }
    Some(cost)
}
