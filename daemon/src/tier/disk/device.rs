//! One device: the thread that owns its store, and the handle that anybody may use.
//!
//! Upstairs:   `DiskTier`, which has one of these for each device that opened.
//! Downstairs: `thread`, where the store's step machine runs, and nowhere else.
//!
//! Commands go in through a channel, answers come back through one-shot channels. The thread
//! sleeps in the kernel until the device finishes something or a command wakes it. A command that
//! finds very many before it waits for its place, asleep; one of a wipe does not, since others
//! count on it that whatever they ask later comes behind it.
//!
//! A device may hang instead of failing: no answer comes, and no error. While a question that had
//! a limit waits beyond it, the device is late, and is asked nothing that others could answer.
//!
//! Invariants kept here
//!   P3  A record of a life that a wipe has ended is not stored: a put shows the life its bytes
//!       belong to, and is checked on the same thread that wipes, each time it is tried.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvtier_proto::{BlockKey, Bytes, LayoutFingerprint, Miss, NamespaceId};
use kvtier_store::disk::Waker;
use kvtier_store::disk::lane::LaneKind;
use kvtier_store::mem::{Arena, IoBuf};
use kvtier_store::{DeviceState, Forgotten, Place, RecordImage, StoreId, Stored, Unverified};
use tokio::sync::{Semaphore, oneshot};

use super::budget::Budget;
use super::late::{Late, Silent};
use super::post::{Post, Sent};
use super::roll::Roll;
use super::scrub::ScrubOptions;
use super::thread;
use crate::block::BlockId;
use crate::metrics::Device;
use crate::sync::AtomicU64;
use crate::tier::host::{HostTier, Life};

/// Commands that wait for the thread. It takes them as fast as it can queue them, so that this
/// bounds bursts, not throughput.
const COMMANDS_WAITING: usize = 1024;

/// How one device of the disk tier is made.
#[derive(Debug, Clone)]
pub struct DiskOptions {
    /// Its number.
    pub device: Device,
    /// Directory of the segments; exists, unless the device is out of service.
    pub path: PathBuf,
    /// Space for segments.
    pub capacity: Bytes,
    /// Size of a segment.
    pub segment_size: Bytes,
    /// Most operations in flight.
    pub queue_depth: usize,
    /// How the device is driven.
    pub lane: LaneKind,
    /// Most that reads take of the device. Unit: bytes a second.
    pub read_limit: Option<Bytes>,
    /// How often and how fast everything is read and checked.
    pub scrub: ScrubOptions,
    /// Time without use after which a block is cold, when anybody asks for such blocks.
    pub cold_after: Option<Duration>,
    /// Namespaces that are told what leaves the device to make room.
    pub hosts: Vec<Arc<HostTier>>,
    /// Why the directory is not to be opened, when it is not.
    pub unusable: Option<String>,
}

/// What one device is, holds and did, for status and metrics.
#[derive(Debug, Clone)]
pub struct DiskStatus {
    /// Its number.
    pub device: Device,
    /// Directory.
    pub path: String,
    /// Lane, and what it does without.
    pub lane: String,
    /// How the device does.
    pub state: DeviceState,
    /// Why it is out of service; empty when it is not.
    pub problem: String,
    /// Space it may use. Unit: bytes.
    pub capacity_bytes: u64,
    /// Space its segments take. Unit: bytes.
    pub used_bytes: u64,
    /// Blocks that can be read: none of a device that is out of service.
    pub blocks: u64,
}

impl DiskStatus {
    /// A device of which nothing is known but how it is to be made.
    pub(super) fn new(options: &DiskOptions) -> Self {
        Self {
            device: options.device,
            path: options.path.display().to_string(),
            lane: String::new(),
            state: DeviceState::Healthy,
            problem: String::new(),
            capacity_bytes: options.capacity.get(),
            used_bytes: 0,
            blocks: 0,
        }
    }

    /// The device is out of service.
    pub(super) fn fail(&mut self, problem: impl Into<String>) {
        self.state = DeviceState::Failed;
        self.problem = problem.into();
        self.blocks = 0;
    }
}

/// As what a record is put.
#[derive(Debug, Clone, Copy)]
pub(super) enum As {
    /// A block that is saved.
    New,
    /// A block that is saved, and the record at this place cannot be read.
    Over(Place),
    /// Another form of this record.
    Form(Stored),
}

