//! A whole store, opened on any bytes: superblock, segments and catalog.
//!
//! Upstairs:   the target `store_open`.
//! Downstairs: `Store`, over `fuzzing::disk`.
//!
//! The input: a byte of flags (1 mends every checksum and stamps records for their places, 2 brings
//! a catalog whose sum is right), three lengths of two bytes each (superblock, catalog rows, front
//! of segment 0), and the bytes of these; what is left is the end of segment 0. Segment 1 is
//! segment 0 again, as a misdirected copy.

use kvtier_proto::{BlockKey, LayoutFingerprint, NamespaceId, Quality};

use super::disk::Memory;
use super::{EPOCH, STORE, arena, record, seal, seal_image, summary};
use crate::catalog::{Piece, ROW_LEN, Stamp, Sum, read_row, row_of};
use crate::disk::Wait;
use crate::format::record::MAGIC;
use crate::format::segment::{Footer, SEGMENT_SIZE_MIN, footer_len, segment_name};
use crate::format::superblock::{SLOT_LEN, SUPERBLOCK_NAME};
use crate::format::{BLOCK, CleanClose, SegmentHeader, Superblock, Trailer, fields, index};
use crate::image::{PartSpec, RecordBuilder, RecordMeta};
use crate::index::Stored;
use crate::{Catalog, CatalogError, Event, Store, StoreOptions, Want};

const SEGMENTS: u64 = 8;
/// Blocks that are read back.
const READ_MAX: usize = 16;
/// Steps that anything takes at the most.
const STEPS_MAX: usize = 10_000;
const NEW: BlockKey = BlockKey([0xAB; 32]);

/// Rows as the input gives them, under whatever stamp is asked for.
#[derive(Debug)]
struct Rows(Vec<Stored>);

impl Catalog for Rows {
    fn load(&mut self, _stamp: &Stamp, each: &mut dyn FnMut(&Stored)) -> Result<(), CatalogError> {
        self.0.iter().for_each(each);
        Ok(())
    }

    fn reset(&mut self) -> Result<(), CatalogError> {
        Ok(())
    }

    fn put(&mut self, _piece: &Piece<'_>) -> Result<(), CatalogError> {
        Ok(())
    }

    fn close(&mut self, _stamp: &Stamp) -> Result<(), CatalogError> {
        Ok(())
    }
}

type Opened = Store<Memory>;

fn options() -> StoreOptions {
    StoreOptions {
        segment_size: SEGMENT_SIZE_MIN,
        ..StoreOptions::new(SEGMENTS * SEGMENT_SIZE_MIN, [0x77; 16])
    }
}

pub(super) fn run(data: &[u8]) {
    let Some(input) = Input::of(data) else { return };
    let (disk, rows) = input.files();
    let before = disk.files.clone();
    let catalog = rows.map(|rows| Box::new(Rows(rows)) as Box<dyn Catalog>);
    let mut store = match Store::open(disk, options(), catalog, &mut |_| {}) {
        Ok((store, report)) => {
            assert_eq!(report.blocks, store.blocks().count() as u64);
            store
        }
        Err(problem) => return assert!(!problem.to_string().is_empty()),
    };
    let blocks: Vec<Stored> = store.blocks().take(READ_MAX).collect();
    for stored in blocks {
        read(&mut store, &stored, &before);
    }
    let durable = put(&mut store);
    // What was acknowledged is there after a restart, and this time there is no catalog.
    let disk = store.close(&mut Vec::new()).again();
    let Ok((mut store, _)) = Store::open(disk, options(), None, &mut |_| {}) else {
        panic!("a store that was closed in order does not open");
    };
    let found = get(&mut store, &wanted(NEW), 64 << 10);
    assert_eq!(found.is_some(), durable);
    assert!(found.is_none_or(|payload| payload.iter().all(|byte| *byte == 0xCD)));
}

fn wanted(key: BlockKey) -> Want {
    Want {
        namespace: NamespaceId(7),
        key,
        layout: LayoutFingerprint([0x11; 32]),
    }
}

fn rest(store: &mut Opened) -> Vec<Event> {
    let mut events = Vec::new();
    for _ in 0..STEPS_MAX {
        if store.is_idle() {
            return events;
        }
        store.step(Wait::One, &mut events);
    }
    panic!("the store does not come to rest");
}

