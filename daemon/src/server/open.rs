//! OpenSession and RegisterRegion: who comes in, and which memory it shares with us.
//!
//! Upstairs:   `server`.
//! Downstairs: `tenant`, `session`, `region`, `descriptors`.
//!
//! The stream that OpenSession returns is the session's life: when tonic drops it, because the
//! client closed it, died or lost its connection, the session ends.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use kvtier_proto::limits::{CLAIMS_BYTES_MAX, NAME_BYTES_MAX, PROTOCOL_VERSION, REGION_BYTES_MIN};
use kvtier_proto::{ModelDescriptor, ReaderSpec, v1};
use tokio_stream::Stream;
use tonic::{Request, Status};

use super::descriptors::TicketError;
use super::{Drain, Replies, Shared, convert, peer};
use crate::log::clean;
use crate::metrics::SessionOutcome;
use crate::session::{ARENA_REGION, Session, Sessions, Token};
use crate::tenant::{Peer, Tenant};

/// Opens a session.
pub async fn session(
    shared: &Arc<Shared>,
    request: Request<v1::OpenSessionRequest>,
) -> Result<Replies<v1::SessionEvent>, Status> {
    let opened = open(shared, &request);
    let outcome = opened
        .as_ref()
        .map_or_else(|(outcome, _)| *outcome, |_| SessionOutcome::Opened);
    shared.metrics.sessions_opened.of(outcome).inc();
    let (session, opened) = opened.map_err(|(_, refusal)| refusal)?;
    tracing::info!(
        namespace = session.tenant.name, peer = ?session.peer, client = %clean(&session.client),
        model = %clean(&session.layouts.model().model),
        layout = session.layouts.fingerprint().short(), "session opened"
    );
    let drain = shared.drain.subscribe();
    let events = async_events(opened, drain);
    let (sessions, token) = (Arc::clone(&shared.sessions), session.token);
    Ok(Box::pin(Life {
        events,
        _end: End { sessions, token },
    }))
}

type Refused = (SessionOutcome, Status);

fn open(
    shared: &Shared,
    request: &Request<v1::OpenSessionRequest>,
) -> Result<(Arc<Session>, v1::SessionOpened), Refused> {
    if shared.draining() {
        let refusal = Status::unavailable("the daemon is draining; it takes no new sessions");
        return Err((SessionOutcome::RefusedDraining, refusal));
    }
    let (peer, tenant) =
        admit(shared, request).map_err(|refusal| (SessionOutcome::RefusedPeer, refusal))?;
    let asked = request.get_ref();
    if asked.protocol_version != PROTOCOL_VERSION {
        let (version, accepted) = (asked.protocol_version, PROTOCOL_VERSION.to_string());
        let refusal = convert::bad_field("protocol_version", version, accepted);
        return Err((SessionOutcome::RefusedVersion, refusal));
    }
    let model = model(asked).map_err(|refusal| (SessionOutcome::RefusedModel, refusal))?;
    let full = |refusal| (SessionOutcome::RefusedFull, refusal);
    let reader = ReaderSpec::from_wire(asked.reader.as_ref(), &model)
        .map_err(|problem| (SessionOutcome::RefusedModel, convert::invalid(problem)))?;
    let token = Token::random().map_err(|problem| full(internal(problem)))?;
    let (client, limits) = (asked.client.clone(), &shared.limits);
    let session = Session::new(token, Arc::clone(&tenant), peer, client, model, limits);
    let session = shared.sessions.open(session.reading(reader));
    let session =
        session.map_err(|refusal| full(Status::resource_exhausted(refusal.to_string())))?;
    // Blocks of this model can be coded with its tables from now on.
    let _ = shared.tiers.codecs().of(&session.layouts);
    // Last, so that a session that is refused leaves no ticket behind.
    let arena = arena_grant(shared, &tenant, peer).map_err(|refusal| {
        shared.sessions.close(token);
        full(refusal)
    })?;
    let socket = arena.as_ref().map(|_| shared.descriptor_socket.clone());
    let opened = v1::SessionOpened {
        session: token.expose().to_vec().into(),
        namespace_id: tenant.id.0,
        namespace_name: tenant.name.clone(),
        key_secret: tenant.key_secret.expose().to_vec().into(),
        layout_fingerprint: session.layouts.fingerprint().0.to_vec().into(),
        descriptor_socket: socket.unwrap_or_default(),
        arena,
        daemon_version: env!("CARGO_PKG_VERSION").into(),
        durable: shared.tiers.disk().is_some(),
    };
    Ok((session, opened))
}

/// Who is at the door, and which namespace that gives.
fn admit<T>(shared: &Shared, request: &Request<T>) -> Result<(Peer, Arc<Tenant>), Status> {
    let peer = peer(request)?;
    let tenant = shared.tenants.of(peer).ok_or_else(|| match peer {
        Peer::Unix { uid, .. } => Status::permission_denied(format!(
            "user {uid} belongs to no namespace; list it under [[namespace]] uids"
        )),
        Peer::Tcp => Status::permission_denied("TCP has no namespace; set server.tcp_namespace"),
    })?;
    Ok((peer, tenant))
}

fn model(asked: &v1::OpenSessionRequest) -> Result<ModelDescriptor, Status> {
    if asked.client.len() > NAME_BYTES_MAX {
        let value = format!("{} bytes long", asked.client.len());
        return Err(convert::bad_field(
            "client",
            value,
            format!("0 to {NAME_BYTES_MAX} bytes"),
        ));
    }
    let model = asked.model.as_ref();
    let model = model.ok_or_else(|| convert::bad_field("model", "missing", "a descriptor"))?;
    ModelDescriptor::try_from(model).map_err(convert::invalid)
}

