//! Opening, losing and finding a session again; limits and refusals of plain calls.
//!
//! Upstairs:   `main`.
//! Downstairs: `fake`.

use std::time::Duration;

use kvtier_client::{
    BlockChange, BlockKey, Bytes, Client, ConnectOptions, Endpoint, Error, Happened, Miss,
    PayloadKind, Session, SessionOptions, SessionState, Tier,
};
use tonic::Code;

use crate::fake::{
    Fake, Knobs, eventually, model, new_store, open, open_with, options, pattern, prompt,
};

async fn refused_open(knobs: Knobs) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), knobs);
    let client = Client::connect(fake.endpoint.clone(), options())
        .await
        .unwrap();
    let opened = client
        .open_session(&model(), SessionOptions::new("test"))
        .await;
    let error = opened.expect_err("a session opened that should not");
    eventually("the refused session is gone", || fake.store().sessions == 0).await;
    error
}

/// Leading blocks that a lookup finds.
async fn found(session: &Session, keys: &[BlockKey]) -> usize {
    let lookup = session.lookup(keys, PayloadKind::Kv).await.unwrap();
    lookup.prefix_blocks
}

#[tokio::test]
async fn connect_names_the_socket_when_nobody_answers() {
    let endpoint = Endpoint::unix("/nonexistent/kvtierd.sock");
    let error = Client::connect(endpoint, ConnectOptions::default())
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Connect { .. }));
    assert!(
        error.to_string().contains("/nonexistent/kvtierd.sock"),
        "{error}"
    );
    assert_eq!(error.happened(), Happened::No);
}

#[tokio::test]
async fn open_session_refuses_a_daemon_that_computes_another_layout() {
    let error = refused_open(Knobs {
        wrong_fingerprint: true,
        ..Knobs::default()
    });
    let error = error.await;
    let Error::LayoutMismatch { ours, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(*ours, model().fingerprint());
    assert!(
        error.to_string().contains("install matching versions"),
        "{error}"
    );
}

#[tokio::test]
async fn open_session_refuses_an_arena_that_could_shrink_under_its_reader() {
    let unsealed = Knobs {
        unsealed: true,
        ..Knobs::default()
    };
    let text = refused_open(unsealed).await.to_string();
    assert!(
        text.contains("arena") && text.contains("not sealed"),
        "{text}"
    );

    let short = Knobs {
        short_descriptor: true,
        ..Knobs::default()
    };
    let text = refused_open(short).await.to_string();
    assert!(
        text.contains("has 524288 bytes, its grant says 1048576"),
        "{text}"
    );
}

#[tokio::test]
async fn open_session_says_that_the_ticket_was_refused() {
    let text = refused_open(Knobs {
        refuse_tickets: true,
        ..Knobs::default()
    });
    let text = text.await.to_string();
    assert!(text.contains("refused the ticket"), "{text}");
}

#[tokio::test]
async fn open_session_names_every_problem_of_a_descriptor_before_anything_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let client = Client::connect(fake.endpoint.clone(), options())
        .await
        .unwrap();
    let mut model = model();
    model.block_tokens = 3;
    model.d_model = 0;
    let error = client
        .open_session(&model, SessionOptions::new("test"))
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("block_tokens is 3") && text.contains("d_model is 0"),
        "{text}"
    );
    assert!(fake.store().calls.is_empty());
}

#[tokio::test]
async fn open_session_that_is_not_permitted_is_refused_and_not_lost() {
    for code in [Code::PermissionDenied, Code::Unauthenticated] {
        let error = refused_open(Knobs {
            refuse: Some(("open_session", code)),
            ..Knobs::default()
        });
        let error = error.await;
        assert!(matches!(error, Error::Refused { .. }), "{error}");
        assert!(!error.is_transient());
    }
}

#[tokio::test]
async fn calls_end_by_their_limit_when_the_daemon_says_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let mut options = options();
    options.timeouts.control = Duration::from_millis(300);
    let session = open_with(&fake, options, SessionOptions::new("test")).await;
    let keys = session.prefix_keys(&prompt(1, 2), b"");
    for (call, happened) in [("lookup", Happened::No), ("pin", Happened::Unknown)] {
        fake.set(|knobs| knobs.hang = Some(call));
        let error = match call {
            "lookup" => session.lookup(&keys, PayloadKind::Kv).await.err(),
            _ => {
                let second = Duration::from_secs(1);
                session.pin(&keys, PayloadKind::Kv, second).await.err()
            }
        };
        let error = error.unwrap();
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
        assert_eq!(error.happened(), happened, "{call}");
    }
    fake.set(|knobs| knobs.hang = None);
    assert_eq!(found(&session, &keys).await, 0);
}

