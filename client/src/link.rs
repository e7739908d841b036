//! One incarnation of a session: its connection, its memory, its tasks.
//!
//! Upstairs:   `session` holds the current link and opens a new one when it is lost; slots,
//!             leases and restores keep the link that they belong to.
//! Downstairs: `rpc`, `descriptor`, `shm`, `release`, `mux`.
//!
//! The daemon keeps a session as long as the `OpenSession` stream lives. A task here holds the
//! stream; dropping the link ends the task, the stream, the session and all it held.
//!
//! Invariants kept here
//!   N1  Nothing of one link is ever used with another: session id, regions, slots and leases
//!       are reached through the link that they came from.
//!   N2  A lost link stays lost.

use std::future::Future;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvtier_proto::limits::{PROTOCOL_VERSION, REGION_BYTES_MAX};
use kvtier_proto::{KeySecret, LayoutFingerprint, v1};
use tokio::sync::OnceCell;
use tokio::task::JoinHandle;
use tonic::{Code, Response, Status, Streaming};

use crate::error::{Call, Error};
use crate::maps::{MAPS_BYTES, Maps};
use crate::mux::Mux;
use crate::options::{ConnectOptions, Endpoint, SessionOptions};
use crate::release::{Life, Releases};
use crate::reports::Reports;
use crate::rpc::{self, Rpc};
use crate::shm::{Arena, Staging};

const OPEN: Call = Call::reads("OpenSession");
const REGISTER: Call = Call::reads("RegisterRegion");

/// A call that outlives its caller may take this many times its limit before the session is
/// given up.
const PATIENCE: u32 = 10;

/// A task that ends when its owner goes.
pub(crate) struct Task(JoinHandle<()>);

impl Task {
    pub(crate) fn spawn(work: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(work))
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What it takes to open a link.
#[derive(Clone)]
pub(crate) struct Recipe {
    pub(crate) endpoint: Endpoint,
    pub(crate) connect: ConnectOptions,
    pub(crate) session: SessionOptions,
    pub(crate) model: v1::ModelDescriptor,
    pub(crate) fingerprint: LayoutFingerprint,
}

/// A mapped region and its number.
pub(crate) struct Region<M> {
    pub(crate) number: u32,
    pub(crate) map: Arc<M>,
}

/// Who the daemon says this session is.
#[derive(Clone)]
pub(crate) struct Identity {
    pub(crate) namespace: u32,
    pub(crate) name: String,
    pub(crate) secret: KeySecret,
    pub(crate) durable: bool,
    pub(crate) daemon_version: String,
}

pub(crate) struct Link {
    pub(crate) rpc: Rpc,
    pub(crate) session: Bytes,
    pub(crate) identity: Identity,
    pub(crate) life: Arc<Life>,
    pub(crate) releases: Arc<Releases>,
    pub(crate) mux: Mux,
    pub(crate) arena: Option<Region<Arena>>,
    pub(crate) staging: Option<Region<Staging>>,
    pub(crate) reports: Arc<Reports>,
    /// Maps of two-ended restores, from the first of them on.
    maps: OnceCell<Arc<Maps>>,
    socket: Option<PathBuf>,
    _tasks: [Task; 3],
}

impl Link {
    /// Opens a session over `rpc`, or over a new connection.
    pub(crate) async fn open(recipe: &Recipe, rpc: Option<Rpc>) -> Result<Arc<Self>, Error> {
        let limits = &recipe.connect.timeouts;
        let rpc = match rpc {
            Some(rpc) => rpc,
            None => rpc::connect(&recipe.endpoint, limits.connect).await?,
        };
        let opening = first_event(&rpc, recipe);
        let (events, opened) = tokio::time::timeout(limits.connect, opening)
            .await
            .map_err(|_| OPEN.timeout(limits.connect))??;
        let identity = identify(&opened, recipe.fingerprint)?;
        let socket = descriptor_socket(recipe, &opened.descriptor_socket);

        let life = Life::new();
        let releases = Releases::new(Arc::clone(&life));
        let watching = Task::spawn(watch(events, Arc::clone(&life)));
        let session = opened.session;
        let releasing = Arc::clone(&releases).run(rpc.clone(), session.clone(), limits.control);
        let reports = Arc::<Reports>::default();
        let reporting = Arc::clone(&reports).run(
            rpc.clone(),
            session.clone(),
            Arc::clone(&life),
            limits.control,
        );
        let tasks = [watching, Task::spawn(releasing), Task::spawn(reporting)];
        let arena = match (opened.arena.filter(|grant| grant.bytes > 0), &socket) {
            (Some(grant), Some(socket)) => Some(map_arena(&grant, socket, limits.control).await?),
            _ => None,
        };
        let mut link = Self {
            mux: Mux::new(rpc.clone(), Arc::clone(&life), Arc::clone(&releases)),
            rpc,
            session,
            identity,
            life,
            releases,
            arena,
            staging: None,
            reports,
            maps: OnceCell::new(),
            socket: socket.clone(),
            _tasks: tasks,
        };
        let staging = recipe.session.staging_bytes.get();
        if let (true, Some(socket)) = (staging > 0 && link.arena.is_some(), &socket) {
            link.staging = Some(link.register(staging, socket, limits.control).await?);
        }
        Ok(Arc::new(link))
    }

