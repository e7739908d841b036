//! The gRPC service: every call checked at the door, then handed to the layer that does it.
//!
//! Upstairs:   tonic, over the Unix socket and optionally TCP on the loopback address.
//! Downstairs: `session`, `tenant`, `restore`, `tier`.
//!
//! Where a call does more than convert, it has a file here: `open` (sessions and regions), `save`,
//! `restore`, `inline`, `operate`, and `engine` for regions of an engine's own, `landing` for
//! blocks that go there. `descriptors` is the companion socket that passes memory; `counted` counts
//! calls as they end.
//!
//! Not here on purpose: no policy and no bytes of blocks.

pub mod convert;
mod counted;
pub mod descriptors;
pub mod engine;
pub mod explain;
pub mod inline;
mod landing;
mod learned;
pub mod open;
pub mod operate;
pub mod restore;
pub mod save;

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier_proto::v1::kvtier_server::Kvtier;
use kvtier_proto::{PayloadKind, keys_from_wire, v1};
use tokio::sync::{Semaphore, SemaphorePermit, watch};
use tokio_stream::Stream;
use tonic::transport::server::{TcpConnectInfo, UdsConnectInfo};
use tonic::{Request, Response, Status, Streaming};

use crate::config::{LimitsConfig, RegionsConfig};
use crate::health::Health;
use crate::metrics::{Found, Method, Metrics, Tier};
use crate::restore::Learned;
use crate::session::{Session, Sessions};
use crate::tenant::{Peer, Tenants};
use crate::tier::{Located, Tiers};
use counted::Counted;
use descriptors::Tickets;

/// A stream of replies.
pub type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What every call works with. One a daemon.
#[derive(Debug)]
pub struct Shared {
    /// Namespaces.
    pub tenants: Tenants,
    /// Connected clients.
    pub sessions: Arc<Sessions>,
    /// Blocks.
    pub tiers: Arc<Tiers>,
    /// What restores have learned of engines and devices.
    pub learned: Arc<Learned>,
    /// Descriptors waiting to be fetched.
    pub tickets: Arc<Tickets>,
    /// How the daemon is.
    pub health: Arc<Health>,
    /// What it counts.
    pub metrics: Arc<Metrics>,
    /// When it started.
    pub started: Instant,
    /// Where descriptors are fetched.
    pub descriptor_socket: String,
    /// What one session may hold.
    pub limits: LimitsConfig,
    /// Whose memory may be a region.
    pub regions: RegionsConfig,
    /// How far the daemon has stopped serving.
    pub drain: watch::Sender<Drain>,
    /// How long running work may go on once the daemon is told to drain or to stop.
    pub drain_limit: Duration,
    /// Leave to hand blocks over; see [`Shared::saving`].
    pub saves: Semaphore,
}

/// Calls that hand blocks over at a time. Whoever holds all of these permits knows that none does.
pub const SAVES_MAX: u32 = 1 << 20;

/// How far the daemon has stopped serving.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Drain {
    /// Not at all.
    No,
    /// No new sessions and saves.
    Draining,
    /// No new restores either; to exit when what runs has ended.
    Stop,
    /// Nothing runs any more: every stream ends.
    Ended,
}

impl Drain {
    /// Moves on to this; never back.
    pub fn enter(self, drain: &watch::Sender<Self>) {
        drain.send_if_modified(|state| {
            let fresh = *state < self;
            *state = self.max(*state);
            fresh
        });
    }
}

/// The service; cheap to clone.
#[derive(Debug, Clone)]
pub struct Service {
    shared: Arc<Shared>,
}

impl Service {
    /// The service over what the daemon has.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    async fn timed<T>(
        &self,
        method: Method,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<Response<T>, Status> {
        let mut counted = Counted::begin(&self.shared.metrics, method);
        let reply = call.await;
        counted.ended(&reply);
        reply.map(Response::new)
    }

    async fn streamed<T: 'static>(
        &self,
        method: Method,
        call: impl Future<Output = Result<Replies<T>, Status>>,
    ) -> Result<Response<Replies<T>>, Status> {
        let mut counted = Counted::begin(&self.shared.metrics, method);
        let reply = call.await;
        counted.ended(&reply);
        reply.map(|replies| Response::new(counted.stream(replies)))
    }
}

impl Shared {
    /// The session of a call.
    pub fn session<T>(&self, request: &Request<T>, token: &[u8]) -> Result<Arc<Session>, Status> {
        self.sessions.find(token, peer(request)?).ok_or_else(|| {
            Status::unauthenticated("unknown session: it has ended, or is another user's; open one")
        })
    }

    /// True once the daemon takes no new work.
    pub fn draining(&self) -> bool {
        *self.drain.borrow() != Drain::No
    }

