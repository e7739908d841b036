//! Suite `store`: the storage engine beside fio, over sizes, patterns and queue depths.
//!
//! Upstairs:   `kvtier-bench store`.
//! Downstairs: `store::bed` drives the engine as the daemon does, `limits::lane` a lane alone,
//!             `fio` the device.
//!
//! Sides of a row are taken in turn, round by round, and each is first in its share of rounds.
//! The engine runs on one thread; a second verifies what was read and builds what is written.
//! It reads into as much memory as a restore does (`COLD_BYTES`). Between it and fio stand the
//! lane over the same memory with operations as long as records (`lane_cold`), and that with every
//! payload checksummed on a second thread (`lane_checked`): what the promise of whole records
//! leaves of the device, whatever the engine. The store's reads are held against that one; what
//! they are of fio's is the row `store_of_limit`. CPU is that of both threads, kernel time
//! included. Bytes are payload: heads are our cost, not our work.
//!
//! Not here on purpose: no codec, no host tier, no RPC. Suite `planes` has the daemon's own rows.

mod bed;
mod plot;

use std::path::PathBuf;
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};
use kvtier_proto::units::{Bytes, KIB, MIB};
use kvtier_store::disk::lane::{LaneKind, open_lane};
use kvtier_store::disk::{Disk, FileId};
use kvtier_store::mem::Arena;

use self::bed::{Bed, Heads};
use crate::Common;
use crate::fio::{self, Job, Pattern};
use crate::limits::lane::Run as LaneRun;
use crate::limits::{SYNC_BYTES, Sample, noisy_arena};
use kvtier_benches::report::{Problem, Report};

/// Payload of a block. Unit: bytes.
const SIZES: [u64; 4] = [64 * KIB, 256 * KIB, MIB, 2 * MIB];
/// Queue depths of the sweep.
const DEPTHS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
/// Sizes of the sweep.
const SWEPT: [u64; 2] = [64 * KIB, MIB];
/// Share of reads in the mixed pattern. Unit: percent.
const READS: u32 = 70;
/// Bars of DESIGN 14, for blocks of 1 and 2 MiB and for pages.
const READ_BAR: f64 = 0.95;
/// Memory that restores go to in turn, as the slots of a real restore are: each is filled once and
/// then left alone. fio fills the same few buffers over and over, which caches make faster.
/// Unit: bytes.
pub(crate) const COLD_BYTES: u64 = 64 * MIB;
const WRITE_BAR: f64 = 0.90;
const PAGES_BAR: f64 = 0.90;

/// Options of this suite.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Operations in flight in all rows but the sweep's.
    #[arg(long, default_value_t = 16)]
    depth: usize,
    /// Only rows whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Draw the throughput over the size of a block into this SVG file.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// Who moves the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Fio,
    Lane(LaneKind),
    /// The lane over as much memory as the store gets, with operations as long as records.
    LaneCold,
    /// The same, payloads checksummed.
    LaneChecked,
    Store,
    /// The store, heads of all records known, and none known.
    Pages(Heads),
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Fio => "limit",
            Self::Lane(LaneKind::Pread) => "lane_pread",
            Self::Lane(_) => "lane",
            Self::LaneCold => "lane_cold",
            Self::LaneChecked => "lane_checked",
            Self::Store => "store",
            Self::Pages(Heads::Known) => "store.heads_known",
            Self::Pages(Heads::Cold) => "store.heads_cold",
        }
    }
}

/// What a row says of a sample.
type Quantity = fn(Sample) -> f64;

/// One comparison: what every side of it does.
#[derive(Debug, Clone, Copy)]
struct Work {
    pattern: Pattern,
    /// Payload of an operation, and what is read in front of it. Unit: bytes.
    size: u64,
    head: u64,
    depth: usize,
}

