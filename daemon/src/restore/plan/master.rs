//! The small linear program under the solver: how to mix whole assignments, and what a second of
//! each resource is worth then.
//!
//! Upstairs:   `solve` hands in assignments and asks for prices.
//! Downstairs: nothing.
//!
//! Minimise the end T over weights w of the assignments k:
//!   for every resource r:  T - sum_k w_k end_kr - slack = 0
//!   damage:                sum_k w_k damage_k + slack   = budget
//!   weights:               sum_k w_k                    = 1
//! There are as many rows as resources and two more, so that the matrix of the basis is inverted
//! anew at every step: nothing drifts.
//!
//! Not here on purpose: no first phase. The first assignment keeps the budget, and with it every
//! row can be met.

use super::request::RESOURCES_MAX;
use super::table::Seconds;

/// Rows of the largest program.
const ROWS_MAX: usize = RESOURCES_MAX + 2;
/// Steps after which the mix is taken as it is: a valid one, if not the best.
const STEPS_MAX: usize = 200;
/// A reduced cost that is none.
const NONE: f64 = 1e-11;

type Row = [f64; ROWS_MAX];
type Matrix = [Row; ROWS_MAX];

/// What a column of the program stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Column {
    End,
    Slack(usize),
    Assignment(usize),
}

/// A mix of assignments.
#[derive(Debug)]
pub(super) struct Master {
    resources: usize,
    budget: f64,
    /// Seconds and damage of the largest numbers: everything inside is about 1.
    scale: (f64, f64),
    assignments: Vec<(Seconds, f64)>,
    basis: Vec<Column>,
}

/// Prices of the best mix so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct Prices {
    /// Of a second of each resource; they sum to 1.
    pub(super) second: Seconds,
    /// Of a unit of damage. Unit: seconds.
    pub(super) damage: f64,
    /// End of the mix. Unit: seconds.
    pub(super) end_s: f64,
}

#[expect(
    clippy::indexing_slicing,
    reason = "rows are fewer than ROWS_MAX by construction"
)]
impl Master {
    /// Begins with an assignment that keeps the budget.
    pub(super) fn new(resources: usize, budget: f64, ends: Seconds, damage: f64) -> Self {
        let largest = ends.iter().copied().fold(0.0, f64::max);
        let unit = |value: f64| if value > 0.0 { value } else { 1.0 };
        let scale = (unit(largest), unit(budget));
        let mut latest = 0;
        for (row, end) in ends.iter().enumerate().take(resources) {
            if *end > ends[latest] {
                latest = row;
            }
        }
        let mut basis: Vec<Column> = (0..=resources).map(Column::Slack).collect();
        basis[latest] = Column::End;
        basis.push(Column::Assignment(0));
        let mut master = Self {
            resources,
            budget: budget / scale.1,
            scale,
            assignments: Vec::new(),
            basis,
        };
        master.add(ends, damage);
        master
    }

    /// One assignment more, with the end of each resource under it.
    pub(super) fn add(&mut self, mut ends: Seconds, damage: f64) {
        ends.iter_mut().for_each(|end| *end /= self.scale.0);
        self.assignments.push((ends, damage / self.scale.1));
    }

    fn rows(&self) -> usize {
        self.resources + 2
    }

    fn column(&self, column: Column) -> Row {
        let (mut row, of_damage) = ([0.0; ROWS_MAX], self.resources);
        match column {
            Column::End => row[..of_damage].fill(1.0),
            Column::Slack(at) if at < of_damage => row[at] = -1.0,
            Column::Slack(at) => row[at] = 1.0,
            Column::Assignment(index) => {
                let (ends, damage) = &self.assignments[index];
                for at in 0..of_damage {
                    row[at] = -ends[at];
                }
                row[of_damage] = *damage;
                row[of_damage + 1] = 1.0;
            }
        }
        row
    }

