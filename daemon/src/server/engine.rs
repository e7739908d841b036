//! RegisterRegion for an engine's own memory: whose it may be, and where its slots lie.
//!
//! Upstairs:   `open`.
//! Downstairs: `session`, `region::engine`, `descriptors`, which takes the descriptor.
//!
//! Everything that can be said of a region without its descriptor is said here, in a sentence. The
//! companion socket has one byte for the rest.

use std::sync::Arc;

use kvtier_proto::region::Handover;
use kvtier_proto::{PayloadKind, RegionGeometry, v1};
use tonic::Status;

use super::{Shared, convert, open};
use crate::metrics::RegionRefused;
use crate::region::engine::EngineRegion;
use crate::session::{Session, Token};

/// Makes a region of an engine's memory and the ticket to hand it over with.
pub async fn register(
    shared: &Shared,
    session: &Arc<Session>,
    uid: u32,
    asked: &v1::RegisterRegionRequest,
) -> Result<v1::RegisterRegionReply, Status> {
    replace(shared, session, &asked.replaces).await?;
    let made = make(shared, session, uid, asked);
    let region = made.map_err(|(reason, refusal)| {
        shared.metrics.regions_refused.of(reason).inc();
        let (reason, problem) = (reason.as_str(), refusal.message());
        tracing::warn!(uid, reason, problem, "an engine's region was refused");
        refusal
    })?;
    let ticket = shared.tickets.promise(Arc::clone(&region), uid);
    let ticket = ticket.map_err(|problem| {
        region.refuse(Handover::Refused);
        open::ticket(problem)
    })?;
    let grant = v1::RegionGrant {
        region: region.number(),
        bytes: region.bytes(),
        ticket: ticket.expose().to_vec().into(),
    };
    Ok(v1::RegisterRegionReply { grant: Some(grant) })
}

/// Ends the session that the client gave up, when it has not ended yet. Nothing is copied for it
/// from then on, so that slots of a transfer whose end was never told are the engine's again.
async fn replace(shared: &Shared, session: &Session, replaces: &[u8]) -> Result<(), Status> {
    if replaces.is_empty() {
        return Ok(());
    }
    let other = Token::from_slice(replaces).filter(|token| *token != session.token);
    let Some(token) = other else {
        let value = format!("{} bytes long, or this session's", replaces.len());
        let accepted = "empty, or the 16 bytes of another session of this user";
        return Err(convert::bad_field("replaces", value, accepted));
    };
    if shared.sessions.find(replaces, session.peer).is_some() {
        let sessions = Arc::clone(&shared.sessions);
        // It waits for a copy in the middle.
        let closing = tokio::task::spawn_blocking(move || sessions.close(token));
        closing.await.map_err(open::internal)?;
    }
    Ok(())
}

fn make(
    shared: &Shared,
    session: &Session,
    uid: u32,
    asked: &v1::RegisterRegionRequest,
) -> Result<Arc<EngineRegion>, (RegionRefused, Status)> {
    if !shared.regions.trusted_uids.contains(&uid) {
        let refusal = Status::permission_denied(format!(
            "user {uid} may not register memory of its own; list it under regions.trusted_uids"
        ));
        return Err((RegionRefused::Untrusted, refusal));
    }
    let wrong = |refusal| (RegionRefused::Geometry, refusal);
    let (bytes, max) = (asked.bytes, shared.regions.session_max);
    if bytes == 0 || bytes > max.get() {
        let accepted = format!("1 B to {max} (regions.session_max)");
        return Err(wrong(convert::bad_field("bytes", bytes, accepted)));
    }
    let invalid = |problem| wrong(convert::invalid(problem));
    let geometry = RegionGeometry::from_wire(asked.geometry.as_ref()).map_err(invalid)?;
    let payload = payload(session, geometry.kind).map_err(wrong)?;
    geometry.check(bytes, payload).map_err(invalid)?;
    let metrics = Arc::clone(&shared.metrics);
    let made = session.add_engine(bytes, max.get(), |number| {
        EngineRegion::new(number, bytes, geometry, metrics)
    });
    made.map_err(|refusal| {
        let refusal = Status::resource_exhausted(refusal.to_string());
        (RegionRefused::TooMany, refusal)
    })
}

/// Bytes of a full block. `None` for opaque blocks, which have any size that the engine says.
fn payload(session: &Session, kind: PayloadKind) -> Result<Option<u64>, Status> {
    if kind == PayloadKind::Opaque {
        return Ok(None);
    }
    let block_tokens = session.layouts.model().block_tokens;
    let layout = session.layouts.get(kind, block_tokens, 0);
    let refused = |problem| {
        let value = format!("{} ({problem})", kind.as_str());
        convert::bad_field("geometry.kind", value, "a kind that the model stores")
    };
    layout
        .map(|layout| Some(layout.payload_len() as u64))
        .map_err(refused)
}
