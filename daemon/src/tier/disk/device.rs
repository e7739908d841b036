//! The disk tier: one thread that owns one store, and a handle that anybody may use.
//!
//! Upstairs:   `tier::save`, `tier::load`, and the calls that explain, pin and wipe.
//! Downstairs: `kvtier_store::Store`, whose step machine runs on the thread and nowhere else.
//!
//! Commands go in through a bounded channel, answers come back through one-shot channels. The
//! thread sleeps in the kernel until the device finishes something or a command wakes it.
//!
//! Invariants kept here
//!   P3  A record of a life that a wipe has ended is not stored: a put shows the life its bytes
//!       belong to, and is checked on the same thread that wipes, each time it is tried.

mod pins;
mod thread;

use std::path::PathBuf;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvtier_proto::{Bytes, LayoutFingerprint, Miss, NamespaceId};
use kvtier_store::disk::Waker;
use kvtier_store::disk::lane::LaneKind;
use kvtier_store::mem::{Arena, IoBuf};
use kvtier_store::{DeviceState, Place, RecordImage, Stored, Unverified};
use tokio::sync::oneshot;

use super::host::{HostTier, Life};
use crate::block::BlockId;
use crate::health::Health;
use crate::metrics::{DiskState, Metrics};
use crate::sync::AtomicU64;

/// Commands that wait for the thread. It takes them as fast as it can queue them, so that this
/// bounds bursts, not throughput.
const COMMANDS_WAITING: usize = 1024;

/// How a disk tier is made.
#[derive(Debug, Clone)]
pub struct DiskOptions {
    /// Directory of the segments; exists.
    pub path: PathBuf,
    /// Space for segments.
    pub capacity: Bytes,
    /// Size of a segment.
    pub segment_size: Bytes,
    /// Most operations in flight.
    pub queue_depth: usize,
    /// How the device is driven.
    pub lane: LaneKind,
    /// Memory that I/O goes to and from, for registration with the ring.
    pub arenas: Vec<Arc<Arena>>,
    /// Namespaces that are told what leaves the device to make room.
    pub hosts: Vec<Arc<HostTier>>,
}

/// What the disk tier is and holds, for status and metrics.
#[derive(Debug, Clone)]
pub struct DiskStatus {
    /// Directory.
    pub path: String,
    /// Lane, and what it does without.
    pub lane: String,
    /// How the device does.
    pub state: DeviceState,
    /// Space it may use. Unit: bytes.
    pub capacity_bytes: u64,
    /// Space its segments take. Unit: bytes.
    pub used_bytes: u64,
    /// Blocks that can be read.
    pub blocks: u64,
}

enum Command {
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
    Wipe {
        namespace: NamespaceId,
        reply: oneshot::Sender<Result<u64, String>>,
    },
    Close {
        reply: oneshot::Sender<()>,
    },
}

type PutDone = Result<(), String>;
type GetDone = Result<Unverified, Miss>;