    async fn register(
        &self,
        bytes: u64,
        socket: &Path,
        limit: Duration,
    ) -> Result<Region<Staging>, Error> {
        let purpose = v1::RegionPurpose::Staging;
        let (number, fd, len) = self.grant(bytes, purpose, socket, limit).await?;
        let map = Staging::map(&fd, len).map_err(|e| Error::region_io("staging", "mmap", e))?;
        Ok(Region { number, map })
    }

    /// Memory for the maps of two-ended restores, made with the first of them; `None` where no
    /// memory can be shared.
    pub(crate) async fn maps(&self, limit: Duration) -> Result<Option<&Arc<Maps>>, Error> {
        let Some(socket) = &self.socket else {
            return Ok(None);
        };
        let made = self.maps.get_or_try_init(async || {
            let purpose = v1::RegionPurpose::Claims;
            let (number, fd, len) = self.grant(MAPS_BYTES, purpose, socket, limit).await?;
            let bytes = crate::shm::Bytes::map(&fd, len);
            let bytes = bytes.map_err(|e| Error::region_io("claims", "mmap", e))?;
            Ok(Maps::new(number, bytes))
        });
        made.await.map(Some)
    }

    /// Registers memory of the engine's own, and returns the number of the region.
    pub(crate) async fn hand_over(
        &self,
        request: v1::RegisterRegionRequest,
        fd: BorrowedFd<'_>,
        limit: Duration,
    ) -> Result<u32, Error> {
        let Some(socket) = &self.socket else {
            return Err(Error::region("engine", "regions need a Unix socket"));
        };
        let mut rpc = self.rpc.clone();
        let reply = self
            .call(REGISTER, limit, rpc.register_region(request))
            .await?;
        let grant = reply.grant.ok_or_else(|| REGISTER.bad_reply("no grant"))?;
        crate::descriptor::hand_over(socket, &grant, fd, limit).await?;
        Ok(grant.region)
    }

    /// Number, descriptor and size of a new region.
    async fn grant(
        &self,
        bytes: u64,
        purpose: v1::RegionPurpose,
        socket: &Path,
        limit: Duration,
    ) -> Result<(u32, OwnedFd, usize), Error> {
        let name = match purpose {
            v1::RegionPurpose::Staging => "staging",
            v1::RegionPurpose::Claims => "claims",
            v1::RegionPurpose::Engine => "engine",
        };
        let request = v1::RegisterRegionRequest {
            session: self.session.clone(),
            bytes,
            purpose: purpose.into(),
            ..v1::RegisterRegionRequest::default()
        };
        let mut rpc = self.rpc.clone();
        let reply = self
            .call(REGISTER, limit, rpc.register_region(request))
            .await?;
        let grant = reply.grant.ok_or_else(|| REGISTER.bad_reply("no grant"))?;
        if grant.bytes < bytes || grant.bytes > REGION_BYTES_MAX.get() {
            let got = grant.bytes;
            return Err(REGISTER.bad_reply(format!("{got} bytes granted of {bytes}")));
        }
        let len = mappable(&grant, name)?;
        let fd = crate::descriptor::fetch(socket, &grant, name, limit).await?;
        Ok((grant.region, fd, len))
    }

