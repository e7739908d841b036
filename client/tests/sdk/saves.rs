//! Reserving, filling and committing; windows; what is dropped is given back.
//!
//! Upstairs:   `main`.
//! Downstairs: `fake`.

use std::time::Duration;

use kvtier_client::{
    Acknowledge, BlockKey, Bytes, CommitFailure, CommitOutcome, Error, FillError, FilledSlot,
    Happened, PartCode, PayloadKind, Reservation, ReservedSlot, SaveBlock, SaveOutcome,
    SaveRefusal, Session, SessionOptions, SessionState,
};

use crate::fake::{
    BLOCK_LEN, Fake, Knobs, eventually, new_store, open, open_with, options, pattern, payload,
    prompt,
};

type Turn = fn(&mut Knobs);

fn blocks(session: &Session, seed: u32, count: usize) -> Vec<SaveBlock> {
    let tokens = prompt(seed, count);
    let keys = session.prefix_keys(&tokens, b"");
    SaveBlock::chain(&keys, tokens.len(), 16, PayloadKind::Kv)
}

/// Saves a whole prompt whose bytes do not matter.
async fn save(session: &Session, seed: u32, blocks: usize) -> Vec<SaveOutcome> {
    let tokens = prompt(seed, blocks);
    let saving = session.save_prefix(&tokens, b"", Acknowledge::Accepted, |_, _, _| ());
    saving.await.unwrap()
}

async fn slots(session: &Session, seed: u32, count: usize) -> Vec<ReservedSlot> {
    let reserved = session
        .reserve(&blocks(session, seed, count))
        .await
        .unwrap();
    let slot = |reservation| match reservation {
        Reservation::Slot(slot) => slot,
        other => panic!("{other:?}"),
    };
    reserved.into_iter().map(slot).collect()
}

fn fill(slot: ReservedSlot) -> FilledSlot {
    fill_from(slot, 0)
}

fn fill_from(mut slot: ReservedSlot, first: u32) -> FilledSlot {
    let position = slot.block().position;
    for layer in first..3 {
        for code in [PartCode::K, PartCode::V] {
            slot.fill_part(layer, code, |bytes| pattern(position, layer, code, bytes))
                .unwrap();
        }
    }
    slot.finish().unwrap()
}

#[tokio::test]
async fn commit_stores_exactly_what_was_filled_in_part_by_part() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let slots = slots(&session, 1, 3).await;
    let filled: Vec<_> = slots.into_iter().map(fill).collect();
    let outcomes = session.commit(filled, Acknowledge::Durable).await.unwrap();
    assert_eq!(outcomes, [CommitOutcome::Stored(Acknowledge::Durable); 3]);
    for block in blocks(&session, 1, 3) {
        let stored = &fake.store().blocks[block.key.as_bytes().as_slice()];
        assert_eq!(stored.payload, payload(&session, block.position, 16));
    }
    let again = session.reserve(&blocks(&session, 1, 4)).await.unwrap();
    assert!(matches!(
        again[0],
        Reservation::Already(Acknowledge::Durable)
    ));
    assert!(matches!(again[3], Reservation::Slot(_)));
}

#[tokio::test]
async fn slot_tells_which_layers_are_filled_and_finishes_only_when_all_are() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let mut slot = slots(&session, 1, 1).await.pop().unwrap();
    let page = slot.layout().page(0).unwrap().len();
    assert_eq!((slot.filled_layers(), slot.missing().len()), (vec![], 6));
    slot.write_page(0, &vec![1; page]).unwrap();
    slot.write_part(2, PartCode::V, &vec![2; page * 2 / 3])
        .unwrap();
    assert_eq!(slot.filled_layers(), [0]);

    let unfilled = slot.finish().unwrap_err();
    let missing = [(1, PartCode::K), (1, PartCode::V), (2, PartCode::K)];
    assert_eq!(unfilled.missing, missing);
    assert!(unfilled.to_string().contains("3 parts are not written"));
    let filled = fill_from(*unfilled.slot, 1);
    assert_eq!(&filled.payload()[..page], vec![1; page]);
}

