//! Suite `planes`: what a 2 MiB block costs through shared memory, into an engine's own, inline
//! through gRPC, and from and to the device.
//!
//! Upstairs:   `kvtier-bench planes`.
//! Downstairs: the real `kvtierd` of the same build, `kvtier_client`, `memcpy`, `fio`.
//!
//! Rounds of all planes are interleaved with copies of the same blocks in this process, those of
//! the device with fio, so that every throughput is a ratio to what memory or device gave in the
//! same second. Latencies are those of every call of a run.

pub(crate) mod daemon;
mod device;
mod region;

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use kvtier_benches::report::{Problem, Report};
use kvtier_client::{
    Acknowledge, BlockKey, Bytes, Client, ConnectOptions, Element, Endpoint, LayerSpec,
    ModelDescriptor, PartOrder, PayloadKind, Reservation, RestoreOptions, SaveBlock, Session,
    SessionOptions, Shard,
};

use self::daemon::{Daemon, Room};
use crate::{Common, fio};

/// Tokens of a block; with the model below a block is 2 MiB.
pub(crate) const BLOCK_TOKENS: u32 = 64;
const BLOCK_BYTES: usize = 2 << 20;
/// Blocks that stay in host memory and are read over and over.
const RESIDENT: usize = 64;
/// Host memory of the daemon without a device. Unit: MiB.
const HOST_MIB: usize = 512;
/// A longer call counts as this long. Unit: nanoseconds.
const LATENCY_MAX_NS: u64 = 60_000_000_000;
/// Blocks of the lookup rows.
const LOOKUP_BLOCKS: usize = 1000;

/// Options of this suite.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {}

#[derive(Debug, Clone, Copy)]
struct Effort {
    rounds: usize,
    time: Duration,
}

/// One run of one plane.
struct Run {
    gib_s: f64,
    latency: Histogram<u64>,
}

