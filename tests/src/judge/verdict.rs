//! Figures of all levels: the table for people, the rows of the result file, the promises.
//!
//! Upstairs:   `kvtier-judge quality`.
//! Downstairs: `kvtier_benches::report`.
//!
//! Rows are `quality.SET.LEVEL.WHAT`, one value over all positions of a set; `kl` has one value a
//! document, so its spread can be seen. Where DESIGN promises something, the row stands beside
//! the promise as how many times better it is, and must reach 1.
//!
//! Not here on purpose: measuring.

use comfy_table::{CellAlignment, Table, presets};
use kvtier_benches::report::Report;
use kvtier_proto::Level;

use super::compare::Change;
use super::quality::Judged;

/// One level over one set of documents.
#[derive(Debug, Clone)]
pub struct SetFigures {
    /// `dev`, `heldout` or `foreign`.
    pub set: &'static str,
    /// Name of the level.
    pub name: &'static str,
    /// Its number.
    pub level: Level,
    /// Each document.
    pub documents: Vec<Judged>,
}

/// What is promised of a level on held-out text.
struct Promise {
    ratio: f64,
    kl: f64,
    top1: f64,
    perplexity: f64,
}

impl SetFigures {
    /// Everything that changed, over all documents.
    pub fn change(&self) -> Change {
        let all = self.documents.iter().map(|one| one.change);
        all.fold(Change::default(), |sum, one| sum.and(&one))
    }

    /// Bits a number.
    pub fn bits(&self) -> f64 {
        mean(self.documents.iter().map(|one| one.bits))
    }

    /// Share of greedy continuations before the first other token.
    fn greedy(&self) -> f64 {
        mean(self.documents.iter().map(|one| one.greedy))
    }

    /// How many times smaller than 16 bits a number.
    fn ratio(&self) -> f64 {
        16.0 / self.bits()
    }

    const fn promise(&self) -> Option<Promise> {
        let (ratio, kl, top1, perplexity) = match self.level {
            Level::TRANSPARENT => (3.3, 1.3e-4, 99.3, 0.5),
            Level::TRANSPARENT_X => (4.2, 1.3e-4, 99.3, 0.5),
            Level::BALANCED => (5.0, 1e-3, 98.0, 0.5),
            Level::BALANCED_X => (7.0, 1e-3, 98.0, 0.5),
            Level::SMALL => (9.0, 1e-2, 95.5, 1.5),
            Level::SMALL_X => (14.0, 1e-2, 95.5, 1.5),
            _ => return None,
        };
        Some(Promise {
            ratio,
            kl,
            top1,
            perplexity,
        })
    }

    /// Adds the rows of this level and set.
    pub fn rows(&self, report: &mut Report) {
        let base = format!("quality.{}.{}", self.set, self.name);
        let change = self.change();
        let each: Vec<f64> = self.documents.iter().map(|one| one.change.kl()).collect();
        report.row(format!("{base}.bits"), "bits", &[self.bits()]);
        report.row(format!("{base}.ratio"), "x", &[self.ratio()]);
        report.row(format!("{base}.kl_mean"), "nats", &[change.kl()]);
        report.row(format!("{base}.kl"), "nats", &each);
        report.row(format!("{base}.top1"), "%", &[change.top1()]);
        report.row(format!("{base}.ppl"), "%", &[change.perplexity()]);
        report.row(format!("{base}.greedy"), "%", &[100.0 * self.greedy()]);
        if let (Some(promise), "heldout") = (self.promise(), self.set) {
            let mut beside = |what: &str, ours: f64, promised: f64| {
                let name = (format!("{base}.{what}_kept"), "x");
                report.beside(name, &[ours], ("promise", &[promised]), Some(1.0));
            };
            beside("ratio", self.ratio(), promise.ratio);
            beside("kl", promise.kl, change.kl());
            beside("top1", change.top1(), promise.top1);
            beside("ppl", promise.perplexity, change.perplexity().abs());
        }
        let foreign = (self.set, self.level) == ("foreign", Level::BALANCED_X);
        if foreign {
            let mut beside = |what: &str, ours: f64, promised: f64| {
                let name = (format!("{base}.{what}_kept"), "x");
                report.beside(name, &[ours], ("promise", &[promised]), Some(1.0));
            };
            beside("ratio", self.ratio(), 5.2);
            beside("kl", 2e-3, change.kl());
        }
    }
}

/// The table for people.
pub fn table(all: &[SetFigures]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header([
        "texts", "level", "bits", "ratio", "KL", "worst", "top-1 %", "ppl %", "greedy %",
    ]);
    for one in all {
        let change = one.change();
        let worst = one.documents.iter().map(|one| one.change.kl());
        table.add_row([
            one.set.to_owned(),
            one.name.to_owned(),
            format!("{:.3}", one.bits()),
            format!("{:.2}", one.ratio()),
            format!("{:.2e}", change.kl()),
            format!("{:.2e}", worst.fold(0.0, f64::max)),
            format!("{:.2}", change.top1()),
            format!("{:+.2}", change.perplexity()),
            format!("{:.0}", 100.0 * one.greedy()),
        ]);
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[expect(clippy::cast_precision_loss, reason = "few documents")]
fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1) as f64;
    values.sum::<f64>() / count
}
