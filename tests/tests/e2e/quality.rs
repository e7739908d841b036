//! Lossy levels: who asked for them gets them, and nobody else does; cold blocks become smaller.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness. Payloads are values between 0.007 and 2.

use std::sync::Arc;
use std::time::Duration;

use kvtier_client::{
    Acknowledge, BlockStatus, Level, Miss, ModelDescriptor, PayloadKind, Quality, RestoreOptions,
    SaveBlock, SaveOutcome, Session, Tier,
};
use kvtier_kernels::codec::ladder::Ladder;
use kvtier_kernels::fuzzing::profile::fixture;
use kvtier_kernels::profile::{Profile, scales};
use kvtier_tests::harness::{Daemon, Options, blocks, eventually, run};

use super::LIMIT;

fn accepting(quality: Quality) -> RestoreOptions {
    RestoreOptions::default().scattered().accept(quality)
}

/// Restores everything and returns the level and the largest error of each block that came.
async fn errors(session: &Session, set: &[SaveBlock], accept: Quality) -> Vec<(Level, f32)> {
    let keys = blocks::keys(set);
    let restore = session.restore(&keys, PayloadKind::Kv, accepting(accept));
    let restored = restore.await.unwrap().collect().await.unwrap();
    assert_eq!(restored.missed, vec![], "{accept:?}");
    let value =
        |word: &[u8]| f32::from_bits(u32::from(u16::from_le_bytes([word[0], word[1]])) << 16);
    let error = |block: &kvtier_client::LeasedBlock| {
        let bytes = block.payload().unwrap();
        let saved = blocks::payload(&set[block.index()].key, PayloadKind::Kv, bytes.len());
        let pairs = bytes.chunks(2).zip(saved.chunks(2));
        let errors = pairs.map(|(a, b)| (value(a) - value(b)).abs());
        (block.level(), errors.fold(0.0, f32::max))
    };
    restored.blocks.iter().map(error).collect()
}

async fn only_quality_misses(session: &Session, set: &[SaveBlock], accept: Quality) {
    let found = blocks::restore_with(session, set, accepting(accept))
        .await
        .unwrap();
    let all: Vec<_> = (0..set.len()).map(|at| (at, Miss::Quality)).collect();
    assert_eq!((found.hits, found.misses), (vec![], all), "{accept:?}");
}

#[test]
fn a_lossy_level_is_served_to_who_accepts_it_and_to_nobody_else() {
    run(LIMIT, async {
        let options = Options::default().level("int8").lowest_quality("any");
        let model = blocks::gqa();
        let (daemon, set) = Daemon::cold(options, &model, |session| {
            blocks::chain(session, 1, 16 * 20, PayloadKind::Kv)
        })
        .await;
        let session = daemon.session(&model).await;
        let keys = blocks::keys(&set);
        let exact = session.lookup(&keys, PayloadKind::Kv).await.unwrap();
        assert_eq!(exact.blocks, [BlockStatus::Missing(Miss::Quality)]);
        for accept in [Quality::Exact, Quality::Small] {
            only_quality_misses(&session, &set, accept).await;
        }
        let any = session.lookup_accepting(&keys, PayloadKind::Kv, Quality::Any);
        assert_eq!(any.await.unwrap().prefix_blocks, set.len());
        for (level, error) in errors(&session, &set, Quality::Any).await {
            assert_eq!(level, Level::INT8);
            assert!(error > 0.0 && error < 0.02, "{error}");
        }
        // Now they are in host memory, and no better.
        only_quality_misses(&session, &set, Quality::Exact).await;
        let explained = session.explain(&set[0].key).await.unwrap();
        assert_eq!(explained.miss, Some(Miss::Quality));
        assert!(
            explained
                .notes
                .iter()
                .any(|note| note.contains("accepts any"))
        );
        // The disk has them as a save would store them: there is nothing to save again.
        let again = blocks::save(&session, &set, Acknowledge::Durable)
            .await
            .unwrap();
        let already = |one: &SaveOutcome| one.is_stored(Acknowledge::Durable);
        assert!(again.iter().all(already));
        only_quality_misses(&session, &set, Quality::Exact).await;
    });
}

