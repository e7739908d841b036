//! Structured logs on standard error, for people or as one JSON object a line.
//!
//! Upstairs:   `bin/kvtierd.rs` starts them; every room logs through `tracing`.
//! Downstairs: `tracing-subscriber`.
//!
//! Invariants kept here
//!   G1  A key shows as its first 8 hex digits, a secret not at all: their types print so, and
//!       a test holds them to it. Text from a peer passes through [`clean`] first.
//!
//! Not here on purpose: no files and no rotation; the service manager keeps what is written.

use std::fmt;
use std::io::IsTerminal;

use tracing::Subscriber;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::config::{LogConfig, LogFormat};

/// Longest text of a peer that a log line shows. Unit: characters.
const PEER_TEXT_MAX: usize = 256;

/// Why logging could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// The filter is not one; a checked configuration does not have such a filter.
    #[error("log.level is not a filter")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    /// Logging was started before in this process.
    #[error("logs were started twice")]
    Twice(#[from] tracing::dispatcher::SetGlobalDefaultError),
}

/// Starts logging for the whole process.
pub fn start(config: &LogConfig) -> Result<(), LogError> {
    let colours = std::io::stderr().is_terminal();
    let subscriber = subscriber(config, std::io::stderr, colours)?;
    tracing::dispatcher::set_global_default(subscriber)?;
    Ok(())
}

fn subscriber<W>(
    config: &LogConfig,
    writer: W,
    colours: bool,
) -> Result<tracing::Dispatch, LogError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_new(&config.level)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(colours);
    Ok(match config.format {
        LogFormat::Text => dispatch(builder.finish()),
        LogFormat::Json => dispatch(builder.json().flatten_event(true).finish()),
    })
}

fn dispatch(subscriber: impl Subscriber + Send + Sync) -> tracing::Dispatch {
    tracing::Dispatch::new(subscriber)
}

/// An error with all its sources, in one line.
pub fn chain(problem: &dyn std::error::Error) -> String {
    let mut text = problem.to_string();
    let mut source = problem.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Text from a peer, fit for a log line: bounded, on one line, without control characters.
pub fn clean(text: &str) -> Clean<'_> {
    Clean(text)
}

/// What [`clean`] gives.
#[derive(Debug, Clone, Copy)]
pub struct Clean<'a>(&'a str);

impl fmt::Display for Clean<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.chars();
        for one in rest.by_ref().take(PEER_TEXT_MAX) {
            match one.is_control() {
                true => write!(f, "{}", one.escape_default())?,
                false => fmt::Write::write_char(f, one)?,
            }
        }
        match rest.next() {
            Some(_) => f.write_str("..."),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use kvtier_proto::{BlockKey, KeySecret};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged(level: &str, format: LogFormat, log: impl FnOnce()) -> String {
        let lines = Lines::default();
        let writer = lines.clone();
        let config = LogConfig {
            level: level.to_owned(),
            format,
        };
        let subscriber = subscriber(&config, move || writer.clone(), false).unwrap();
        tracing::dispatcher::with_default(&subscriber, log);
        let bytes = lines.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    // Goal: neither a key nor a secret can be read from a log, however it is passed.
    #[test]
    fn logs_show_eight_digits_of_a_key_and_nothing_of_a_secret() {
        for format in [LogFormat::Text, LogFormat::Json] {
            let text = logged("trace", format, || {
                let key = BlockKey([0xab; 32]);
                let secret = KeySecret::new([0xcd; 32]);
                tracing::info!(?key, shown = %key, ?secret, list = ?[key], "block {key}");
            });
            assert!(text.contains("abababab"), "{text}");
            assert!(!text.contains("ababababa"), "{text}");
            for secret in ["cdcd", "CDCD", "205, 205", "171, 171"] {
                assert!(!text.contains(secret), "{secret} in {text}");
            }
        }
    }

    #[test]
    fn json_lines_are_objects_with_fields_at_the_top() {
        let text = logged("info", LogFormat::Json, || {
            tracing::info!(segment = 7, "sealed");
            tracing::debug!("not shown");
        });
        let lines: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 1, "{text}");
        assert_eq!(lines[0]["message"], "sealed");
        assert_eq!(lines[0]["segment"], 7);
        assert_eq!(lines[0]["level"], "INFO");
    }

    #[test]
    fn text_of_a_peer_stays_on_its_line_and_within_bounds() {
        let hostile = "vllm\n2026 ERROR forged\x1b[31m";
        let text = logged("info", LogFormat::Text, || {
            tracing::info!(client = %clean(hostile), "opened");
        });
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(!text.contains('\x1b'), "{text}");
        assert_eq!(clean("vllm 1.0").to_string(), "vllm 1.0");
        assert_eq!(clean(&"x".repeat(300)).to_string().len(), 259);
    }
}
