//! Hostile and malformed requests over plain gRPC: a clear status that names the field and what
//! is accepted, and a daemon that goes on.
//!
//! Upstairs:   `main`.
//! Downstairs: `harness::raw`.

use std::time::Duration;

use bytes::Bytes;
use kvtier_client::PayloadKind;
use kvtier_proto::v1;
use kvtier_tests::harness::raw::{self, RawSession};
use kvtier_tests::harness::{Daemon, Options, blocks, run};
use tonic::{Code, Status};

use super::LIMIT;

pub(crate) const KV: i32 = v1::PayloadKind::Kv as i32;

/// A status has this code, and its message these parts.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, parts: &[&str]) {
    let status = answer.expect_err("it was refused");
    assert_eq!(status.code(), code, "{status:?}");
    for part in parts {
        assert!(
            status.message().contains(part),
            "{part:?} in {:?}",
            status.message()
        );
    }
}

pub(crate) fn key(byte: u8) -> Bytes {
    vec![byte; 32].into()
}

pub(crate) async fn opened(daemon: &Daemon) -> RawSession {
    let request = raw::opening(&blocks::gqa());
    RawSession::open(&daemon.socket(), request).await.unwrap()
}

/// The daemon still does its work for somebody well-behaved.
pub(crate) async fn still_works(daemon: &mut Daemon, seed: u64) {
    assert!(daemon.is_alive());
    let session = daemon.session(&blocks::gqa()).await;
    let set = blocks::chain(&session, seed, 16 * 5 + 1, PayloadKind::Kv);
    blocks::save_durable(&session, &set).await;
    blocks::restore_all(&session, &set).await;
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
}

#[test]
fn opening_with_another_version_or_a_bad_descriptor_is_refused_by_field() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default());
        let good = raw::opening(&blocks::gqa());
        let open = async |change: &dyn Fn(&mut v1::OpenSessionRequest)| {
            let mut request = good.clone();
            change(&mut request);
            RawSession::open(&daemon.socket(), request)
                .await
                .map(|_| ())
        };
        let bad = Code::InvalidArgument;
        for version in [0, 2, u32::MAX] {
            let answer = open(&|request| request.protocol_version = version).await;
            refused(
                answer,
                bad,
                &["protocol_version", &version.to_string(), "1"],
            );
        }
        let answer = open(&|request| request.client = "x".repeat(257)).await;
        refused(answer, bad, &["client", "257 bytes", "0 to 256"]);
        let answer = open(&|request| request.model = None).await;
        refused(answer, bad, &["model", "missing"]);
        let model = |change: fn(&mut v1::ModelDescriptor)| {
            move |request: &mut v1::OpenSessionRequest| change(request.model.as_mut().unwrap())
        };
        let answer = open(&model(|model| model.block_tokens = 15)).await;
        refused(answer, bad, &["model.block_tokens is 15", "16 to 2048"]);
        let answer = open(&model(|model| model.block_tokens = u32::MAX)).await;
        refused(answer, bad, &["model.block_tokens", "16 to 2048"]);
        let answer = open(&model(|model| model.layers.clear())).await;
        refused(answer, bad, &["model.layers", "1 to 1024 entries"]);
        let answer = open(&model(|model| {
            let layer = model.layers[0];
            model.layers = vec![layer; 1025];
        }))
        .await;
        refused(answer, bad, &["model.layers", "1025", "1 to 1024 entries"]);
        let answer = open(&model(|model| model.d_model = 0)).await;
        refused(answer, bad, &["model.d_model is 0", "1 to 65536"]);
        let answer = open(&model(|model| model.model = String::new())).await;
        refused(answer, bad, &["model.model", "1 to 256 bytes"]);
        let answer = open(&|request| {
            let layers = vec![v1::LayerCost::default(); 1];
            let none = v1::ReaderSpec::default();
            request.reader = Some(v1::ReaderSpec { layers, ..none });
        });
        refused(answer.await, bad, &["reader.layers is 1 entries", "0 or "]);
        let answer = open(&|request| {
            let layers = request.model.as_ref().unwrap().layers.len();
            let layers = vec![v1::LayerCost::default(); layers];
            let none = v1::ReaderSpec::default();
            request.reader = Some(v1::ReaderSpec { layers, ..none });
        });
        let told = ["reader.layers[0].token_flop is 0", "1 to 1125899906842624"];
        refused(answer.await, bad, &told);
        let answer = open(&model(|model| model.element = 99)).await;
        refused(answer, bad, &["element"]);
        let refusals = "kvtier_sessions_total{outcome=\"refused_version\"}";
        assert_eq!(daemon.metrics().get(refusals), 3.0);
        still_works(&mut daemon, 1).await;
    });
}