/// Payload of a record that passed every check.
fn get(store: &mut Opened, want: &Want, room: usize) -> Option<Vec<u8>> {
    let buf = arena()?.alloc(room)?;
    store.get(1, want, buf).ok()?;
    let got = rest(store).into_iter().find_map(|event| match event {
        Event::Got { result, .. } => Some(result),
        _ => None,
    });
    let record = got?.ok()?.verify().ok()?;
    Some(record.payload().to_vec())
}

/// Whatever the index says of a block: what is read lies on the disk as it was read, at a place
/// whose header names this block (H1, H2, C1).
fn read(store: &mut Opened, stored: &Stored, before: &Files) {
    let place = stored.place;
    let segment = before.get(&segment_name(place.segment));
    let bytes = segment.and_then(|bytes| bytes.get(index(place.offset)..));
    let bytes = bytes.unwrap_or_default();
    let want = Want {
        namespace: stored.namespace,
        key: stored.key,
        layout: LayoutFingerprint(fields::array(bytes, 112).unwrap_or_default()),
    };
    if let Some(payload) = get(store, &want, 128 << 10) {
        assert!(
            bytes
                .get(place.head_len as usize..)
                .is_some_and(|at| at.starts_with(&payload))
        );
        assert_eq!(fields::array(bytes, 48), Some(stored.key.0));
        assert_eq!(fields::u32_at(bytes, 36), Some(stored.namespace.0));
    }
    let other = Want {
        layout: LayoutFingerprint(want.layout.0.map(|byte| !byte)),
        ..want
    };
    assert!(get(store, &other, 128 << 10).is_none(), "of another layout");
}

/// Stores one more record. True when it was acknowledged.
fn put(store: &mut Opened) -> bool {
    let Want {
        namespace,
        key,
        layout,
    } = wanted(NEW);
    let meta = RecordMeta {
        namespace,
        key,
        layout,
        parent: BlockKey::ROOT,
        kind: kvtier_proto::PayloadKind::Kv,
        level: kvtier_proto::Level::RAW,
        through: Quality::Exact,
        tokens: 16,
        position: 0,
        codec_tables: 0,
    };
    let parts = [PartSpec {
        layer: 0,
        code: crate::format::PartCode::K,
        flags: 0,
        stored_len: 5000,
        raw_len: 5000,
    }];
    let builder = RecordBuilder::new(&meta, &parts);
    let buf = arena().and_then(|arena| arena.alloc(16 << 10));
    let Some(mut buf) = buf else { return false };
    buf.fill(0xCD);
    let Ok(image) = builder.build(buf) else {
        panic!("a record of one part is refused");
    };
    if store.put(2, image).is_err() {
        return false;
    }
    let done = rest(store).into_iter().find_map(|event| match event {
        Event::Put { result, .. } => Some(result.is_ok()),
        _ => None,
    });
    let durable = done == Some(true);
    assert_eq!(get(store, &wanted(NEW), 64 << 10).is_some(), durable);
    durable
}

type Files = std::collections::BTreeMap<String, Vec<u8>>;

/// An input in its pieces.
struct Input<'a> {
    flags: u8,
    superblock: &'a [u8],
    rows: &'a [u8],
    front: &'a [u8],
    end: &'a [u8],
}

impl<'a> Input<'a> {
    fn of(data: &'a [u8]) -> Option<Self> {
        let ([flags, lens @ ..], mut rest) = data.split_first_chunk::<7>()?;
        let mut take = |at: usize| {
            let len = fields::u16_at(lens, at).map(usize::from)?;
            let (taken, left) = rest.split_at(len.min(rest.len()));
            rest = left;
            Some(taken)
        };
        let (superblock, rows, front) = (take(0)?, take(2)?, take(4)?);
        Some(Self {
            flags: *flags,
            superblock,
            rows,
            front,
            end: rest,
        })
    }

    fn files(&self) -> (Memory, Option<Vec<Stored>>) {
        let rows = self.rows.chunks_exact(ROW_LEN).filter_map(read_row);
        let rows: Vec<Stored> = rows.collect();
        let segment = self.segment();
        let mut disk = Memory::default();
        disk.files.insert(segment_name(0), segment.clone());
        disk.files.insert(segment_name(1), segment);
        let slots = self.superblock(&rows);
        disk.files.insert(SUPERBLOCK_NAME.to_owned(), slots);
        (disk, (self.flags & 2 != 0).then_some(rows))
    }

