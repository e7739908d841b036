//! The walk through a segment that has no sound footer.
//!
//! Upstairs:   the target `segment_walk`.
//! Downstairs: `scan::Scanner`.
//!
//! The first byte of the input says how: bit 0 stamps what looks like a record for the place where
//! it lies and mends its checksums, bit 1 gives the epoch, bits 4 to 7 say how often a block cannot
//! be read. The rest are the blocks behind the segment header.

use super::{EPOCH, INPUT_MAX, SEGMENT, STORE, record, seal_image};
use crate::format::record::{MAGIC, SPAN};
use crate::format::{BLOCK, Head, fields, index};
use crate::scan::{Scanner, Verdict};

pub(super) fn run(data: &[u8]) {
    let Some((how, bytes)) = data.split_first() else {
        return;
    };
    let block = index(BLOCK);
    let mut segment = vec![0; block];
    segment.extend_from_slice(bytes);
    segment.resize(segment.len().next_multiple_of(block), 0);
    if segment.len() > INPUT_MAX {
        return;
    }
    if how & 1 != 0 {
        stamp_all(&mut segment);
    }
    let unreadable = usize::from(how >> 4);
    let is_read = |number: usize| unreadable == 0 || number % (unreadable + 1) != unreadable;
    let size = segment.len() as u64;
    let given = (how & 2 != 0).then_some(EPOCH);
    let mut scanner = Scanner::new(STORE, SEGMENT, size, given);
    let mut verdicts = Vec::new();
    for (number, block) in segment.chunks(block).enumerate().skip(1) {
        let block = is_read(number).then_some(block);
        scanner.feed(block, &mut |verdict| verdicts.push(verdict));
    }
    scanner.finish(&mut |verdict| verdicts.push(verdict));
    judge(&segment, &verdicts, &is_read);
    assert!(given.is_none() || scanner.epoch() == given);
}

/// Every verdict speaks of a place of its own, and what is called good is (H2, L2).
fn judge(segment: &[u8], verdicts: &[Verdict], is_read: &dyn Fn(usize) -> bool) {
    let (size, mut end) = (segment.len() as u64, BLOCK);
    for verdict in verdicts {
        match verdict {
            Verdict::Bad { offset, .. } => {
                assert!((end..size).contains(offset), "{verdict:?} behind {end}");
                end = offset + BLOCK;
            }
            Verdict::Good(summary) => {
                let place = summary.place;
                let after = place.offset + u64::from(place.len);
                assert!(place.offset >= end && after <= size, "{verdict:?}");
                assert_eq!(place.segment, SEGMENT);
                let blocks = index(place.offset / BLOCK)..index(after / BLOCK);
                assert!(blocks.clone().all(is_read), "{blocks:?} were not all read");
                whole(
                    segment
                        .get(index(place.offset)..index(after))
                        .unwrap_or_default(),
                );
                end = after;
            }
        }
    }
}

fn whole(image: &[u8]) {
    let Ok(head) = Head::decode(image) else {
        panic!("a good record has no head");
    };
    assert_eq!(head.header.store_id, STORE);
    let payload = image.get(head.header.summary.place.head_len as usize..);
    let payload = payload.unwrap_or_default();
    let crcs = head.parts().iter().flat_map(|part| {
        let (from, len) = (part.offset as usize, part.stored_len as usize);
        let bytes = payload.get(from..from + len).unwrap_or_default();
        bytes.chunks(SPAN as usize).map(crc32fast::hash)
    });
    assert!(crcs.eq(head.spans().iter().copied()));
}

fn stamp_all(segment: &mut [u8]) {
    for at in (index(BLOCK)..segment.len()).step_by(index(BLOCK)) {
        let rest = segment.get_mut(at..).unwrap_or_default();
        if rest.starts_with(&MAGIC) {
            fields::put(rest, 16, &EPOCH.to_le_bytes());
            fields::put(rest, 32, &SEGMENT.to_le_bytes());
            fields::put(rest, 40, &(at as u64).to_le_bytes());
            fields::put(rest, 176, &STORE.0);
            seal_image(rest);
        }
    }
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let of = |how: u8, shapes: &[&[u32]]| {
        let mut bytes = vec![how];
        for (number, lens) in (1..).zip(shapes) {
            let offset = (bytes.len() - 1) as u64 + BLOCK;
            bytes.extend(record(number, lens, offset).unwrap_or_default());
        }
        bytes
    };
    vec![
        of(0, &[&[100], &[4096, 1], &[9000]]),
        of(1, &[&[100, 100], &[5000], &[1]]),
        of(0x42, &[&[1], &[8192], &[1], &[1]]),
    ]
}
