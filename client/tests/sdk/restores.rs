//! Restores: what arrives is right, what is dropped is given back, what is wrong is refused.
//!
//! Upstairs:   `main`.
//! Downstairs: `fake`.

use std::time::Duration;

use kvtier_client::{
    Acknowledge, BlockKey, BlockStatus, Error, Miss, PartCode, PayloadKind, ReadError,
    RestoreEvent, RestoreOptions, Session, SessionOptions, Tier,
};

use crate::fake::{
    Fake, Knobs, eventually, new_store, open, open_with, options, pattern, payload, prompt,
};

const KV: PayloadKind = PayloadKind::Kv;

type Turn = fn(&mut Knobs);

async fn saved(session: &Session, seed: u32, blocks: usize) -> Vec<BlockKey> {
    let tokens = prompt(seed, blocks);
    let fill = |block: &kvtier_client::SaveBlock, part: &kvtier_client::Part, bytes: &mut [u8]| {
        pattern(block.position, part.layer, part.code, bytes);
    };
    session
        .save_prefix(&tokens, b"", Acknowledge::Accepted, fill)
        .await
        .unwrap();
    session.prefix_keys(&tokens, b"")
}

async fn leases_come_back(fake: &Fake) {
    let none = || fake.store().leases.is_empty();
    eventually("its leases are given back", none).await;
}

#[tokio::test]
async fn restore_brings_plan_blocks_and_end_with_the_bytes_that_were_saved() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let mut keys = saved(&session, 1, 3).await;
    keys.push(BlockKey([9; 32]));
    let mut restore = session
        .restore(&keys, KV, RestoreOptions::default())
        .await
        .unwrap();

    let Some(RestoreEvent::Plan(plan)) = restore.next().await.unwrap() else {
        panic!("no plan");
    };
    assert_eq!(plan[2], BlockStatus::Present(Tier::Host));
    assert_eq!(plan[3], BlockStatus::Missing(Miss::Absent));
    for index in 0..3u32 {
        let Some(RestoreEvent::Ready(block)) = restore.next().await.unwrap() else {
            panic!("block {index} did not come");
        };
        assert_eq!((block.index(), block.tokens()), (index as usize, 16));
        assert_eq!(block.payload().unwrap(), payload(&session, index * 16, 16));
        let mut part = vec![0; 1024];
        block.copy_part_into(2, PartCode::V, &mut part).unwrap();
        assert_eq!(block.part(2, PartCode::V).unwrap(), part);
        assert_eq!(block.page(2).unwrap()[512..], part);
    }
    let Some(RestoreEvent::Done(summary)) = restore.next().await.unwrap() else {
        panic!("no end");
    };
    assert_eq!((summary.usable_blocks, summary.cancelled), (3, false));
    assert_eq!(summary.missed, [(3, Miss::Absent)]);
    assert!(restore.next().await.unwrap().is_none());
}

#[tokio::test]
async fn leased_block_refuses_parts_it_does_not_have_and_targets_of_another_size() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let keys = saved(&session, 1, 1).await;
    let restored = session
        .restore(&keys, KV, RestoreOptions::default())
        .await
        .unwrap();
    let block = restored.collect().await.unwrap().blocks.pop().unwrap();
    let code = PartCode::Hidden;
    assert_eq!(
        block.part(0, code),
        Err(ReadError::NoSuchPart { layer: 0, code })
    );
    assert_eq!(block.page(3), Err(ReadError::NoSuchPage { layer: 3 }));
    let (wanted, given) = (4608, 1);
    assert_eq!(
        block.copy_into(&mut [0]),
        Err(ReadError::WrongLength { wanted, given })
    );
}

#[tokio::test]
async fn dropped_blocks_and_unread_events_release_their_leases() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let keys = saved(&session, 1, 4).await;
    let restored = session
        .restore(&keys, KV, RestoreOptions::default())
        .await
        .unwrap();
    let mut restored = restored.collect().await.unwrap();
    assert_eq!(fake.store().leases.len(), 4);
    restored.blocks.remove(1).release();
    eventually("one lease is released", || fake.store().leases.len() == 3).await;
    drop(restored);
    eventually("all leases are released", || fake.store().leases.is_empty()).await;

    let mut unread = session
        .restore(&keys, KV, RestoreOptions::default())
        .await
        .unwrap();
    unread.next().await.unwrap();
    drop(unread);
    let abandoned = session
        .restore(&keys, KV, RestoreOptions::default())
        .await
        .unwrap();
    drop(abandoned);
    eventually("unread leases are released", || {
        let store = fake.store();
        store.leases_given == 12 && store.leases.is_empty()
    })
    .await;
}