#[tokio::test]
async fn slot_refuses_parts_it_does_not_have_and_bytes_of_another_size() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let mut slot = slots(&session, 1, 1).await.pop().unwrap();
    let code = PartCode::Latent;
    assert_eq!(
        slot.write_part(0, code, &[]),
        Err(FillError::NoSuchPart { layer: 0, code })
    );
    assert_eq!(
        slot.write_page(3, &[]),
        Err(FillError::NoSuchPage { layer: 3 })
    );
    let short = FillError::WrongLength {
        layer: 0,
        wanted: 512,
        given: 511,
    };
    assert_eq!(slot.write_part(0, PartCode::K, &[0; 511]), Err(short));
    assert_eq!(slot.missing().len(), 6, "nothing was written");
}

#[tokio::test]
async fn dropped_slots_are_released_reserved_or_filled() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let mut slots = slots(&session, 1, 3).await;
    let filled = fill(slots.pop().unwrap());
    assert_eq!(fake.store().slots, 3);
    drop(filled);
    drop(slots);
    session.flush().await.unwrap();
    assert_eq!(fake.store().slots, 0);
    assert!(
        fake.store().blocks.is_empty(),
        "a dropped slot stores nothing"
    );
}

#[tokio::test]
async fn reserve_that_nobody_waits_for_gives_its_slots_back() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let blocks = blocks(&session, 1, 5);
    for patience_us in [0, 50, 200, 800] {
        let patience = Duration::from_micros(patience_us);
        let _ = tokio::time::timeout(patience, session.reserve(&blocks)).await;
    }
    eventually("every slot comes home", || fake.store().slots == 0).await;
}

#[tokio::test]
async fn commit_goes_on_when_its_caller_stops_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let filled: Vec<_> = slots(&session, 1, 2).await.into_iter().map(fill).collect();
    let commit = session.commit(filled, Acknowledge::Accepted);
    let _ = tokio::time::timeout(Duration::ZERO, commit).await;
    drop(session);
    eventually("both blocks are stored", || fake.store().blocks.len() == 2).await;
}

#[tokio::test]
async fn commit_of_unknown_outcome_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let filled: Vec<_> = slots(&session, 1, 2).await.into_iter().map(fill).collect();
    fake.set(|knobs| knobs.hang = Some("commit"));
    let commit = tokio::spawn({
        let session = session.clone();
        async move { session.commit(filled, Acknowledge::Durable).await }
    });
    eventually("commit arrives", || fake.store().calls.contains(&"commit")).await;
    fake.kill();
    let error = commit.await.unwrap().unwrap_err();
    assert!(matches!(error, Error::SessionLost { .. }), "{error}");
    assert_eq!(error.happened(), Happened::Unknown);
}

#[tokio::test]
async fn slots_of_a_lost_session_are_stale_and_never_sent_to_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let store = new_store();
    let fake = Fake::start(dir.path(), &store, Knobs::default());
    let session = open(&fake).await;
    let filled: Vec<_> = slots(&session, 1, 2).await.into_iter().map(fill).collect();
    fake.kill();
    session.until_not_open().await;
    let fake = Fake::start(dir.path(), &store, Knobs::default());
    session.reopen().await.unwrap();
    let outcomes = session.commit(filled, Acknowledge::Accepted).await.unwrap();
    assert_eq!(
        outcomes,
        [CommitOutcome::Failed(CommitFailure::StaleSlot); 2]
    );
    assert!(fake.store().blocks.is_empty() && !fake.store().calls.contains(&"commit"));
}

