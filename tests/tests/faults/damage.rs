//! Damage on the device: a counted miss for what is damaged, everything else as before.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness; files are changed behind the daemon's back, up and down.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use kvtier_client::{Miss, PayloadKind, SaveBlock, Session, Tier};
use kvtier_tests::harness::blocks::Found;
use kvtier_tests::harness::{Daemon, Options, blocks, rounds, run};
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::LIMIT;

/// A daemon that holds `count` blocks on the device and nothing in host memory.
async fn cold(options: Options, count: usize) -> (Daemon, Vec<SaveBlock>) {
    let make = |session: &Session| blocks::loose(session, 1, count, PayloadKind::Kv);
    Daemon::cold(options, &blocks::gqa(), make).await
}

/// Turns one byte of a file over.
fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
    file.sync_all().unwrap();
}

/// Every block but `damaged` comes back.
fn all_but(found: &Found, damaged: &[usize], count: usize) {
    let missed: Vec<usize> = found.misses.iter().map(|(at, _)| *at).collect();
    assert_eq!(missed, damaged, "{:?}", found.misses);
    assert_eq!(found.hits.len(), count - damaged.len());
}

async fn corrupt_pages(options: Options, up: bool) {
    let (mut daemon, set) = cold(options, 60).await;
    let session = daemon.session(&blocks::gqa()).await;
    let damaged = [7, 30, 59];
    let mut places = Vec::new();
    for at in damaged {
        places.push(daemon.place_of(&session, &set[at].key).await);
    }
    drop(session);
    if !up {
        assert!(daemon.stop().success());
    }
    for (path, offset) in &places {
        // Behind the record's head: a page of the payload.
        flip(path, offset + 4096 + 5000);
    }
    if !up {
        daemon.launch();
    }
    let session = daemon.session(&blocks::gqa()).await;
    let found = blocks::restore(&session, &set).await.unwrap();
    all_but(&found, &damaged, 60);
    let crc = |(_, miss): &(usize, Miss)| *miss == Miss::PayloadCrc;
    assert!(found.misses.iter().all(crc), "{:?}", found.misses);
    let counted = "kvtier_corrupt_total{reason=\"payload_crc\"}";
    assert_eq!(daemon.metrics().get(counted), 3.0);
    assert!(
        daemon.log().contains("a stored record is damaged"),
        "and logged"
    );
    // It is gone, not damaged again; and can be saved anew.
    let found = blocks::restore(&session, &set).await.unwrap();
    let absent: Vec<_> = damaged.iter().map(|at| (*at, Miss::Absent)).collect();
    assert_eq!(found.misses, absent);
    assert_eq!(daemon.metrics().get(counted), 3.0);
    let again: Vec<_> = damaged.iter().map(|at| set[*at]).collect();
    blocks::save_durable(&session, &again).await;
    drop(session);
    daemon.crash();
    let session = daemon.session(&blocks::gqa()).await;
    let found = blocks::restore(&session, &set).await.unwrap();
    all_but(&found, &[], 60);
}

#[test]
fn a_page_corrupted_while_the_daemon_is_down_is_a_counted_miss() {
    run(
        LIMIT,
        corrupt_pages(Options::default().lane("pread"), false),
    );
}

#[test]
fn a_page_corrupted_while_the_daemon_is_up_is_a_counted_miss() {
    run(LIMIT, corrupt_pages(Options::default(), true));
}

#[test]
fn a_page_corrupted_under_zstd_is_a_counted_miss() {
    run(LIMIT, corrupt_pages(Options::default().level("zstd"), true));
}

#[test]
fn a_page_corrupted_under_lossless_is_a_counted_miss() {
    run(
        LIMIT,
        corrupt_pages(Options::default().level("lossless"), true),
    );
}

#[test]
fn a_corrupted_record_header_is_a_counted_miss() {
    run(LIMIT, async {
        let (daemon, set) = cold(Options::default(), 40).await;
        let session = daemon.session(&blocks::gqa()).await;
        // Magic, sequence, epoch, part table: each byte is covered.
        for (at, byte) in [(3, 0), (9, 30), (17, 17), (25, 300)] {
            let (path, offset) = daemon.place_of(&session, &set[at].key).await;
            flip(&path, offset + byte);
        }
        let found = blocks::restore(&session, &set).await.unwrap();
        all_but(&found, &[3, 9, 17, 25], 40);
        assert!(
            found.misses.iter().all(|(_, miss)| miss.is_damage()),
            "{:?}",
            found.misses
        );
        assert_eq!(daemon.metrics().sum("kvtier_corrupt_total"), 4.0);
    });
}