#[tokio::test]
async fn opening_ends_by_its_limit_when_descriptors_do_not_come() {
    let dir = tempfile::tempdir().unwrap();
    let knobs = Knobs {
        hang: Some("descriptor"),
        ..Knobs::default()
    };
    let fake = Fake::start(dir.path(), &new_store(), knobs);
    let mut options = options();
    options.timeouts.control = Duration::from_millis(300);
    let client = Client::connect(fake.endpoint.clone(), options)
        .await
        .unwrap();
    let error = client
        .open_session(&model(), SessionOptions::new("test"))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}

#[tokio::test]
async fn calls_answer_by_what_the_caller_can_do_when_the_daemon_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let keys = session.prefix_keys(&prompt(1, 1), b"");
    for code in [Code::Unimplemented, Code::ResourceExhausted, Code::Internal] {
        fake.set(|knobs| knobs.refuse = Some(("prefetch", code)));
        let error = session.prefetch(&keys, PayloadKind::Kv).await.unwrap_err();
        let fits = match code {
            Code::Unimplemented => matches!(error, Error::Unimplemented { .. }),
            Code::ResourceExhausted => matches!(error, Error::Busy { .. }),
            _ => matches!(error, Error::Daemon { .. }),
        };
        assert!(fits, "{code}: {error}");
        assert!(error.to_string().contains("told to refuse"), "{error}");
    }
    assert_eq!(session.state(), SessionState::Open);
}

#[tokio::test]
async fn explain_refuses_an_answer_larger_than_a_message_may_be() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    fake.set(|knobs| knobs.oversized = true);
    let error = session.explain(&BlockKey([1; 32])).await.unwrap_err();
    assert!(matches!(error, Error::BadReply { .. }), "{error}");

    fake.set(|knobs| knobs.oversized = false);
    let explained = session.explain(&BlockKey([1; 32])).await.unwrap();
    assert_eq!(explained.miss, Some(Miss::Absent));
    assert_eq!(explained.notes, ["never saved here"]);
}

#[tokio::test]
async fn session_state_says_that_the_daemon_drains() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    assert_eq!(session.state(), SessionState::Open);
    fake.drain();
    let reason = "told to drain".to_owned();
    assert_eq!(
        session.until_not_open().await,
        SessionState::Draining { reason }
    );
}

#[tokio::test]
async fn watch_events_tells_what_happened_and_why() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let mut events = session.watch_events().await.unwrap();
    let stored = events.next().await.unwrap().unwrap();
    assert_eq!(stored.key, BlockKey([7; 32]));
    assert_eq!(
        (stored.change, stored.reason),
        (BlockChange::Stored(Tier::Disk), None)
    );
    let removed = events.next().await.unwrap().unwrap();
    assert_eq!(removed.change, BlockChange::Removed(Tier::Host));
    assert_eq!(removed.reason, Some(Miss::Evicted));
    assert_eq!(events.next().await.unwrap(), None);
}

#[tokio::test]
async fn hints_and_wipe_answer_with_counts() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let tokens = prompt(1, 3);
    let keys = session.prefix_keys(&tokens, b"");
    let wait = kvtier_client::Acknowledge::Accepted;
    session
        .save_prefix(&tokens, b"", wait, |_, _, _| ())
        .await
        .unwrap();
    let minute = Duration::from_secs(60);
    assert_eq!(
        session.pin(&keys, PayloadKind::Kv, minute).await.unwrap(),
        3
    );
    assert_eq!(session.unpin(&keys, PayloadKind::Kv).await.unwrap(), 3);
    let moved = session.prefetch(&keys, PayloadKind::Kv).await.unwrap();
    assert_eq!((moved.resident, moved.started), (1, 2));
    let error = session
        .pin(&keys, PayloadKind::Kv, Duration::ZERO)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("at least 1 s"), "{error}");
    assert_eq!(session.wipe().await.unwrap(), 3);
    assert_eq!(found(&session, &keys).await, 0);
}

#[tokio::test]
async fn session_ends_at_the_daemon_with_its_last_handle() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let session = open(&fake).await;
    let other = session.clone();
    drop(session);
    assert!(
        other
            .lookup(&[BlockKey([1; 32])], PayloadKind::Kv)
            .await
            .is_ok()
    );
    drop(other);
    eventually("the session ends", || fake.store().sessions == 0).await;
}

