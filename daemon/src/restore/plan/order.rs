//! In which order a plan runs, and when the first token comes.
//!
//! Upstairs:   `plan` takes the order that is predicted to be faster.
//! Downstairs: `table`, `draft`.
//!
//! Recompute goes chunk after chunk, inside a chunk from layer 0 up. Loads go one of two ways.
//! Layer by layer, the suffix starts on layer 0 while the others still come: best when the reader
//! listens for layers. From the last chunk backwards, whatever the rates turn out to be, what is
//! computed and what is loaded meet: best when the rates are a guess.

use super::draft::Draft;
use super::request::{GPU, RESOURCES_MAX};
use super::solve::RECOMPUTE;
use super::table::{Seconds, Table, add};

/// Order of the loads of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadOrder {
    /// All chunks of layer 0 first, the last chunk before the others; then layer 1.
    Layers,
    /// All layers of the last chunk first, then of the one before.
    FromTheBack,
}

/// When things end, predicted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Prediction {
    pub(super) layers_s: f64,
    pub(super) from_the_back_s: f64,
}

/// Work of the loads of every layer, and what comes before them.
#[derive(Debug, Clone)]
pub(super) struct Layers {
    /// Loads of each layer, without those that go first.
    pub(super) loads: Vec<Seconds>,
    /// When each resource has done the loads that go first.
    pub(super) first: Seconds,
    /// When recompute ends.
    pub(super) recomputed_s: f64,
}

impl Layers {
    /// Nothing to do yet.
    pub(super) fn none(layers: usize) -> Self {
        Self {
            loads: vec![[0.0; RESOURCES_MAX]; layers],
            first: [0.0; RESOURCES_MAX],
            recomputed_s: 0.0,
        }
    }

    fn of(table: &Table, draft: &Draft) -> Self {
        let mut layers = Self::none(table.layers);
        let last = draft.depths.iter().rposition(|depth| *depth > 0);
        let picks = draft.assignment.chunks(table.layers).enumerate();
        for (chunk, picks) in picks {
            let first = is_first(table, last, chunk);
            for (layer, pick) in picks.iter().enumerate() {
                let cell = chunk * table.layers + layer;
                if *pick == RECOMPUTE {
                    layers.recomputed_s += table.recompute_s(cell);
                } else if let Some(choice) = table.choice(cell, *pick) {
                    let loads = layers.loads.get_mut(layer);
                    let to = if first {
                        Some(&mut layers.first)
                    } else {
                        loads
                    };
                    to.into_iter().for_each(|to| add(to, &choice.cost, 1.0));
                }
            }
            if first {
                let there = layers.first.iter().copied().fold(0.0, f64::max);
                layers.recomputed_s = layers.recomputed_s.max(there);
            }
        }
        layers
    }

    /// When the suffix has run through all layers.
    pub(super) fn predict(&self, table: &Table) -> Prediction {
        let mut clocks = self.first;
        clocks[GPU] = 0.0;
        // Decoding and projection of layers that have come compete with the suffix.
        let mut engine_s = self.recomputed_s;
        let mut engine_last_s = self.recomputed_s;
        for (loads, suffix) in self.loads.iter().zip(&table.suffix) {
            let mut ready_s = 0.0_f64;
            let links = clocks.iter_mut().zip(loads).enumerate();
            for (_, (clock, load)) in links.filter(|(resource, _)| *resource != GPU) {
                *clock += load;
                ready_s = ready_s.max(if *load > 0.0 { *clock } else { 0.0 });
            }
            engine_s = engine_s.max(ready_s) + loads[GPU] + suffix;
            engine_last_s += loads[GPU];
        }
        let suffix: f64 = table.suffix.iter().sum();
        let loaded_s = clocks.iter().copied().fold(0.0, f64::max);
        let from_the_back_s = engine_last_s.max(loaded_s) + suffix;
        let layers_s = match table.layer_events {
            true => engine_s,
            false => from_the_back_s,
        };
        Prediction {
            layers_s,
            from_the_back_s,
        }
    }
}

/// Whether a chunk is loaded before all others, since chunks behind it are recomputed.
fn is_first(table: &Table, last_recomputed: Option<usize>, chunk: usize) -> bool {
    table.is_passed(chunk) && last_recomputed.is_some_and(|last| chunk < last)
}

/// When a draft ends, in either order.
pub(super) fn predict(table: &Table, draft: &Draft) -> Prediction {
    Layers::of(table, draft).predict(table)
}

/// Cells to recompute, in order.
pub(super) fn recompute(draft: &Draft) -> Vec<usize> {
    let picks = draft.assignment.iter().enumerate();
    let cells = picks.filter(|(_, pick)| **pick == RECOMPUTE);
    cells.map(|(cell, _)| cell).collect()
}

/// Cells that are brought, in order.
pub(super) fn loads(table: &Table, draft: &Draft, order: LoadOrder) -> Vec<usize> {
    let last = draft.depths.iter().rposition(|depth| *depth > 0);
    let picks = draft.assignment.iter().enumerate();
    let cells = picks.filter(|(_, pick)| **pick != RECOMPUTE);
    let mut cells: Vec<usize> = cells.map(|(cell, _)| cell).collect();
    cells.sort_by_key(|cell| {
        let (chunk, layer) = (cell / table.layers, cell % table.layers);
        let back = table.chunks - chunk;
        match order {
            _ if is_first(table, last, chunk) => (0, chunk, layer),
            LoadOrder::Layers => (1, layer, back),
            LoadOrder::FromTheBack => (1, back, layer),
        }
    });
    cells
}
