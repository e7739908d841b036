//! A whole daemon in this process: its way down, and what streams and sessions leave behind.
//!
//! Upstairs:   `cargo test`.
//! Downstairs: `serve` over a real socket, a real disk folder and small arenas.

use std::path::PathBuf;

use bytes::Bytes;
use kvtier_proto::v1::{self, kvtier_client::KvtierClient};
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Streaming};

use super::*;

/// Longest wait for anything: a hang is a failure.
const LIMIT: Duration = Duration::from_secs(60);
const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

type Rpc = KvtierClient<Channel>;

struct Daemon {
    home: tempfile::TempDir,
    task: JoinHandle<Result<(), Failed>>,
}

impl Daemon {
    async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap()).await
    }

    async fn start_in(home: tempfile::TempDir) -> Self {
        let at = |name: &str| home.path().join(name).display().to_string();
        let toml = format!(
            "[server]\nsocket = {:?}\nmetrics = \"127.0.0.1:0\"\ndrain_timeout_s = 20\n\
             [state]\ndir = {:?}\n[host]\ncapacity = \"16 MiB\"\nhugepages = \"off\"\n\
             [[disk]]\npath = {:?}\ncapacity = \"128 MiB\"\nsegment_size = \"8 MiB\"\n\
             lane = \"pread\"\nlevel = \"raw\"\n",
            at("s"),
            at("state"),
            at("disk"),
        );
        let config = Config::from_toml(&toml).unwrap();
        let task = tokio::spawn(serve(config));
        let daemon = Self { home, task };
        let begin = Instant::now();
        while tokio::net::UnixStream::connect(daemon.socket())
            .await
            .is_err()
        {
            assert!(begin.elapsed() < LIMIT && !daemon.task.is_finished());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        daemon
    }

    fn socket(&self) -> PathBuf {
        self.home.path().join("s")
    }

    async fn rpc(&self) -> Rpc {
        let uri = format!("unix:{}", self.socket().display());
        KvtierClient::new(Endpoint::from_shared(uri).unwrap().connect().await.unwrap())
    }

    async fn session(&self) -> Session {
        let mut rpc = self.rpc().await;
        let request = v1::OpenSessionRequest {
            protocol_version: kvtier_proto::limits::PROTOCOL_VERSION,
            client: "test".into(),
            model: Some((&crate::session::tests::model()).into()),
            reader: None,
        };
        let mut events = rpc.open_session(request).await.unwrap().into_inner();
        let first = events.message().await.unwrap().unwrap().event;
        let Some(v1::session_event::Event::Opened(opened)) = first else {
            panic!("{first:?}");
        };
        let token = opened.session;
        Session { rpc, events, token }
    }

    async fn stop(&self) -> v1::DrainReply {
        let drain = v1::DrainRequest { then_stop: true };
        self.rpc().await.drain(drain).await.unwrap().into_inner()
    }

    /// Waits for the end and starts again on the same files.
    async fn restart(self) -> Self {
        self.stop().await;
        Self::start_in(self.ended().await).await
    }

    async fn ended(self) -> tempfile::TempDir {
        let ended = tokio::time::timeout(LIMIT, self.task).await;
        ended.expect("the daemon ends").unwrap().unwrap();
        self.home
    }

    async fn leases(&self) -> u64 {
        let stats = self.rpc().await.stats(v1::StatsRequest {}).await.unwrap();
        stats
            .into_inner()
            .sessions
            .iter()
            .map(|one| one.leases)
            .sum()
    }
}

struct Session {
    rpc: Rpc,
    events: Streaming<v1::SessionEvent>,
    token: Bytes,
}

const KIND: i32 = v1::PayloadKind::Opaque as i32;

fn key(number: usize) -> Bytes {
    let mut key = [7; 32];
    key[..8].copy_from_slice(&(number as u64).to_le_bytes());
    Bytes::copy_from_slice(&key)
}

fn to_save(number: usize, len: usize) -> v1::BlockToSave {
    v1::BlockToSave {
        key: key(number),
        parent: vec![0; 32].into(),
        position: 0,
        tokens: 16,
        kind: KIND,
        opaque_bytes: len as u64,
        through: 0,
        slot: 0,
    }
}

