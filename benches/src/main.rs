//! `kvtier-bench`: every performance claim, measured side by side with its limit, and every
//! crash that the daemon promises to survive, many times.
//!
//! Upstairs:   whoever wants to know how fast this is on their machine.
//! Downstairs: one module per suite; `kvtier_benches::report` for rows and files.
//!
//! Not here on purpose: no measuring. This file is the table of suites.
#![forbid(unsafe_code)]

mod codecs;
mod crash;
mod fair;
mod fio;
mod index;
mod limits;
mod planes;
mod planner;
mod store;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Measures kvtier beside the limits of this machine.
#[derive(Debug, Parser)]
#[command(name = "kvtier-bench", version, about)]
struct Cli {
    #[command(subcommand)]
    suite: Suite,
    #[command(flatten)]
    common: Common,
}

/// What every suite understands.
#[derive(Debug, Args)]
struct Common {
    /// Also write the result file.
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Seconds instead of minutes; good for a look, too noisy for a claim.
    #[arg(long, global = true)]
    quick: bool,
    /// Exit with status 1 when a row is below its bar.
    #[arg(long, global = true)]
    check: bool,
    /// Directory on the device to measure.
    #[arg(long, global = true, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Suite {
    /// Disk lanes and store beside fio, copies beside memcpy.
    Limits(limits::Options),
    /// The storage engine beside fio over sizes, patterns and depths.
    Store(store::Options),
    /// What a reader notices of saves, reclaim and scrub, beside fio's reads and writes.
    Fair(fair::Options),
    /// Codec levels and page movers on one core, beside plain zstd and memcpy.
    Codecs(codecs::Options),
    /// The real daemon killed and its power cut, many times: what is lost, what is wrong.
    Crash(crash::Options),
    /// A million blocks in one store: memory, restart, rebuild beside fio.
    Index(index::Options),
    /// Blocks of the real daemon: through shared memory and inline beside memcpy, from and to the
    /// device beside fio.
    Planes(planes::Options),
    /// Plans and decisions of restores over modelled machines, beside what nobody beats.
    Planner(planner::Options),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let report = match &cli.suite {
        Suite::Limits(options) => limits::run(options, &cli.common),
        Suite::Store(options) => store::run(options, &cli.common),
        Suite::Fair(options) => fair::run(options, &cli.common),
        Suite::Codecs(options) => codecs::run(options, &cli.common),
        Suite::Crash(options) => crash::run(options, &cli.common),
        Suite::Index(options) => index::run(options, &cli.common),
        Suite::Planes(options) => planes::run(options, &cli.common),
        Suite::Planner(options) => planner::run(options, &cli.common),
    };
    let file = cli.common.json.as_deref();
    let done = report.and_then(|report| report.finish(file).map(|()| report));
    match done {
        Ok(report) if report.has_failed() => ExitCode::FAILURE,
        Ok(report) if cli.common.check && !report.holds() => ExitCode::FAILURE,
        Ok(_) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("kvtier-bench: {problem}");
            ExitCode::from(2)
        }
    }
}
