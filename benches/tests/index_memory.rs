//! What a stored block costs in memory, all that the store keeps of it counted.
//!
//! Upstairs:   `cargo test`.
//! Downstairs: a store over a device that forgets records, in a process of its own.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is the failure report"
)]

use kvtier_proto::{BlockKey, LayoutFingerprint, Level, NamespaceId, PayloadKind, Quality};
use kvtier_store::catalog::SledCatalog;
use kvtier_store::disk::hollow::HollowDisk;
use kvtier_store::disk::lane::{LaneKind, open_lane};
use kvtier_store::disk::{Disk, Wait};
use kvtier_store::mem::{Arena, Share};
use kvtier_store::{Event, PartCode, PartSpec, RecordBuilder, RecordMeta, Store, StoreOptions};

const BLOCKS: u64 = 400_000;
const BYTES_A_BLOCK_MAX: u64 = 160;

/// Memory of this process that is neither shared nor a file's: heap and stacks.
fn anonymous_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let kib: u64 = line
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    kib * 1024
}

fn meta(number: u64) -> RecordMeta {
    let mut key = [0; 32];
    for (at, word) in (0..4).zip(key.chunks_mut(8)) {
        let mixed = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ at << 17);
        word.copy_from_slice(&(mixed ^ mixed >> 29).to_le_bytes());
    }
    RecordMeta {
        namespace: NamespaceId(1),
        key: BlockKey(key),
        parent: BlockKey::ROOT,
        layout: LayoutFingerprint([7; 32]),
        kind: PayloadKind::Kv,
        level: Level::RAW,
        through: Quality::Exact,
        tokens: 16,
        position: 0,
        codec_tables: 0,
    }
}

fn put_all<D: Disk>(store: &mut Store<D>, numbers: std::ops::Range<u64>) {
    let arena = Arena::create("test", 8 << 20, Share::Private).unwrap();
    let part = PartSpec {
        layer: 0,
        code: PartCode::K,
        flags: 0,
        stored_len: 100,
        raw_len: 100,
    };
    let mut bufs: Vec<_> = (0..512).map(|_| arena.alloc(8192).unwrap()).collect();
    let (mut numbers, mut events) = (numbers.peekable(), Vec::new());
    while numbers.peek().is_some() || bufs.len() < 512 {
        while numbers.peek().is_some()
            && let Some(buf) = bufs.pop()
        {
            let number = numbers.next().unwrap();
            let image = RecordBuilder::new(&meta(number), &[part])
                .build(buf)
                .unwrap();
            store.put(number, image).unwrap();
        }
        store.step(Wait::One, &mut events);
        for event in events.drain(..) {
            if let Event::Put { image, result, .. } = event {
                result.unwrap();
                bufs.push(image.unwrap().into_buf());
            }
        }
    }
}

// Goal: index, lists, pins, what the catalog is to hear of, and whatever else the store keeps: all
// of it together stays below the promise.
#[test]
fn a_stored_block_costs_at_most_160_bytes_of_memory() {
    let home = tempfile::tempdir().unwrap();
    let lane = open_lane(home.path(), LaneKind::Auto, 64, &[]).unwrap();
    let disk = HollowDisk::new(lane.disk, home.path());
    let catalog = SledCatalog::new(home.path().join("catalog"));
    let mut options = StoreOptions::new(4 << 30, [1; 16]);
    options.segment_size = 16 << 20;
    let (mut store, _) = Store::open(disk, options, Some(Box::new(catalog)), &mut |_| {}).unwrap();
    put_all(&mut store, 0..1000);
    let before = anonymous_bytes();
    put_all(&mut store, 1000..1000 + BLOCKS);
    let each = (anonymous_bytes() - before) / BLOCKS;
    assert_eq!(store.usage().blocks, 1000 + BLOCKS);
    assert!(
        each <= BYTES_A_BLOCK_MAX,
        "{each} bytes a block, of which the index takes {}",
        store.usage().index_bytes / BLOCKS
    );
    // Against vacuous success: the entries alone are 72 bytes.
    assert!(each >= 72, "{each} bytes a block cannot be all of it");
}
