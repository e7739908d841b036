//! The head room of a record: header, part table, span checksums.
//!
//! Upstairs:   the target `record_head`.
//! Downstairs: `format::record`.

use kvtier_proto::Miss;
use kvtier_proto::limits::PARTS_MAX;

use super::{INPUT_MAX, ROW, TABLE, record, seal_head};
use crate::format::record::{HEAD_LEN_MAX, Stamp, encode_head, stamp};
use crate::format::{BLOCK, Head, Part, padded};

pub(super) fn run(data: &[u8]) {
    if data.len() > INPUT_MAX {
        return;
    }
    check(data);
    let mut sealed = data.to_vec();
    seal_head(&mut sealed);
    check(&sealed);
}

/// What is taken is within every bound and encodes to the very bytes that it was read from.
fn check(bytes: &[u8]) {
    let head = match Head::decode(bytes) {
        Ok(head) => head,
        Err(miss) => {
            let named = [Miss::HeaderCrc, Miss::Unsupported].contains(&miss);
            return assert!(named, "{miss:?}");
        }
    };
    let (header, place) = (head.header, head.header.summary.place);
    assert!(place.head_len <= HEAD_LEN_MAX && u64::from(place.head_len).is_multiple_of(BLOCK));
    assert!(place.head_len as usize <= bytes.len());
    let image_len = u64::from(place.head_len) + padded(u64::from(header.stored_len));
    assert_eq!(u64::from(place.len), image_len);
    assert_eq!(header.parts as usize, head.parts().len());
    assert!((1..=PARTS_MAX).contains(&head.parts().len()));
    let mut offset = 0;
    for part in head.parts() {
        assert_eq!(part.offset, offset);
        assert!(part.stored_len > 0 && part.raw_len > 0);
        offset += part.stored_len;
    }
    assert_eq!(offset, header.stored_len);
    let raw: u32 = head.parts().iter().map(|part| part.raw_len).sum();
    assert_eq!(raw, header.raw_len);
    let spans: usize = head.parts().iter().map(Part::spans).sum();
    assert_eq!(head.spans().len(), spans);
    // Each is summed up from the first: a few are enough.
    for (at, part) in head.parts().iter().enumerate().take(8) {
        assert_eq!(head.spans_of(at).map(<[u32]>::len), Some(part.spans()));
    }
    assert_eq!(head.spans_of(head.parts().len()), None);
    again(bytes, &head);
}

fn again(bytes: &[u8], head: &Head) {
    let (header, place) = (head.header, head.header.summary.place);
    let mut again = vec![0; place.head_len as usize];
    encode_head(&mut again, &header, head.parts(), head.spans());
    let by = Stamp {
        store_id: header.store_id,
        epoch: place.epoch,
        sequence: place.sequence,
        segment: place.segment,
        offset: place.offset,
    };
    stamp(&mut again, &by);
    let end = TABLE + head.parts().len() * ROW + head.spans().len() * 4;
    assert_eq!(again.get(..end), bytes.get(..end), "it encodes differently");
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let shapes: [&[u32]; 4] = [&[100], &[4096, 4096, 1, 4095], &[70_000, 1], &[64; 96]];
    let build = |(number, lens): (u8, &[u32])| record(number, lens, 8192);
    (1..).zip(shapes).filter_map(build).collect()
}