    /// True once the daemon is to exit.
    pub fn stopping(&self) -> bool {
        *self.drain.borrow() >= Drain::Stop
    }

    /// Leave to hand blocks over, to be kept until they are accepted: what is accepted under it
    /// is flushed before the daemon stops.
    pub async fn saving(&self) -> Result<SemaphorePermit<'_>, Status> {
        let refusal = |_| Status::unavailable("the daemon is stopping; it takes no more blocks");
        self.saves.acquire().await.map_err(refusal)
    }
}

/// Who sent a request, as the kernel says.
pub fn peer<T>(request: &Request<T>) -> Result<Peer, Status> {
    if let Some(unix) = request.extensions().get::<UdsConnectInfo>() {
        let cred = unix.peer_cred.ok_or_else(|| {
            Status::unauthenticated("the kernel names no user for this Unix socket connection")
        })?;
        let pid = cred
            .pid()
            .and_then(|pid| u32::try_from(pid).ok())
            .unwrap_or(0);
        return Ok(Peer::Unix {
            uid: cred.uid(),
            pid,
        });
    }
    match request.extensions().get::<TcpConnectInfo>() {
        Some(_) => Ok(Peer::Tcp),
        None => Err(Status::unauthenticated("a connection of unknown kind")),
    }
}

/// The kind of payload a request speaks of.
pub fn kind(number: i32) -> Result<PayloadKind, Status> {
    let wire = v1::PayloadKind::try_from(number).unwrap_or(v1::PayloadKind::Unspecified);
    PayloadKind::try_from(wire).map_err(convert::invalid)
}

#[tonic::async_trait]
impl Kvtier for Service {
    type OpenSessionStream = Replies<v1::SessionEvent>;
    type RestoreStream = Replies<v1::RestoreEvent>;
    type GetInlineStream = Replies<v1::GetInlineReply>;
    type WatchEventsStream = Replies<v1::BlockEvent>;

    async fn open_session(
        &self,
        request: Request<v1::OpenSessionRequest>,
    ) -> Result<Response<Self::OpenSessionStream>, Status> {
        self.streamed(Method::OpenSession, open::session(&self.shared, request))
            .await
    }

    async fn register_region(
        &self,
        request: Request<v1::RegisterRegionRequest>,
    ) -> Result<Response<v1::RegisterRegionReply>, Status> {
        self.timed(Method::RegisterRegion, open::region(&self.shared, request))
            .await
    }

    async fn lookup(
        &self,
        request: Request<v1::LookupRequest>,
    ) -> Result<Response<v1::LookupReply>, Status> {
        self.timed(Method::Lookup, lookup(&self.shared, request))
            .await
    }

    async fn save(
        &self,
        request: Request<v1::SaveRequest>,
    ) -> Result<Response<v1::SaveReply>, Status> {
        self.timed(Method::Save, save::save(&self.shared, request))
            .await
    }

    async fn commit(
        &self,
        request: Request<v1::CommitRequest>,
    ) -> Result<Response<v1::CommitReply>, Status> {
        self.timed(Method::Commit, save::commit(&self.shared, request))
            .await
    }

    async fn restore(
        &self,
        request: Request<Streaming<v1::RestoreCommand>>,
    ) -> Result<Response<Self::RestoreStream>, Status> {
        self.streamed(Method::Restore, restore::restore(&self.shared, request))
            .await
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseRequest>,
    ) -> Result<Response<v1::ReleaseReply>, Status> {
        self.timed(Method::Release, save::release(&self.shared, request))
            .await
    }

    async fn report_prefill(
        &self,
        request: Request<v1::ReportPrefillRequest>,
    ) -> Result<Response<v1::ReportPrefillReply>, Status> {
        let reply = async { restore::report_prefill(&self.shared, &request) };
        self.timed(Method::ReportPrefill, reply).await
    }

    async fn pin(
        &self,
        request: Request<v1::PinRequest>,
    ) -> Result<Response<v1::PinReply>, Status> {
        self.timed(Method::Pin, pin(&self.shared, request)).await
    }

    async fn prefetch(
        &self,
        request: Request<v1::PrefetchRequest>,
    ) -> Result<Response<v1::PrefetchReply>, Status> {
        self.timed(Method::Prefetch, prefetch(&self.shared, request))
            .await
    }

    async fn put_inline(
        &self,
        request: Request<Streaming<v1::PutInlineRequest>>,
    ) -> Result<Response<v1::CommitReply>, Status> {
        self.timed(Method::PutInline, inline::put(&self.shared, request))
            .await
    }

