//! What can go wrong with a call, split by what the caller can do about it.
//!
//! Upstairs:   every public function returns [`Error`].
//! Downstairs: tonic statuses, mapped here and nowhere else.
//!
//! A miss is not an error; it is a value of the call that found it.
//!
//! Invariants kept here
//!   E1  An error never says "nothing happened" about a call that may have reached the daemon
//!       and changes something.

use std::sync::Arc;
use std::time::Duration;

use kvtier_proto::LayoutFingerprint;
use tonic::{Code, Status};

/// Whether a call that failed had an effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Happened {
    /// Nothing changed: the call was refused, never sent, or changes nothing.
    No,
    /// The daemon may or may not have done it. Ask again (lookup) before relying on either.
    Unknown,
}

/// Why a call did not work. [`Error::happened`] says whether it may have had an effect.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nothing happened. The daemon cannot be reached.
    #[error("no kvtierd answers at {endpoint}; is the daemon running?")]
    Connect {
        /// Socket path or address.
        endpoint: String,
        /// What the connection attempt said.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },

    /// Nothing happened. The daemon is away or stops; go on without it and ask again later.
    #[error("kvtierd is not available: {message}")]
    Unavailable {
        /// What is known.
        message: String,
        /// Earlier calls will fail at once. Zero when only the daemon knows.
        retry_after: Duration,
    },

    /// Nothing happened. An argument is out of range; the message names it and what is accepted.
    #[error("{message}")]
    Invalid {
        /// Field, value and accepted range.
        message: String,
    },

    /// Nothing happened, and the same call will be refused again: not permitted, or another
    /// protocol version.
    #[error("refused: {message}")]
    Refused {
        /// The daemon's sentence.
        message: String,
    },

    /// Nothing happened. A bound is reached; retry when something has been given back.
    #[error("busy: {message}")]
    Busy {
        /// Which bound.
        message: String,
    },

    /// Nothing happened. This daemon does not do that.
    #[error("not implemented: {message}")]
    Unimplemented {
        /// The daemon's sentence.
        message: String,
    },

    /// No answer in time.
    #[error("{call} did not answer within {after:?}")]
    Timeout {
        /// Name of the call.
        call: &'static str,
        /// The limit that passed.
        after: Duration,
        /// Whether it may have had an effect.
        happened: Happened,
    },

    /// The session died during the call, and with it its leases and slots. The next call opens
    /// it again.
    #[error("{call}: the session is lost: {reason}")]
    SessionLost {
        /// Name of the call.
        call: &'static str,
        /// What ended the session.
        reason: String,
        /// Whether the call may have had an effect.
        happened: Happened,
    },

    /// The daemon had taken leases back before they were released: what was read from their
    /// blocks must be discarded. Restore again.
    #[error("{lost} of {of} leases were lost before they were released; restore again")]
    LeaseLost {
        /// Leases that the daemon no longer held.
        lost: usize,
        /// Leases that were to be released.
        of: usize,
    },

    /// Nothing happened. Daemon and client disagree about what the descriptor means, so no block
    /// of one could be trusted by the other. Install matching versions.
    #[error(
        "layout fingerprint {} of this client is {} for the daemon; install matching versions",
        ours.short(), theirs
    )]
    LayoutMismatch {
        /// Computed here.
        ours: LayoutFingerprint,
        /// First digits of what the daemon computed.
        theirs: String,
    },

    /// Nothing happened. After a reconnect the daemon put this peer into another namespace, so
    /// keys derived before name nothing there. Open a new session.
    #[error("namespace changed from {before:?} to {now:?} while the session was away")]
    NamespaceChanged {
        /// Name when the session was opened.
        before: String,
        /// Name now.
        now: String,
    },

    /// Shared memory could not be set up. Nothing happened to any block.
    #[error("cannot map the {region} region: {problem}")]
    Region {
        /// "arena" or "staging".
        region: &'static str,
        /// What is wrong with it.
        problem: String,
        /// The system's error, when there is one.
        #[source]
        source: Option<Arc<std::io::Error>>,
    },

    /// The daemon's answer breaks the protocol and was not used. A defect of the daemon, or not
    /// a kvtierd at all.
    #[error("{call}: unusable answer: {problem}")]
    BadReply {
        /// Name of the call.
        call: &'static str,
        /// What is wrong with it.
        problem: String,
        /// Whether the call may have had an effect.
        happened: Happened,
    },

    /// The daemon failed inside, or refused the rest of a call of which it had done a part.
    #[error("{call}: the daemon failed ({code}): {message}")]
    Daemon {
        /// Name of the call.
        call: &'static str,
        /// gRPC code.
        code: Code,
        /// The daemon's sentence.
        message: String,
        /// Whether the call may have had an effect.
        happened: Happened,
    },
}

