//! Models of a staging region: grants, commits, releases and drops of slots, all at once.
//!
//! Upstairs:   `cargo test`.
//! Downstairs: `region` and `shm`, as the daemon has them.
#![allow(clippy::unwrap_used, reason = "a panic is the failure report")]

use std::sync::Arc;

use kvtier_models::block::{BlockFacts, BlockId, PlannedBlock};
use kvtier_models::planted::Bug;
use kvtier_models::region::Staging;
use kvtier_models::{finds, holds};
use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::{BlockKey, BlockLayout, LayoutFingerprint, NamespaceId, PayloadKind, Quality};
use shuttle::thread;

const SLOT: u64 = 4096;

fn planned(key: u8) -> PlannedBlock {
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
        layout: Arc::new(BlockLayout::opaque(16, SLOT).unwrap()),
        order: PartOrder::TokenMajor,
    };
    PlannedBlock { id, facts }
}

/// A client commits one slot twice, releases it as well, and has the place granted again.
fn one_slot_named_by_all() {
    let staging = Arc::new(Staging::create(1, 4096).unwrap());
    let slot = staging.grant(planned(1)).unwrap();
    let commit = || {
        let staging = Arc::clone(&staging);
        thread::spawn(move || {
            let taken = staging.take(&slot, &[1; 32]);
            thread::yield_now();
            if let Ok(taken) = &taken {
                let key = taken.block().id.key;
                assert_eq!(key, BlockKey([1; 32]), "another block's slot was taken");
            }
            taken.is_ok()
        })
    };
    let release = {
        let staging = Arc::clone(&staging);
        thread::spawn(move || staging.release(&slot).is_ok())
    };
    let again = {
        let staging = Arc::clone(&staging);
        thread::spawn(move || {
            let other = staging.grant(planned(2));
            if let Some(other) = &other {
                assert!(other.generation > slot.generation);
                assert!(
                    staging.take(&slot, &[1; 32]).is_err(),
                    "a slot of the past is taken"
                );
            }
            other
        })
    };
    let commits = [commit(), commit()].map(|thread| usize::from(thread.join().unwrap()));
    let ended = commits.iter().sum::<usize>() + usize::from(release.join().unwrap());
    assert_eq!(ended, 1, "a slot ends once");
    if let Some(other) = again.join().unwrap() {
        staging.release(&other).unwrap();
    }
    assert!(staging.grant(planned(3)).is_some(), "the place was lost");
}

// Goal: R2 and museum row 5's lesson, whoever races: a name is good for one use of a place.
#[test]
fn a_slot_is_taken_or_released_once_and_under_its_own_name_in_every_order() {
    holds(one_slot_named_by_all);
    assert!(finds(Bug::TakeInTwoSteps, one_slot_named_by_all));
}
