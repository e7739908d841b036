//! Wipe, WatchEvents, Stats and Drain: seeing and steering.
//!
//! Upstairs:   `server`; the `kvtier` command speaks to these.
//! Downstairs: `tenant`, `session`, `tier`.
//!
//! Operators are users the configuration names; the kernel says who a peer is. A session may steer
//! its own namespace and nobody else's.

use std::sync::Arc;

use kvtier_proto::v1;
use tokio::sync::broadcast::error::RecvError;
use tonic::{Request, Status};

use super::explain::level_name;
use super::{Drain, Replies, Shared, convert, learned, peer};
use crate::metrics::{Direction, Metrics, Tier};
use crate::tenant::{Peer, Tenant};
use crate::tier::WipeFailed;
use crate::tier::codecs::Tables;
use crate::tier::disk::{DiskStatus, Wiped};

/// The peer of a request that only operators may make.
pub(super) fn operator<T>(shared: &Shared, request: &Request<T>) -> Result<Peer, Status> {
    let peer = peer(request)?;
    if shared.tenants.is_operator(peer) {
        return Ok(peer);
    }
    Err(Status::permission_denied(match peer {
        Peer::Unix { uid, .. } => {
            format!("user {uid} is no operator; list it under [operator] uids")
        }
        Peer::Tcp => "operators connect through the Unix socket".to_owned(),
    }))
}

/// Forgets a namespace.
pub async fn wipe(
    shared: &Shared,
    request: Request<v1::WipeRequest>,
) -> Result<v1::WipeReply, Status> {
    let asked = request.get_ref();
    let tenant = if asked.namespace_name.is_empty() {
        Arc::clone(&shared.session(&request, &asked.session)?.tenant)
    } else {
        operator(shared, &request)?;
        let known = || {
            shared
                .tenants
                .all()
                .map(|tenant| tenant.name.as_str())
                .collect::<Vec<_>>()
        };
        Arc::clone(shared.tenants.named(&asked.namespace_name).ok_or_else(|| {
            convert::bad_field("namespace_name", &asked.namespace_name, known().join(", "))
        })?)
    };
    let by_operator = !asked.namespace_name.is_empty();
    let wiped = shared.tiers.wipe(&tenant.host).await.map_err(|problem| {
        tracing::error!(namespace = tenant.name, %problem, "a namespace is not wiped durably");
        Status::unavailable(told_of_a_wipe(problem, by_operator).to_string())
    })?;
    let Wiped {
        blocks,
        mut waiting,
    } = wiped;
    tracing::info!(namespace = tenant.name, blocks, ?waiting, "namespace wiped");
    if !by_operator {
        waiting.clear();
    }
    Ok(v1::WipeReply { blocks, waiting })
}

/// What the caller hears: where the operator keeps disks is not a tenant's business.
fn told_of_a_wipe(problem: WipeFailed, by_operator: bool) -> WipeFailed {
    match problem {
        WipeFailed::NotDurable(_) if !by_operator => {
            WipeFailed::NotDurable("some disk or the state directory did not take it".to_owned())
        }
        problem => problem,
    }
}

