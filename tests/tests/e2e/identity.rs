//! Yours and for this layout, or a miss: always in pairs, so that a cache that never hits fails.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness; a client of another user is a child process.

use std::time::Duration;

use kvtier_client::{
    BlockKey, Client, Endpoint, LayerSpec, Miss, ModelDescriptor, PartOrder, PayloadKind,
    SaveBlock, SessionOptions, Tier,
};
use kvtier_tests::harness::child::{self, Role};
use kvtier_tests::harness::{Daemon, Options, blocks, daemon, is_root, run, skip};

use super::LIMIT;

/// A user that nobody is.
const STRANGER: u32 = 61_123;
/// How long a child may take for one step.
const STEP: Duration = Duration::from_secs(60);

type Change = fn(&mut ModelDescriptor);

/// Descriptors that lay blocks out alike, or nearly, and mean other bytes.
fn changes() -> Vec<(&'static str, Change)> {
    vec![
        ("revision", |model| model.revision = "2".into()),
        ("weights", |model| model.weights_fingerprint = vec![8; 32]),
        ("order", |model| model.order = PartOrder::HeadMajor),
        ("rope", |model| {
            model.rope.as_mut().unwrap().theta = 500_000.0
        }),
        ("k_after_rope", |model| model.k_after_rope = false),
        ("shard", |model| {
            model.shard.tp_size = 2;
            model.shard.tp_rank = 1;
        }),
        ("heads", |model| {
            model.layers[0] = LayerSpec::Attention {
                kv_heads: 1,
                k_dim: 64,
                v_dim: 64,
                sliding_window: 0,
            }
        }),
    ]
}

// Museum row 7 (LMCache#4463, dynamo#14416): the engine changed its KV layout and the cache gave
// back garbage. Here a client that even asks for the old keys by name gets a miss.
#[test]
fn museum_07_another_layout_misses_and_the_same_layout_hits() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default());
        let session = daemon.session(&blocks::gqa()).await;
        let set = blocks::chain(&session, 1, 16 * 8, PayloadKind::Kv);
        blocks::save_durable(&session, &set).await;
        drop(session);
        for tier in ["host", "disk"] {
            for (what, change) in changes() {
                let mut model = blocks::gqa();
                change(&mut model);
                let other = daemon.session(&model).await;
                let derived = blocks::chain(&other, 1, 16 * 8, PayloadKind::Kv);
                assert_ne!(derived[0].key, set[0].key, "{what} is part of the key");
                let found = blocks::restore(&other, &derived).await.unwrap();
                assert_eq!(found.hits, vec![], "{what}, {tier}");
                let found = blocks::restore(&other, &set).await.unwrap();
                let wrong = |at| (at, Miss::WrongLayout);
                let all: Vec<_> = (0..set.len()).map(wrong).collect();
                assert_eq!(found.misses, all, "{what}, {tier}: the old keys by name");
            }
            // Asking under a wrong layout is no damage, and takes nothing from the right one.
            assert_eq!(daemon.metrics().sum("kvtier_corrupt_total"), 0.0, "{tier}");
            let same = daemon.session(&blocks::gqa()).await;
            blocks::restore_all(&same, &set).await;
            drop(same);
            daemon.restart();
        }
    });
}

// The same pair across a change that the fingerprint does not hold: the adapter is in every key.
#[test]
fn another_adapter_misses_and_the_same_adapter_hits() {
    run(LIMIT, async {
        let daemon = Daemon::start(Options::default());
        let with = |adapter: &str| {
            let mut model = blocks::gqa();
            model.adapter = adapter.into();
            model
        };
        let first = daemon.session(&with("lora-a")).await;
        let set = blocks::chain(&first, 1, 16 * 4, PayloadKind::Kv);
        blocks::save_durable(&first, &set).await;
        let second = daemon.session(&with("lora-b")).await;
        let derived = blocks::chain(&second, 1, 16 * 4, PayloadKind::Kv);
        let found = blocks::restore(&second, &derived).await.unwrap();
        assert_eq!(found.hits, vec![]);
        let again = daemon.session(&with("lora-a")).await;
        let derived = blocks::chain(&again, 1, 16 * 4, PayloadKind::Kv);
        blocks::restore_all(&again, &derived).await;
    });
}

// Museum row 9 (CVE-2025-25183): a hash that can be predicted, and is compared in part, gives
// another prompt's KV. Here whoever even names a key that is one bit off gets a miss, and its own
// bytes once it has saved some, from memory and from the device.
#[test]
fn museum_09_keys_that_differ_in_one_bit_are_two_blocks_in_every_tier() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default());
        let session = daemon.session(&blocks::gqa()).await;
        let one = blocks::loose(&session, 1, 1, PayloadKind::Kv)[0];
        let near = |byte: usize| {
            let mut near = one;
            near.key.0[byte] ^= 1;
            near
        };
        blocks::save_durable(&session, &[one]).await;
        for byte in [0, 15, 31] {
            let found = blocks::restore(&session, &[near(byte)]).await.unwrap();
            assert_eq!(found.misses, [(0, Miss::Absent)], "byte {byte}, host");
            blocks::save_durable(&session, &[near(byte)]).await;
            blocks::restore_all(&session, &[one, near(byte)]).await;
        }
        drop(session);
        daemon.restart();
        let session = daemon.session(&blocks::gqa()).await;
        let all = [one, near(0), near(15), near(31)];
        let found = blocks::restore_all(&session, &all).await;
        assert_eq!(found.from(Tier::Disk), 4);
        let found = blocks::restore(&session, &[near(7)]).await.unwrap();
        assert_eq!(found.misses, [(0, Miss::Absent)], "disk");
    });
}