impl Error {
    /// Whether the failed call may have had an effect.
    pub fn happened(&self) -> Happened {
        match self {
            Self::Timeout { happened, .. }
            | Self::SessionLost { happened, .. }
            | Self::BadReply { happened, .. }
            | Self::Daemon { happened, .. } => *happened,
            _ => Happened::No,
        }
    }

    /// True when the same call may work later without a change to it.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect { .. }
            | Self::Unavailable { .. }
            | Self::Busy { .. }
            | Self::Timeout { .. }
            | Self::SessionLost { .. }
            | Self::LeaseLost { .. } => true,
            Self::Daemon { code, .. } => {
                matches!(
                    code,
                    Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded
                )
            }
            _ => false,
        }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid {
            message: message.into(),
        }
    }

    pub(crate) fn region(region: &'static str, problem: impl Into<String>) -> Self {
        Self::Region {
            region,
            problem: problem.into(),
            source: None,
        }
    }

    pub(crate) fn region_io(
        region: &'static str,
        doing: &'static str,
        source: std::io::Error,
    ) -> Self {
        Self::Region {
            region,
            problem: format!("{doing}: {source}"),
            source: Some(Arc::new(source)),
        }
    }
}

/// One call: its name in error texts, and whether it can change anything at the daemon.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pub(crate) name: &'static str,
    effect: Effect,
}

/// What a call can change at the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    /// Nothing.
    Nothing,
    /// Something, unless it is refused: the daemon looks at all of it first.
    Whole,
    /// Something, and it may be refused in the middle.
    Part,
}

impl Call {
    pub(crate) const fn reads(name: &'static str) -> Self {
        let effect = Effect::Nothing;
        Self { name, effect }
    }

    pub(crate) const fn changes(name: &'static str) -> Self {
        let effect = Effect::Whole;
        Self { name, effect }
    }

    /// A call that may be refused after a part of it was done.
    pub(crate) const fn changes_by_parts(name: &'static str) -> Self {
        let effect = Effect::Part;
        Self { name, effect }
    }

    /// What is known about a call whose answer did not come (E1).
    pub(crate) fn unanswered(self) -> Happened {
        match self.effect {
            Effect::Nothing => Happened::No,
            Effect::Whole | Effect::Part => Happened::Unknown,
        }
    }

    pub(crate) fn lost(self, reason: impl Into<String>) -> Error {
        Error::SessionLost {
            call: self.name,
            reason: reason.into(),
            happened: self.unanswered(),
        }
    }

    pub(crate) fn bad_reply(self, problem: impl Into<String>) -> Error {
        Error::BadReply {
            call: self.name,
            problem: problem.into(),
            happened: self.unanswered(),
        }
    }

    pub(crate) fn timeout(self, after: Duration) -> Error {
        Error::Timeout {
            call: self.name,
            after,
            happened: self.unanswered(),
        }
    }

    /// The one mapping from statuses to errors.
    pub(crate) fn failed(self, status: &Status) -> Error {
        let message = status.message().to_owned();
        if is_transport(status) {
            return self.lost(transport_text(status));
        }
        match status.code() {
            // A refusal, but perhaps not of all of it.
            code @ (Code::InvalidArgument
            | Code::PermissionDenied
            | Code::FailedPrecondition
            | Code::ResourceExhausted
            | Code::Unavailable)
                if self.effect == Effect::Part =>
            {
                Error::Daemon {
                    call: self.name,
                    code,
                    message,
                    happened: Happened::Unknown,
                }
            }
            Code::InvalidArgument => Error::Invalid { message },
            Code::PermissionDenied | Code::FailedPrecondition | Code::AlreadyExists => {
                Error::Refused { message }
            }
            Code::ResourceExhausted => Error::Busy { message },
            Code::Unimplemented => Error::Unimplemented { message },
            Code::Unavailable => Error::Unavailable {
                message,
                retry_after: Duration::ZERO,
            },
            // Every call names its session, and blocks that are not there are values: what these
            // two codes miss is the session itself.
            Code::Unauthenticated | Code::NotFound | Code::Aborted => self.lost(message),
            Code::OutOfRange => self.bad_reply(message),
            code => Error::Daemon {
                call: self.name,
                code,
                message,
                happened: self.unanswered(),
            },
        }
    }
}

/// True for statuses made on this side because the connection broke.
fn is_transport(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<tonic::transport::Error>() || error.is::<std::io::Error>() {
            return true;
        }
        cause = error.source();
    }
    // hyper's own errors carry no public type through tonic; these are its texts.
    let ours = matches!(
        status.code(),
        Code::Unknown | Code::Cancelled | Code::Internal
    );
    let text = status.message();
    ours && [
        "h2 protocol error",
        "transport error",
        "connection",
        "operation was canceled",
    ]
    .iter()
    .any(|part| text.contains(part))
}

fn transport_text(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        text = error.to_string();
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
