//! A whole record as a device delivers it, or some of its parts.
//!
//! Upstairs:   the target `record_image`.
//! Downstairs: `read`.

use std::sync::Arc;

use kvtier_proto::{LayoutFingerprint, Miss, NamespaceId};

use super::{INPUT_MAX, arena, seal_image};
use crate::format::record::SPAN;
use crate::format::{BLOCK, Head, Header, StoreId, index};
use crate::mem::IoBuf;
use crate::read::{Covered, Expectation, Partial, Record, Unverified, Want, cover};

pub(super) fn run(data: &[u8]) {
    if data.len() > INPUT_MAX {
        return;
    }
    check(data);
    let mut sealed = data.to_vec();
    seal_image(&mut sealed);
    check(&sealed);
}

fn check(bytes: &[u8]) {
    // Garbage where another record is expected is a miss, and nobody sees it.
    let Ok(header) = Header::decode(bytes) else {
        return;
    };
    let expect = Expectation {
        store_id: header.store_id,
        want: Want {
            namespace: header.summary.namespace,
            key: header.summary.key,
            layout: header.summary.layout,
        },
        place: header.summary.place,
    };
    assert_eq!(expect.check(&header), Ok(()));
    others(&expect, &header);
    let Some(buf) = filled(bytes) else { return };
    match Unverified::new(buf, expect, None).verify() {
        Ok(record) => {
            passed(bytes, &record);
            partly(bytes, expect, record.head());
        }
        Err((buf, miss)) => {
            let named = [Miss::HeaderCrc, Miss::PayloadCrc, Miss::Device];
            assert!(named.contains(&miss), "{miss:?}");
            assert!(buf.iter().all(|byte| *byte == 0), "refused bytes stayed");
        }
    }
}

fn filled(bytes: &[u8]) -> Option<IoBuf> {
    let mut buf = arena()?.alloc(bytes.len())?;
    buf.copy_from_slice(bytes);
    Some(buf)
}

/// Whoever asks for anything else is told so (H1, L2).
fn others(expect: &Expectation, header: &Header) {
    let other = |change: &dyn Fn(&mut Expectation)| {
        let mut other = *expect;
        change(&mut other);
        other.check(header)
    };
    let stale = Err(Miss::StaleEpoch);
    assert_eq!(other(&|it| it.place.epoch ^= 1), stale);
    assert_eq!(other(&|it| it.place.sequence ^= 1), stale);
    assert_eq!(
        other(&|it| it.store_id = StoreId(it.store_id.0.map(|byte| !byte))),
        stale
    );
    let elsewhere = Err(Miss::Misdirected);
    assert_eq!(other(&|it| it.place.offset ^= BLOCK), elsewhere);
    assert_eq!(other(&|it| it.place.segment ^= 1), elsewhere);
    let wrong_key = Err(Miss::WrongKey);
    assert_eq!(
        other(&|it| it.want.namespace = NamespaceId(it.want.namespace.0 ^ 1)),
        wrong_key
    );
    assert_eq!(
        other(&|it| it.want.key.0 = it.want.key.0.map(|byte| !byte)),
        wrong_key
    );
    let layout = |it: &mut Expectation| {
        it.want.layout = LayoutFingerprint(it.want.layout.0.map(|byte| !byte));
    };
    assert_eq!(other(&layout), Err(Miss::WrongLayout));
}

/// Every byte that can be reached has its checksum, and is the one that was delivered (H2).
fn passed(bytes: &[u8], record: &Record) {
    let head = record.head();
    let (from, len) = (head.header.summary.place.head_len, head.header.stored_len);
    let payload = bytes.get(from as usize..(from + len) as usize);
    assert_eq!(Some(record.payload()), payload);
    let mut crcs = Vec::new();
    for part in record.parts() {
        let Some((_, stored)) = record.part(part) else {
            panic!("part {part} of a whole record is missing");
        };
        crcs.extend(stored.chunks(SPAN as usize).map(crc32fast::hash));
    }
    assert_eq!(crcs, head.spans());
    assert!(record.part(head.parts().len()).is_none());
}

/// The same parts, read alone, are the same bytes.
fn partly(bytes: &[u8], expect: Expectation, head: &Head) {
    let count = head.parts().len();
    let first = usize::from(bytes.last().copied().unwrap_or_default()) % count;
    let parts = first..count.min(first + 2);
    let Some((payload_from, len)) = cover(head, &parts) else {
        panic!("no range covers parts {parts:?} of {count}");
    };
    let from = head.header.summary.place.head_len as usize + index(payload_from);
    // The device delivers whole blocks; a corpus file may end with the last byte.
    let mut delivered = vec![0xEE; index(len)];
    let there = bytes
        .get(from..bytes.len().min(from + index(len)))
        .unwrap_or_default();
    for (into, byte) in delivered.iter_mut().zip(there) {
        *into = *byte;
    }
    let Some(buf) = filled(&delivered) else {
        return;
    };
    let partial = Partial {
        covered: Covered {
            parts: parts.clone(),
            payload_from,
            buf_from: 0,
        },
        head: Some(Arc::new(head.clone())),
    };
    let Ok(record) = Unverified::new(buf, expect, Some(partial)).verify() else {
        panic!("parts {parts:?} of a sound record are refused");
    };
    assert_eq!(record.parts(), parts);
    for part in parts {
        let row = head.parts().get(part);
        let at = row.map(|row| head.header.summary.place.head_len + row.offset);
        let whole = row
            .zip(at)
            .and_then(|(row, at)| bytes.get(at as usize..(at + row.stored_len) as usize));
        assert_eq!(record.part(part).map(|(_, stored)| stored), whole);
    }
    let buf = record.into_image().expect_err("parts alone are no image");
    let outside = buf.iter().zip(&delivered).filter(|(now, then)| now != then);
    assert!(
        outside.into_iter().all(|(now, _)| *now == 0),
        "bytes appeared"
    );
}
