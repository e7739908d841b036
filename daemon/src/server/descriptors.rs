//! The companion socket: a ticket comes in, a descriptor of shared memory goes out, or comes in
//! beside it.
//!
//! Upstairs:   OpenSession and RegisterRegion hand out tickets; clients show them here.
//! Downstairs: `SCM_RIGHTS`; `region::engine` judges what comes in.
//!
//! The whole conversation: the client sends 16 bytes, all at once, and gets one byte back, 1 with a
//! descriptor beside it, or 0 without. With the ticket of an engine's region it sends the
//! descriptor beside the 16 bytes, and the byte says what became of it (`Handover`). gRPC cannot
//! carry descriptors, so this socket stands beside it.
//!
//! Invariants kept here
//!   S1  A ticket is shown once, by the user it was made for, while the session lives.
//!   S2  A peer that sends nothing or garbage costs one task for a moment, and one user's
//!       tickets never keep another from getting one.
//!   S3  A descriptor is taken only from a user who may register memory, and nobody waits for what
//!       its file says or does.

use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvtier_proto::region::Handover;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use crate::region::engine::{EngineRegion, TICKET_LIFE};
use crate::session::Token;

/// How long a connected peer may take to show its ticket. Much shorter than clients wait for
/// their turn: it sends 16 bytes at once or it is no client.
const PATIENCE: Duration = Duration::from_secs(1);
/// Bytes of a ticket.
const TICKET_LEN: usize = 16;
/// Most tickets of one user that wait. A session needs one or two at a time.
const TICKETS_MAX: usize = 256;
/// Most connections at a time; one more waits in the kernel's queue.
const CONNECTIONS_MAX: usize = 64;
/// Most descriptors that are looked at at a time.
const JUDGES_MAX: usize = 4;

/// What a ticket is good for.
#[derive(Debug)]
pub(crate) enum Promise {
    /// A descriptor to fetch.
    Give(OwnedFd),
    /// The region whose descriptor is to be handed over.
    Take(Arc<EngineRegion>),
}

#[derive(Debug)]
struct Waiting {
    promise: Promise,
    uid: u32,
    since: Instant,
}

/// Why there is no ticket.
#[derive(Debug, thiserror::Error)]
pub enum TicketError {
    /// The user has not fetched those it was given.
    #[error("{waiting} descriptors of this user wait to be fetched; fetch them or wait")]
    TooMany {
        /// How many.
        waiting: usize,
    },
    /// No descriptor or no randomness.
    #[error("no ticket for a descriptor")]
    System(#[from] std::io::Error),
}

/// Descriptors that wait for their clients.
#[derive(Debug, Default)]
pub struct Tickets {
    waiting: Mutex<HashMap<Token, Waiting>>,
}

impl Tickets {
    /// Keeps a duplicate of `fd` for the user `uid` and returns the ticket for it.
    pub fn issue(&self, fd: impl AsFd, uid: u32) -> Result<Token, TicketError> {
        let fd = fd.as_fd().try_clone_to_owned()?;
        self.keep(Promise::Give(fd), uid)
    }

    /// Returns the ticket with which the user `uid` hands over the memory of a region.
    pub fn promise(&self, region: Arc<EngineRegion>, uid: u32) -> Result<Token, TicketError> {
        self.keep(Promise::Take(region), uid)
    }

    fn keep(&self, promise: Promise, uid: u32) -> Result<Token, TicketError> {
        let ticket = Token::random()?;
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|_, ticket| ticket.since.elapsed() < TICKET_LIFE);
        let own = waiting.values().filter(|ticket| ticket.uid == uid).count();
        if own >= TICKETS_MAX {
            return Err(TicketError::TooMany { waiting: own });
        }
        waiting.insert(
            ticket,
            Waiting {
                promise,
                uid,
                since: Instant::now(),
            },
        );
        Ok(ticket)
    }

    pub(crate) fn redeem(&self, ticket: &[u8], uid: u32) -> Option<Promise> {
        let ticket = Token::from_slice(ticket)?;
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let mine = waiting.get(&ticket)?.uid == uid;
        let found = if mine { waiting.remove(&ticket) } else { None }?;
        (found.since.elapsed() < TICKET_LIFE).then_some(found.promise)
    }
}

