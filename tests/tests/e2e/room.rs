//! Full tiers: evict and go on, newest first, never an error to the engine.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness.

use std::time::Duration;

use kvtier_client::{
    Acknowledge, BlockStatus, Bytes, CommitFailure, Miss, PayloadKind, SaveBlock, SaveOutcome,
    SaveRefusal, SessionOptions, Tier,
};
use kvtier_proto::v1;
use kvtier_tests::harness::{Daemon, Options, blocks, run};

use super::LIMIT;
use super::requests::opened;

/// Saves this many sets of 100 blocks (3.2 MiB each) and insists that each is durable.
async fn fill(
    session: &kvtier_client::Session,
    seeds: std::ops::Range<u64>,
) -> Vec<Vec<SaveBlock>> {
    let mut sets = Vec::new();
    for seed in seeds {
        let set = blocks::loose(session, seed, 100, PayloadKind::Kv);
        blocks::save_durable(session, &set).await;
        sets.push(set);
    }
    sets
}

// Goal: a quota on the disk is kept by forgetting the oldest; no save fails for it.
#[test]
fn a_full_disk_forgets_the_oldest_and_keeps_the_newest() {
    run(LIMIT, async {
        for lane in ["io_uring", "pread"] {
            let options = Options::default().disk_mib(12, 1).lane(lane);
            let mut daemon = Daemon::start(options);
            let session = daemon.session(&blocks::gqa()).await;
            let sets = fill(&session, 0..12).await;
            let metrics = daemon.metrics();
            let used = metrics.get("kvtier_tier_used_bytes{tier=\"disk\"}");
            assert!(
                used <= f64::from(12 << 20),
                "{lane}: {used} bytes used of 12 MiB"
            );
            let evicted = metrics.get("kvtier_evicted_blocks_total{tier=\"disk\"}");
            assert!(evicted > 0.0, "{lane}: nothing left for 38 MiB in 12");
            assert_eq!(metrics.sum("kvtier_disk_errors_total"), 0.0);
            drop(session);
            daemon.restart();
            let session = daemon.session(&blocks::gqa()).await;
            blocks::restore_all(&session, sets.last().unwrap()).await;
            let oldest = blocks::restore(&session, &sets[0]).await.unwrap();
            assert_eq!(oldest.hits, vec![], "{lane}: 38 MiB in 12");
            let ordinary = |(_, miss): &(usize, Miss)| !miss.is_damage();
            assert!(oldest.misses.iter().all(ordinary), "{:?}", oldest.misses);
            // It goes on working when it starts full.
            let more = fill(&session, 20..24).await;
            drop(session);
            daemon.crash();
            let session = daemon.session(&blocks::gqa()).await;
            blocks::restore_all(&session, more.last().unwrap()).await;
        }
    });
}

#[test]
fn full_host_memory_forgets_blocks_that_the_disk_still_gives() {
    run(LIMIT, async {
        let daemon = Daemon::start(Options::default().host_mib(16).disk_mib(128, 4));
        let session = daemon.session(&blocks::gqa()).await;
        let sets = fill(&session, 0..10).await;
        let used = daemon
            .metrics()
            .get("kvtier_tier_used_bytes{tier=\"host\"}");
        assert!(used <= f64::from(16 << 20), "{used} bytes in 16 MiB");
        let oldest = blocks::restore_all(&session, &sets[0]).await;
        assert_eq!(oldest.from(Tier::Disk), 100, "it had left host memory");
        let again = blocks::restore_all(&session, &sets[0]).await;
        assert_eq!(again.from(Tier::Host), 100, "a restore brings it back");
        for set in &sets {
            blocks::restore_all(&session, set).await;
        }
    });
}

// Goal: `Already(Durable)` is as good a promise as `Stored(Durable)`, also for a block that left
// the device while host memory kept it.
#[test]
fn a_block_that_left_the_disk_is_not_called_durable() {
    run(LIMIT, async {
        let options = Options::default().host_mib(128).disk_mib(8, 1);
        let mut daemon = Daemon::start(options);
        let session = daemon.session(&blocks::gqa()).await;
        let sets = fill(&session, 0..8).await;
        let first = &sets[0];
        let found = blocks::restore_all(&session, first).await;
        assert_eq!(found.from(Tier::Host), 100, "host memory holds all of it");
        let outcomes = blocks::save(&session, first, Acknowledge::Durable).await;
        let durable = |outcome: &SaveOutcome| outcome.is_stored(Acknowledge::Durable);
        let durable: Vec<bool> = outcomes.unwrap().iter().map(durable).collect();
        drop(session);
        daemon.crash();
        let session = daemon.session(&blocks::gqa()).await;
        let found = blocks::restore(&session, first).await.unwrap();
        for (at, miss) in found.misses {
            assert!(
                !durable[at],
                "block {at} was called durable and is gone: {miss:?}"
            );
        }
    });
}

// Goal: whoever waits for a block that Save called there already hears that it is durable, also
// when it has left host memory meanwhile.
#[test]
fn a_durable_block_that_left_host_memory_can_still_be_waited_for() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default());
        let session = daemon.session(&blocks::gqa()).await;
        let set = blocks::loose(&session, 1, 3, PayloadKind::Kv);
        blocks::save_durable(&session, &set).await;
        let never = blocks::loose(&session, 2, 1, PayloadKind::Kv);
        drop(session);
        daemon.restart();
        let mut raw = opened(&daemon).await;
        let keys = set.iter().chain(&never).map(|block| v1::FilledSlot {
            key: block.key.0.to_vec().into(),
            ..v1::FilledSlot::default()
        });
        let results = raw.commit(keys.collect(), v1::Acknowledge::Durable).await;
        use v1::commit_result::Result as Outcome;
        let durable = Outcome::Acknowledged(v1::Acknowledge::Durable.into());
        let stale = Outcome::Failed(v1::CommitFailure::StaleSlot.into());
        let results = results.unwrap().into_iter().map(|one| one.result.unwrap());
        let wanted = [durable, durable, durable, stale];
        assert_eq!(
            results.collect::<Vec<_>>(),
            wanted,
            "the last was never saved"
        );
    });
}

