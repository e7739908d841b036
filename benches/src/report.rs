//! Rows, the table and the result file, in one form for all suites.
//!
//! Upstairs:   every suite, the demo.
//! Downstairs: a terminal and a JSON file.
//!
//! A result file is one object: `{"suite", "machine": {"cores", "cpu", "kernel", "device"},
//! "notes": [..], "rows": [{"name", "unit", "n", "min", "median", "max", "limit", "ratio", "bar",
//! "holds"}]}`. `limit` names the row it was measured beside; `ratio` is the median of the pairwise
//! ratios, so a slow minute of the machine hurts both sides of a pair and not the ratio. `bar` is
//! the least ratio that is promised; where there is one, a ratio that could not be measured does
//! not hold, and neither does a row with a value that is no number. Promises that were
//! not kept are listed as `failures`; without one the field is not there.
//!
//! Not here on purpose: no mean and no standard deviation. Runs on shared machines have long
//! tails, and three order statistics cannot hide them.

use std::path::Path;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::machine::Machine;

/// Why a suite could not be run or written, for people.
pub type Problem = Box<dyn std::error::Error>;

/// Everything that one suite measured.
#[derive(Debug, Serialize)]
pub struct Report {
    suite: &'static str,
    machine: Machine,
    notes: Vec<String>,
    rows: Vec<Row>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    failures: Vec<String>,
}

/// One measured quantity.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Row {
    name: String,
    unit: &'static str,
    n: usize,
    min: f64,
    median: f64,
    max: f64,
    limit: Option<String>,
    ratio: Option<f64>,
    bar: Option<f64>,
    /// Whether the bar is reached; `None` without one.
    holds: Option<bool>,
}