/// The messages of an inline save of one block.
fn put(session: &Bytes, number: usize, len: usize) -> Vec<v1::PutInlineRequest> {
    use v1::put_inline_request::Part;
    let bytes = vec![number.to_le_bytes()[0]; len];
    let block = v1::PutInlineBlock {
        session: session.clone(),
        block: Some(to_save(number, len)),
        crc32: crc32fast::hash(&bytes),
        wait_for: v1::Acknowledge::Durable.into(),
    };
    let data = bytes
        .chunks(MIB)
        .map(|chunk| Part::Data(Bytes::copy_from_slice(chunk)));
    let parts = std::iter::once(Part::Block(block)).chain(data);
    parts
        .map(|part| v1::PutInlineRequest { part: Some(part) })
        .collect()
}

impl Session {
    /// Saves blocks `0..count` until they are durable.
    async fn fill(&mut self, count: usize, len: usize) {
        let token = self.token.clone();
        let messages = (0..count).flat_map(move |number| put(&token, number, len));
        let messages = tokio_stream::iter(messages.collect::<Vec<_>>());
        let reply = self.rpc.put_inline(messages).await.unwrap().into_inner();
        for result in &reply.results {
            let durable = v1::Acknowledge::Durable as i32;
            let want = v1::commit_result::Result::Acknowledged(durable);
            assert_eq!(result.result, Some(want));
        }
    }

    fn restore(&self, count: usize) -> v1::RestoreCommand {
        let start = v1::RestoreStart {
            accept: 0,
            session: self.token.clone(),
            keys: (0..count).map(key).collect(),
            kind: KIND,
            deadline_ms: 0,
            scattered: true,
            two_ended: None,
            into: None,
        };
        v1::RestoreCommand {
            restore_id: 1,
            command: Some(v1::restore_command::Command::Start(start)),
        }
    }

    async fn release(&mut self, leases: Vec<u64>) -> Result<u32, tonic::Status> {
        let session = self.token.clone();
        let slots = Vec::new();
        let request = v1::ReleaseRequest {
            session,
            leases,
            slots,
        };
        Ok(self.rpc.release(request).await?.into_inner().released)
    }

    /// Waits until the daemon says that it stops.
    async fn told(&mut self) {
        let event = self.events.message().await.unwrap().unwrap().event;
        assert!(
            matches!(event, Some(v1::session_event::Event::Draining(_))),
            "{event:?}"
        );
    }
}

/// Runs a test with a limit, on threads of its own as the daemon has them.
fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let ended = runtime.block_on(async { tokio::time::timeout(LIMIT, test).await });
    runtime.shutdown_background();
    ended.expect("the test comes to an end");
}

// Goal: a stop finishes what runs: a restore that was half way brings every block (P1, E4).
// Method: it needs twice the host memory, so that it runs for as long as leases are kept.
#[test]
fn a_stop_lets_a_running_restore_bring_every_block() {
    run(async {
        const BLOCKS: usize = 128;
        let daemon = Daemon::start().await;
        daemon.session().await.fill(BLOCKS, 256 * KIB).await;
        let daemon = daemon.restart().await;
        let mut session = daemon.session().await;
        let (commands, stream) = tokio::sync::mpsc::channel(4);
        commands.send(session.restore(BLOCKS)).await.unwrap();
        let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
        let mut events = session.rpc.restore(stream).await.unwrap().into_inner();
        let (mut held, mut came, mut done) = (Vec::new(), 0, None);
        while let Some(event) = events.message().await.unwrap() {
            use v1::restore_event::Event;
            match event.event {
                Some(Event::Ready(ready)) => {
                    came += ready.blocks.len();
                    held.extend(ready.blocks.iter().map(|block| block.lease));
                }
                Some(Event::Done(end)) => done = Some(end),
                _ => {}
            }
            if held.len() >= 32 || done.is_some() {
                if came < BLOCKS / 2 {
                    daemon.stop().await;
                    session.told().await;
                }
                let leases = std::mem::take(&mut held);
                let released = session.release(leases.clone()).await.unwrap();
                assert_eq!(released as usize, leases.len(), "all were alive");
            }
        }
        let done = done.expect("the restore says how it ended");
        assert_eq!((came, done.missed), (BLOCKS, Vec::new()));
        daemon.ended().await;
    });
}

