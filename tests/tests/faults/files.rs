//! Files that are not what they were: another time's, another version's, or gone under the
//! daemon's hands.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness; files are changed behind the daemon's back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kvtier_client::{Miss, PayloadKind, SaveBlock, Session};
use kvtier_tests::harness::journal::Journal;
use kvtier_tests::harness::{Daemon, Options, binary, blocks, kill, run};
use rustix::process::Signal;

use super::LIMIT;

/// Length of a superblock slot, and where its checksum lies. Unit: bytes.
const SLOT: usize = 64 << 10;
const SLOT_CRC: usize = SLOT - 4;

/// Every file of the disk tier but the catalog's, with its content.
fn content(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|one| one.unwrap());
    let store = entries
        .map(|one| one.path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "kvs"));
    store
        .map(|path| (path.clone(), std::fs::read(&path).unwrap()))
        .collect()
}

/// Writes a version into a structure whose checksum lies at `crc_at`, and makes it sound again.
fn set_version(bytes: &mut [u8], version: u16, crc_at: usize) {
    bytes[4..6].copy_from_slice(&version.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..crc_at]);
    bytes[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
}

fn verify(dir: &Path) -> (Option<i32>, String) {
    let output = Command::new(binary::kvtier())
        .arg("verify")
        .arg(dir)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

#[test]
fn a_store_of_a_later_version_is_refused_by_name_and_not_touched() {
    run(LIMIT, async {
        let model = blocks::gqa();
        let make = |session: &Session| blocks::loose(session, 1, 40, PayloadKind::Kv);
        let (mut daemon, set) = Daemon::cold(Options::default(), &model, make).await;
        assert!(daemon.stop().success());
        let path = daemon.disk_dir().join("superblock.kvs");
        let ours = std::fs::read(&path).unwrap();
        let mut later = ours.clone();
        for slot in later.chunks_mut(SLOT) {
            set_version(slot, 2, SLOT_CRC);
        }
        std::fs::write(&path, later).unwrap();
        let before = content(&daemon.disk_dir());
        let why = daemon.try_launch().unwrap_err();
        assert!(why.contains("format version 2"), "{why}");
        assert!(why.contains("knows version 1"), "{why}");
        let (code, said) = verify(&daemon.disk_dir());
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains("format version 2"), "{said}");
        assert!(content(&daemon.disk_dir()) == before, "a file was touched");
        std::fs::write(&path, ours).unwrap();
        daemon.launch();
        let session = daemon.session(&model).await;
        blocks::restore_all(&session, &set).await;
    });
}

// A daemon that was downgraded with its superblock, or a disk that mixes two hosts' files.
#[test]
fn records_and_segments_of_a_later_version_are_misses() {
    run(LIMIT, async {
        let model = blocks::gqa();
        for with_catalog in [true, false] {
            let options = Options::default().disk_mib(32, 1);
            let make = |session: &Session| blocks::loose(session, 1, 150, PayloadKind::Kv);
            let (mut daemon, set) = Daemon::cold(options, &model, make).await;
            let session = daemon.session(&model).await;
            let (path, offset) = daemon.place_of(&session, &set[149].key).await;
            drop(session);
            assert!(daemon.stop().success());
            let at = usize::try_from(offset).unwrap();
            let mut bytes = std::fs::read(&path).unwrap();
            set_version(&mut bytes[at..at + 256], 2, 252);
            std::fs::write(&path, bytes).unwrap();
            let (_, other) = daemon.segments().swap_remove(0);
            assert_ne!(other, path, "the first and the last block lie apart");
            let mut bytes = std::fs::read(&other).unwrap();
            set_version(&mut bytes[..64], 2, 60);
            std::fs::write(&other, bytes).unwrap();
            if !with_catalog {
                std::fs::remove_dir_all(daemon.catalog_dir()).unwrap();
            }
            daemon.launch();
            let session = daemon.session(&model).await;
            let found = blocks::restore(&session, &set).await.unwrap();
            let missed: Vec<usize> = found.misses.iter().map(|(at, _)| *at).collect();
            assert!(missed.contains(&149), "{missed:?}");
            assert!(found.hits.len() > 100, "{} of 150", found.hits.len());
            let more = blocks::loose(&session, 2, 100, PayloadKind::Kv);
            blocks::save_durable(&session, &more).await;
        }
    });
}