impl Report {
    /// An empty report about the machine and the device below `dir`.
    pub fn new(suite: &'static str, dir: &Path) -> Self {
        Self {
            suite,
            machine: Machine::look(dir),
            notes: Vec::new(),
            rows: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// A condition that a reader of the numbers must know.
    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// A promise that was not kept: no speed makes up for it.
    pub fn fail(&mut self, text: impl Into<String>) {
        self.failures.push(text.into());
    }

    /// True when a promise was not kept.
    pub fn has_failed(&self) -> bool {
        !self.failures.is_empty()
    }

    /// A row of its own.
    pub fn row(&mut self, name: impl Into<String>, unit: &'static str, values: &[f64]) {
        self.rows.extend(Row::of(name.into(), unit, values));
    }

    /// A row that was measured beside another: `values[i]` and `limits[i]` are one pair. `bar` is
    /// the least ratio that is good enough, if there is a promise about it.
    pub fn beside(
        &mut self,
        (name, unit): (impl Into<String>, &'static str),
        values: &[f64],
        (limit, limits): (&str, &[f64]),
        bar: Option<f64>,
    ) {
        let ratios: Vec<f64> = values
            .iter()
            .zip(limits)
            .map(|(ours, limit)| ours / limit)
            .collect();
        let name = name.into();
        let Some(mut row) = Row::of(name.clone(), unit, values) else {
            if bar.is_some() {
                self.fail(format!("{name}: nothing was measured"));
            }
            return;
        };
        row.limit = Some(limit.to_owned());
        row.ratio = Spread::of(&ratios).map(|spread| spread.median);
        row.bar = bar;
        let whole = ratios.len() == values.len() && ratios.iter().all(|ratio| ratio.is_finite());
        row.holds = bar.map(|bar| whole && row.ratio.is_some_and(|ratio| ratio >= bar));
        self.rows.push(row);
    }

    /// A row of which no value is to be above `most`: its ratio is how far the largest is below.
    pub fn at_most(
        &mut self,
        name: impl Into<String>,
        unit: &'static str,
        values: &[f64],
        most: f64,
    ) {
        let name = name.into();
        let Some(mut row) = Row::of(name.clone(), unit, values) else {
            return self.fail(format!("{name}: nothing was measured"));
        };
        let finite = values.iter().all(|value| value.is_finite());
        row.limit = Some(format!("at most {most}"));
        row.ratio = Some(most / row.max);
        row.bar = Some(1.0);
        row.holds = Some(finite && row.max <= most);
        self.rows.push(row);
    }

    /// The median of a row.
    pub fn median(&self, name: &str) -> Option<f64> {
        let row = self.rows.iter().find(|row| row.name == name);
        row.map(|row| row.median)
    }

    /// Prints the table and writes the result file if asked to.
    pub fn finish(&self, file: Option<&Path>) -> Result<(), Problem> {
        println!("\n{}", self.machine);
        self.notes.iter().for_each(|note| println!("{note}"));
        println!("{}", self.table());
        self.failures
            .iter()
            .for_each(|one| println!("FAILED {one}"));
        if let Some(path) = file {
            let text = serde_json::to_string_pretty(self)? + "\n";
            std::fs::write(path, text)
                .map_err(|e| format!("cannot write {}: {e}", path.display()))?;
        }
        Ok(())
    }

    /// Whether every row with a bar reaches it.
    pub fn holds(&self) -> bool {
        self.rows.iter().all(|row| row.holds != Some(false))
    }

    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        table.set_header([
            "name", "unit", "n", "min", "median", "max", "ratio", "beside", "bar",
        ]);
        for row in &self.rows {
            let show = |value: Option<f64>| value.map_or(String::new(), |v| format!("{v:.3}"));
            let bar = row.bar.map_or(String::new(), |bar| {
                format!(
                    ">= {bar:.2} {}",
                    if row.holds == Some(true) {
                        "holds"
                    } else {
                        "BELOW"
                    }
                )
            });
            table.add_row([
                row.name.clone(),
                row.unit.to_owned(),
                row.n.to_string(),
                show(Some(row.min)),
                show(Some(row.median)),
                show(Some(row.max)),
                show(row.ratio),
                row.limit.clone().unwrap_or_default(),
                bar,
            ]);
        }
        for column in table.column_iter_mut().skip(2).take(5) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }
}

impl Row {
    fn of(name: String, unit: &'static str, values: &[f64]) -> Option<Self> {
        let Spread { min, median, max } = Spread::of(values)?;
        let n = values.len();
        Some(Self {
            name,
            unit,
            n,
            min,
            median,
            max,
            limit: None,
            ratio: None,
            bar: None,
            holds: None,
        })
    }
}

/// Order statistics of a sample.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Spread {
    min: f64,
    median: f64,
    max: f64,
}

impl Spread {
    /// Of the finite values; `None` when there are none.
    fn of(values: &[f64]) -> Option<Self> {
        let mut sorted: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let upper = *sorted.get(sorted.len() / 2)?;
        let lower = *sorted.get(sorted.len().saturating_sub(1) / 2)?;
        Some(Self {
            min: *sorted.first()?,
            median: f64::midpoint(lower, upper),
            max: *sorted.last()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_takes_the_middle_and_skips_what_is_no_number() {
        let spread = Spread::of(&[3.0, f64::NAN, 1.0, 9.0, f64::INFINITY]).unwrap();
        assert_eq!(
            spread,
            Spread {
                min: 1.0,
                median: 3.0,
                max: 9.0
            }
        );
        assert_eq!(Spread::of(&[1.0, 2.0]).unwrap().median, 1.5);
        assert_eq!(Spread::of(&[]), None);
    }

    #[test]
    fn ratio_is_the_median_of_pairs_and_not_of_medians() {
        let mut report = Report::new("test", Path::new("/"));
        // A machine that gets slower: each pair agrees, whatever the minute.
        let (ours, limit) = ([8.0, 4.0, 0.8], [10.0, 5.0, 1.0]);
        report.beside(("a.gib_s", "GiB/s"), &ours, ("limit.a", &limit), Some(0.75));
        let row = report.rows.first().unwrap();
        assert_eq!((row.ratio, row.holds), (Some(0.8), Some(true)));
    }

    #[test]
    fn result_file_has_the_promised_fields() {
        let mut report = Report::new("test", Path::new("/"));
        report.row("a.b", "us", &[1.0]);
        report.beside(("a.c", "us"), &[1.0], ("a.b", &[2.0]), Some(0.9));
        let file = serde_json::to_value(&report).unwrap();
        for field in ["cores", "cpu", "kernel", "device"] {
            assert!(!file["machine"][field].is_null(), "{field}");
        }
        let fields: Vec<_> = file["rows"][1]
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect();
        assert_eq!(
            fields,
            [
                "bar", "holds", "limit", "max", "median", "min", "n", "name", "ratio", "unit"
            ]
        );
        assert!(file["rows"][0]["limit"].is_null());
        assert_eq!(file["rows"][1]["ratio"], 0.5);
        assert_eq!(file["rows"][1]["bar"], 0.9);
        assert_eq!(file["rows"][1]["holds"], false);
        assert!(!report.holds());
    }

    #[test]
    fn a_bar_without_a_ratio_does_not_hold() {
        let with = |values: &[f64], limits: &[f64]| {
            let mut report = Report::new("test", Path::new("/"));
            report.beside(("a", "us"), values, ("b", limits), Some(0.5));
            report.holds() && !report.has_failed()
        };
        assert!(with(&[1.0], &[1.0]));
        for (values, limits) in [
            (&[1.0][..], &[][..]),
            (&[1.0], &[0.0]),
            (&[1.0, 1.0], &[1.0, 0.0]),
            (&[1.0, 1.0], &[1.0, f64::NAN]),
            (&[], &[]),
        ] {
            assert!(!with(values, limits), "{values:?} beside {limits:?}");
        }
    }
}