/// Runs the suite.
pub(crate) fn run(options: &Options, common: &Common) -> Result<Report, Problem> {
    let fio = fio::version()?;
    let mut report = Report::new("store", &common.dir);
    report.note(format!(
        "limit of the device: {fio}, io_uring, direct; depth {} unless a row says another",
        options.depth
    ));
    let mut suite = Suite::make(options, common)?;
    suite.describe(&mut report);
    suite.sizes(&mut report)?;
    suite.depths(&mut report)?;
    suite.pages(&mut report)?;
    if let Some(path) = &options.plot {
        plot::draw(path, &report)?;
    }
    Ok(report)
}

struct Suite {
    home: tempfile::TempDir,
    ring: Box<dyn Disk + Send>,
    ring_file: FileId,
    pread: Box<dyn Disk + Send>,
    pread_file: FileId,
    arena: Arc<Arena>,
    fio_arena: Arc<Arena>,
    span: u64,
    rounds: usize,
    seconds: f64,
    depth: usize,
    only: String,
    without: Vec<String>,
}

impl Suite {
    fn make(options: &Options, common: &Common) -> Result<Self, Problem> {
        let (rounds, seconds, span) = match common.quick {
            true => (3, 0.3, 1536 * MIB),
            false => (7, 1.0, 4096 * MIB),
        };
        let home = tempfile::Builder::new()
            .prefix("kvtier-bench-")
            .tempdir_in(&common.dir)?;
        let deepest = DEPTHS.iter().copied().max().unwrap_or(1).max(options.depth);
        let room = (2 * MIB * options.depth as u64).max(MIB * deepest as u64);
        let room = room.max(COLD_BYTES) + 4 * MIB;
        let arena = noisy_arena("bench", room)?;
        let fio_arena = noisy_arena("bench-fio", room)?;
        let arenas = std::slice::from_ref(&arena);
        let ring = open_lane(home.path(), LaneKind::Auto, deepest, arenas)?;
        let pread = open_lane(home.path(), LaneKind::Pread, deepest, arenas)?;
        let (mut ring, without, mut pread) = (ring.disk, ring.report.without, pread.disk);
        let ring_file = ring.create("span", span)?;
        let pread_file = pread.open("span")?;
        let style = ProgressStyle::with_template("writing {bytes}/{total_bytes} {bar:30}")?;
        let bar = ProgressBar::new(span).with_style(style);
        LaneRun::new(&mut *ring, ring_file, &arena, MIB, span, 8).fill(&bar)?;
        bar.finish_and_clear();
        Ok(Self {
            home,
            ring,
            ring_file,
            pread,
            pread_file,
            arena,
            fio_arena,
            span,
            rounds,
            seconds,
            depth: options.depth,
            only: options.only.clone(),
            without,
        })
    }

    fn describe(&self, report: &mut Report) {
        report.note(format!(
            "our lane: {}, alignment {}; pages: ours {}, fio's {}; file and store of {}",
            self.ring.lane(),
            self.ring.align(),
            self.arena.page_kind(),
            self.fio_arena.page_kind(),
            Bytes(self.span),
        ));
        for text in &self.without {
            report.note(format!("without {text}"));
        }
    }

