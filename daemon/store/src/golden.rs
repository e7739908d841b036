//! Images that earlier versions wrote: every later version opens them, or says that it does not.
//!
//! Upstairs:   nothing.
//! Downstairs: `tests/golden/v1`, two stores of this format's first version, and `disk::sim`.
//!
//! `closed` ended in order; `killed` lost its writer while a segment was open. They are made once,
//! by `KVTIER_TEST_REGENERATE=1` where they are missing, and never again.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is the failure report"
)]

use std::path::PathBuf;

use crate::disk::Disk;
use crate::disk::sim::{SimDisk, SimOptions};
use crate::format::superblock::SUPERBLOCK_NAME;
use crate::testkit::*;
use crate::*;

/// Records that both images hold; those of [`OTHER`] were wiped.
const KEPT: std::ops::Range<u64> = 0..8;

fn folder(image: &str) -> PathBuf {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/v1");
    PathBuf::from(root).join(image)
}

/// The store that an image was made of: sealed segments and an open one, a wipe, a block that was
/// replaced by another variant.
fn made() -> Fixture {
    let mut store = Fixture::new();
    for number in 0..3 {
        store.put(OTHER, number, 0);
    }
    store.rest();
    store.store.wipe(OTHER, &mut Vec::new()).unwrap();
    store.put(NS, 5, 1);
    store.rest();
    store.put_all(KEPT);
    store
}

fn write(image: &str, disk: &mut SimDisk) {
    std::fs::create_dir_all(folder(image)).unwrap();
    for found in disk.list().unwrap() {
        let packed = zstd::encode_all(disk.content(&found.name).unwrap().as_slice(), 19).unwrap();
        std::fs::write(folder(image).join(found.name + ".zst"), packed).unwrap();
    }
}

fn read(image: &str) -> SimDisk {
    if std::env::var_os("KVTIER_TEST_REGENERATE").is_some() && !folder(image).exists() {
        let store = made().store;
        let mut disk = match image {
            "closed" => store.close(&mut Vec::new()).restart(1),
            _ => store.abandon().killed(1),
        };
        write(image, &mut disk);
    }
    let mut disk = SimDisk::new(SimOptions::default());
    for entry in std::fs::read_dir(folder(image)).unwrap() {
        let path = entry.unwrap().path();
        let bytes = zstd::decode_all(std::fs::File::open(&path).unwrap()).unwrap();
        disk.plant(path.file_stem().unwrap().to_str().unwrap(), bytes);
    }
    disk
}

#[test]
fn stores_of_version_1_open_with_every_record_they_had() {
    for image in ["closed", "killed"] {
        let mut store = Fixture::reopened(read(image));
        assert_eq!(store.report.superblock, SuperblockFound::Sound, "{image}");
        assert!(KEPT.into_iter().all(|number| store.hits(number)), "{image}");
        // The open segment and the one prepared behind it have no footer.
        let without_footer = if image == "killed" { 2 } else { 0 };
        assert_eq!(store.report.scanned, without_footer);
        assert_eq!(store.report.wiped, 3, "{image}: a wipe holds for ever");
        store.put_all(20..30);
        let mut store = Fixture::reopened(store.store.abandon().crash(1));
        assert!(
            (20..30).chain(KEPT).all(|number| store.hits(number)),
            "{image}"
        );
    }
}

#[test]
fn a_store_of_a_later_version_is_refused_and_left_as_it_is() {
    for slots in [vec![0], vec![1], vec![0, 1]] {
        let mut disk = read("closed");
        let bytes = disk.content(SUPERBLOCK_NAME).unwrap();
        for slot in slots {
            let slot = &mut bytes[slot * (64 << 10)..][..64 << 10];
            slot[4..6].copy_from_slice(&7u16.to_le_bytes());
            let crc = crc32fast::hash(&slot[..65532]);
            slot[65532..].copy_from_slice(&crc.to_le_bytes());
        }
        let before = bytes.clone();
        // The disk goes with the refused opening: another of the same content is looked at.
        let kept = disk.restart(1);
        let problem = Store::open(disk, options(), None, &mut |_| {}).unwrap_err();
        assert!(
            matches!(problem, OpenError::Newer { found: 7 }),
            "{problem}"
        );
        assert!(
            problem
                .to_string()
                .contains("format version 7; this program knows version 1")
        );
        assert_eq!(kept.restart(2).content(SUPERBLOCK_NAME).unwrap(), &before);
        let problem = crate::verify::run(kept, &mut |_| {}).unwrap_err();
        assert!(
            matches!(problem, OpenError::Newer { found: 7 }),
            "{problem}"
        );
    }
}