    /// Inverse of the matrix of the basis, by Gauss and Jordan with row exchange. `None` when it
    /// has none.
    fn inverse(&self) -> Option<Matrix> {
        let rows = self.rows();
        let (mut from, mut to) = ([[0.0; ROWS_MAX]; ROWS_MAX], [[0.0; ROWS_MAX]; ROWS_MAX]);
        for at in 0..rows {
            let column = self.column(self.basis[at]);
            for row in 0..rows {
                from[row][at] = column[row];
            }
            to[at][at] = 1.0;
        }
        for at in 0..rows {
            let size = |row: &usize| from[*row][at].abs();
            let pivot = (at..rows).max_by(|a, b| size(a).total_cmp(&size(b)))?;
            if from[pivot][at].abs() < 1e-13 {
                return None;
            }
            from.swap(at, pivot);
            to.swap(at, pivot);
            let by = 1.0 / from[at][at];
            from[at].iter_mut().for_each(|value| *value *= by);
            to[at].iter_mut().for_each(|value| *value *= by);
            for row in (0..rows).filter(|row| *row != at) {
                let times = from[row][at];
                if times != 0.0 {
                    for other in 0..rows {
                        from[row][other] -= times * from[at][other];
                        to[row][other] -= times * to[at][other];
                    }
                }
            }
        }
        Some(to)
    }

    /// Value of each column of the basis.
    fn values(&self, inverse: &Matrix) -> Row {
        let mut values = [0.0; ROWS_MAX];
        for row in 0..self.rows() {
            values[row] =
                inverse[row][self.resources] * self.budget + inverse[row][self.resources + 1];
        }
        values
    }

    /// Finds the best mix of the assignments so far, and its prices.
    pub(super) fn solve(&mut self) -> Option<Prices> {
        for step in 0..STEPS_MAX {
            let inverse = self.inverse()?;
            let end = self.basis.iter().position(|one| *one == Column::End)?;
            // Only the end has a cost: its row of the inverse is what the rows are worth.
            let worth = inverse[end];
            let Some(enters) = self.entering(&worth, step) else {
                return Some(self.prices(&worth, &inverse, end));
            };
            if !self.exchange(enters, &inverse) {
                return Some(self.prices(&worth, &inverse, end));
            }
        }
        let inverse = self.inverse()?;
        let end = self.basis.iter().position(|one| *one == Column::End)?;
        Some(self.prices(&inverse[end], &inverse, end))
    }

    /// The column that lowers the end most; after many steps the first that does, so that no circle
    /// is possible.
    fn entering(&self, worth: &Row, step: usize) -> Option<Column> {
        let slacks = (0..=self.resources).map(Column::Slack);
        let all = slacks.chain((0..self.assignments.len()).map(Column::Assignment));
        let mut best: Option<(Column, f64)> = None;
        for column in all {
            let costs = self.column(column);
            let reduced = -(worth.iter().zip(&costs).map(|(a, b)| a * b)).sum::<f64>();
            let better = reduced < -NONE && best.is_none_or(|(_, least)| reduced < least);
            if better && !self.basis.contains(&column) {
                best = Some((column, reduced));
                if step > STEPS_MAX / 2 {
                    break;
                }
            }
        }
        best.map(|(column, _)| column)
    }

    /// Takes a column into the basis. False when nothing limits it, which no sound program does.
    fn exchange(&mut self, enters: Column, inverse: &Matrix) -> bool {
        let (values, costs) = (self.values(inverse), self.column(enters));
        let mut leaves: Option<(usize, f64)> = None;
        for row in 0..self.rows() {
            let rate: f64 = inverse[row].iter().zip(&costs).map(|(a, b)| a * b).sum();
            if rate > 1e-12 && self.basis[row] != Column::End {
                let limit = values[row].max(0.0) / rate;
                if leaves.is_none_or(|(_, least)| limit < least) {
                    leaves = Some((row, limit));
                }
            }
        }
        let Some((row, _)) = leaves else { return false };
        self.basis[row] = enters;
        true
    }

    fn prices(&self, worth: &Row, inverse: &Matrix, end: usize) -> Prices {
        let mut second = [0.0; RESOURCES_MAX];
        for (price, worth) in second.iter_mut().zip(worth).take(self.resources) {
            *price = worth.max(0.0);
        }
        let sum: f64 = second.iter().sum();
        if sum > 0.0 {
            second.iter_mut().for_each(|price| *price /= sum);
        }
        Prices {
            second,
            damage: (-worth[self.resources]).max(0.0) * self.scale.0 / self.scale.1,
            end_s: self.values(inverse)[end] * self.scale.0,
        }
    }

    /// Assignments of the mix with their weights.
    pub(super) fn weights(&self) -> Vec<(usize, f64)> {
        let Some(inverse) = self.inverse() else {
            return vec![(0, 1.0)];
        };
        let values = self.values(&inverse);
        let rows = self.basis.iter().zip(values);
        let weights = rows.filter_map(|(column, value)| match column {
            Column::Assignment(index) if value > 1e-9 => Some((*index, value)),
            _ => None,
        });
        weights.collect()
    }
}
