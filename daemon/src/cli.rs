//! The operator's command line: asks a running daemon, or reads a disk tier without one.
//!
//! Upstairs:   `bin/kvtier.rs`; `bin/kvtierd.rs` shares `check`.
//! Downstairs: the control protocol over the Unix socket; `config`; `kvtier-store`.
//!
//! A command gives one [`Answer`]: JSON for machines, text for people, and an exit code. What it
//! prints on the way (progress) goes to standard error.
//!
//! Exit codes: 0 done; 1 done, and the news is bad (damage was found); 2 could not be done;
//! 3 `verify` found that the whole store is lost; 64 the configuration is not usable.

mod bench;
mod calibrate;
pub mod check;
mod connect;
mod explain;
mod export;
mod inspect;
mod learned;
mod levels;
mod operate;
mod output;
mod session;
mod status;
#[cfg(test)]
mod stores;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use kvtier_proto::BlockKey;

pub use connect::CliError;
pub use output::Answer;

/// Exit code of a command that found damage.
const EXIT_BAD_NEWS: u8 = 1;
/// Exit code of a command that could not do its work.
const EXIT_FAILED: u8 = 2;

/// Operate a kvtier daemon.
#[derive(Debug, Parser)]
#[command(name = "kvtier", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print JSON instead of tables
    #[arg(long, global = true)]
    json: bool,
}

/// Which daemon a command talks to.
#[derive(Debug, Clone, clap::Args)]
struct Target {
    /// Unix socket of the daemon
    #[arg(
        long,
        value_name = "PATH",
        env = "KVTIER_SERVER_SOCKET",
        default_value = "/run/kvtier/kvtierd.sock"
    )]
    socket: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what the daemon is doing, holds and did
    Status(status::Args),
    /// Say where a block is and why a lookup of it misses
    Explain(explain::Args),
    /// List segments and records of a disk tier, without a daemon
    Inspect(inspect::Args),
    /// Read every byte of a disk tier and check every checksum, without a daemon
    Verify(verify::Args),
    /// Check a configuration and print it with all defaults; exit code 64 when it is not usable
    CheckConfig(Box<check::Args>),
    /// Measure lookups, leases and inline transfers on the running daemon
    Bench(bench::Args),
    /// Make the tables of a model's lossy levels from samples of its KV, without a daemon
    Calibrate(Box<calibrate::Args>),
    /// Write the K and V of a stored prefix into a sample for `calibrate`
    Export(export::Args),
    /// Refuse new sessions and saves, finish what runs, make everything durable
    Drain(operate::DrainArgs),
    /// Forget every block of a namespace
    Wipe(operate::WipeArgs),
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.json;
    match run(cli) {
        Ok(answer) => output::print(&answer, json),
        Err(error) => output::fail(&error, json, EXIT_FAILED),
    }
}

fn run(cli: Cli) -> Result<Answer, CliError> {
    match cli.command {
        Command::CheckConfig(args) => Ok(check::answer(&args, std::env::vars_os())),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Status(args) => online(status::run(&args)),
        Command::Explain(args) => online(explain::run(&args)),
        Command::Export(args) => online(export::run(&args)),
        Command::Bench(args) => online(bench::run(&args)),
        Command::Drain(args) => online(operate::drain(&args)),
        Command::Wipe(args) => online(operate::wipe(&args)),
    }
}

fn online<F>(command: F) -> Result<Answer, CliError>
where
    F: Future<Output = Result<Answer, CliError>>,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(CliError::Runtime)?;
    runtime.block_on(command)
}

/// Reads a key from the command line.
fn key(text: &str) -> Result<BlockKey, String> {
    BlockKey::from_hex(text).ok_or_else(|| String::from("accepted: the 64 hex digits of a key"))
}
