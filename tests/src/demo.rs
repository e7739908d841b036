//! The demo: KV of a real model survives kill -9, and nobody computes it twice.
//!
//! Upstairs:   `cargo demo`, which a newcomer runs first; `tests/demo.rs` runs it as a test.
//! Downstairs: a real `kvtierd`, the SDK, the reference engine, each in a process of its own.
//!
//! ```text
//!   demo -- leash --> kvtierd           one for each codec level
//!     |---- leash --> engine A          computes, saves, continues
//!     `---- leash --> engine B          restores, continues; one for each level
//! ```
//!
//! Exit codes: 0 all as promised, 1 a promise is broken or something failed, 2 bad arguments,
//! 130 interrupted.
//!
//! Not here on purpose: measuring in depth (`kvtier-bench`) and faults in depth (the end-to-end
//! tests). The two planted faults show only that the demo would notice.

mod children;
mod daemon;
pub mod engine_link;
mod engine_process;
mod job;
mod outcome;
mod show;
mod story;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

use crate::engine::EngineError;
use crate::weights::WeightsError;

/// Exit code of a demo that was interrupted, as shells report it.
const EXIT_INTERRUPTED: u8 = 130;
/// Exit code for arguments that cannot be used, as clap has it.
const EXIT_USAGE: u8 = 2;

/// Prefills a long real text, saves its KV to kvtierd, kills the daemon, restores the KV in
/// another engine process, and compares the continuations token by token.
#[derive(Debug, Parser)]
#[command(name = "cargo demo", version, args_conflicts_with_subcommands = true)]
struct Arguments {
    /// Also write the results to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Length of the prompt, from the start of the shipped text. Unit: tokens
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = tokens)]
    tokens: usize,

    /// A llama GGUF file to run instead of the reference model
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,

    /// Where to make the daemon's temporary folder; its device is the one that is measured
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// A small model with random weights: nothing is fetched.
    #[arg(long, hide = true, conflicts_with = "model")]
    tiny: bool,

    /// Plants a fault that the demo has to notice.
    #[arg(long, hide = true, value_name = "FAULT")]
    plant: Option<Fault>,

    #[command(subcommand)]
    inside: Option<Inside>,
}

/// What the demo starts itself as.
#[derive(Debug, Subcommand)]
enum Inside {
    /// Becomes a program that ends with its parent.
    #[command(hide = true)]
    Leash {
        parent: u32,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// Does one job as an engine.
    #[command(hide = true)]
    Engine { job: PathBuf, report: PathBuf },
}

/// A fault to plant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Fault {
    /// One bit of the KV that an engine has restored.
    RestoredBit,
    /// A page of the blocks on the device.
    StoredBytes,
}

fn tokens(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|tokens| *tokens >= 2);
    number.ok_or_else(|| "accepted: a whole number of at least 2".to_owned())
}

/// Why the demo could not be run to its end.
#[derive(Debug, thiserror::Error)]
enum DemoError {
    #[error("interrupted")]
    Interrupted,
    #[error("{0}")]
    Usage(String),
    #[error("{doing}: {error}")]
    Io {
        doing: String,
        error: std::io::Error,
    },
    #[error("{what}: {error}")]
    Json {
        what: &'static str,
        error: serde_json::Error,
    },
    #[error("{0}")]
    Child(String),
    #[error("kvtierd: {0}")]
    Daemon(String),
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Link(#[from] engine_link::Problem),
}

impl DemoError {
    fn io(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let doing = doing.into();
        move |error| Self::Io { doing, error }
    }

    fn json(what: &'static str) -> impl FnOnce(serde_json::Error) -> Self {
        move |error| Self::Json { what, error }
    }

    const fn exit_code(&self) -> u8 {
        match self {
            Self::Interrupted => EXIT_INTERRUPTED,
            Self::Usage(_) => EXIT_USAGE,
            _ => 1,
        }
    }
}

/// The program `kvtier-demo`.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match &arguments.inside {
        None => return perform(&arguments),
        Some(Inside::Leash { parent, command }) => Err(children::leash(*parent, command)),
        Some(Inside::Engine { job, report }) => engine_process::run(job, report),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn perform(arguments: &Arguments) -> ExitCode {
    match story::run(arguments) {
        Ok(problems) if problems.is_empty() => {
            println!("{}", show::NEXT);
            ExitCode::SUCCESS
        }
        Ok(problems) => {
            eprintln!("THE DEMO FAILED: kvtier did not do what it promises");
            problems.iter().for_each(|problem| eprintln!("  {problem}"));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("the demo did not finish: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
