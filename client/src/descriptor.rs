//! Fetching the descriptor of a region from the daemon's companion socket.
//!
//! Upstairs:   `link` maps the arena and the staging region with what comes back.
//! Downstairs: a Unix stream socket, `recvmsg` with SCM_RIGHTS through rustix.
//!
//! Exchange: 16 bytes of ticket go out; one status byte (1 granted, 0 refused) comes back, with
//! exactly one descriptor when granted.
//!
//! Invariants kept here
//!   D1  A descriptor that comes out of here is a memfd of exactly the granted size that nobody
//!       can shrink or grow, so no access to its mapping can fault.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use kvtier_proto::v1;
use rustix::fs::SealFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
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