// A backup of one file, or a file system that lost the last hours of it: right checksums, this
// store, another life of the segment.
#[test]
fn segments_of_another_epoch_give_right_blocks_or_none() {
    run(LIMIT, async {
        let model = blocks::gqa();
        for with_catalog in [true, false] {
            let options = Options::default().host_mib(16).disk_mib(8, 1);
            let make = |session: &Session| blocks::loose(session, 1, 120, PayloadKind::Kv);
            let (mut daemon, old) = Daemon::cold(options, &model, make).await;
            assert!(daemon.stop().success());
            let backup = content(&daemon.disk_dir());
            daemon.launch();
            let session = daemon.session(&model).await;
            let mut new = Vec::new();
            for seed in 2..8 {
                new = blocks::loose(&session, seed, 120, PayloadKind::Kv);
                blocks::save_durable(&session, &new).await;
            }
            drop(session);
            assert!(daemon.stop().success());
            let mut replaced = 0;
            for (number, (path, bytes)) in backup.iter().enumerate() {
                let segment = path.file_name().unwrap().to_string_lossy().into_owned();
                if segment.starts_with("segment-") && number % 2 == 0 {
                    std::fs::write(path, bytes).unwrap();
                    replaced += 1;
                }
            }
            assert!(replaced > 0, "{:?}", backup.keys());
            if !with_catalog {
                std::fs::remove_dir_all(daemon.catalog_dir()).unwrap();
            }
            daemon.launch();
            let session = daemon.session(&model).await;
            let found = blocks::restore(&session, &new).await.unwrap();
            assert!(!found.hits.is_empty(), "other segments are as they were");
            let stale = |(_, miss): &(usize, Miss)| {
                *miss == Miss::Absent || miss.is_damage() || *miss == Miss::StaleEpoch
            };
            assert!(found.misses.iter().all(stale), "{:?}", found.misses);
            blocks::restore(&session, &old).await.unwrap();
            // It lives on, and through another start.
            blocks::save_durable(&session, &new).await;
            drop(session);
            daemon.crash();
            let session = daemon.session(&model).await;
            blocks::restore_all(&session, &new).await;
        }
    });
}

// A backup of the superblock has forgotten what was wiped since: nothing of the store counts.
#[test]
fn a_superblock_of_another_time_brings_back_no_wiped_block() {
    run(LIMIT, async {
        let model = blocks::gqa();
        let make = |session: &Session| blocks::loose(session, 1, 60, PayloadKind::Kv);
        let (mut daemon, wiped) = Daemon::cold(Options::default(), &model, make).await;
        assert!(daemon.stop().success());
        let path = daemon.disk_dir().join("superblock.kvs");
        let old = std::fs::read(&path).unwrap();
        daemon.launch();
        let session = daemon.session(&model).await;
        session.wipe().await.unwrap();
        let more = blocks::loose(&session, 2, 60, PayloadKind::Kv);
        blocks::save_durable(&session, &more).await;
        drop(session);
        assert!(daemon.stop().success());
        std::fs::write(&path, old).unwrap();
        let (code, said) = verify(&daemon.disk_dir());
        assert_eq!(code, Some(3), "{said}");
        daemon.launch();
        let session = daemon.session(&model).await;
        let found = blocks::restore(&session, &wiped).await.unwrap();
        assert_eq!(found.hits, vec![], "acknowledged as wiped");
        blocks::save_durable(&session, &more).await;
    });
}

// Goal: nothing durable hangs on the catalog, whenever it goes and however the daemon ends.
// Method: clients save all the time; the catalog, where an end in order left one, is deleted under
// the daemon; SIGTERM or SIGKILL; everything compared.
#[test]
fn a_catalog_deleted_under_load_loses_nothing_durable() {
    let options = Options::default().host_mib(16).disk_mib(256, 2);
    let mut daemon = Daemon::start(options);
    let mut journal = Journal::default();
    let mut deletions = 0;
    for round in 0..6u64 {
        let in_order = round % 3 < 2;
        let deleted;
        (journal, deleted) = run(LIMIT, async {
            let saving = kill::save_until_gone(&daemon, journal, round);
            let ending = async {
                tokio::time::sleep(Duration::from_millis(150)).await;
                let deleted = std::fs::remove_dir_all(daemon.catalog_dir()).is_ok();
                tokio::time::sleep(Duration::from_millis(150)).await;
                daemon.signal(if in_order { Signal::TERM } else { Signal::KILL });
                deleted
            };
            tokio::join!(saving, ending)
        });
        deletions += u32::from(deleted);
        let status = daemon.wait_exit(Duration::from_secs(60));
        assert_eq!(status.success(), in_order, "{status}");
        daemon.launch();
        let rebuilt = daemon.metrics().sum("kvtier_catalog_rebuilt_total");
        assert!(
            rebuilt == 0.0 || (deleted && in_order),
            "counted behind an end in order, of a life that lost its catalog"
        );
        run(LIMIT, async {
            let session = daemon.session(&blocks::gqa()).await;
            journal.verify(&session).await;
        });
    }
    assert!(deletions >= 2, "{deletions} lives had a catalog to lose");
    let durable: Vec<SaveBlock> = journal.durable;
    assert!(durable.len() > 60, "{} blocks were durable", durable.len());
}
