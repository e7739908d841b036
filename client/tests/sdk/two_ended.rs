//! Two-ended restores: what an engine is told of them, and where their maps lie.
//!
//! Upstairs:   `main`.
//! Downstairs: `fake`.

use std::time::Duration;

use kvtier_client::{
    BlockKey, ComputeEnd, Error, NextCompute, PayloadKind, RestoreEvent, RestoreOptions, Session,
    TwoEnded,
};
use kvtier_proto::v1;

use crate::fake::{Fake, Knobs, new_store, open};

const KV: PayloadKind = PayloadKind::Kv;
const MAPS_BYTES: u64 = 512 << 10;

fn keys(count: usize) -> Vec<BlockKey> {
    let key = |number: u64| BlockKey([number.to_le_bytes(); 4].concat().try_into().unwrap());
    (1..).map(key).take(count).collect()
}

fn two_ended() -> RestoreOptions {
    RestoreOptions::default().two_ended(TwoEnded::new(16))
}

/// Runs a restore of blocks that are not stored to its end.
async fn run(session: &Session, blocks: usize) -> (ComputeEnd, Result<(), Error>) {
    let restore = session.restore(&keys(blocks), KV, two_ended()).await;
    let mut restore = restore.unwrap();
    let compute = restore.compute_end();
    loop {
        match restore.next().await {
            Ok(Some(_)) => {}
            Ok(None) => return (compute, Ok(())),
            Err(error) => return (compute, Err(error)),
        }
    }
}

/// The engine computes all blocks of a restore that has ended.
fn compute_all(compute: &ComputeEnd, blocks: usize) {
    for index in 0..blocks {
        assert_eq!(compute.next(), NextCompute::Block(index));
        compute.computed(index, None);
    }
    assert_eq!(compute.next(), NextCompute::Finished);
}

/// Where the map of the last restore lay.
fn last_map(fake: &Fake) -> Option<v1::Slot> {
    *fake.store().maps.last().unwrap()
}

fn overlap(a: v1::Slot, b: v1::Slot) -> bool {
    a.offset < b.offset + b.length && b.offset < a.offset + a.length
}

#[tokio::test]
async fn two_ended_restore_shows_what_is_expected_of_it_after_the_plan() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    fake.set(|knobs| {
        knobs.outlook = Some(v1::Outlook {
            load_us: 1500,
            compute_us: 2_000_000,
            compute_blocks: 3,
            reason: "told to say so".into(),
            ..v1::Outlook::default()
        });
    });
    let restore = session.restore(&keys(3), KV, two_ended()).await;
    let mut restore = restore.unwrap();
    let plan = restore.next().await.unwrap();
    assert!(matches!(plan, Some(RestoreEvent::Plan(_))), "{plan:?}");
    let Some(RestoreEvent::Outlook(outlook)) = restore.next().await.unwrap() else {
        panic!("no outlook");
    };
    let (load, compute) = (Duration::from_micros(1500), Duration::from_secs(2));
    assert_eq!((outlook.load, outlook.compute), (Some(load), Some(compute)));
    assert_eq!((outlook.planned, outlook.compute_blocks), (None, 3));
    assert_eq!(outlook.reason, "told to say so");
    assert!(!restore.compute_end().is_let_in());
    drop(restore);
    // What collects everything is not disturbed by it.
    let restore = session.restore(&keys(3), KV, two_ended()).await.unwrap();
    assert_eq!(restore.collect().await.unwrap().missed.len(), 3);
}

// Goal: a daemon that writes the map of a restore late, after its stream has failed, writes into
// no other's.
#[tokio::test]
async fn map_of_a_restore_whose_stream_failed_is_never_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    fake.set(|knobs| knobs.break_restore = true);
    let mut lost = Vec::new();
    for _ in 0..5 {
        let (compute, end) = run(&session, 3).await;
        assert!(matches!(end, Err(Error::Daemon { .. })), "{end:?}");
        compute_all(&compute, 3);
        lost.push(last_map(&fake).unwrap());
    }
    fake.set(|knobs| knobs.break_restore = false);
    run(&session, 3).await.1.unwrap();
    let ended = last_map(&fake).unwrap();
    run(&session, 3).await.1.unwrap();
    assert_eq!(
        last_map(&fake),
        Some(ended),
        "the daemon has said that it is done with it"
    );
    lost.push(ended);
    for (at, map) in lost.iter().enumerate() {
        assert!(
            lost[..at].iter().all(|before| !overlap(*before, *map)),
            "{lost:?}"
        );
    }
    assert_eq!(fake.store().sessions, 1);
}

// Goal: what failed streams take is bounded, and an engine is served without it.
#[tokio::test]
async fn two_ended_restore_does_without_a_map_when_failed_streams_have_taken_all_room() {
    const BLOCKS: usize = 4096;
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    fake.set(|knobs| knobs.break_restore = true);
    let mut taken = 0;
    while taken + 4096 + 8 <= MAPS_BYTES {
        run(&session, BLOCKS).await.1.unwrap_err();
        let map = last_map(&fake).unwrap();
        taken += map.length;
        assert!(map.offset + map.length <= MAPS_BYTES);
    }
    fake.set(|knobs| knobs.break_restore = false);
    let (compute, end) = run(&session, BLOCKS).await;
    assert_eq!((last_map(&fake), end.is_ok()), (None, true));
    compute_all(&compute, BLOCKS);
    run(&session, 3).await.1.unwrap();
    assert!(last_map(&fake).is_some(), "a small one fits at the end");
}
