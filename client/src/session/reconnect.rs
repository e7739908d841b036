//! Another incarnation of a session when its link is lost.
//!
//! Upstairs:   every call of [`Session`] asks for the link to use.
//! Downstairs: `link` opens one.
//!
//! Invariants kept here
//!   S2  At most one attempt to reconnect runs at a time, with growing pauses between failures.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use rand::Rng as _;
use tokio::time::Instant;

use super::Session;
use crate::error::Error;
use crate::link::Link;

/// When the next attempt to reconnect may start.
pub(super) struct Pause {
    failures: u32,
    next: Instant,
    why: String,
}

impl Pause {
    /// The first attempt starts at once.
    pub(super) fn new() -> Self {
        Self {
            failures: 0,
            next: Instant::now(),
            why: String::new(),
        }
    }
}

enum Attempt {
    /// Trying again is of no use.
    Final(Error),
    /// The daemon is away; an attempt may start then.
    Later(Instant, Error),
}

impl Session {
    pub(super) fn current(&self) -> Arc<Link> {
        Arc::clone(
            &self
                .inner
                .link
                .read()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }

    /// The link to use: the current one, or a new one when that is lost.
    pub(crate) async fn link(&self) -> Result<Arc<Link>, Error> {
        let link = self.current();
        if !link.life.is_lost() {
            return Ok(link);
        }
        self.reconnect(self.inner.recipe.connect.reconnect.wait)
            .await
    }

    pub(super) async fn reconnect(&self, wait: Duration) -> Result<Arc<Link>, Error> {
        let started = Instant::now();
        loop {
            let (next, error) = match self.attempt().await {
                Ok(link) => return Ok(link),
                Err(Attempt::Final(error)) => return Err(error),
                Err(Attempt::Later(next, error)) => (next, error),
            };
            if next.saturating_duration_since(started) > wait {
                return Err(error);
            }
            tokio::time::sleep_until(next).await;
        }
    }

    /// One attempt, unless the pause after the last failure still lasts.
    async fn attempt(&self) -> Result<Arc<Link>, Attempt> {
        let mut pause = self.inner.pause.lock().await;
        let link = self.current();
        if !link.life.is_lost() {
            return Ok(link);
        }
        let now = Instant::now();
        if pause.next > now {
            let error = Error::Unavailable {
                message: pause.why.clone(),
                retry_after: pause.next - now,
            };
            return Err(Attempt::Later(pause.next, error));
        }
        let opened = Link::open(&self.inner.recipe, None).await;
        match opened.and_then(|link| self.same_identity(link)) {
            Ok(link) => {
                pause.failures = 0;
                let mut current = self
                    .inner
                    .link
                    .write()
                    .unwrap_or_else(PoisonError::into_inner);
                *current = Arc::clone(&link);
                Ok(link)
            }
            Err(error) => {
                pause.next = Instant::now() + self.next_pause(pause.failures);
                pause.failures = pause.failures.saturating_add(1);
                pause.why = error.to_string();
                if error.is_transient() {
                    Err(Attempt::Later(pause.next, error))
                } else {
                    Err(Attempt::Final(error))
                }
            }
        }
    }

    /// Doubles from the shortest to the longest pause, each shortened or lengthened by up to
    /// half, so that the clients of one daemon do not come back in step.
    fn next_pause(&self, failures: u32) -> Duration {
        let options = &self.inner.recipe.connect.reconnect;
        let doubled = options.pause_min.saturating_mul(1 << failures.min(16));
        let pause = doubled.min(options.pause_max);
        pause.mul_f64(rand::rng().random_range(0.5..1.5))
    }

    /// A daemon that puts this peer elsewhere would never hit on the keys derived so far (S1).
    fn same_identity(&self, link: Arc<Link>) -> Result<Arc<Link>, Error> {
        let (before, now) = (&self.inner.identity, &link.identity);
        if before.secret == now.secret && before.namespace == now.namespace {
            return Ok(link);
        }
        Err(Error::NamespaceChanged {
            before: before.name.clone(),
            now: now.name.clone(),
        })
    }
}
