//! The process: what starts in which order, and how it ends.
//!
//! Upstairs:   `bin/kvtierd.rs`.
//! Downstairs: everything.
//!
//! ```text
//!   config -> log -> state directory -> HTTP endpoint -> namespaces and their arenas
//!          -> memory populated, beside it disk tier (recovery) -> sockets -> READY=1 -> serve
//!   SIGTERM or Drain -> `end`
//! ```
//!
//! Nothing is bound before what it would serve is there, except the HTTP endpoint: operators watch
//! a recovery through it.

mod directories;
mod end;
mod listen;

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier_proto::limits::{
    HTTP2_CONNECTION_WINDOW, HTTP2_FRAME, HTTP2_STREAM_WINDOW, HTTP2_STREAMS_MAX,
    MESSAGE_BYTES_MAX, REQUEST_BYTES_MAX,
};
use kvtier_proto::v1::kvtier_server::KvtierServer;
use kvtier_store::disk::lane::LaneKind;
use kvtier_store::mem::{Arena, Pages};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};

use crate::config::{CodecLevel, Config, HugePages, Lane};
use crate::health::{Health, State};
use crate::log::chain;
use crate::metrics::{Device, Label, Metrics};
use crate::server::{Drain, SAVES_MAX, Service, Shared, descriptors};
use crate::session::Sessions;
use crate::tenant::{TenantOptions, TenantSpec, Tenants};
use crate::tier::Tiers;
use crate::tier::codecs::{Codecs, Coding};
use crate::tier::disk::{DiskOptions, DiskTier, ScrubOptions};
use crate::tier::policy::Cold;
use crate::tier::scratch::Scratch;
use crate::tier::tables;

use directories::Directories;

/// Why the daemon did not start or did not end in order.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct Failed {
    what: String,
}

fn failed(what: impl Into<String>) -> Failed {
    Failed { what: what.into() }
}

/// Share of host memory that records in flight may take: what the device can have queued.
const SCRATCH_SHARE: u64 = 8;
/// Least scratch memory. Unit: bytes.
const SCRATCH_MIN: u64 = 64 << 20;

/// From the start to the first scrub of a disk: what a restart brings back goes first.
const FIRST_SCRUB_AFTER: Duration = Duration::from_secs(600);

/// Runs the daemon until it is told to stop. Blocks.
///
/// # Errors
/// What kept it from starting.
pub fn run(config: Config) -> Result<(), Failed> {
    allow_open_files();
    let workers = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(8);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .thread_name("kvtier-serve")
        .enable_all()
        .build()
        .map_err(|problem| failed(format!("cannot start the runtime: {problem}")))?;
    runtime.block_on(serve(config))
}

/// A store keeps every segment open, and the usual soft limit is far below the hard one.
pub(crate) fn allow_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    let before = limit.current;
    limit.current = limit.maximum;
    if let Err(problem) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%problem, ?before, "the soft limit of open files stays");
    }
}

