//! kill -9 at any moment: what was acknowledged durable is there, and what comes back is right.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness.

use std::time::Duration;

use kvtier_client::{Acknowledge, PayloadKind};
use kvtier_tests::harness::journal::Journal;
use kvtier_tests::harness::{Daemon, Options, blocks, rounds, run};
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::LIMIT;

/// Blocks after which a campaign starts over, so that none is evicted.
const BLOCKS_MAX: usize = 3000;
/// Length of a block's record on the device. Unit: bytes.
const RECORD_BYTES: u64 = 36 << 10;
/// Capacity of the device. Unit: MiB.
const DISK_MIB: u64 = 384;

/// Saves until the daemon is gone; notes what it acknowledged.
async fn save_until_killed(daemon: &Daemon, mut journal: Journal, seed: u64) -> Journal {
    let Ok(session) = daemon.try_session(&blocks::gqa()).await else {
        return journal;
    };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    loop {
        let kind = *[PayloadKind::Kv, PayloadKind::Kv, PayloadKind::Hidden]
            .choose(&mut rng)
            .unwrap();
        let count = rng.random_range(1..24);
        let set = blocks::loose(&session, rng.random(), count, kind);
        let wait = *[
            Acknowledge::Durable,
            Acknowledge::Durable,
            Acknowledge::Accepted,
        ]
        .choose(&mut rng)
        .unwrap();
        if journal.save(&session, &set, wait).await.is_err() {
            return journal;
        }
        if rng.random_bool(0.2) && !journal.durable.is_empty() {
            // Reads in between, so that a kill meets them too.
            let known = journal.durable.choose(&mut rng).copied().unwrap();
            if blocks::restore(&session, &[known]).await.is_err() {
                return journal;
            }
        }
    }
}

// Goal: 0 wrong bytes and 0 lost durable blocks, whatever the moment, the lane and the level.
// Method: random saves, SIGKILL after a random time, another configuration, sometimes a second
// SIGKILL while it recovers, everything compared.
#[test]
fn killed_at_any_moment_it_keeps_every_durable_block() {
    let rounds = rounds("KVTIER_TEST_ROUNDS", 20);
    let seed = u64::from(std::process::id());
    println!("seed {seed}, {rounds} rounds");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let options = Options::default().host_mib(16).disk_mib(DISK_MIB, 4);
    let mut daemon = Daemon::start(options);
    let mut journal = Journal::default();
    let (mut kept, mut lucky, mut verified) = (0, 0, 0);
    for round in 0..rounds {
        let delay = Duration::from_millis(rng.random_range(2..300));
        let (lane, level) = (
            *["io_uring", "pread"].choose(&mut rng).unwrap(),
            *["raw", "zstd"].choose(&mut rng).unwrap(),
        );
        let writer_seed = rng.random();
        journal = run(LIMIT, async {
            let writing = save_until_killed(&daemon, journal, writer_seed);
            let killing = async {
                tokio::time::sleep(delay).await;
                daemon.signal(rustix::process::Signal::KILL);
            };
            let (journal, ()) = tokio::join!(writing, killing);
            journal
        });
        daemon.wait_exit(Duration::from_secs(20));
        *daemon.options_mut() = daemon.options().clone().lane(lane).level(level);
        if rng.random_bool(0.3) {
            // Recovery must survive its own crash.
            daemon.spawn();
            std::thread::sleep(Duration::from_millis(rng.random_range(0..50)));
            daemon.kill9();
        }
        daemon.launch();
        let saved = (journal.durable.len() + journal.perhaps.len()) as u64;
        assert!(
            saved * RECORD_BYTES < DISK_MIB << 20,
            "the campaign itself filled the device: {saved} blocks"
        );
        let survey = run(LIMIT, async {
            let session = daemon.session(&blocks::gqa()).await;
            let survey = journal.verify(&session).await;
            if journal.durable.len() + journal.perhaps.len() > BLOCKS_MAX {
                session.wipe().await.unwrap();
                verified += journal.durable.len();
                journal = Journal::default();
            }
            survey
        });
        kept = survey.kept;
        lucky = survey.lucky;
        assert_eq!(
            daemon.metrics().sum("kvtier_corrupt_total"),
            0.0,
            "round {round}"
        );
    }
    let total = verified + journal.durable.len();
    println!("{rounds} kills: {total} durable blocks, all kept ({kept} at the end), {lucky} more");
    assert!(
        total > rounds as usize,
        "the campaign saved next to nothing"
    );
}

// Museum row 3 (LMCache#4492): after a restart every answer was corrupt, without a line in the
// log. Segments are recycled several times over here, with crashes in between; every survivor is
// compared.
#[test]
fn museum_03_survivors_of_recycling_and_crashes_are_right() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default().host_mib(16).disk_mib(6, 1));
        let mut all = Vec::new();
        for life in 0..4u64 {
            let session = daemon.session(&blocks::gqa()).await;
            for seed in 0..3 {
                let set = blocks::loose(&session, life * 10 + seed, 100, PayloadKind::Kv);
                blocks::save_durable(&session, &set).await;
                all.extend(set);
            }
            drop(session);
            daemon.crash();
            let session = daemon.session(&blocks::gqa()).await;
            let found = blocks::restore(&session, &all).await.unwrap();
            let newest = all.len() - 1;
            assert!(
                found.hits.iter().any(|(at, _)| *at == newest),
                "life {life}: the newest block is there"
            );
            assert!(found.hits.len() < 200, "6 MiB hold no more");
            assert!(
                found.hits.len() > 60,
                "life {life}: {} came back",
                found.hits.len()
            );
            let damage = |(_, miss): &&(usize, kvtier_client::Miss)| miss.is_damage();
            assert_eq!(found.misses.iter().find(damage), None);
        }
        assert_eq!(daemon.metrics().sum("kvtier_corrupt_total"), 0.0);
    });
}