#[test]
fn a_pinned_block_outlives_everything_around_it_on_both_tiers() {
    run(LIMIT, async {
        let options = Options::default().host_mib(16).disk_mib(12, 1);
        let mut daemon = Daemon::start(options);
        let session = daemon.session(&blocks::gqa()).await;
        let kept = blocks::loose(&session, 900, 20, PayloadKind::Kv);
        let loose = blocks::loose(&session, 901, 20, PayloadKind::Kv);
        blocks::save_durable(&session, &kept).await;
        blocks::save_durable(&session, &loose).await;
        let keys = blocks::keys(&kept);
        let hour = Duration::from_secs(3600);
        assert_eq!(session.pin(&keys, PayloadKind::Kv, hour).await.unwrap(), 20);
        fill(&session, 0..12).await;
        let found = blocks::restore_all(&session, &kept).await;
        assert_eq!(found.from(Tier::Host), 20, "pinned in host memory");
        let gone = blocks::restore(&session, &loose).await.unwrap();
        assert_eq!(gone.hits, vec![], "what was not pinned made room");
        drop(session);
        daemon.restart();
        let session = daemon.session(&blocks::gqa()).await;
        let found = blocks::restore_all(&session, &kept).await;
        assert_eq!(found.from(Tier::Disk), 20, "pinned on the device");
        assert_eq!(session.unpin(&keys, PayloadKind::Kv).await.unwrap(), 20);
    });
}

#[test]
fn a_pin_longer_than_allowed_is_refused_by_name() {
    run(LIMIT, async {
        let daemon = Daemon::start(Options::default());
        let session = daemon.session(&blocks::gqa()).await;
        let set = blocks::loose(&session, 1, 1, PayloadKind::Kv);
        let month = Duration::from_secs(30 * 86_400);
        let refused = session
            .pin(&blocks::keys(&set), PayloadKind::Kv, month)
            .await;
        let text = refused.unwrap_err().to_string();
        assert!(text.contains("ttl_s is 2592000"), "{text}");
        assert!(text.contains("0 to 86400 seconds"), "{text}");
    });
}

#[test]
fn a_block_larger_than_a_segment_stays_in_host_memory() {
    run(LIMIT, async {
        let daemon = Daemon::start(Options::default().disk_mib(8, 1));
        let session = daemon.session(&blocks::gqa()).await;
        let mut set = blocks::loose(&session, 1, 1, PayloadKind::Opaque);
        set[0].opaque_bytes = 2 << 20;
        let outcomes = blocks::save(&session, &set, Acknowledge::Durable).await;
        let wanted = SaveOutcome::Failed(CommitFailure::NotDurable);
        assert_eq!(outcomes.unwrap(), vec![wanted]);
        let found = blocks::restore_all(&session, &set).await;
        assert_eq!(found.from(Tier::Host), 1);
        let explained = session.explain(&set[0].key).await.unwrap();
        let notes = explained.notes.join(" ");
        assert!(notes.contains("in host memory only"), "{notes}");
        // Ordinary blocks still become durable.
        let other = blocks::loose(&session, 2, 10, PayloadKind::Kv);
        blocks::save_durable(&session, &other).await;
    });
}

#[test]
fn a_block_larger_than_host_memory_is_refused_and_the_rest_is_saved() {
    run(LIMIT, async {
        let daemon = Daemon::start(Options::default().host_mib(16));
        let client = daemon.client().await;
        let options = SessionOptions::new("large").staging_bytes(Bytes::mib(32));
        let session = client.open_session(&blocks::gqa(), options).await.unwrap();
        let mut set = blocks::loose(&session, 1, 2, PayloadKind::Opaque);
        set[0].opaque_bytes = 17 << 20;
        set[1].opaque_bytes = 5000;
        let outcomes = blocks::save(&session, &set, Acknowledge::Durable).await;
        let wanted = vec![
            SaveOutcome::Refused(SaveRefusal::OverQuota),
            SaveOutcome::Stored(Acknowledge::Durable),
        ];
        assert_eq!(outcomes.unwrap(), wanted);
    });
}

#[test]
fn without_a_disk_nothing_is_called_durable_and_a_restart_forgets() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default().without_disk());
        let session = daemon.session(&blocks::gqa()).await;
        assert!(!session.is_durable());
        let set = blocks::loose(&session, 1, 10, PayloadKind::Kv);
        let outcomes = blocks::save(&session, &set, Acknowledge::Durable).await;
        let not = SaveOutcome::Failed(CommitFailure::NotDurable);
        assert_eq!(outcomes.unwrap(), vec![not; 10]);
        blocks::restore_all(&session, &set).await;
        daemon.restart();
        // The session heals by itself; its blocks are gone.
        session.reopen().await.unwrap();
        let lookup = session
            .lookup_each(&blocks::keys(&set), PayloadKind::Kv)
            .await;
        let absent = BlockStatus::Missing(Miss::Absent);
        assert_eq!(lookup.unwrap().blocks, vec![absent; 10]);
    });
}
