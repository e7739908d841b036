//! What can be wrong with a configuration, in the words an operator needs.
//!
//! Upstairs:   `config` collects these; `kvtierd`, `kvtier check-config` print all of them.
//! Downstairs: nothing.
//!
//! Invariants kept here
//!   C1  A problem names where the value came from, the key, the value and what is accepted.
//!
//! Not here on purpose: no secret ever reaches a value, so values are shown whole.

use std::fmt;
use std::path::PathBuf;

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A line of the configuration file.
    File {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
    },
    /// An environment variable.
    Environment(String),
    /// A command line flag.
    Flag(String),
    /// Nobody said anything: the built-in default.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Environment(name) => write!(f, "environment variable {name}"),
            Self::Flag(flag) => write!(f, "flag {flag}"),
            Self::Default => f.write_str("default"),
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigProblem {
    /// A value that is not accepted.
    #[error("{origin}: {key} is {value}; accepted: {accepted}")]
    Value {
        /// Where it was given.
        origin: Origin,
        /// `table.setting`.
        key: String,
        /// The value as written.
        value: String,
        /// What would be accepted.
        accepted: String,
    },
    /// A setting without a default was not given.
    #[error("{key} is not set and has no default; accepted: {accepted}")]
    Missing {
        /// `table.setting`.
        key: String,
        /// What would be accepted.
        accepted: String,
    },
    /// A name that is no setting.
    #[error("{origin}: {name} is not a setting; accepted: {accepted}")]
    Unknown {
        /// Where it was given.
        origin: Origin,
        /// The name as written.
        name: String,
        /// The names that exist there.
        accepted: String,
    },
    /// Settings that do not go together.
    #[error("{key} is {value}; accepted: {accepted}")]
    Together {
        /// The settings.
        key: String,
        /// Their values.
        value: String,
        /// What would be accepted.
        accepted: String,
    },
    /// The file is not TOML.
    #[error("{}:{line}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What the parser says.
        message: String,
    },
    /// The file cannot be read.
    #[error("{}: cannot be read: {message}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        message: String,
    },
}

/// Every problem of a configuration, at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigProblems(pub Vec<ConfigProblem>);

impl fmt::Display for ConfigProblems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [one] => write!(f, "1 problem in the configuration\n  {one}"),
            all => {
                write!(f, "{} problems in the configuration", all.len())?;
                all.iter()
                    .try_for_each(|problem| write!(f, "\n  {problem}"))
            }
        }
    }
}

impl std::error::Error for ConfigProblems {}
