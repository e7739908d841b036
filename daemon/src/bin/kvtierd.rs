//! The daemon's entry: read the configuration, start the log, run.
//!
//! Upstairs:   the service manager, or a shell.
//! Downstairs: `kvtierd::process`.
//!
//! Exit codes: 0 stopped in order, 1 could not start or was interrupted, 64 bad configuration.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use kvtierd::cli::check;
use kvtierd::config::{Config, ConfigArgs, EXIT_BAD_CONFIG};
use kvtierd::{log, process};

/// Keeps attention KV of LLM serving engines in host memory and on NVMe, and gives it back.
#[derive(Debug, Parser)]
#[command(name = "kvtierd", version)]
struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Check the configuration, print it with every default filled in, and exit.
    CheckConfig,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if matches!(args.what, Some(What::CheckConfig)) {
        let config = args.config;
        let sample = false;
        return check::run(&check::Args { config, sample }, false);
    }
    let config = match Config::load(&args.config, std::env::vars_os()) {
        Ok(config) => config,
        Err(problems) => {
            eprintln!("{problems}");
            return ExitCode::from(EXIT_BAD_CONFIG);
        }
    };
    if let Err(problem) = log::start(&config.log) {
        eprintln!("the log cannot be started: {problem}");
        return ExitCode::from(EXIT_BAD_CONFIG);
    }
    tracing::info!(version = env!("CARGO_PKG_VERSION"), config = %config.to_toml().replace('\n', "; "), "starting");
    match process::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            tracing::error!(%problem, "the daemon could not serve");
            ExitCode::FAILURE
        }
    }
}