#[test]
fn a_namespace_that_did_not_ask_for_it_is_stored_exactly_whatever_the_disk_level_is() {
    run(LIMIT, async {
        let model = blocks::gqa();
        let (daemon, set) = Daemon::cold(Options::default().level("kivi2"), &model, |session| {
            blocks::chain(session, 1, 16 * 20, PayloadKind::Kv)
        })
        .await;
        let session = daemon.session(&model).await;
        let found = blocks::restore_all(&session, &set).await;
        assert_eq!(found.from(Tier::Disk), set.len());
    });
}

// Goal: what an engine computes on top of lossy KV is never anybody's exact hit, though its keys
// are those of an exact run and nobody told the session.
#[test]
fn what_is_computed_after_a_lossy_restore_is_no_exact_hit() {
    run(LIMIT, async {
        let options = Options::default().level("int8").lowest_quality("any");
        let model = blocks::gqa();
        let (mut daemon, prompt) = Daemon::cold(options, &model, |session| {
            blocks::chain(session, 1, 16 * 10, PayloadKind::Kv)
        })
        .await;
        daemon.stop();
        *daemon.options_mut() = daemon.options().clone().level("lossless");
        daemon.launch();
        let session = daemon.session(&model).await;
        errors(&session, &prompt, Quality::Any).await;
        // The next turn: the same prompt and three blocks more.
        let turn = blocks::chain(&session, 1, 16 * 13, PayloadKind::Kv);
        let (_, new) = turn.split_at(prompt.len());
        assert_eq!(session.quality_of(&new[0].parent), Quality::Any);
        blocks::save_durable(&session, new).await;
        assert_eq!(session.quality_of(&new[2].key), Quality::Any);
        for other in [&session, &daemon.session(&model).await] {
            only_quality_misses(other, new, Quality::Exact).await;
            only_quality_misses(other, new, Quality::Small).await;
            for (level, error) in errors(other, new, Quality::Any).await {
                assert!(error == 0.0 && level.quality() == Quality::Exact);
            }
        }
        drop(session);
        daemon.crash();
        let session = daemon.session(&model).await;
        only_quality_misses(&session, new, Quality::Exact).await;
        // A fresh session restores them, so that it knows what it computes behind them.
        errors(&session, new, Quality::Any).await;
        let scrape = |name: &str| daemon.metrics().get(name);
        let through = "kvtier_saved_through_blocks_total{quality=\"any\"}";
        let longer = blocks::chain(&session, 1, 16 * 14, PayloadKind::Kv);
        blocks::save_durable(&session, &longer[13..]).await;
        assert_eq!(scrape(through), 1.0);
        // Computed anew from the first token on, they are exact.
        session.set_quality(&blocks::keys(&longer), Quality::Exact);
        blocks::save_durable(&session, &longer).await;
        blocks::restore_all(&session, &longer).await;
        daemon.crash();
        let session = daemon.session(&model).await;
        blocks::restore_all(&session, &longer).await;
    });
}

#[test]
fn an_exact_save_takes_the_place_of_what_is_stored_worse() {
    run(LIMIT, async {
        let options = Options::default().level("int8").lowest_quality("any");
        let model = blocks::gqa();
        let (mut daemon, set) = Daemon::cold(options, &model, |session| {
            blocks::chain(session, 1, 16 * 20, PayloadKind::Kv)
        })
        .await;
        daemon.stop();
        *daemon.options_mut() = daemon.options().clone().level("lossless");
        daemon.launch();
        let session = daemon.session(&model).await;
        assert!(
            errors(&session, &set, Quality::Any)
                .await
                .iter()
                .all(|one| one.1 > 0.0)
        );
        only_quality_misses(&session, &set, Quality::Exact).await;
        // What was restored is thrown away, and all of it computed anew.
        session.set_quality(&blocks::keys(&set), Quality::Exact);
        blocks::save_durable(&session, &set).await;
        blocks::restore_all(&session, &set).await;
        drop(session);
        daemon.crash();
        let session = daemon.session(&model).await;
        blocks::restore_all(&session, &set).await;
    });
}

