//! Suite `limits`: what the software leaves of what the machine can do.
//!
//! Upstairs:   `kvtier-bench limits`.
//! Downstairs: `kvtier_store` lanes, `fio`, `memcpy`.
//!
//! Every number of ours is taken in turn with its limit, round by round, each side first in
//! every third: shared machines drift by factors within minutes, the sides of a round do not.
//!
//! Not here on purpose: no page cache. A limit that memory serves says nothing about a device.

mod check;
mod copy;
pub(crate) mod lane;
pub(crate) mod store;

use std::path::Path;
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};
use kvtier_benches::report::{Problem, Report};
use kvtier_proto::units::{Bytes, MIB};
use kvtier_store::disk::lane::{LaneKind, LaneReport, open_lane};
use kvtier_store::disk::{Disk, FileId};
use kvtier_store::mem::{Arena, Share};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use self::store::StoreBed;
use crate::Common;
use crate::fio::{self, Job, Pattern};

/// Blocks of these sizes. Unit: MiB.
const SIZES_MIB: [u64; 2] = [1, 2];

/// Written between two syncs. Unit: bytes.
pub(crate) const SYNC_BYTES: u64 = 16 * MIB;

/// Least part of fio's speed that is good enough.
const READ_BAR: f64 = 0.80;
const WRITE_BAR: f64 = 0.75;

/// Options of this suite.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Operations in flight, on both sides.
    #[arg(long, default_value_t = 8)]
    depth: usize,
    /// Lane to measure: auto, `io_uring` or pread.
    #[arg(long, default_value_t = LaneKind::Auto)]
    lane: LaneKind,
}

/// One run of one side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) bytes: f64,
    pub(crate) seconds: f64,
    pub(crate) cpu_s: f64,
}

impl Sample {
    pub(crate) fn gib_s(self) -> f64 {
        self.gib() / self.seconds
    }

    pub(crate) fn cpu_s_per_gib(self) -> f64 {
        self.cpu_s / self.gib()
    }

    fn gib(self) -> f64 {
        self.bytes / f64::from(1 << 30)
    }
}

/// How long and how often.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Effort {
    pub(crate) rounds: usize,
    pub(crate) seconds: f64,
    /// Bytes of the test file, and capacity of the store: a host's cache treats both alike.
    pub(crate) span: u64,
}

impl Effort {
    fn new(quick: bool) -> Self {
        if quick {
            Self {
                rounds: 3,
                seconds: 0.4,
                span: 1280 * MIB,
            }
        } else {
            Self {
                rounds: 9,
                seconds: 1.0,
                span: 4096 * MIB,
            }
        }
    }
}

/// Everything that the disk parts of the suite share.
pub(crate) struct Bed {
    home: tempfile::TempDir,
    disk: Box<dyn Disk + Send>,
    file: FileId,
    arena: Arc<Arena>,
    fio_arena: Arc<Arena>,
    store: StoreBed,
    read_cost: Vec<f64>,
    depth: usize,
    effort: Effort,
}

/// Runs the suite.
pub(crate) fn run(options: &Options, common: &Common) -> Result<Report, Problem> {
    let fio = fio::version()?;
    let effort = Effort::new(common.quick);
    let mut report = Report::new("limits", &common.dir);
    report.note(format!(
        "limit of the device: {fio}, io_uring, direct, depth {}",
        options.depth
    ));
    copy::run(&mut report, effort);
    let (mut bed, lane) = Bed::make(options, &common.dir, effort)?;
    bed.describe(&mut report, &lane);
    for mib in SIZES_MIB {
        let fill = bed.store.fill(mib, effort.span)?;
        report.row(
            format!("store.fill.{mib}MiB.gib_s"),
            "GiB/s",
            &[fill.gib_s()],
        );
        bed.reads(&mut report, mib)?;
        bed.writes(&mut report, mib)?;
    }
    report.row("store.read.cpu_s_per_gib", "s/GiB", &bed.read_cost);
    Ok(report)
}

/// An arena whose memory is there and holds bytes that do not compress: storage below may treat
/// zeros as nothing to store.
pub(crate) fn noisy_arena(name: &str, len: u64) -> Result<Arc<Arena>, Problem> {
    let arena = Arena::create(name, usize::try_from(len)?, Share::Private)?;
    arena.populate(&mut |_, _| ())?;
    let mut all = arena
        .alloc(arena.capacity())
        .ok_or("a new arena is not empty")?;
    ChaCha8Rng::seed_from_u64(len).fill(&mut *all);
    Ok(arena)
}

impl Bed {
    fn make(options: &Options, dir: &Path, effort: Effort) -> Result<(Self, LaneReport), Problem> {
        let home = tempfile::Builder::new()
            .prefix("kvtier-bench-")
            .tempdir_in(dir)?;
        let room = 2 * MIB * (options.depth as u64 + 2);
        let arena = noisy_arena("bench", room)?;
        let fio_arena = noisy_arena("bench-fio", room)?;
        let arenas = std::slice::from_ref(&arena);
        let lane = open_lane(home.path(), options.lane, options.depth, arenas)?;
        let mut disk = lane.disk;
        let file = disk.create("span", effort.span)?;
        let depth = options.depth;
        let store = StoreBed::make(home.path(), options.lane, depth, effort.span)?;
        let mut bed = Self {
            home,
            disk,
            file,
            arena,
            fio_arena,
            store,
            read_cost: Vec::new(),
            depth,
            effort,
        };
        bed.fill()?;
        Ok((bed, lane.report))
    }

