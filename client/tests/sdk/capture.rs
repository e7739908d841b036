//! Hidden states that are taken while a prompt is computed, in steps of any size.
//!
//! Upstairs:   `main`.
//! Downstairs: `fake`.

use kvtier_client::{
    Acknowledge, Bytes, FillError, HiddenCapture, PayloadKind, SaveOutcome, Session, SessionOptions,
};

use crate::fake::{Fake, Knobs, eventually, new_store, open, open_with, options, prompt};

/// Bytes of one token's input of one layer: 32 numbers of two bytes.
const ROW: usize = 64;
const LAYERS: u32 = 3;

/// What enters `layer` for one token.
fn row(layer: u32, token: usize) -> Vec<u8> {
    let byte = |at: usize| u8::try_from((at * 7 + token * 3 + layer as usize * 101) % 251).unwrap();
    (0..ROW).map(byte).collect()
}

/// Runs a step of a prefill over `tokens`.
fn step(capture: &mut HiddenCapture, tokens: std::ops::Range<usize>) -> Result<(), FillError> {
    for layer in 0..LAYERS {
        let bytes: Vec<u8> = tokens.clone().flat_map(|token| row(layer, token)).collect();
        let position = u32::try_from(tokens.start).unwrap();
        capture.layer_input(layer, position, &bytes)?;
    }
    Ok(())
}

/// The payload of block `block`, `tokens` tokens long.
fn payload(block: usize, tokens: usize) -> Vec<u8> {
    let first = block * 16;
    let layer = |layer| (first..first + tokens).flat_map(move |token| row(layer, token));
    (0..LAYERS).flat_map(layer).collect()
}

fn stored(fake: &Fake, session: &Session, tokens: &[u32], block: usize) -> Option<Vec<u8>> {
    let key = session.prefix_keys(tokens, b"")[block];
    let store = fake.store();
    let found = store.blocks.get(key.as_bytes().as_slice());
    found.map(|stored| stored.payload.clone())
}

// Goal: steps need not begin or end where blocks do, and the last block may be short.
#[tokio::test]
async fn capture_stores_the_inputs_of_every_layer_however_the_prompt_is_cut() {
    for (seed, cut) in (1..).zip([1, 5, 16, 23, 70]) {
        let dir = tempfile::tempdir().unwrap();
        let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
        let session = open(&fake).await;
        let mut tokens = prompt(seed, 5);
        tokens.truncate(70);
        let mut capture = session.capture_hidden(&tokens, b"");
        assert_eq!(capture.reserve(0..5).await.unwrap(), 5);
        for first in (0..70).step_by(cut) {
            step(&mut capture, first..(first + cut).min(70)).unwrap();
        }
        assert!((0..5).all(|block| !capture.wants(block)));
        let outcomes = capture.finish(Acknowledge::Durable).await.unwrap();
        let durable = Some(SaveOutcome::Stored(Acknowledge::Durable));
        assert_eq!(outcomes, [durable; 5]);
        for block in 0..5 {
            let want = payload(block, if block == 4 { 6 } else { 16 });
            assert_eq!(stored(&fake, &session, &tokens, block), Some(want), "{cut}");
        }
    }
}

// Goal: T1 and U1. A block that is not whole is never stored, its place comes back, and the
// prefill hears of nothing.
#[tokio::test]
async fn capture_gives_up_blocks_of_which_rows_are_missing() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let tokens = prompt(1, 4);
    let mut capture = session.capture_hidden(&tokens, b"");
    capture.reserve(0..3).await.unwrap();
    // Block 0 lacks its first tokens, block 2 its last; block 3 has no place.
    step(&mut capture, 3..47).unwrap();
    step(&mut capture, 48..64).unwrap();
    assert!(!capture.wants(0) && !capture.wants(1) && capture.wants(2) && !capture.wants(3));
    assert_eq!(capture.commit(Acknowledge::Accepted).await.unwrap(), 1);
    let outcomes = capture.finish(Acknowledge::Accepted).await.unwrap();
    let accepted = Some(SaveOutcome::Stored(Acknowledge::Accepted));
    assert_eq!(outcomes, [None, accepted, None, None]);
    assert_eq!(fake.store().blocks.len(), 1);
    assert_eq!(stored(&fake, &session, &tokens, 1), Some(payload(1, 16)));
    eventually("places come back", || fake.store().slots == 0).await;
}

#[tokio::test]
async fn capture_refuses_rows_and_layers_that_do_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let mut tokens = prompt(1, 1);
    tokens.truncate(10);
    let mut capture = session.capture_hidden(&tokens, b"");
    capture.reserve(0..100).await.unwrap();
    let wrong = capture.layer_input(0, 0, &[0; ROW + 1]).unwrap_err();
    assert_eq!(
        wrong.to_string(),
        "65 bytes for layer 0; accepted: exactly 128"
    );
    assert!(matches!(
        capture.layer_input(3, 0, &[0; ROW]),
        Err(FillError::NoSuchPart { layer: 3, .. })
    ));
    // Ten tokens are in this prompt, whatever the step says.
    let more = capture.layer_input(0, 0, &[0; 11 * ROW]).unwrap_err();
    assert_eq!(
        more.to_string(),
        "rows 0.. of layer 0, 11 of them; accepted: from 0 ..= 0, to 10"
    );
    step(&mut capture, 0..10).unwrap();
    assert_eq!(capture.commit(Acknowledge::Accepted).await.unwrap(), 1);
    assert_eq!(stored(&fake, &session, &tokens, 0), Some(payload(0, 10)));
}

// Goal: a prompt larger than the staging memory is taken block by block, and what is stored
// already is not asked for again.
#[tokio::test]
async fn capture_goes_on_with_little_room_and_skips_what_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let small = SessionOptions::new("test").staging_bytes(Bytes(64 << 10));
    let session = open_with(&fake, options(), small).await;
    let tokens = prompt(1, 60);
    let mut capture = session.capture_hidden(&tokens, b"");
    // 64 KiB hold 21 blocks of 3 KiB.
    assert_eq!(capture.reserve(0..60).await.unwrap(), 21);
    for block in 0..60 {
        capture.reserve(block..block + 1).await.unwrap();
        step(&mut capture, block * 16..block * 16 + 16).unwrap();
        capture.commit(Acknowledge::Accepted).await.unwrap();
    }
    let outcomes = capture.finish(Acknowledge::Accepted).await.unwrap();
    let accepted = SaveOutcome::Stored(Acknowledge::Accepted);
    assert_eq!(outcomes, vec![Some(accepted); 60]);
    for block in 0..60 {
        assert_eq!(
            stored(&fake, &session, &tokens, block),
            Some(payload(block, 16))
        );
    }
    let mut again = session.capture_hidden(&tokens, b"");
    assert_eq!(again.reserve(0..60).await.unwrap(), 0);
    step(&mut again, 0..960).unwrap();
    let outcomes = again.finish(Acknowledge::Accepted).await.unwrap();
    let already = SaveOutcome::Already(Acknowledge::Accepted);
    assert_eq!(outcomes, vec![Some(already); 60]);
    let layout = session.layout(PayloadKind::Hidden, 16).unwrap();
    assert_eq!(layout.payload_len(), 3 * 16 * ROW);
}
