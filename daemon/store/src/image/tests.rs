//! Building records: layout known before, refusals that name what was wrong.

use super::*;
use crate::format::Head;
use crate::mem::{Arena, Share};
use crate::testkit::{NS, build, image, meta, parts, payload, stored_len};

fn part(stored_len: u32, raw_len: u32) -> PartSpec {
    PartSpec {
        layer: 0,
        code: PartCode::K,
        flags: 0,
        stored_len,
        raw_len,
    }
}

fn refusal(meta: &RecordMeta, parts: &[PartSpec], head_len: Option<u32>) -> String {
    let arena = Arena::create("test", 64 << 10, Share::Private).unwrap();
    let mut builder = RecordBuilder::new(meta, parts);
    if let Some(head_len) = head_len {
        builder = builder.with_head_len(head_len);
    }
    let (buf, problem) = builder.build(arena.alloc(16 << 10).unwrap()).unwrap_err();
    assert_eq!(buf.len(), 16 << 10, "the buffer comes back");
    problem.to_string()
}

#[test]
fn image_is_aligned_and_its_padding_is_zero() {
    let arena = Arena::create("test", 1 << 20, Share::Private).unwrap();
    let image = image(&arena, NS, 3, 0);
    let layout = image.layout();
    assert!(layout.head_len.is_multiple_of(4096) && layout.image_len.is_multiple_of(4096));
    assert_eq!(image.payload(), payload(NS, 3, 0, stored_len(3)));
    let end = layout.head_len as usize + layout.stored_len as usize;
    assert!(
        image.buf()[end..layout.image_len as usize]
            .iter()
            .all(|byte| *byte == 0)
    );
}

#[test]
fn refusals_name_the_value_and_what_is_accepted() {
    let good = [part(10, 10)];
    let none = refusal(&meta(NS, 1), &[], None);
    assert!(none.contains("1 to 2048 parts, not 0"), "{none}");
    let empty = refusal(&meta(NS, 1), &[part(10, 10), part(0, 5)], None);
    assert!(
        empty.contains("part 1") && empty.contains("not 0 and 5"),
        "{empty}"
    );
    let long = refusal(&meta(NS, 1), &[part(u32::MAX, 10)], None);
    assert!(long.contains("at most 1 GiB"), "{long}");
    let tokens = refusal(
        &RecordMeta {
            tokens: 0,
            ..meta(NS, 1)
        },
        &good,
        None,
    );
    assert!(tokens.contains("1 to 2048 tokens, not 0"), "{tokens}");
    let short = refusal(&meta(NS, 1), &[part(20_000, 20_000)], None);
    assert!(
        short.contains("takes 24576 bytes and the buffer has 16384"),
        "{short}"
    );
    for head_len in [0, 4095, 5000, 128 << 10] {
        let head = refusal(&meta(NS, 1), &good, Some(head_len));
        assert!(head.contains("4096 to 65536"), "{head}");
    }
}

#[test]
fn head_room_can_be_larger_than_needed_for_an_encoder_that_did_not_know() {
    let arena = Arena::create("test", 1 << 20, Share::Private).unwrap();
    let (meta, parts) = (meta(NS, 2), parts(2));
    let builder = RecordBuilder::new(&meta, &parts).with_head_len(12 << 10);
    let bytes = payload(NS, 2, 0, stored_len(2));
    let mut buf = arena
        .alloc(builder.layout().unwrap().image_len as usize)
        .unwrap();
    buf[12 << 10..][..bytes.len()].copy_from_slice(&bytes);
    let mut image = builder.build(buf).unwrap();
    assert_eq!(image.payload(), bytes);
    let (store_id, offset) = (StoreId([1; 16]), 4096);
    image.stamp(&Stamp {
        store_id,
        epoch: 1,
        sequence: 1,
        segment: 0,
        offset,
    });
    assert_eq!(
        Head::decode(image.buf())
            .unwrap()
            .header
            .summary
            .place
            .head_len,
        12 << 10
    );
}

#[test]
fn the_largest_part_list_fits_the_largest_head_room() {
    let layout = ImageLayout::new((0..2048).map(|_| 1 << 19)).unwrap();
    assert!(layout.head_len <= HEAD_LEN_MAX);
    assert_eq!(layout.stored_len, 1 << 30);
    assert!(matches!(
        ImageLayout::new((0..2049).map(|_| 1)),
        Err(ImageError::Parts { parts: 2049 })
    ));
    let tall = vec![(1 << 30) as u32];
    assert!(ImageLayout::new(tall).unwrap().head_len <= HEAD_LEN_MAX);
}

#[test]
fn a_record_from_the_device_is_an_image_that_can_be_put_again() {
    let arena = Arena::create("test", 1 << 20, Share::Private).unwrap();
    let bytes = payload(NS, 5, 0, stored_len(5));
    let image = build(&arena, &meta(NS, 5), &parts(5), &bytes);
    let (buf, header) = image.into_parts();
    let again = RecordImage::from_verified(buf, header);
    assert_eq!(
        (again.payload(), again.summary().key),
        (&bytes[..], meta(NS, 5).key)
    );
}