async fn serve(config: Config) -> Result<(), Failed> {
    let (health, metrics) = (Arc::new(Health::new()), Arc::new(Metrics::new()));
    // Before anybody looks: a series that shows is there from the start.
    metrics.set_devices(config.disks.len());
    let (drain, mut drained) = watch::channel(Drain::No);
    let stop = Stop::listen(drain.clone())?;
    let mut directories = Directories::prepare(&config)?;
    let _locks = std::mem::take(&mut directories.locks);

    let shared_late: Arc<std::sync::OnceLock<Arc<Shared>>> = Arc::default();
    let gauge = {
        let shared = Arc::clone(&shared_late);
        move || shared.get().into_iter().for_each(|shared| shared.gauge())
    };
    let http = listen::http(&config, &health, &metrics, gauge, stop.clone()).await?;

    let pages = match config.host.hugepages {
        HugePages::Auto => Pages::Best,
        HugePages::Off => Pages::Small,
    };
    let tenants = open_tenants(&config, pages)?;
    let scratch = Scratch::create(scratch_bytes(&config), pages)
        .map_err(|problem| failed(format!("cannot reserve scratch memory: {problem}")))?;
    let tiers = open_tiers(&config, directories, &tenants, scratch, &health, &metrics).await?;
    start_recoding(&tiers, &tenants);
    let descriptor_socket = config.server.descriptor_socket();
    let shared = Arc::new(Shared {
        tenants,
        sessions: Arc::new(Sessions::new(
            config.server.sessions_max,
            config.namespaces.len(),
        )),
        tiers,
        tickets: Arc::default(),
        health: Arc::clone(&health),
        metrics,
        started: Instant::now(),
        learned: Arc::default(),
        descriptor_socket: descriptor_socket.display().to_string(),
        limits: config.limits.clone(),
        regions: config.regions.clone(),
        drain,
        drain_limit: Duration::from_secs(config.server.drain_timeout_s.into()),
        saves: Semaphore::new(usize::try_from(SAVES_MAX).unwrap_or(1)),
    });
    let _ = shared_late.set(Arc::clone(&shared));

    let sockets = listen::sockets(&config).await?;
    let tickets = Arc::clone(&shared.tickets);
    let passing = tokio::spawn(descriptors::serve(
        sockets.descriptors,
        tickets,
        stop.clone().ended(),
    ));
    let serving = spawn_grpc(&shared, sockets.control, sockets.tcp, &stop);
    health.enter(State::Serving);
    notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!(socket = %config.server.socket.display(), "serving");

    // An operator's drain without a stop goes on serving restores.
    let _ = drained.wait_for(|state| *state >= Drain::Stop).await;
    end::end(&shared, stop, serving).await;
    let _ = passing.await;
    listen::clean_up(&config);
    health.enter(State::Stopped);
    let _ = http.await;
    tracing::info!("stopped");
    Ok(())
}

/// SIGTERM and SIGINT begin the way down; a second one ends the process at once.
#[derive(Debug, Clone)]
pub struct Stop {
    end: watch::Sender<bool>,
}

impl Stop {
    fn listen(drain: watch::Sender<Drain>) -> Result<Self, Failed> {
        let listen = |kind| signal(kind).map_err(|problem| failed(format!("signals: {problem}")));
        let (mut term, mut int) = (
            listen(SignalKind::terminate())?,
            listen(SignalKind::interrupt())?,
        );
        tokio::spawn(async move {
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            tracing::info!("told to stop; draining");
            Drain::Stop.enter(&drain);
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            tracing::warn!("told to stop again; leaving at once");
            std::process::exit(1);
        });
        Ok(Self {
            end: watch::channel(false).0,
        })
    }

    fn now(&self) {
        self.end.send_replace(true);
    }

    /// Resolves when the servers are to end.
    pub async fn ended(self) {
        let mut end = self.end.subscribe();
        let _ = end.wait_for(|end| *end).await;
    }
}