pub(super) enum Command {
    Find {
        ids: Vec<BlockId>,
        reply: oneshot::Sender<Vec<Option<Stored>>>,
    },
    Put {
        image: RecordImage,
        how: As,
        lives: Arc<AtomicU64>,
        life: Life,
        reply: oneshot::Sender<PutDone>,
    },
    Get {
        id: BlockId,
        layout: LayoutFingerprint,
        buf: IoBuf,
        background: bool,
        reply: oneshot::Sender<GetDone>,
    },
    Head {
        id: BlockId,
        buf: IoBuf,
        reply: oneshot::Sender<GetDone>,
    },
    Condemn {
        id: BlockId,
        place: Place,
        miss: Miss,
        reply: oneshot::Sender<bool>,
    },
    Pin {
        ids: Vec<BlockId>,
        ttl: Option<Duration>,
        reply: oneshot::Sender<Vec<bool>>,
    },
    Cold {
        epoch: u64,
        reply: oneshot::Sender<Option<(u64, Vec<Stored>)>>,
    },
    Touch {
        namespace: NamespaceId,
        key: BlockKey,
        reply: oneshot::Sender<()>,
    },
    WipedBelow {
        namespaces: Vec<NamespaceId>,
        reply: oneshot::Sender<Vec<u64>>,
    },
    Forget {
        namespace: NamespaceId,
        below: Option<u64>,
        reply: oneshot::Sender<Forgotten>,
    },
    KeepWipes {
        namespace: NamespaceId,
        reply: oneshot::Sender<Result<(), String>>,
    },
    Attach {
        arenas: Vec<Arc<Arena>>,
        reply: oneshot::Sender<()>,
    },
    Close {
        reply: oneshot::Sender<()>,
    },
}

/// Why a record is not stored.
#[derive(Debug)]
pub(super) struct Unstored {
    /// For the log.
    pub(super) problem: String,
    /// The record, when another device may take it.
    pub(super) image: Option<RecordImage>,
}

impl Unstored {
    /// Nobody is to store it.
    pub(super) fn for_good(problem: impl Into<String>) -> Self {
        Self {
            problem: problem.into(),
            image: None,
        }
    }
}

pub(super) type PutDone = Result<(), Unstored>;
pub(super) type GetDone = Result<Unverified, Miss>;
/// What an opened device says of itself: how it is woken, and who it is.
pub(super) type Opened = Result<(Waker, StoreId), String>;

/// Says that the thread broke, if it does: nothing is served from the device after that.
pub(super) struct Alarm {
    pub(super) roll: Arc<Roll>,
    pub(super) status: Arc<Mutex<DiskStatus>>,
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let why = "its thread broke; see the log";
            let device = {
                let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
                status.fail(why);
                status.device
            };
            self.roll.state(device, DeviceState::Failed, why);
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Handle {
    post: Post,
    status: Arc<Mutex<DiskStatus>>,
    late: Arc<Late>,
    pub(super) id: StoreId,
    /// Of scratch memory, for records to be written and to be read.
    pub(super) puts: Budget,
    pub(super) gets: Budget,
}

/// A question that was asked, on its way to an answer. `None` when the thread has ended.
pub(super) type Question<T> = Pin<Box<dyn Future<Output = Option<T>> + Send>>;

/// A device that is being opened.
pub(super) struct Opening {
    device: Device,
    roll: Arc<Roll>,
    commands: Sender<Sent>,
    status: Arc<Mutex<DiskStatus>>,
    opened: oneshot::Receiver<Opened>,
}

impl Opening {
    /// Starts the thread, which opens the store. Progress of a recovery shows in `roll`.
    pub(super) fn start(options: DiskOptions, roll: Arc<Roll>) -> Result<Self, String> {
        let (commands, receiver) = std::sync::mpsc::channel();
        let (opened, wait) = oneshot::channel();
        let status = Arc::new(Mutex::new(DiskStatus::new(&options)));
        let device = options.device;
        let (told, alarmed) = (Arc::clone(&status), Arc::clone(&roll));
        let threads = tokio::runtime::Handle::try_current().ok();
        std::thread::Builder::new()
            .name(format!("kvtier-disk-{}", options.device.position()))
            .spawn(move || {
                let (status, roll) = (told, alarmed);
                let alarm = Alarm { roll, status };
                thread::main(options, receiver, &alarm, opened, threads);
            })
            .map_err(|problem| format!("cannot start the disk thread: {problem}"))?;
        Ok(Self {
            device,
            roll,
            commands,
            status,
            opened: wait,
        })
    }

    /// Waits until the index is whole; with `patience`, for as long as less than that has passed
    /// since the recovery moved on.
    ///
    /// # Errors
    /// The directory cannot be used, or the options are out of bounds, or the device hangs. Damage
    /// is no error.
    pub(super) async fn done(mut self, patience: Option<Duration>) -> Result<Handle, String> {
        let opened = loop {
            let Some(patience) = patience else {
                break (&mut self.opened).await;
            };
            let left = patience.saturating_sub(self.roll.unmoved(self.device));
            match tokio::time::timeout(left, &mut self.opened).await {
                Ok(opened) => break opened,
                Err(_) if self.roll.unmoved(self.device) < patience => {}
                Err(_) => return Err(format!("it did not open: it hung for {patience:?}")),
            }
        };
        let gone = |_| "the disk thread ended while it opened the store".to_owned();
        let (waker, id) = opened.map_err(gone)??;
        Ok(Handle {
            post: Post {
                commands: self.commands,
                waker,
                places: Arc::new(Semaphore::new(COMMANDS_WAITING)),
            },
            status: self.status,
            late: Arc::new(Late::new(self.device, self.roll)),
            id,
            puts: Budget::unbounded(),
            gets: Budget::unbounded(),
        })
    }
}

impl Handle {
    /// What it is, holds and did.
    pub(super) fn status(&self) -> DiskStatus {
        let mut status = self.lock().clone();
        if self.is_late() && status.problem.is_empty() {
            "it does not answer; its blocks are misses until it does"
                .clone_into(&mut status.problem);
        }
        status
    }

