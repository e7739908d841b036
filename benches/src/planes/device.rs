//! Blocks between a device and mapped memory through the whole daemon, beside fio.
//!
//! Upstairs:   `planes`.
//! Downstairs: a `kvtierd` with a disk tier, `kvtier_client`, `fio`.
//!
//! A restore ends when its blocks lie verified in memory that the client has mapped: nothing is
//! copied out. The blocks are asked for in one random order over and over, and they are many more
//! than host memory holds, so each was evicted when its turn comes; one that was not ends the
//! suite. A save counts from reserving to durable, the engine's writing included.
//!
//! Not here on purpose: no level but raw. What a codec costs is the suite `codecs`.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use kvtier_benches::report::{Problem, Report};
use kvtier_client::{
    Acknowledge, BlockKey, Bytes, Client, ConnectOptions, Endpoint, PayloadKind, RestoreOptions,
    SaveBlock, Session, SessionOptions, Tier,
};
use kvtier_store::mem::Arena;
use rand::seq::SliceRandom as _;
use rand::{RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::daemon::{Daemon, Room};
use super::{
    BLOCK_BYTES, BLOCK_TOKENS, Clock, Effort, Run, block_to_save, latencies, model, speeds,
};
use crate::fio::{Job, Pattern};
use crate::limits::noisy_arena;

/// Blocks of one restore and of one save.
const BATCH: usize = 64;
/// Operations in flight on the device, on both sides.
const DEPTH: usize = 8;
/// Host memory. Unit: MiB.
const HOST_MIB: usize = 384;
/// Most blocks that host memory holds.
const HOST_BLOCKS: usize = (HOST_MIB << 20) / BLOCK_BYTES;
/// Blocks on the device. Each is evicted before its turn comes again.
const BLOCKS: usize = 1024;
/// Capacity on the device: the blocks, their heads, and segments to write to. Unit: MiB.
const DISK_MIB: u64 = 3072;
/// fio syncs after this many writes; 16 MiB as in the suite `limits`.
const SYNC_EVERY: u64 = 8;
/// Bytes that do not compress, from which every block takes some. Unit: bytes.
const NOISE_BYTES: usize = 16 << 20;

/// Measures and adds the rows. `fio` is its version.
pub(super) async fn measure(
    binary: &Path,
    dir: &Path,
    fio: &str,
    effort: Effort,
    report: &mut Report,
) -> Result<(), Problem> {
    let room = Room {
        host_mib: HOST_MIB,
        disk: Some((DISK_MIB, DEPTH)),
    };
    let daemon = Daemon::start(binary, dir, &room)?;
    let endpoint = Endpoint::unix(daemon.socket());
    let client = Client::connect(endpoint, ConnectOptions::default()).await?;
    let options = SessionOptions::new("kvtier-bench device").staging_bytes(Bytes::mib(64));
    let model = model("bench/device", 16, 8, BLOCK_TOKENS);
    let session = client.open_session(&model, options).await?;
    let limit = Limit::make(dir, effort)?;
    let mut bed = Bed::new(session);
    bed.fill().await?;
    report.note(format!(
        "device rows: {fio}, io_uring, direct, depth {DEPTH}; {BLOCKS} blocks, level raw, \
         {HOST_MIB} MiB of host memory"
    ));
    let (mut ours, mut limits) = (Vec::new(), Vec::new());
    for ours_now in turns(effort) {
        if ours_now {
            ours.push(bed.restore(effort).await?);
        } else {
            limits.push(limit.run(Pattern::RandomRead)?);
        }
    }
    let names = ["restore.disk.batch64", "read.random.2MiB"];
    tell(report, names, &ours, &limits);
    let (mut ours, mut limits) = (Vec::new(), Vec::new());
    let sync_every = SYNC_EVERY;
    for ours_now in turns(effort) {
        if ours_now {
            ours.push(bed.save(effort).await?);
        } else {
            limits.push(limit.run(Pattern::DurableWrite { sync_every })?);
        }
    }
    let names = ["save.durable.batch64", "write.durable.2MiB"];
    tell(report, names, &ours, &limits);
    Ok(())
}

/// Whether it is our turn or fio's, round by round, each first in every second.
fn turns(effort: Effort) -> impl Iterator<Item = bool> {
    (0..effort.rounds).flat_map(|round| [round % 2 == 0, round % 2 == 1])
}

fn tell(report: &mut Report, [name, limit]: [&str; 2], ours: &[Run], limits: &[f64]) {
    let limit = format!("limit.{limit}.gib_s");
    report.row(limit.clone(), "GiB/s", limits);
    let row = (format!("planes.{name}.gib_s"), "GiB/s");
    report.beside(row, &speeds(ours), (&limit, limits), None);
    for (name_of, quantile) in [("us_p50", 0.50), ("us_p99", 0.99)] {
        let row = format!("planes.{name}.{name_of}");
        report.row(row, "us", &latencies(ours, quantile));
    }
}

/// One session, the blocks on the device in the order of their turns, and bytes for them.
struct Bed {
    session: Session,
    order: Vec<BlockKey>,
    turn: usize,
    made: u64,
    noise: Vec<u8>,
}

impl Bed {
    fn new(session: Session) -> Self {
        let mut noise = vec![0; NOISE_BYTES];
        ChaCha8Rng::seed_from_u64(1).fill_bytes(&mut noise);
        Self {
            session,
            order: Vec::new(),
            turn: 0,
            made: 0,
            noise,
        }
    }

    /// Puts the blocks on the device, and everything out of host memory that is not in turn.
    async fn fill(&mut self) -> Result<(), Problem> {
        while self.order.len() < BLOCKS {
            let blocks = self.save_batch().await?;
            self.order.extend(blocks.iter().map(|block| block.key));
        }
        self.order.shuffle(&mut ChaCha8Rng::seed_from_u64(2));
        for _ in 0..HOST_BLOCKS.div_ceil(BATCH) {
            self.restore_batch().await?;
        }
        Ok(())
    }

    async fn restore(&mut self, effort: Effort) -> Result<Run, Problem> {
        let mut clock = Clock::start(effort.time);
        while clock.goes_on() {
            let begin = Instant::now();
            let from_disk = self.restore_batch().await?;
            clock.took(begin, BATCH * BLOCK_BYTES);
            if from_disk != BATCH {
                return Err(format!("{from_disk} of {BATCH} blocks came from the device").into());
            }
        }
        Ok(clock.stop())
    }

    /// Restores the blocks whose turn it is; how many came from the device.
    async fn restore_batch(&mut self) -> Result<usize, Problem> {
        let keys = self.order.get(self.turn..self.turn + BATCH);
        let keys = keys.unwrap_or_default();
        self.turn = (self.turn + BATCH) % BLOCKS;
        let options = RestoreOptions::default().scattered();
        let restore = self.session.restore(keys, PayloadKind::Kv, options).await?;
        let (mut right, mut from_disk) = (0, 0);
        let visit = |leased: &kvtier_client::LeasedBlock, bytes: &[u8]| {
            right += usize::from(bytes.get(..8) == leased.key().0.get(..8));
            from_disk += usize::from(leased.tier() == Tier::Disk);
        };
        restore.for_each(visit).await?;
        if right != BATCH {
            return Err(format!("{right} of {BATCH} blocks arrived").into());
        }
        Ok(from_disk)
    }

    async fn save(&mut self, effort: Effort) -> Result<Run, Problem> {
        let mut clock = Clock::start(effort.time);
        while clock.goes_on() {
            let begin = Instant::now();
            self.save_batch().await?;
            clock.took(begin, BATCH * BLOCK_BYTES);
        }
        Ok(clock.stop())
    }

    /// Saves new blocks and waits until they are durable.
    async fn save_batch(&mut self) -> Result<Vec<SaveBlock>, Problem> {
        let blocks: Vec<SaveBlock> = (0..BATCH).map(|_| self.new_block()).collect();
        let noise = &self.noise;
        let fill = |block: &SaveBlock, part: &kvtier_client::Part, bytes: &mut [u8]| {
            let [a, b, ..] = block.key.0;
            // An odd step through the noise for each block: no two parts lie at one place.
            let at = (usize::from(u16::from_le_bytes([a, b])) * 4099 + part.offset)
                % (noise.len() - bytes.len());
            bytes.copy_from_slice(noise.get(at..at + bytes.len()).unwrap_or_default());
            if let (0, Some(start)) = (part.offset, bytes.get_mut(..8)) {
                start.copy_from_slice(block.key.0.get(..8).unwrap_or_default());
            }
        };
        let wait = Acknowledge::Durable;
        let saved = self.session.save_blocks(blocks.clone(), wait, fill).await?;
        match saved.iter().find(|outcome| !outcome.is_stored(wait)) {
            Some(outcome) => Err(format!("a block did not become durable: {outcome:?}").into()),
            None => Ok(blocks),
        }
    }

    fn new_block(&mut self) -> SaveBlock {
        self.made += 1;
        block_to_save(0x5A, self.made)
    }
}

/// fio on a file as large as all blocks, on the same device.
struct Limit {
    home: tempfile::TempDir,
    arena: Arc<Arena>,
    seconds: f64,
}

impl Limit {
    fn make(dir: &Path, effort: Effort) -> Result<Self, Problem> {
        let home = tempfile::Builder::new()
            .prefix("kvtier-bench")
            .tempdir_in(dir)?;
        let size = BLOCK_BYTES as u64;
        let arena = noisy_arena("bench-fio", size * (DEPTH as u64 + 2))?;
        // Space that was only reserved reads as zeros without a device.
        let mut file = std::fs::File::create(home.path().join("span"))?;
        let mut block = vec![0; BLOCK_BYTES];
        let mut noise = ChaCha8Rng::seed_from_u64(3);
        for _ in 0..BLOCKS {
            noise.fill_bytes(&mut block);
            file.write_all(&block)?;
        }
        file.sync_all()?;
        let seconds = effort.time.as_secs_f64();
        Ok(Self {
            home,
            arena,
            seconds,
        })
    }

    fn run(&self, pattern: Pattern) -> Result<f64, Problem> {
        let size = BLOCK_BYTES as u64;
        let job = Job {
            pattern,
            file: &self.home.path().join("span"),
            span: size * BLOCKS as u64,
            size,
            depth: DEPTH,
            seconds: self.seconds,
            arena: &self.arena,
        };
        Ok(job.run()?.gib_s())
    }
}
