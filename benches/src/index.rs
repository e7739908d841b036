//! Suite `index`: a million blocks and more in one store: memory, restart, rebuild.
//!
//! Upstairs:   `kvtier-bench index`.
//! Downstairs: `index::bed` fills and opens stores, `index::restart` runs the real daemon, `fio`
//!             is the device.
//!
//! Blocks are small, so that many fit: what an index costs does not depend on what it points to.
//! Rebuilds are set beside the time that fio takes for the same bytes in operations of the same
//! size, round by round. A bar that is a most, not a least, stands in a row of its own beside
//! what was measured: its ratio is what is left of it.
//!
//! Not here on purpose: no speed of lookups. Suite `planes` has them, over the socket.

mod bed;
mod restart;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use kvtier_benches::report::{Problem, Report};
use kvtier_proto::units::{KIB, MIB};
use kvtier_store::mem::Arena;
use kvtier_store::{IndexSource, RecoveryReport};
use rand::{RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use self::bed::{Opened, Shape, anonymous_bytes};
use crate::Common;
use crate::fio::{self, Job, Pattern};
use crate::limits::noisy_arena;

/// Most memory of a block in the index. Unit: bytes.
const BLOCK_BYTES_BAR: f64 = 160.0;
/// Longest time from exec to the first hit. Unit: seconds.
const FIRST_HIT_BAR: f64 = 1.0;
/// Least part of the device's speed in a rebuild.
const REBUILD_BAR: f64 = 0.80;
/// Operations in flight, as a daemon has them.
const DEPTH: usize = 64;
/// Records of this length make up what a killed daemon leaves to be walked. Unit: bytes.
const WALKED_PAYLOAD: u64 = 64 * KIB;

/// Options of this suite.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Blocks of all stores but the large one; 100,000 with --quick.
    #[arg(long, default_value_t = 1_000_000)]
    blocks: u64,
    /// Blocks of the large store, whose records are not kept; 0 for none; 1,000,000 with --quick.
    #[arg(long, default_value_t = 10_000_000)]
    large: u64,
    /// Only parts whose name contains this: memory, rebuild, walk, restart, large.
    #[arg(long, default_value = "")]
    only: String,
}

/// What every part of the suite has.
struct Suite {
    dir: PathBuf,
    blocks: u64,
    large: u64,
    rounds: usize,
    walked: u64,
    limit: Limit,
}

/// Measures, and adds its rows.
type Part = fn(&Suite, &mut Report) -> Result<(), Problem>;

/// Runs the suite.
pub(crate) fn run(options: &Options, common: &Common) -> Result<Report, Problem> {
    let mut report = Report::new("index", &common.dir);
    bed::allow_open_files();
    let quick = common.quick;
    let suite = Suite {
        dir: common.dir.clone(),
        blocks: if quick {
            options.blocks.min(100_000)
        } else {
            options.blocks
        },
        large: if quick {
            options.large.min(1_000_000)
        } else {
            options.large
        },
        rounds: if quick { 3 } else { 7 },
        walked: if quick { 512 * MIB } else { 2048 * MIB },
        limit: Limit::make(&common.dir, quick)?,
    };
    report.note(format!(
        "limit of the device: {}, io_uring, direct; {} blocks, depth {DEPTH}",
        fio::version()?,
        suite.blocks
    ));
    let parts: [(&str, Part); 5] = [
        ("rebuild.full_segments", |suite, report| {
            suite.rebuild(report, "full_segments", &Shape::full_segments(suite.blocks))
        }),
        ("rebuild.many_segments", |suite, report| {
            suite.rebuild(report, "many_segments", &Shape::many_segments(suite.blocks))
        }),
        ("walk", Suite::walk),
        ("restart", |suite, report| {
            restart::measure(&suite.dir, suite.blocks, suite.rounds, report)
        }),
        ("large", Suite::large),
    ];
    for (name, part) in parts {
        if name.contains(&options.only) {
            part(&suite, &mut report)?;
        }
    }
    Ok(report)
}

