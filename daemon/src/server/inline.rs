//! The inline plane: payload in gRPC messages, for remote clients and for debugging.
//!
//! Upstairs:   `server`.
//! Downstairs: `save` and `restore::run`, as if the bytes had come through a region.
//!
//! Bounds: a message carries at most 1 MiB, a block never more than its layout says, one stream
//! holds one block at a time, and all streams of a namespace together hold no more than the
//! namespace's room for such blocks. Who waits for that room is not read from meanwhile, and who
//! holds it must go on sending.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvtier_proto::limits::{INLINE_CHUNK_MAX, KEYS_PER_CALL_MAX};
use kvtier_proto::{keys_from_wire, v1};
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tonic::{Request, Status, Streaming};

use super::save::{self, Accepted};
use super::{Replies, Shared, convert, kind, peer};
use crate::block::PlannedBlock;
use crate::restore::run::{self, Control, Restore};
use crate::session::Session;

/// Messages that wait for a slow reader.
const MESSAGES_WAITING: usize = 8;
/// Longest wait for room.
const ROOM_WAIT: std::time::Duration = std::time::Duration::from_secs(1);
/// Longest silence of a client in the middle of a transfer: others wait for the room it holds.
const SILENCE_MAX: Duration = Duration::from_secs(30);

struct Incoming {
    planned: PlannedBlock,
    crc32: u32,
    payload: Vec<u8>,
    /// Room in the namespace for `payload`.
    _room: OwnedSemaphorePermit,
}

/// Saves the blocks of a stream.
pub async fn put(
    shared: &Arc<Shared>,
    request: Request<Streaming<v1::PutInlineRequest>>,
) -> Result<v1::CommitReply, Status> {
    use v1::put_inline_request::Part;
    let peer = peer(&request)?;
    let mut parts = request.into_inner();
    let begin = Instant::now();
    let mut opened: Option<(Arc<Session>, v1::Acknowledge)> = None;
    let mut current: Option<Incoming> = None;
    let mut accepted = Accepted::new();
    while let Some(message) = next(&mut parts).await? {
        match message.part {
            Some(Part::Block(block)) => {
                if opened.is_none() {
                    let session = shared.sessions.find(&block.session, peer);
                    let session = session.ok_or_else(|| {
                        Status::unauthenticated("the first block names no session of this user")
                    })?;
                    opened = Some((session, save::wait_for(block.wait_for)?));
                }
                let Some((session, _)) = &opened else {
                    continue;
                };
                finish(shared, session, current.take(), &mut accepted).await?;
                if accepted.len() >= KEYS_PER_CALL_MAX {
                    let accepts = format!("1 to {KEYS_PER_CALL_MAX} blocks a stream");
                    return Err(convert::bad_field("block", accepted.len() + 1, accepts));
                }
                current = Some(begin_block(shared, session, &block).await?);
            }
            Some(Part::Data(data)) => append(current.as_mut(), &data)?,
            None => return Err(convert::bad_field("part", "empty", "block or data")),
        }
    }
    let Some((session, wait_for)) = opened else {
        return Err(convert::bad_field("part", "missing", "at least one block"));
    };
    finish(shared, &session, current.take(), &mut accepted).await?;
    Ok(save::settle(shared, &session, accepted, wait_for, begin).await)
}

async fn next(
    parts: &mut Streaming<v1::PutInlineRequest>,
) -> Result<Option<v1::PutInlineRequest>, Status> {
    let next = tokio::time::timeout(SILENCE_MAX, parts.message()).await;
    next.unwrap_or_else(|_| {
        let seconds = SILENCE_MAX.as_secs();
        Err(Status::deadline_exceeded(format!(
            "no message for {seconds} seconds in the middle of a transfer"
        )))
    })
}

async fn begin_block(
    shared: &Shared,
    session: &Session,
    block: &v1::PutInlineBlock,
) -> Result<Incoming, Status> {
    if shared.draining() {
        return Err(Status::unavailable(
            "the daemon is draining; it saves nothing new",
        ));
    }
    let asked = block.block.as_ref();
    let asked = asked.ok_or_else(|| convert::bad_field("block.block", "missing", "a block"))?;
    let planned = save::plan(session, "block.block", asked)?;
    let len = planned.facts.layout.payload_len();
    let quota = session.tenant.host.arena().capacity();
    if len > quota {
        return Err(Status::failed_precondition(format!(
            "a block of {len} bytes exceeds the namespace's host memory of {quota} bytes"
        )));
    }
    // The bytes themselves are reserved as they arrive: a peer pays for what it makes us hold.
    // Not for long: what a stream that is not read has sent fills the window of its connection,
    // and with it the one of the stream that has the room.
    let room = tokio::time::timeout(ROOM_WAIT, session.tenant.inline_room(len)).await;
    let room = room.map_err(|_| {
        Status::resource_exhausted(
            "other inline saves have all the room of the namespace; save again when one has ended",
        )
    })?;
    Ok(Incoming {
        planned,
        crc32: block.crc32,
        payload: Vec::new(),
        _room: room.ok_or_else(|| Status::unavailable("the daemon is stopping"))?,
    })
}

