//! Two-ended restores of a real engine: token for token and bit for bit a cold run.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness; the reference engine with seeded weights, slowed down so that times
//!             are what the test chose.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use kvtier_tests::demo::engine_link::{EngineLink, Met, Way};
use kvtier_tests::engine::{Model, ModelConfig, PartSpec, Sequence, SequenceOptions, SlowEngine};
use kvtier_tests::harness::{Daemon, Options, run};
use tokio::runtime::Handle;

use super::LIMIT;

const BLOCK_TOKENS: usize = 32;
const BLOCKS: usize = 12;
/// Twelve blocks and a piece.
const PROMPT_TOKENS: usize = BLOCKS * BLOCK_TOKENS + 9;
/// A block is 256 KiB, which a device of 8 MiB a second brings in 31 ms.
const MIB_S: u64 = 8;
const BLOCK_LOAD: Duration = Duration::from_millis(31);

fn model() -> Arc<Model> {
    Arc::new(Model::random(ModelConfig::wide_heads(4), 3).unwrap())
}

/// An engine that takes so long for a block.
fn options(block: Option<Duration>) -> SequenceOptions {
    SequenceOptions {
        block_tokens: BLOCK_TOKENS,
        slow: block.map(|block| SlowEngine {
            step: block,
            ..SlowEngine::default()
        }),
        ..SequenceOptions::new(512)
    }
}

fn prompt() -> Vec<u32> {
    (0..512).cycle().step_by(37).take(PROMPT_TOKENS).collect()
}

/// Every bit of the cache, the scores, and 16 more tokens.
fn ending(mut sequence: Sequence) -> (Vec<u8>, Vec<u32>, Vec<u32>) {
    let mut cache = Vec::new();
    for (layer, attention) in sequence.model().config().layers.iter().enumerate() {
        for PartSpec { part, .. } in attention.parts() {
            let bytes = sequence.cache().bytes(layer, part, 0..PROMPT_TOKENS);
            cache.extend_from_slice(bytes.unwrap());
        }
    }
    let scores = sequence.logits().unwrap();
    let bits = scores.iter().map(|score| score.to_bits()).collect();
    (cache, bits, sequence.generate(16, None).unwrap())
}

/// A daemon that holds the first blocks of the prompt on a limited device only, and what a cold
/// run ends in.
struct Cold {
    daemon: Daemon,
    model: Arc<Model>,
    ending: (Vec<u8>, Vec<u32>, Vec<u32>),
}

impl Cold {
    async fn new(mib_s: u64) -> Self {
        let limited = Options::default().level("raw").read_limit_mib(mib_s);
        let mut daemon = Daemon::start(limited);
        let model = model();
        let link = EngineLink::open(&daemon.socket(), &model, &options(None)).await;
        let link = link.unwrap();
        let mut sequence = Sequence::new(Arc::clone(&model), options(None)).unwrap();
        sequence.prefill(&prompt()).unwrap();
        link.save_prefix(&sequence, &prompt()).await.unwrap();
        drop(link);
        daemon.restart();
        let ending = ending(sequence);
        Self {
            daemon,
            model,
            ending,
        }
    }

    async fn link(&self) -> EngineLink {
        let link = EngineLink::open(&self.daemon.socket(), &self.model, &options(None)).await;
        link.unwrap()
    }

    /// Restores into an empty cache and compares what it ends in with the cold run.
    fn read(&self, link: &EngineLink, block: Duration, way: Way) -> Met {
        let mut sequence = Sequence::new(Arc::clone(&self.model), options(Some(block))).unwrap();
        let runtime = Handle::current();
        let met =
            tokio::task::block_in_place(|| link.prefill(&runtime, &mut sequence, &prompt(), way));
        let met = met.unwrap();
        assert!(ending(sequence) == self.ending, "other bits: {met:?}");
        assert!(met.loaded.is_disjoint(&met.computed), "{met:?}");
        met
    }
}

/// Loading a block takes so many tenths of computing one.
async fn at_rate(tenths: u32) -> (Met, Duration) {
    let cold = Cold::new(MIB_S).await;
    let link = cold.link().await;
    let block = BLOCK_LOAD * 10 / tenths;
    (cold.read(&link, block, Way::TwoEnded), block)
}

#[test]
fn two_ended_engine_ends_as_a_cold_run_at_break_even_and_computes_about_half() {
    run(LIMIT, async {
        let (met, _) = at_rate(10).await;
        let (computed, loaded) = (met.computed.len(), met.loaded.len());
        assert!(computed >= 3 && loaded >= 3, "{met:?}");
    });
}

#[test]
fn two_ended_engine_ends_as_a_cold_run_far_above_break_even_and_loads_nearly_all() {
    run(LIMIT, async {
        let (met, _) = at_rate(1).await;
        assert!(met.computed.len() <= 3, "{met:?}");
    });
}

// Goal: an engine does not wait for blocks of a slow device that it could compute meanwhile.
#[test]
fn two_ended_engine_ends_as_a_cold_run_far_below_break_even_and_waits_for_no_slow_block() {
    run(LIMIT, async {
        let cold = Cold::new(1).await;
        let link = cold.link().await;
        // 250 ms to load a block and 25 to compute one: both that are claimed first would be
        // waited for longer than all of the prompt takes to compute.
        let block = Duration::from_millis(25);
        let met = cold.read(&link, block, Way::TwoEnded);
        assert!(met.loaded.len() <= 2, "{met:?}");
        let pure = block * 13;
        assert!(
            met.took < pure + block * 3,
            "{met:?}, computing takes {pure:?}"
        );
    });
}

#[test]
fn prefix_only_engine_ends_as_a_cold_run() {
    run(LIMIT, async {
        let cold = Cold::new(64).await;
        let link = cold.link().await;
        let met = cold.read(&link, Duration::from_millis(5), Way::PrefixOnly);
        assert!(met.loaded.len() >= BLOCKS, "{met:?}");
    });
}

// Goal: a damaged record in the middle costs its own block, which is computed.
#[test]
fn two_ended_engine_computes_a_damaged_block_and_ends_as_a_cold_run() {
    run(LIMIT, async {
        let cold = Cold::new(MIB_S).await;
        let link = cold.link().await;
        let keys = link.session().prefix_keys(&prompt(), b"");
        let (path, offset) = cold
            .daemon
            .place_of(link.session(), &keys[BLOCKS - 2])
            .await;
        let file = File::options().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset + 9000).unwrap();
        byte[0] ^= 0x10;
        file.write_all_at(&byte, offset + 9000).unwrap();
        file.sync_all().unwrap();
        let met = cold.read(&link, BLOCK_LOAD, Way::TwoEnded);
        assert!(met.computed.contains(&(BLOCKS - 2)), "{met:?}");
        assert!(met.loaded.contains(&(BLOCKS - 1)), "{met:?}");
    });
}

#[test]
fn two_ended_engine_whose_daemon_dies_computes_the_rest_and_ends_as_a_cold_run() {
    run(LIMIT, async {
        let mut cold = Cold::new(MIB_S).await;
        let link = cold.link().await;
        let pid = cold.daemon.pid();
        let killer = std::thread::spawn(move || {
            std::thread::sleep(BLOCK_LOAD * 3);
            let pid = i32::try_from(pid).unwrap();
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        });
        let met = cold.read(&link, BLOCK_LOAD, Way::TwoEnded);
        killer.join().unwrap();
        assert!(met.computed.len() > BLOCKS / 2, "{met:?}");
        cold.daemon.kill9();
    });
}