/// Adds a row and, beside it, the most that it may be.
fn at_most(report: &mut Report, (name, unit): (&str, &'static str), values: &[f64], most: f64) {
    report.row(name, unit, values);
    let bars = vec![most; values.len()];
    report.beside(
        (format!("bar.{name}"), unit),
        &bars,
        (name, values),
        Some(1.0),
    );
}

impl Suite {
    fn home(&self) -> Result<tempfile::TempDir, Problem> {
        let home = tempfile::Builder::new()
            .prefix("kvtier-bench-")
            .tempdir_in(&self.dir)?;
        Ok(home)
    }

    /// Fills a store, and opens it again and again, with its catalog and without.
    fn rebuild(&self, report: &mut Report, name: &str, shape: &Shape) -> Result<(), Problem> {
        let home = self.home()?;
        let before = anonymous_bytes("self")?;
        let filled = shape.fill(home.path())?;
        // Memory that an earlier part gave back and this one took again would not show.
        if !shape.hollow {
            let more = more_bytes(before)?;
            let row = format!("index.ram.{name}.bytes_per_block");
            let each = more as f64 / shape.blocks as f64;
            at_most(report, (&row, "B"), &[each], BLOCK_BYTES_BAR);
        }
        let index = filled.store.usage().index_bytes as f64 / shape.blocks as f64;
        report.row(format!("index.ram.{name}.index_alone"), "B", &[index]);
        report.row(format!("index.close.{name}.s"), "s", &[filled.close()]);
        let mut catalog = Times::default();
        for round in 0..self.rounds {
            bed::forget_pages(home.path())?;
            let opened = shape.open(home.path(), true)?;
            expect(&opened.found, &IndexSource::Catalog, shape.blocks)?;
            catalog.add(&opened);
            if round + 1 < self.rounds {
                opened.close();
            }
        }
        catalog.tell(report, &format!("index.open.catalog.{name}"));
        // Nobody closed the last: from here on the catalog is not trusted.
        let (mut times, mut ours, mut limits) = (Times::default(), Vec::new(), Vec::new());
        for _ in 0..self.rounds {
            let opened = shape.open(home.path(), false)?;
            expect(&opened.found, &IndexSource::Segments, shape.blocks)?;
            times.add(&opened);
            let gib = opened.found.bytes as f64 / f64::from(1 << 30);
            ours.push(gib / opened.wall_s);
            limits.push(gib / self.limit.seconds(&opened.found)?);
        }
        times.tell(report, &format!("index.rebuild.{name}"));
        let limit = format!("limit.rebuild.{name}.gib_s");
        report.row(limit.clone(), "GiB/s", &limits);
        let row = (format!("index.rebuild.{name}.gib_s"), "GiB/s");
        report.beside(row, &ours, (&limit, &limits), Some(REBUILD_BAR));
        Ok(())
    }

    /// Opens a store whose segments have no footer: what kill -9 leaves, but of all segments.
    fn walk(&self, report: &mut Report) -> Result<(), Problem> {
        let home = self.home()?;
        let shape = Shape::large_records(self.walked, WALKED_PAYLOAD);
        shape.fill(home.path())?.close();
        let (mut times, mut ours, mut limits) = (Times::default(), Vec::new(), Vec::new());
        for _ in 0..self.rounds {
            bed::cut_footers(home.path())?;
            let opened = shape.open(home.path(), false)?;
            expect(&opened.found, &IndexSource::Segments, shape.blocks)?;
            if opened.found.by_footer > 0 {
                return Err("a footer was found that had been cut".into());
            }
            times.add(&opened);
            ours.push(opened.found.bytes as f64 / f64::from(1 << 30) / opened.wall_s);
            limits.push(self.limit.run(Pattern::Read, 4 * MIB, 4, self.limit.span)?);
        }
        times.tell(report, "index.walk.64KiB");
        report.row("limit.walk.4MiB.gib_s", "GiB/s", &limits);
        let row = ("index.walk.64KiB.gib_s", "GiB/s");
        report.beside(
            row,
            &ours,
            ("limit.walk.4MiB.gib_s", &limits),
            Some(REBUILD_BAR),
        );
        Ok(())
    }

    /// A store beyond what this device holds: its records are forgotten, the rest is real.
    fn large(&self, report: &mut Report) -> Result<(), Problem> {
        if self.large == 0 {
            return Ok(());
        }
        let home = self.home()?;
        let shape = Shape {
            hollow: true,
            ..Shape::full_segments(self.large)
        };
        let before = anonymous_bytes("self")?;
        let begin = Instant::now();
        let filled = shape.fill(home.path())?;
        let fill = begin.elapsed().as_secs_f64();
        let ram = more_bytes(before)? as f64 / self.large as f64;
        report.note(format!("large: {} blocks, put in {fill:.1} s", self.large));
        at_most(
            report,
            ("index.ram.large.bytes_per_block", "B"),
            &[ram],
            BLOCK_BYTES_BAR,
        );
        report.row("index.close.large.s", "s", &[filled.close()]);
        bed::forget_pages(home.path())?;
        let opened = shape.open(home.path(), true)?;
        expect(&opened.found, &IndexSource::Catalog, self.large)?;
        let mut times = Times::default();
        times.add(&opened);
        times.tell(report, "index.open.catalog.large");
        drop(opened);
        let opened = shape.open(home.path(), false)?;
        expect(&opened.found, &IndexSource::Segments, self.large)?;
        let mut times = Times::default();
        times.add(&opened);
        times.tell(report, "index.rebuild.large");
        let limit = self.limit.seconds(&opened.found)?;
        report.row("limit.rebuild.large.s", "s", &[limit]);
        Ok(())
    }
}

/// Memory that this process took since it had `before`. Unit: bytes.
fn more_bytes(before: u64) -> Result<u64, Problem> {
    let more = anonymous_bytes("self")?.checked_sub(before);
    let more = more.filter(|more| *more > 0);
    more.ok_or_else(|| "this process has less memory than before: nothing to measure".into())
}

/// What openings took, round by round.
#[derive(Debug, Default)]
struct Times {
    wall_s: Vec<f64>,
    cpu_s: Vec<f64>,
}

impl Times {
    fn add(&mut self, opened: &Opened) {
        self.wall_s.push(opened.wall_s);
        self.cpu_s.push(opened.cpu_s);
    }

    fn tell(&self, report: &mut Report, name: &str) {
        report.row(format!("{name}.s"), "s", &self.wall_s);
        report.row(format!("{name}.cpu_s"), "s", &self.cpu_s);
    }
}

fn expect(found: &RecoveryReport, source: &IndexSource, blocks: u64) -> Result<(), Problem> {
    if found.source == *source && found.blocks == blocks {
        return Ok(());
    }
    Err(format!("the store opened otherwise than meant: {found:?}, not {blocks} blocks").into())
}

/// fio on a file of its own, on the same device.
struct Limit {
    home: tempfile::TempDir,
    arena: Arc<Arena>,
    span: u64,
    seconds: f64,
}

impl Limit {
    fn make(dir: &Path, quick: bool) -> Result<Self, Problem> {
        let home = tempfile::Builder::new()
            .prefix("kvtier-bench-")
            .tempdir_in(dir)?;
        let span = if quick { 256 * MIB } else { 2048 * MIB };
        let arena = noisy_arena("bench-fio", 32 * MIB)?;
        // Space that was only reserved reads as zeros without a device.
        let mut file = std::fs::File::create(home.path().join("span"))?;
        let mut block = vec![0; 1 << 20];
        let mut noise = ChaCha8Rng::seed_from_u64(3);
        for _ in 0..span / MIB {
            noise.fill_bytes(&mut block);
            file.write_all(&block)?;
        }
        file.sync_all()?;
        let seconds = if quick { 0.3 } else { 0.7 };
        Ok(Self {
            home,
            arena,
            span,
            seconds,
        })
    }

    fn run(&self, pattern: Pattern, size: u64, depth: usize, span: u64) -> Result<f64, Problem> {
        let job = Job {
            pattern,
            file: &self.home.path().join("span"),
            span: span.next_multiple_of(size).min(self.span),
            size,
            depth,
            seconds: self.seconds,
            arena: &self.arena,
        };
        Ok(job.run()?.gib_s())
    }

    /// Time that fio takes for the reads of a rebuild: the ends of every segment, and its table,
    /// from as many bytes as the rebuild read.
    fn seconds(&self, found: &RecoveryReport) -> Result<f64, Problem> {
        let ends = 2 * 4 * KIB * found.segments;
        let tables = found.bytes.saturating_sub(ends);
        let table = (tables / found.by_footer.max(1)).next_multiple_of(4 * KIB);
        let depth = usize::try_from(16 * MIB / table)?.clamp(1, DEPTH);
        let ends_at = self.run(Pattern::RandomRead, 4 * KIB, DEPTH, found.bytes)?;
        let tables_at = self.run(Pattern::RandomRead, table, depth, found.bytes)?;
        let seconds = |bytes: u64, gib_s: f64| bytes as f64 / f64::from(1 << 30) / gib_s;
        Ok(seconds(ends, ends_at) + seconds(tables, tables_at))
    }
}