/// Descriptors travel over Unix sockets only; elsewhere payload is inline.
fn arena_grant(
    shared: &Shared,
    tenant: &Tenant,
    peer: Peer,
) -> Result<Option<v1::RegionGrant>, Status> {
    let Peer::Unix { uid, .. } = peer else {
        return Ok(None);
    };
    let arena = tenant.host.arena();
    let ticket = shared.tickets.issue(arena.fd(), uid).map_err(ticket)?;
    let (region, bytes) = (ARENA_REGION, arena.capacity() as u64);
    Ok(Some(v1::RegionGrant {
        region,
        bytes,
        ticket: ticket.expose().to_vec().into(),
    }))
}

/// Makes a region.
pub async fn region(
    shared: &Shared,
    request: Request<v1::RegisterRegionRequest>,
) -> Result<v1::RegisterRegionReply, Status> {
    let session = shared.session(&request, &request.get_ref().session)?;
    let Peer::Unix { uid, .. } = session.peer else {
        return Err(Status::failed_precondition(
            "regions need a Unix socket; use PutInline and GetInline over TCP",
        ));
    };
    match v1::RegionPurpose::try_from(request.get_ref().purpose) {
        Ok(v1::RegionPurpose::Staging) => {}
        Ok(v1::RegionPurpose::Claims) => {
            return claims_region(shared, &session, uid, request.get_ref().bytes);
        }
        Ok(v1::RegionPurpose::Engine) => {
            return super::engine::register(shared, &session, uid, request.get_ref()).await;
        }
        Err(_) => {
            let purpose = request.get_ref().purpose;
            return Err(convert::bad_field(
                "purpose",
                purpose,
                "staging, claims or engine",
            ));
        }
    }
    let (bytes, max) = (request.get_ref().bytes, session.tenant.staging_max);
    if bytes < REGION_BYTES_MIN.get() || bytes > max.get() {
        return Err(convert::bad_field(
            "bytes",
            bytes,
            format!("{REGION_BYTES_MIN} to {max}"),
        ));
    }
    let made = {
        let session = Arc::clone(&session);
        tokio::task::spawn_blocking(move || session.add_region(bytes)).await
    };
    let staging = made
        .map_err(internal)?
        .map_err(|problem| {
            Status::resource_exhausted(format!("no memory for a region: {problem}"))
        })?
        .map_err(|refusal| Status::resource_exhausted(refusal.to_string()))?;
    let memory = staging.memory().fd();
    let ticket = shared.tickets.issue(memory, uid).map_err(ticket)?;
    let grant = v1::RegionGrant {
        region: staging.number(),
        bytes: staging.memory().len() as u64,
        ticket: ticket.expose().to_vec().into(),
    };
    Ok(v1::RegisterRegionReply { grant: Some(grant) })
}

/// Makes a region for the maps of two-ended restores.
fn claims_region(
    shared: &Shared,
    session: &Session,
    uid: u32,
    bytes: u64,
) -> Result<v1::RegisterRegionReply, Status> {
    if bytes == 0 || bytes > CLAIMS_BYTES_MAX.get() {
        let accepted = format!("1 to {CLAIMS_BYTES_MAX}");
        return Err(convert::bad_field("bytes", bytes, accepted));
    }
    let made = session.add_claims(usize::try_from(bytes).unwrap_or(usize::MAX));
    let (region, memory) = made
        .map_err(|problem| {
            Status::resource_exhausted(format!("no memory for a region: {problem}"))
        })?
        .map_err(|refusal| Status::resource_exhausted(refusal.to_string()))?;
    let ticket = shared.tickets.issue(memory.fd(), uid).map_err(ticket)?;
    let grant = v1::RegionGrant {
        region,
        bytes: memory.len() as u64,
        ticket: ticket.expose().to_vec().into(),
    };
    Ok(v1::RegisterRegionReply { grant: Some(grant) })
}

pub(super) fn ticket(problem: TicketError) -> Status {
    match problem {
        TicketError::TooMany { .. } => Status::resource_exhausted(problem.to_string()),
        TicketError::System(problem) => internal(problem),
    }
}

/// A defect or a lack of ours, not of the request.
pub fn internal(problem: impl std::fmt::Display) -> Status {
    tracing::error!(%problem, "a call failed for a reason of the daemon's own");
    Status::internal(problem.to_string())
}

/// `opened`, then `draining` when that comes, then nothing until the client goes away or the
/// daemon has ended everything.
fn async_events(
    opened: v1::SessionOpened,
    mut drain: tokio::sync::watch::Receiver<Drain>,
) -> Replies<v1::SessionEvent> {
    use v1::session_event::Event;
    let (sender, receiver) = tokio::sync::mpsc::channel(2);
    let event = |event| Ok(v1::SessionEvent { event: Some(event) });
    tokio::spawn(async move {
        if sender.send(event(Event::Opened(opened))).await.is_err() {
            return;
        }
        let told = async {
            let _ = drain.wait_for(|state| *state != Drain::No).await;
            let reason = "the daemon is stopping; finish restores, save nothing new".to_owned();
            let draining = Event::Draining(v1::Draining { reason });
            let _ = sender.send(event(draining)).await;
            let _ = drain.wait_for(|state| *state == Drain::Ended).await;
        };
        tokio::select! {
            () = sender.closed() => {}
            () = told => {}
        }
    });
    Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver))
}

/// Ends the session when the stream is dropped.
struct Life {
    events: Replies<v1::SessionEvent>,
    _end: End,
}

struct End {
    sessions: Arc<Sessions>,
    token: Token,
}

impl Drop for End {
    fn drop(&mut self) {
        self.sessions.close(self.token);
        tracing::info!(open = self.sessions.len(), "session closed");
    }
}

impl Stream for Life {
    type Item = Result<v1::SessionEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.events.as_mut().poll_next(context)
    }
}
