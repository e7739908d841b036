//! The inline plane: the same calls where no memory can be shared.
//!
//! Upstairs:   `main`.
//! Downstairs: `fake`, over TCP.

use std::time::Duration;

use kvtier_client::{
    Acknowledge, BlockKey, Bytes, CommitOutcome, Miss, PayloadKind, RestoreOptions, SaveBlock,
    SaveOutcome, SessionOptions,
};

use crate::fake::{Fake, Knobs, new_store, open, open_with, options, pattern, payload, prompt};

const KV: PayloadKind = PayloadKind::Kv;

fn fill(block: &SaveBlock, part: &kvtier_client::Part, bytes: &mut [u8]) {
    pattern(block.position, part.layer, part.code, bytes);
}

#[tokio::test]
async fn save_and_restore_work_over_tcp_with_the_same_calls() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start_tcp(dir.path(), &new_store(), Knobs::default());
    let small = SessionOptions::new("test").staging_bytes(Bytes::kib(64));
    let session = open_with(&fake, options(), small).await;
    assert!(!session.is_shared());
    let tokens = prompt(1, 30);
    let stored = Acknowledge::Accepted;
    let outcomes = session
        .save_prefix(&tokens, b"", stored, fill)
        .await
        .unwrap();
    assert_eq!(outcomes, vec![SaveOutcome::Stored(stored); 30]);
    let again = session.save_prefix(&tokens, b"", stored, |_, _, _| panic!("filled twice"));
    assert_eq!(again.await.unwrap(), vec![SaveOutcome::Already(stored); 30]);

    let mut keys = session.prefix_keys(&tokens, b"");
    keys.push(BlockKey([9; 32]));
    let restored = session
        .restore(&keys, KV, RestoreOptions::default())
        .await
        .unwrap();
    let restored = restored.collect().await.unwrap();
    assert_eq!(restored.usable_blocks, 30);
    assert_eq!(restored.missed, [(30, Miss::Absent)]);
    assert_eq!(
        restored.blocks[7].payload().unwrap(),
        payload(&session, 7 * 16, 16)
    );
    session.release(restored.blocks).await.unwrap();
    assert_eq!(fake.store().leases_given, 0);
}

#[tokio::test]
async fn inline_block_with_a_wrong_checksum_is_a_miss_and_ends_the_prefix() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start_tcp(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let tokens = prompt(1, 3);
    session
        .save_prefix(&tokens, b"", Acknowledge::Accepted, fill)
        .await
        .unwrap();
    fake.set(|knobs| knobs.corrupt_inline = true);
    let keys = session.prefix_keys(&tokens, b"");
    let restored = session
        .restore(&keys, KV, RestoreOptions::default())
        .await
        .unwrap();
    let restored = restored.collect().await.unwrap();
    assert_eq!((restored.blocks.len(), restored.usable_blocks), (2, 1));
    assert_eq!(restored.missed, [(1, Miss::PayloadCrc)]);
}

#[tokio::test]
async fn inline_restore_brings_scattered_blocks_with_their_own_indices() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start_tcp(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let tokens = prompt(1, 4);
    session
        .save_prefix(&tokens, b"", Acknowledge::Accepted, fill)
        .await
        .unwrap();
    let mut keys = session.prefix_keys(&tokens, b"");
    keys[1] = BlockKey([9; 32]);
    let scattered = RestoreOptions::default().scattered();
    let restored = session.restore(&keys, KV, scattered).await.unwrap();
    let restored = restored.collect().await.unwrap();
    let came: Vec<_> = restored.blocks.iter().map(|block| block.index()).collect();
    assert_eq!((came, restored.usable_blocks), (vec![0, 2, 3], 1));
    assert_eq!(
        restored.blocks[2].payload().unwrap(),
        payload(&session, 48, 16)
    );
}

// Goal: a deadline means the same where bytes travel in the stream: what came is kept.
#[tokio::test]
async fn inline_restore_ends_at_its_deadline_with_what_has_come() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start_tcp(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let tokens = prompt(1, 4);
    session
        .save_prefix(&tokens, b"", Acknowledge::Accepted, fill)
        .await
        .unwrap();
    fake.set(|knobs| knobs.stall_inline = 2);
    let mut keys = session.prefix_keys(&tokens, b"");
    keys.push(BlockKey([9; 32]));
    let soon = RestoreOptions::default().deadline(Duration::from_millis(300));
    let restored = session.restore(&keys, KV, soon).await.unwrap();
    let restored = restored.collect().await.unwrap();
    let came: Vec<_> = restored.blocks.iter().map(|block| block.index()).collect();
    assert_eq!((came, restored.usable_blocks), (vec![0, 1], 2));
    let late = [(2, Miss::Deadline), (3, Miss::Deadline), (4, Miss::Absent)];
    assert_eq!(restored.missed, late);
}

#[tokio::test]
async fn put_inline_and_get_inline_carry_bytes_also_where_memory_is_shared() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    assert!(session.is_shared());
    let tokens = prompt(1, 2);
    let keys = session.prefix_keys(&tokens, b"");
    let blocks = SaveBlock::chain(&keys, tokens.len(), 16, KV);
    let bytes = |block: &SaveBlock| (*block, payload(&session, block.position, 16).into());
    let put = session
        .put_inline(blocks.iter().map(bytes).collect(), Acknowledge::Durable)
        .await;
    assert_eq!(
        put.unwrap(),
        [CommitOutcome::Stored(Acknowledge::Durable); 2]
    );

    let got = session
        .get_inline(&keys, KV, RestoreOptions::default())
        .await
        .unwrap();
    let got = got.collect().await.unwrap();
    assert_eq!(got.blocks[1].payload().unwrap(), payload(&session, 16, 16));
    assert_eq!(fake.store().leases_given, 0);

    let short = vec![(blocks[0], vec![0u8; 100].into())];
    let text = session
        .put_inline(short, Acknowledge::Accepted)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("blocks[0] has 100 bytes; accepted: exactly 4608"),
        "{text}"
    );
}