// Goal: re-encoding loses no block, however the daemon ends meanwhile.
#[test]
fn cold_blocks_are_re_encoded_through_crashes_and_none_is_lost() {
    run(LIMIT, async {
        let cold = "cold_level = \"int8\"\ncold_after_s = 1\ncold_rate = \"4 MiB\"";
        let options = Options::default()
            .level("lossless")
            .lowest_quality("any")
            .codec(cold);
        let options = options.disk_mib(64, 1);
        let model = blocks::gqa();
        let (mut daemon, set) = Daemon::cold(options, &model, |session| {
            blocks::chain(session, 1, 16 * 400, PayloadKind::Kv)
        })
        .await;
        for _ in 0..3 {
            // Its model is known, and nobody uses its blocks.
            let session = daemon.session(&model).await;
            eventually(Duration::from_secs(60), async || {
                let scrape = daemon.metrics();
                match scrape.get("kvtier_recoded_blocks_total{outcome=\"done\"}") {
                    done if done >= 5.0 => Ok(()),
                    done => Err(format!("{done} blocks were re-encoded")),
                }
            })
            .await;
            drop(session);
            daemon.crash();
        }
        let session = daemon.session(&model).await;
        let found = errors(&session, &set, Quality::Any).await;
        assert_eq!(found.len(), set.len());
        let lossy = found.iter().filter(|(level, _)| *level == Level::INT8);
        assert!(lossy.count() >= 15);
        for (level, error) in found {
            let most = if level == Level::INT8 { 0.02 } else { 0.0 };
            assert!(error <= most, "{level}: {error}");
        }
    });
}

/// Tables for the model, of every level; other ones for another number of exact tokens. And what
/// records call them.
fn tables(model: &ModelDescriptor, sinks: u32) -> (Vec<u8>, u32) {
    let mut profile = fixture(8, 2, 32).unwrap();
    profile.model.clone_from(&model.model);
    profile.revision.clone_from(&model.revision);
    profile
        .weights_fingerprint
        .clone_from(&model.weights_fingerprint);
    profile.sinks = sinks;
    // As wide as the harness's values are.
    for part in &mut profile.parts {
        let across = part.crosses.iter_mut().flat_map(|one| &mut one.levels);
        for level in part.plain.levels.iter_mut().chain(across).flatten() {
            level.step = 0.3;
            level.scales.fill(scales::nearest(8.0));
        }
    }
    let bytes = profile.to_bytes().unwrap();
    let levels = Ladder::all(Arc::new(Profile::from_bytes(&bytes).unwrap())).unwrap();
    (bytes, levels[0].tables())
}

/// Level and bytes of every block.
async fn payloads(session: &Session, set: &[SaveBlock], accept: Quality) -> Vec<(Level, Vec<u8>)> {
    let keys = blocks::keys(set);
    let restore = session.restore(&keys, PayloadKind::Kv, accepting(accept));
    let restored = restore.await.unwrap().collect().await.unwrap();
    assert_eq!(restored.missed, vec![], "{accept:?}");
    let mut found: Vec<_> = restored.blocks.iter().collect();
    found.sort_by_key(|block| block.index());
    let bytes = |block: &&kvtier_client::LeasedBlock| block.payload().unwrap().to_vec();
    found.iter().map(|one| (one.level(), bytes(one))).collect()
}

/// The block would miss for its tables, and these are named.
async fn is_explained(session: &Session, block: &SaveBlock, tables: u32) {
    let explained = session.explain(&block.key).await.unwrap();
    assert_eq!(explained.miss, Some(Miss::NoTables));
    let name = format!("tables {tables:08x}, which are not loaded");
    let notes = explained.notes;
    assert!(notes.iter().any(|note| note.contains(&name)), "{notes:?}");
}