/// Says that the thread broke, if it does: nothing is served from the device after that.
struct Alarm {
    health: Arc<Health>,
    metrics: Arc<Metrics>,
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.health
                .fail("the thread of the disk tier broke; see the log");
            self.metrics.set_disk_state(DiskState::Failed);
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct DiskTier {
    commands: SyncSender<Command>,
    waker: Waker,
    status: Arc<Mutex<DiskStatus>>,
}

impl DiskTier {
    /// Starts the thread, opens the store and waits until its index is whole. Progress of a
    /// recovery shows in `health`.
    ///
    /// # Errors
    /// The directory cannot be used, or the options are out of bounds. Damage is no error.
    pub async fn open(
        options: DiskOptions,
        health: Arc<Health>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, String> {
        let (commands, receiver) = std::sync::mpsc::sync_channel(COMMANDS_WAITING);
        let (opened, wait) = oneshot::channel();
        std::thread::Builder::new()
            .name("kvtier-disk".into())
            .spawn(move || {
                let alarm = Alarm { health, metrics };
                thread::main(options, receiver, &alarm.health, &alarm.metrics, opened);
            })
            .map_err(|problem| format!("cannot start the disk thread: {problem}"))?;
        let gone = |_| "the disk thread ended while it opened the store".to_owned();
        let (waker, status) = wait.await.map_err(gone)??;
        Ok(Self {
            commands,
            waker,
            status,
        })
    }

    /// Where each block lies, in order.
    pub async fn find(&self, ids: Vec<BlockId>) -> Vec<Option<Stored>> {
        let nowhere = vec![None; ids.len()];
        self.ask(|reply| Command::Find { ids, reply })
            .await
            .unwrap_or(nowhere)
    }

    /// Appends a record. Returns when it is durable.
    ///
    /// # Errors
    /// Why it is not stored, for the log. The block stays where it was.
    pub async fn put(
        &self,
        image: RecordImage,
        lives: Arc<AtomicU64>,
        life: Life,
    ) -> Result<(), String> {
        let done = self
            .ask(|reply| Command::Put {
                image,
                lives,
                life,
                reply,
            })
            .await;
        done.unwrap_or_else(|| Err("the disk thread has ended".into()))
    }

    /// Reads a record into `buf`, which is at least as long as the place says.
    pub async fn get(
        &self,
        id: BlockId,
        layout: LayoutFingerprint,
        buf: IoBuf,
    ) -> Result<Unverified, Miss> {
        let done = self
            .ask(|reply| Command::Get {
                id,
                layout,
                buf,
                reply,
            })
            .await;
        done.unwrap_or(Err(Miss::Device))
    }

    /// Takes a record that cannot be served out of the index. False when it stays, because the
    /// device as a whole has failed and nothing is known of the record.
    pub async fn condemn(&self, id: BlockId, place: Place, miss: Miss) -> bool {
        self.ask(|reply| Command::Condemn {
            id,
            place,
            miss,
            reply,
        })
        .await
        .unwrap_or(false)
    }

    /// Keeps blocks when their segments are recycled; `None` ends that. Says which exist.
    pub async fn pin(&self, ids: Vec<BlockId>, ttl: Option<Duration>) -> Vec<bool> {
        let none = vec![false; ids.len()];
        self.ask(|reply| Command::Pin { ids, ttl, reply })
            .await
            .unwrap_or(none)
    }

    /// Forgets a namespace, durably. Returns how many blocks went.
    ///
    /// # Errors
    /// The device did not take it; nothing of the namespace is served meanwhile.
    pub async fn wipe(&self, namespace: NamespaceId) -> Result<u64, String> {
        let done = self.ask(|reply| Command::Wipe { namespace, reply }).await;
        done.unwrap_or_else(|| Err("the disk thread has ended".into()))
    }

    /// Makes everything durable, closes the store in order and ends the thread.
    pub async fn close(&self) {
        self.ask(|reply| Command::Close { reply })
            .await
            .unwrap_or(());
    }

    /// What it is and holds.
    pub fn status(&self) -> DiskStatus {
        self.status
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Sends a command and waits for its answer. `None` when the thread has ended.
    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        let mut command = command(reply);
        // The channel is bounded and its other end never waits for us: full means a burst.
        while let Err(refused) = self.commands.try_send(command) {
            match refused {
                std::sync::mpsc::TrySendError::Full(back) => command = back,
                std::sync::mpsc::TrySendError::Disconnected(_) => return None,
            }
            self.waker.wake();
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        self.waker.wake();
        answer.await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: /healthz and the metric turn bad when the thread is gone, and stay so.
    #[test]
    fn a_thread_that_breaks_is_told_to_health_and_metrics() {
        let (health, metrics) = (Arc::new(Health::new()), Arc::new(Metrics::new()));
        let run = |breaks: bool| {
            let (health, metrics) = (Arc::clone(&health), Arc::clone(&metrics));
            let thread = std::thread::spawn(move || {
                let _alarm = Alarm { health, metrics };
                assert!(!breaks, "this thread breaks on purpose");
            });
            thread.join().is_err()
        };
        assert!(!run(false));
        assert_eq!(health.live(), Ok(()));
        assert!(run(true));
        let why = health.live().unwrap_err();
        assert!(why.contains("disk tier broke"), "{why}");
        assert_eq!(metrics.disk_state.of(DiskState::Failed).get(), 1);
    }
}
