//! `kvtier-judge ttft`: time to the first token of a real engine behind the real daemon, for every
//! way to bring a prompt, at several rates of the device.
//!
//! Upstairs:   `judge` parses the command line.
//! Downstairs: `bed` brings prompts, `rows` tells what it took.
//!
//! The engine takes times that are set and the device is limited, so that both take milliseconds
//! by sleeping: a machine that is busy with other things changes little of a ratio. All ways at
//! one rate run one after another, all rates in each round; what is compared is of one round.
//!
//! It is a job of the judge and not a suite of the benches, since the engine is the judge's, and
//! the judge takes reports and daemons from the benches.

use std::path::PathBuf;

use clap::Args;
use kvtier_benches::report::{Problem, Report};
use tokio::runtime::Builder;

use self::bed::{Bed, RATES, Rate, Subject};
use self::rows::Figures;

mod bed;
mod rows;

/// Threads for the SDK; the engine has the one that calls.
const WORKERS: usize = 2;

/// Options of the job.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// Also write the results to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// How often everything is measured
    #[arg(long, value_name = "N", default_value_t = 7)]
    rounds: usize,

    /// Only these rates of the device, by name, separated by commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    rates: Vec<String>,

    /// Two rounds: to see that everything works
    #[arg(long)]
    quick: bool,

    /// Directory on the device to read from
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,
}

impl Options {
    fn rates(&self) -> Result<Vec<Rate>, Problem> {
        let named = |name: &String| {
            let rate = RATES.iter().find(|rate| rate.name == name);
            let known = || RATES.map(|rate| rate.name).join(", ");
            rate.copied()
                .ok_or_else(|| format!("no rate {name}; there are {}", known()).into())
        };
        match self.rates.is_empty() {
            true => Ok(RATES.to_vec()),
            false => self.rates.iter().map(named).collect(),
        }
    }
}

/// Measures; false when a promise is not kept.
pub(super) fn run(options: &Options) -> Result<bool, Problem> {
    let rounds = if options.quick { 2 } else { options.rounds };
    let runtime = Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()?;
    let subject = Subject::new()?;
    let mut figures = Vec::new();
    for rate in options.rates()? {
        let bed = Bed::new(rate, &options.dir, &subject, runtime.handle())?;
        figures.push((bed, Figures::new(rate)));
    }
    let mut report = Report::new("ttft", &options.dir);
    for round in 1..=rounds {
        for (bed, of_rate) in &mut figures {
            of_rate.add(bed.round(&subject, runtime.handle(), round)?);
        }
    }
    let figures: Vec<Figures> = figures.into_iter().map(|(_, figures)| figures).collect();
    bed::notes(&mut report);
    rows::tell(&figures, &mut report);
    report.finish(options.json.as_deref())?;
    println!("{}", rows::table(&figures));
    Ok(report.holds() && !report.has_failed())
}
