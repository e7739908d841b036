//! A device that fails on demand: misses, never an error; a state that is shown; and well again
//! when the fault ends, where that is promised.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness; the fault lane that builds with debug assertions have.

use std::time::Duration;

use kvtier_client::{
    Acknowledge, CommitFailure, Miss, PayloadKind, SaveBlock, SaveOutcome, Session,
};
use kvtier_tests::harness::{Daemon, Options, blocks, eventually, run, skip};

use super::LIMIT;

/// Longest wait until a state shows in the metrics.
const SHOWN: Duration = Duration::from_secs(20);

/// A daemon over the fault lane that holds `count` blocks on the device and none in host memory.
async fn cold(options: Options, count: usize) -> (Daemon, Vec<SaveBlock>) {
    let model = blocks::gqa();
    let make = |session: &Session| blocks::loose(session, 1, count, PayloadKind::Kv);
    let (mut daemon, set) = Daemon::cold(options, &model, make).await;
    daemon.inject("");
    daemon.restart();
    (daemon, set)
}

/// Runs a test on both lanes, unless this build has no fault lane.
fn on_both_lanes(name: &str, test: impl AsyncFn(Options)) {
    if !cfg!(debug_assertions) {
        return skip(name, "a build without debug assertions has no fault lane");
    }
    run(LIMIT, async {
        for lane in ["io_uring", "pread"] {
            test(Options::default().lane(lane)).await;
        }
    });
}

async fn state_becomes(daemon: &Daemon, state: &str) {
    eventually(SHOWN, async || match daemon.metrics().disk_state() {
        now if now == state => Ok(()),
        now => Err(format!("the device is {now}, not {state}")),
    })
    .await;
}

/// Saves blocks that the device does not take; nobody is told otherwise.
async fn save_in_vain(session: &Session, seed: u64) -> Vec<SaveBlock> {
    let set = blocks::loose(session, seed, 12, PayloadKind::Kv);
    let outcomes = blocks::save(session, &set, Acknowledge::Durable).await;
    let outcomes = outcomes.expect("a failing device is no error");
    let told = SaveOutcome::Failed(CommitFailure::NotDurable);
    let other = outcomes.iter().find(|outcome| **outcome != told);
    assert_eq!(other, None, "set {seed}");
    set
}

async fn save_well(session: &Session, seed: u64) -> Vec<SaveBlock> {
    let set = blocks::loose(session, seed, 12, PayloadKind::Kv);
    blocks::save_durable(session, &set).await;
    set
}

#[test]
fn reads_that_fail_are_misses_until_they_do_not() {
    on_both_lanes("reads_that_fail", async |options| {
        let (mut daemon, set) = cold(options, 60).await;
        let session = daemon.session(&blocks::gqa()).await;
        daemon.inject("read eio");
        let found = blocks::restore(&session, &set).await.unwrap();
        assert_eq!(found.hits, vec![]);
        let device = |(_, miss): &(usize, Miss)| *miss == Miss::Device;
        assert!(found.misses.iter().all(device), "{:?}", found.misses);
        save_well(&session, 2).await;
        daemon.inject("");
        // A record that the device did not deliver is given up, so that it can be saved again.
        let found = blocks::restore(&session, &set).await.unwrap();
        let gone = |(_, miss): &(usize, Miss)| *miss == Miss::Absent;
        assert!(found.misses.iter().all(gone), "{:?}", found.misses);
        blocks::save_durable(&session, &set).await;
        state_becomes(&daemon, "healthy").await;
        drop(session);
        daemon.crash();
        let session = daemon.session(&blocks::gqa()).await;
        blocks::restore_all(&session, &set).await;
    });
}

#[test]
fn three_failed_writes_stop_the_writing_and_a_restart_mends_it() {
    on_both_lanes("three_failed_writes", async |options| {
        let (mut daemon, set) = cold(options, 40).await;
        let session = daemon.session(&blocks::gqa()).await;
        daemon.inject("write eio");
        save_in_vain(&session, 2).await;
        state_becomes(&daemon, "read_only").await;
        assert!(daemon.metrics().sum("kvtier_disk_errors_total") >= 3.0);
        // The fault ends; what is poisoned stays so, and reads go on.
        daemon.inject("");
        save_in_vain(&session, 3).await;
        blocks::restore_all(&session, &set).await;
        drop(session);
        daemon.restart();
        let session = daemon.session(&blocks::gqa()).await;
        blocks::restore_all(&session, &set).await;
        save_well(&session, 4).await;
        state_becomes(&daemon, "healthy").await;
    });
}

// Museum row 12 is the store's test of it; this is the daemon's.
#[test]
fn one_failed_sync_stops_the_writing_though_later_ones_would_succeed() {
    on_both_lanes("one_failed_sync", async |options| {
        let (mut daemon, set) = cold(options, 40).await;
        let session = daemon.session(&blocks::gqa()).await;
        let before = save_well(&session, 2).await;
        daemon.inject("sync eio times=1");
        save_in_vain(&session, 3).await;
        save_in_vain(&session, 4).await;
        state_becomes(&daemon, "read_only").await;
        drop(session);
        daemon.inject("");
        daemon.crash();
        let session = daemon.session(&blocks::gqa()).await;
        blocks::restore_all(&session, &set).await;
        blocks::restore_all(&session, &before).await;
        save_well(&session, 5).await;
        state_becomes(&daemon, "healthy").await;
    });
}

