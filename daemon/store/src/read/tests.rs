//! Verification: every single flipped bit is a miss, and refused bytes cannot be seen.

use super::*;
use crate::testkit::*;

fn unverified(store: &mut Fixture, number: u64) -> Unverified {
    let (tag, buf) = (store.tag(), store.buf());
    store.store.get(tag, &want(NS, number), buf).unwrap();
    let mut events = Vec::new();
    while events.is_empty() {
        store.store.step(crate::disk::Wait::One, &mut events);
    }
    match events.remove(0) {
        crate::Event::Got {
            result: Ok(unverified),
            ..
        } => unverified,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_flipped_bit_anywhere_that_counts_is_a_miss_and_zeroes_the_buffer() {
    let mut store = Fixture::new();
    store.put_all([1]);
    let place = store.place(1);
    let end = place.head_len as usize + stored_len(1);
    let table_end = 256 + 4 * 20;
    let spots = (0..table_end)
        .step_by(3)
        .chain((place.head_len as usize..end).step_by(97));
    for at in spots {
        let mut damaged = unverified(&mut store, 1);
        damaged.buf[at] ^= 0x20;
        let (buf, miss) = damaged.verify().expect_err("a flipped bit passed");
        assert!(
            miss.is_damage() || miss == Miss::StaleEpoch,
            "byte {at}: {miss:?}"
        );
        assert!(
            buf.iter().all(|byte| *byte == 0),
            "byte {at}: refused bytes can be seen"
        );
    }
}

#[test]
fn bytes_that_no_checksum_covers_are_zero_in_a_record() {
    let mut store = Fixture::new();
    store.put_all([1]);
    let place = store.place(1);
    let mut noisy = unverified(&mut store, 1);
    let end = place.head_len as usize + stored_len(1);
    noisy.buf[end..place.len as usize].fill(0x77);
    let record = noisy.verify().unwrap();
    assert!(
        record.buf[end..place.len as usize]
            .iter()
            .all(|byte| *byte == 0)
    );
    assert_eq!(record.payload(), payload(NS, 1, 0, stored_len(1)));
}

#[test]
fn parts_of_a_record_are_its_rows_and_bytes() {
    let mut store = Fixture::new();
    store.put_all([1]);
    let record = unverified(&mut store, 1).verify().unwrap();
    let bytes = payload(NS, 1, 0, stored_len(1));
    let mut from = 0;
    for (number, spec) in parts(1).iter().enumerate() {
        let (row, part) = record.part(number).unwrap();
        assert_eq!(
            (row.layer, row.code, row.raw_len),
            (spec.layer, spec.code, spec.raw_len)
        );
        assert_eq!(part, &bytes[from..from + spec.stored_len as usize]);
        from += spec.stored_len as usize;
    }
    assert!(record.part(4).is_none());
    assert_eq!(record.into_image().unwrap().payload(), bytes);
}

#[test]
fn a_record_cut_out_of_parts_is_no_image() {
    let mut store = Fixture::new();
    store.put_all([1]);
    let (tag, buf) = (store.tag(), store.buf());
    store.store.get_parts(tag, &want(NS, 1), 1..3, buf).unwrap();
    let mut events = Vec::new();
    while events.is_empty() {
        store.store.step(crate::disk::Wait::One, &mut events);
    }
    let crate::Event::Got {
        result: Ok(unverified),
        ..
    } = events.remove(0)
    else {
        panic!()
    };
    let record = unverified.verify().unwrap();
    assert!(record.part(0).is_none() && record.part(1).is_some() && record.part(3).is_none());
    assert!(record.into_image().is_err());
}
