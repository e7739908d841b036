//! The first look at every segment: its header block and its last block.
//!
//! Upstairs:   `recover`, `verify`.
//! Downstairs: `lane`, `format::segment`.

use std::sync::Arc;

use crate::disk::{Disk, FileId, Found};
use crate::format::segment::segment_number;
use crate::format::{BLOCK, SegmentHeader, StoreId, Superblock, Trailer, index};
use crate::lane::{Lane, Transfer};
use crate::mem::Arena;
use crate::planted::{Bug, planted};
use crate::store::SEGMENTS_MAX;

use super::flow::{Ask, Flow};

/// Times that a header is read before it counts as none.
const TRIES: u32 = 3;

/// What one segment file says of itself.
#[derive(Debug)]
pub(crate) struct Surveyed {
    pub(crate) number: u32,
    pub(crate) file: FileId,
    /// Length of the file in whole blocks. Unit: bytes.
    pub(crate) size: u64,
    /// A sound header that names this segment.
    pub(crate) header: Option<SegmentHeader>,
    /// A sound trailer that names this segment.
    pub(crate) trailer: Option<Trailer>,
    /// The device did not deliver the header, or not the same bytes each time: nobody knows what
    /// life the file leads.
    pub(crate) header_unread: bool,
    /// Checksum of the block that was last delivered for the header.
    header_bytes: Option<u32>,
}

impl Surveyed {
    /// Epoch of the life that the file leads in this store, as the header says. The trailer cannot:
    /// a file that is in use again has that of the life before until it is sealed.
    pub(crate) fn epoch(&self, store_id: StoreId) -> Option<u64> {
        let header = self.header.filter(|header| header.store_id == store_id);
        let told = header.map(|header| header.epoch);
        if planted(Bug::TrailerTellsLife) {
            let trailer = self.trailer.filter(|trailer| trailer.store_id == store_id);
            return told.or(trailer.map(|trailer| trailer.epoch));
        }
        told
    }

    /// The trailer, when it is the one of the present life.
    pub(crate) fn footer_of(&self, store_id: StoreId) -> Option<Trailer> {
        let epoch = self.epoch(store_id)?;
        self.trailer
            .filter(|trailer| trailer.store_id == store_id && trailer.epoch == epoch)
    }

    /// True when the header says that the file belongs to another store.
    pub(crate) fn is_foreign(&self, store_id: StoreId) -> bool {
        self.header
            .is_some_and(|header| header.store_id != store_id)
    }
}

/// The segments among `files`. One whose number is out of bounds was not made by a store.
pub(crate) fn segment_files(mut files: Vec<Found>) -> Vec<Found> {
    files.retain(|file| number_of(file).is_some());
    files
}

fn number_of(file: &Found) -> Option<u32> {
    segment_number(&file.name).filter(|number| u64::from(*number) < SEGMENTS_MAX)
}

/// Opens every segment file and reads its first and its last block. Files that do not open are left
/// alone.
pub(crate) fn survey<D: Disk>(
    lane: &mut Lane<D>,
    arena: &Arc<Arena>,
    files: &[Found],
) -> Vec<Surveyed> {
    let mut surveyed = Vec::with_capacity(files.len());
    for found in files {
        let Some(number) = number_of(found) else {
            continue;
        };
        match lane.disk().open(&found.name) {
            Ok(file) => {
                let size = found.len / BLOCK * BLOCK;
                surveyed.push(Surveyed {
                    number,
                    file,
                    size,
                    header: None,
                    trailer: None,
                    header_unread: false,
                    header_bytes: None,
                });
            }
            Err(problem) => tracing::warn!(name = found.name, %problem, "segment not opened"),
        }
    }
    surveyed.sort_by_key(|one| one.number);
    read_ends(lane, arena, &mut surveyed);
    if !planted(Bug::HeaderReadOnce) {
        read_headers_again(lane, arena, &mut surveyed);
    }
    surveyed
}

/// True when a segment is of a later incarnation: the superblock has forgotten something, perhaps
/// a wipe, and is worth as little as a damaged one.
pub(crate) fn has_forgotten(now: &Superblock, surveyed: &[Surveyed]) -> bool {
    surveyed.iter().filter_map(|one| one.header).any(|header| {
        header.store_id == now.store_id && header.epoch >> 32 > u64::from(now.incarnation)
    })
}

fn read_ends<D: Disk>(lane: &mut Lane<D>, arena: &Arc<Arena>, surveyed: &mut [Surveyed]) {
    let long_enough = surveyed
        .iter()
        .enumerate()
        .filter(|(_, one)| one.size >= 2 * BLOCK);
    let asks = long_enough.flat_map(|(number, one)| {
        let ends = [(false, 0), (true, one.size - BLOCK)];
        ends.map(|(last, at)| Ask {
            what: (number, last),
            file: one.file,
            at,
            len: BLOCK,
        })
    });
    let mut flow = Flow::new(arena, asks);
    while let Some(((number, last), result)) = flow.next(lane) {
        let Some(one) = surveyed.get_mut(number) else {
            continue;
        };
        match result {
            Ok(block) => one.note(last, &block),
            Err(problem) => {
                tracing::warn!(segment = one.number, %problem, "end of a segment not read");
                one.header_unread |= !last;
            }
        }
    }
}

/// Reads once more the headers that are none: what was misread once must not count as lost, or the
/// records of the life before would be taken for those of the present one.
fn read_headers_again<D: Disk>(lane: &mut Lane<D>, arena: &Arc<Arena>, all: &mut [Surveyed]) {
    for one in all.iter_mut().filter(|one| one.size >= 2 * BLOCK) {
        for _ in 1..TRIES {
            if one.header.is_some() {
                break;
            }
            let Ok(buf) = arena.alloc_or_own(index(BLOCK)) else {
                break;
            };
            let read = Transfer::read(one.file, 0, buf, index(BLOCK));
            match lane.run(read) {
                (Some(block), Ok(())) => one.note(false, &block),
                _ => one.header_unread = true,
            }
        }
    }
}

impl Surveyed {
    fn note(&mut self, last: bool, block: &[u8]) {
        let number = self.number;
        if last {
            let trailer = Trailer::decode(block, self.size);
            self.trailer = trailer.filter(|trailer| trailer.segment == number);
            return;
        }
        let header = SegmentHeader::decode(block);
        self.header = header.filter(|header| header.segment == number);
        let bytes = crc32fast::hash(block);
        let same = self
            .header_bytes
            .replace(bytes)
            .is_none_or(|before| before == bytes);
        self.header_unread = self.header.is_none() && (self.header_unread || !same);
    }
}
