//! A whole assignment whose recomputed cells are a staircase, and small changes of it.
//!
//! Upstairs:   `round` makes and mends drafts.
//! Downstairs: `table`.
//!
//! Invariants kept here
//!   Q5  What is recomputed of a chunk are its layers from 0 up, and no more than of the chunk
//!       before it; a chunk that is passed over is not recomputed and is no step of the stairs.

use super::request::GPU;
use super::solve::{Assignment, RECOMPUTE, work};
use super::table::{NEVER_S, Seconds, Table, add};

/// A staircase, and how the cells outside are brought.
#[derive(Debug, Clone)]
pub(super) struct Draft {
    pub(super) assignment: Assignment,
    /// Layers that are recomputed of each chunk.
    pub(super) depths: Vec<usize>,
    pub(super) work: Seconds,
    pub(super) damage: f64,
}

/// One change: what becomes of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Move {
    pub(super) cell: usize,
    pub(super) to: u8,
}

impl Draft {
    /// From an assignment whose recomputed cells are stairs (Q5).
    pub(super) fn new(table: &Table, assignment: Assignment) -> Self {
        let chunks = assignment.chunks(table.layers);
        let depth = |cells: &[u8]| cells.iter().take_while(|one| **one == RECOMPUTE).count();
        let depths = chunks.map(depth).collect();
        let (work, damage) = work(table, &assignment);
        Self {
            assignment,
            depths,
            work,
            damage,
        }
    }

    /// End of the slowest resource, and next to nothing for the others, so that of two drafts that
    /// end together the one with less work is better.
    pub(super) fn score(&self, table: &Table) -> f64 {
        score(table, &self.work)
    }

    /// Depth of the chunk before this one that is a step of the stairs.
    fn depth_before(&self, table: &Table, chunk: usize) -> usize {
        let before = (0..chunk).rev().find(|chunk| !table.is_passed(*chunk));
        before.map_or(table.layers, |chunk| self.depth(chunk))
    }

    fn depth_after(&self, table: &Table, chunk: usize) -> usize {
        let after = (chunk + 1..table.chunks).find(|chunk| !table.is_passed(*chunk));
        after.map_or(0, |chunk| self.depth(chunk))
    }

    fn depth(&self, chunk: usize) -> usize {
        self.depths.get(chunk).copied().unwrap_or(0)
    }

    /// Cells at which the stairs may grow by one.
    pub(super) fn may_grow(&self, table: &Table) -> Vec<usize> {
        let chunks = (0..table.chunks).filter(|chunk| !table.is_passed(*chunk));
        let grows = chunks.filter_map(|chunk| {
            let depth = self.depth(chunk);
            let cell = chunk * table.layers + depth;
            let room = depth < table.layers && depth < self.depth_before(table, chunk);
            (room && table.recompute_s(cell) < NEVER_S).then_some(cell)
        });
        grows.collect()
    }

    /// Cells at which the stairs may shrink by one.
    pub(super) fn may_shrink(&self, table: &Table) -> Vec<usize> {
        let shrinks = (0..table.chunks).filter_map(|chunk| {
            let depth = self.depth(chunk);
            let room = depth > 0 && depth > self.depth_after(table, chunk);
            room.then(|| chunk * table.layers + depth - 1)
        });
        shrinks.collect()
    }

    /// Work and damage after a change.
    pub(super) fn after(&self, table: &Table, change: Move) -> (Seconds, f64) {
        let (mut work, mut damage) = (self.work, self.damage);
        let now = self.assignment.get(change.cell).copied();
        for (pick, times) in [(now, -1.0), (Some(change.to), 1.0)] {
            match pick {
                Some(RECOMPUTE) => work[GPU] += times * table.recompute_s(change.cell),
                Some(index) => {
                    if let Some(choice) = table.choice(change.cell, index) {
                        add(&mut work, &choice.cost, times);
                        damage += times * choice.damage;
                    }
                }
                None => {}
            }
        }
        (work, damage)
    }

    /// Makes a change that keeps the stairs.
    pub(super) fn make(&mut self, table: &Table, change: Move) {
        (self.work, self.damage) = self.after(table, change);
        let Some(pick) = self.assignment.get_mut(change.cell) else {
            return;
        };
        let was = std::mem::replace(pick, change.to);
        if let Some(depth) = self.depths.get_mut(change.cell / table.layers) {
            *depth += usize::from(change.to == RECOMPUTE);
            *depth -= usize::from(was == RECOMPUTE);
        }
    }

    /// Sums everything anew: changes one by one drift.
    pub(super) fn sum(&mut self, table: &Table) {
        (self.work, self.damage) = work(table, &self.assignment);
    }
}

/// See [`Draft::score`].
pub(super) fn score(table: &Table, work: &Seconds) -> f64 {
    let whole: f64 = work.iter().take(table.resources).sum();
    table.end_s(work) + 1e-6 * whole
}
