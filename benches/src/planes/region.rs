//! Rows of regions of an engine's own memory: 2 MiB blocks from host memory into its slots, and
//! back.
//!
//! Upstairs:   `planes`.
//! Downstairs: `kvtier_client::EngineRegion`, `memcpy` of as many blocks.
//!
//! The pool is kept by layer, as engines do: K and V of a layer lie apart from those of the next,
//! 64 KiB a slot. Once it is sealed against shrinking, so that the daemon maps it, and once not.

use std::fs::File;
use std::time::{Duration, Instant};

use kvtier_benches::report::{Problem, Report};
use kvtier_client::{
    Acknowledge, EngineRegion, PayloadKind, Piece, RegionGeometry, RestoreOptions, SaveOutcome,
    Session,
};
use rustix::fs::{MemfdFlags, SealFlags};

use super::{BLOCK_BYTES, BLOCK_TOKENS, Bed, Clock, RESIDENT, Run, latencies, speeds};

/// Blocks of one restore.
const BATCH: usize = 16;
/// The promise: of what one thread copies in memory.
const BAR: f64 = 0.85;
const LIMIT: &str = "limit.copy.batch16.gib_s";

/// Two pools of one engine.
pub(super) struct Pools {
    sealed: EngineRegion,
    open: EngineRegion,
    slots: Vec<u32>,
}

/// What was measured, a run a round.
#[derive(Default)]
pub(super) struct Rows {
    copy: Vec<Run>,
    sealed: Vec<Run>,
    open: Vec<Run>,
    one: Vec<Run>,
    save: Vec<Run>,
}

impl Pools {
    pub(super) async fn register(session: &Session) -> Result<Self, Problem> {
        let slots: Vec<u32> = (0..u32::try_from(RESIDENT)?).collect();
        Ok(Self {
            sealed: pool(session, SealFlags::SHRINK).await?,
            open: pool(session, SealFlags::empty()).await?,
            slots,
        })
    }
}

async fn pool(session: &Session, seals: SealFlags) -> Result<EngineRegion, Problem> {
    let layout = session.layout(PayloadKind::Kv, BLOCK_TOKENS)?;
    let slots = u32::try_from(RESIDENT)?;
    let mut offset = 0;
    let mut pieces = Vec::new();
    for part in layout.parts() {
        let bytes = part.len as u64;
        pieces.push(Piece::row(offset, bytes, bytes));
        offset += bytes * u64::from(slots);
    }
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("kvtier-bench-pool", flags)?);
    file.set_len(offset)?;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    // Memory that is there: no run pays for a first touch.
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, offset)?;
    let geometry = RegionGeometry {
        kind: PayloadKind::Kv,
        slots,
        pieces,
    };
    Ok(session.register_region(&file, offset, geometry).await?)
}

impl Rows {
    /// One round. The blocks are resident, and some are not afterwards.
    pub(super) async fn measure(
        &mut self,
        bed: &mut Bed,
        pools: &Pools,
        time: Duration,
    ) -> Result<(), Problem> {
        self.copy.push(bed.copy_batch(time));
        let sealed = &pools.sealed;
        let run = bed.restore_into(sealed, &pools.slots, BATCH, time);
        self.sealed.push(run.await?);
        self.copy.push(bed.copy_batch(time));
        let run = bed.restore_into(&pools.open, &pools.slots, BATCH, time);
        self.open.push(run.await?);
        let run = bed.restore_into(sealed, &pools.slots, 1, time);
        self.one.push(run.await?);
        self.save.push(bed.save_from(sealed, time).await?);
        Ok(())
    }

    pub(super) fn tell(&self, report: &mut Report) {
        let copies: Vec<f64> = speeds(&self.copy);
        report.row(LIMIT, "GiB/s", &copies);
        // Copies of a round stand before each of the two pools.
        let every = |first: usize| copies.iter().copied().skip(first).step_by(2);
        let (first, second): (Vec<f64>, Vec<f64>) = (every(0).collect(), every(1).collect());
        let rows = [
            ("region.restore.batch16", &self.sealed, &first, Some(BAR)),
            ("region.restore.unsealed.batch16", &self.open, &second, None),
            ("region.restore.2MiB", &self.one, &second, None),
            ("region.save.batch16", &self.save, &second, None),
        ];
        for (name, runs, copy, bar) in rows {
            let row = (format!("planes.{name}.gib_s"), "GiB/s");
            report.beside(row, &speeds(runs), (LIMIT, copy.as_slice()), bar);
            let p50 = latencies(runs, 0.50);
            report.row(format!("planes.{name}.us_p50"), "us", &p50);
        }
    }
}

impl Bed {
    /// The limit of these rows: as many blocks, each to a place of its own.
    fn copy_batch(&mut self, time: Duration) -> Run {
        let mut clock = Clock::start(time);
        while clock.goes_on() {
            for blocks in self.source.chunks(BLOCK_BYTES * BATCH) {
                let begin = Instant::now();
                let pairs = self.target.chunks_mut(BLOCK_BYTES);
                for (to, from) in pairs.zip(blocks.chunks(BLOCK_BYTES)) {
                    to.copy_from_slice(from);
                }
                clock.took(begin, blocks.len());
            }
        }
        clock.stop()
    }

    async fn restore_into(
        &mut self,
        region: &EngineRegion,
        slots: &[u32],
        batch: usize,
        time: Duration,
    ) -> Result<Run, Problem> {
        let mut clock = Clock::start(time);
        let mut at = 0;
        while clock.goes_on() {
            let keys = self.keys.get(at..at + batch).unwrap_or_default();
            let slots = slots.get(at..at + batch).unwrap_or_default();
            at = (at + batch) % (self.keys.len() - batch + 1);
            let begin = Instant::now();
            let options = RestoreOptions::default().scattered();
            let restored = region
                .restore(keys, slots, options)
                .await?
                .collect()
                .await?;
            if restored.placed.len() != batch {
                return Err(format!("{} of {batch} blocks arrived", restored.placed.len()).into());
            }
            clock.took(begin, batch * BLOCK_BYTES);
        }
        Ok(clock.stop())
    }

    async fn save_from(&mut self, region: &EngineRegion, time: Duration) -> Result<Run, Problem> {
        let mut clock = Clock::start(time);
        while clock.goes_on() {
            let blocks: Vec<_> = (0..u32::try_from(BATCH)?)
                .map(|slot| (self.fresh(), slot))
                .collect();
            let begin = Instant::now();
            let saved = region.save(&blocks, Acknowledge::Accepted).await?;
            if !matches!(saved.first(), Some(SaveOutcome::Stored(_))) {
                return Err(
                    format!("a block was not saved from its slot: {:?}", saved.first()).into(),
                );
            }
            clock.took(begin, BATCH * BLOCK_BYTES);
        }
        Ok(clock.stop())
    }
}
