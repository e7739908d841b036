//! Two-ended restores: an engine computes from the front while blocks load from the back.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness. Devices are limited, so that loading takes long enough to be met.

use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use kvtier_client::{
    Miss, NextCompute, Outlook, PayloadKind, PrefillStep, Restore, RestoreEvent, RestoreOptions,
    RestoreSummary, SaveBlock, Session, TwoEnded,
};
use kvtier_proto::claims::{HEAD, map_len};
use kvtier_proto::v1;
use kvtier_tests::harness::raw::RawSession;
use kvtier_tests::harness::{Daemon, Options, blocks, eventually, run, skip};
use tonic::Code;
use v1::restore_command::Command;

use super::LIMIT;
use super::requests::{key, opened, refused, still_works};

/// Who brought each block, in the order of the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum By {
    Engine,
    Daemon,
}

/// What came of a restore.
#[derive(Debug)]
pub(super) struct Met {
    pub(super) by: Vec<By>,
    summary: Option<RestoreSummary>,
    outlook: Option<Outlook>,
    /// Whether the daemon let the engine in at any time.
    let_in: bool,
}

impl Met {
    fn count(&self, by: By) -> usize {
        self.by.iter().filter(|one| **one == by).count()
    }
}

fn two_ended() -> RestoreOptions {
    RestoreOptions::default().two_ended(TwoEnded::new(16))
}

/// Plays an engine that takes `step` to compute a block, until every block is here; compares every
/// block that is loaded.
async fn play(session: &Session, set: &[SaveBlock], mut restore: Restore, step: Duration) -> Met {
    let compute = restore.compute_end();
    let mut by: Vec<Option<By>> = vec![None; set.len()];
    let (mut summary, mut outlook, mut let_in) = (None, None, false);
    let mut bring = |index: usize, who: By| {
        assert_eq!(by[index].replace(who), None, "block {index} came twice");
    };
    loop {
        while let Some(event) = restore.try_next().unwrap() {
            match event {
                RestoreEvent::Ready(block) => {
                    let index = block.index();
                    blocks::check(session, &set[index], block.payload().unwrap());
                    bring(index, By::Daemon);
                }
                RestoreEvent::Outlook(told) => outlook = Some(told),
                RestoreEvent::Done(done) => summary = Some(done),
                _ => {}
            }
        }
        let_in |= compute.is_let_in();
        match compute.next() {
            NextCompute::Block(index) => {
                tokio::time::sleep(step).await;
                let before = u32::try_from(index).unwrap() * 16;
                let step = PrefillStep {
                    before,
                    tokens: 16,
                    took: step.max(Duration::from_micros(1)),
                };
                bring(index, By::Engine);
                compute.computed(index, Some(step));
            }
            NextCompute::Wait => restore.wait().await.unwrap(),
            NextCompute::Finished => break,
        }
    }
    let by = by.into_iter().map(Option::unwrap).collect();
    Met {
        by,
        summary,
        outlook,
        let_in,
    }
}

pub(super) async fn meet(session: &Session, set: &[SaveBlock], step: Duration) -> Met {
    let keys = blocks::keys(set);
    let restore = session.restore(&keys, PayloadKind::Kv, two_ended()).await;
    play(session, set, restore.unwrap(), step).await
}

/// 64 blocks of half a MiB on a device that brings 32 a second.
async fn slow(level: &'static str) -> (Daemon, Session, Vec<SaveBlock>) {
    let options = Options::default().level(level).read_limit_mib(16);
    let model = blocks::wide();
    let (daemon, set) = Daemon::cold(options.host_mib(128).disk_mib(128, 16), &model, |session| {
        blocks::chain(session, 1, 16 * 64, PayloadKind::Kv)
    })
    .await;
    let session = daemon.session(&model).await;
    (daemon, session, set)
}