// Goal: tables that are away cost misses that say so, before anybody has restored anything; once
// they are back, the same bytes come as before.
#[test]
fn tables_that_are_away_cost_misses_that_say_why_and_nothing_once_they_are_back() {
    run(LIMIT, async {
        let (model, accept) = (blocks::gqa(), Quality::Balanced);
        let dir = tempfile::tempdir().unwrap();
        let (own, name) = tables(&model, 4);
        let (other, other_name) = tables(&model, 3);
        assert_ne!(name, other_name);
        let file = |file: &str| dir.path().join(file);
        std::fs::write(file("own.kvtables"), own).unwrap();
        std::fs::write(file("other.kvtables"), other).unwrap();
        let options = |daemon: &Options, level, tables: &str| {
            let tables = format!("tables = [{:?}]", file(tables));
            daemon.clone().level(level).codec(&tables)
        };
        let first = Options::default().lowest_quality("balanced");
        let first = options(&first, "balanced_x", "own.kvtables");
        let (mut daemon, set) = Daemon::cold(first, &model, |session| {
            blocks::chain(session, 1, 16 * 20, PayloadKind::Kv)
        })
        .await;
        let keys = blocks::keys(&set);
        let session = daemon.session(&model).await;
        let before = payloads(&session, &set, accept).await;
        assert!(before.iter().all(|(level, _)| *level == Level::BALANCED_X));
        for (_, error) in errors(&session, &set, accept).await {
            assert!(error > 0.0 && error < 1.0, "{error}");
        }
        drop(session);

        daemon.stop();
        let without = daemon.options().clone().level("lossless").codec("");
        *daemon.options_mut() = without;
        daemon.launch();
        let session = daemon.session(&model).await;
        is_explained(&session, &set[0], name).await;
        let found = session.lookup_accepting(&keys, PayloadKind::Kv, accept);
        let missing = [BlockStatus::Missing(Miss::NoTables)];
        assert_eq!(found.await.unwrap().blocks, missing);
        let found = blocks::restore_with(&session, &set, accepting(accept)).await;
        let all: Vec<_> = (0..set.len()).map(|at| (at, Miss::NoTables)).collect();
        assert_eq!(found.unwrap().misses, all);
        let scrape = daemon.metrics();
        let missed = scrape.get("kvtier_miss_total{reason=\"no_tables\"}");
        assert_eq!(missed, 1.0 + set.len() as f64);
        for damage in ["undecodable", "wrong_layout", "payload_crc"] {
            let damaged = scrape.get(&format!("kvtier_corrupt_total{{reason=\"{damage}\"}}"));
            assert_eq!(damaged, 0.0, "{damage}");
        }
        drop(session);

        // Other tables of the level: a lookup hears of it from whoever has read the record.
        daemon.stop();
        let others = options(daemon.options(), "balanced_x", "other.kvtables");
        *daemon.options_mut() = others;
        daemon.launch();
        let session = daemon.session(&model).await;
        is_explained(&session, &set[0], name).await;
        let found = session.lookup_accepting(&keys[..1], PayloadKind::Kv, accept);
        assert_eq!(found.await.unwrap().blocks, missing);
        drop(session);

        daemon.stop();
        let back = options(daemon.options(), "balanced_x", "own.kvtables");
        *daemon.options_mut() = back;
        daemon.launch();
        let session = daemon.session(&model).await;
        let found = session.lookup_accepting(&keys, PayloadKind::Kv, accept);
        assert_eq!(found.await.unwrap().prefix_blocks, set.len());
        assert!(payloads(&session, &set, accept).await == before);
        let explained = session.explain(&set[0].key).await.unwrap();
        assert_eq!(explained.miss, Some(Miss::Quality));
    });
}
