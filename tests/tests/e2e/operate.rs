//! Seeing and steering: wipe, prefetch, explain, events, drain, status, signals.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness, and the `kvtier` command.

use std::collections::HashSet;
use std::process::Command;
use std::time::Duration;

use kvtier_client::{
    Acknowledge, BlockChange, Error, Miss, PayloadKind, SaveOutcome, SaveRefusal, SessionState,
    Tier,
};
use kvtier_tests::harness::{Daemon, Options, binary, blocks, eventually, run};
use rustix::process::Signal;

use super::LIMIT;

/// Runs `kvtier` against a daemon and reads its JSON.
fn kvtier(daemon: &Daemon, args: &[&str]) -> (Option<i32>, serde_json::Value) {
    let output = Command::new(binary::kvtier())
        .args(args)
        .arg("--json")
        .arg("--socket")
        .arg(daemon.socket())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let json = serde_json::from_str(&text);
    let error = String::from_utf8_lossy(&output.stderr);
    let json = json.unwrap_or_else(|problem| panic!("{problem} in {text:?}; {error}"));
    (output.status.code(), json)
}

// Goal: what was wiped never comes back, after no kind of restart.
#[test]
fn a_wiped_namespace_stays_empty_after_every_restart() {
    run(LIMIT, async {
        for crash in [false, true] {
            let mut daemon = Daemon::start(Options::default());
            let session = daemon.session(&blocks::gqa()).await;
            let gone = blocks::chain(&session, 1, 16 * 60, PayloadKind::Kv);
            blocks::save_durable(&session, &gone).await;
            assert_eq!(session.wipe().await.unwrap(), 60);
            let found = blocks::restore(&session, &gone).await.unwrap();
            assert_eq!(found.hits, vec![], "at once");
            let kept = blocks::chain(&session, 2, 16 * 20, PayloadKind::Kv);
            blocks::save_durable(&session, &kept).await;
            drop(session);
            for _ in 0..2 {
                if crash {
                    daemon.crash();
                } else {
                    daemon.restart();
                }
                // The catalog gone as well: the segments alone must not bring it back.
                let session = daemon.session(&blocks::gqa()).await;
                let found = blocks::restore(&session, &gone).await.unwrap();
                assert_eq!(found.hits, vec![], "crash: {crash}");
                blocks::restore_all(&session, &kept).await;
                drop(session);
                daemon.kill9();
                // A daemon that was killed may have left none.
                if let Err(problem) = std::fs::remove_dir_all(daemon.catalog_dir()) {
                    assert_eq!(problem.kind(), std::io::ErrorKind::NotFound, "{problem}");
                }
                daemon.launch();
            }
            // A block of the life before may be saved again.
            let session = daemon.session(&blocks::gqa()).await;
            blocks::save_durable(&session, &gone[..5]).await;
            daemon.crash();
            session.reopen().await.unwrap();
            blocks::restore_all(&session, &gone[..5]).await;
        }
    });
}

// Blocks whose write is still on its way when the wipe comes belong to what is wiped.
#[test]
fn a_wipe_takes_blocks_that_are_still_being_written() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default().level("zstd"));
        let session = daemon.session(&blocks::wide()).await;
        let mut all = Vec::new();
        for seed in 0..6 {
            let set = blocks::loose(&session, seed, 8, PayloadKind::Kv);
            let outcomes = blocks::save(&session, &set, Acknowledge::Accepted).await;
            outcomes.unwrap();
            session.wipe().await.unwrap();
            all.extend(set);
        }
        let found = blocks::restore(&session, &all).await.unwrap();
        assert_eq!(found.hits, vec![], "in memory");
        drop(session);
        daemon.restart();
        let session = daemon.session(&blocks::wide()).await;
        let found = blocks::restore(&session, &all).await.unwrap();
        assert_eq!(found.hits, vec![], "after a restart");
    });
}

#[test]
fn a_prefetch_moves_blocks_to_host_memory() {
    run(LIMIT, async {
        let model = blocks::gqa();
        let (daemon, set) = Daemon::cold(Options::default(), &model, |session| {
            blocks::chain(session, 1, 16 * 50, PayloadKind::Kv)
        })
        .await;
        let session = daemon.session(&model).await;
        let keys = blocks::keys(&set);
        let moved = session.prefetch(&keys, PayloadKind::Kv).await.unwrap();
        assert_eq!((moved.resident, moved.started), (0, 50));
        eventually(Duration::from_secs(20), async || {
            let moved = session.prefetch(&keys, PayloadKind::Kv).await.unwrap();
            match moved.resident {
                50 => Ok(()),
                resident => Err(format!("{resident} of 50 blocks are resident")),
            }
        })
        .await;
        let found = blocks::restore_all(&session, &set).await;
        assert_eq!(found.from(Tier::Host), 50);
    });
}

