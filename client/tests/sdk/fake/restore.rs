//! The fake's Restore stream: a plan, all blocks at once, an end; or no end, when told so.
//!
//! Upstairs:   `calls`.
//! Downstairs: `State`.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use kvtier_proto::v1;
use tokio::sync::mpsc::UnboundedSender;
use tonic::{Status, Streaming};
use v1::restore_command::Command;
use v1::restore_event::Event;

use super::State;

pub(crate) type Out = UnboundedSender<Result<v1::RestoreEvent, Status>>;

pub(crate) async fn run(state: Arc<State>, mut commands: Streaming<v1::RestoreCommand>, out: Out) {
    while let Ok(Some(command)) = commands.message().await {
        let id = command.restore_id;
        let send = |event| {
            let event = Some(event);
            let restore_id = id;
            let _ = out.send(Ok(v1::RestoreEvent { restore_id, event }));
        };
        match command.command {
            Some(Command::Start(start)) => {
                one(&state, &start, send);
                if state.knobs().break_restore {
                    let _ = out.send(Err(Status::internal("told to break")));
                    return;
                }
            }
            Some(Command::Progress(progress)) => {
                state.store().progress.push(progress.computed_blocks);
            }
            Some(Command::Cancel(_)) => {
                state.store().cancels.push(id);
                send(Event::Done(v1::RestoreDone {
                    cancelled: true,
                    ..v1::RestoreDone::default()
                }));
            }
            None => {}
        }
    }
}

fn one(state: &State, start: &v1::RestoreStart, send: impl Fn(Event)) {
    state.store().calls.push("restore");
    let map = start.two_ended.as_ref().and_then(|engine| engine.map);
    state.store().maps.push(map);
    let mut done = v1::RestoreDone::default();
    let (mut plan, mut ready) = (Vec::new(), Vec::new());
    for (index, key) in (0u32..).zip(&start.keys) {
        let stored = state.store().blocks.get(key.as_ref()).cloned();
        let open = done.missed.is_empty() || start.scattered;
        let status = match stored.filter(|_| open) {
            Some(stored) => {
                ready.push(lease(state, index, &stored));
                v1::block_status::Status::Tier(v1::Tier::Host.into())
            }
            None => {
                let reason = v1::MissReason::Absent.into();
                done.missed.push(v1::MissedBlock { index, reason });
                v1::block_status::Status::Miss(reason)
            }
        };
        let status = Some(status);
        plan.push(v1::BlockStatus { status });
    }
    let first_miss = done.missed.first().map(|missed| missed.index);
    let asked = u32::try_from(start.keys.len()).unwrap();
    done.usable_blocks = first_miss.unwrap_or(asked);
    let knobs = state.knobs();
    send(Event::Plan(v1::RestorePlan {
        blocks: plan,
        outlook: knobs.outlook,
    }));
    if knobs.lease_twice {
        ready.push(ready[0]);
    }
    send(Event::Ready(v1::BlocksReady { blocks: ready }));
    if !knobs.hold_restore && !knobs.break_restore {
        send(Event::Done(done));
    }
}

fn lease(state: &State, index: u32, stored: &super::Stored) -> v1::LeasedBlock {
    let mut arena = state.arena.lock().unwrap();
    let length = u64::try_from(stored.payload.len()).unwrap();
    let mut offset = arena.places.take(length).expect("the fake's arena is full");
    arena.file.write_all_at(&stored.payload, offset).unwrap();
    let mut store = state.store();
    store.leases_given += 1;
    let lease = store.leases_given;
    if !state.knobs().forget_leases {
        store.leases.insert(lease);
    }
    state.lease_places.lock().unwrap().insert(lease, offset);
    if state.knobs().bad_lease {
        offset = super::ARENA_LEN - length + 1;
    }
    v1::LeasedBlock {
        index,
        slot: Some(v1::Slot {
            region: 0,
            offset,
            length,
            generation: lease,
        }),
        lease,
        tier: v1::Tier::Host.into(),
        level: 0,
        tokens: stored.tokens,
        quality: 0,
    }
}