// Goal: nobody's idle connection holds up a stop, and every stream hears of its end.
#[test]
fn a_stop_ends_idle_sessions_watchers_and_restore_streams_in_order() {
    run(async {
        let daemon = Daemon::start().await;
        let mut session = daemon.session().await;
        let watch = v1::WatchEventsRequest {
            session: session.token.clone(),
        };
        let mut watched = session.rpc.watch_events(watch).await.unwrap().into_inner();
        let (_commands, stream) = tokio::sync::mpsc::channel(4);
        let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
        let mut restores = session.rpc.restore(stream).await.unwrap().into_inner();
        let begin = Instant::now();
        daemon.stop().await;
        session.told().await;
        assert_eq!(session.events.message().await.unwrap(), None, "the session");
        assert_eq!(watched.message().await.unwrap(), None, "the watcher");
        assert_eq!(
            restores.message().await.unwrap(),
            None,
            "the restore stream"
        );
        daemon.ended().await;
        let limit = Duration::from_secs(10);
        assert!(
            begin.elapsed() < limit,
            "half the time it may take: {:?}",
            begin.elapsed()
        );
    });
}

// Goal: a block handed over while the daemon stops is refused or durable, never accepted and lost.
#[test]
fn a_save_during_a_stop_is_refused_or_kept() {
    run(async {
        let daemon = Daemon::start().await;
        let mut session = daemon.session().await;
        let messages = put(&session.token, 1, 3 * MIB);
        let (sender, stream) = tokio::sync::mpsc::channel(8);
        let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
        let mut rpc = session.rpc.clone();
        let saving = tokio::spawn(async move { rpc.put_inline(stream).await });
        let (last, first) = messages.split_last().unwrap();
        for message in first {
            sender.send(message.clone()).await.unwrap();
        }
        daemon.stop().await;
        session.told().await;
        let _ = sender.send(last.clone()).await;
        drop(sender);
        let kept = match saving.await.unwrap() {
            Ok(reply) => {
                let result = &reply.into_inner().results[0].result;
                matches!(result, Some(v1::commit_result::Result::Acknowledged(_)))
            }
            Err(refusal) => {
                let known = [
                    Code::Unavailable,
                    Code::Unauthenticated,
                    Code::Unknown,
                    Code::Cancelled,
                    // The connection's own farewell, when it is quicker than the call's.
                    Code::Internal,
                ];
                assert!(known.contains(&refusal.code()), "{refusal:?}");
                false
            }
        };
        let daemon = Daemon::start_in(daemon.ended().await).await;
        let mut session = daemon.session().await;
        let lookup = v1::LookupRequest {
            accept: 0,
            session: session.token.clone(),
            keys: vec![key(1)],
            kind: KIND,
            prefix_only: false,
        };
        let found = session.rpc.lookup(lookup).await.unwrap().into_inner();
        assert!(!kept || found.prefix_blocks == 1, "acknowledged, and gone");
        daemon.stop().await;
        daemon.ended().await;
    });
}

