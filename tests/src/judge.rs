//! Judging with a real engine: samples of its KV to calibrate on, what a coded cache does to its
//! predictions, and when its first token comes.
//!
//! Upstairs:   `kvtier-judge`, which people and release checks run.
//! Downstairs: the reference engine, the texts, the codecs of `kvtier_kernels`, the real daemon.
//!
//! Exit codes: 0 as promised, 1 a promise is not kept, 2 something failed.
//!
//! Not here on purpose: speed of codecs; that is the suite `codecs` of the benches.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use kvtier_benches::report::Problem;

use crate::text;

pub mod coded;
pub mod compare;
pub mod export;
pub mod fisher;
mod levels;
mod plot;
pub mod quality;
mod safetensors;
pub mod subject;
mod ttft;
pub mod verdict;

/// Tokens of a document of samples.
const SAMPLE_TOKENS: usize = 1024;
/// Tokens of a prefix that is restored.
const CONTEXT_TOKENS: usize = 768;
/// Tokens after it that Fisher information is of: few, so that there can be many draws.
const FISHER_TARGETS: usize = 64;
/// Tokens at the front of a prefix that Fisher information leaves out: the first holds most of it
/// and is kept exact, and its neighbours are like it in some models.
const SINKS: usize = 4;

/// Judges codecs and restores with a real engine.
#[derive(Debug, Parser)]
#[command(name = "kvtier-judge", version)]
struct Arguments {
    /// A llama GGUF file to run instead of the reference model
    #[arg(long, value_name = "PATH", global = true)]
    model: Option<PathBuf>,

    #[command(subcommand)]
    job: Job,
}

#[derive(Debug, Subcommand)]
enum Job {
    /// Writes K, V and Fisher information of the calibration texts, for `kvtier calibrate`
    Export {
        /// Folder to write to
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,

        /// Random gradients a document for the Fisher information; 0 leaves it out
        #[arg(long, value_name = "N", default_value_t = 24)]
        draws: u64,

        /// Also write the held-out texts, to measure rates on
        #[arg(long)]
        heldout: bool,
    },
    /// Measures what every level costs in predictions and saves in bytes
    Quality(levels::Options),
    /// Measures the time to the first token at several rates of the device, restored in every way
    Ttft(ttft::Options),
}

/// Runs the command line.
pub fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(problem) => {
            eprintln!("kvtier-judge: {problem}");
            ExitCode::from(2)
        }
    }
}

/// Does the job; false when a promise is not kept.
fn run(arguments: &Arguments) -> Result<bool, Problem> {
    let load = || subject::load(arguments.model.as_deref());
    match &arguments.job {
        Job::Export {
            dir,
            draws,
            heldout,
        } => {
            let (model, tokenizer) = load()?;
            let texts = subject::tokens(&tokenizer, &text::calibration(), SAMPLE_TOKENS)?;
            export::documents(&model, &texts, dir, "cal", &|name| say("sampled", name))?;
            if *heldout {
                let texts = subject::tokens(&tokenizer, &text::heldout(), SAMPLE_TOKENS)?;
                let prefix = "heldout";
                export::documents(&model, &texts, dir, prefix, &|name| say("sampled", name))?;
            }
            if *draws > 0 {
                let options = fisher::FisherOptions {
                    context: CONTEXT_TOKENS,
                    targets: FISHER_TARGETS,
                    sinks: SINKS,
                    draws: *draws,
                };
                let told = |name: &str| say("differentiated", name);
                let found = fisher::fisher(&model, &texts, options, &told)?;
                export::fisher(&model, &found, &dir.join("fisher.safetensors"))?;
            }
            Ok(true)
        }
        Job::Quality(options) => {
            let (model, tokenizer) = load()?;
            levels::run(options, &model, &tokenizer)
        }
        Job::Ttft(options) => ttft::run(options),
    }
}

/// A line of progress.
fn say(what: &str, name: &str) {
    let _ = writeln!(std::io::stderr(), "{what} {name}");
}

#[cfg(test)]
mod tests;