    /// Writes the whole file once: space that was only reserved reads as zeros without a device.
    fn fill(&mut self) -> Result<(), Problem> {
        let style = ProgressStyle::with_template("writing {bytes}/{total_bytes} {bar:30}")?;
        let bar = ProgressBar::new(self.effort.span).with_style(style);
        self.lane(2 * MIB).fill(&bar)?;
        bar.finish_and_clear();
        Ok(())
    }

    fn lane(&mut self, size: u64) -> lane::Run<'_> {
        lane::Run::new(
            &mut *self.disk,
            self.file,
            &self.arena,
            size,
            self.effort.span,
            self.depth,
        )
    }

    fn describe(&self, report: &mut Report, lane: &LaneReport) {
        report.note(format!(
            "our lane: {}, direct: {}, alignment {}; pages: ours {}, fio's {}; file of {}",
            lane.lane,
            lane.direct,
            lane.align,
            self.arena.page_kind(),
            self.fio_arena.page_kind(),
            Bytes(self.effort.span),
        ));
        lane.without
            .iter()
            .for_each(|text| report.note(format!("without {text}")));
    }

    fn reads(&mut self, report: &mut Report, mib: u64) -> Result<(), Problem> {
        let rounds = self.rounds(mib, Pattern::RandomRead)?;
        rounds.report(report, &format!("read.random.{mib}MiB"), READ_BAR);
        self.read_cost
            .extend(rounds.store.iter().map(|sample| sample.cpu_s_per_gib()));
        Ok(())
    }

    fn writes(&mut self, report: &mut Report, mib: u64) -> Result<(), Problem> {
        let sync_every = SYNC_BYTES / (mib * MIB);
        let before = self.store.syncs();
        let rounds = self.rounds(mib, Pattern::DurableWrite { sync_every })?;
        rounds.report(report, &format!("write.durable.{mib}MiB"), WRITE_BAR);
        let written: f64 = rounds.store.iter().map(|sample| sample.bytes).sum();
        let per_sync = written / 1e6 / (self.store.syncs() - before).max(1) as f64;
        report.note(format!(
            "store, {mib} MiB: {per_sync:.0} MB became durable with each sync"
        ));
        // What a sync costs on this device, for whoever wonders about the rows above.
        let unsynced: Result<Vec<f64>, Problem> = (0..self.effort.rounds)
            .map(|_| Ok(self.run(Side::Fio, mib, Pattern::Write)?.gib_s()))
            .collect();
        report.row(
            format!("limit.write.unsynced.{mib}MiB.gib_s"),
            "GiB/s",
            &unsynced?,
        );
        Ok(())
    }

    /// Runs the sides in turn, each first in every third round.
    fn rounds(&mut self, mib: u64, pattern: Pattern) -> Result<Rounds, Problem> {
        let mut rounds = Rounds::default();
        for round in 0..self.effort.rounds {
            let mut order = [Side::Lane, Side::Fio, Side::Store];
            order.rotate_left(round % 3);
            for side in order {
                let sample = self.run(side, mib, pattern)?;
                match side {
                    Side::Lane => rounds.lane.push(sample),
                    Side::Fio => rounds.limit.push(sample),
                    Side::Store => rounds.store.push(sample),
                }
            }
        }
        Ok(rounds)
    }

    /// One sample of one side.
    fn run(&mut self, side: Side, mib: u64, pattern: Pattern) -> Result<Sample, Problem> {
        let Effort { span, seconds, .. } = self.effort;
        let size = mib * MIB;
        match (side, pattern) {
            (Side::Lane, Pattern::RandomRead) => self.lane(size).read_random(seconds),
            (Side::Lane, Pattern::Write) => self.lane(size).write_durable(seconds, u64::MAX / size),
            (Side::Lane, Pattern::DurableWrite { sync_every }) => {
                self.lane(size).write_durable(seconds, sync_every)
            }
            (Side::Lane, Pattern::Read | Pattern::Mixed { .. }) => {
                Err("this suite has no such row".into())
            }
            (Side::Store, Pattern::RandomRead) => self.store.restore(mib, seconds),
            (Side::Store, _) => self.store.save(mib, seconds),
            (Side::Fio, pattern) => {
                let (depth, arena) = (self.depth, &*self.fio_arena);
                let file = &self.home.path().join("span");
                Job {
                    pattern,
                    file,
                    span,
                    size,
                    depth,
                    seconds,
                    arena,
                }
                .run()
            }
        }
    }
}

/// Who moves the bytes.
#[derive(Debug, Clone, Copy)]
enum Side {
    Lane,
    Store,
    Fio,
}

/// What a row says of a sample.
type Quantity = fn(Sample) -> f64;

/// Samples of the three sides, taken in turn: equal places were taken in one round.
#[derive(Debug, Default)]
struct Rounds {
    lane: Vec<Sample>,
    store: Vec<Sample>,
    limit: Vec<Sample>,
}

impl Rounds {
    /// Speed and CPU cost of each side.
    fn report(&self, report: &mut Report, what: &str, bar: f64) {
        let quantities: [(&str, &str, Quantity, Option<f64>); 2] = [
            ("gib_s", "GiB/s", Sample::gib_s, Some(bar)),
            ("cpu_s_per_gib", "s/GiB", Sample::cpu_s_per_gib, None),
        ];
        for (quantity, unit, of, bar) in quantities {
            let values =
                |side: &[Sample]| side.iter().map(|sample| of(*sample)).collect::<Vec<_>>();
            let (limit, limits) = (format!("limit.{what}.{quantity}"), values(&self.limit));
            report.row(limit.clone(), unit, &limits);
            for (side, samples, bar) in [("lane", &self.lane, None), ("store", &self.store, bar)] {
                let name = (format!("{side}.{what}.{quantity}"), unit);
                report.beside(name, &values(samples), (&limit, &limits), bar);
            }
        }
    }
}
