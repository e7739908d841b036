//! Restores as they run: shared reads, deadlines, cancellation, prefixes, memory under leases.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness.

use std::time::{Duration, Instant};

use kvtier_client::{
    Acknowledge, LeasedBlock, Miss, PayloadKind, RestoreEvent, RestoreOptions, SaveOutcome,
    SaveRefusal, Tier,
};
use kvtier_tests::harness::{Daemon, Options, blocks, eventually, run};

use super::LIMIT;

const READ: &str = "kvtier_disk_bytes_total{device=\"0\",direction=\"read\"}";

/// Waits until no lease is held.
async fn no_leases(daemon: &Daemon) {
    eventually(Duration::from_secs(10), async || {
        match daemon.metrics().get("kvtier_leases") {
            0.0 => Ok(()),
            held => Err(format!("{held} leases are held")),
        }
    })
    .await;
}

// Goal: many engines that want one block at once cost one read of the device.
#[test]
fn concurrent_restores_of_one_block_read_the_disk_once() {
    run(LIMIT, async {
        for level in ["raw", "lossless", "zstd"] {
            let model = blocks::wide();
            let (daemon, set) = Daemon::cold(Options::default().level(level), &model, |session| {
                blocks::loose(session, 1, 1, PayloadKind::Kv)
            })
            .await;
            let before = daemon.metrics().get(READ);
            let mut readers = tokio::task::JoinSet::new();
            for _ in 0..8 {
                let (session, set) = (daemon.session(&model).await, set.clone());
                readers.spawn(async move { blocks::restore_all(&session, &set).await });
            }
            readers.join_all().await;
            // The disk thread counts a little after it answered.
            tokio::time::sleep(Duration::from_millis(100)).await;
            let read = daemon.metrics().get(READ) - before;
            let payload = 512.0 * 1024.0;
            assert!(read > 0.0, "{level}: host memory was empty");
            assert!(
                read < 1.5 * payload,
                "{level}: {read} bytes read for one block"
            );
        }
    });
}

#[test]
fn a_prefix_restore_stops_at_the_first_miss_and_a_scattered_one_does_not() {
    run(LIMIT, async {
        let daemon = Daemon::start(Options::default());
        let session = daemon.session(&blocks::gqa()).await;
        let set = blocks::chain(&session, 1, 16 * 10, PayloadKind::Kv);
        let (front, gap_and_rest) = set.split_at(4);
        blocks::save_durable(&session, front).await;
        blocks::save_durable(&session, &gap_and_rest[1..]).await;
        let lookup = session.lookup(&blocks::keys(&set), PayloadKind::Kv).await;
        assert_eq!(lookup.unwrap().prefix_blocks, 4);
        let prefix = blocks::restore_with(&session, &set, RestoreOptions::default()).await;
        let prefix = prefix.unwrap();
        assert_eq!((prefix.usable, prefix.hits.len()), (4, 4));
        assert_eq!(prefix.misses, vec![(4, Miss::Absent)]);
        let scattered = blocks::restore(&session, &set).await.unwrap();
        assert_eq!((scattered.usable, scattered.hits.len()), (4, 9));
        assert_eq!(scattered.misses, vec![(4, Miss::Absent)]);
    });
}

// Goal: what has not arrived by the deadline is a miss with that reason, and the restore ends.
#[test]
fn a_restore_ends_at_its_deadline_with_misses_that_say_so() {
    run(LIMIT, async {
        let options = Options::default().host_mib(256).disk_mib(256, 16);
        let model = blocks::wide();
        let (daemon, set) = Daemon::cold(options.level("zstd"), &model, |session| {
            blocks::loose(session, 1, 200, PayloadKind::Kv)
        })
        .await;
        let session = daemon.session(&model).await;
        let begin = Instant::now();
        let options = RestoreOptions::default().scattered();
        let options = options.deadline(Duration::from_millis(1));
        let found = blocks::restore_with(&session, &set, options).await.unwrap();
        assert!(
            begin.elapsed() < Duration::from_secs(10),
            "it ended by its deadline"
        );
        let late = |(_, miss): &(usize, Miss)| *miss == Miss::Deadline;
        assert!(found.misses.iter().all(late), "{:?}", found.misses);
        assert!(
            !found.misses.is_empty(),
            "100 MiB do not arrive in a millisecond"
        );
        assert_eq!(found.hits.len() + found.misses.len(), set.len());
        no_leases(&daemon).await;
        // What was late is there for whoever asks next.
        blocks::restore_all(&session, &set).await;
    });
}

