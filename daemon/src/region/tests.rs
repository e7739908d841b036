//! Tests of staging slots: no overlap, taken once, stale names touch nothing.

use std::sync::Arc;

use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::{BlockKey, BlockLayout, LayoutFingerprint, NamespaceId, PayloadKind, Quality};
use proptest::prelude::*;

use super::*;
use crate::block::{BlockFacts, BlockId};

pub(crate) fn planned(key: u8, bytes: u64) -> PlannedBlock {
    let layout = Arc::new(BlockLayout::opaque(16, bytes).unwrap());
    let id = BlockId {
        namespace: NamespaceId(1),
        kind: PayloadKind::Opaque,
        key: BlockKey([key; 32]),
    };
    let fingerprint = LayoutFingerprint([0; 32]);
    PlannedBlock {
        id,
        facts: BlockFacts {
            parent: BlockKey::ROOT,
            position: 0,
            through: Quality::Exact,
            fingerprint,
            layout,
            order: PartOrder::TokenMajor,
        },
    }
}

#[test]
fn take_gives_what_the_client_wrote_and_frees_the_slot_when_dropped() {
    let staging = Arc::new(Staging::create(3, 8192).unwrap());
    let slot = staging.grant(planned(1, 5)).unwrap();
    rustix::io::pwrite(staging.memory().fd(), b"bytes", slot.offset).unwrap();
    let second = staging.grant(planned(2, 4096)).unwrap();
    assert!(
        staging.grant(planned(3, 1)).is_none(),
        "the region has room for two pages"
    );

    let taken = staging.take(&slot, &[1; 32]).unwrap();
    let mut copy = [0; 5];
    taken.copy_into(&mut copy).unwrap();
    assert_eq!(&copy, b"bytes");
    assert!(
        staging.grant(planned(3, 1)).is_none(),
        "a taken slot is still in use"
    );
    drop(taken);
    assert!(staging.grant(planned(3, 1)).is_some());
    staging.release(&second).unwrap();
}

// Museum row 5 (vLLM#51667) in the form of a slot: a buffer that was handed over or given back
// cannot be named again, because its generation has moved on.
#[test]
fn museum_05_a_slot_is_taken_once_and_never_by_another_name() {
    let staging = Arc::new(Staging::create(1, 1 << 16).unwrap());
    let slot = staging.grant(planned(1, 100)).unwrap();
    let wrong = [
        SlotName {
            generation: slot.generation + 1,
            ..slot
        },
        SlotName { region: 2, ..slot },
        SlotName {
            offset: slot.offset + 4096,
            ..slot
        },
        SlotName {
            offset: u64::MAX,
            ..slot
        },
        SlotName { length: 99, ..slot },
        SlotName {
            length: u64::MAX,
            ..slot
        },
    ];
    for name in wrong {
        assert_eq!(
            staging.take(&name, &[1; 32]).unwrap_err(),
            StaleSlot,
            "{name:?}"
        );
    }
    assert_eq!(
        staging.take(&slot, &[2; 32]).unwrap_err(),
        StaleSlot,
        "another key"
    );
    assert_eq!(staging.take(&slot, &[]).unwrap_err(), StaleSlot, "no key");
    drop(staging.take(&slot, &[1; 32]).unwrap());
    assert_eq!(staging.take(&slot, &[1; 32]).unwrap_err(), StaleSlot);
    assert_eq!(staging.release(&slot), Err(StaleSlot));
    let again = staging.grant(planned(1, 100)).unwrap();
    assert_eq!(again.offset, slot.offset);
    assert_ne!(again.generation, slot.generation);
}

proptest! {
    // Goal: R1 under any order of grants, takes and releases.
    #[test]
    fn slots_never_overlap(
        steps in prop::collection::vec(
            (0u8..3, 1u64..20_000, any::<prop::sample::Index>()), 1..80,
        ),
    ) {
        let staging = Arc::new(Staging::create(1, 1 << 17).unwrap());
        let mut live: Vec<(SlotName, u8)> = Vec::new();
        for (round, (what, bytes, pick)) in (0u8..).zip(steps) {
            match what {
                0 => {
                    if let Some(slot) = staging.grant(planned(round, bytes)) {
                        for (other, _) in &live {
                            let apart = slot.offset + slot.length <= other.offset
                                || other.offset + other.length <= slot.offset;
                            prop_assert!(apart, "{:?} and {:?} overlap", slot, other);
                        }
                        prop_assert!(slot.offset + slot.length <= 1 << 17);
                        live.push((slot, round));
                    }
                }
                _ if live.is_empty() => {}
                1 => {
                    let (slot, key) = live.swap_remove(pick.index(live.len()));
                    drop(staging.take(&slot, &[key; 32]).unwrap());
                }
                _ => {
                    let (slot, _) = live.swap_remove(pick.index(live.len()));
                    staging.release(&slot).unwrap();
                }
            }
        }
    }
}
