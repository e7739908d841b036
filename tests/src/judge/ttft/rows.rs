//! What all ways took: the rows of the result file, the table for people, the promise.
//!
//! Upstairs:   `ttft`.
//! Downstairs: `kvtier_benches::report`.
//!
//! Rows are `ttft.RATE.WHAT`. The promise: in no round does a two-ended restore take longer than
//! 1.03 times the better of loading everything and computing everything, and a page. A page is a
//! layer of a block, and takes what it takes on average in the better way.
//!
//! Not here on purpose: measuring.

use comfy_table::{CellAlignment, Table, presets};
use kvtier_benches::report::Report;

use super::bed::{PAGES, Rate, Round, Run};

/// What a two-ended restore may take, as a multiple of the better pure way.
const ALLOWED: f64 = 1.03;

/// All rounds at one rate.
#[derive(Debug)]
pub(super) struct Figures {
    rate: Rate,
    rounds: Vec<Round>,
}

impl Figures {
    pub(super) fn new(rate: Rate) -> Self {
        let rounds = Vec::new();
        Self { rate, rounds }
    }

    pub(super) fn add(&mut self, round: Round) {
        self.rounds.push(round);
    }

    fn each(&self, of: impl Fn(&Round) -> f64) -> Vec<f64> {
        self.rounds.iter().map(of).collect()
    }
}

impl Round {
    /// The better pure way. Unit: milliseconds.
    fn better(&self) -> f64 {
        ms(&self.load).min(ms(&self.recompute))
    }

    /// What nobody is faster than who loads and computes parts of any size at once.
    fn fluid(&self) -> f64 {
        1.0 / (1.0 / ms(&self.load) + 1.0 / ms(&self.recompute))
    }

    /// What is promised. Unit: milliseconds.
    fn allowed(&self) -> f64 {
        self.better() * (ALLOWED + 1.0 / f64::from(PAGES))
    }

    fn over_better(&self, run: &Run) -> f64 {
        ms(run) / self.better()
    }

    fn runs(&self) -> [&Run; 5] {
        let Self {
            first,
            load,
            recompute,
            two_ended,
            hidden,
        } = self;
        [first, load, recompute, two_ended, hidden]
    }
}

/// Adds all rows.
pub(super) fn tell(all: &[Figures], report: &mut Report) {
    for figures in all {
        let base = format!("ttft.{}", figures.rate.name);
        let mut row = |what: &str, unit, values: Vec<f64>| {
            report.row(format!("{base}.{what}"), unit, &values);
        };
        row("load_ms", "ms", figures.each(|round| ms(&round.load)));
        row(
            "recompute_ms",
            "ms",
            figures.each(|round| ms(&round.recompute)),
        );
        row(
            "two_ended_ms",
            "ms",
            figures.each(|round| ms(&round.two_ended)),
        );
        row(
            "two_ended_first_ms",
            "ms",
            figures.each(|round| ms(&round.first)),
        );
        row("hidden_ms", "ms", figures.each(|round| ms(&round.hidden)));
        let computed = |round: &Round| count(round.two_ended.met.computed.len());
        row("two_ended_computed", "blocks", figures.each(computed));
        let ratios = |of: fn(&Round) -> &Run| figures.each(|round| round.over_better(of(round)));
        row(
            "two_ended_over_better",
            "x",
            ratios(|round| &round.two_ended),
        );
        row(
            "two_ended_first_over_better",
            "x",
            ratios(|round| &round.first),
        );
        row("hidden_over_better", "x", ratios(|round| &round.hidden));
        let fluid = |round: &Round| ms(&round.two_ended) / round.fluid();
        row("two_ended_over_fluid", "x", figures.each(fluid));
        for (what, of) in PROMISED {
            promise(&format!("{base}.{what}"), &figures.rounds, of, report);
        }
    }
    let rounds = || all.iter().flat_map(|figures| &figures.rounds);
    for (what, of) in PROMISED {
        let ratios: Vec<f64> = rounds().map(|round| round.over_better(of(round))).collect();
        report.row(format!("ttft.{what}_over_better"), "x", &ratios);
        report.row(format!("ttft.{what}_over_better_p95"), "x", &p95(&ratios));
    }
    let runs = || rounds().flat_map(Round::runs);
    let other = runs().filter(|run| !run.same).count();
    if other > 0 {
        report.fail(format!(
            "{other} runs did not end in the tokens of a cold run"
        ));
    }
    let identical = f64::from(u8::from(other == 0 && runs().next().is_some()));
    report.row("ttft.identical", "", &[identical]);
}

type Of = fn(&Round) -> &Run;

/// Runs that the promise is about.
const PROMISED: [(&str, Of); 2] = [
    ("two_ended", |round| &round.two_ended),
    ("two_ended_first", |round| &round.first),
];

