//! Calls as a client may send them, through the service that tonic serves.
//!
//! Upstairs:   the target `requests`.
//! Downstairs: `server` and every layer below it, without a disk tier.
//!
//! An input is a list of calls: a byte that chooses the method, a byte that says how many messages
//! follow, and for each message two bytes of length, the upper bit of which has the session's
//! token added, and its bytes. The calls of one input share a session, which has one staging
//! region. When it ends, nothing that it held is held.
//!
//! Not here on purpose: no Drain, which would end the daemon for all inputs to come.

mod seeds;

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use kvtier_proto::fuzzing::{Message, model};
use kvtier_proto::limits::{MESSAGE_BYTES_MAX, REQUEST_BYTES_MAX};
use kvtier_proto::v1::kvtier_server::KvtierServer;
use kvtier_proto::{Level, v1};
use kvtier_store::mem::Pages;
use tokio::sync::{Semaphore, watch};
use tonic::codegen::http;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Code, Status};
use tower::ServiceExt;

use crate::config::Config;
use crate::health::Health;
use crate::metrics::Metrics;
use crate::server::{Drain, SAVES_MAX, Service, Shared};
use crate::session::{Session, Sessions, Token};
use crate::tenant::{Peer, Tenant, TenantOptions, TenantSpec, Tenants};
use crate::tier::Tiers;
use crate::tier::scratch::Scratch;

pub(super) use seeds::seeds;

/// Calls of one input that are made.
const CALLS_MAX: usize = 6;
/// Messages of a reply that are looked at.
const REPLIES_MAX: usize = 64;
/// A call that waits for anything is given up after this.
const PATIENCE: Duration = Duration::from_millis(20);
/// What a session held is free after this at the latest.
const SETTLED: Duration = Duration::from_secs(5);
const HOST_BYTES: usize = 1 << 20;
const STAGING_BYTES: u64 = 256 << 10;

/// A method: its name, whether bytes are its message, whether it takes a stream of them, and where
/// in a message the session's token is.
struct Method {
    name: &'static str,
    reads: fn(&[u8]) -> bool,
    streams: bool,
    token: &'static [u8],
}

const fn unary(name: &'static str, reads: fn(&[u8]) -> bool) -> Method {
    Method {
        name,
        reads,
        streams: false,
        token: &[],
    }
}

const fn streaming(name: &'static str, reads: fn(&[u8]) -> bool, token: &'static [u8]) -> Method {
    Method {
        name,
        reads,
        streams: true,
        token,
    }
}

fn reads<M: Message + Default>(data: &[u8]) -> bool {
    M::decode(data).is_ok()
}

const METHODS: [Method; 16] = [
    unary("OpenSession", reads::<v1::OpenSessionRequest>),
    unary("RegisterRegion", reads::<v1::RegisterRegionRequest>),
    unary("Lookup", reads::<v1::LookupRequest>),
    unary("Save", reads::<v1::SaveRequest>),
    unary("Commit", reads::<v1::CommitRequest>),
    // A token here and below is field 1 of a message in field 2, or 1: 18 bytes.
    streaming("Restore", reads::<v1::RestoreCommand>, &[0x12, 18]),
    unary("Release", reads::<v1::ReleaseRequest>),
    unary("ReportPrefill", reads::<v1::ReportPrefillRequest>),
    unary("Pin", reads::<v1::PinRequest>),
    unary("Prefetch", reads::<v1::PrefetchRequest>),
    streaming("PutInline", reads::<v1::PutInlineRequest>, &[0x0A, 18]),
    unary("GetInline", reads::<v1::GetInlineRequest>),
    unary("Wipe", reads::<v1::WipeRequest>),
    unary("WatchEvents", reads::<v1::WatchEventsRequest>),
    unary("Explain", reads::<v1::ExplainRequest>),
    unary("Stats", reads::<v1::StatsRequest>),
];

/// A daemon without sockets and without a disk, for as long as the process lives.
struct Bed {
    runtime: tokio::runtime::Runtime,
    shared: Arc<Shared>,
    uid: u32,
}

fn bed() -> Option<&'static Bed> {
    static BED: OnceLock<Option<Bed>> = OnceLock::new();
    BED.get_or_init(make).as_ref()
}

