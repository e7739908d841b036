//! The `pread` lane: blocking calls on a few threads, for kernels that forbid io_uring.
//!
//! Upstairs:   the store, through `disk::Disk`.
//! Downstairs: `pread`, `pwrite`, `fdatasync`.
//!
//! ```text
//!   submit --> queue (at most `depth`) --> worker threads --> channel --> reap
//! ```
//!
//! Invariants kept here
//!   D1  An operation moves into the queue, then to one worker, then into the channel: it has one
//!       owner at a time, and drop waits for the workers.
//!
//! Not here on purpose: no thread per operation. A device that needs more than `WORKERS_MAX`
//! blocking calls in flight deserves the io_uring lane.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::io::Errno;

use super::dir::{Access, Dir};
use super::rung::Rung;
use super::{Disk, Done, FileId, Found, Op, OpKind, SubmitError, Wait, Waker};

/// Most worker threads. Each holds one blocking call; sixteen of 1 MiB keep an NVMe device busy.
const WORKERS_MAX: usize = 16;

/// Blocking reads and writes on threads of its own.
#[derive(Debug)]
pub struct FileLane {
    dir: Dir,
    depth: usize,
    in_flight: usize,
    queue: Arc<Queue>,
    news: Receiver<News>,
    bell: Arc<Bell>,
    woken: bool,
    workers: Vec<JoinHandle<()>>,
}

/// What the reaper hears.
#[derive(Debug)]
enum News {
    Done(Done),
    Wake,
}

/// Wakes a blocked reaper once, however often it is rung before that.
#[derive(Debug)]
struct Bell {
    rung: Rung,
    news: Sender<News>,
}

/// Work that no thread has taken yet.
#[derive(Debug, Default)]
struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct QueueState {
    jobs: VecDeque<(Op, Arc<OwnedFd>)>,
    closed: bool,
}

impl FileLane {
    /// Opens the directory `path` with room for `depth` operations.
    pub fn open(path: &Path, depth: usize) -> std::io::Result<Self> {
        Self::open_dir(Dir::open(path, Access::Write)?, depth)
    }

    /// As `open`, for a directory that is only read: nothing is created in it or removed.
    pub fn open_to_read(path: &Path, depth: usize) -> std::io::Result<Self> {
        Self::open_dir(Dir::open(path, Access::Read)?, depth)
    }

    fn open_dir(dir: Dir, depth: usize) -> std::io::Result<Self> {
        let depth = super::lane::check_depth(depth)?;
        let queue = Arc::new(Queue::default());
        let (sender, news) = channel();
        let mut workers = Vec::new();
        for n in 0..depth.min(WORKERS_MAX) {
            let (queue, sender) = (Arc::clone(&queue), sender.clone());
            let builder = std::thread::Builder::new().name(format!("kvtier-pread-{n}"));
            match builder.spawn(move || work(&queue, &sender)) {
                Ok(worker) => workers.push(worker),
                // Fewer threads are a slower lane; none is no lane.
                Err(error) if workers.is_empty() => return Err(error),
                Err(_) => break,
            }
        }
        let bell = Arc::new(Bell {
            rung: Rung::new(),
            news: sender,
        });
        Ok(Self {
            dir,
            depth,
            in_flight: 0,
            queue,
            news,
            bell,
            woken: false,
            workers,
        })
    }

    /// Whether files are opened with `O_DIRECT`.
    pub fn direct(&self) -> bool {
        self.dir.direct()
    }

    fn hear(&mut self, news: News, done: &mut Vec<Done>) {
        match news {
            News::Done(one) => {
                self.in_flight -= 1;
                done.push(one);
            }
            News::Wake => {
                // The noise is taken already: it is this news.
                self.bell.rung.answer(|| {});
                self.woken = true;
            }
        }
    }
}

impl Disk for FileLane {
    fn list(&mut self) -> std::io::Result<Vec<Found>> {
        self.dir.list()
    }

    fn open(&mut self, name: &str) -> std::io::Result<FileId> {
        self.dir.open_file(name)
    }

    fn create(&mut self, name: &str, len: u64) -> std::io::Result<FileId> {
        self.dir.create_file(name, len)
    }

    fn remove(&mut self, file: FileId) -> std::io::Result<()> {
        self.dir
            .close(file)
            .map_or(Ok(()), |gone| self.dir.unlink(&gone))
    }

    fn close(&mut self, file: FileId) {
        self.dir.close(file);
    }

