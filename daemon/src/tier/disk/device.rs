//! One device: the thread that owns its store, and the handle that anybody may use.
//!
//! Upstairs:   `DiskTier`, which has one of these for each device that opened.
//! Downstairs: `thread`, where the store's step machine runs, and nowhere else.
//!
//! Commands go in through a bounded channel, answers come back through one-shot channels. The
//! thread sleeps in the kernel until the device finishes something or a command wakes it.
//!
//! Invariants kept here
//!   P3  A record of a life that a wipe has ended is not stored: a put shows the life its bytes
//!       belong to, and is checked on the same thread that wipes, each time it is tried.

use std::path::PathBuf;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvtier_proto::{Bytes, LayoutFingerprint, Miss, NamespaceId};
use kvtier_store::disk::Waker;
use kvtier_store::disk::lane::LaneKind;
use kvtier_store::mem::{Arena, IoBuf};
use kvtier_store::{DeviceState, Forgotten, Place, RecordImage, StoreId, Stored, Unverified};
use tokio::sync::oneshot;

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
    /// How often and how fast everything is read and checked.
    pub scrub: ScrubOptions,
    /// Memory that I/O goes to and from, for registration with the ring.
    pub arenas: Vec<Arc<Arena>>,
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
    /// Blocks that can be read.
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
    }
}

pub(super) enum Command {
    Find {
        ids: Vec<BlockId>,
        reply: oneshot::Sender<Vec<Option<Stored>>>,
    },
    Put {
        image: RecordImage,
        lives: Arc<AtomicU64>,
        life: Life,
        reply: oneshot::Sender<PutDone>,
    },
    Get {
        id: BlockId,
        layout: LayoutFingerprint,
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
    commands: SyncSender<Command>,
    waker: Waker,
    status: Arc<Mutex<DiskStatus>>,
    pub(super) id: StoreId,
}

/// A device that is being opened.
pub(super) struct Opening {
    commands: SyncSender<Command>,
    status: Arc<Mutex<DiskStatus>>,
    opened: oneshot::Receiver<Opened>,
}

impl Opening {
    /// Starts the thread, which opens the store. Progress of a recovery shows in `roll`.
    pub(super) fn start(options: DiskOptions, roll: Arc<Roll>) -> Result<Self, String> {
        let (commands, receiver) = std::sync::mpsc::sync_channel(COMMANDS_WAITING);
        let (opened, wait) = oneshot::channel();
        let status = Arc::new(Mutex::new(DiskStatus::new(&options)));
        let told = Arc::clone(&status);
        let threads = tokio::runtime::Handle::try_current().ok();
        std::thread::Builder::new()
            .name(format!("kvtier-disk-{}", options.device.position()))
            .spawn(move || {
                let status = told;
                let alarm = Alarm { roll, status };
                thread::main(options, receiver, &alarm, opened, threads);
            })
            .map_err(|problem| format!("cannot start the disk thread: {problem}"))?;
        Ok(Self {
            commands,
            status,
            opened: wait,
        })
    }

    /// Waits until the index is whole.
    ///
    /// # Errors
    /// The directory cannot be used, or the options are out of bounds. Damage is no error.
    pub(super) async fn done(self) -> Result<Handle, String> {
        let gone = |_| "the disk thread ended while it opened the store".to_owned();
        let (waker, id) = self.opened.await.map_err(gone)??;
        Ok(Handle {
            commands: self.commands,
            waker,
            status: self.status,
            id,
        })
    }
}

impl Handle {
    /// What it is, holds and did.
    pub(super) fn status(&self) -> DiskStatus {
        self.lock().clone()
    }

    /// How the device does.
    pub(super) fn state(&self) -> DeviceState {
        self.lock().state
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, DiskStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a command. Its answer comes through what is returned, which breaks when the thread
    /// has ended.
    pub(super) async fn send<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> oneshot::Receiver<T> {
        let (reply, answer) = oneshot::channel();
        let mut command = command(reply);
        // The channel is bounded and its other end never waits for us: full means a burst.
        while let Err(refused) = self.commands.try_send(command) {
            match refused {
                std::sync::mpsc::TrySendError::Full(back) => command = back,
                std::sync::mpsc::TrySendError::Disconnected(_) => return answer,
            }
            self.waker.wake();
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        self.waker.wake();
        answer
    }

    /// Sends a command and waits for its answer. `None` when the thread has ended.
    pub(super) async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Option<T> {
        self.send(command).await.await.ok()
    }

    /// Appends a record. Returns when it is durable.
    pub(super) async fn put(
        &self,
        image: RecordImage,
        lives: Arc<AtomicU64>,
        life: Life,
    ) -> PutDone {
        let done = self.ask(|reply| Command::Put {
            image,
            lives,
            life,
            reply,
        });
        let ended = || Err(Unstored::for_good("the disk thread has ended"));
        done.await.unwrap_or_else(ended)
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
            scrub: ScrubOptions::OFF,
            arenas: Vec::new(),
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