#[test]
fn the_two_ends_meet_and_every_block_is_brought_once() {
    run(LIMIT, async {
        let (daemon, session, set) = slow("raw").await;
        let met = meet(&session, &set, Duration::from_millis(30)).await;
        let (computed, loaded) = (met.count(By::Engine), met.count(By::Daemon));
        assert!(computed >= 8 && loaded >= 8, "{computed} and {loaded}");
        let meeting = met.by.iter().position(|by| *by == By::Daemon).unwrap();
        assert_eq!(meeting, computed, "the engine has the front: {:?}", met.by);
        let read = "kvtier_disk_bytes_total{device=\"0\",direction=\"read\"}";
        eventually(Duration::from_secs(5), async || {
            let read = daemon.metrics().get(read);
            let loaded = u32::try_from(loaded).unwrap();
            // Where the ends meet, the two that are in flight may be taken over.
            let most = f64::from(loaded + 2) * 520.0 * 1024.0 + 256.0 * 1024.0;
            match read <= most {
                true => Ok(()),
                false => Err(format!("{read} bytes were read for {loaded} blocks")),
            }
        })
        .await;
        // Now everything that was loaded is in host memory: the engine computes the front only.
        let again = meet(&session, &set, Duration::from_millis(5)).await;
        assert!(again.count(By::Daemon) >= loaded);
    });
}

// Goal: a restore is told what those before it and the engine have shown, and an engine that would
// save nothing is kept out.
#[test]
fn a_second_restore_is_told_what_was_learned_and_keeps_a_slow_engine_out() {
    const FIRST: usize = 16;
    run(LIMIT, async {
        let (daemon, session, set) = slow("raw").await;
        let keys = blocks::keys(&set[..FIRST]);
        let options = RestoreOptions::default();
        let first = session.restore(&keys, PayloadKind::Kv, options).await;
        assert_eq!(first.unwrap().collect().await.unwrap().usable_blocks, FIRST);
        // 200 ms a token, whatever else: a block takes longer than all loads together.
        let step = |before, tokens| PrefillStep {
            before,
            tokens,
            took: Duration::from_millis(200) * tokens,
        };
        session.report_prefill(&[step(0, 16), step(16, 32), step(48, 8)]);
        eventually(Duration::from_secs(10), async || {
            match daemon.metrics().get("kvtier_prefill_steps_total") {
                3.0 => Ok(()),
                steps => Err(format!("{steps} steps are known")),
            }
        })
        .await;
        let met = meet(&session, &set[FIRST..], Duration::ZERO).await;
        let outlook = met.outlook.unwrap();
        let near = |time: Option<Duration>, seconds: f64| {
            let time = time.unwrap().as_secs_f64();
            let within = (seconds * 0.8..seconds * 1.2).contains(&time);
            assert!(within, "{time} and not {seconds}: {outlook:?}");
        };
        // 48 blocks at 32 a second, and 16 tokens that are computed after them in any case.
        near(outlook.load, 48.0 / 32.0 + 3.2);
        near(outlook.planned, 48.0 / 32.0 + 3.2);
        near(outlook.compute, 49.0 * 3.2);
        assert_eq!((outlook.compute_blocks, outlook.load_blocks), (0, 48));
        assert!(!met.let_in, "{outlook:?}");
        assert_eq!(met.by, vec![By::Daemon; 48]);
    });
}

#[test]
fn a_slow_engine_gets_most_blocks_loaded_and_a_fast_one_few() {
    run(LIMIT, async {
        let (_daemon, session, set) = slow("lossless").await;
        let fast = meet(&session, &set, Duration::ZERO).await;
        assert!(fast.count(By::Daemon) < 32, "{fast:?}");
        let slow = meet(&session, &set, Duration::from_millis(700)).await;
        assert!(slow.count(By::Engine) < 32, "{slow:?}");
    });
}

// Goal: what is not stored does not end the restore: the engine computes it when its turn comes.
#[test]
fn blocks_that_are_not_there_are_computed_and_those_behind_them_are_loaded() {
    run(LIMIT, async {
        let model = blocks::gqa();
        let (_daemon, set) = Daemon::cold(Options::default(), &model, |session| {
            let mut set = blocks::chain(session, 1, 16 * 12, PayloadKind::Kv);
            set.retain(|block| block.position != 0 && block.position != 16 * 7);
            set
        })
        .await;
        let session = _daemon.session(&model).await;
        let whole = blocks::chain(&session, 1, 16 * 12, PayloadKind::Kv);
        assert_eq!((set.len(), whole.len()), (10, 12));
        // Long enough that blocks behind the second gap are loaded before the engine comes there.
        let met = meet(&session, &whole, Duration::from_millis(50)).await;
        assert_eq!((met.by[0], met.by[7]), (By::Engine, By::Engine));
        let summary = met.summary.unwrap();
        assert!(summary.missed.contains(&(0, Miss::Absent)), "{summary:?}");
        assert!(summary.missed.contains(&(7, Miss::Absent)), "{summary:?}");
        assert_eq!(met.by[11], By::Daemon);
    });
}

