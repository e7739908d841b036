//! What the process is doing and whether it is well: read by /healthz, /readyz and `Stats`.
//!
//! Upstairs:   `process` moves the state on; `http` and the server read it.
//! Downstairs: nothing; atomics, so that any thread may look.
//!
//! ```text
//!   starting --> recovering --> serving --> draining --> stopped
//! ```
//! Stages may be skipped, never gone back to.
//!
//! Invariants kept here
//!   E1  The state only moves forward.
//!   E2  A failure that was reported stays: the process is not well until it is restarted.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use strum::{EnumIter, FromRepr, IntoStaticStr};

/// Stage of the process's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, EnumIter, FromRepr, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
#[repr(u8)]
pub enum State {
    /// Memory is taken, sockets are bound.
    Starting,
    /// The disk tier finds out what it holds.
    Recovering,
    /// Sessions are served.
    Serving,
    /// No new sessions and saves; what runs is finished.
    Draining,
    /// Nothing is served any more.
    Stopped,
}

impl State {
    /// Name as `Stats` and tables show it.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// How far recovery is. Unit: whatever the store counts (segments); `total` 0 is not known yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Finished.
    pub done: u64,
    /// To be done in all.
    pub total: u64,
}

/// State of the process. Share it behind an `Arc`.
#[derive(Debug)]
pub struct Health {
    state: AtomicU8,
    done: AtomicU64,
    total: AtomicU64,
    failure: OnceLock<String>,
    troubles: Mutex<BTreeMap<String, String>>,
    since: Instant,
}

impl Default for Health {
    fn default() -> Self {
        Self::new()
    }
}

impl Health {
    /// A process that has just begun.
    pub fn new() -> Self {
        Self {
            state: AtomicU8::new(State::Starting as u8),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            failure: OnceLock::new(),
            troubles: Mutex::default(),
            since: Instant::now(),
        }
    }

    /// Moves on to `state`; a state that was passed already changes nothing (E1).
    pub fn enter(&self, state: State) {
        self.state.fetch_max(state as u8, Ordering::AcqRel);
    }

    /// The current state.
    pub fn state(&self) -> State {
        let number = self.state.load(Ordering::Acquire);
        State::from_repr(number).unwrap_or(State::Stopped)
    }

    /// Says how far recovery is.
    pub fn recovered(&self, progress: Progress) {
        self.total.store(progress.total, Ordering::Relaxed);
        self.done.store(progress.done, Ordering::Relaxed);
    }

    /// How far recovery is.
    pub fn progress(&self) -> Progress {
        Progress {
            done: self.done.load(Ordering::Relaxed),
            total: self.total.load(Ordering::Relaxed),
        }
    }

    /// Reports what only a restart can mend; the first report is kept (E2).
    pub fn fail(&self, reason: impl Into<String>) {
        let _ = self.failure.set(reason.into());
    }

    /// Reports what is wrong with a part that the process goes on without, or that nothing is any
    /// more. It is shown; nothing is to be restarted for it.
    pub fn trouble(&self, part: impl ToString, what: Option<String>) {
        let mut troubles = self.troubles();
        match what {
            Some(what) => troubles.insert(part.to_string(), what),
            None => troubles.remove(&part.to_string()),
        };
    }

    fn troubles(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was reported to [`Health::fail`].
    pub fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// Time since the process began.
    pub fn uptime(&self) -> Duration {
        self.since.elapsed()
    }

    /// Is the process well? `Err` says why a restart is due.
    pub fn live(&self) -> Result<(), String> {
        self.failure()
            .map_or(Ok(()), |reason| Err(reason.to_owned()))
    }

    /// Are sessions served now? `Err` says why not.
    pub fn ready(&self) -> Result<(), String> {
        self.live()?;
        match self.state() {
            State::Serving => Ok(()),
            _ => Err(self.to_string()),
        }
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.write_str(state.as_str())?;
        let Progress { done, total } = self.progress();
        if state == State::Recovering && total > 0 {
            write!(f, ": {done} of {total} segments")?;
        }
        for (part, what) in self.troubles().iter() {
            write!(f, "; {part} {what}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use strum::IntoEnumIterator;

    use super::*;

    #[test]
    fn state_never_goes_back() {
        let health = Health::new();
        for state in State::iter() {
            health.enter(state);
            State::iter()
                .filter(|other| *other < state)
                .for_each(|other| health.enter(other));
            assert_eq!(health.state(), state);
        }
    }

    #[test]
    fn process_is_ready_only_while_serving() {
        let health = Health::new();
        for state in State::iter() {
            health.enter(state);
            let why = health.ready();
            assert_eq!(why.is_ok(), state == State::Serving);
            assert!(why.is_ok() || why.is_err_and(|why| why.contains(state.as_str())));
            assert_eq!(health.live(), Ok(()));
        }
    }

    #[test]
    fn recovery_says_how_far_it_is() {
        let health = Health::new();
        health.enter(State::Recovering);
        assert_eq!(health.ready(), Err(String::from("recovering")));
        health.recovered(Progress { done: 3, total: 9 });
        assert_eq!(
            health.ready(),
            Err(String::from("recovering: 3 of 9 segments"))
        );
    }

    // Goal: what is wrong with one device of several is seen, and restarts nothing.
    #[test]
    fn troubles_are_shown_while_they_last_and_make_nobody_unwell() {
        let health = Health::new();
        health.enter(State::Serving);
        health.trouble("disk 1", Some("is slow".into()));
        health.trouble("disk 0", Some("takes no writes".into()));
        assert_eq!(
            health.to_string(),
            "serving; disk 0 takes no writes; disk 1 is slow"
        );
        assert_eq!((health.live(), health.ready()), (Ok(()), Ok(())));
        health.trouble("disk 1", None);
        health.trouble("disk 7", None);
        assert_eq!(health.to_string(), "serving; disk 0 takes no writes");
    }

    #[test]
    fn first_failure_stays_whatever_follows() {
        let health = Health::new();
        health.enter(State::Serving);
        health.fail("disk lane stopped");
        health.fail("something else");
        health.enter(State::Draining);
        assert_eq!(health.live(), Err(String::from("disk lane stopped")));
        assert_eq!(health.ready(), Err(String::from("disk lane stopped")));
    }
}
