//! The whole campaign in one number of workloads, and what it did in numbers.
//!
//! Upstairs:   `cargo test`; `kvtier-bench crash --campaign N` runs it for hours.
//!
//! `KVTIER_TEST_WORKLOADS` says how many workloads run and gives each crash all of its images;
//! without it a small number runs with a sample of them. `KVTIER_TEST_THREADS` shares them out.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use strum::IntoEnumIterator as _;

use super::catalog::Spoil;
use super::crash::Effort;
use super::*;
use crate::disk::sim::{Fate, Fault, Faults};

/// Workloads and images of a crash in the test suite.
const WORKLOADS: u64 = 4;
const IMAGES: usize = 4;
/// Most images of one crash.
const IMAGES_MAX: usize = 64;

/// Runs under every fault at once.
const STORMS: u64 = 4;
/// Workloads in which everything happens to some catalog.
const ALL_SPOILS: u64 = 20;

/// What a campaign did.
#[derive(Debug, Default, Clone, serde::Serialize)]
pub(crate) struct Counts {
    pub(crate) workloads: u64,
    /// Calls and operations that the disks took.
    pub(crate) operations: u64,
    /// Operations that ended before an older one.
    pub(crate) reordered: u64,
    /// Power cuts, each at an operation of its own.
    pub(crate) crash_points: u64,
    /// Power cuts that met an end in order, or a recovery.
    pub(crate) crashes_in_closing: u64,
    pub(crate) crashes_in_recovery: u64,
    /// Writers killed before the power went.
    pub(crate) kills: u64,
    /// Disks that power cuts may have left, opened and read.
    pub(crate) images: u64,
    /// Fates of the writes that no sync had covered, in all images.
    pub(crate) writes: BTreeMap<&'static str, u64>,
    pub(crate) faults: BTreeMap<&'static str, u64>,
    /// What happened to catalogs between two lives.
    pub(crate) catalogs: BTreeMap<&'static str, u64>,
    pub(crate) acknowledged: u64,
    /// Puts that were refused, or ended without being stored.
    pub(crate) refused: u64,
    pub(crate) hits: u64,
    pub(crate) refused_as_damaged: u64,
    pub(crate) evictions: u64,
    /// Times that the scrub went through everything, and what it condemned.
    pub(crate) scrubs: u64,
    pub(crate) scrubbed_bad: u64,
    pub(crate) seconds: u64,
}

impl Counts {
    /// Adds a run that is over.
    pub(crate) fn add(&mut self, run: &Run) {
        self.disk(run.store.disk());
        self.acknowledged += run.model.acked;
        self.refused += run.model.refused;
        self.hits += run.model.hits;
        self.refused_as_damaged += run.model.damage;
        self.evictions += run.model.evictions;
        self.scrubs += run.model.scrubs;
        self.scrubbed_bad += run.model.scrub_bad;
    }

    /// Adds what a disk did.
    pub(crate) fn disk(&mut self, disk: &SimDisk) {
        self.operations += disk.taken();
        self.reordered += disk.reordered();
        for fault in Fault::iter() {
            *self.faults.entry(fault.into()).or_default() += disk.fired().times(fault);
        }
    }

    /// Adds an image of a crash.
    pub(crate) fn image(&mut self, fates: &[Fate]) {
        self.images += 1;
        for fate in fates {
            let kind = match fate {
                Fate::Lost => "lost",
                Fate::Whole => "whole",
                Fate::Torn { sector: 512, .. } => "torn_at_512",
                Fate::Torn { .. } => "torn_at_4096",
            };
            *self.writes.entry(kind).or_default() += 1;
        }
    }