// Goal: where no memory can be shared the same engine loop works: it gets the loaded blocks and
// computes what did not come.
#[test]
fn over_tcp_the_engine_computes_what_did_not_come() {
    run(LIMIT, async {
        let model = blocks::gqa();
        let options = Options::default().tcp("default");
        let (daemon, set) = Daemon::cold(options, &model, |session| {
            let mut set = blocks::chain(session, 1, 16 * 6, PayloadKind::Kv);
            set.truncate(4);
            set
        })
        .await;
        let session = daemon.tcp_session(&model).await;
        assert!(!session.is_shared());
        let whole = blocks::chain(&session, 1, 16 * 6, PayloadKind::Kv);
        assert_eq!(set.len(), 4);
        let met = meet(&session, &whole, Duration::from_millis(1)).await;
        let want = [vec![By::Daemon; 4], vec![By::Engine; 2]].concat();
        assert_eq!(met.by, want);
    });
}

// Goal: nobody waits for a device that hangs, not even for what it was about to bring.
#[test]
fn an_engine_whose_device_hangs_computes_what_it_does_not_bring() {
    if !cfg!(debug_assertions) {
        let name = "an_engine_whose_device_hangs";
        return skip(name, "a build without debug assertions has no fault lane");
    }
    run(LIMIT, async {
        let model = blocks::gqa();
        let make = |session: &Session| blocks::chain(session, 1, 16 * 20, PayloadKind::Kv);
        let (mut daemon, set) = Daemon::cold(Options::default(), &model, make).await;
        daemon.inject("");
        daemon.restart();
        let session = daemon.session(&model).await;
        daemon.inject("read delay_ms=20000");
        let begin = std::time::Instant::now();
        let met = meet(&session, &set, Duration::from_millis(1)).await;
        assert_eq!(met.by, vec![By::Engine; 20]);
        assert!(
            begin.elapsed() < Duration::from_secs(10),
            "{:?}",
            begin.elapsed()
        );
    });
}

#[test]
fn an_engine_whose_daemon_dies_computes_the_rest() {
    run(LIMIT, async {
        let (mut daemon, session, set) = slow("raw").await;
        let keys = blocks::keys(&set);
        let restore = session.restore(&keys, PayloadKind::Kv, two_ended()).await;
        let mut restore = restore.unwrap();
        let compute = restore.compute_end();
        let mut came = 0;
        while came < 3 {
            if let Some(RestoreEvent::Ready(_)) = restore.next().await.unwrap() {
                came += 1;
            }
        }
        daemon.kill9();
        while restore.next().await.is_ok_and(|event| event.is_some()) {}
        let mut computed = 0;
        while let NextCompute::Block(index) = compute.next() {
            compute.computed(index, None);
            computed += 1;
        }
        assert_eq!(compute.next(), NextCompute::Finished);
        assert!(
            computed + 3 <= set.len() && computed >= set.len() / 2,
            "{computed}"
        );
    });
}

async fn start(
    session: &mut RawSession,
    region: u32,
    place: (u64, u64),
    keys: u8,
) -> v1::RestoreStart {
    let (offset, length) = place;
    v1::RestoreStart {
        session: session.token(),
        keys: (0..keys).map(key).collect(),
        kind: v1::PayloadKind::Kv.into(),
        two_ended: Some(v1::TwoEnded {
            map: Some(v1::Slot {
                region,
                offset,
                length,
                generation: 0,
            }),
            ..v1::TwoEnded::default()
        }),
        ..v1::RestoreStart::default()
    }
}