    /// Every pattern at every size.
    fn sizes(&mut self, report: &mut Report) -> Result<(), Problem> {
        let ring = Side::Lane(LaneKind::Auto);
        let pread = Side::Lane(LaneKind::Pread);
        for size in SIZES {
            let (depth, label) = (self.depth, size_label(size));
            let bar = |bar: f64| (size >= MIB).then_some(bar);
            let sync_every = SYNC_BYTES / size;
            let rows: [(&str, Pattern, &[Side], Option<f64>); 4] = [
                (
                    "read.random",
                    Pattern::RandomRead,
                    &[
                        Side::Fio,
                        ring,
                        pread,
                        Side::LaneCold,
                        Side::LaneChecked,
                        Side::Store,
                    ],
                    bar(READ_BAR),
                ),
                (
                    "read.sequential",
                    Pattern::Read,
                    &[Side::Fio, ring, Side::LaneChecked, Side::Store],
                    bar(READ_BAR),
                ),
                (
                    "write.durable",
                    Pattern::DurableWrite { sync_every },
                    &[Side::Fio, ring, Side::Store],
                    bar(WRITE_BAR),
                ),
                (
                    "mixed.70_30",
                    Pattern::Mixed {
                        reads: READS,
                        sync_every,
                    },
                    &[Side::Fio, Side::Store],
                    None,
                ),
            ];
            let names: Vec<_> = rows
                .iter()
                .map(|row| format!("{}.{label}", row.0))
                .collect();
            let Some(mut bed) = self.bed_for(size, &names)? else {
                continue;
            };
            for ((_, pattern, sides, bar), what) in rows.into_iter().zip(&names) {
                let work = Work {
                    pattern,
                    size,
                    head: bed::HEAD,
                    depth,
                };
                self.compare(report, &mut bed, what, work, sides, bar)?;
            }
        }
        Ok(())
    }

    /// Random reads at every depth.
    fn depths(&mut self, report: &mut Report) -> Result<(), Problem> {
        for size in SWEPT {
            let name = |depth| format!("read.random.{}.depth{depth}", size_label(size));
            let Some(mut bed) = self.bed_for(size, &DEPTHS.map(name))? else {
                continue;
            };
            for depth in DEPTHS {
                let work = Work {
                    pattern: Pattern::RandomRead,
                    size,
                    head: bed::HEAD,
                    depth,
                };
                let ring = Side::Lane(LaneKind::Auto);
                let sides = [Side::Fio, ring, Side::LaneChecked, Side::Store];
                self.compare(report, &mut bed, &name(depth), work, &sides, None)?;
            }
        }
        Ok(())
    }

    /// One page of 64 KiB from each of 64 blocks of 2 MiB, layer by layer.
    fn pages(&mut self, report: &mut Report) -> Result<(), Problem> {
        let what = "read.pages.64KiB".to_owned();
        let Some(mut bed) = self.bed_for(2 * MIB, std::slice::from_ref(&what))? else {
            return Ok(());
        };
        let work = Work {
            pattern: Pattern::RandomRead,
            size: 64 * KIB,
            head: 0,
            depth: 64,
        };
        let sides = [
            Side::Fio,
            Side::LaneChecked,
            Side::Pages(Heads::Known),
            Side::Pages(Heads::Cold),
        ];
        self.compare(report, &mut bed, &what, work, &sides, Some(PAGES_BAR))
    }

    /// A store full of blocks of `size`, unless `--only` wants none of these rows.
    fn bed_for(&self, size: u64, rows: &[String]) -> Result<Option<Bed>, Problem> {
        if !rows.iter().any(|row| row.contains(&self.only)) {
            return Ok(None);
        }
        let path = self.home.path().join("store");
        if path.exists() {
            std::fs::remove_dir_all(&path)?;
        }
        let deepest = DEPTHS.iter().copied().max().unwrap_or(1).max(self.depth);
        eprintln!("a store of {} blocks", size_label(size));
        Bed::make(&path, size, deepest, self.span).map(Some)
    }