/// The round that is nearest to its limit, or the furthest beyond it.
fn promise(base: &str, rounds: &[Round], of: Of, report: &mut Report) {
    let room = |round: &&Round| round.allowed() / ms(of(round));
    let worst = rounds.iter().min_by(|a, b| room(a).total_cmp(&room(b)));
    let (allowed, took) = worst.map(|round| (round.allowed(), ms(of(round)))).unzip();
    let name = (format!("{base}_allowed_ms"), "ms");
    let limit = format!("{base}_ms, worst round");
    report.beside(
        name,
        allowed.as_slice(),
        (&limit, took.as_slice()),
        Some(1.0),
    );
}

/// The table for people, in Markdown: medians, and the worst ratio to the better pure way.
pub(super) fn table(all: &[Figures]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header([
        "device MiB/s",
        "load ms",
        "recompute ms",
        "two-ended ms",
        "computed",
        "of the better: median",
        "worst",
        "of the fluid bound",
        "nothing known ms",
        "of the better: worst",
        "hidden ms",
    ]);
    for figures in all {
        let median = |of: fn(&Round) -> f64| {
            let values = figures.each(of);
            sorted(&values)
                .get(values.len() / 2)
                .copied()
                .unwrap_or(f64::NAN)
        };
        let worst = |of: fn(&Round) -> f64| figures.each(of).into_iter().fold(0.0, f64::max);
        let two_ended = |round: &Round| round.over_better(&round.two_ended);
        let first = |round: &Round| round.over_better(&round.first);
        table.add_row([
            figures.rate.mib_s.to_string(),
            format!("{:.0}", median(|round| ms(&round.load))),
            format!("{:.0}", median(|round| ms(&round.recompute))),
            format!("{:.0}", median(|round| ms(&round.two_ended))),
            format!(
                "{:.0}",
                median(|round| count(round.two_ended.met.computed.len()))
            ),
            format!("{:.3}", median(two_ended)),
            format!("{:.3}", worst(two_ended)),
            format!(
                "{:.3}",
                median(|round| ms(&round.two_ended) / round.fluid())
            ),
            format!("{:.0}", median(|round| ms(&round.first))),
            format!("{:.3}", worst(first)),
            format!("{:.0}", median(|round| ms(&round.hidden))),
        ]);
    }
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Of 20 values the second largest; the largest of fewer.
fn p95(values: &[f64]) -> Vec<f64> {
    let at = (values.len() * 95).div_ceil(100).saturating_sub(1);
    sorted(values).get(at).copied().into_iter().collect()
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

fn ms(run: &Run) -> f64 {
    run.took.as_secs_f64() * 1e3
}

#[expect(clippy::cast_precision_loss, reason = "a few blocks")]
fn count(blocks: usize) -> f64 {
    blocks as f64
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::super::bed::RATES;
    use super::*;
    use crate::demo::engine_link::Met;

    fn run(millis: u64) -> Run {
        Run {
            took: Duration::from_millis(millis),
            met: Met::default(),
            same: true,
        }
    }

    /// Loading takes a second and computing two.
    fn round(two_ended: u64) -> Round {
        Round {
            first: run(900),
            load: run(1000),
            recompute: run(2000),
            two_ended: run(two_ended),
            hidden: run(500),
        }
    }

    fn report(rounds: impl IntoIterator<Item = Round>) -> Report {
        let mut figures = Figures::new(RATES[0]);
        rounds.into_iter().for_each(|round| figures.add(round));
        let mut report = Report::new("test", Path::new("/"));
        tell(&[figures], &mut report);
        report
    }

    #[test]
    fn promise_is_broken_by_a_single_round_that_takes_more_than_the_better_way_and_a_page() {
        assert!(report([700, 1040, 700].map(round)).holds());
        assert!(!report([700, 1041, 700].map(round)).holds());
        assert!(report([]).has_failed(), "nothing was measured");
    }

    #[test]
    fn tell_fails_on_a_run_with_other_tokens() {
        let mut other = round(700);
        other.hidden.same = false;
        assert!(!report([round(700)]).has_failed());
        let report = report([round(700), other]);
        assert!(report.has_failed());
        assert_eq!(report.median("ttft.identical"), Some(0.0));
    }

    #[test]
    fn fluid_is_what_both_ends_together_take_and_p95_leaves_one_of_twenty_out() {
        assert!((round(700).fluid() - 2000.0 / 3.0).abs() < 1e-9);
        let values: Vec<f64> = (1..=20).map(f64::from).collect();
        assert_eq!(p95(&values), [19.0]);
        assert_eq!(p95(&values[..5]), [5.0]);
        assert_eq!(p95(&[]), [0.0; 0]);
    }
}
