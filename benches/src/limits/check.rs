//! A thread that checksums what was read and gives the memory back: what a promise of whole
//! records costs any engine, with no engine around it.
//!
//! Upstairs:   `limits::lane`.
//! Downstairs: `crc32fast`, which the store uses too.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use kvtier_benches::report::Problem;
use kvtier_store::mem::IoBuf;

/// Bytes under one checksum, as in a record. Unit: bytes.
const SPAN: usize = 1 << 20;

/// See the file's header.
pub(super) struct Checker {
    give: Option<Sender<IoBuf>>,
    back: Receiver<(IoBuf, u32)>,
    thread: Option<JoinHandle<()>>,
    sum: u32,
}

impl Checker {
    /// A thread for buffers whose payload begins at `head`.
    pub(super) fn start(head: usize) -> Result<Self, Problem> {
        let (give, todo) = channel::<IoBuf>();
        let (tell, back) = channel();
        let thread = std::thread::Builder::new().name("kvtier-check".into());
        let thread = thread.spawn(move || {
            for buf in todo {
                let payload = buf.get(head..).unwrap_or_default();
                let sums = payload.chunks(SPAN).map(crc32fast::hash);
                let sum = sums.fold(0, |all, one| all ^ one);
                if tell.send((buf, sum)).is_err() {
                    return;
                }
            }
        })?;
        let (give, thread) = (Some(give), Some(thread));
        Ok(Self {
            give,
            back,
            thread,
            sum: 0,
        })
    }

    pub(super) fn give(&self, buf: IoBuf) -> Result<(), Problem> {
        let give = self.give.as_ref().ok_or("the checker has ended")?;
        give.send(buf).map_err(|_| "the checker has ended".into())
    }

    /// A buffer that was checked, waiting for one if `wait` says so.
    pub(super) fn take(&mut self, wait: bool) -> Option<IoBuf> {
        let checked = if wait {
            self.back.recv().ok()
        } else {
            self.back.try_recv().ok()
        };
        let (buf, sum) = checked?;
        self.sum ^= sum;
        Some(buf)
    }
}

impl Drop for Checker {
    fn drop(&mut self) {
        drop(self.give.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        std::hint::black_box(self.sum);
    }
}
