//! Suite `fair`: what a reader notices of saves, of reclaim that copies pinned blocks, of scrub.
//!
//! Upstairs:   `kvtier-bench fair`.
//! Downstairs: `fair::bed` drives a store, `fair::limit` runs fio.
//!
//! A reader keeps a few restores open all the time, alone and beside each kind of other work; the
//! sides are taken in turn, round by round. A restore's time is from the request to the store to
//! its bytes; checksums are another thread's. Beside it stands fio: the same reads, alone and
//! beside a writer, to a file of its own, at the rate that our saves had last. What fio's reads
//! lose to fio's writes the device takes, whatever the software does: it is the limit of what is
//! kept beside saves (docs/decisions/0007).
//!
//! Not here on purpose: no daemon. Its own threads would be measured with the device.

mod bed;
mod limit;

use std::time::Duration;

use kvtier_benches::report::{Problem, Report};
use kvtier_proto::units::{Bytes, KIB, MIB};

use self::bed::{Bed, Beside, Seen};
use crate::Common;
use crate::fio;

/// Payload of a block. Unit: bytes.
const SIZES: [u64; 2] = [64 * KIB, 2 * MIB];
/// A reader's p99 alone over its p99 beside other work: it may rise by a fifth. Beside saves, of
/// what fio keeps.
const P99_BAR: f64 = 1.0 / 1.2;
/// Part by which fio's writes may miss the rate that was asked of them, unmentioned.
const RATE_OFF: f64 = 0.1;

/// Options of this suite.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Restores that the reader keeps open.
    #[arg(long, default_value_t = 4)]
    depth: usize,
    /// Only blocks whose size is written like this: 64KiB or 2MiB.
    #[arg(long, default_value = "")]
    only: String,
}

/// What a row says of a round.
type Quantity = fn(&Seen) -> f64;

/// One size of block and everything that was seen of it.
struct Rows<'a> {
    report: &'a mut Report,
    label: String,
}

/// Runs the suite.
pub(crate) fn run(options: &Options, common: &Common) -> Result<Report, Problem> {
    let fio = fio::version()?;
    let mut report = Report::new("fair", &common.dir);
    let (rounds, seconds, span) = match common.quick {
        true => (3, 0.5, 1536 * MIB),
        false => (9, 1.5, 4096 * MIB),
    };
    let depth = options.depth;
    report.note(format!(
        "{depth} restores open; {rounds} rounds of {seconds} s a side; a store and a file of {}; {fio}",
        Bytes(span)
    ));
    for size in SIZES {
        let label = if size < MIB {
            format!("{}KiB", size / KIB)
        } else {
            format!("{}MiB", size / MIB)
        };
        if !label.contains(&options.only) {
            continue;
        }
        let home = tempfile::Builder::new()
            .prefix("kvtier-bench-")
            .tempdir_in(&common.dir)?;
        eprintln!("a store of {label} blocks");
        let mut bed = Bed::make(&home.path().join("store"), size, depth, span)?;
        let fio = limit::Fio::make(home.path(), size, depth, span)?;
        let span = Duration::from_secs_f64(seconds);
        let mut rows = Rows {
            report: &mut report,
            label,
        };
        rows.measure(&mut bed, &fio, rounds, span)?;
    }
    Ok(report)
}

/// Rate of the saves of the round before, or of this one. Unit: MiB/s.
fn saved_last(seen: &[Vec<Seen>]) -> f64 {
    let mut sides = Beside::ALL.into_iter().zip(seen);
    let saves = sides.find(|(beside, _)| *beside == Beside::Saves);
    let last = saves.and_then(|(_, seen)| seen.last());
    last.map_or(0.0, |seen| seen.other_mib_s)
}