    /// Waits for one answer, no longer than `limit` and no longer than the session lives.
    /// Cancel safe as far as the call is: dropping it tells the daemon to stop.
    pub(crate) async fn call<T>(
        &self,
        call: Call,
        limit: Duration,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Error> {
        let answer = tokio::time::timeout(limit, self.answer(call, answer)).await;
        answer.unwrap_or_else(|_| Err(call.timeout(limit)))
    }

    /// Waits for one answer as long as the session lives; for work that is seen through.
    pub(crate) async fn answer<T>(
        &self,
        call: Call,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Error> {
        if self.life.is_lost() {
            let reason = self.life.lost().await;
            return Err(Call::reads(call.name).lost(reason));
        }
        tokio::select! {
            answer = answer => match answer {
                Ok(answer) => Ok(answer.into_inner()),
                Err(status) => Err(self.noticed(call.failed(&status))),
            },
            reason = self.life.lost() => Err(call.lost(reason)),
        }
    }

    /// Runs `work` to its end even when the caller goes away, so that what the daemon grants or
    /// takes is always accounted for. The caller waits no longer than `limit`.
    pub(crate) async fn see_through<T: Send + 'static>(
        self: &Arc<Self>,
        call: Call,
        limit: Duration,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let life = Arc::clone(&self.life);
        let task = tokio::spawn(async move {
            let patience = limit.saturating_mul(PATIENCE);
            // What the work holds goes only after the session is known to be lost.
            let mut work = std::pin::pin!(work);
            let done = tokio::time::timeout(patience, &mut work).await;
            done.unwrap_or_else(|_| {
                life.lose(&format!("{} did not answer within {patience:?}", call.name));
                Err(call.timeout(patience))
            })
        });
        match tokio::time::timeout(limit, task).await {
            Ok(Ok(result)) => result,
            Ok(Err(error)) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Ok(Err(_)) => Err(call.lost("the runtime is shutting down")),
            Err(_) => Err(call.timeout(limit)),
        }
    }

    /// A session that one call finds lost is lost for all.
    pub(crate) fn noticed(&self, error: Error) -> Error {
        if let Error::SessionLost { reason, .. } = &error {
            self.life.lose(reason);
        }
        error
    }
}

/// Sends the request and takes the first event, which must be `opened`.
async fn first_event(
    rpc: &Rpc,
    recipe: &Recipe,
) -> Result<(Streaming<v1::SessionEvent>, v1::SessionOpened), Error> {
    let request = v1::OpenSessionRequest {
        protocol_version: PROTOCOL_VERSION,
        client: recipe.session.client_name.clone(),
        model: Some(recipe.model.clone()),
        reader: Some(v1::ReaderSpec::from(&recipe.session.reader)),
    };
    let refused = |status: Status| match status.code() {
        Code::Unauthenticated | Code::NotFound => Error::Refused {
            message: status.message().to_owned(),
        },
        _ => OPEN.failed(&status),
    };
    let mut rpc = rpc.clone();
    let mut events = rpc
        .open_session(request)
        .await
        .map_err(refused)?
        .into_inner();
    let first = events.message().await.map_err(refused)?;
    match first.and_then(|first| first.event) {
        Some(v1::session_event::Event::Opened(opened)) => Ok((events, opened)),
        _ => Err(OPEN.bad_reply("the first event is not `opened`")),
    }
}

pub(crate) fn identify(
    opened: &v1::SessionOpened,
    ours: LayoutFingerprint,
) -> Result<Identity, Error> {
    if opened.session.len() != 16 {
        let len = opened.session.len();
        return Err(OPEN.bad_reply(format!("a session id of {len} bytes instead of 16")));
    }
    if opened.layout_fingerprint.as_ref() != ours.0 {
        let theirs = opened.layout_fingerprint.iter().take(4);
        let theirs = theirs.map(|byte| format!("{byte:02x}")).collect();
        return Err(Error::LayoutMismatch { ours, theirs });
    }
    let secret = <[u8; 32]>::try_from(opened.key_secret.as_ref()).map_err(|_| {
        let len = opened.key_secret.len();
        OPEN.bad_reply(format!("a key secret of {len} bytes instead of 32"))
    })?;
    Ok(Identity {
        namespace: opened.namespace_id,
        name: opened.namespace_name.clone(),
        secret: KeySecret::new(secret),
        durable: opened.durable,
        daemon_version: opened.daemon_version.clone(),
    })
}

/// Where descriptors are handed out; `None` on connections that cannot pass any.
fn descriptor_socket(recipe: &Recipe, said: &str) -> Option<PathBuf> {
    if said.is_empty() || matches!(recipe.endpoint, Endpoint::Tcp(_)) {
        return None;
    }
    let chosen = recipe.connect.descriptor_socket.clone();
    Some(chosen.unwrap_or_else(|| PathBuf::from(said)))
}

pub(crate) fn mappable(grant: &v1::RegionGrant, name: &'static str) -> Result<usize, Error> {
    let len = usize::try_from(grant.bytes).ok();
    let len = len.filter(|len| isize::try_from(*len).is_ok());
    len.ok_or_else(|| Error::region(name, format!("{} bytes cannot be mapped", grant.bytes)))
}

async fn map_arena(
    grant: &v1::RegionGrant,
    socket: &Path,
    limit: Duration,
) -> Result<Region<Arena>, Error> {
    let len = mappable(grant, "arena")?;
    let fd = crate::descriptor::fetch(socket, grant, "arena", limit).await?;
    let map = Arena::map(&fd, len).map_err(|e| Error::region_io("arena", "mmap", e))?;
    let number = grant.region;
    let map = Arc::new(map);
    Ok(Region { number, map })
}

/// Holds the session's stream and notices its end.
async fn watch(mut events: Streaming<v1::SessionEvent>, life: Arc<Life>) {
    use v1::session_event::Event;
    loop {
        match events.message().await {
            Ok(Some(event)) => match event.event {
                Some(Event::Draining(draining)) => life.drain(draining.reason),
                Some(Event::Opened(_)) => return life.lose("the daemon opened the session twice"),
                // An event of a later protocol; it changes nothing known here.
                None => {}
            },
            Ok(None) => return life.lose("the daemon ended the session"),
            Err(status) => return life.lose(&OPEN.failed(&status).to_string()),
        }
    }
}