pub(crate) fn run(_: &Options, common: &Common) -> Result<Report, Problem> {
    let effort = if common.quick {
        Effort {
            rounds: 2,
            time: Duration::from_millis(300),
        }
    } else {
        Effort {
            rounds: 7,
            time: Duration::from_millis(1500),
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (binary, dir) = (daemon::binary()?, common.dir.as_path());
    let mut report = Report::new("planes", dir);
    report.note("one client thread; rows beside copies: host tier only, no device");
    let room = Room {
        host_mib: HOST_MIB,
        disk: None,
    };
    let daemon = Daemon::start(&binary, dir, &room)?;
    runtime.block_on(measure(&daemon, effort, &mut report))?;
    drop(daemon);
    match fio::version() {
        Ok(fio) => {
            let measured = device::measure(&binary, dir, &fio, effort, &mut report);
            runtime.block_on(measured)?;
        }
        Err(problem) => report.note(format!("no rows of the device: {problem}")),
    }
    Ok(report)
}

/// 16 layers, 8 KV heads of 64 in bfloat16: 32 KiB a token.
pub(crate) fn model(name: &str, layers: usize, heads: u32, block_tokens: u32) -> ModelDescriptor {
    let layer = LayerSpec::Attention {
        kv_heads: heads,
        k_dim: 64,
        v_dim: 64,
        sliding_window: 0,
    };
    ModelDescriptor {
        model: name.into(),
        revision: String::new(),
        weights_fingerprint: Vec::new(),
        adapter: String::new(),
        element: Element::Bf16,
        layers: vec![layer; layers],
        d_model: 1024,
        rope: None,
        block_tokens,
        order: PartOrder::TokenMajor,
        shard: Shard::WHOLE,
        k_after_rope: true,
    }
}

async fn measure(daemon: &Daemon, effort: Effort, report: &mut Report) -> Result<(), Problem> {
    let client =
        Client::connect(Endpoint::unix(daemon.socket()), ConnectOptions::default()).await?;
    let options = SessionOptions::new("kvtier-bench planes").staging_bytes(Bytes::mib(64));
    let session = client
        .open_session(&model("bench/planes", 16, 8, BLOCK_TOKENS), options)
        .await?;
    let mut bed = Bed::new(session)?;
    let pools = region::Pools::register(&bed.session).await?;
    let (mut rows, mut regions) = (Rows::default(), region::Rows::default());
    for _ in 0..effort.rounds {
        bed.make_resident().await?;
        rows.copy.push(bed.copy(effort.time));
        rows.lease.push(bed.lease(effort.time, 1, false).await?);
        rows.lease_batch
            .push(bed.lease(effort.time, RESIDENT, false).await?);
        rows.lease_copy.push(bed.lease(effort.time, 1, true).await?);
        rows.lease_copy_batch
            .push(bed.lease(effort.time, 16, true).await?);
        rows.get_inline.push(bed.get_inline(effort.time).await?);
        // From here on new blocks push the resident ones out.
        regions.measure(&mut bed, &pools, effort.time).await?;
        rows.save.push(bed.save(effort.time).await?);
        rows.put_inline.push(bed.put_inline(effort.time).await?);
    }
    rows.tell(report);
    regions.tell(report);
    lookups(&client, effort, report).await
}

/// One session with resident blocks and memory of an engine to copy to.
struct Bed {
    session: Session,
    tokens: Vec<u32>,
    keys: Vec<BlockKey>,
    target: Vec<u8>,
    source: Vec<u8>,
    fresh: u64,
}

impl Bed {
    fn new(session: Session) -> Result<Self, Problem> {
        let tokens: Vec<u32> = (0..BLOCK_TOKENS * u32::try_from(RESIDENT)?).collect();
        let keys = session.prefix_keys(&tokens, b"");
        // Touched once, so that no run pays for a first touch.
        let (target, source) = (vec![1; BLOCK_BYTES * 16], vec![7; BLOCK_BYTES * RESIDENT]);
        Ok(Self {
            session,
            tokens,
            keys,
            target,
            source,
            fresh: 0,
        })
    }

    /// Saves what is not resident.
    async fn make_resident(&self) -> Result<(), Problem> {
        let wait = Acknowledge::Accepted;
        let fill = |block: &SaveBlock, _: &_, bytes: &mut [u8]| {
            bytes.fill(u8::try_from(block.position % 251).unwrap_or_default());
        };
        self.session
            .save_prefix(&self.tokens, b"", wait, fill)
            .await?;
        Ok(())
    }

    /// The limit: copies of whole blocks inside this process.
    fn copy(&mut self, time: Duration) -> Run {
        let mut clock = Clock::start(time);
        while clock.goes_on() {
            for block in self.source.chunks(BLOCK_BYTES) {
                let begin = Instant::now();
                for (to, from) in self.target.chunks_mut(BLOCK_BYTES).zip([block]) {
                    to.copy_from_slice(from);
                }
                clock.took(begin, block.len());
            }
        }
        clock.stop()
    }

    /// Leases `batch` blocks a call from host memory, copies them out if asked, releases them.
    async fn lease(&mut self, time: Duration, batch: usize, copy: bool) -> Result<Run, Problem> {
        let mut clock = Clock::start(time);
        let mut at = 0;
        while clock.goes_on() {
            let keys = self.keys.get(at..at + batch).unwrap_or_default();
            at = (at + batch) % (self.keys.len() - batch + 1);
            let begin = Instant::now();
            let options = RestoreOptions::default().scattered();
            let restore = self.session.restore(keys, PayloadKind::Kv, options).await?;
            let restored = restore.collect().await?;
            if copy {
                for (block, to) in restored
                    .blocks
                    .iter()
                    .zip(self.target.chunks_mut(BLOCK_BYTES))
                {
                    block.copy_into(to)?;
                }
            }
            if restored.blocks.len() != batch {
                return Err(format!("{} of {batch} blocks arrived", restored.blocks.len()).into());
            }
            clock.took(begin, batch * BLOCK_BYTES);
        }
        Ok(clock.stop())
    }

    fn fresh(&mut self) -> SaveBlock {
        self.fresh += 1;
        block_to_save(0xA5, self.fresh)
    }

    /// Reserves, fills and commits one block, until accepted.
    async fn save(&mut self, time: Duration) -> Result<Run, Problem> {
        let mut clock = Clock::start(time);
        while clock.goes_on() {
            let block = self.fresh();
            let begin = Instant::now();
            for reservation in self.session.reserve(&[block]).await? {
                let Reservation::Slot(mut slot) = reservation else {
                    return Err("a new block was not granted a slot".into());
                };
                let layout = slot.layout().clone();
                for part in layout.parts() {
                    let from = self.source.get(part.offset..part.offset + part.len);
                    slot.write_part(part.layer, part.code, from.unwrap_or_default())?;
                }
                self.session
                    .commit(vec![slot.finish()?], Acknowledge::Accepted)
                    .await?;
            }
            clock.took(begin, BLOCK_BYTES);
        }
        Ok(clock.stop())
    }

    async fn put_inline(&mut self, time: Duration) -> Result<Run, Problem> {
        let payload = self.source.get(..BLOCK_BYTES).unwrap_or_default().to_vec();
        let mut clock = Clock::start(time);
        while clock.goes_on() {
            let block = (self.fresh(), payload.clone().into());
            let begin = Instant::now();
            self.session
                .put_inline(vec![block], Acknowledge::Accepted)
                .await?;
            clock.took(begin, BLOCK_BYTES);
        }
        Ok(clock.stop())
    }

    async fn get_inline(&mut self, time: Duration) -> Result<Run, Problem> {
        let mut clock = Clock::start(time);
        let mut at = 0;
        while clock.goes_on() {
            let keys = self.keys.get(at..=at).unwrap_or_default();
            at = (at + 1) % self.keys.len();
            let begin = Instant::now();
            let options = RestoreOptions::default();
            let got = self
                .session
                .get_inline(keys, PayloadKind::Kv, options)
                .await?;
            let got = got.collect().await?;
            if got.blocks.len() != 1 {
                return Err("a resident block did not arrive inline".into());
            }
            for block in got.blocks {
                block.copy_into(self.target.get_mut(..BLOCK_BYTES).unwrap_or_default())?;
            }
            clock.took(begin, BLOCK_BYTES);
        }
        Ok(clock.stop())
    }
}

/// Block number `number` of those that `series` tells apart.
pub(crate) fn block_to_save(series: u8, number: u64) -> SaveBlock {
    let mut key = [series; 32];
    key[..8].copy_from_slice(&number.to_le_bytes());
    SaveBlock {
        key: BlockKey(key),
        parent: BlockKey::ROOT,
        position: 0,
        tokens: BLOCK_TOKENS,
        kind: PayloadKind::Kv,
        opaque_bytes: 0,
    }
}

/// Time and bytes of one run.
struct Clock {
    begin: Instant,
    time: Duration,
    bytes: usize,
    latency: Histogram<u64>,
}

impl Clock {
    fn start(time: Duration) -> Self {
        let latency = Histogram::new_with_bounds(1, LATENCY_MAX_NS, 3)
            .unwrap_or_else(|_| unreachable!("the bounds and three digits are valid"));
        Self {
            begin: Instant::now(),
            time,
            bytes: 0,
            latency,
        }
    }

    fn goes_on(&self) -> bool {
        self.begin.elapsed() < self.time
    }

    fn took(&mut self, begin: Instant, bytes: usize) {
        self.bytes += bytes;
        let nanos = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.latency.saturating_record(nanos);
    }

    fn stop(self) -> Run {
        let gib = self.bytes as f64 / f64::from(1 << 30);
        Run {
            gib_s: gib / self.begin.elapsed().as_secs_f64(),
            latency: self.latency,
        }
    }
}

#[derive(Default)]
struct Rows {
    copy: Vec<Run>,
    lease: Vec<Run>,
    lease_batch: Vec<Run>,
    lease_copy: Vec<Run>,
    lease_copy_batch: Vec<Run>,
    save: Vec<Run>,
    get_inline: Vec<Run>,
    put_inline: Vec<Run>,
}

fn speeds(runs: &[Run]) -> Vec<f64> {
    runs.iter().map(|run| run.gib_s).collect()
}

fn latencies(runs: &[Run], quantile: f64) -> Vec<f64> {
    let us = |run: &Run| run.latency.value_at_quantile(quantile) as f64 / 1000.0;
    runs.iter().map(us).collect()
}

impl Rows {
    fn tell(&self, report: &mut Report) {
        let copy = speeds(&self.copy);
        report.row("limit.copy.2MiB.gib_s", "GiB/s", &copy);
        let latency = |report: &mut Report, name: &str, runs: &[Run]| {
            report.row(
                format!("planes.{name}.us_p50"),
                "us",
                &latencies(runs, 0.50),
            );
            report.row(
                format!("planes.{name}.us_p99"),
                "us",
                &latencies(runs, 0.99),
            );
        };
        latency(report, "lease.2MiB", &self.lease);
        let per_s = |run: &Run| run.gib_s * f64::from(1 << 30) / BLOCK_BYTES as f64;
        let blocks: Vec<f64> = self.lease_batch.iter().map(per_s).collect();
        report.row("planes.lease.batch64.blocks_s", "blocks/s", &blocks);
        let limit = ("limit.copy.2MiB.gib_s", copy.as_slice());
        let copied = [
            ("lease_copy.2MiB", &self.lease_copy),
            ("lease_copy.batch16", &self.lease_copy_batch),
            ("save.accepted.2MiB", &self.save),
            ("inline.get.2MiB", &self.get_inline),
            ("inline.put.2MiB", &self.put_inline),
        ];
        for (name, runs) in copied {
            let row = (format!("planes.{name}.gib_s"), "GiB/s");
            report.beside(row, &speeds(runs), limit, None);
            latency(report, name, runs);
        }
    }
}

/// Lookup of a prefix of 1,000 small blocks.
async fn lookups(client: &Client, effort: Effort, report: &mut Report) -> Result<(), Problem> {
    let options = SessionOptions::new("kvtier-bench lookup").staging_bytes(Bytes::mib(8));
    let session = client
        .open_session(&model("bench/lookup", 1, 1, 16), options)
        .await?;
    let tokens: Vec<u32> = (0..16 * u32::try_from(LOOKUP_BLOCKS)?).collect();
    session
        .save_prefix(&tokens, b"", Acknowledge::Accepted, |_, _, bytes| {
            bytes.fill(1)
        })
        .await?;
    let keys = session.prefix_keys(&tokens, b"");
    let mut runs = Vec::new();
    for _ in 0..effort.rounds {
        let mut clock = Clock::start(effort.time);
        while clock.goes_on() {
            let begin = Instant::now();
            let lookup = session.lookup(&keys, PayloadKind::Kv).await?;
            clock.took(begin, 0);
            if lookup.prefix_blocks != keys.len() {
                return Err(
                    format!("{} of {} blocks found", lookup.prefix_blocks, keys.len()).into(),
                );
            }
        }
        runs.push(clock.stop());
    }
    report.row("planes.lookup.1000.us_p50", "us", &latencies(&runs, 0.50));
    report.row("planes.lookup.1000.us_p99", "us", &latencies(&runs, 0.99));
    Ok(())
}