// Goal: more blocks than the staging memory holds are saved in windows of bounded size.
// Method: 100 blocks through 64 KiB of staging, which holds 14; half a window at a time.
#[tokio::test]
async fn save_prefix_saves_more_blocks_than_the_staging_memory_holds() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let small = SessionOptions::new("test").staging_bytes(Bytes::kib(64));
    let session = open_with(&fake, options(), small).await;
    let mut tokens = prompt(1, 100);
    tokens.truncate(100 * 16 - 5);
    let mut fills = 0;
    let saving = session.save_prefix(&tokens, b"", Acknowledge::Accepted, |block, part, bytes| {
        fills += 1;
        pattern(block.position, part.layer, part.code, bytes);
    });
    let outcomes = saving.await.unwrap();
    assert_eq!(
        outcomes,
        vec![SaveOutcome::Stored(Acknowledge::Accepted); 100]
    );
    assert_eq!(fills, 100 * 6);
    assert!(fake.store().widest_save <= 65_536 / 2 / BLOCK_LEN + 1);
    let keys = session.prefix_keys(&tokens, b"");
    let stored = |key: &BlockKey| fake.store().blocks[key.as_bytes().as_slice()].clone();
    assert_eq!(stored(&keys[42]).payload, payload(&session, 42 * 16, 16));
    assert_eq!(stored(&keys[99]).tokens, 11, "the last block is short");
    session.flush().await.unwrap();
    assert_eq!(fake.store().slots, 0);
}

#[tokio::test]
async fn save_blocks_commits_first_when_the_region_is_full() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let small = SessionOptions::new("test").staging_bytes(Bytes::kib(64));
    let session = open_with(&fake, options(), small).await;
    // 12 of the 14 places are held by a slow filler, so windows of 8 meet a full region.
    let held = slots(&session, 9, 12).await;
    let outcomes = save(&session, 1, 20).await;
    assert_eq!(
        outcomes,
        vec![SaveOutcome::Stored(Acknowledge::Accepted); 20]
    );
    drop(held);
}

#[tokio::test]
async fn save_blocks_gives_up_on_blocks_that_never_find_room() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let small = SessionOptions::new("test").staging_bytes(Bytes::kib(64));
    let session = open_with(&fake, options(), small).await;
    let held = slots(&session, 9, 14).await;
    let outcomes = save(&session, 1, 3).await;
    assert_eq!(
        outcomes,
        vec![SaveOutcome::Refused(SaveRefusal::RegionFull); 3]
    );
    drop(held);
    let outcomes = save(&session, 1, 3).await;
    assert!(
        outcomes
            .iter()
            .all(|outcome| outcome.is_stored(Acknowledge::Accepted))
    );
}

#[tokio::test]
async fn save_prefix_waits_until_blocks_that_others_accepted_are_durable() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let tokens = prompt(1, 2);
    let accepted = Acknowledge::Accepted;
    session
        .save_prefix(&tokens, b"", accepted, |_, _, _| ())
        .await
        .unwrap();
    let durable = Acknowledge::Durable;
    let again = session.save_prefix(&tokens, b"", durable, |_, _, _| panic!("filled twice"));
    assert_eq!(again.await.unwrap(), [SaveOutcome::Already(durable); 2]);
    assert!(fake.store().blocks.values().all(|block| block.durable));
    let unknown = session.wait_durable(&[BlockKey([1; 32])]).await.unwrap();
    assert_eq!(unknown, [CommitOutcome::Failed(CommitFailure::StaleSlot)]);
}

#[tokio::test]
async fn reserve_refuses_slots_that_cannot_be_and_leaves_the_daemon_that_granted_them() {
    let bad: [(Turn, &str); 2] = [
        (|knobs| knobs.bad_grant = true, "in a region of"),
        (|knobs| knobs.overlapping_grants = true, "overlaps"),
    ];
    for (knob, part) in bad {
        let dir = tempfile::tempdir().unwrap();
        let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
        let session = open(&fake).await;
        fake.set(knob);
        let error = session.reserve(&blocks(&session, 1, 2)).await.unwrap_err();
        assert!(matches!(error, Error::BadReply { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
        assert!(matches!(session.state(), SessionState::Lost { .. }));
        drop(session);
        eventually("the session ends", || fake.store().sessions == 0).await;
    }
}

#[tokio::test]
async fn reserve_names_the_block_whose_size_is_out_of_range() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let mut bad = blocks(&session, 1, 2);
    bad[1].tokens = 17;
    let text = session.reserve(&bad).await.unwrap_err().to_string();
    assert!(
        text.contains("blocks[1]: 17 tokens; accepted: 1 to 16"),
        "{text}"
    );
    let text = session.reserve(&[]).await.unwrap_err().to_string();
    assert!(text.contains("accepted: 1 to 4096"), "{text}");
}
