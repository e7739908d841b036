//! Many restores over one stream.
//!
//! Upstairs:   `restore` starts one and reads its events; `link` owns the multiplexer.
//! Downstairs: the bidirectional `Restore` call, held open by a task.
//!
//! The stream is opened with the first restore and again after it failed. Events are routed by
//! restore id; every lease becomes a guard the moment it arrives, so that whoever drops it, read
//! or unread, gives it back.
//!
//! Invariants kept here
//!   X1  No lease that arrives is forgotten: it is in a guard or its restore is.
//!   X2  At most `RESTORES_PER_SESSION_MAX` restores are known to the daemon at a time.
//!   X3  A restore's queue holds at most one event a block, one plan, one hint and one end: more is
//!       a broken protocol and ends the restore. One slow reader never delays another.
//!   X4  Slots of a restore whose end was not told are not free: the session is given up with them,
//!       so that the next one fences them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvtier_proto::limits::RESTORES_PER_SESSION_MAX;
use kvtier_proto::v1;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::Instant;
use tokio_stream::wrappers::UnboundedReceiverStream;
use v1::restore_command::Command;

use crate::engine_region::Taken;
use crate::error::{Call, Error};
use crate::link::Task;
use crate::maps::Place;
use crate::release::{LeaseGuard, Life, Releases};
use crate::rpc::Rpc;

pub(crate) const RESTORE: Call = Call::reads("Restore");

/// One event of one restore.
pub(crate) enum Feed {
    Plan(v1::RestorePlan),
    /// Blocks, and when they came.
    Ready(Vec<(v1::LeasedBlock, LeaseGuard)>, Instant),
    /// The map of a two-ended restore says something new.
    Hint,
    Inline(crate::inline::InlineBlock),
    Done(v1::RestoreDone),
    Failed(Error),
}

/// What the daemon may write until a restore has ended.
#[derive(Clone, Default)]
pub(crate) struct Keeps {
    /// The map of a two-ended restore.
    pub(crate) place: Option<Arc<Place>>,
    /// Slots of the engine's own.
    pub(crate) slots: Option<Arc<Taken>>,
}

struct Live {
    /// Blocks that may still arrive (X3).
    room: usize,
    planned: bool,
    /// One hint that was not heard yet is enough (X3).
    hinted: Arc<AtomicBool>,
    keeps: Keeps,
    to: UnboundedSender<Feed>,
}

impl Live {
    /// Nobody will say any more when the daemon has stopped to write what this keeps (X4).
    fn fail(&self, life: &Life, error: Error) {
        if let Some(place) = &self.keeps.place {
            place.give_up();
        }
        if self.keeps.slots.is_some() {
            life.lose("a restore into slots of the engine's own ended without its end");
        }
        let _ = self.to.send(Feed::Failed(error));
    }
}

#[derive(Default)]
struct State {
    next_id: u64,
    /// Counts streams, so that the end of an old one does not end the restores of the next.
    stream: u64,
    out: Option<UnboundedSender<v1::RestoreCommand>>,
    live: HashMap<u64, Live>,
}

struct Shared {
    life: Arc<Life>,
    releases: Arc<Releases>,
    state: Mutex<State>,
}

/// The multiplexer of one link.
pub(crate) struct Mux {
    rpc: Rpc,
    shared: Arc<Shared>,
    task: Mutex<Option<Task>>,
}

/// One running restore. Dropping it cancels.
pub(crate) struct Running {
    id: u64,
    shared: Arc<Shared>,
    pub(crate) events: UnboundedReceiver<Feed>,
    hinted: Arc<AtomicBool>,
    /// Done, failed or cancelled: nothing is left to cancel.
    pub(crate) ended: bool,
}

impl Mux {
    pub(crate) fn new(rpc: Rpc, life: Arc<Life>, releases: Arc<Releases>) -> Self {
        let shared = Arc::new(Shared {
            life,
            releases,
            state: Mutex::default(),
        });
        let task = Mutex::new(None);
        Self { rpc, shared, task }
    }

    /// Starts a restore. Never waits.
    pub(crate) fn start(&self, start: v1::RestoreStart, keeps: Keeps) -> Result<Running, Error> {
        let (to, events) = unbounded_channel();
        let room = start.keys.len();
        let mut state = self.shared.lock();
        if state.live.len() >= RESTORES_PER_SESSION_MAX {
            let message =
                format!("{RESTORES_PER_SESSION_MAX} restores of this session are running");
            return Err(Error::Busy { message });
        }
        if state.out.as_ref().is_none_or(UnboundedSender::is_closed) {
            self.open(&mut state);
        }
        state.next_id += 1;
        let id = state.next_id;
        let hinted = Arc::<AtomicBool>::default();
        let live = Live {
            room,
            planned: false,
            hinted: Arc::clone(&hinted),
            keeps,
            to,
        };
        state.live.insert(id, live);
        state.send(id, Command::Start(start));
        let shared = Arc::clone(&self.shared);
        Ok(Running {
            id,
            shared,
            events,
            hinted,
            ended: false,
        })
    }