/// Serves the companion socket until `stop` resolves.
pub async fn serve(listener: UnixListener, tickets: Arc<Tickets>, stop: impl Future<Output = ()>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let judges = Arc::new(Semaphore::new(JUDGES_MAX));
    tokio::pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(problem) => {
                tracing::warn!(%problem, "descriptor socket could not accept");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        let (tickets, judges) = (Arc::clone(&tickets), Arc::clone(&judges));
        tokio::spawn(async move {
            let answered = answer(stream, &tickets, &judges);
            let answered = tokio::time::timeout(PATIENCE, answered).await;
            if let Ok(Err(problem)) = answered {
                tracing::debug!(%problem, "a descriptor was not fetched");
            }
            drop(slot);
        });
    }
}

async fn answer(
    stream: UnixStream,
    tickets: &Tickets,
    judges: &Arc<Semaphore>,
) -> std::io::Result<()> {
    let uid = stream.peer_cred()?.uid();
    let mut ticket = [0; TICKET_LEN];
    // Looked at first: nobody's descriptors are taken who has no region to hand over (S3).
    let look = || Ok(rustix::net::recv(&stream, &mut ticket, RecvFlags::PEEK)?.0);
    if stream.async_io(Interest::READABLE, look).await? != TICKET_LEN {
        return Err(std::io::ErrorKind::InvalidData.into());
    }
    let promise = tickets.redeem(&ticket, uid);
    let takes = matches!(promise, Some(Promise::Take(_)));
    let read = || receive(&stream, &mut ticket, takes);
    let given = stream.async_io(Interest::READABLE, read).await?;
    let (answer, fd) = match promise {
        None => (Handover::Refused, None),
        Some(Promise::Give(fd)) => (Handover::Taken, Some(fd)),
        Some(Promise::Take(region)) => (judge(region, given, judges).await, None),
    };
    let send = || send(&stream, answer, fd.as_ref());
    stream.async_io(Interest::WRITABLE, send).await
}

/// Looks at what an engine hands over, where it may take as long as it likes: to ask a file about
/// itself, or to close it, can hang, if it is one of a file system that does.
async fn judge(
    region: Arc<EngineRegion>,
    given: Option<OwnedFd>,
    judges: &Arc<Semaphore>,
) -> Handover {
    let Some(given) = given else {
        region.refuse(Handover::Missing);
        return Handover::Missing;
    };
    let Ok(judge) = Arc::clone(judges).acquire_owned().await else {
        return Handover::Refused;
    };
    let judged = tokio::task::spawn_blocking(move || {
        let answer = region.adopt(given);
        drop(judge);
        answer
    });
    judged.await.unwrap_or(Handover::Refused)
}

/// Reads the ticket, and takes the descriptor beside it, if any, where it is awaited. Otherwise the
/// kernel lets go of it.
fn receive(
    stream: &UnixStream,
    ticket: &mut [u8],
    takes: bool,
) -> std::io::Result<Option<OwnedFd>> {
    if !takes {
        rustix::net::recv(stream, ticket, RecvFlags::empty())?;
        return Ok(None);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(ticket)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    rustix::net::recvmsg(stream, &mut into, &mut control, flags)?;
    let rights = control.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    Ok(rights)
}

fn send(stream: &UnixStream, answer: Handover, fd: Option<&OwnedFd>) -> std::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd.as_fd()]);
    if let Some(fds) = &fds {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let status = [answer as u8];
    rustix::net::sendmsg(
        stream,
        &[IoSlice::new(&status)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> OwnedFd {
        rustix::fs::memfd_create("ticket", rustix::fs::MemfdFlags::CLOEXEC).unwrap()
    }

    #[test]
    fn redeem_gives_a_descriptor_once_and_to_its_user_only() {
        let tickets = Tickets::default();
        let ticket = tickets.issue(memory(), 7).unwrap();
        assert!(tickets.redeem(ticket.expose(), 8).is_none(), "another user");
        assert!(tickets.redeem(&[0; 16], 7).is_none(), "no ticket");
        assert!(tickets.redeem(&[], 7).is_none(), "no ticket at all");
        assert!(tickets.redeem(ticket.expose(), 7).is_some());
        assert!(
            tickets.redeem(ticket.expose(), 7).is_none(),
            "a second time"
        );
    }

    // Goal: one user who opens sessions and fetches nothing keeps nobody else out.
    #[test]
    fn issue_refuses_a_user_with_many_tickets_and_no_other() {
        let tickets = Tickets::default();
        for _ in 0..TICKETS_MAX {
            tickets.issue(memory(), 7).unwrap();
        }
        let refused = tickets.issue(memory(), 7);
        assert!(
            matches!(refused, Err(TicketError::TooMany { .. })),
            "{refused:?}"
        );
        assert!(tickets.issue(memory(), 8).is_ok());
    }
}
