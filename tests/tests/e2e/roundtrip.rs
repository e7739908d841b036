//! What is saved comes back: the same bytes, for every lane, level, kind and layout.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness.

use kvtier_client::{
    Acknowledge, CommitOutcome, ModelDescriptor, PayloadKind, RestoreOptions, SaveBlock, Session,
    Tier,
};
use kvtier_tests::harness::{Daemon, Options, blocks, run};

use super::LIMIT;

/// Tokens of a prompt whose last block is short.
const TOKENS: usize = 16 * 40 + 5;

/// Saves KV of a prompt with a short last block, hidden states and opaque bytes; restores them
/// from host memory, and after a clean restart from the device.
async fn round_trip(lane: &'static str, level: &'static str) {
    let mut daemon = Daemon::start(Options::default().lane(lane).level(level));
    let model = blocks::gqa();
    let session = daemon.session(&model).await;
    let kv = blocks::chain(&session, 1, TOKENS, PayloadKind::Kv);
    assert_eq!(kv.last().unwrap().tokens, 5, "the last block is short");
    let hidden = blocks::chain(&session, 2, TOKENS, PayloadKind::Hidden);
    let opaque = opaque(&session);
    for set in [&kv, &hidden, &opaque] {
        blocks::save_durable(&session, set).await;
        let found = blocks::restore_all(&session, set).await;
        assert_eq!(found.from(Tier::Host), set.len(), "still in host memory");
    }
    drop(session);
    daemon.restart();
    let session = daemon.session(&model).await;
    for set in [&kv, &hidden, &opaque] {
        let found = blocks::restore_all(&session, set).await;
        assert_eq!(found.from(Tier::Disk), set.len(), "host memory was empty");
    }
    let metrics = daemon.metrics();
    assert_eq!(metrics.sum("kvtier_corrupt_total"), 0.0);
    let about = daemon.log();
    let lane = if lane == "pread" { "pread" } else { "io_uring" };
    assert!(about.contains(lane), "the log names the lane");
}

/// Blocks of bytes that the descriptor says nothing of.
fn opaque(session: &Session) -> Vec<SaveBlock> {
    let sizes = [1, 4095, 4096, 70_001, 65_536, 300_000];
    let mut set = blocks::loose(session, 3, sizes.len(), PayloadKind::Opaque);
    for (block, bytes) in set.iter_mut().zip(sizes) {
        block.opaque_bytes = bytes;
    }
    set
}

#[test]
fn raw_blocks_come_back_after_a_restart_through_io_uring() {
    run(LIMIT, round_trip("io_uring", "raw"));
}

#[test]
fn raw_blocks_come_back_after_a_restart_through_pread() {
    run(LIMIT, round_trip("pread", "raw"));
}

#[test]
fn lossless_blocks_come_back_after_a_restart_through_io_uring() {
    run(LIMIT, round_trip("io_uring", "lossless"));
}

#[test]
fn zstd_blocks_come_back_after_a_restart_through_io_uring() {
    run(LIMIT, round_trip("io_uring", "zstd"));
}

#[test]
fn zstd_blocks_come_back_after_a_restart_through_pread() {
    run(LIMIT, round_trip("pread", "zstd"));
}

// Goal: a lane or level chosen today reads what another wrote yesterday.
#[test]
fn blocks_come_back_after_lane_and_level_changed() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default().lane("io_uring").level("zstd"));
        let session = daemon.session(&blocks::gqa()).await;
        let first = blocks::chain(&session, 1, TOKENS, PayloadKind::Kv);
        blocks::save_durable(&session, &first).await;
        drop(session);
        *daemon.options_mut() = daemon.options().clone().lane("pread").level("raw");
        daemon.restart();
        let session = daemon.session(&blocks::gqa()).await;
        let second = blocks::chain(&session, 2, TOKENS, PayloadKind::Kv);
        blocks::save_durable(&session, &second).await;
        drop(session);
        *daemon.options_mut() = daemon.options().clone().lane("io_uring").level("zstd");
        daemon.restart();
        let session = daemon.session(&blocks::gqa()).await;
        blocks::restore_all(&session, &first).await;
        blocks::restore_all(&session, &second).await;
    });
}

/// Every kind that a layout stores, through host memory and the device, at the default level.
async fn layout_round_trip(model: ModelDescriptor, kinds: &[PayloadKind]) {
    let mut daemon = Daemon::start(Options::default().level("lossless"));
    let mut sets = Vec::new();
    let session = daemon.session(&model).await;
    for (seed, kind) in (0u64..).zip(kinds) {
        let set = blocks::chain(&session, seed, TOKENS, *kind);
        blocks::save_durable(&session, &set).await;
        sets.push(set);
    }
    drop(session);
    daemon.restart();
    let session = daemon.session(&model).await;
    for set in &sets {
        let stored = session.explain(&set[0].key).await.unwrap().variants;
        assert!(
            stored.iter().all(|one| one.level_name == "lossless"),
            "{stored:?}"
        );
        let found = blocks::restore_all(&session, set).await;
        assert_eq!(found.from(Tier::Disk), set.len());
        let found = blocks::restore_all(&session, set).await;
        assert_eq!(found.from(Tier::Host), set.len(), "a second restore");
    }
}