    fn submit(&mut self, op: Op) -> Result<(), (Op, SubmitError)> {
        if self.in_flight >= self.depth {
            let depth = u32::try_from(self.in_flight).unwrap_or(u32::MAX);
            return Err((op, SubmitError::Full { depth }));
        }
        self.in_flight += 1;
        let fd = self
            .dir
            .check(&op)
            .map(|()| self.dir.get(op.file).map(|f| Arc::clone(&f.fd)));
        match fd {
            Ok(Some(fd)) => {
                self.queue.lock().jobs.push_back((op, fd));
                self.queue.changed.notify_one();
            }
            Ok(None) => {
                let _ = self
                    .bell
                    .news
                    .send(News::Done(op.done(Err(Errno::BADF.into()))));
            }
            Err(refused) => {
                let _ = self.bell.news.send(News::Done(op.done(Err(refused))));
            }
        }
        Ok(())
    }

    fn reap(&mut self, wait: Wait, done: &mut Vec<Done>) {
        let before = done.len();
        let until = match wait {
            Wait::For(most) => Instant::now().checked_add(most),
            Wait::No | Wait::One => None,
        };
        loop {
            while let Ok(news) = self.news.try_recv() {
                self.hear(news, done);
            }
            if wait == Wait::No {
                return;
            }
            if self.woken || done.len() > before {
                self.woken = false;
                return;
            }
            let news = match until {
                None => self.news.recv().ok(),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    self.news.recv_timeout(left).ok()
                }
            };
            match news {
                Some(news) => self.hear(news, done),
                // The time is over. Else it cannot happen while `bell` holds a sender; a lane
                // without news is over.
                None => return,
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn files_max(&self) -> u64 {
        u64::from(self.dir.files_max())
    }

    fn align(&self) -> usize {
        self.dir.align()
    }

    fn waker(&self) -> Waker {
        let bell = Arc::clone(&self.bell);
        Waker::new(move || {
            bell.rung.ring(|| {
                let _ = bell.news.send(News::Wake);
            });
        })
    }

    fn lane(&self) -> &'static str {
        "pread"
    }
}

impl Drop for FileLane {
    fn drop(&mut self) {
        self.queue.lock().closed = true;
        self.queue.changed.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next job, or `None` when the queue is closed and empty.
    fn next(&self) -> Option<(Op, Arc<OwnedFd>)> {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn work(queue: &Queue, news: &Sender<News>) {
    while let Some((mut op, fd)) = queue.next() {
        let moved = transfer(&mut op, &fd);
        drop(fd);
        // Nobody listens any more when the lane is being dropped; the buffer is freed here then.
        let _ = news.send(News::Done(op.done(moved)));
    }
}

/// One call, repeated only while a signal interrupts it before it moved anything.
fn transfer(op: &mut Op, fd: &OwnedFd) -> std::io::Result<usize> {
    loop {
        let moved = match op.kind {
            OpKind::Sync => rustix::fs::fdatasync(fd).map(|()| 0),
            OpKind::Read => {
                let at = op.at;
                let runs = runs_mut(op).ok_or(Errno::INVAL)?;
                let mut runs: Vec<_> = runs.into_iter().map(IoSliceMut::new).collect();
                rustix::io::preadv(fd, &mut runs, at)
            }
            OpKind::Write => {
                let at = op.at;
                let runs = runs_mut(op).ok_or(Errno::INVAL)?;
                let runs: Vec<_> = runs.iter().map(|run| IoSlice::new(run)).collect();
                rustix::io::pwritev(fd, &runs, at)
            }
        };
        match moved {
            Err(Errno::INTR) => {}
            moved => return Ok(moved?),
        }
    }
}

/// The memory of an operation, in order.
fn runs_mut(op: &mut Op) -> Option<Vec<&mut [u8]>> {
    let first = op.buf.as_deref_mut()?;
    let mut runs = vec![first.get_mut(op.buf_at..op.buf_at.checked_add(op.len)?)?];
    for run in &mut op.more {
        let end = run.buf_at.checked_add(run.len)?;
        runs.push(run.buf.get_mut(run.buf_at..end)?);
    }
    Some(runs)
}

#[cfg(test)]
mod tests {
    use super::super::conformance::{conformance, in_directories};
    use super::*;

    #[test]
    fn pread_lane_keeps_the_promises_of_a_disk() {
        let home = tempfile::tempdir().unwrap();
        conformance(in_directories(&home, |path, depth| {
            Box::new(FileLane::open(path, depth).unwrap())
        }));
    }

    #[test]
    fn pread_lane_refuses_a_directory_that_is_not_there_by_name() {
        let error = FileLane::open(Path::new("/no/such/place"), 1)
            .unwrap_err()
            .to_string();
        assert!(error.contains("/no/such/place"), "{error}");
    }
}
