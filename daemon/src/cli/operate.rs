//! `drain` and `wipe`: what an operator does to a running daemon.
//!
//! Upstairs:   `kvtier drain`, `kvtier wipe`.
//! Downstairs: `Drain` and `Wipe` of the control protocol.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::ProgressBar;
use kvtier_proto::v1::{DrainRequest, WipeRequest};
use serde_json::json;

use super::Target;
use super::connect::{CliError, connect};
use super::output::Answer;

/// How often the line that shows a wait moves.
const TICK: Duration = Duration::from_millis(120);

/// Flags of `drain`.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct DrainArgs {
    #[command(flatten)]
    target: Target,
    /// End the daemon when it is drained
    #[arg(long)]
    stop: bool,
}

/// Flags of `wipe`.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct WipeArgs {
    #[command(flatten)]
    target: Target,
    /// Name of the namespace whose blocks are to be forgotten
    namespace: String,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

pub(super) async fn drain(args: &DrainArgs) -> Result<Answer, CliError> {
    let mut client = connect(&args.target.socket).await?;
    let waiting = wait("draining: running restores finish, saved blocks become durable");
    // No timeout of our own: the daemon has one, `server.drain_timeout_s`.
    let request = DrainRequest {
        then_stop: args.stop,
    };
    let reply = client.drain(request).await;
    waiting.finish_and_clear();
    let blocks = reply?.into_inner().flushed_blocks;
    let next = match args.stop {
        true => "the daemon ends now",
        false => "it refuses new sessions and saves until it is restarted",
    };
    Ok(Answer::new(
        json!({ "flushed_blocks": blocks, "stopping": args.stop }),
        format!("drained: {blocks} blocks were made durable; {next}"),
    ))
}

pub(super) async fn wipe(args: &WipeArgs) -> Result<Answer, CliError> {
    let name = &args.namespace;
    let mut client = connect(&args.target.socket).await?;
    if !args.yes && !confirmed(name)? {
        return Err(CliError::Usage(String::from("nothing was wiped")));
    }
    let waiting = wait("wiping");
    let request = WipeRequest {
        session: bytes::Bytes::new(),
        namespace_name: name.clone(),
    };
    let reply = client.wipe(request).await;
    waiting.finish_and_clear();
    let reply = reply?.into_inner();
    let blocks = reply.blocks;
    let mut text = format!("wiped: {blocks} blocks of namespace {name} are forgotten");
    for disk in &reply.waiting {
        let disk = crate::log::clean(disk);
        text += &format!("\n{disk} takes no writes: the wipe reaches it when it is opened again");
    }
    Ok(Answer::new(
        json!({ "namespace": name, "blocks": blocks, "waiting": reply.waiting }),
        text,
    ))
}

/// Asks a person to repeat the name. Nobody can be asked without a terminal.
fn confirmed(name: &str) -> Result<bool, CliError> {
    if !std::io::stdin().is_terminal() {
        return Err(CliError::Usage(format!(
            "wiping {name:?} cannot be undone and nobody can be asked: add --yes"
        )));
    }
    let _ = write!(
        std::io::stderr(),
        "This forgets every block of namespace {name:?}. Type its name to go on: "
    );
    let mut line = String::new();
    let read = std::io::stdin().read_line(&mut line);
    Ok(read.is_ok() && line.trim() == name)
}

/// A line that shows that something is under way, when a person watches.
fn wait(what: &'static str) -> ProgressBar {
    let bar = match std::io::stderr().is_terminal() {
        true => ProgressBar::new_spinner(),
        false => ProgressBar::hidden(),
    };
    bar.set_message(what);
    bar.enable_steady_tick(TICK);
    bar
}