#[test]
fn calls_of_an_unknown_session_are_refused() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default());
        let mut rpc = raw::connect(&daemon.socket()).await;
        let real = opened(&daemon).await;
        let mut almost = real.token().to_vec();
        almost[15] ^= 1;
        for token in [vec![], vec![1; 15], vec![1; 16], vec![1; 17], almost] {
            let session: Bytes = token.into();
            let lookup = rpc.lookup(v1::LookupRequest {
                accept: 0,
                session: session.clone(),
                keys: vec![key(1)],
                kind: KV,
                prefix_only: true,
            });
            refused(lookup.await, Code::Unauthenticated, &["unknown session"]);
            let region = rpc.register_region(v1::RegisterRegionRequest {
                session: session.clone(),
                bytes: 1 << 20,
                ..v1::RegisterRegionRequest::default()
            });
            refused(region.await, Code::Unauthenticated, &["unknown session"]);
            let wipe = rpc.wipe(v1::WipeRequest {
                session: session.clone(),
                namespace_name: String::new(),
            });
            refused(wipe.await, Code::Unauthenticated, &["unknown session"]);
            let start = v1::restore_command::Command::Start(v1::RestoreStart {
                accept: 0,
                session,
                keys: vec![key(1)],
                kind: KV,
                deadline_ms: 0,
                scattered: true,
                ..v1::RestoreStart::default()
            });
            let events = restore(&mut rpc, vec![start]).await;
            refused(events, Code::Unauthenticated, &["unknown session"]);
        }
        // A session that has ended is as unknown as one that never was.
        let token = real.token();
        drop(real);
        tokio::time::sleep(Duration::from_millis(300)).await;
        let ended = rpc.watch_events(v1::WatchEventsRequest { session: token });
        refused(
            ended.await.map(|_| ()),
            Code::Unauthenticated,
            &["unknown session"],
        );
        still_works(&mut daemon, 1).await;
    });
}

/// Sends restore commands with numbers from 1, and collects what comes back.
async fn restore(
    rpc: &mut raw::Rpc,
    commands: Vec<v1::restore_command::Command>,
) -> Result<Vec<v1::RestoreEvent>, Status> {
    let numbered = (1..)
        .zip(commands)
        .map(|(restore_id, command)| v1::RestoreCommand {
            restore_id,
            command: Some(command),
        });
    let stream = tokio_stream::iter(numbered.collect::<Vec<_>>());
    let mut events = rpc.restore(stream).await?.into_inner();
    let mut all = Vec::new();
    while let Some(event) = events.message().await? {
        all.push(event);
    }
    Ok(all)
}

#[test]
fn keys_too_many_too_few_and_of_wrong_length_are_refused_by_field() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default());
        let mut session = opened(&daemon).await;
        let token = session.token();
        let bad = Code::InvalidArgument;
        let lookup = |keys: Vec<Bytes>, kind: i32| v1::LookupRequest {
            accept: 0,
            session: token.clone(),
            keys,
            kind,
            prefix_only: false,
        };
        let cases: [(Vec<Bytes>, &[&str]); 4] = [
            (vec![key(1); 4097], &["keys", "4097", "4096"]),
            (vec![key(1), vec![1; 31].into()], &["keys[1]", "31", "32"]),
            (vec![vec![1; 33].into()], &["keys[0]", "33", "32"]),
            (vec![Bytes::new()], &["keys[0]", "32"]),
        ];
        for (keys, parts) in cases {
            refused(
                session.rpc.lookup(lookup(keys.clone(), KV)).await,
                bad,
                parts,
            );
            let pin = v1::PinRequest {
                session: token.clone(),
                keys: keys.clone(),
                kind: KV,
                ttl_s: 1,
            };
            refused(session.rpc.pin(pin).await, bad, parts);
            let prefetch = v1::PrefetchRequest {
                accept: 0,
                session: token.clone(),
                keys: keys.clone(),
                kind: KV,
            };
            refused(session.rpc.prefetch(prefetch).await, bad, parts);
            let start = v1::restore_command::Command::Start(v1::RestoreStart {
                accept: 0,
                session: token.clone(),
                keys: keys.clone(),
                kind: KV,
                deadline_ms: 0,
                scattered: false,
                ..v1::RestoreStart::default()
            });
            refused(restore(&mut session.rpc, vec![start]).await, bad, parts);
            let get = session.rpc.get_inline(v1::GetInlineRequest {
                accept: 0,
                session: token.clone(),
                keys,
                kind: KV,
                scattered: true,
            });
            refused(get.await.map(|_| ()), bad, parts);
        }
        for kind in [0, 6, -1, i32::MAX] {
            let answer = session.rpc.lookup(lookup(vec![key(1)], kind)).await;
            refused(answer, bad, &["kind"]);
        }
        let empty = restore(&mut session.rpc, vec![]).await.unwrap();
        assert_eq!(empty, vec![], "no command, no event");
        still_works(&mut daemon, 1).await;
    });
}

