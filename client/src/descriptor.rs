//! Fetching the descriptor of a region from the daemon's companion socket, and handing one over.
//!
//! Upstairs:   `link` maps the arena and the staging region with what comes back, and hands over
//!             the memory of its engine.
//! Downstairs: a Unix stream socket, `recvmsg` and `sendmsg` with SCM_RIGHTS through rustix.
//!
//! Exchange: 16 bytes of ticket go out; one status byte (1 granted, 0 refused) comes back, with
//! exactly one descriptor when granted. A descriptor of the engine's goes out beside the ticket,
//! and the byte says what became of it.
//!
//! Invariants kept here
//!   D1  A descriptor that comes out of here is a memfd of exactly the granted size that nobody
//!       can shrink or grow, so no access to its mapping can fault.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use kvtier_proto::region::Handover;
use kvtier_proto::v1;
use rustix::fs::SealFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;

use crate::error::{Call, Error};

/// Bytes of a ticket.
const TICKET_LEN: usize = 16;
/// Status of a granted ticket.
const GRANTED: u8 = 1;

const FETCH: Call = Call::reads("descriptor socket");

/// Fetches and checks the descriptor of `grant`. `name` is "arena" or "staging".
pub(crate) async fn fetch(
    socket: &Path,
    grant: &v1::RegionGrant,
    name: &'static str,
    limit: Duration,
) -> Result<OwnedFd, Error> {
    if grant.ticket.len() != TICKET_LEN {
        let len = grant.ticket.len();
        return Err(FETCH.bad_reply(format!("a ticket of {len} bytes instead of {TICKET_LEN}")));
    }
    let exchange = async {
        let mut stream = UnixStream::connect(socket).await?;
        stream.write_all(&grant.ticket).await?;
        stream
            .async_io(Interest::READABLE, || receive(&stream))
            .await
    };
    let received = tokio::time::timeout(limit, exchange).await;
    let (status, mut fds) = received
        .map_err(|_| FETCH.timeout(limit))?
        .map_err(|error| Error::region_io(name, "descriptor socket", error))?;
    match (status, fds.pop(), fds.is_empty()) {
        (Some(GRANTED), Some(fd), true) => {
            check(&fd, grant.bytes, name)?;
            Ok(fd)
        }
        (Some(GRANTED), _, _) => Err(Error::region(
            name,
            "the daemon did not send one descriptor",
        )),
        (Some(_), _, _) => Err(Error::region(name, "the daemon refused the ticket")),
        (None, _, _) => Err(Error::region(
            name,
            "the daemon closed the descriptor socket",
        )),
    }
}

/// Hands the memory of an engine over for the region of `grant`.
pub(crate) async fn hand_over(
    socket: &Path,
    grant: &v1::RegionGrant,
    fd: BorrowedFd<'_>,
    limit: Duration,
) -> Result<(), Error> {
    const NAME: &str = "engine";
    if grant.ticket.len() != TICKET_LEN {
        let len = grant.ticket.len();
        return Err(FETCH.bad_reply(format!("a ticket of {len} bytes instead of {TICKET_LEN}")));
    }
    let exchange = async {
        let stream = UnixStream::connect(socket).await?;
        let send = || send(&stream, &grant.ticket, fd);
        stream.async_io(Interest::WRITABLE, send).await?;
        let receive = || receive(&stream);
        stream.async_io(Interest::READABLE, receive).await
    };
    let answered = tokio::time::timeout(limit, exchange).await;
    let (status, _) = answered
        .map_err(|_| FETCH.timeout(limit))?
        .map_err(|error| Error::region_io(NAME, "descriptor socket", error))?;
    match status.map(Handover::from_byte) {
        Some(Some(Handover::Taken)) => Ok(()),
        Some(Some(refused)) => Err(Error::region(NAME, format!("its descriptor is {refused}"))),
        Some(None) => Err(FETCH.bad_reply("an unknown answer to a descriptor")),
        None => Err(Error::region(
            NAME,
            "the daemon closed the descriptor socket",
        )),
    }
}

/// A ticket and the descriptor that goes with it. So few bytes go whole or not at all.
fn send(stream: &UnixStream, ticket: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let sent = sendmsg(
        stream,
        &[IoSlice::new(ticket)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    if sent < ticket.len() {
        return Err(io::Error::other("a part of the ticket was sent"));
    }
    Ok(())
}

/// One status byte and the descriptors that came with it.
fn receive(stream: &UnixStream) -> io::Result<(Option<u8>, Vec<OwnedFd>)> {
    let mut byte = [0u8; 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut byte)];
    let message = recvmsg(stream, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other("more descriptors came than one"));
    }
    let [byte] = byte;
    Ok(((message.bytes == 1).then_some(byte), fds))
}

/// Size and seals (D1).
fn check(fd: &OwnedFd, bytes: u64, name: &'static str) -> Result<(), Error> {
    let stat = rustix::fs::fstat(fd).map_err(|e| Error::region_io(name, "fstat", e.into()))?;
    if u64::try_from(stat.st_size) != Ok(bytes) {
        let size = stat.st_size;
        let problem = format!("its descriptor has {size} bytes, its grant says {bytes}");
        return Err(Error::region(name, problem));
    }
    let seals = rustix::fs::fcntl_get_seals(fd)
        .map_err(|e| Error::region_io(name, "its descriptor is no memfd", e.into()))?;
    if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
        let problem = "its descriptor is not sealed against shrinking and growing";
        return Err(Error::region(name, problem));
    }
    Ok(())
}