/// Everything that one namespace can try to see of another's blocks.
async fn sees_nothing(session: &kvtier_client::Session, theirs: &[SaveBlock]) {
    let keys = blocks::keys(theirs);
    let lookup = session.lookup_each(&keys, PayloadKind::Kv).await.unwrap();
    assert!(lookup.blocks.iter().all(|status| !status.is_present()));
    let found = blocks::restore(session, theirs).await.unwrap();
    let absent: Vec<_> = (0..keys.len()).map(|at| (at, Miss::Absent)).collect();
    assert_eq!(found.misses, absent);
    let moved = session.prefetch(&keys, PayloadKind::Kv).await.unwrap();
    assert_eq!((moved.resident, moved.started), (0, 0));
    let pinned = session.pin(&keys, PayloadKind::Kv, Duration::from_secs(1));
    assert_eq!(pinned.await.unwrap(), 0);
    let explained = session.explain(&keys[0]).await.unwrap();
    assert_eq!(explained.variants, vec![]);
}

// TCP peers belong to a namespace of their own here; users of the Unix socket to another.
#[test]
fn another_namespace_misses_and_the_same_namespace_hits_over_tcp() {
    run(LIMIT, async {
        let options = Options::default().namespace("local", &[own_uid()]);
        let mut daemon = Daemon::start(options.namespace("remote", &[]).tcp("remote"));
        let model = blocks::gqa();
        let local = daemon.session(&model).await;
        let remote = daemon.tcp_session(&model).await;
        assert_eq!((local.namespace(), remote.namespace()), ("local", "remote"));
        let set = blocks::chain(&local, 1, 16 * 6, PayloadKind::Kv);
        let other = blocks::chain(&remote, 1, 16 * 6, PayloadKind::Kv);
        assert_ne!(set[0].key, other[0].key, "one prompt, unrelated keys");
        blocks::save_durable(&local, &set).await;
        blocks::save_durable(&remote, &other).await;
        for restarted in [false, true] {
            let local = daemon.session(&model).await;
            let remote = daemon.tcp_session(&model).await;
            sees_nothing(&remote, &set).await;
            sees_nothing(&local, &other).await;
            blocks::restore_all(&local, &set).await;
            blocks::restore_all(&remote, &other).await;
            if !restarted {
                daemon.restart();
            }
        }
        // A wipe of one leaves the other alone.
        let remote = daemon.tcp_session(&model).await;
        remote.wipe().await.unwrap();
        blocks::restore_all(&daemon.session(&model).await, &set).await;
    });
}

#[test]
fn another_user_misses_and_the_same_user_hits() {
    if !is_root() {
        return skip("another_user_misses_and_the_same_user_hits", "not root");
    }
    run(LIMIT, async {
        let options = Options::default().namespace("root", &[0]);
        let daemon = Daemon::start(options.namespace("stranger", &[STRANGER]));
        let session = daemon.session(&blocks::gqa()).await;
        let set = blocks::chain(&session, 1, 16 * 6, PayloadKind::Kv);
        blocks::save_durable(&session, &set).await;
        let hex: Vec<_> = set.iter().map(|block| block.key.to_hex()).collect();
        let told = format!("{} {}", daemon.socket().display(), hex.join(" "));
        let role = Role::new("identity::child_stranger", told).user(STRANGER);
        let mut stranger = role.spawn(daemon.home());
        assert_eq!(stranger.hear(STEP), "sees nothing");
        blocks::restore_all(&session, &set).await;
        let theirs = BlockKey::from_hex(&stranger.hear(STEP)).unwrap();
        let theirs = SaveBlock {
            key: theirs,
            ..set[0]
        };
        sees_nothing(&session, &[theirs]).await;
        stranger.finish(STEP);
    });
}

#[test]
#[ignore = "a role that another test starts"]
fn child_stranger() {
    let Some(told) = child::role() else { return };
    run(LIMIT, async {
        let mut words = told.split(' ');
        let endpoint = Endpoint::unix(words.next().unwrap());
        let client = Client::connect(endpoint, daemon::connect_options()).await;
        let options = SessionOptions::new("stranger");
        let session = client.unwrap().open_session(&blocks::gqa(), options).await;
        let session = session.unwrap();
        assert_eq!(session.namespace(), "stranger");
        let mut theirs = blocks::loose(&session, 9, words.clone().count(), PayloadKind::Kv);
        for (block, key) in theirs.iter_mut().zip(words) {
            block.key = BlockKey::from_hex(key).unwrap();
        }
        sees_nothing(&session, &theirs).await;
        child::say("sees nothing");
        let own = blocks::chain(&session, 1, 16, PayloadKind::Kv);
        blocks::save_durable(&session, &own).await;
        blocks::restore_all(&session, &own).await;
        child::say(&own[0].key.to_hex());
    });
}

#[test]
fn a_user_of_no_namespace_is_refused_by_name() {
    run(LIMIT, async {
        let daemon = Daemon::start(Options::default().namespace("others", &[STRANGER]));
        let refused = daemon.try_session(&blocks::gqa()).await.unwrap_err();
        let text = refused.to_string();
        let wanted = format!("user {} belongs to no namespace", own_uid());
        assert!(text.contains(&wanted), "{text}");
        let refusals = "kvtier_sessions_total{outcome=\"refused_peer\"}";
        assert_eq!(daemon.metrics().get(refusals), 1.0);
    });
}

fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}
