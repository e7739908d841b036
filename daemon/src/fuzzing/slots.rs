//! Names that a client gives of what it was granted: staging slots and tickets for descriptors.
//!
//! Upstairs:   the targets `slot_names` and `tickets`.
//! Downstairs: `region`, `server::descriptors`.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::{BlockKey, BlockLayout, LayoutFingerprint, NamespaceId, PayloadKind, Quality};

use crate::block::{BlockFacts, BlockId, PlannedBlock};
use crate::region::{SlotName, Staging, TakenSlot};
use crate::server::descriptors::Tickets;
use crate::tier::save::Payload;

const REGION: u32 = 2;
const REGION_BYTES: usize = 64 << 10;
/// Bytes of one step of an input.
const STEP: usize = 8;

fn planned(key: u8, bytes: u64) -> Option<PlannedBlock> {
    let id = BlockId {
        namespace: NamespaceId(1),
        kind: PayloadKind::Opaque,
        key: BlockKey([key; 32]),
    };
    let facts = BlockFacts {
        parent: BlockKey::ROOT,
        position: 0,
        through: Quality::Exact,
        fingerprint: LayoutFingerprint([0; 32]),
        layout: Arc::new(BlockLayout::opaque(16, bytes).ok()?),
        order: PartOrder::TokenMajor,
    };
    Some(PlannedBlock { id, facts })
}

/// What a region must be, kept the simple way.
#[derive(Default)]
struct Model {
    /// Slots that were granted, with their keys.
    granted: Vec<(SlotName, u8)>,
    /// First byte and room of every slot that is granted or taken.
    held: BTreeMap<u64, u64>,
}

/// Steps of 8 bytes grant slots, take them, release them and drop what was taken. Whatever is
/// named, no two slots overlap, and only what was granted as named is taken, once (R1, R2).
pub(super) fn run(data: &[u8]) {
    let Ok(staging) = Staging::create(REGION, REGION_BYTES) else {
        return;
    };
    let (staging, mut model) = (Arc::new(staging), Model::default());
    let mut taken: Vec<(SlotName, TakenSlot)> = Vec::new();
    for step in data.chunks_exact(STEP).take(512) {
        let Ok([what, which, key, a, b, c, d, _]) = <[u8; STEP]>::try_from(step) else {
            return;
        };
        let number = u64::from(u32::from_le_bytes([a, b, c, d]));
        match what % 4 {
            0 => model.grant(&staging, key, number),
            1 => {
                let (name, key) = model.name(which, key, number);
                if let Some(slot) = model.take(&staging, &name, key) {
                    taken.push((name, slot));
                }
            }
            2 => {
                let (name, _) = model.name(which, key, number);
                model.release(&staging, &name);
            }
            _ => {
                if !taken.is_empty() {
                    let (name, slot) = taken.swap_remove(usize::from(which) % taken.len());
                    drop(slot);
                    model.held.remove(&name.offset);
                }
            }
        }
    }
    drop(taken);
    for (name, _) in model.granted {
        assert!(staging.release(&name).is_ok());
    }
    // All of it is free again, in one piece.
    let whole = planned(1, REGION_BYTES as u64);
    assert!(
        whole.and_then(|block| staging.grant(block)).is_some(),
        "memory was lost"
    );
}

impl Model {
    fn grant(&mut self, staging: &Arc<Staging>, key: u8, number: u64) {
        let Some(block) = planned(key, 1 + number % (REGION_BYTES as u64 / 2)) else {
            return;
        };
        let len = block.facts.layout.payload_len() as u64;
        let Some(name) = staging.grant(block) else {
            assert!(!self.held.is_empty(), "an empty region has no room");
            return;
        };
        let room = len.next_multiple_of(4096);
        assert_eq!((name.region, name.length), (REGION, len));
        assert!(name.offset + room <= REGION_BYTES as u64);
        for (at, other) in &self.held {
            assert!(
                name.offset + room <= *at || at + other <= name.offset,
                "{name:?}"
            );
        }
        let reused = |(other, _): &(SlotName, u8)| other.generation == name.generation;
        assert!(!self.granted.iter().any(reused), "{name:?}");
        self.held.insert(name.offset, room);
        self.granted.push((name, key));
    }

