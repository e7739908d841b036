//! The Restore stream: commands of many restores in, their events out.
//!
//! Upstairs:   `server`.
//! Downstairs: `restore::run`, one task a restore; `landing` where blocks go to an engine's slots.
//!
//! Restores on one stream are told apart by a number the client chose. When the stream ends,
//! every restore on it is cancelled. Leases whose event tonic had taken for sending stay with the
//! session, for the client may know of them; all others are given back.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use kvtier_proto::limits::REPORTS_PER_CALL_MAX;
use kvtier_proto::{Miss, keys_from_wire, v1};
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tonic::{Request, Status, Streaming};
use v1::restore_event::Event;

use super::landing::Landing;
use super::{Drain, Replies, Shared, convert, kind, peer};
use crate::region::engine::{BadSlot, Reserved};
use crate::restore::claims::{BadMap, Claims};
use crate::restore::engines::Step;
use crate::restore::outlook::Outlook;
use crate::restore::run::{self, Control, Hold, Restore};
use crate::session::{ARENA_REGION, Session};
use crate::tenant::Peer;

/// Events that wait for a slow reader before its restores wait for it.
const EVENTS_WAITING: usize = 256;

type Outcome = Result<v1::RestoreEvent, Status>;

/// What waits for the reader, with the leases it speaks of.
type Waiting = (Outcome, Vec<Hold>);

/// The replies. Leases are handed over as their event is taken, and given back with the queue.
struct Events(mpsc::Receiver<Waiting>);

impl tokio_stream::Stream for Events {
    type Item = Outcome;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Outcome>> {
        self.0.poll_recv(context).map(|next| {
            let (event, holds) = next?;
            holds.into_iter().for_each(Hold::hand_over);
            Some(event)
        })
    }
}

struct Stream {
    shared: Arc<Shared>,
    peer: Peer,
    out: mpsc::Sender<Waiting>,
    running: HashMap<u64, watch::Sender<Control>>,
}

/// Serves one stream.
pub async fn restore(
    shared: &Arc<Shared>,
    request: Request<Streaming<v1::RestoreCommand>>,
) -> Result<Replies<v1::RestoreEvent>, Status> {
    let peer = peer(&request)?;
    let mut commands = request.into_inner();
    let (out, events) = mpsc::channel(EVENTS_WAITING);
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let mut drain = shared.drain.subscribe();
        let mut stream = Stream {
            shared,
            peer,
            out,
            running: HashMap::new(),
        };
        loop {
            let command = tokio::select! {
                command = commands.message() => command,
                () = stream.out.closed() => return,
                _ = drain.wait_for(|state| *state == Drain::Ended) => return,
            };
            // A broken stream and an ended one end the same way: `running` is dropped, and with
            // it every restore is cancelled.
            let Ok(Some(command)) = command else { return };
            if let Err(refusal) = stream.command(command).await {
                let _ = stream.out.send((Err(refusal), Vec::new())).await;
                return;
            }
        }
    });
    Ok(Box::pin(Events(events)))
}

impl Stream {
    /// A command that makes no sense ends the stream: the two ends no longer agree on what runs.
    async fn command(&mut self, command: v1::RestoreCommand) -> Result<(), Status> {
        use v1::restore_command::Command;
        let id = command.restore_id;
        self.running.retain(|_, control| !control.is_closed());
        match command.command {
            Some(Command::Start(start)) => self.start(id, start).await,
            Some(Command::Progress(progress)) => {
                let computed = usize::try_from(progress.computed_blocks).unwrap_or(usize::MAX);
                if let Some(control) = self.running.get(&id) {
                    control.send_modify(|control| control.computed = computed);
                }
                Ok(())
            }
            Some(Command::Cancel(_)) => {
                if let Some(control) = self.running.get(&id) {
                    control.send_modify(|control| control.cancelled = true);
                }
                Ok(())
            }
            None => Err(convert::bad_field(
                "command",
                "empty",
                "start, progress or cancel",
            )),
        }
    }