#[test]
fn latent_attention_comes_back_whole_and_as_latents_alone() {
    let kinds = [PayloadKind::Kv, PayloadKind::Latent, PayloadKind::Hidden];
    run(LIMIT, layout_round_trip(blocks::mla(), &kinds));
}

#[test]
fn a_layout_with_every_kind_of_layer_comes_back() {
    let kinds = [
        PayloadKind::Kv,
        PayloadKind::Latent,
        PayloadKind::State,
        PayloadKind::Opaque,
        PayloadKind::Hidden,
    ];
    run(LIMIT, layout_round_trip(blocks::hybrid(), &kinds));
}

// Goal: KV and hidden states of one block have one key and are two variants; neither replaces
// the other, on any tier.
#[test]
fn two_kinds_of_one_key_are_kept_side_by_side() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default());
        let model = blocks::gqa();
        let session = daemon.session(&model).await;
        let kv = blocks::chain(&session, 1, TOKENS, PayloadKind::Kv);
        let hidden = blocks::chain(&session, 1, TOKENS, PayloadKind::Hidden);
        assert_eq!(blocks::keys(&kv), blocks::keys(&hidden));
        blocks::save_durable(&session, &kv).await;
        blocks::save_durable(&session, &hidden).await;
        blocks::restore_all(&session, &kv).await;
        blocks::restore_all(&session, &hidden).await;
        drop(session);
        for crash in [false, true] {
            if crash {
                daemon.crash();
            } else {
                daemon.restart();
            }
            let session = daemon.session(&model).await;
            blocks::restore_all(&session, &kv).await;
            blocks::restore_all(&session, &hidden).await;
        }
    });
}

// Museum row 11 (LMCache#562): an index that lives in memory only loses everything at a restart.
#[test]
fn museum_11_the_index_outlives_the_process() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default());
        let model = blocks::gqa();
        let session = daemon.session(&model).await;
        let set = blocks::chain(&session, 1, 16 * 500, PayloadKind::Kv);
        blocks::save_durable(&session, &set).await;
        drop(session);
        daemon.restart();
        let clean = daemon.metrics();
        assert_eq!(clean.get("kvtier_recovered_blocks"), 500.0);
        let rebuilt = clean.sum("kvtier_catalog_rebuilt_total");
        assert_eq!(rebuilt, 0.0, "a clean start needs no rebuild");
        let session = daemon.session(&model).await;
        let lookup = session.lookup(&blocks::keys(&set), PayloadKind::Kv).await;
        assert_eq!(lookup.unwrap().prefix_blocks, 500);
        blocks::restore_all(&session, &set).await;
        drop(session);
        daemon.crash();
        assert_eq!(daemon.metrics().get("kvtier_recovered_blocks"), 500.0);
    });
}

#[test]
fn saving_again_says_what_is_there_already() {
    run(LIMIT, async {
        let daemon = Daemon::start(Options::default());
        let session = daemon.session(&blocks::gqa()).await;
        let set = blocks::chain(&session, 1, TOKENS, PayloadKind::Kv);
        blocks::save_durable(&session, &set).await;
        let again = blocks::save(&session, &set, Acknowledge::Durable).await;
        for outcome in again.unwrap() {
            let already = kvtier_client::SaveOutcome::Already(Acknowledge::Durable);
            assert_eq!(outcome, already);
        }
    });
}

#[test]
fn inline_blocks_come_back_over_tcp() {
    run(LIMIT, async {
        let own = rustix::process::geteuid().as_raw();
        let options = Options::default()
            .namespace("default", &[own])
            .tcp("default");
        let mut daemon = Daemon::start(options.level("zstd"));
        // Half a MiB each: more than a message carries would not fit, more than a frame does.
        let model = blocks::wide();
        let session = daemon.tcp_session(&model).await;
        assert!(!session.is_shared(), "TCP passes no memory");
        let set = blocks::chain(&session, 1, 16 * 12 + 3, PayloadKind::Kv);
        let payloads = set.iter().map(|block| {
            let len = session
                .layout(block.kind, block.tokens)
                .unwrap()
                .payload_len();
            (*block, blocks::payload(&block.key, block.kind, len).into())
        });
        let outcomes = session.put_inline(payloads.collect(), Acknowledge::Durable);
        for outcome in outcomes.await.unwrap() {
            assert_eq!(outcome, CommitOutcome::Stored(Acknowledge::Durable));
        }
        blocks::restore_all(&session, &set).await;
        drop(session);
        daemon.restart();
        let session = daemon.tcp_session(&model).await;
        // The ordinary calls carry payload inline by themselves where no memory is shared.
        let other = blocks::chain(&session, 2, 16 * 4, PayloadKind::Kv);
        blocks::save_durable(&session, &other).await;
        let both: Vec<_> = set.iter().chain(&other).copied().collect();
        let found = blocks::restore_with(&session, &both[..set.len()], RestoreOptions::default());
        assert_eq!(found.await.unwrap().usable, set.len());
        blocks::restore_all(&session, &both).await;
    });
}