    fn merge(&mut self, other: Counts) {
        self.workloads += other.workloads;
        self.operations += other.operations;
        self.reordered += other.reordered;
        self.crash_points += other.crash_points;
        self.crashes_in_closing += other.crashes_in_closing;
        self.crashes_in_recovery += other.crashes_in_recovery;
        self.kills += other.kills;
        self.images += other.images;
        self.acknowledged += other.acknowledged;
        self.refused += other.refused;
        self.hits += other.hits;
        self.refused_as_damaged += other.refused_as_damaged;
        self.evictions += other.evictions;
        self.scrubs += other.scrubs;
        self.scrubbed_bad += other.scrubbed_bad;
        let maps = [
            (&mut self.writes, other.writes),
            (&mut self.faults, other.faults),
            (&mut self.catalogs, other.catalogs),
        ];
        for (mine, theirs) in maps {
            for (kind, count) in theirs {
                *mine.entry(kind).or_default() += count;
            }
        }
    }
}

/// Everything that is done to one workload.
fn workload(seed: u64, effort: &Effort) -> Counts {
    let mut counts = Counts {
        workloads: 1,
        ..Counts::default()
    };
    sound::run(seed, &mut counts);
    faulty::harmless(seed, &mut counts);
    faulty::honest(seed, &mut counts);
    faulty::half_read(seed);
    faulty::half_read_after_a_kill(seed);
    faulty::copies(seed, 0);
    faulty::copies(seed, 50_000);
    faulty::scrub_of_a_misreading_device(seed);
    faulty::misread_opening(seed);
    lives::run(seed, &mut counts);
    lives::lost_header(seed);
    crash::everywhere(seed, effort, &mut counts);
    crash::in_closing(seed, effort, &mut counts);
    crash::in_recovery(seed, effort, &mut counts);
    let faults = Faults::all(8_000)
        .with(Fault::NoSpace, 60_000)
        .with(Fault::SyncError, 15_000);
    for storm in 0..STORMS {
        drop(faulty::storm(seed * STORMS + storm, &faults, &mut counts));
    }
    counts
}

/// Writes past the test harness, which keeps what a test that passes prints.
pub(super) fn tell(line: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Says where it was when something panics.
pub(super) struct Where<F: Fn() -> String>(pub(super) F);

impl<F: Fn() -> String> Drop for Where<F> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("in {}", (self.0)());
        }
    }
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    let number = text.parse().ok().filter(|number| *number > 0);
    Some(number.unwrap_or_else(|| panic!("{variable} is {text:?}; accepted: 1 or more")))
}

#[test]
fn the_campaign_keeps_every_promise_and_says_what_it_did() {
    let (begin, asked) = (Instant::now(), number("KVTIER_TEST_WORKLOADS"));
    let effort = Effort {
        images: if asked.is_some() { IMAGES_MAX } else { IMAGES },
        every: if asked.is_some() { 1 } else { 3 },
    };
    let last = asked.unwrap_or(WORKLOADS);
    let next = AtomicU64::new(0);
    let work = || {
        let mut counts = Counts::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= last {
                return counts;
            }
            counts.merge(workload(1000 + seed, &effort));
        }
    };
    let mut counts = std::thread::scope(|scope| {
        let threads = number("KVTIER_TEST_THREADS").unwrap_or(1);
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut all = Counts::default();
        for worker in workers {
            match worker.join() {
                Ok(counts) => all.merge(counts),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    });
    counts.seconds = begin.elapsed().as_secs();
    let line = serde_json::to_string(&counts).unwrap();
    tell(&format!("campaign counts: {line}"));
    for fault in Fault::iter() {
        let name: &str = fault.into();
        assert!(counts.faults[name] > 0, "{name} never happened");
    }
    for fate in ["lost", "whole", "torn_at_512", "torn_at_4096"] {
        assert!(counts.writes[fate] > 0, "no write was {fate}");
    }
    if last >= ALL_SPOILS {
        let all = Spoil::iter().all(|one| counts.catalogs.contains_key(one.into()));
        assert!(all, "{:?}", counts.catalogs);
    }
    assert!(counts.hits > 1000 && counts.reordered > 0, "{line}");
    assert!(
        counts.crashes_in_closing > 0 && counts.crashes_in_recovery > 0,
        "{line}"
    );
    assert!(counts.scrubs > 0 && counts.scrubbed_bad > 0, "{line}");
}