#[test]
fn a_cancelled_or_dropped_restore_ends_and_holds_nothing() {
    run(LIMIT, async {
        let options = Options::default().host_mib(256).disk_mib(256, 16);
        let model = blocks::wide();
        let (daemon, set) = Daemon::cold(options.level("zstd"), &model, |session| {
            blocks::loose(session, 1, 200, PayloadKind::Kv)
        })
        .await;
        let session = daemon.session(&model).await;
        let keys = blocks::keys(&set);
        let options = RestoreOptions::default().scattered();
        let restore = session.restore(&keys, PayloadKind::Kv, options.clone());
        let mut restore = restore.await.unwrap();
        restore.cancel();
        let mut summary = None;
        while let Some(event) = restore.next().await.unwrap() {
            match event {
                RestoreEvent::Ready(block) => {
                    blocks::check(&session, &set[block.index()], block.payload().unwrap());
                }
                RestoreEvent::Done(done) => summary = Some(done),
                _ => {}
            }
        }
        let summary = summary.expect("a cancelled restore says that it ended");
        assert!(summary.cancelled, "{summary:?}");
        drop(restore);
        no_leases(&daemon).await;
        // Dropped in the middle, after the first block.
        let mut restore = session
            .restore(&keys, PayloadKind::Kv, options)
            .await
            .unwrap();
        let first = loop {
            if let Some(RestoreEvent::Ready(block)) = restore.next().await.unwrap() {
                break block;
            }
        };
        drop(restore);
        blocks::check(&session, &set[first.index()], first.payload().unwrap());
        drop(first);
        no_leases(&daemon).await;
        blocks::restore_all(&session, &set).await;
    });
}

#[test]
fn blocks_that_the_engine_computed_itself_are_not_read() {
    run(LIMIT, async {
        let options = Options::default().host_mib(256).disk_mib(256, 16);
        let model = blocks::wide();
        let (daemon, set) = Daemon::cold(options.level("zstd"), &model, |session| {
            blocks::chain(session, 1, 16 * 300, PayloadKind::Kv)
        })
        .await;
        let session = daemon.session(&model).await;
        let keys = blocks::keys(&set);
        let options = RestoreOptions::default();
        let mut restore = session
            .restore(&keys, PayloadKind::Kv, options)
            .await
            .unwrap();
        restore.progress(set.len());
        let mut summary = None;
        while let Some(event) = restore.next().await.unwrap() {
            if let RestoreEvent::Done(done) = event {
                summary = Some(done);
            }
        }
        assert_eq!(summary.unwrap().missed, vec![], "not needed is not missed");
        // The disk thread counts a little after it answered.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let read = daemon.metrics().get(READ);
        let payload = 300.0 * 512.0 * 1024.0;
        // Stored they are more than half of that. What was under way may come.
        assert!(
            read < payload / 4.0,
            "{read} bytes were read though none was needed"
        );
    });
}

// Museum row 4 (LMCache#3022): when memory runs out in the middle of a batch, buffers that
// nobody filled are returned as hits. Here they are misses with a reason, and the rest is right.
#[test]
fn museum_04_a_restore_beyond_memory_misses_for_want_of_space() {
    run(LIMIT, async {
        let model = blocks::wide();
        let (daemon, set) = Daemon::cold(
            Options::default().host_mib(16).disk_mib(128, 4),
            &model,
            |session| blocks::loose(session, 1, 60, PayloadKind::Kv),
        )
        .await;
        let session = daemon.session(&model).await;
        let options = RestoreOptions::default().scattered();
        let keys = blocks::keys(&set);
        let restore = session.restore(&keys, PayloadKind::Kv, options);
        let all = restore.await.unwrap().collect().await.unwrap();
        for block in &all.blocks {
            blocks::check(&session, &set[block.index()], block.payload().unwrap());
        }
        assert!(!all.blocks.is_empty());
        assert!(!all.missed.is_empty(), "30 MiB do not fit into 16");
        let space = |(_, miss): &(usize, Miss)| *miss == Miss::NoSpace;
        assert!(all.missed.iter().all(space), "{:?}", all.missed);
        // A save finds no room either, and says so without an error.
        let more = blocks::loose(&session, 2, 1, PayloadKind::Kv);
        let outcome = blocks::save(&session, &more, Acknowledge::Accepted).await;
        let refused = [
            SaveOutcome::Refused(SaveRefusal::NoSpace),
            SaveOutcome::Failed(kvtier_client::CommitFailure::NoSpace),
        ];
        let outcome = outcome.unwrap()[0];
        assert!(refused.contains(&outcome), "{outcome:?}");
        // Room comes back with the leases.
        session.release(all.blocks).await.unwrap();
        blocks::save_durable(&session, &more).await;
        blocks::restore_all(&session, &set).await;
    });
}