/// Streams what happens to a namespace's blocks.
pub async fn watch(
    shared: &Shared,
    request: Request<v1::WatchEventsRequest>,
) -> Result<Replies<v1::BlockEvent>, Status> {
    let session = shared.session(&request, &request.get_ref().session)?;
    let permit = Arc::clone(&session.watchers).try_acquire_owned();
    let permit = permit.map_err(|_| {
        Status::resource_exhausted("the session watches as many event streams as it may")
    })?;
    let mut events = session.tenant.host.watch();
    let mut drain = shared.drain.subscribe();
    let (out, replies) = tokio::sync::mpsc::channel(256);
    tokio::spawn(async move {
        let _permit = permit;
        let forward = async {
            loop {
                let event = match events.recv().await {
                    Ok(event) => told(event),
                    Err(RecvError::Lagged(missed)) => dropped(missed),
                    Err(RecvError::Closed) => return,
                };
                if out.send(Ok(event)).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = forward => {}
            () = out.closed() => {}
            () = session.ended() => {}
            _ = drain.wait_for(|state| *state == Drain::Ended) => {}
        }
    });
    Ok(Box::pin(tokio_stream::wrappers::ReceiverStream::new(
        replies,
    )))
}

fn told(event: crate::tier::BlockEvent) -> v1::BlockEvent {
    use v1::block_event::Event;
    let tier = convert::tier(event.tier) as i32;
    let what = match event.removed {
        None => Event::Stored(tier),
        Some(_) => Event::Removed(tier),
    };
    v1::BlockEvent {
        key: event.key.0.to_vec().into(),
        event: Some(what),
        reason: event.removed.map_or(0, convert::miss),
    }
}

/// The reader was too slow for `missed` events.
fn dropped(missed: u64) -> v1::BlockEvent {
    v1::BlockEvent {
        event: Some(v1::block_event::Event::Dropped(missed)),
        ..v1::BlockEvent::default()
    }
}

/// What the daemon is, holds and did.
pub async fn stats(
    shared: &Shared,
    request: Request<v1::StatsRequest>,
) -> Result<v1::StatsReply, Status> {
    operator(shared, &request)?;
    let sessions = shared.sessions.all();
    let mut tiers = vec![host_stats(shared)];
    if let Some(disk) = shared.tiers.disk() {
        let devices = disk.status().into_iter();
        tiers.extend(devices.map(|status| disk_stats(&shared.metrics, status)));
    }
    let namespaces = shared.tenants.all().map(|tenant| v1::NamespaceStats {
        namespace_id: tenant.id.0,
        name: tenant.name.clone(),
        host_bytes: tenant.host.used() as u64,
        host_quota_bytes: tenant.host.arena().capacity() as u64,
        blocks: tenant.host.len() as u64,
        sessions: convert::count(
            sessions
                .iter()
                .filter(|one| one.tenant.id == tenant.id)
                .count(),
        ),
        lowest_quality: v1::Quality::from(tenant.host.lowest()) as i32,
    });
    shared.gauge();
    let counters = shared.metrics.counters().into_iter();
    Ok(v1::StatsReply {
        version: env!("CARGO_PKG_VERSION").into(),
        uptime_s: shared.health.uptime().as_secs(),
        state: shared.health.state().as_str().into(),
        tiers,
        namespaces: namespaces.collect(),
        sessions: sessions.iter().map(session_stats).collect(),
        counters: counters
            .map(|(name, value)| v1::Counter { name, value })
            .collect(),
        tables: shared
            .tiers
            .codecs()
            .tables()
            .iter()
            .map(tables_stats)
            .collect(),
        rates: learned::rates(shared),
        engines: learned::engines(shared),
        met: learned::met(shared),
        level: level_name(shared, shared.tiers.level()),
        cold_level: shared
            .tiers
            .cold()
            .map_or_else(String::new, |cold| level_name(shared, cold.level)),
    })
}

fn session_stats(session: &Arc<crate::session::Session>) -> v1::SessionStats {
    let (uid, pid) = match session.peer {
        Peer::Unix { uid, pid } => (uid, pid),
        Peer::Tcp => (0, 0),
    };
    v1::SessionStats {
        client: session.client.clone(),
        namespace_id: session.tenant.id.0,
        uid,
        pid,
        leases: session.leases() as u64,
        region_bytes: session.region_bytes(),
        open_s: session.opened.elapsed().as_secs(),
        model: session.layouts.model().model.clone(),
        engine_bytes: session.engine_bytes(),
    }
}

fn tables_stats(tables: &Tables) -> v1::TablesStats {
    v1::TablesStats {
        tables: tables.id,
        model: tables.model.clone(),
        path: tables.path.display().to_string(),
    }
}

fn disk_stats(metrics: &Metrics, status: DiskStatus) -> v1::TierStats {
    let device = status.device;
    let (read, write) = ((device, Direction::Read), (device, Direction::Write));
    v1::TierStats {
        tier: v1::Tier::Disk as i32,
        name: status.path,
        capacity_bytes: status.capacity_bytes,
        used_bytes: status.used_bytes,
        blocks: status.blocks,
        state: status.state.as_str().into(),
        lane: status.lane,
        device: Some(device.number()),
        problem: status.problem,
        read_bytes: metrics.disk_bytes.of(read).get(),
        written_bytes: metrics.disk_bytes.of(write).get(),
        reads: metrics.disk_ops.of(read).get(),
        writes: metrics.disk_ops.of(write).get(),
        errors: metrics.disk_errors.of(device).get(),
    }
}

fn host_stats(shared: &Shared) -> v1::TierStats {
    let sum = |of: fn(&Tenant) -> usize| shared.tenants.all().map(|one| of(one) as u64).sum();
    let pages = shared
        .tenants
        .all()
        .next()
        .map(|tenant| tenant.host.arena().page_kind());
    v1::TierStats {
        tier: v1::Tier::Host as i32,
        name: "host memory".into(),
        capacity_bytes: sum(|tenant| tenant.host.arena().capacity()),
        used_bytes: sum(|tenant| tenant.host.used()),
        blocks: sum(|tenant| tenant.host.len()),
        state: "healthy".into(),
        lane: pages.map(|kind| kind.to_string()).unwrap_or_default(),
        ..v1::TierStats::default()
    }
}

impl Shared {
    /// Sets the gauges that nobody counts up and down: called before they are shown.
    pub fn gauge(&self) {
        let metrics = &self.metrics;
        let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let host = host_stats(self);
        metrics
            .tier_used
            .of(Tier::Host)
            .set(signed(host.used_bytes));
        metrics
            .tier_capacity
            .of(Tier::Host)
            .set(signed(host.capacity_bytes));
        metrics.tier_blocks.of(Tier::Host).set(signed(host.blocks));
        if let Some(disk) = self.tiers.disk() {
            self.gauge_disks(&disk.status());
        }
        let sessions = self.sessions.all();
        metrics.sessions.of(()).set(signed(sessions.len() as u64));
        let leases = sessions.iter().map(|session| session.leases() as u64).sum();
        metrics.leases.of(()).set(signed(leases));
        let bytes = sessions.iter().map(|session| session.region_bytes()).sum();
        metrics.region_bytes.of(()).set(signed(bytes));
        let bytes = sessions.iter().map(|session| session.engine_bytes()).sum();
        metrics.engine_region_bytes.of(()).set(signed(bytes));
    }

    fn gauge_disks(&self, devices: &[DiskStatus]) {
        let metrics = &self.metrics;
        let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let sum = |of: fn(&DiskStatus) -> u64| signed(devices.iter().map(of).sum());
        let (used, capacity) = (sum(|one| one.used_bytes), sum(|one| one.capacity_bytes));
        metrics.tier_used.of(Tier::Disk).set(used);
        metrics.tier_capacity.of(Tier::Disk).set(capacity);
        let blocks = sum(|one| one.blocks);
        metrics.tier_blocks.of(Tier::Disk).set(blocks);
        for one in devices {
            let (used, capacity) = (&metrics.disk_used, &metrics.disk_capacity);
            used.of(one.device).set(signed(one.used_bytes));
            capacity.of(one.device).set(signed(one.capacity_bytes));
            metrics.disk_blocks.of(one.device).set(signed(one.blocks));
        }
    }
}

/// Refuses new work and makes everything durable. With `then_stop` the daemon stops whether or
/// not that works: the way down has the same limit.
pub async fn drain(
    shared: &Shared,
    request: Request<v1::DrainRequest>,
) -> Result<v1::DrainReply, Status> {
    let peer = operator(shared, &request)?;
    let then_stop = request.get_ref().then_stop;
    tracing::info!(?peer, then_stop, "drain requested");
    shared.health.enter(crate::health::State::Draining);
    let to = if then_stop {
        Drain::Stop
    } else {
        Drain::Draining
    };
    to.enter(&shared.drain);
    let flushed = tokio::time::timeout(shared.drain_limit, shared.tiers.flush()).await;
    let flushed_blocks = flushed.map_err(|_| {
        let (blocks, seconds) = (shared.tiers.pending_writes(), shared.drain_limit.as_secs());
        Status::deadline_exceeded(format!(
            "{blocks} blocks did not become durable within {seconds} s (server.drain_timeout_s); \
             they are still being written"
        ))
    })?;
    Ok(v1::DrainReply { flushed_blocks })
}