    async fn start(&mut self, id: u64, start: v1::RestoreStart) -> Result<(), Status> {
        if self.running.contains_key(&id) {
            return Err(convert::bad_field(
                "restore_id",
                id,
                "a number not in use on this stream",
            ));
        }
        let session = self
            .shared
            .sessions
            .find(&start.session, self.peer)
            .ok_or_else(|| {
                Status::unauthenticated(
                    "unknown session: it has ended, or is another user's; open one",
                )
            })?;
        let request = asked(&session, &start)?;
        let into = into(&session, start.into.as_ref(), &request)?.transpose();
        let into = match into {
            Ok(into) => into,
            Err(busy) => {
                self.refuse(id, &request, Miss::Region, &busy.to_string())
                    .await;
                return Ok(());
            }
        };
        let permit = Arc::clone(&session.restores).try_acquire_owned();
        // Asked after the permit is taken: whoever stops the daemon waits for permits.
        let Some(permit) = permit.ok().filter(|_| !self.shared.stopping()) else {
            // Its slots are free before the client can know that it ended.
            drop(into);
            let why = "the session runs as many as it may, or the daemon stops";
            self.refuse(id, &request, Miss::NoSpace, why).await;
            return Ok(());
        };
        let (control, listen) = watch::channel(Control::default());
        self.running.insert(id, control);
        let metrics = &self.shared.metrics;
        let landing = into.map(|into| Landing::new(into, listen.clone(), Arc::clone(metrics)));
        let (events, mut happened) = mpsc::channel(EVENTS_WAITING);
        let restore = Restore {
            reader: Arc::<Session>::clone(&session),
            tiers: Arc::clone(&self.shared.tiers),
            metrics: Arc::clone(&self.shared.metrics),
            learned: Arc::clone(&self.shared.learned),
            request,
            control: listen,
            events,
        };
        let out = self.out.clone();
        tokio::spawn(restore.run());
        let mut telling = Telling {
            id,
            out,
            permit: Some(permit),
            landing,
        };
        tokio::spawn(async move {
            while let Some(event) = happened.recv().await {
                if !telling.tell(event).await {
                    return;
                }
            }
        });
        Ok(())
    }

    /// This restore ends at once, the others go on. A client that does not read its events waits
    /// here itself.
    async fn refuse(&self, id: u64, request: &run::Request, miss: Miss, why: &str) {
        let missed = (0..request.keys.len()).map(|index| (index, miss));
        let summary = run::Summary {
            missed: missed.collect(),
            ..run::Summary::default()
        };
        tracing::warn!(restore = id, why, "a restore was refused");
        let event = wire(id, Event::Done(done(summary)));
        let _ = self.out.send((Ok(event), Vec::new())).await;
    }
}

/// Tells a client what happens in one of its restores.
struct Telling {
    id: u64,
    out: mpsc::Sender<Waiting>,
    permit: Option<OwnedSemaphorePermit>,
    landing: Option<Landing>,
}

impl Telling {
    /// False when nobody listens any more.
    async fn tell(&mut self, event: run::Event) -> bool {
        let event = match (event, &mut self.landing) {
            (run::Event::Ready(ready), Some(landing)) => {
                for group in Landing::groups(ready) {
                    let blocks = landing.land(group).await;
                    let event = wire(self.id, Event::Ready(v1::BlocksReady { blocks }));
                    if self.out.send((Ok(event), Vec::new())).await.is_err() {
                        return false;
                    }
                }
                return true;
            }
            (run::Event::Done(mut summary), _) => {
                // Places and slots are free before the client can know, so that it may start the
                // next.
                self.permit.take();
                if let Some(landing) = self.landing.take() {
                    landing.end(&mut summary);
                }
                run::Event::Done(summary)
            }
            (event, _) => event,
        };
        let (event, holds) = to_wire(self.id, event);
        self.out.send((Ok(event), holds)).await.is_ok()
    }
}

fn wire(restore_id: u64, event: Event) -> v1::RestoreEvent {
    let event = Some(event);
    v1::RestoreEvent { restore_id, event }
}

/// Takes what an engine says of its speed. Steps that no engine can have made are passed over.
pub fn report_prefill(
    shared: &Shared,
    request: &Request<v1::ReportPrefillRequest>,
) -> Result<v1::ReportPrefillReply, Status> {
    let session = shared.session(request, &request.get_ref().session)?;
    let reports = &request.get_ref().reports;
    if reports.len() > REPORTS_PER_CALL_MAX {
        let accepted = format!("at most {REPORTS_PER_CALL_MAX}");
        return Err(convert::bad_field("reports", reports.len(), accepted));
    }
    let step = |report: &v1::PrefillReport| Step {
        before: report.before,
        tokens: report.tokens,
        took: Duration::from_micros(report.micros),
    };
    let (namespace, layout) = (session.tenant.id, session.layouts.fingerprint());
    let engines = &shared.learned.engines;
    let believed = engines.report(namespace, layout, reports.iter().map(step));
    shared.metrics.prefill_steps.of(()).inc_by(believed as u64);
    Ok(v1::ReportPrefillReply {})
}

/// An event on the wire, and the leases that it tells of.
fn to_wire(restore_id: u64, event: run::Event) -> (v1::RestoreEvent, Vec<Hold>) {
    let (event, holds) = match event {
        run::Event::Plan(found, outlook) => {
            let blocks = found.into_iter().map(convert::status).collect();
            let plan = v1::RestorePlan {
                blocks,
                outlook: outlook.map(to_wire_outlook),
            };
            (Event::Plan(plan), Vec::new())
        }
        run::Event::Ready(ready) => {
            let blocks = ready.iter().map(leased).collect();
            let holds = ready.into_iter().map(|leased| leased.hold).collect();
            (Event::Ready(v1::BlocksReady { blocks }), holds)
        }
        run::Event::Hint => (Event::Hint(v1::RestoreHint {}), Vec::new()),
        run::Event::Done(summary) => (Event::Done(done(summary)), Vec::new()),
    };
    (wire(restore_id, event), holds)
}