// A misdirected write, or a file system that mixed blocks up: a whole record in the place of
// another, with good checksums.
#[test]
fn a_record_in_the_place_of_another_is_a_miss() {
    run(LIMIT, async {
        let (mut daemon, set) = cold(Options::default(), 40).await;
        let session = daemon.session(&blocks::gqa()).await;
        let (from_path, from) = daemon.place_of(&session, &set[3].key).await;
        let (to_path, to) = daemon.place_of(&session, &set[20].key).await;
        let mut record = vec![0; 36 << 10];
        File::open(from_path)
            .unwrap()
            .read_exact_at(&mut record, from)
            .unwrap();
        let target = File::options().write(true).open(to_path).unwrap();
        target.write_all_at(&record, to).unwrap();
        target.sync_all().unwrap();
        let found = blocks::restore(&session, &set).await.unwrap();
        all_but(&found, &[20], 40);
        assert!(found.misses[0].1.is_damage(), "{:?}", found.misses);
        drop(session);
        daemon.kill9();
        std::fs::remove_dir_all(daemon.catalog_dir()).unwrap();
        daemon.launch();
        let session = daemon.session(&blocks::gqa()).await;
        let found = blocks::restore(&session, &set).await.unwrap();
        all_but(&found, &[20], 40);
    });
}

#[test]
fn a_truncated_segment_loses_its_tail_and_nothing_else() {
    run(LIMIT, async {
        for with_catalog in [true, false] {
            let (mut daemon, set) = cold(Options::default().disk_mib(32, 2), 200).await;
            let session = daemon.session(&blocks::gqa()).await;
            let (victim, _) = daemon.place_of(&session, &set[0].key).await;
            let mut beyond = Vec::new();
            for (at, block) in set.iter().enumerate() {
                let (path, offset) = daemon.place_of(&session, &block.key).await;
                if path == victim && offset + (36 << 10) > 1 << 20 {
                    beyond.push(at);
                }
            }
            assert!(!beyond.is_empty(), "half of a full segment");
            drop(session);
            assert!(daemon.stop().success());
            File::options()
                .write(true)
                .open(&victim)
                .unwrap()
                .set_len(1 << 20)
                .unwrap();
            if !with_catalog {
                std::fs::remove_dir_all(daemon.catalog_dir()).unwrap();
            }
            daemon.launch();
            let session = daemon.session(&blocks::gqa()).await;
            let found = blocks::restore(&session, &set).await.unwrap();
            all_but(&found, &beyond, 200);
            let more = blocks::loose(&session, 2, 100, PayloadKind::Kv);
            blocks::save_durable(&session, &more).await;
            drop(session);
            daemon.crash();
            let session = daemon.session(&blocks::gqa()).await;
            blocks::restore_all(&session, &more).await;
        }
    });
}

#[test]
fn a_removed_segment_loses_its_blocks_and_nothing_else() {
    run(LIMIT, async {
        let (mut daemon, set) = cold(Options::default().disk_mib(32, 2), 200).await;
        let session = daemon.session(&blocks::gqa()).await;
        let (victim, _) = daemon.place_of(&session, &set[0].key).await;
        let mut lost = Vec::new();
        for (at, block) in set.iter().enumerate() {
            if daemon.place_of(&session, &block.key).await.0 == victim {
                lost.push(at);
            }
        }
        drop(session);
        assert!(daemon.stop().success());
        std::fs::remove_file(&victim).unwrap();
        daemon.launch();
        let session = daemon.session(&blocks::gqa()).await;
        let found = blocks::restore(&session, &set).await.unwrap();
        all_but(&found, &lost, 200);
    });
}

