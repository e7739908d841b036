//! `check-config`: is a configuration usable, and what does it come to?
//!
//! Upstairs:   `kvtier check-config`, and `kvtierd check-config` before the service starts.
//! Downstairs: `config`.

use std::ffi::OsString;
use std::process::ExitCode;

use serde_json::json;

use super::output::{self, Answer};
use crate::config::{self, Config, ConfigArgs, EXIT_BAD_CONFIG};

/// Flags of `check-config`.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Args {
    /// What is to be checked.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Print a file that says what the defaults are, and check nothing
    #[arg(long)]
    pub sample: bool,
}

/// Checks with the environment of this process and prints the result.
pub fn run(args: &Args, json: bool) -> ExitCode {
    output::print(&answer(args, std::env::vars_os()), json)
}

/// Checks, and says what the configuration comes to or everything that is wrong with it.
pub fn answer(args: &Args, env: impl IntoIterator<Item = (OsString, OsString)>) -> Answer {
    if args.sample {
        let sample = config::sample();
        return Answer::new(json!({ "sample": sample }), sample);
    }
    match Config::load(&args.config, env) {
        Ok(config) => {
            let effective = serde_json::to_value(&config).unwrap_or_default();
            let json = json!({ "usable": true, "config": effective });
            Answer::new(
                json,
                format!("# This configuration is usable.\n{}", config.to_toml()),
            )
        }
        Err(problems) => {
            let list: Vec<String> = problems.0.iter().map(ToString::to_string).collect();
            Answer {
                json: json!({ "usable": false, "problems": list }),
                text: problems.to_string(),
                code: EXIT_BAD_CONFIG,
            }
        }
    }
}