#[test]
fn explain_says_where_a_block_is_and_why_another_is_not() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default().level("zstd"));
        let session = daemon.session(&blocks::gqa()).await;
        let set = blocks::chain(&session, 1, 16 * 3, PayloadKind::Kv);
        blocks::save_durable(&session, &set).await;
        let both = session.explain(&set[1].key).await.unwrap();
        assert_eq!(both.miss, None);
        let tiers: Vec<_> = both.variants.iter().map(|variant| variant.tier).collect();
        assert_eq!(tiers, vec![Tier::Host, Tier::Disk]);
        assert_eq!(both.variants[0].tokens, 16);
        assert_eq!(both.variants[0].parent, set[0].key);
        assert_eq!(both.variants[0].raw_bytes, 32 << 10);
        assert_eq!(both.variants[1].level_name, "zstd");
        assert!(
            both.variants[1].stored_bytes < 32 << 10,
            "random bits compress by half"
        );
        assert!(both.variants[1].place.starts_with("segment "));
        drop(session);
        daemon.restart();
        let session = daemon.session(&blocks::gqa()).await;
        let disk = session.explain(&set[1].key).await.unwrap();
        assert_eq!(disk.variants.len(), 1);
        let nowhere = blocks::loose(&session, 9, 1, PayloadKind::Kv)[0].key;
        let absent = session.explain(&nowhere).await.unwrap();
        assert_eq!(absent.miss, Some(Miss::Absent));
        assert!(
            absent.notes[0].contains("never saved"),
            "{:?}",
            absent.notes
        );
        let (code, json) = kvtier(&daemon, &["explain", &set[1].key.to_hex()]);
        assert_eq!(code, Some(0), "{json}");
        assert!(json.to_string().contains("zstd"), "{json}");
    });
}

#[test]
fn watchers_hear_of_every_block_that_comes_and_goes() {
    run(LIMIT, async {
        let daemon = Daemon::start(Options::default());
        let session = daemon.session(&blocks::gqa()).await;
        let mut events = session.watch_events().await.unwrap();
        let set = blocks::chain(&session, 1, 16 * 20, PayloadKind::Kv);
        blocks::save_durable(&session, &set).await;
        session.wipe().await.unwrap();
        let (mut host, mut disk, mut gone) = (HashSet::new(), HashSet::new(), HashSet::new());
        while gone.len() < 20 || disk.len() < 20 {
            let event = tokio::time::timeout(Duration::from_secs(20), events.next()).await;
            let event = event.unwrap_or_else(|_| {
                panic!(
                    "heard of {} in, {} durable, {} out",
                    host.len(),
                    disk.len(),
                    gone.len()
                )
            });
            let event = event.unwrap().expect("the stream goes on");
            match event.change {
                BlockChange::Stored(Tier::Host) => drop(host.insert(event.key)),
                BlockChange::Stored(Tier::Disk) => drop(disk.insert(event.key)),
                BlockChange::Removed(Tier::Host) => drop(gone.insert(event.key)),
                other => panic!("{other:?}"),
            }
        }
        let all: HashSet<_> = blocks::keys(&set).into_iter().collect();
        assert_eq!((&host, &disk, &gone), (&all, &all, &all));
    });
}

#[test]
fn status_shows_tiers_namespaces_sessions_and_counters_as_json() {
    run(LIMIT, async {
        let daemon = Daemon::start(Options::default());
        let session = daemon.session(&blocks::gqa()).await;
        let set = blocks::chain(&session, 1, 16 * 25, PayloadKind::Kv);
        blocks::save_durable(&session, &set).await;
        blocks::restore_all(&session, &set).await;
        let (code, json) = kvtier(&daemon, &["status"]);
        assert_eq!(code, Some(0));
        assert_eq!(json["state"], "serving", "{json}");
        let tiers = json["tiers"].as_array().unwrap();
        assert_eq!(tiers.len(), 2);
        assert_eq!(tiers[0]["blocks"], 25, "{json}");
        assert_eq!(tiers[1]["blocks"], 25, "{json}");
        assert_eq!(tiers[1]["state"], "healthy", "{json}");
        let namespaces = json["namespaces"].as_array().unwrap();
        assert_eq!(namespaces[0]["name"], "default", "{json}");
        let sessions = json["sessions"].as_array().unwrap();
        assert_eq!(sessions.len(), 1);
        assert_eq!(sessions[0]["client"], "kvtier-tests", "{json}");
        assert_eq!(sessions[0]["pid"], std::process::id(), "{json}");
        let secret = session.prefix_keys(&[1], b"")[0].to_hex();
        assert!(!json.to_string().contains(&secret), "no keys in status");
        assert_eq!(daemon.http("/healthz").0, 200);
        assert_eq!(daemon.http("/nothing").0, 404);
    });
}