#[test]
fn a_deleted_catalog_is_rebuilt_from_the_segments() {
    run(LIMIT, async {
        for clean in [true, false] {
            let (mut daemon, set) = cold(Options::default(), 150).await;
            if clean {
                assert!(daemon.stop().success());
            } else {
                daemon.kill9();
            }
            std::fs::remove_dir_all(daemon.catalog_dir()).unwrap();
            daemon.launch();
            let metrics = daemon.metrics();
            assert_eq!(metrics.get("kvtier_recovered_blocks"), 150.0);
            if clean {
                let rebuilt = "kvtier_catalog_rebuilt_total{reason=\"missing\"}";
                assert_eq!(metrics.get(rebuilt), 1.0, "a rebuild is counted");
            }
            let session = daemon.session(&blocks::gqa()).await;
            let found = blocks::restore_all(&session, &set).await;
            assert_eq!(found.from(Tier::Disk), 150);
        }
    });
}

fn len_of(path: &Path) -> usize {
    usize::try_from(std::fs::metadata(path).unwrap().len()).unwrap()
}

/// Every file below a folder.
fn files(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(files(&path));
        } else {
            all.push(path);
        }
    }
    all.sort();
    all
}

// Museum row 10 (sled#1533, sled#1166): the catalog's library cannot open what an abrupt stop
// left, or panics. The catalog is disposable: any doubt, and the segments are asked.
#[test]
fn museum_10_a_catalog_full_of_garbage_is_rebuilt_from_the_segments() {
    type Spoil = fn(&Path, &mut ChaCha8Rng);
    let spoils: [(&str, Spoil); 5] = [
        ("random bytes", |path, rng| {
            let mut bytes = vec![0; len_of(path).max(512)];
            rng.fill_bytes(&mut bytes);
            std::fs::write(path, bytes).unwrap();
        }),
        ("cut short", |path, rng| {
            let len = std::fs::metadata(path).unwrap().len();
            let file = File::options().write(true).open(path).unwrap();
            file.set_len(rng.random_range(0..=len / 2)).unwrap();
        }),
        ("some bytes flipped", |path, rng| {
            let len = std::fs::metadata(path).unwrap().len();
            for _ in 0..if len == 0 { 0 } else { 20 } {
                flip(path, rng.random_range(0..len));
            }
        }),
        ("removed files", |path, rng| {
            if rng.random_bool(0.5) {
                std::fs::remove_file(path).unwrap();
            }
        }),
        ("zeroes", |path, _| {
            let len = len_of(path);
            std::fs::write(path, vec![0; len]).unwrap();
        }),
    ];
    run(LIMIT, async {
        let (mut daemon, set) = cold(Options::default(), 150).await;
        let mut rng = ChaCha8Rng::seed_from_u64(10);
        for (what, spoil) in spoils {
            assert!(daemon.stop().success());
            for path in files(&daemon.catalog_dir()) {
                spoil(&path, &mut rng);
            }
            daemon.launch();
            let found = daemon.metrics().get("kvtier_recovered_blocks");
            assert_eq!(found, 150.0, "{what}");
            let session = daemon.session(&blocks::gqa()).await;
            blocks::restore_all(&session, &set).await;
        }
        // A plain file where the folder should be.
        assert!(daemon.stop().success());
        std::fs::remove_dir_all(daemon.catalog_dir()).unwrap();
        std::fs::write(daemon.catalog_dir(), b"no folder").unwrap();
        daemon.launch();
        let session = daemon.session(&blocks::gqa()).await;
        blocks::restore_all(&session, &set).await;
    });
}