fn spawn_grpc(
    shared: &Arc<Shared>,
    control: tokio::net::UnixListener,
    tcp: Option<tokio::net::TcpListener>,
    stop: &Stop,
) -> Vec<tokio::task::JoinHandle<()>> {
    let service = KvtierServer::new(Service::new(Arc::clone(shared)))
        .max_decoding_message_size(REQUEST_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let server = || {
        tonic::transport::Server::builder()
            .initial_stream_window_size(HTTP2_STREAM_WINDOW)
            .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
            .max_frame_size(HTTP2_FRAME)
            .max_concurrent_streams(HTTP2_STREAMS_MAX)
            .tcp_nodelay(true)
            .http2_keepalive_interval(Some(Duration::from_secs(20)))
            .http2_keepalive_timeout(Some(Duration::from_secs(20)))
    };
    let over = |outcome: Result<(), tonic::transport::Error>| {
        if let Err(problem) = outcome {
            tracing::error!(%problem, "a listener ended");
        }
    };
    let unix = {
        let incoming = tokio_stream::wrappers::UnixListenerStream::new(control);
        let (service, end, mut server) = (service.clone(), stop.clone().ended(), server());
        let serve = async move {
            server
                .add_service(service)
                .serve_with_incoming_shutdown(incoming, end)
                .await
        };
        tokio::spawn(async move { over(serve.await) })
    };
    let mut serving = vec![unix];
    if let Some(tcp) = tcp {
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(tcp);
        let (end, mut server) = (stop.clone().ended(), server());
        let serve = async move {
            server
                .add_service(service)
                .serve_with_incoming_shutdown(incoming, end)
                .await
        };
        serving.push(tokio::spawn(async move { over(serve.await) }));
    }
    serving
}

fn open_tenants(config: &Config, pages: Pages) -> Result<Tenants, Failed> {
    let spec = |namespace: &crate::config::NamespaceConfig| TenantSpec {
        name: namespace.name.clone(),
        uids: namespace.uids.clone(),
        host_quota: namespace.host_quota(),
        lowest_quality: namespace.lowest_quality.into(),
        staging_max: namespace.staging_max,
    };
    let specs: Vec<_> = config.namespaces.iter().map(spec).collect();
    let server = &config.server;
    let disks: Vec<_> = config.disks.iter().map(|one| one.path.as_path()).collect();
    let options = TenantOptions {
        state_dir: &config.state.dir,
        specs: &specs,
        tcp_namespace: server.tcp.and(server.tcp_namespace.as_deref()),
        operators: config.operator.uids.as_deref().unwrap_or_default(),
        pages,
        disks: &disks,
    };
    Tenants::open(&options).map_err(|problem| failed(chain(&problem)))
}

/// Populates all memory and opens the disks. Both take long after a restart, one the cores and the
/// other mostly a disk, so that they go side by side.
async fn open_tiers(
    config: &Config,
    directories: Directories,
    tenants: &Tenants,
    scratch: Scratch,
    health: &Arc<Health>,
    metrics: &Arc<Metrics>,
) -> Result<Arc<Tiers>, Failed> {
    let coding = coding(config)?;
    metrics
        .tables
        .set(i64::try_from(coding.tables.len()).unwrap_or(i64::MAX));
    let ((), disk) = tokio::try_join!(
        populate(tenants, &scratch),
        open_disks(config, directories, tenants, health, metrics),
    )?;
    if let Some(disk) = &disk {
        disk.attach(&arenas(tenants, &scratch)).await;
    }
    Ok(Tiers::new(disk, coding, scratch, Arc::clone(metrics)))
}

/// How blocks are to be coded. Every level that the configuration names must be there.
fn coding(config: &Config) -> Result<Coding, Failed> {
    let tables = tables::load(&config.codec.tables).map_err(failed)?;
    let level = config.disks.first().map(|disk| disk.level);
    let cold_level = config.codec.cold_level;
    let codecs = Codecs::new(tables.clone());
    for (key, level) in [("disk.level", level), ("codec.cold_level", cold_level)] {
        let Some(level) = level.filter(|level| codecs.name(level.level()).is_none()) else {
            continue;
        };
        let level = level.as_str();
        return Err(failed(format!(
            "{key} is {level:?}, which nothing here codes: it needs tables of a model \
             (codec.tables), or another version of this program"
        )));
    }
    let cold = cold_level.map(|level| Cold {
        level: level.level(),
        after: Duration::from_secs(config.codec.cold_after_s.into()),
        rate: config.codec.cold_rate,
    });
    Ok(Coding {
        level: level.map_or(kvtier_proto::Level::RAW, CodecLevel::level),
        cold,
        tables,
    })
}

/// Cold blocks are re-encoded from now on, until the process ends.
fn start_recoding(tiers: &Arc<Tiers>, tenants: &Tenants) {
    let hosts = tenants.all().map(|one| Arc::clone(&one.host)).collect();
    tokio::spawn(Arc::clone(tiers).recode_cold(hosts));
}

/// All memory that blocks and records lie in.
fn arenas(tenants: &Tenants, scratch: &Scratch) -> Vec<Arc<Arena>> {
    let arenas = tenants.all().map(|tenant| Arc::clone(tenant.host.arena()));
    arenas.chain([Arc::clone(scratch.arena())]).collect()
}

/// Takes all host memory and touches it once: later there may be none, and no restore is to pay
/// for a first touch.
async fn populate(tenants: &Tenants, scratch: &Scratch) -> Result<(), Failed> {
    let arenas = arenas(tenants, scratch);
    let touched = tokio::task::spawn_blocking(move || {
        arenas.iter().try_for_each(|arena| {
            touch(arena).map_err(|problem| {
                failed(format!(
                    "cannot take {} bytes of host memory ({problem}); lower host.capacity",
                    arena.capacity()
                ))
            })
        })
    });
    let unfinished = |problem| failed(format!("host memory was not prepared: {problem}"));
    touched.await.map_err(unfinished)?
}

fn touch(arena: &Arena) -> std::io::Result<()> {
    let begin = Instant::now();
    let mut told = Instant::now();
    let pages = arena.populate(&mut |done, total| {
        if told.elapsed() > Duration::from_secs(2) {
            tracing::info!(done, total, "preparing host memory");
            told = Instant::now();
        }
    })?;
    tracing::info!(
        bytes = arena.capacity(), pages = %pages,
        seconds = begin.elapsed().as_secs_f64(), "host memory ready"
    );
    Ok(())
}

async fn open_disks(
    config: &Config,
    directories: Directories,
    tenants: &Tenants,
    health: &Arc<Health>,
    metrics: &Arc<Metrics>,
) -> Result<Option<DiskTier>, Failed> {
    if config.disks.is_empty() {
        tracing::warn!("no [[disk]] is configured: blocks do not survive a restart");
        return Ok(None);
    }
    health.enter(State::Recovering);
    let hosts: Vec<_> = tenants.all().map(|one| Arc::clone(&one.host)).collect();
    let numbers = <Device as Label>::all();
    let unusable = directories.unusable.into_iter();
    let devices = config.disks.iter().zip(numbers).zip(unusable);
    let devices = devices.map(|((disk, device), unusable)| DiskOptions {
        device,
        path: disk.path.clone(),
        capacity: disk.capacity,
        segment_size: disk.segment_size,
        queue_depth: usize::try_from(disk.queue_depth).unwrap_or(64),
        lane: match disk.lane {
            Lane::Auto => LaneKind::Auto,
            Lane::IoUring => LaneKind::IoUring,
            Lane::Pread => LaneKind::Pread,
        },
        read_limit: disk.read_limit,
        scrub: ScrubOptions {
            rate: disk.scrub_rate,
            first_after: FIRST_SCRUB_AFTER,
            every: Duration::from_secs(3600 * u64::from(disk.scrub_every_h)),
        },
        cold_after: cold_after(config),
        hosts: hosts.clone(),
        unusable,
    });
    let (health, metrics) = (Arc::clone(health), Arc::clone(metrics));
    let opened = DiskTier::open(devices.collect(), directories.ledger, health, metrics).await;
    opened.map(Some).map_err(failed)
}

/// Time without use after which a block is cold, when such blocks are asked for.
fn cold_after(config: &Config) -> Option<Duration> {
    let after = Duration::from_secs(config.codec.cold_after_s.into());
    config.codec.cold_level.map(|_| after)
}

fn scratch_bytes(config: &Config) -> usize {
    let share = config.host.capacity.get() / SCRATCH_SHARE;
    usize::try_from(share.max(SCRATCH_MIN)).unwrap_or(usize::MAX)
}

fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(problem) = sd_notify::notify(states) {
        tracing::warn!(%problem, "the service manager could not be told");
    }
}

#[cfg(test)]
mod tests;