#[test]
fn a_drain_refuses_new_work_keeps_restores_and_makes_all_durable() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default());
        let session = daemon.session(&blocks::gqa()).await;
        let set = blocks::chain(&session, 1, 16 * 40, PayloadKind::Kv);
        let outcomes = blocks::save(&session, &set, Acknowledge::Accepted).await;
        assert!(
            outcomes
                .unwrap()
                .iter()
                .all(|one| one.is_stored(Acknowledge::Accepted))
        );
        let (code, json) = kvtier(&daemon, &["drain"]);
        assert_eq!(code, Some(0), "{json}");
        let told = session.until_not_open().await;
        assert!(matches!(told, SessionState::Draining { .. }), "{told:?}");
        let more = blocks::chain(&session, 2, 16 * 2, PayloadKind::Kv);
        let refused = blocks::save(&session, &more, Acknowledge::Accepted).await;
        let draining = SaveOutcome::Refused(SaveRefusal::Draining);
        assert_eq!(refused.unwrap(), vec![draining; 2]);
        let stranger = daemon.try_session(&blocks::gqa()).await.unwrap_err();
        assert!(matches!(stranger, Error::Unavailable { .. }), "{stranger}");
        assert_ne!(daemon.http("/readyz").0, 200, "not ready while it drains");
        blocks::restore_all(&session, &set).await;
        daemon.crash();
        session.reopen().await.unwrap();
        blocks::restore_all(&session, &set).await;
    });
}

// Goal: blocks that are only accepted when SIGTERM comes are durable when the process ends.
#[test]
fn sigterm_drains_pending_writes_and_ends_in_order() {
    run(LIMIT, async {
        for level in ["raw", "lossless", "zstd"] {
            let mut daemon = Daemon::start(Options::default().level(level).host_mib(64));
            let session = daemon.session(&blocks::wide()).await;
            let set = blocks::loose(&session, 1, 60, PayloadKind::Kv);
            let outcomes = blocks::save(&session, &set, Acknowledge::Accepted).await;
            let stored = |one: &SaveOutcome| one.is_stored(Acknowledge::Accepted);
            assert!(outcomes.unwrap().iter().all(stored));
            daemon.signal(Signal::TERM);
            let told = tokio::time::timeout(Duration::from_secs(10), session.until_not_open());
            let told = told.await.expect("the session hears of it");
            assert!(!matches!(told, SessionState::Open), "{told:?}");
            let status = daemon.wait_exit(Duration::from_secs(30));
            assert!(status.success(), "{status}");
            assert!(!daemon.socket().exists(), "the socket is cleaned away");
            daemon.launch();
            assert_eq!(daemon.metrics().sum("kvtier_catalog_rebuilt_total"), 0.0);
            session.reopen().await.unwrap();
            blocks::restore_all(&session, &set).await;
        }
    });
}

#[test]
fn a_second_daemon_in_the_same_folders_is_refused_by_name() {
    run(LIMIT, async {
        let daemon = Daemon::start(Options::default());
        let disk = daemon.disk_dir();
        let home = tempfile::tempdir().unwrap();
        let toml = Options::default().disk_dir(&disk).to_toml(home.path());
        let file = home.path().join("kvtierd.toml");
        std::fs::write(&file, toml).unwrap();
        let output = Command::new(binary::kvtierd())
            .arg("--config")
            .arg(&file)
            .output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("in use by another daemon"), "{text}");
        // The first one is none the worse for it.
        let session = daemon.session(&blocks::gqa()).await;
        let set = blocks::chain(&session, 1, 16 * 4, PayloadKind::Kv);
        blocks::save_durable(&session, &set).await;
    });
}

#[test]
fn only_operators_may_see_status_wipe_others_and_drain() {
    run(LIMIT, async {
        let daemon = Daemon::start(Options::default().operators(&[61_124]));
        for args in [&["status"][..], &["drain"], &["wipe", "default", "--yes"]] {
            let output = Command::new(binary::kvtier())
                .args(args)
                .arg("--socket")
                .arg(daemon.socket())
                .output()
                .unwrap();
            assert_ne!(output.status.code(), Some(0), "{args:?}");
        }
        let session = daemon.session(&blocks::gqa()).await;
        let set = blocks::chain(&session, 1, 16 * 4, PayloadKind::Kv);
        blocks::save_durable(&session, &set).await;
    });
}