    async fn get_inline(
        &self,
        request: Request<v1::GetInlineRequest>,
    ) -> Result<Response<Self::GetInlineStream>, Status> {
        self.streamed(Method::GetInline, inline::get(&self.shared, request))
            .await
    }

    async fn wipe(
        &self,
        request: Request<v1::WipeRequest>,
    ) -> Result<Response<v1::WipeReply>, Status> {
        self.timed(Method::Wipe, operate::wipe(&self.shared, request))
            .await
    }

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        self.streamed(Method::WatchEvents, operate::watch(&self.shared, request))
            .await
    }

    async fn explain(
        &self,
        request: Request<v1::ExplainRequest>,
    ) -> Result<Response<v1::ExplainReply>, Status> {
        self.timed(Method::Explain, explain::explain(&self.shared, request))
            .await
    }

    async fn stats(
        &self,
        request: Request<v1::StatsRequest>,
    ) -> Result<Response<v1::StatsReply>, Status> {
        self.timed(Method::Stats, operate::stats(&self.shared, request))
            .await
    }

    async fn drain(
        &self,
        request: Request<v1::DrainRequest>,
    ) -> Result<Response<v1::DrainReply>, Status> {
        self.timed(Method::Drain, operate::drain(&self.shared, request))
            .await
    }
}

async fn lookup(
    shared: &Shared,
    request: Request<v1::LookupRequest>,
) -> Result<v1::LookupReply, Status> {
    let session = shared.session(&request, &request.get_ref().session)?;
    let asked = request.into_inner();
    let keys = keys_from_wire("keys", &asked.keys).map_err(convert::invalid)?;
    let (host, kind) = (&session.tenant.host, kind(asked.kind)?);
    let found = shared
        .tiers
        .locate(
            host,
            kind,
            &keys,
            asked.prefix_only,
            convert::accept(asked.accept)?,
        )
        .await;
    for place in &found {
        match place {
            Ok(at) => shared.metrics.lookups.of((at.tier(), Found::Hit)).inc(),
            Err(miss) => {
                let last = if shared.tiers.disk().is_some() {
                    Tier::Disk
                } else {
                    Tier::Host
                };
                shared.metrics.lookups.of((last, Found::Miss)).inc();
                shared.metrics.misses.of(*miss).inc();
            }
        }
    }
    let prefix = found.iter().take_while(|place| place.is_ok()).count();
    Ok(v1::LookupReply {
        prefix_blocks: convert::count(prefix),
        blocks: found
            .into_iter()
            .map(|place| convert::status(place.map(Located::tier)))
            .collect(),
    })
}

async fn pin(shared: &Shared, request: Request<v1::PinRequest>) -> Result<v1::PinReply, Status> {
    let session = shared.session(&request, &request.get_ref().session)?;
    let asked = request.into_inner();
    if asked.ttl_s > shared.limits.pin_ttl_max_s {
        let accepted = format!("0 to {} seconds", shared.limits.pin_ttl_max_s);
        return Err(convert::bad_field("ttl_s", asked.ttl_s, accepted));
    }
    let keys = keys_from_wire("keys", &asked.keys).map_err(convert::invalid)?;
    let ttl = (asked.ttl_s > 0).then(|| std::time::Duration::from_secs(asked.ttl_s.into()));
    let host = &session.tenant.host;
    let blocks = shared.tiers.pin(host, kind(asked.kind)?, &keys, ttl).await;
    Ok(v1::PinReply { blocks })
}

async fn prefetch(
    shared: &Shared,
    request: Request<v1::PrefetchRequest>,
) -> Result<v1::PrefetchReply, Status> {
    let session = shared.session(&request, &request.get_ref().session)?;
    let asked = request.into_inner();
    let keys = keys_from_wire("keys", &asked.keys).map_err(convert::invalid)?;
    let (host, kind) = (&session.tenant.host, kind(asked.kind)?);
    let accept = convert::accept(asked.accept)?;
    let found = shared.tiers.locate(host, kind, &keys, true, accept).await;
    let found: Vec<_> = found
        .into_iter()
        .map(|place| place.map(Located::tier))
        .collect();
    let resident = found
        .iter()
        .take_while(|place| **place == Ok(Tier::Host))
        .count();
    let wanted = found
        .iter()
        .zip(&keys)
        .take_while(|(place, _)| place.is_ok());
    let wanted = wanted.filter(|(place, _)| **place == Ok(Tier::Disk));
    let namespace = session.tenant.id;
    let ids = wanted.map(|(_, key)| crate::block::BlockId {
        namespace,
        kind,
        key: *key,
    });
    let started = shared.tiers.prefetch(host, &session.layouts, ids, accept);
    Ok(v1::PrefetchReply {
        resident: convert::count(resident),
        started,
    })
}