#[tokio::test]
async fn dropping_a_restore_cancels_it_and_a_finished_one_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let keys = saved(&session, 1, 2).await;
    let restored = session
        .restore(&keys, KV, RestoreOptions::default())
        .await
        .unwrap();
    restored.collect().await.unwrap();
    assert!(fake.store().cancels.is_empty());

    fake.set(|knobs| knobs.hold_restore = true);
    let mut held = session
        .restore(&keys, KV, RestoreOptions::default())
        .await
        .unwrap();
    held.progress(1);
    held.progress(1);
    held.progress(2);
    drop(held);
    eventually("the restore is cancelled", || {
        fake.store().cancels.len() == 1
    })
    .await;
    assert_eq!(fake.store().progress, [1, 2]);
}

#[tokio::test]
async fn cancelled_restore_ends_and_counts_computed_blocks_as_usable() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let keys = saved(&session, 1, 2).await;
    fake.set(|knobs| knobs.hold_restore = true);
    let mut restore = session
        .restore(&keys, KV, RestoreOptions::default())
        .await
        .unwrap();
    restore.cancel();
    let summary = loop {
        if let RestoreEvent::Done(summary) = restore.next().await.unwrap().unwrap() {
            break summary;
        }
    };
    assert!(summary.cancelled);
    assert_eq!(summary.usable_blocks, 0, "never more than the daemon says");
}

#[tokio::test]
async fn restores_run_side_by_side_up_to_their_limit() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let (a, b) = (saved(&session, 1, 2).await, saved(&session, 2, 3).await);
    let options = RestoreOptions::default;
    let first = session.restore(&a, KV, options()).await.unwrap();
    let second = session.restore(&b, KV, options()).await.unwrap();
    let (second, first) = tokio::join!(second.collect(), first.collect());
    assert_eq!(first.unwrap().usable_blocks, 2);
    assert_eq!(second.unwrap().usable_blocks, 3);

    fake.set(|knobs| knobs.hold_restore = true);
    let mut running = Vec::new();
    for _ in 0..64 {
        running.push(session.restore(&a[..1], KV, options()).await.unwrap());
    }
    let error = session.restore(&a, KV, options()).await.unwrap_err();
    assert!(matches!(error, Error::Busy { .. }), "{error}");
    drop(running);
    eventually("the cancelled ones end", || {
        fake.store().cancels.len() == 64
    })
    .await;
    fake.set(|knobs| knobs.hold_restore = false);
    let opened = fake
        .store()
        .calls
        .iter()
        .filter(|call| **call == "restore_stream")
        .count();
    assert_eq!(opened, 1, "all restores share one stream");
}

