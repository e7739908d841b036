//! Every fuzz target over its committed corpus, and over thousands of changes to it.
//!
//! Upstairs:   `cargo test`. `fuzz/run` runs the same bodies under libFuzzer for as long as wanted.
//! Downstairs: the `fuzzing` module of every package.
//!
//! Without a nightly compiler, `KVTIER_TEST_CHANGES=100` makes a hundred times as many changes,
//! from other seeds: that is what a fuzzer without eyes can do.
//!
//! `KVTIER_TEST_REGENERATE=1` writes the seeds of every target into `fuzz/corpus`; what a fuzzer
//! found stays there beside them.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a panic is the failure report"
)]

use std::alloc::System;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use kvtier_proto::fuzzing::Target;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

/// Counts what the bodies allocate.
#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// What the whole corpus may weigh. Unit: bytes.
const CORPUS_MAX: u64 = 1 << 20;
/// Changed inputs that each file of a corpus is made into.
const CHANGES: u64 = 3000;
/// The same for targets that do more than decode: they start a runtime's work or a compressor's.
const SLOW: [(&str, u64); 6] = [
    ("store_open", 600),
    ("requests", 150),
    ("codec_decode", 500),
    ("codec_encode", 300),
    ("config_file", 700),
    ("config_layers", 700),
];
/// Largest input that a change makes. Unit: bytes.
const INPUT_MAX: usize = 256 << 10;

fn targets() -> Vec<Target> {
    let all: [&[Target]; 5] = [
        &kvtier_proto::fuzzing::TARGETS,
        &kvtier_kernels::fuzzing::TARGETS,
        &kvtier_store::fuzzing::TARGETS,
        &kvtierd::fuzzing::TARGETS,
        &kvtier_client::fuzzing::TARGETS,
    ];
    all.concat()
}

fn corpora() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus")
}

fn names_in(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name();
    entries
        .map(|entry| name(entry).into_string().unwrap())
        .collect()
}

fn corpus_of(target: &Target) -> Vec<Vec<u8>> {
    let dir = corpora().join(target.name);
    let read = |name: String| std::fs::read(dir.join(name)).unwrap();
    names_in(&dir).into_iter().map(read).collect()
}

/// Panics so far, on any thread: a runtime keeps those of its tasks to itself.
static PANICS: AtomicU64 = AtomicU64::new(0);

fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let tell = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICS.fetch_add(1, Ordering::SeqCst);
            tell(panic);
        }));
    });
}

/// Why an input breaks a target, when it does.
fn broken(target: &Target, input: &[u8]) -> Option<String> {
    let panics = PANICS.load(Ordering::SeqCst);
    let region = Region::new(ALLOCATOR);
    let ran = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    let allocated = region.change().bytes_allocated;
    let most = target.allocates + Target::GROWTH * input.len();
    if ran.is_err() || PANICS.load(Ordering::SeqCst) != panics {
        Some("a promise is broken, as told above".to_owned())
    } else if allocated > most {
        Some(format!("it allocates {allocated} bytes; accepted: {most}"))
    } else {
        None
    }
}

fn expect_sound(target: &Target, input: &[u8]) {
    if let Some(why) = broken(target, input) {
        let name = format!("kvtier-{}-{:08x}", target.name, crc32fast::hash(input));
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, input).unwrap();
        let (name, len, path) = (target.name, input.len(), path.display());
        panic!("{name}: {why}; its input of {len} bytes is kept in {path}");
    }
}

/// Bodies are run one at a time, and nothing beside them: all that is allocated is counted.
fn alone<T>(run: impl FnOnce() -> T) -> T {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    count_panics();
    run()
}

/// Makes one of the corpus into another input, by one to four changes.
fn changed(random: &mut ChaCha8Rng, corpus: &[Vec<u8>], input: &[u8]) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..random.random_range(1..=4) {
        change(random, corpus, &mut bytes);
    }
    bytes.truncate(INPUT_MAX);
    bytes
}

fn change(random: &mut ChaCha8Rng, corpus: &[Vec<u8>], bytes: &mut Vec<u8>) {
    let len = bytes.len();
    let at = random.random_range(0..=len);
    let to = random.random_range(at..=len.min(at + 64));
    match random.random_range(0..10) {
        0 if at < len => bytes[at] ^= 1 << random.random_range(0..8),
        1 if at < len => bytes[at] = *[0, 1, 0x7F, 0x80, 0xFF].choose(random).unwrap(),
        2 if at < len => bytes[at] = bytes[at].wrapping_add(random.random_range(0..=8)),
        // Numbers as they stand in headers: at even places, of every width, and on the edge.
        3..=5 if len >= 8 => {
            let width = *[2, 4, 8].choose(random).unwrap();
            let at = random.random_range(0..=len - width) & !1;
            let number = number(random, len as u64).to_le_bytes();
            bytes[at..at + width].copy_from_slice(&number[..width]);
        }
        6 => bytes.truncate(at),
        7 => drop(bytes.drain(at..to)),
        8 => {
            let run = bytes[at..to].to_vec();
            bytes.splice(at..at, run);
        }
        _ => {
            let other = corpus.choose(random).unwrap();
            let from = random.random_range(0..=other.len());
            bytes.truncate(at);
            bytes.extend_from_slice(&other[from..]);
        }
    }
}

