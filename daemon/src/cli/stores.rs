//! Disk tiers for the tests of offline commands, written by the store itself.
//!
//! Upstairs:   tests of `inspect` and `verify`.
//! Downstairs: `kvtier-store` over real files.

use std::os::unix::fs::FileExt;
use std::path::Path;

use kvtier_proto::{BlockKey, LayoutFingerprint, Level, NamespaceId, PayloadKind, Quality};
use kvtier_store::disk::Wait;
use kvtier_store::disk::lane::{LaneKind, open_lane};
use kvtier_store::format::segment::segment_name;
use kvtier_store::mem::{Arena, Share};
use kvtier_store::{
    Event, PartCode, PartSpec, RecordBuilder, RecordMeta, SledCatalog, Store, StoreOptions,
};

/// Size of a segment file.
pub(super) const SEGMENT_SIZE: u64 = 1 << 20;
/// Size of a block's payload.
pub(super) const PAYLOAD: u32 = 8192;
/// The segment that is written first.
pub(super) const SEGMENT: u32 = 0;

/// Key of block `number`.
pub(super) fn key(number: u8) -> BlockKey {
    BlockKey([number + 1; 32])
}

/// Makes a store with blocks 0 to `blocks` in `dir` and closes it in order.
pub(super) fn with_blocks(dir: &Path, blocks: u8) {
    let lane = open_lane(dir, LaneKind::Pread, 8, &[]).unwrap();
    let mut options = StoreOptions::new(8 * SEGMENT_SIZE, [7; 16]);
    options.segment_size = SEGMENT_SIZE;
    let catalog = Box::new(SledCatalog::new(dir.join("catalog")));
    let (mut store, _) = Store::open(lane.disk, options, Some(catalog), &mut |_| {}).unwrap();
    let arena = Arena::create("test", 4 << 20, Share::Private).unwrap();
    let part = |code| PartSpec {
        layer: 0,
        code,
        flags: 0,
        stored_len: PAYLOAD / 2,
        raw_len: PAYLOAD / 2,
    };
    let parts = [part(PartCode::K), part(PartCode::V)];
    for number in 0..blocks {
        let meta = RecordMeta {
            namespace: NamespaceId(1),
            key: key(number),
            parent: BlockKey::ROOT,
            layout: LayoutFingerprint([9; 32]),
            kind: PayloadKind::Kv,
            level: Level::RAW,
            through: Quality::Exact,
            tokens: 16,
            position: 16 * u32::from(number),
            codec_tables: 0,
        };
        let builder = RecordBuilder::new(&meta, &parts);
        let layout = builder.layout().unwrap();
        let mut buf = arena
            .alloc(usize::try_from(layout.image_len).unwrap())
            .unwrap();
        buf.fill(number);
        let image = builder.build(buf).unwrap();
        store.put(u64::from(number), image).unwrap();
    }
    let mut events = Vec::new();
    let stored = |event: &Event| matches!(event, Event::Put { result: Ok(_), .. });
    while events.iter().filter(|event| stored(event)).count() < usize::from(blocks) {
        store.step(Wait::One, &mut events);
    }
    store.close(&mut events);
}

/// Inverts `len` bytes at `at` of a segment.
pub(super) fn scribble(dir: &Path, segment: u32, at: u64, len: usize) {
    let path = dir.join(segment_name(segment));
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, at).unwrap();
    bytes.iter_mut().for_each(|byte| *byte = !*byte);
    file.write_all_at(&bytes, at).unwrap();
}