#[test]
fn a_message_above_four_mib_is_refused_before_it_is_read() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default());
        let mut session = opened(&daemon).await;
        let lookup = session.rpc.lookup(v1::LookupRequest {
            accept: 0,
            session: session.token(),
            keys: vec![vec![1; 5 << 20].into()],
            kind: KV,
            prefix_only: true,
        });
        let status = lookup.await.unwrap_err();
        assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
        assert!(status.message().contains("1114112"), "{status:?}");
        still_works(&mut daemon, 1).await;
    });
}

#[test]
fn restore_commands_that_make_no_sense_end_their_stream_only() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default());
        let mut session = opened(&daemon).await;
        use v1::restore_command::Command;
        let start = Command::Start(v1::RestoreStart {
            accept: 0,
            session: session.token(),
            keys: vec![key(1), key(2)],
            kind: KV,
            deadline_ms: 0,
            scattered: true,
            ..v1::RestoreStart::default()
        });
        let empty = v1::RestoreCommand {
            restore_id: 1,
            command: None,
        };
        let stream = tokio_stream::iter(vec![empty]);
        let mut events = session.rpc.restore(stream).await.unwrap().into_inner();
        let answer = events.message().await;
        refused(
            answer,
            Code::InvalidArgument,
            &["command", "start, progress or cancel"],
        );
        // Progress and cancel of a restore that is not running are late, not wrong.
        let progress = Command::Progress(v1::RestoreProgress {
            computed_blocks: u32::MAX,
        });
        let cancel = Command::Cancel(v1::RestoreCancel {});
        let commands = vec![progress, cancel, start];
        let (sender, receiver) = tokio::sync::mpsc::channel(8);
        for (restore_id, command) in (1..).zip(commands) {
            let command = Some(command);
            sender
                .send(v1::RestoreCommand {
                    restore_id,
                    command,
                })
                .await
                .unwrap();
        }
        let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let mut events = session.rpc.restore(stream).await.unwrap().into_inner();
        let done = loop {
            let event = events.message().await.unwrap().unwrap();
            assert_eq!(event.restore_id, 3);
            if let Some(v1::restore_event::Event::Done(done)) = event.event {
                break done;
            }
        };
        assert_eq!(done.missed.len(), 2);
        drop(sender);
        still_works(&mut daemon, 1).await;
    });
}

// Goal: bytes that are no protocol at all, on both sockets, cost nothing but their connection.
#[test]
fn garbage_on_the_sockets_harms_nobody() {
    run(LIMIT, async {
        use std::io::Write as _;
        use std::os::unix::net::UnixStream;
        let mut daemon = Daemon::start(Options::default());
        let companion = daemon.home().join("d.sock.fd");
        let mut open = Vec::new();
        for number in 0..40u8 {
            for path in [daemon.socket(), companion.clone()] {
                let mut stream = UnixStream::connect(path).unwrap();
                let _ = stream.write_all(&[number; 1000]);
                open.push(stream);
            }
        }
        // A ticket that nobody issued gives nothing.
        assert!(raw::fetch(&companion, &[7; 16]).is_none());
        drop(open);
        still_works(&mut daemon, 1).await;
    });
}
