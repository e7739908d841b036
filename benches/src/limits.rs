//! Suite `limits`: what the software leaves of what the machine can do.
//!
//! Upstairs:   `kvtier-bench limits`.
//! Downstairs: `kvtier_store` lanes, `fio`, `memcpy`.
//!
//! Every number of ours is taken in turn with its limit, pair by pair, each side first in every
//! second pair: shared machines drift by factors within minutes, pairs do not.
//!
//! Not here on purpose: no page cache. A limit that memory serves says nothing about a device.

mod copy;
mod lane;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};
use kvtier_proto::units::{Bytes, MIB};
use kvtier_store::disk::lane::{LaneKind, LaneReport, open_lane};
use kvtier_store::disk::{Disk, FileId};
use kvtier_store::mem::{Arena, Share};

use crate::Common;
use crate::fio::{self, Job, Pattern};
use crate::report::{Problem, Report};

/// Blocks of these sizes. Unit: MiB.
const SIZES_MIB: [u64; 2] = [1, 2];

/// Written between two syncs. Unit: bytes.
const SYNC_BYTES: u64 = 16 * MIB;

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
    pub(crate) pairs: usize,
    pub(crate) seconds: f64,
    /// Bytes of the test file.
    pub(crate) span: u64,
}

impl Effort {
    fn new(quick: bool) -> Self {
        if quick {
            Self {
                pairs: 3,
                seconds: 0.4,
                span: 512 * MIB,
            }
        } else {
            Self {
                pairs: 9,
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
        bed.reads(&mut report, mib)?;
        bed.writes(&mut report, mib)?;
    }
    Ok(report)
}

impl Bed {
    fn make(options: &Options, dir: &Path, effort: Effort) -> Result<(Self, LaneReport), Problem> {
        let home = tempfile::Builder::new()
            .prefix("kvtier-bench-")
            .tempdir_in(dir)?;
        let room = usize::try_from(2 * MIB)? * (options.depth + 2);
        let arena = Arena::create("bench", room, Share::Private)?;
        let fio_arena = Arena::create("bench-fio", room, Share::Private)?;
        for arena in [&arena, &fio_arena] {
            arena.populate(&mut |_, _| ())?;
        }
        let arenas = std::slice::from_ref(&arena);
        let lane = open_lane(home.path(), options.lane, options.depth, arenas)?;
        let mut disk = lane.disk;
        let file = disk.create("span", effort.span)?;
        let depth = options.depth;
        let mut bed = Self {
            home,
            disk,
            file,
            arena,
            fio_arena,
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
        let (size, span) = (2 * MIB, self.effort.span);
        lane::Run::new(&mut *self.disk, self.file, &self.arena, size, span).fill(&bar)?;
        bar.finish_and_clear();
        Ok(())
    }

    fn path(&self) -> PathBuf {
        self.home.path().join("span")
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
        let size = mib * MIB;
        let pairs = self.pairs(size, Pattern::RandomRead, |bed| {
            let Effort { seconds, span, .. } = bed.effort;
            lane::Run::new(&mut *bed.disk, bed.file, &bed.arena, size, span).read_random(seconds)
        })?;
        rows(report, &format!("read.random.{mib}MiB"), &pairs, READ_BAR);
        Ok(())
    }

    fn writes(&mut self, report: &mut Report, mib: u64) -> Result<(), Problem> {
        let size = mib * MIB;
        let sync_every = SYNC_BYTES / size;
        let pairs = self.pairs(size, Pattern::DurableWrite { sync_every }, |bed| {
            let Effort { seconds, span, .. } = bed.effort;
            lane::Run::new(&mut *bed.disk, bed.file, &bed.arena, size, span)
                .write_durable(seconds, sync_every)
        })?;
        rows(
            report,
            &format!("write.durable.{mib}MiB"),
            &pairs,
            WRITE_BAR,
        );
        // What a sync costs on this device, for whoever wonders about the row above.
        let unsynced: Result<Vec<f64>, Problem> = (0..self.effort.pairs)
            .map(|_| Ok(self.fio(&self.path(), size, Pattern::Write)?.gib_s()))
            .collect();
        report.row(
            format!("limit.write.unsynced.{mib}MiB.gib_s"),
            "GiB/s",
            &unsynced?,
        );
        Ok(())
    }

    fn fio(&self, file: &Path, size: u64, pattern: Pattern) -> Result<Sample, Problem> {
        let Effort { span, seconds, .. } = self.effort;
        let (depth, arena) = (self.depth, &*self.fio_arena);
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

    /// Runs ours and fio in turn, each first in every second pair.
    fn pairs(
        &mut self,
        size: u64,
        pattern: Pattern,
        mut ours: impl FnMut(&mut Self) -> Result<Sample, Problem>,
    ) -> Result<Vec<(Sample, Sample)>, Problem> {
        let (path, mut pairs) = (self.path(), Vec::new());
        for pair in 0..self.effort.pairs {
            let fio = |bed: &Self| bed.fio(&path, size, pattern);
            pairs.push(if pair % 2 == 0 {
                let ours = ours(self)?;
                (ours, fio(self)?)
            } else {
                let limit = fio(self)?;
                (ours(self)?, limit)
            });
        }
        Ok(pairs)
    }
}

/// Speed and CPU cost of ours and of the limit.
fn rows(report: &mut Report, what: &str, pairs: &[(Sample, Sample)], bar: f64) {
    let speed = |side: fn(&(Sample, Sample)) -> Sample| -> Vec<f64> {
        pairs.iter().map(|pair| side(pair).gib_s()).collect()
    };
    let cost = |side: fn(&(Sample, Sample)) -> Sample| -> Vec<f64> {
        pairs
            .iter()
            .map(|pair| side(pair).cpu_s_per_gib())
            .collect()
    };
    let (ours, limit) = (format!("lane.{what}"), format!("limit.{what}"));
    let limit_speed = format!("{limit}.gib_s");
    report.row(limit_speed.clone(), "GiB/s", &speed(|pair| pair.1));
    let limits = (limit_speed.as_str(), speed(|pair| pair.1));
    let name = (format!("{ours}.gib_s"), "GiB/s");
    report.beside(
        name,
        &speed(|pair| pair.0),
        (limits.0, &limits.1),
        Some(bar),
    );
    let limit_cost = format!("{limit}.cpu_s_per_gib");
    report.row(limit_cost.clone(), "s/GiB", &cost(|pair| pair.1));
    let name = (format!("{ours}.cpu_s_per_gib"), "s/GiB");
    report.beside(
        name,
        &cost(|pair| pair.0),
        (&limit_cost, &cost(|pair| pair.1)),
        None,
    );
}