    fn segment(&self) -> Vec<u8> {
        let (size, block) = (index(SEGMENT_SIZE_MIN), index(BLOCK));
        let mut segment = vec![0; size];
        fields::put(
            &mut segment,
            0,
            self.front
                .get(..size.min(self.front.len()))
                .unwrap_or_default(),
        );
        let end = self.end.get(..size.min(self.end.len())).unwrap_or_default();
        fields::put(&mut segment, size - end.len(), end);
        if self.flags & 1 == 0 {
            return segment;
        }
        seal(segment.get_mut(..block).unwrap_or_default(), 60);
        for at in (block..size).step_by(block) {
            let rest = segment.get_mut(at..).unwrap_or_default();
            if rest.starts_with(&MAGIC) {
                fields::put(rest, 40, &(at as u64).to_le_bytes());
                seal_image(rest);
            }
        }
        let (body, trailer) = segment.split_at_mut(size - block);
        let rows = fields::u32_at(trailer, 28).unwrap_or_default() as usize;
        let table_at = fields::u64_at(trailer, 40).map_or(0, index);
        let table = body.get(table_at..).unwrap_or_default();
        if let Some(crc) = fields::crc_of(table, 0, rows.saturating_mul(128)) {
            fields::put(trailer, 64, &crc.to_le_bytes());
        }
        seal(trailer, 72);
        segment
    }

    fn superblock(&self, rows: &[Stored]) -> Vec<u8> {
        let mut slot = self.superblock.to_vec();
        slot.resize(index(SLOT_LEN), 0);
        if self.flags & 2 != 0 {
            let mut sum = Sum::default();
            rows.iter().for_each(|row| sum.add(row));
            let CleanClose { rows, digest } = sum.close();
            fields::put(&mut slot, 56, &1_u32.to_le_bytes());
            fields::put(&mut slot, 64, &rows.to_le_bytes());
            fields::put(&mut slot, 72, &digest.to_le_bytes());
        }
        if self.flags & 3 != 0 {
            seal(&mut slot, 65_532);
        }
        slot.repeat(2)
    }
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let mut slot = vec![0; index(SLOT_LEN)];
    let superblock = Superblock {
        store_id: STORE,
        revision: 3,
        incarnation: 1,
        segment_size: SEGMENT_SIZE_MIN,
        floor: 0,
        clean: None,
        wiped: Vec::new(),
    };
    superblock.encode(&mut slot);
    let header = SegmentHeader {
        store_id: STORE,
        segment: 0,
        epoch: EPOCH,
        segment_size: SEGMENT_SIZE_MIN,
        first_sequence: 1,
    };
    let mut front = vec![0; index(BLOCK)];
    header.encode(&mut front);
    let mut rows = Vec::new();
    for number in 1..=2 {
        let offset = front.len() as u64;
        let mut image = record(number, &[100, 4000], offset).unwrap_or_default();
        // Segment 0, where `record` says another.
        fields::put(&mut image, 32, &0_u32.to_le_bytes());
        seal_image(&mut image);
        let mut row = summary(number);
        (row.place.segment, row.place.offset) = (0, offset);
        row.place.len = u32::try_from(image.len()).unwrap_or_default();
        rows.push(row);
        front.extend(image);
    }
    let trailer = Trailer {
        store_id: STORE,
        segment: 0,
        rows: 2,
        epoch: EPOCH,
        table_at: SEGMENT_SIZE_MIN - footer_len(2),
        end: front.len() as u64,
        last_sequence: 2,
        table_crc: 0,
    };
    let mut footer = vec![0; index(footer_len(2))];
    Footer::encode(&mut footer, &trailer, &rows);
    let catalog = rows.iter().flat_map(|row| row_of(&Stored::of(row)));
    let catalog: Vec<u8> = catalog.collect();
    let of = |flags: u8, slot: &[u8], rows: &[u8], end: &[u8]| {
        let mut seed = vec![flags];
        for piece in [slot, rows, &front] {
            seed.extend(u16::try_from(piece.len()).unwrap_or_default().to_le_bytes());
        }
        [&seed[..], slot, rows, &front, end].concat()
    };
    let slot = slot.get(..108).unwrap_or_default();
    vec![
        of(1, slot, &[], &footer),
        of(3, slot, &catalog, &footer),
        of(1, slot, &[], &[]),
        of(0, &[], &[], &[]),
    ]
}