// Museum row 5 (vLLM#51667): memory that is still being read is given to somebody else. A leased
// block keeps its bytes while everything around it is evicted and written anew.
#[test]
fn museum_05_leased_bytes_stay_while_everything_else_is_replaced() {
    run(LIMIT, async {
        let daemon = Daemon::start(Options::default().host_mib(16).disk_mib(256, 4));
        let model = blocks::wide();
        let session = daemon.session(&model).await;
        let kept = blocks::loose(&session, 1, 5, PayloadKind::Kv);
        blocks::save_durable(&session, &kept).await;
        let keys = blocks::keys(&kept);
        let options = RestoreOptions::default().scattered();
        let restore = session.restore(&keys, PayloadKind::Kv, options);
        let leased = restore.await.unwrap().collect().await.unwrap().blocks;
        assert_eq!(leased.len(), 5);
        for seed in 2..6 {
            let others = blocks::loose(&session, seed, 40, PayloadKind::Kv);
            blocks::save_durable(&session, &others).await;
            blocks::restore_all(&session, &others).await;
            for block in &leased {
                blocks::check(&session, &kept[block.index()], block.payload().unwrap());
            }
        }
        let evicted = daemon.metrics();
        assert!(
            evicted.get("kvtier_tier_blocks{tier=\"host\"}") < 40.0,
            "it was full"
        );
        session
            .release(leased)
            .await
            .expect("every lease lived until now");
    });
}

#[test]
fn a_restore_beyond_the_bound_ends_alone() {
    run(LIMIT, async {
        let options = Options::default().host_mib(256).disk_mib(256, 16);
        let model = blocks::wide();
        let (daemon, set) = Daemon::cold(
            options.level("zstd").restores_per_session(2),
            &model,
            |session| blocks::loose(session, 1, 100, PayloadKind::Kv),
        )
        .await;
        let session = daemon.session(&model).await;
        let keys = blocks::keys(&set);
        let mut running = Vec::new();
        for _ in 0..6 {
            let options = RestoreOptions::default().scattered();
            let restore = session.restore(&keys, PayloadKind::Kv, options).await;
            running.push(restore.unwrap());
        }
        let (mut whole, mut refused) = (0, 0);
        for restore in running {
            let all = restore.collect().await.unwrap();
            for block in &all.blocks {
                blocks::check(&session, &set[block.index()], block.payload().unwrap());
            }
            if all.missed.is_empty() {
                assert_eq!(all.blocks.len(), set.len());
                whole += 1;
            } else {
                assert_eq!(all.missed.len(), set.len(), "all or nothing");
                refused += 1;
            }
        }
        assert!(whole >= 2, "{whole} restores ran, where two may");
        assert!(refused > 0, "six restores of 50 MiB ran where two may");
        blocks::restore_all(&session, &set).await;
    });
}

#[test]
fn leases_beyond_the_limit_are_misses_and_the_session_goes_on() {
    run(LIMIT, async {
        let daemon = Daemon::start(Options::default().leases_per_session(10));
        let session = daemon.session(&blocks::gqa()).await;
        let set = blocks::loose(&session, 1, 30, PayloadKind::Kv);
        blocks::save_durable(&session, &set).await;
        let options = RestoreOptions::default().scattered();
        let keys = blocks::keys(&set);
        let restore = session.restore(&keys, PayloadKind::Kv, options);
        let some = restore.await.unwrap().collect().await.unwrap();
        assert_eq!(some.blocks.len(), 10);
        assert_eq!(some.missed.len(), 20);
        assert_eq!(daemon.metrics().get("kvtier_leases"), 10.0);
        some.blocks.into_iter().for_each(LeasedBlock::release);
        session.flush().await.unwrap();
        assert_eq!(daemon.metrics().get("kvtier_leases"), 0.0);
        let few = blocks::restore_all(&session, &set[..10]).await;
        assert_eq!(few.from(Tier::Host), 10);
    });
}
