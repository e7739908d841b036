//! Memfds and the socket that hands them out.
//!
//! Upstairs:   `Fake`.
//! Downstairs: rustix.

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::{UnixListener, UnixStream};

use super::State;

/// A memfd; sealed and of the right size unless told otherwise.
pub(crate) fn memory(len: u64, unsealed: bool, short: bool) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("kvtier-test", flags).unwrap();
    rustix::fs::ftruncate(&fd, if short { len / 2 } else { len }).unwrap();
    if !unsealed {
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).unwrap();
    }
    File::from(fd)
}

pub(crate) async fn serve(listener: UnixListener, state: Arc<State>) {
    while let Ok((stream, _)) = listener.accept().await {
        let state = Arc::clone(&state);
        tokio::spawn(async move { answer(stream, &state).await });
    }
}

async fn answer(mut stream: UnixStream, state: &State) {
    let mut ticket = [0u8; 16];
    if state.enter("descriptor").await.is_err() || stream.read_exact(&mut ticket).await.is_err() {
        return;
    }
    let granted = state.tickets.lock().unwrap().remove(ticket.as_slice());
    let granted = granted.filter(|_| !state.knobs().refuse_tickets);
    let _ = stream
        .async_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = granted.as_ref().map(|file| [file.as_fd()]);
            if let Some(fds) = &fds {
                control.push(SendAncillaryMessage::ScmRights(fds));
            }
            let status = [u8::from(granted.is_some())];
            let sent = sendmsg(
                &stream,
                &[IoSlice::new(&status)],
                &mut control,
                SendFlags::NOSIGNAL,
            );
            sent.map_err(Into::into)
        })
        .await;
}