    /// How the device does.
    pub(super) fn state(&self) -> DeviceState {
        self.lock().state
    }

    /// Its number.
    pub(super) fn device(&self) -> Device {
        self.lock().device
    }

    /// It has not answered in time, and not since.
    pub(super) fn is_late(&self) -> bool {
        self.late.is()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, DiskStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the device go: its thread closes the store and ends.
    pub(super) fn let_go(self) {
        let Post {
            commands, waker, ..
        } = self.post;
        drop(commands);
        // It may sleep until something happens.
        waker.wake();
    }

    /// Asks. Whoever wants the answer waits for what is returned; the thread has the command
    /// before that, unless very many others wait for it too.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Question<T> {
        let (reply, answer) = oneshot::channel();
        let command = command(reply);
        let places = Arc::clone(&self.post.places);
        let waits = match Arc::clone(&places).try_acquire_owned() {
            Ok(place) => {
                self.post.send(command, Some(place));
                None
            }
            Err(_) => Some((command, self.post.clone())),
        };
        Box::pin(async move {
            if let Some((command, post)) = waits {
                post.send(command, Some(places.acquire_owned().await.ok()?));
            }
            answer.await.ok()
        })
    }

    /// Asks, however many others wait: what anybody asks after this comes behind it. Only for what
    /// is bounded by other means.
    pub(super) fn ask_at_once<T: Send + 'static>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Question<T> {
        let (reply, answer) = oneshot::channel();
        self.post.send(command(reply), None);
        Box::pin(async move { answer.await.ok() })
    }

    /// The answer, if it comes by `until`. Otherwise the device is late until it does come.
    pub(super) async fn answer<T: Send + 'static>(
        &self,
        until: tokio::time::Instant,
        question: Question<T>,
    ) -> Result<T, Silent> {
        Late::answer(&self.late, until, question).await
    }

    /// Asks, and waits no longer than this.
    pub(super) async fn ask_within<T: Send + 'static>(
        &self,
        limit: Duration,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, Silent> {
        let until = tokio::time::Instant::now() + limit;
        self.answer(until, self.ask(command)).await
    }

    /// Appends a record. Returns when it is durable; the device is late when that takes longer than
    /// `patience`.
    pub(super) async fn put(
        &self,
        image: RecordImage,
        how: As,
        (lives, life): (Arc<AtomicU64>, Life),
        patience: Duration,
    ) -> PutDone {
        let mut done = self.ask(|reply| Command::Put {
            image,
            how,
            lives,
            life,
            reply,
        });
        let ended = || Err(Unstored::for_good("the disk thread has ended"));
        let done = match tokio::time::timeout(patience, &mut done).await {
            Ok(done) => done,
            Err(_) => {
                // The record is with the device, and nobody else can have it.
                let _late = Late::begin(&self.late);
                done.await
            }
        };
        done.unwrap_or_else(ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::Health;
    use crate::metrics::{DiskState, Metrics};

    // Goal: /healthz, metric and status turn bad when the thread is gone, and stay so.
    #[test]
    fn a_thread_that_breaks_is_told_to_health_metrics_and_status() {
        let (health, metrics) = (Arc::new(Health::new()), Arc::new(Metrics::new()));
        let roll = Arc::new(Roll::new(1, Arc::clone(&health), Arc::clone(&metrics)));
        let options = DiskOptions {
            device: Device::FIRST,
            path: PathBuf::new(),
            capacity: Bytes(0),
            segment_size: Bytes(0),
            queue_depth: 1,
            lane: LaneKind::Pread,
            read_limit: None,
            scrub: ScrubOptions::OFF,
            cold_after: None,
            hosts: Vec::new(),
            unusable: None,
        };
        let status = Arc::new(Mutex::new(DiskStatus::new(&options)));
        let run = |breaks: bool| {
            let (roll, status) = (Arc::clone(&roll), Arc::clone(&status));
            let thread = std::thread::spawn(move || {
                let _alarm = Alarm { roll, status };
                assert!(!breaks, "this thread breaks on purpose");
            });
            thread.join().is_err()
        };
        assert!(!run(false));
        assert_eq!(health.live(), Ok(()));
        assert!(run(true));
        let why = health.live().unwrap_err();
        assert!(why.contains("its thread broke"), "{why}");
        let failed = (Device::FIRST, DiskState::Failed);
        assert_eq!(metrics.disk_state.of(failed).get(), 1);
        assert_eq!(status.lock().unwrap().state, DeviceState::Failed);
    }
}