#[test]
fn maps_that_lie_nowhere_are_refused_with_what_is_accepted() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default());
        let mut session = opened(&daemon).await;
        for bytes in [0, (1 << 20) + 1, u64::MAX] {
            let answer = session.claims(bytes).await;
            refused(
                answer.map(|_| ()),
                Code::InvalidArgument,
                &["bytes", "1 MiB"],
            );
        }
        let (claims, _memory) = session.claims(4096).await.unwrap();
        let (staging, _staging) = session.region(1 << 20).await;
        let need = map_len(3) as u64;
        let bad = [
            (
                staging.region,
                0,
                need,
                "a region that this session registered",
            ),
            (77, 0, need, "a region that this session registered"),
            (claims.region, 0, need - 1, "exactly the bytes of a map"),
            (
                claims.region,
                4096 - need + 1,
                need,
                "exactly the bytes of a map",
            ),
            (claims.region, u64::MAX, need, "exactly the bytes of a map"),
        ];
        for (region, offset, length, accepted) in bad {
            let start = start(&mut session, region, (offset, length), 3).await;
            let command = v1::RestoreCommand {
                restore_id: 1,
                command: Some(Command::Start(start)),
            };
            let stream = tokio_stream::iter(vec![command]);
            let mut events = session.rpc.restore(stream).await.unwrap().into_inner();
            let parts = &["two_ended.map", accepted];
            refused(events.message().await, Code::InvalidArgument, parts);
        }
        for _ in 1..4 {
            session.claims(1).await.unwrap();
        }
        let fifth = session.claims(1).await;
        let parts = &["regions for claims"];
        refused(fifth.map(|_| ()), Code::ResourceExhausted, parts);
        still_works(&mut daemon, 1).await;
    });
}

// Goal: a client that scribbles over the map while a restore runs hurts only itself: the restore
// ends, and nobody's lease stays behind.
#[test]
fn a_map_that_is_scribbled_over_ends_its_restore_and_harms_nobody() {
    run(LIMIT, async {
        let model = blocks::gqa();
        let (mut daemon, set) = Daemon::cold(Options::default(), &model, |session| {
            blocks::chain(session, 1, 16 * 40, PayloadKind::Kv)
        })
        .await;
        let mut session = opened(&daemon).await;
        let (grant, memory) = session.claims(4096).await.unwrap();
        let length = map_len(set.len()) as u64;
        let mut start = start(&mut session, grant.region, (0, length), 0).await;
        start.keys = set
            .iter()
            .map(|block| block.key.as_bytes().to_vec().into())
            .collect();
        let (commands, stream) = tokio::sync::mpsc::channel(4);
        let command = v1::RestoreCommand {
            restore_id: 1,
            command: Some(Command::Start(start)),
        };
        commands.send(command).await.unwrap();
        let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
        let events = session.rpc.restore(stream).await.unwrap();
        let mut events = events.into_inner();
        let scribbling = std::thread::spawn(move || {
            for round in 0..20_000u64 {
                let at = HEAD as u64 + round * 7 % 40;
                let byte = [u8::try_from(round * 31 % 256).unwrap()];
                memory.write_all_at(&byte, at).unwrap();
            }
        });
        let done = loop {
            let event = events.message().await.unwrap().unwrap().event;
            if let Some(v1::restore_event::Event::Done(done)) = event {
                break done;
            }
        };
        scribbling.join().unwrap();
        assert!(done.missed.is_empty(), "{done:?}");
        drop((session, events, commands));
        eventually(Duration::from_secs(10), async || {
            match daemon.metrics().get("kvtier_leases") {
                0.0 => Ok(()),
                held => Err(format!("{held} leases are held")),
            }
        })
        .await;
        still_works(&mut daemon, 2).await;
    });
}

#[test]
fn prefill_times_are_taken_up_to_a_number_and_believed_where_they_can_be() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default());
        let mut session = opened(&daemon).await;
        let report = |tokens, micros| v1::PrefillReport {
            before: 0,
            tokens,
            micros,
        };
        let mut send = async |reports: Vec<v1::PrefillReport>| {
            let request = v1::ReportPrefillRequest {
                session: session.token(),
                reports,
            };
            session.rpc.report_prefill(request).await
        };
        send(vec![report(16, 900), report(0, 1), report(16, u64::MAX)])
            .await
            .unwrap();
        let many = send(vec![report(16, 900); 65]).await;
        refused(
            many,
            Code::InvalidArgument,
            &["reports", "65", "at most 64"],
        );
        still_works(&mut daemon, 1).await;
    });
}
