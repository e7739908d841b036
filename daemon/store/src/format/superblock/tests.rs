//! The superblock slot, and what it remembers of wipes.
#![allow(clippy::cast_possible_truncation, reason = "test numbers are small")]

use super::*;

fn sample() -> Superblock {
    Superblock {
        store_id: StoreId([9; 16]),
        revision: 4,
        incarnation: 3,
        segment_size: 1 << 20,
        floor: 0,
        clean: Some(CleanClose { rows: 5, digest: 6 }),
        wiped: vec![Wiped {
            namespace: NamespaceId(2),
            below: 77,
        }],
    }
}

fn encoded(superblock: &Superblock) -> Vec<u8> {
    let mut slot = vec![0xff; super::super::index(SLOT_LEN)];
    superblock.encode(&mut slot);
    slot
}

#[test]
fn golden_superblock_of_version_1() {
    let slot = encoded(&sample());
    assert_eq!(slot[..8], *b"KVB1\x01\0\0\0");
    assert_eq!(
        slot[24..40],
        [4, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0]
    );
    assert_eq!(
        slot[40..64],
        [
            0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0
        ]
    );
    assert_eq!(
        slot[64..80],
        [5, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(slot[96..108], [2, 0, 0, 0, 77, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(Superblock::decode(&slot), Some(sample()));
}

#[test]
fn superblock_with_a_flipped_bit_or_cut_short_is_refused() {
    let good = encoded(&sample());
    for at in (0..108).chain([1000, 65_531, 65_535]) {
        let mut slot = good.clone();
        slot[at] ^= 0x10;
        assert_eq!(Superblock::decode(&slot), None, "byte {at}");
    }
    assert_eq!(Superblock::decode(&good[..4096]), None);
    assert_eq!(Superblock::decode(&[]), None);
}

// Goal: no wipe is overlooked by a search in rows that are out of order, or twice the same.
#[test]
fn superblock_whose_wipes_are_out_of_order_is_refused() {
    let rows = |namespaces: [u32; 3]| {
        let row = |number| Wiped {
            namespace: NamespaceId(number),
            below: 5,
        };
        let wiped = namespaces.map(row).to_vec();
        encoded(&Superblock { wiped, ..sample() })
    };
    assert!(Superblock::decode(&rows([1, 2, 9])).is_some());
    for bad in [[1, 9, 2], [2, 2, 3], [1, 3, 3]] {
        assert_eq!(Superblock::decode(&rows(bad)), None, "{bad:?}");
    }
}

#[test]
fn a_wipe_covers_what_was_before_and_nothing_else() {
    let mut now = sample();
    now.wipe(NamespaceId(5), 100);
    now.wipe(NamespaceId(5), 90);
    assert!(now.is_wiped(NamespaceId(5), 99) && !now.is_wiped(NamespaceId(5), 100));
    assert!(now.is_wiped(NamespaceId(2), 76) && !now.is_wiped(NamespaceId(2), 77));
    assert!(!now.is_wiped(NamespaceId(4), 1));
}

#[test]
fn one_wipe_too_many_raises_the_floor_for_everybody() {
    let mut now = Superblock {
        wiped: Vec::new(),
        ..sample()
    };
    for number in 0..u32::try_from(WIPED_MAX).unwrap() {
        now.wipe(NamespaceId(number), 10);
    }
    assert!(!now.is_wiped(NamespaceId(1 << 20), 9));
    now.wipe(NamespaceId(1 << 20), 50);
    assert!((0..9000).all(|number| now.is_wiped(NamespaceId(number), 49)));
    assert!(!now.is_wiped(NamespaceId(3), 50));
    assert_eq!(Superblock::decode(&encoded(&now)), Some(now));
}

// A wipe that a device had missed comes with the sequence of its own time.
#[test]
fn a_wipe_repeated_late_never_lowers_what_others_are_wiped_below() {
    let mut now = Superblock {
        wiped: Vec::new(),
        floor: 20,
        ..sample()
    };
    for number in 0..u32::try_from(WIPED_MAX).unwrap() {
        now.wipe(NamespaceId(number), 100);
    }
    now.wipe(NamespaceId(1 << 20), 50);
    assert_eq!(now.wiped_below(NamespaceId(3)), 100);
    assert_eq!(now.wiped_below(NamespaceId(1 << 20)), 100);
}