// Goal: records of another store, with the same keys, namespace and layout, are not ours.
#[test]
fn a_segment_of_another_store_gives_no_block() {
    run(LIMIT, async {
        let options = Options::default().disk_mib(32, 2);
        let (mut theirs, _) = cold(options.clone(), 10).await;
        let session = theirs.session(&blocks::gqa()).await;
        let foreign = blocks::loose(&session, 77, 30, PayloadKind::Kv);
        blocks::save_durable(&session, &foreign).await;
        let (foreign_path, _) = theirs.place_of(&session, &foreign[0].key).await;
        drop(session);
        assert!(theirs.stop().success());
        for with_catalog in [true, false] {
            let (mut ours, set) = cold(options.clone(), 200).await;
            let session = ours.session(&blocks::gqa()).await;
            let (victim, _) = ours.place_of(&session, &set[0].key).await;
            drop(session);
            assert!(ours.stop().success());
            std::fs::copy(&foreign_path, &victim).unwrap();
            let extra = ours.disk_dir().join("segment-0000000f.kvs");
            std::fs::copy(&foreign_path, extra).unwrap();
            if !with_catalog {
                std::fs::remove_dir_all(ours.catalog_dir()).unwrap();
            }
            ours.launch();
            let session = ours.session(&blocks::gqa()).await;
            let found = blocks::restore(&session, &foreign).await.unwrap();
            assert_eq!(found.hits, vec![], "their blocks are not ours");
            let found = blocks::restore(&session, &set).await.unwrap();
            assert!(
                found.hits.len() > 100,
                "{} of ours are left",
                found.hits.len()
            );
            assert!(
                found.hits.len() < 200,
                "one segment of ours was overwritten"
            );
            let more = blocks::loose(&session, 5, 100, PayloadKind::Kv);
            blocks::save_durable(&session, &more).await;
        }
    });
}

#[test]
fn segments_that_changed_places_give_no_wrong_block() {
    run(LIMIT, async {
        for with_catalog in [true, false] {
            let (mut daemon, set) = cold(Options::default().disk_mib(32, 2), 200).await;
            assert!(daemon.stop().success());
            let segments = daemon.segments();
            let (a, b) = (&segments[0].1, &segments[1].1);
            let aside = daemon.home().join("aside");
            std::fs::rename(a, &aside).unwrap();
            std::fs::rename(b, a).unwrap();
            std::fs::rename(&aside, b).unwrap();
            if !with_catalog {
                std::fs::remove_dir_all(daemon.catalog_dir()).unwrap();
            }
            daemon.launch();
            let session = daemon.session(&blocks::gqa()).await;
            let found = blocks::restore(&session, &set).await.unwrap();
            assert!(!found.hits.is_empty(), "other segments are as they were");
            blocks::save_durable(&session, &set).await;
            blocks::restore_all(&session, &set).await;
        }
    });
}

// Goal: whatever is written over the files, no wrong byte comes out and the daemon starts and
// stores. Method: noise in random places of random files, many times over one store.
#[test]
fn noise_over_all_files_never_gives_a_wrong_byte() {
    let rounds = rounds("KVTIER_TEST_NOISE_ROUNDS", 12);
    let seed = u64::from(std::process::id());
    println!("seed {seed}, {rounds} rounds");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    run(LIMIT * 2 + LIMIT / 12 * rounds, async {
        let (mut daemon, mut set) = cold(Options::default().disk_mib(24, 1), 200).await;
        let (mut hits, mut misses) = (0, 0);
        for round in 0..rounds {
            if rng.random_bool(0.5) {
                daemon.kill9();
            } else {
                assert!(daemon.stop().success());
            }
            for path in files(&daemon.disk_dir()) {
                let len = std::fs::metadata(&path).unwrap().len();
                if len == 0 || path.ends_with("lock") || rng.random_bool(0.6) {
                    continue;
                }
                let file = File::options().write(true).open(&path).unwrap();
                for _ in 0..rng.random_range(1..4) {
                    let mut noise = vec![0; rng.random_range(1..2000)];
                    rng.fill_bytes(&mut noise);
                    let at = rng.random_range(0..len);
                    noise.truncate(usize::try_from(len - at).unwrap());
                    file.write_all_at(&noise, at).unwrap();
                }
            }
            daemon.launch();
            let session = daemon.session(&blocks::gqa()).await;
            let found = blocks::restore(&session, &set).await.unwrap();
            hits += found.hits.len();
            misses += found.misses.len();
            // What is gone can be saved again.
            blocks::save_durable(&session, &set).await;
            let fresh = blocks::loose(&session, 1000 + u64::from(round), 10, PayloadKind::Kv);
            blocks::save_durable(&session, &fresh).await;
            set.splice(..10, fresh);
        }
        println!("{hits} hits, {misses} misses, no wrong byte");
        assert!(
            hits > 0 && misses > 0,
            "the noise hit nothing, or everything"
        );
    });
}