    fn open(&self, state: &mut State) {
        let (out, commands) = unbounded_channel();
        state.out = Some(out);
        state.stream += 1;
        // Restores of a stream that closed a moment ago get its error from its own task, which
        // would see a newer stream: end them here.
        let error = RESTORE.lost("the restore stream ended");
        state.fail(&self.shared.life, &error);
        let run = run(
            Arc::clone(&self.shared),
            self.rpc.clone(),
            state.stream,
            commands,
        );
        let mut task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        *task = Some(Task::spawn(run));
    }
}

impl State {
    /// Ends all that runs.
    fn fail(&mut self, life: &Life, error: &Error) {
        let ended = self.live.drain();
        ended.for_each(|(_, live)| live.fail(life, error.clone()));
    }

    /// Queues a command. The queue is bounded by its callers: one start and one cancel a
    /// restore, and one progress a block of it. A closed stream answers by its end.
    fn send(&self, restore_id: u64, command: Command) {
        let command = Some(command);
        if let Some(out) = &self.out {
            let _ = out.send(v1::RestoreCommand {
                restore_id,
                command,
            });
        }
    }
}

impl Running {
    pub(crate) fn progress(&self, computed_blocks: u32) {
        let progress = v1::RestoreProgress { computed_blocks };
        self.command(Command::Progress(progress));
    }

    /// A hint was heard; the next one is news.
    pub(crate) fn heard(&self) {
        self.hinted.store(false, Ordering::Release);
    }

    pub(crate) fn cancel(&mut self) {
        if !std::mem::replace(&mut self.ended, true) {
            self.command(Command::Cancel(v1::RestoreCancel {}));
        }
    }

    fn command(&self, command: Command) {
        let state = self.shared.lock();
        if state.live.contains_key(&self.id) {
            state.send(self.id, command);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deliver(&self, event: v1::RestoreEvent) {
        use v1::restore_event::Event;
        let id = event.restore_id;
        match event.event {
            Some(Event::Ready(ready)) => self.ready(id, ready),
            Some(Event::Plan(plan)) => {
                let mut state = self.lock();
                if let Some(live) = state.live.get_mut(&id)
                    && !std::mem::replace(&mut live.planned, true)
                {
                    let _ = live.to.send(Feed::Plan(plan));
                }
            }
            Some(Event::Done(done)) => {
                let live = self.lock().live.remove(&id);
                if let Some(Live { to, keeps, .. }) = live {
                    // The next restore may take them as soon as it hears of the end.
                    drop(keeps);
                    let _ = to.send(Feed::Done(done));
                }
            }
            Some(Event::Hint(_)) => {
                let state = self.lock();
                if let Some(live) = state.live.get(&id)
                    && !live.hinted.swap(true, Ordering::AcqRel)
                {
                    let _ = live.to.send(Feed::Hint);
                }
            }
            // An event of a later protocol.
            None => {}
        }
    }

    fn ready(&self, id: u64, ready: v1::BlocksReady) {
        let guard = |block: v1::LeasedBlock| {
            let lease = self.releases.guard(block.lease);
            (block, lease)
        };
        let blocks: Vec<_> = ready.blocks.into_iter().map(guard).collect();
        let mut state = self.lock();
        // Of a restore that is gone: the guards give the leases back (X1).
        let Some(live) = state.live.get_mut(&id) else {
            return;
        };
        match live.room.checked_sub(blocks.len()) {
            Some(room) => {
                live.room = room;
                let _ = live.to.send(Feed::Ready(blocks, Instant::now()));
            }
            None => {
                let problem = "more blocks became ready than were asked for";
                live.fail(&self.life, RESTORE.bad_reply(problem));
                state.live.remove(&id);
                state.send(id, Command::Cancel(v1::RestoreCancel {}));
            }
        }
    }

    /// The stream ended: so did its restores.
    fn fail(&self, stream: u64, error: &Error) {
        if let Error::SessionLost { reason, .. } = error {
            self.life.lose(reason);
        }
        let mut state = self.lock();
        if state.stream != stream {
            return;
        }
        state.out = None;
        state.fail(&self.life, error);
    }
}

async fn run(
    shared: Arc<Shared>,
    mut rpc: Rpc,
    stream: u64,
    commands: UnboundedReceiver<v1::RestoreCommand>,
) {
    let routing = async {
        let commands = UnboundedReceiverStream::new(commands);
        let mut events = match rpc.restore(commands).await {
            Ok(events) => events.into_inner(),
            Err(status) => return RESTORE.failed(&status),
        };
        loop {
            match events.message().await {
                Ok(Some(event)) => shared.deliver(event),
                Ok(None) => {
                    return Error::Unavailable {
                        message: "the daemon ended the restore stream".to_owned(),
                        retry_after: std::time::Duration::ZERO,
                    };
                }
                Err(status) => return RESTORE.failed(&status),
            }
        }
    };
    let error = tokio::select! {
        error = routing => error,
        reason = shared.life.lost() => RESTORE.lost(reason),
    };
    shared.fail(stream, &error);
}