fn make() -> Option<Bed> {
    let uid = rustix::process::getuid().as_raw();
    let folder = std::env::temp_dir().join(format!("kvtier-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).ok()?;
    let tenants = tenants(&folder, uid);
    // It is read when it is opened, and not again.
    std::fs::remove_dir_all(&folder).ok()?;
    // The user may register memory of his own, too.
    let config = Config::from_toml(&format!("[regions]\ntrusted_uids = [{uid}]")).ok()?;
    let (metrics, limits, regions) = (Arc::new(Metrics::new()), config.limits, config.regions);
    let scratch = Scratch::create(1 << 20, Pages::Small).ok()?;
    let shared = Shared {
        tenants: tenants?,
        sessions: Arc::new(Sessions::new(64, 1)),
        tiers: Tiers::new(None, Level::RAW, scratch, Arc::clone(&metrics)),
        tickets: Arc::default(),
        health: Arc::new(Health::new()),
        metrics,
        started: Instant::now(),
        learned: Arc::default(),
        descriptor_socket: String::new(),
        limits,
        regions,
        drain: watch::channel(Drain::No).0,
        drain_limit: Duration::from_secs(1),
        saves: Semaphore::new(usize::try_from(SAVES_MAX).ok()?),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    Some(Bed {
        runtime: runtime.ok()?,
        shared: Arc::new(shared),
        uid,
    })
}

fn tenants(state_dir: &Path, uid: u32) -> Option<Tenants> {
    let spec = TenantSpec {
        name: "fuzz".into(),
        uids: vec![uid],
        host_quota: kvtier_proto::Bytes(HOST_BYTES as u64),
        lowest_quality: kvtier_proto::Quality::Exact,
        staging_max: kvtier_proto::Bytes(2 * STAGING_BYTES),
    };
    let options = TenantOptions {
        state_dir,
        specs: &[spec],
        tcp_namespace: None,
        operators: &[uid],
        pages: Pages::Small,
        disks: &[],
    };
    Tenants::open(&options).ok()
}

pub(super) fn run(data: &[u8]) {
    if data.len() > REQUEST_BYTES_MAX {
        return;
    }
    let Some(bed) = bed() else { return };
    bed.runtime.block_on(bed.input(data));
}

impl Bed {
    async fn input(&self, data: &[u8]) {
        let peer = Peer::Unix {
            uid: self.uid,
            pid: 1,
        };
        let (Some(tenant), Ok(token)) = (self.shared.tenants.of(peer), Token::random()) else {
            return;
        };
        let limits = &self.shared.limits;
        let (name, model) = ("fuzz".to_owned(), model());
        let session = Session::new(token, Arc::clone(&tenant), peer, name, model, limits);
        let Ok(session) = self.shared.sessions.open(session) else {
            panic!("sessions of earlier inputs are left");
        };
        let region = session.add_region(STAGING_BYTES);
        assert!(region.is_ok_and(|region| region.is_ok()));
        let mut calls = Calls {
            rest: data,
            token: *token.expose(),
        };
        for _ in 0..CALLS_MAX {
            let Some(call) = calls.next() else { break };
            // One that waits is dropped, and must take nothing with it.
            let _ = tokio::time::timeout(PATIENCE, self.call(&call)).await;
        }
        self.shared.sessions.close(token);
        drop(session);
        gone(&tenant).await;
    }

    async fn call(&self, call: &Call) {
        // The kernel says who is at the other end of a socket, and nobody else can.
        let Ok((near, _far)) = tokio::net::UnixStream::pair() else {
            return;
        };
        let peer = UdsConnectInfo {
            peer_addr: None,
            peer_cred: near.peer_cred().ok(),
        };
        let request = http::Request::post(format!("/kvtier.v1.Kvtier/{}", call.method.name))
            .header("content-type", "application/grpc")
            .extension(peer)
            .body(Full::new(call.body.clone()));
        let Ok(request) = request else { return };
        let service = KvtierServer::new(Service::new(Arc::clone(&self.shared)))
            .max_decoding_message_size(REQUEST_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let Ok(reply) = service.oneshot(request).await;
        if let Some(status) = Status::from_header_map(reply.headers()) {
            return call.judge(&status);
        }
        let mut body = reply.into_body();
        for _ in 0..REPLIES_MAX {
            match body.frame().await {
                Some(Ok(frame)) => {
                    let trailers = frame.into_trailers().ok();
                    let status = trailers.and_then(|map| Status::from_header_map(&map));
                    status.iter().for_each(|status| call.judge(status));
                }
                Some(Err(status)) => return call.judge(&status),
                None => return,
            }
        }
    }
}

/// Everything that the session held comes home, however its calls ended.
async fn gone(tenant: &Tenant) {
    let begin = Instant::now();
    loop {
        drop(tenant.host.clear(|| ()));
        if tenant.host.used() == 0 {
            return;
        }
        let used = tenant.host.used();
        assert!(
            begin.elapsed() < SETTLED,
            "{used} bytes of host memory are held"
        );
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
}

struct Call {
    method: &'static Method,
    /// Framed as gRPC has it.
    body: Bytes,
    /// Every message is one of the method's, and as many as it takes.
    sound: bool,
}

impl Call {
    /// A refusal is the client's to understand; what is ours to answer for does not happen.
    fn judge(&self, status: &Status) {
        let name = self.method.name;
        let ours = [Code::Unknown, Code::DataLoss, Code::Aborted];
        assert!(!ours.contains(&status.code()), "{name}: {status:?}");
        assert!(
            status.code() != Code::Internal || !self.sound,
            "{name}: {status:?}"
        );
        let quiet = status.code() == Code::Ok || !status.message().is_empty();
        assert!(quiet, "{name} is refused without a word: {status:?}");
    }
}

struct Calls<'a> {
    rest: &'a [u8],
    token: [u8; 16],
}

impl Calls<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(*byte)
    }

    fn next(&mut self) -> Option<Call> {
        let which = usize::from(self.byte()?) % METHODS.len();
        let method = METHODS.get(which)?;
        let count = self.byte().unwrap_or(1) % 8;
        let (mut body, mut sound) = (Vec::new(), method.streams || count == 1);
        for _ in 0..count {
            let Some(message) = self.message(method) else {
                sound &= method.streams;
                break;
            };
            sound &= (method.reads)(&message);
            body.push(0);
            body.extend(u32::try_from(message.len()).ok()?.to_be_bytes());
            body.extend(message);
        }
        let body = Bytes::from(body);
        Some(Call {
            method,
            body,
            sound,
        })
    }

    fn message(&mut self, method: &Method) -> Option<Vec<u8>> {
        let (low, high) = (self.byte()?, self.byte()?);
        let len = usize::from(u16::from_le_bytes([low, high & 0x7F]));
        let (message, rest) = self.rest.split_at(len.min(self.rest.len()));
        self.rest = rest;
        let mut message = message.to_vec();
        if high & 0x80 != 0 {
            // The last value of a field counts, and parts of a message in a field are merged.
            message.extend_from_slice(method.token);
            message.extend_from_slice(&[0x0A, 16]);
            message.extend_from_slice(&self.token);
        }
        Some(message)
    }
}