impl Rows<'_> {
    fn measure(
        &mut self,
        bed: &mut Bed,
        fio: &limit::Fio,
        rounds: usize,
        span: Duration,
    ) -> Result<(), Problem> {
        let mut seen = Beside::ALL.map(|_| Vec::new());
        let (mut fio_alone, mut fio_beside) = (Vec::new(), Vec::new());
        let mut asked = Vec::new();
        for round in 0..rounds {
            eprintln!("{}: round {} of {rounds}", self.label, round + 1);
            let mut order: Vec<_> = Beside::ALL.into_iter().map(Some).chain([None]).collect();
            order.rotate_left(round % (Beside::ALL.len() + 1));
            for side in order {
                let Some(beside) = side else {
                    let rate = saved_last(&seen);
                    asked.push(rate);
                    fio_alone.push(fio.read(span, None)?);
                    fio_beside.push(fio.read(span, Some(rate))?);
                    continue;
                };
                let here = Beside::ALL.iter().position(|one| *one == beside);
                if let Some(seen) = here.and_then(|at| seen.get_mut(at)) {
                    seen.push(bed.read_beside(beside, span)?);
                }
            }
        }
        for (beside, seen) in Beside::ALL.into_iter().zip(&seen) {
            self.side(beside.name(), seen);
            if beside == Beside::Copies && !seen.iter().any(|seen| seen.copied_mib_s > 0.0) {
                self.report
                    .fail(format!("{}: nothing was copied", self.label));
            }
        }
        self.side("limit.alone", &fio_alone);
        self.side("limit.saves", &fio_beside);
        self.note_rate(&asked, &fio_beside);
        let alone = seen.first().map(Vec::as_slice).unwrap_or_default();
        self.kept("limit.", &fio_alone, ("limit.saves", &fio_beside), None);
        for (beside, seen) in Beside::ALL.into_iter().zip(&seen).skip(1) {
            let scrub = beside == Beside::Scrub;
            let bar = scrub.then_some(P99_BAR);
            self.kept("", alone, (beside.name(), seen), bar);
            if !scrub {
                self.kept_of_limit(beside, (alone, seen), (&fio_alone, &fio_beside));
            }
        }
        Ok(())
    }

    /// Says when fio did not write as fast as our saves did: its reads had it easier then.
    fn note_rate(&mut self, asked: &[f64], fio: &[Seen]) {
        let off = |(asked, seen): (&f64, &Seen)| (seen.other_mib_s / asked - 1.0).abs() > RATE_OFF;
        let rounds = asked.iter().zip(fio).filter(|pair| off(*pair)).count();
        if rounds > 0 {
            self.report.note(format!(
                "{}: in {rounds} of {} rounds fio missed the rate of the saves by more than a tenth",
                self.label,
                asked.len()
            ));
        }
    }

    /// What of its p99 our reader keeps, beside what fio's keeps, pair by pair.
    fn kept_of_limit(
        &mut self,
        beside: Beside,
        (alone, seen): (&[Seen], &[Seen]),
        (fio_alone, fio_beside): (&[Seen], &[Seen]),
    ) {
        let kept = |alone: &[Seen], beside: &[Seen]| -> Vec<f64> {
            let pairs = alone.iter().zip(beside);
            pairs
                .map(|(alone, beside)| alone.us_p99 / beside.us_p99)
                .collect()
        };
        let name = format!("kept.{}.{}.share", beside.name(), self.label);
        let limit = format!("limit.kept.saves.{}.share", self.label);
        let (ours, limits) = (kept(alone, seen), kept(fio_alone, fio_beside));
        if beside == Beside::Saves {
            self.report.row(limit.clone(), "of p99 alone", &limits);
        }
        let row = (name, "of p99 alone");
        self.report
            .beside(row, &ours, (&limit, &limits), Some(P99_BAR));
    }

    fn side(&mut self, side: &str, seen: &[Seen]) {
        let name = |quantity: &str| format!("{side}.read.{}.{quantity}", self.label);
        let quantities: [(&str, &str, Quantity); 6] = [
            ("us_p50", "us", |seen| seen.us_p50),
            ("us_p99", "us", |seen| seen.us_p99),
            ("mib_s", "MiB/s", |seen| seen.read_mib_s),
            ("other_mib_s", "MiB/s", |seen| seen.other_mib_s),
            ("copied_mib_s", "MiB/s", |seen| seen.copied_mib_s),
            ("cpu", "cores", |seen| seen.cpu),
        ];
        for (quantity, unit, of) in quantities {
            let values: Vec<f64> = seen.iter().map(of).collect();
            if values.iter().any(|value| *value > 0.0) {
                self.report.row(name(quantity), unit, &values);
            }
        }
    }

    /// The reader's times alone over those beside other work, pair by pair.
    fn kept(
        &mut self,
        who: &str,
        alone: &[Seen],
        (beside, beside_seen): (&str, &[Seen]),
        bar: Option<f64>,
    ) {
        let quantities: [(&str, Quantity, Option<f64>); 2] = [
            ("p50", |seen| seen.us_p50, None),
            ("p99", |seen| seen.us_p99, bar),
        ];
        for (quantity, of, bar) in quantities {
            let values: Vec<f64> = alone.iter().map(of).collect();
            let limits: Vec<f64> = beside_seen.iter().map(of).collect();
            let short = beside.trim_start_matches(who);
            let name = format!("{who}kept.{short}.{}.{quantity}", self.label);
            let limit = format!("{beside}.read.{}.us_{quantity}", self.label);
            self.report
                .beside((name, "us alone"), &values, (&limit, &limits), bar);
        }
    }
}