#[test]
fn a_device_without_room_is_full_evicts_and_is_healthy_when_there_is_room_again() {
    on_both_lanes("a_device_without_room", async |options| {
        let (daemon, _) = cold(options.disk_mib(48, 1).host_mib(16), 100).await;
        let session = daemon.session(&blocks::gqa()).await;
        daemon.inject("create enospc");
        let mut newest = Vec::new();
        for seed in 0..6 {
            newest = blocks::loose(&session, 10 + seed, 60, PayloadKind::Kv);
            blocks::save_durable(&session, &newest).await;
        }
        state_becomes(&daemon, "full").await;
        blocks::restore_all(&session, &newest).await;
        let evicted = "kvtier_evicted_blocks_total{tier=\"disk\"}";
        assert!(daemon.metrics().get(evicted) > 100.0);
        daemon.inject("");
        for seed in 0..20 {
            let more = blocks::loose(&session, 100 + seed, 60, PayloadKind::Kv);
            blocks::save_durable(&session, &more).await;
        }
        state_becomes(&daemon, "healthy").await;
    });
}

#[test]
fn wrong_bits_and_lost_writes_are_counted_misses() {
    on_both_lanes("wrong_bits_and_lost_writes", async |options| {
        let (mut daemon, set) = cold(options, 60).await;
        let session = daemon.session(&blocks::gqa()).await;
        // What was wrong only on the way is read again, and no damage.
        daemon.inject("read flip times=1");
        let one = blocks::restore(&session, &set[..1]).await.unwrap();
        assert_eq!(one.misses, vec![]);
        assert_eq!(daemon.metrics().sum("kvtier_corrupt_total"), 0.0);
        daemon.inject("read flip times=30");
        let found = blocks::restore(&session, &set[1..]).await.unwrap();
        assert!(!found.misses.is_empty() && !found.hits.is_empty());
        let damage = |(_, miss): &(usize, Miss)| miss.is_damage();
        assert!(found.misses.iter().all(damage), "{:?}", found.misses);
        assert!(daemon.metrics().sum("kvtier_corrupt_total") > 0.0);
        // The device says that it has them, and never wrote them.
        daemon.inject("write lost");
        let lost = save_well(&session, 2).await;
        drop(session);
        daemon.inject("");
        daemon.crash();
        let session = daemon.session(&blocks::gqa()).await;
        let found = blocks::restore(&session, &lost).await.unwrap();
        assert_eq!(found.hits, vec![], "nobody has these bytes");
        save_well(&session, 3).await;
    });
}

#[test]
fn a_slow_device_is_waited_for_and_others_are_served() {
    on_both_lanes("a_slow_device", async |options| {
        let (daemon, set) = cold(options, 8).await;
        let session = daemon.session(&blocks::gqa()).await;
        daemon.inject("read delay_ms=400\nwrite delay_ms=200");
        let (found, saved) = tokio::join!(blocks::restore(&session, &set), async {
            let other = daemon.session(&blocks::gqa()).await;
            let set = blocks::loose(&other, 5, 4, PayloadKind::Kv);
            let accepted = blocks::save(&other, &set, Acknowledge::Accepted).await;
            accepted.unwrap();
            blocks::restore(&other, &set).await.unwrap()
        });
        assert_eq!(saved.hits.len(), 4, "host memory does not wait");
        assert_eq!(found.unwrap().hits.len(), 8);
    });
}

// Goal: a segment that does not open for once is absent for once.
#[test]
fn blocks_of_a_segment_that_did_not_open_are_back_when_it_does() {
    on_both_lanes("a_segment_that_did_not_open", async |options| {
        let (mut daemon, set) = cold(options.disk_mib(32, 1), 150).await;
        // The first one opened is the superblock.
        daemon.inject("open eio after=2 times=1");
        daemon.restart();
        let session = daemon.session(&blocks::gqa()).await;
        let found = blocks::restore(&session, &set).await.unwrap();
        assert!(!found.hits.is_empty() && !found.misses.is_empty());
        drop(session);
        daemon.inject("");
        daemon.restart();
        let session = daemon.session(&blocks::gqa()).await;
        blocks::restore_all(&session, &set).await;
    });
}

#[test]
fn a_device_that_fails_while_it_is_recovered_forgets_nothing() {
    on_both_lanes("a_device_that_fails_in_recovery", async |options| {
        let (mut daemon, set) = cold(options.disk_mib(32, 1), 150).await;
        for rules in [
            "read eio after=20",
            "read eio after=9 times=1",
            "read eio after=12 times=6",
            "sync eio",
            "write eio",
        ] {
            if daemon.is_alive() {
                daemon.kill9();
            }
            daemon.inject(rules);
            if let Err(why) = daemon.try_launch() {
                assert!(why.contains("it ended with"), "{rules}: {why}");
                assert!(why.contains("superblock"), "{rules}: {why}");
            } else {
                // What it could not read is absent in this life.
                daemon.inject("");
                let session = daemon.session(&blocks::gqa()).await;
                let found = blocks::restore(&session, &set).await;
                found.expect("a device that failed is no error");
                drop(session);
                assert!(daemon.stop().success(), "{rules}");
            }
            daemon.inject("");
            daemon.launch();
            let session = daemon.session(&blocks::gqa()).await;
            blocks::restore_all(&session, &set).await;
        }
    });
}