// Goal: a restart of the daemon costs the calls in flight and nothing else.
// Method: kill the daemon under a session, start another over the same store, go on.
#[tokio::test]
async fn session_works_again_after_the_daemon_was_killed_and_restarted() {
    let dir = tempfile::tempdir().unwrap();
    let store = new_store();
    let fake = Fake::start(dir.path(), &store, Knobs::default());
    let session = open(&fake).await;
    let tokens = prompt(1, 4);
    let keys = session.prefix_keys(&tokens, b"");
    let wait = kvtier_client::Acknowledge::Durable;
    let fill = |block: &kvtier_client::SaveBlock, part: &kvtier_client::Part, bytes: &mut [u8]| {
        pattern(block.position, part.layer, part.code, bytes);
    };
    session.save_prefix(&tokens, b"", wait, fill).await.unwrap();
    let held = session
        .restore(&keys, PayloadKind::Kv, Default::default())
        .await
        .unwrap();
    let held = held.collect().await.unwrap();

    fake.kill();
    assert!(matches!(
        session.until_not_open().await,
        SessionState::Lost { .. }
    ));
    let gone = session.lookup(&keys, PayloadKind::Kv).await.unwrap_err();
    assert!(matches!(gone, Error::Connect { .. }), "{gone}");
    let at_once = session.lookup(&keys, PayloadKind::Kv).await.unwrap_err();
    assert!(matches!(at_once, Error::Unavailable { .. }), "{at_once}");
    assert!(
        held.blocks[0].payload().is_err(),
        "a lost lease must not be read"
    );

    let fake = Fake::start(dir.path(), &store, Knobs::default());
    session.reopen().await.unwrap();
    assert_eq!(found(&session, &keys).await, 4);
    let again = session
        .restore(&keys, PayloadKind::Kv, Default::default())
        .await
        .unwrap();
    let again = again.collect().await.unwrap();
    assert_eq!(again.usable_blocks, 4);
    assert_eq!(
        again.blocks[3].payload().unwrap(),
        crate::fake::payload(&session, 48, 16)
    );
    let outcomes = session
        .save_prefix(&prompt(2, 2), b"", wait, fill)
        .await
        .unwrap();
    assert!(outcomes.iter().all(|outcome| outcome.is_stored(wait)));
    assert_eq!(fake.store().blocks.len(), 6);
}

#[tokio::test]
async fn next_call_after_a_restart_reopens_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let store = new_store();
    let fake = Fake::start(dir.path(), &store, Knobs::default());
    let session = open(&fake).await;
    fake.kill();
    session.until_not_open().await;
    let _fake = Fake::start(dir.path(), &store, Knobs::default());
    let keys = session.prefix_keys(&prompt(1, 1), b"");
    assert!(session.lookup(&keys, PayloadKind::Kv).await.is_ok());
}

#[tokio::test]
async fn call_waits_for_the_daemon_when_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let store = new_store();
    let fake = Fake::start(dir.path(), &store, Knobs::default());
    let mut options = options();
    options.reconnect.wait = Duration::from_secs(20);
    let session = open_with(&fake, options, SessionOptions::new("test")).await;
    fake.kill();
    session.until_not_open().await;
    let keys = session.prefix_keys(&prompt(1, 1), b"");
    let call = tokio::spawn({
        let session = session.clone();
        async move { session.lookup(&keys, PayloadKind::Kv).await }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    let _fake = Fake::start(dir.path(), &store, Knobs::default());
    assert!(call.await.unwrap().is_ok());
}

#[tokio::test]
async fn session_refuses_to_continue_in_another_namespace() {
    let dir = tempfile::tempdir().unwrap();
    let store = new_store();
    let fake = Fake::start(dir.path(), &store, Knobs::default());
    let session = open(&fake).await;
    fake.kill();
    session.until_not_open().await;
    let other = Knobs {
        secret: 9,
        ..Knobs::default()
    };
    let _fake = Fake::start(dir.path(), &store, other);
    let error = session.reopen().await.unwrap_err();
    assert!(matches!(error, Error::NamespaceChanged { .. }), "{error}");
}

#[tokio::test]
async fn session_without_staging_memory_restores_and_refuses_to_save() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(dir.path(), &new_store(), Knobs::default());
    let reader = SessionOptions::new("test").staging_bytes(Bytes(0));
    let session = open_with(&fake, options(), reader).await;
    assert!(!fake.store().calls.contains(&"register_region"));
    let wait = kvtier_client::Acknowledge::Accepted;
    let error = session
        .save_prefix(&prompt(1, 1), b"", wait, |_, _, _| ())
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("staging_bytes of this session is 0"),
        "{error}"
    );
}
