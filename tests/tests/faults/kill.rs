//! kill -9 at any moment: what was acknowledged durable is there, and what comes back is right.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness; `kvtier-bench crash` runs the same campaign for longer.

use kvtier_client::PayloadKind;
use kvtier_tests::harness::{Daemon, Options, blocks, kill, rounds, run, tell};

use super::LIMIT;

// Goal: 0 wrong bytes and 0 lost durable blocks, whatever the moment, the lane and the level.
// Method: random saves, SIGKILL after a random time, another configuration, every third time a
// second SIGKILL while it recovers, sometimes no catalog, everything compared.
#[test]
fn killed_at_any_moment_it_keeps_every_durable_block() {
    let rounds = rounds("KVTIER_TEST_ROUNDS", 20);
    let seed = u64::from(std::process::id());
    tell(&format!("seed {seed}, {rounds} kills"));
    let dir = std::env::temp_dir();
    let tally = kill::campaign(rounds, seed, &dir, &mut |line| println!("{line}"));
    tell(&format!("kills: {tally:?}"));
    assert!(tally.holds(), "seed {seed}: {tally:?}");
    assert!(
        tally.durable > u64::from(rounds),
        "the campaign saved next to nothing: {tally:?}"
    );
    assert!(
        tally.killed_recovering > 0,
        "no kill met a recovery: {tally:?}"
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