// Goal: a reader that goes away in the middle holds nothing (E5).
#[test]
fn an_inline_restore_that_is_cancelled_gives_all_leases_back() {
    run(async {
        let daemon = Daemon::start().await;
        daemon.session().await.fill(40, 256 * KIB).await;
        // From the device, so that blocks arrive one by one.
        let daemon = daemon.restart().await;
        let mut session = daemon.session().await;
        for _ in 0..4 {
            let get = v1::GetInlineRequest {
                accept: 0,
                session: session.token.clone(),
                keys: (0..40).map(key).collect(),
                kind: KIND,
                scattered: true,
            };
            let mut got = session.rpc.get_inline(get).await.unwrap().into_inner();
            got.message().await.unwrap().unwrap();
            drop(got);
            let begin = Instant::now();
            while daemon.leases().await > 0 {
                assert!(begin.elapsed() < Duration::from_secs(10), "leases stay");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        drop(session);
        daemon.stop().await;
        daemon.ended().await;
    });
}

// Goal: a call that is refused has done nothing.
#[test]
fn a_commit_with_one_bad_key_takes_none_of_its_blocks() {
    run(async {
        let daemon = Daemon::start().await;
        let mut session = daemon.session().await;
        let region = v1::RegisterRegionRequest {
            session: session.token.clone(),
            bytes: MIB as u64,
            ..v1::RegisterRegionRequest::default()
        };
        let region = session.rpc.register_region(region).await.unwrap();
        let region = region.into_inner().grant.unwrap().region;
        let save = v1::SaveRequest {
            session: session.token.clone(),
            region,
            blocks: vec![to_save(1, 4 * KIB)],
        };
        let granted = session.rpc.save(save).await.unwrap().into_inner().grants;
        let Some(v1::save_grant::Grant::Slot(slot)) = granted[0].grant else {
            panic!("{granted:?}");
        };
        let filled = |key, slot| v1::FilledSlot {
            key,
            slot,
            crc32: None,
            through: 0,
        };
        let commit = |blocks| v1::CommitRequest {
            session: session.token.clone(),
            blocks,
            wait_for: v1::Acknowledge::Accepted.into(),
        };
        let good = filled(key(1), Some(slot));
        let bad = commit(vec![
            good.clone(),
            filled(Bytes::from_static(b"short"), None),
        ]);
        let good = commit(vec![good]);
        let refusal = session.rpc.commit(bad).await.unwrap_err();
        assert_eq!(refusal.code(), Code::InvalidArgument);
        assert!(refusal.message().contains("blocks[1].key"), "{refusal:?}");
        let reply = session.rpc.commit(good).await.unwrap().into_inner();
        let want = v1::commit_result::Result::Acknowledged(v1::Acknowledge::Accepted.into());
        assert_eq!(
            reply.results[0].result,
            Some(want),
            "the slot is still granted"
        );
        drop(session);
        daemon.stop().await;
        daemon.ended().await;
    });
}

#[test]
fn watchers_are_bounded_and_end_with_their_session() {
    run(async {
        let daemon = Daemon::start().await;
        let session = daemon.session().await;
        let mut rpc = daemon.rpc().await;
        let watch = || v1::WatchEventsRequest {
            session: session.token.clone(),
        };
        let mut streams = Vec::new();
        let refusal = loop {
            match rpc.watch_events(watch()).await {
                Ok(stream) => streams.push(stream.into_inner()),
                Err(refusal) => break refusal,
            }
        };
        assert_eq!(
            (refusal.code(), streams.len()),
            (Code::ResourceExhausted, 8)
        );
        drop(session);
        for stream in &mut streams {
            assert_eq!(
                stream.message().await.unwrap(),
                None,
                "its session has ended"
            );
        }
        daemon.stop().await;
        daemon.ended().await;
    });
}

#[test]
fn a_release_of_more_names_than_a_call_may_carry_is_refused() {
    run(async {
        let daemon = Daemon::start().await;
        let mut session = daemon.session().await;
        let many = vec![1; kvtier_proto::limits::KEYS_PER_CALL_MAX];
        assert_eq!(session.release(many.clone()).await.unwrap(), 0);
        let refusal = session.release([many, vec![1]].concat()).await.unwrap_err();
        assert_eq!(refusal.code(), Code::InvalidArgument);
        assert!(refusal.message().contains("4097 names"), "{refusal:?}");
        drop(session);
        daemon.stop().await;
        daemon.ended().await;
    });
}

// Goal: a tenant hears that its wipe is not durable, and nothing of where the operator keeps
// things.
#[test]
fn a_wipe_that_fails_tells_paths_to_operators_only() {
    run(async {
        let daemon = Daemon::start().await;
        let mut session = daemon.session().await;
        std::fs::remove_dir_all(daemon.home.path().join("state")).unwrap();
        let wipe = |session: Bytes, name: &str| v1::WipeRequest {
            session,
            namespace_name: name.into(),
        };
        let home = daemon.home.path().display().to_string();
        let refusal = session
            .rpc
            .wipe(wipe(session.token.clone(), ""))
            .await
            .unwrap_err();
        assert_eq!(refusal.code(), Code::Unavailable);
        let said = refusal.message();
        assert!(
            said.contains("repeat it") && !said.contains(&home),
            "{said}"
        );
        let refusal = session
            .rpc
            .wipe(wipe(Bytes::new(), "default"))
            .await
            .unwrap_err();
        assert!(refusal.message().contains(&home), "{refusal:?}");
        drop(session);
        daemon.stop().await;
        daemon.ended().await;
    });
}