fn number(random: &mut ChaCha8Rng, len: u64) -> u64 {
    let edge = match random.random_range(0..5) {
        0 => 0,
        1 => u64::MAX,
        2 => len,
        3 => 1 << random.random_range(0..64),
        _ => random.random_range(0..5000),
    };
    let near = random.random_range(0..3);
    edge.wrapping_add(near).wrapping_sub(1)
}

#[test]
fn every_target_has_its_corpus_and_every_corpus_its_target() {
    alone(compare_corpora);
}

fn compare_corpora() {
    let wanted: Vec<&str> = targets().iter().map(|target| target.name).collect();
    let names: BTreeSet<String> = wanted.iter().map(|name| (*name).to_owned()).collect();
    assert_eq!(names.len(), wanted.len(), "two targets of one name");
    if std::env::var_os("KVTIER_TEST_REGENERATE").is_some() {
        for target in targets() {
            let dir = corpora().join(target.name);
            std::fs::create_dir_all(&dir).unwrap();
            for (at, seed) in (target.seeds)().iter().enumerate() {
                std::fs::write(dir.join(format!("seed-{at}")), seed).unwrap();
            }
        }
    }
    assert_eq!(names_in(&corpora()), names);
    let mut weight = 0;
    for target in targets() {
        let dir = corpora().join(target.name);
        let size = |name: String| std::fs::metadata(dir.join(name)).unwrap().len();
        weight += names_in(&dir).into_iter().map(size).sum::<u64>();
        for (at, seed) in (target.seeds)().into_iter().enumerate() {
            let kept = std::fs::read(dir.join(format!("seed-{at}")));
            let current = kept.is_ok_and(|kept| kept == seed);
            let name = target.name;
            assert!(
                current,
                "{name}/seed-{at} is old: set KVTIER_TEST_REGENERATE=1"
            );
        }
    }
    assert!(weight <= CORPUS_MAX, "the corpus weighs {weight} bytes");
}

// Goal: what a fuzzer found once is never found again.
#[test]
fn bodies_hold_over_the_corpus() {
    alone(|| {
        for target in targets() {
            for input in corpus_of(&target) {
                expect_sound(&target, &input);
            }
            expect_sound(&target, &[]);
        }
    });
}

// Method: changes are drawn from a seed that is fixed, so that a failure is there the next time.
#[test]
fn bodies_hold_over_thousands_of_changes_to_the_corpus() {
    let times = std::env::var("KVTIER_TEST_CHANGES");
    let times: u64 = times.map_or(1, |times| times.parse().unwrap());
    let only = std::env::var("KVTIER_TEST_TARGET").unwrap_or_default();
    alone(|| {
        for target in targets() {
            if !target.name.contains(&only) {
                continue;
            }
            let corpus = corpus_of(&target);
            let slow = SLOW.iter().find(|(name, _)| *name == target.name);
            let changes = times * slow.map_or(CHANGES, |(_, changes)| *changes);
            let begin = std::time::Instant::now();
            for (number, input) in corpus.iter().enumerate() {
                let mut random = ChaCha8Rng::seed_from_u64(times << 32 | number as u64);
                for _ in 0..changes {
                    expect_sound(&target, &changed(&mut random, &corpus, input));
                }
            }
            let (runs, time) = (changes * corpus.len() as u64, begin.elapsed());
            println!("{}: {runs} inputs in {time:.2?}", target.name);
        }
    });
}

/// Breaks a promise for some inputs, as the first byte says.
fn planted(data: &[u8]) {
    match data.first() {
        Some(1) => panic!("planted"),
        Some(2) => drop(std::hint::black_box(vec![0_u8; 8 << 20])),
        Some(3) => {
            // The panic of another thread, which nobody joins.
            let thread = std::thread::spawn(|| panic!("planted"));
            assert!(thread.join().is_err());
        }
        _ => {}
    }
}

// Goal: a body that breaks is seen, on whatever thread, and so is one that allocates too much.
#[test]
fn a_broken_body_is_found_by_its_panic_and_by_what_it_allocates() {
    let target = Target::new("planted", planted, Vec::new);
    alone(|| {
        assert_eq!(broken(&target, &[0]), None);
        assert!(broken(&target, &[1]).is_some_and(|why| why.contains("promise")));
        assert!(broken(&target, &[2]).is_some_and(|why| why.contains("allocates 8388608")));
        assert!(broken(&target, &[3]).is_some_and(|why| why.contains("promise")));
        // And by changes of an input that is sound.
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let corpus = [vec![0, 0, 0, 0]];
        let input = |_| changed(&mut random, &corpus, &corpus[0]);
        let inputs: Vec<_> = (0..CHANGES).map(input).collect();
        let found = |number| inputs.iter().any(|input| input.first() == Some(&number));
        assert!([1, 2, 3].into_iter().all(found));
    });
}