/// What is expected of a restore, on the wire.
pub fn to_wire_outlook(outlook: Outlook) -> v1::Outlook {
    let micros = |time: Option<Duration>| {
        let micros = time.map_or(0, |time| time.as_micros().max(1));
        u64::try_from(micros).unwrap_or(u64::MAX)
    };
    v1::Outlook {
        planned_us: micros(outlook.planned),
        load_us: micros(outlook.load),
        compute_us: micros(outlook.compute),
        compute_blocks: convert::count(outlook.compute_blocks),
        load_blocks: convert::count(outlook.load_blocks),
        reason: outlook.reason.to_owned(),
    }
}

/// What is to be restored, and how.
fn asked(session: &Session, start: &v1::RestoreStart) -> Result<run::Request, Status> {
    let deadline = Duration::from_millis(u64::from(start.deadline_ms));
    Ok(run::Request {
        keys: keys_from_wire("keys", &start.keys).map_err(convert::invalid)?,
        kind: kind(start.kind)?,
        deadline: (!deadline.is_zero()).then_some(deadline),
        scattered: start.scattered || start.two_ended.is_some(),
        accept: convert::accept(start.accept)?,
        two_ended: two_ended(session, start.two_ended.as_ref(), start.keys.len())?,
    })
}

/// What makes a restore two-ended.
fn two_ended(
    session: &Session,
    two_ended: Option<&v1::TwoEnded>,
    blocks: usize,
) -> Result<Option<run::TwoEnded>, Status> {
    let Some(two_ended) = two_ended else {
        return Ok(None);
    };
    let missing = || convert::bad_field("two_ended.map", "missing", "a place for the map");
    let slot = two_ended.map.as_ref().ok_or_else(missing)?;
    let memory = session.claims(slot.region).ok_or_else(|| {
        let accepted = "a region that this session registered for claims";
        convert::bad_field("two_ended.map.region", slot.region, accepted)
    })?;
    let place = (slot.offset, slot.length);
    let claims = Claims::new(memory, place, blocks);
    let refused =
        |bad: BadMap| convert::bad_field("two_ended.map", bad, "exactly the bytes of a map");
    let claims = claims.map_err(refused)?;
    Ok(Some(run::TwoEnded {
        claims,
        first_token: two_ended.first_token,
        suffix_tokens: two_ended.suffix_tokens,
    }))
}

/// The engine's slots that the blocks go to, or which of them another transfer has: then nothing is
/// copied, and the client, who may have learned of that one's end just now, goes on.
fn into(
    session: &Session,
    into: Option<&v1::IntoSlots>,
    request: &run::Request,
) -> Result<Option<Result<Reserved, BadSlot>>, Status> {
    let Some(into) = into else {
        return Ok(None);
    };
    let region = session.engine(into.region).ok_or_else(|| {
        let accepted = "a region of its own memory that this session registered";
        convert::bad_field("into.region", into.region, accepted)
    })?;
    if region.kind() != request.kind {
        let (kind, accepted) = (request.kind.as_str(), region.kind().as_str());
        let accepted = format!("{accepted}, the kind of the region's slots");
        return Err(convert::bad_field("kind", kind, accepted));
    }
    let blocks = request.keys.len();
    if into.slots.len() != blocks {
        let value = format!("{} entries long", into.slots.len());
        let accepted = format!("{blocks} entries, one for each key");
        return Err(convert::bad_field("into.slots", value, accepted));
    }
    match region.reserve(&into.slots) {
        Ok(reserved) => Ok(Some(Ok(reserved))),
        Err(busy @ BadSlot::Busy(_)) => Ok(Some(Err(busy))),
        Err(bad) => {
            let accepted = "slots of the region, each once";
            Err(convert::bad_field("into.slots", bad, accepted))
        }
    }
}

fn leased(leased: &run::Leased) -> v1::LeasedBlock {
    let block = &leased.block;
    v1::LeasedBlock {
        index: convert::count(leased.index),
        slot: Some(v1::Slot {
            region: ARENA_REGION,
            offset: block.arena_offset() as u64,
            length: block.payload().len() as u64,
            generation: block.generation(),
        }),
        lease: leased.hold.number(),
        tier: convert::tier(leased.tier) as i32,
        level: block.level().0.into(),
        tokens: block.facts().layout.tokens(),
        quality: v1::Quality::from(block.quality()) as i32,
    }
}

/// The end of a restore on the wire.
pub fn done(summary: run::Summary) -> v1::RestoreDone {
    let missed = summary
        .missed
        .into_iter()
        .map(|(index, miss)| v1::MissedBlock {
            index: convert::count(index),
            reason: convert::miss(miss),
        });
    v1::RestoreDone {
        usable_blocks: convert::count(summary.usable),
        missed: missed.collect(),
        cancelled: summary.cancelled,
    }
}

#[cfg(test)]
mod tests;
