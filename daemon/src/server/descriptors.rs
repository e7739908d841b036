//! The companion socket: a ticket comes in, a descriptor of shared memory goes out.
//!
//! Upstairs:   OpenSession and RegisterRegion hand out tickets; clients show them here.
//! Downstairs: `SCM_RIGHTS`.
//!
//! The whole conversation: the client sends 16 bytes and gets one byte back, 1 with a descriptor
//! beside it, or 0 without. gRPC cannot carry descriptors, so this socket stands beside it.
//!
//! Invariants kept here
//!   S1  A ticket is shown once, by the user it was made for, while the session lives.
//!   S2  A peer that sends nothing or garbage costs one task for a moment, and one user's
//!       tickets never keep another from getting one.

use std::collections::HashMap;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::{UnixListener, UnixStream};

use crate::session::Token;

/// How long a ticket waits to be shown.
const TICKET_LIFE: Duration = Duration::from_secs(10);
/// How long a connected peer may take to show its ticket. Much shorter than clients wait for
/// their turn: it sends 16 bytes at once or it is no client.
const PATIENCE: Duration = Duration::from_secs(1);
/// Most tickets of one user that wait. A session needs one or two at a time.
const TICKETS_MAX: usize = 256;
/// Most connections at a time; one more waits in the kernel's queue.
const CONNECTIONS_MAX: usize = 64;

#[derive(Debug)]
struct Waiting {
    fd: OwnedFd,
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
                fd,
                uid,
                since: Instant::now(),
            },
        );
        Ok(ticket)
    }

    pub(crate) fn redeem(&self, ticket: &[u8], uid: u32) -> Option<OwnedFd> {
        let ticket = Token::from_slice(ticket)?;
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let mine = waiting.get(&ticket)?.uid == uid;
        let found = if mine { waiting.remove(&ticket) } else { None }?;
        (found.since.elapsed() < TICKET_LIFE).then_some(found.fd)
    }
}

/// Serves the companion socket until `stop` resolves.
pub async fn serve(listener: UnixListener, tickets: Arc<Tickets>, stop: impl Future<Output = ()>) {
    let slots = Arc::new(tokio::sync::Semaphore::new(CONNECTIONS_MAX));
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
        let tickets = Arc::clone(&tickets);
        tokio::spawn(async move {
            let answered = tokio::time::timeout(PATIENCE, answer(stream, &tickets)).await;
            if let Ok(Err(problem)) = answered {
                tracing::debug!(%problem, "a descriptor was not fetched");
            }
            drop(slot);
        });
    }
}

async fn answer(mut stream: UnixStream, tickets: &Tickets) -> std::io::Result<()> {
    let uid = stream.peer_cred()?.uid();
    let mut ticket = [0; 16];
    stream.read_exact(&mut ticket).await?;
    let fd = tickets.redeem(&ticket, uid);
    loop {
        stream.writable().await?;
        let sent = stream.try_io(Interest::WRITABLE, || send(&stream, fd.as_ref()));
        match sent {
            Err(problem) if problem.kind() == std::io::ErrorKind::WouldBlock => {}
            other => return other,
        }
    }
}

fn send(stream: &UnixStream, fd: Option<&OwnedFd>) -> std::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd.as_fd()]);
    if let Some(fds) = &fds {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let status = [u8::from(fd.is_some())];
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