    /// A name that was granted, changed in one field by `which`, or one of which nothing is true.
    fn name(&self, which: u8, key: u8, number: u64) -> (SlotName, u8) {
        let nothing = SlotName {
            region: REGION,
            offset: number,
            length: number,
            generation: number,
        };
        let at = usize::from(which >> 3) % self.granted.len().max(1);
        let (mut name, granted) = self.granted.get(at).copied().unwrap_or((nothing, key));
        match which % 8 {
            1 => name.region = name.region.wrapping_add(1 + u32::from(key)),
            2 => name.offset = number << (key % 33),
            3 => name.length = number,
            4 => name.generation = number,
            5 => return (name, key),
            _ => {}
        }
        (name, granted)
    }

    fn take(&mut self, staging: &Arc<Staging>, name: &SlotName, key: u8) -> Option<TakenSlot> {
        let known = self.granted.iter().position(|own| *own == (*name, key));
        let taken = staging.take(name, &[key; 32]);
        assert_eq!(taken.is_ok(), known.is_some(), "{name:?}");
        let (slot, known) = (taken.ok()?, known?);
        self.granted.swap_remove(known);
        let mut copy = vec![0; slot.block().facts.layout.payload_len()];
        assert_eq!(slot.copy_into(&mut copy), Ok(()));
        assert!(staging.take(name, &[key; 32]).is_err(), "taken twice");
        Some(slot)
    }

    /// A release names place and generation; the rest says nothing.
    fn release(&mut self, staging: &Arc<Staging>, name: &SlotName) {
        let same = |(own, _): &(SlotName, u8)| {
            (own.offset, own.generation) == (name.offset, name.generation)
        };
        let known = self.granted.iter().position(same);
        assert_eq!(staging.release(name).is_ok(), known.is_some(), "{name:?}");
        if let Some(known) = known {
            self.granted.swap_remove(known);
            self.held.remove(&name.offset);
        }
    }
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let step = |what: u8, which: u8, key: u8, number: u32| {
        let [a, b, c, d] = number.to_le_bytes();
        vec![what, which, key, a, b, c, d, 0]
    };
    let all = [
        step(0, 0, 1, 100),
        step(0, 0, 2, 5000),
        step(0, 0, 3, 20_000),
        step(1, 0, 0, 0),
        step(1, 4, 0, 77),
        step(2, 9, 0, 0),
        step(3, 0, 0, 0),
        step(0, 0, 4, 4095),
        step(1, 2, 12, 3),
        step(2, 2, 0, 4096),
    ];
    vec![all.concat(), all.iter().rev().flatten().copied().collect()]
}

/// Nobody guesses a ticket, shows another user's, or shows one twice.
pub(super) fn tickets(data: &[u8]) {
    let tickets = Tickets::default();
    let memory = rustix::fs::memfd_create("kvtier-fuzz", rustix::fs::MemfdFlags::CLOEXEC);
    let issued = memory.ok().and_then(|memory| tickets.issue(memory, 7).ok());
    let Some(ticket) = issued else { return };
    let (uid, shown) = data.split_first().unwrap_or((&0, data));
    assert!(tickets.redeem(shown, u32::from(*uid)).is_none());
    let mut near = *ticket.expose();
    for (byte, other) in near.iter_mut().zip(shown) {
        *byte ^= other;
    }
    let same = near == *ticket.expose();
    assert_eq!(tickets.redeem(&near, 7).is_some(), same);
    assert!(tickets.redeem(ticket.expose(), 8).is_none());
    assert_eq!(tickets.redeem(ticket.expose(), 7).is_some(), !same);
    assert!(tickets.redeem(ticket.expose(), 7).is_none());
}

pub(super) fn ticket_seeds() -> Vec<Vec<u8>> {
    vec![vec![7; 17], vec![7], vec![0; 17], vec![1; 40]]
}