#[tokio::test]
async fn restore_refuses_a_slot_outside_the_arena_and_a_block_that_comes_twice() {
    let bad: [(Turn, &str); 2] = [
        (|knobs| knobs.bad_lease = true, "in a region of 1048576"),
        (|knobs| knobs.lease_twice = true, "more blocks became ready"),
    ];
    for (knob, part) in bad {
        let dir = tempfile::tempdir().unwrap();
        let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
        let session = open(&fake).await;
        let keys = saved(&session, 1, 2).await;
        fake.set(knob);
        let restore = session
            .restore(&keys, KV, RestoreOptions::default())
            .await
            .unwrap();
        let error = restore.collect().await.unwrap_err();
        assert!(matches!(error, Error::BadReply { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
        leases_come_back(&fake).await;
    }
}

#[tokio::test]
async fn restore_ends_by_its_limits_when_no_event_comes() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let mut options = options();
    options.timeouts.restore_idle = Duration::from_millis(300);
    let session = open_with(&fake, options, SessionOptions::new("test")).await;
    let keys = saved(&session, 1, 2).await;
    fake.set(|knobs| knobs.hold_restore = true);
    let restore = session
        .restore(&keys, KV, RestoreOptions::default())
        .await
        .unwrap();
    let error = restore.collect().await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    eventually("it is cancelled", || fake.store().cancels.len() == 1).await;
    leases_come_back(&fake).await;
}

#[tokio::test]
async fn restores_in_flight_are_told_that_the_session_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let keys = saved(&session, 1, 2).await;
    fake.set(|knobs| knobs.hold_restore = true);
    let mut restore = session
        .restore(&keys, KV, RestoreOptions::default())
        .await
        .unwrap();
    let block = loop {
        if let RestoreEvent::Ready(block) = restore.next().await.unwrap().unwrap() {
            break block;
        }
    };
    assert!(block.payload().is_ok());
    fake.kill();
    let error = restore.collect().await.unwrap_err();
    assert!(matches!(error, Error::SessionLost { .. }), "{error}");
    assert_eq!(block.payload(), Err(ReadError::LeaseLost));
    assert_eq!(
        block.copy_into(&mut vec![0; 4608]),
        Err(ReadError::LeaseLost)
    );
    let error = session.release(vec![block]).await.unwrap_err();
    assert!(matches!(error, Error::SessionLost { .. }), "{error}");
}

#[tokio::test]
async fn release_confirms_that_leases_lived_and_says_when_they_did_not() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let keys = saved(&session, 1, 3).await;
    let restored = session
        .restore(&keys, KV, RestoreOptions::default())
        .await
        .unwrap();
    let blocks = restored.collect().await.unwrap().blocks;
    session.release(blocks).await.unwrap();
    assert!(fake.store().leases.is_empty());

    fake.set(|knobs| knobs.forget_leases = true);
    let restored = session
        .restore(&keys, KV, RestoreOptions::default())
        .await
        .unwrap();
    let blocks = restored.collect().await.unwrap().blocks;
    let error = session.release(blocks).await.unwrap_err();
    assert!(
        matches!(error, Error::LeaseLost { lost: 3, of: 3 }),
        "{error}"
    );
}

#[tokio::test]
async fn for_each_copies_every_block_and_holds_nothing_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let keys = saved(&session, 1, 5).await;
    let mut copies = vec![Vec::new(); 5];
    let restore = session
        .restore(&keys, KV, RestoreOptions::default())
        .await
        .unwrap();
    let copying = restore.for_each(|block, bytes| copies[block.index()] = bytes.to_vec());
    let summary = copying.await.unwrap();
    assert_eq!(summary.usable_blocks, 5);
    for (position, copy) in (0u32..).step_by(16).zip(&copies) {
        assert_eq!(*copy, payload(&session, position, 16));
    }
    assert!(fake.store().leases.is_empty());

    fake.set(|knobs| knobs.forget_leases = true);
    let restore = session
        .restore(&keys, KV, RestoreOptions::default())
        .await
        .unwrap();
    let error = restore.for_each(|_, _| ()).await.unwrap_err();
    assert!(matches!(error, Error::LeaseLost { .. }), "{error}");
}

#[tokio::test]
async fn scattered_restore_brings_blocks_after_a_miss_and_counts_the_prefix_only() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let mut keys = saved(&session, 1, 4).await;
    keys[1] = BlockKey([9; 32]);
    let scattered = RestoreOptions::default().scattered();
    let restored = session.restore(&keys, KV, scattered).await.unwrap();
    let restored = restored.collect().await.unwrap();
    assert_eq!((restored.blocks.len(), restored.usable_blocks), (3, 1));
    assert_eq!(restored.missed, [(1, Miss::Absent)]);
}

#[tokio::test]
async fn leased_block_outlives_its_session_handle() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let keys = saved(&session, 1, 1).await;
    let want = payload(&session, 0, 16);
    let restored = session
        .restore(&keys, KV, RestoreOptions::default())
        .await
        .unwrap();
    let block = restored.collect().await.unwrap().blocks.pop().unwrap();
    drop(session);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(block.payload().unwrap(), want);
    drop(block);
    eventually("the session ends with it", || fake.store().sessions == 0).await;
}
