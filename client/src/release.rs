//! Giving back what a session holds: leases and staging slots, in the background.
//!
//! Upstairs:   dropping a leased block, a slot or an unread restore event puts its name here.
//! Downstairs: one task a session sends `Release` with all that has gathered.
//!
//! Also here: the life of a session, since everything that is given back asks whether there is
//! still anyone to give it to.
//!
//! Invariants kept here
//!   R1  Every lease and slot the daemon granted is committed or released exactly once, or dies
//!       with its session.
//!   R2  Dropping never blocks, fails or needs a runtime.
//!
//! Not here on purpose
//!   No bound on the queue of its own: it holds at most what the daemon granted, and the daemon
//!   bounds leases and staging memory of a session.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use kvtier_proto::limits::KEYS_PER_CALL_MAX;
use kvtier_proto::v1;
use tokio::sync::{Notify, watch};

use crate::error::{Call, Error};
use crate::rpc::Rpc;
use crate::session::SessionState;

/// Whether a session lives. Once lost it never lives again; a new link has a new life.
pub(crate) struct Life {
    lost: AtomicBool,
    state: watch::Sender<SessionState>,
}

impl Life {
    pub(crate) fn new() -> Arc<Self> {
        let (state, _) = watch::channel(SessionState::Open);
        let lost = AtomicBool::new(false);
        Arc::new(Self { lost, state })
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    pub(crate) fn state(&self) -> SessionState {
        self.state.borrow().clone()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<SessionState> {
        self.state.subscribe()
    }

    pub(crate) fn drain(&self, reason: String) {
        self.state.send_if_modified(|state| {
            let open = matches!(state, SessionState::Open);
            if open {
                *state = SessionState::Draining { reason };
            }
            open
        });
    }

    /// The first reason stays.
    pub(crate) fn lose(&self, reason: &str) {
        if !self.lost.swap(true, Ordering::AcqRel) {
            tracing::debug!(reason, "kvtier session lost");
            let reason = reason.to_owned();
            self.state.send_replace(SessionState::Lost { reason });
        }
    }

    /// Waits until the session is lost and returns why. Cancel safe.
    pub(crate) async fn lost(&self) -> String {
        let mut states = self.state.subscribe();
        let lost = states.wait_for(|state| matches!(state, SessionState::Lost { .. }));
        match lost.await.as_deref() {
            Ok(SessionState::Lost { reason }) => reason.clone(),
            _ => "the session is closed".to_owned(),
        }
    }
}

/// Something that the daemon granted and gets back.
enum Name {
    Lease(u64),
    Slot(v1::Slot),
}

#[derive(Default)]
struct Waiting {
    /// In the order they were put in: what waits for a number of them waits for those before it.
    names: VecDeque<Name>,
    /// Names put in so far.
    queued: u64,
}

/// What one session will give back.
pub(crate) struct Releases {
    life: Arc<Life>,
    waiting: Mutex<Waiting>,
    some: Notify,
    answered: watch::Sender<u64>,
}

impl Releases {
    pub(crate) fn new(life: Arc<Life>) -> Arc<Self> {
        let (answered, _) = watch::channel(0);
        Arc::new(Self {
            life,
            waiting: Mutex::default(),
            some: Notify::new(),
            answered,
        })
    }

    pub(crate) fn guard(self: &Arc<Self>, lease: u64) -> LeaseGuard {
        // A block in a slot of the engine's own has no lease: 0.
        let releases = (lease != 0).then(|| Arc::clone(self));
        LeaseGuard { releases, lease }
    }

    pub(crate) fn put_slot(&self, slot: v1::Slot) {
        self.put(Name::Slot(slot));
    }

    fn put_lease(&self, lease: u64) {
        self.put(Name::Lease(lease));
    }

    fn put(&self, name: Name) {
        if self.life.is_lost() {
            return;
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.names.push_back(name);
        waiting.queued += 1;
        drop(waiting);
        self.some.notify_one();
    }

    /// Up to one call's worth of names.
    fn take(&self, session: &Bytes) -> Option<v1::ReleaseRequest> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let count = waiting.names.len().min(KEYS_PER_CALL_MAX);
        let (mut leases, mut slots) = (Vec::new(), Vec::new());
        for name in waiting.names.drain(..count) {
            match name {
                Name::Lease(lease) => leases.push(lease),
                Name::Slot(slot) => slots.push(slot),
            }
        }
        let session = session.clone();
        let some = !(leases.is_empty() && slots.is_empty());
        some.then_some(v1::ReleaseRequest {
            session,
            leases,
            slots,
        })
    }

    /// Waits until everything put in before has been answered. Cancel safe.
    pub(crate) async fn flushed(&self, call: Call, limit: Duration) -> Result<(), Error> {
        let goal = {
            let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.queued
        };
        let mut answered = self.answered.subscribe();
        tokio::select! {
            done = answered.wait_for(|done| *done >= goal) => {
                done.map(|_| ()).map_err(|_| call.lost("the session is closed"))
            }
            reason = self.life.lost() => Err(call.lost(reason)),
            () = tokio::time::sleep(limit) => Err(call.timeout(limit)),
        }
    }

    /// Sends what gathers until the session is lost. While one call is under way the next batch
    /// gathers, so a burst of drops costs few calls.
    pub(crate) async fn run(self: Arc<Self>, rpc: Rpc, session: Bytes, limit: Duration) {
        let call = Call::changes("Release");
        while !self.life.is_lost() {
            let Some(request) = self.take(&session) else {
                tokio::select! {
                    () = self.some.notified() => continue,
                    _ = self.life.lost() => break,
                }
            };
            let names = request.leases.len() + request.slots.len();
            let mut client = rpc.clone();
            let reply = tokio::time::timeout(limit, client.release(request)).await;
            match reply.map(|reply| reply.map_err(|status| call.failed(&status))) {
                Ok(Ok(_)) => {}
                Ok(Err(Error::SessionLost { reason, .. })) => self.life.lose(&reason),
                // A daemon that cannot take leases back would run out of memory for us: leave
                // it and start afresh (R1).
                Ok(Err(error)) => self.life.lose(&format!("Release: {error}")),
                Err(_) => self.life.lose("Release did not answer in time"),
            }
            self.answered
                .send_modify(|answered| *answered += names as u64);
        }
    }
}

/// Holds one lease; gives it back when dropped.
pub(crate) struct LeaseGuard {
    releases: Option<Arc<Releases>>,
    lease: u64,
}

impl LeaseGuard {
    pub(crate) fn is_lost(&self) -> bool {
        let releases = self.releases.as_ref();
        releases.is_none_or(|releases| releases.life.is_lost())
    }

    /// Takes the lease out, for a caller that releases it itself.
    pub(crate) fn take(mut self) -> u64 {
        self.releases = None;
        self.lease
    }
}

impl Drop for LeaseGuard {
    fn drop(&mut self) {
        if let Some(releases) = self.releases.take() {
            releases.put_lease(self.lease);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: whoever waits for what was put in before is not answered for what came later.
    // Method: more than one call's worth, and later names between the calls.
    #[test]
    fn take_gives_names_back_in_the_order_they_were_put_in() {
        let releases = Releases::new(Life::new());
        let slot = |number: u64| v1::Slot {
            generation: number,
            ..v1::Slot::default()
        };
        let many = KEYS_PER_CALL_MAX as u64;
        (0..many).for_each(|number| releases.put_lease(number));
        releases.put_slot(slot(7));
        let take = || releases.take(&Bytes::new()).unwrap();
        assert_eq!(take().leases, (0..many).collect::<Vec<_>>());
        (0..many).for_each(|number| releases.put_lease(number));
        let second = take();
        assert_eq!(second.slots, [slot(7)]);
        assert_eq!(second.leases.len() + 1, KEYS_PER_CALL_MAX);
        assert_eq!(take().leases, [many - 1]);
        assert!(releases.take(&Bytes::new()).is_none());
    }
}