    fn compare(
        &mut self,
        report: &mut Report,
        bed: &mut Bed,
        what: &str,
        work: Work,
        sides: &[Side],
        bar: Option<f64>,
    ) -> Result<(), Problem> {
        if !what.contains(&self.only) {
            return Ok(());
        }
        eprintln!("{what}");
        let mut samples = vec![Vec::new(); sides.len()];
        for round in 0..self.rounds {
            let mut order: Vec<_> = sides.iter().zip(&mut samples).collect();
            order.rotate_left(round % sides.len());
            for (side, samples) in order {
                samples.push(self.side(bed, *side, work)?);
            }
        }
        let quantities: [(&str, &str, Quantity, bool); 2] = [
            ("gib_s", "GiB/s", Sample::gib_s, true),
            ("cpu_s_per_gib", "s/GiB", Sample::cpu_s_per_gib, false),
        ];
        for (quantity, unit, of, has_bar) in quantities {
            let values: Vec<Vec<f64>> = (samples.iter())
                .map(|side| side.iter().map(|sample| of(*sample)).collect())
                .collect();
            let name = |side: Side| format!("{}.{what}.{quantity}", side.name());
            for (side, values_of) in sides.iter().zip(&values) {
                if *side == Side::Fio {
                    report.row(name(*side), unit, values_of);
                    continue;
                }
                // The store's reads are held against those of the lane that checks, all else
                // against fio.
                let ours = matches!(side, Side::Store | Side::Pages(_));
                let checked = sides.iter().position(|side| *side == Side::LaneChecked);
                let beside = checked.filter(|_| ours).unwrap_or(0);
                let limit = sides
                    .get(beside)
                    .map(|side| name(*side))
                    .unwrap_or_default();
                let limits = values.get(beside).map(Vec::as_slice).unwrap_or_default();
                let promised = has_bar && ours && *side != Side::Pages(Heads::Cold);
                let bar = bar.filter(|_| promised);
                report.beside((name(*side), unit), values_of, (&limit, limits), bar);
                if ours && has_bar && beside > 0 {
                    let fio = values.first().map(Vec::as_slice).unwrap_or_default();
                    let of_fio: Vec<_> = values_of.iter().zip(fio).map(|(a, b)| a / b).collect();
                    report.row(format!("{}_of_limit.{what}", side.name()), "", &of_fio);
                }
            }
        }
        Ok(())
    }

    /// One sample of one side.
    fn side(&mut self, bed: &mut Bed, side: Side, work: Work) -> Result<Sample, Problem> {
        let Work {
            pattern,
            size,
            head,
            depth,
        } = work;
        let (seconds, span) = (self.seconds, self.span);
        match side {
            Side::Fio => {
                let (arena, file) = (&*self.fio_arena, &self.home.path().join("span"));
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
            Side::Lane(kind) => {
                let (disk, file) = match kind {
                    LaneKind::Pread => (&mut *self.pread, self.pread_file),
                    _ => (&mut *self.ring, self.ring_file),
                };
                lane(
                    LaneRun::new(disk, file, &self.arena, size, span, depth),
                    pattern,
                    seconds,
                )
            }
            Side::LaneCold | Side::LaneChecked => {
                let (disk, file) = (&mut *self.ring, self.ring_file);
                let run = LaneRun::new(disk, file, &self.arena, size, span, depth);
                let run = run.with_heads(head).in_cold_memory(COLD_BYTES)?;
                let checked = side == Side::LaneChecked;
                let run = if checked { run.checked()? } else { run };
                lane(run, pattern, seconds)
            }
            Side::Store => match pattern {
                Pattern::RandomRead => bed.read(seconds, depth, bed::Order::Random),
                Pattern::Read => bed.read(seconds, depth, bed::Order::Stored),
                Pattern::Mixed { reads, .. } => bed.mixed(seconds, depth, reads),
                Pattern::Write | Pattern::DurableWrite { .. } => bed.write(seconds),
            },
            Side::Pages(heads) => bed.pages(seconds, depth, heads),
        }
    }
}

fn lane(run: LaneRun<'_>, pattern: Pattern, seconds: f64) -> Result<Sample, Problem> {
    match pattern {
        Pattern::RandomRead => run.read_random(seconds),
        Pattern::Read => run.read_in_order(seconds),
        Pattern::DurableWrite { sync_every } => run.write_durable(seconds, sync_every),
        Pattern::Write | Pattern::Mixed { .. } => Err("a lane alone has no such row".into()),
    }
}

/// A size as names have it.
fn size_label(size: u64) -> String {
    match size / MIB {
        0 => format!("{}KiB", size / KIB),
        mib => format!("{mib}MiB"),
    }
}