fn append(current: Option<&mut Incoming>, data: &Bytes) -> Result<(), Status> {
    let current = current.ok_or_else(|| {
        convert::bad_field(
            "part",
            "data before any block",
            "a block first, then its data",
        )
    })?;
    if data.len() as u64 > INLINE_CHUNK_MAX.get() {
        let value = format!("{} bytes long", data.len());
        return Err(convert::bad_field(
            "data",
            value,
            format!("at most {INLINE_CHUNK_MAX}"),
        ));
    }
    let (have, want) = (
        current.payload.len() + data.len(),
        current.planned.facts.layout.payload_len(),
    );
    if have > want {
        return Err(convert::bad_field(
            "data",
            format!("{have} bytes so far"),
            format!("{want} bytes"),
        ));
    }
    current.payload.extend_from_slice(data);
    Ok(())
}

async fn finish(
    shared: &Shared,
    session: &Session,
    current: Option<Incoming>,
    accepted: &mut Accepted,
) -> Result<(), Status> {
    let Some(Incoming {
        planned,
        crc32,
        payload,
        _room,
    }) = current
    else {
        return Ok(());
    };
    let (have, want) = (payload.len(), planned.facts.layout.payload_len());
    if have != want {
        return Err(convert::bad_field(
            "data",
            format!("{have} bytes"),
            format!("{want} bytes"),
        ));
    }
    let key = planned.id.key;
    let _gate = shared.saving().await?;
    accepted.push((
        key,
        save::store(shared, session, planned, payload, Some(crc32)).await,
    ));
    Ok(())
}

/// Restores blocks into a stream.
pub async fn get(
    shared: &Arc<Shared>,
    request: Request<v1::GetInlineRequest>,
) -> Result<Replies<v1::GetInlineReply>, Status> {
    let session = shared.session(&request, &request.get_ref().session)?;
    let asked = request.into_inner();
    let permit = Arc::clone(&session.restores)
        .try_acquire_owned()
        .map_err(|_| {
            Status::resource_exhausted("the session runs as many restores as it may; wait for one")
        })?;
    // Asked after the permit is taken: whoever stops the daemon waits for permits.
    if shared.stopping() {
        return Err(Status::unavailable("the daemon is stopping"));
    }
    let wanted = run::Request {
        keys: keys_from_wire("keys", &asked.keys).map_err(convert::invalid)?,
        kind: kind(asked.kind)?,
        deadline: None,
        scattered: asked.scattered,
        accept: convert::accept(asked.accept)?,
        two_ended: None,
    };
    let (out, replies) = mpsc::channel(MESSAGES_WAITING);
    let (control, listen) = watch::channel(Control::default());
    let (events, mut happened) = mpsc::channel(MESSAGES_WAITING);
    let restore = Restore {
        reader: Arc::<Session>::clone(&session),
        tiers: Arc::clone(&shared.tiers),
        metrics: Arc::clone(&shared.metrics),
        learned: Arc::clone(&shared.learned),
        request: wanted,
        control: listen,
        events,
    };
    tokio::spawn(restore.run());
    tokio::spawn(async move {
        let mut permit = Some(permit);
        while let Some(event) = happened.recv().await {
            // The place is free before the client can know, so that it may start the next.
            if matches!(event, run::Event::Done(_)) {
                permit.take();
            }
            if send(&out, event).await.is_err() {
                break;
            }
        }
        // Ends the restore when the reader has gone away.
        drop(control);
    });
    Ok(Box::pin(tokio_stream::wrappers::ReceiverStream::new(
        replies,
    )))
}

type Out = mpsc::Sender<Result<v1::GetInlineReply, Status>>;

/// Sends what an event brought. A lease lasts as long as its bytes are being sent.
async fn send(out: &Out, event: run::Event) -> Result<(), ()> {
    match event {
        run::Event::Plan(..) | run::Event::Hint => Ok(()),
        run::Event::Ready(ready) => {
            for leased in ready {
                send_block(out, &leased).await?;
            }
            Ok(())
        }
        run::Event::Done(summary) => {
            let done = super::restore::done(summary);
            send_part(out, v1::get_inline_reply::Part::Done(done)).await
        }
    }
}

async fn send_block(out: &Out, leased: &run::Leased) -> Result<(), ()> {
    use v1::get_inline_reply::Part;
    let payload = leased.block.payload();
    let block = v1::GetInlineBlock {
        index: convert::count(leased.index),
        length: payload.len() as u64,
        crc32: crc32fast::hash(payload),
        tokens: leased.block.facts().layout.tokens(),
        tier: convert::tier(leased.tier) as i32,
        level: leased.block.level().0.into(),
        quality: v1::Quality::from(leased.block.quality()) as i32,
    };
    send_part(out, Part::Block(block)).await?;
    for chunk in payload.chunks(usize::try_from(INLINE_CHUNK_MAX.get()).unwrap_or(1 << 20)) {
        send_part(out, Part::Data(Bytes::copy_from_slice(chunk))).await?;
    }
    Ok(())
}

async fn send_part(out: &Out, part: v1::get_inline_reply::Part) -> Result<(), ()> {
    out.send(Ok(v1::GetInlineReply { part: Some(part) }))
        .await
        .map_err(|_| ())
}
