//! Hidden states of a real engine through the daemon: token for token a cold run, and never KV.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness; the reference engine with seeded weights.

use std::ops::Range;
use std::sync::Arc;

use kvtier_client::{BlockKey, LeasedBlock, Miss, PayloadKind, RestoreOptions};
use kvtier_tests::demo::engine_link::{EngineLink, place};
use kvtier_tests::engine::{
    Cells, Driver, EngineError, Intake, Model, ModelConfig, PrefillCost, Sequence, SequenceOptions,
};
use kvtier_tests::harness::{Daemon, Options, run};

use super::LIMIT;

const BLOCK_TOKENS: usize = 32;
/// Five blocks and a piece.
const PROMPT_TOKENS: usize = 5 * BLOCK_TOKENS + 9;

fn model() -> Arc<Model> {
    Arc::new(Model::random(ModelConfig::wide_heads(3), 3).unwrap())
}

fn options(keep_hidden: bool) -> SequenceOptions {
    SequenceOptions {
        block_tokens: BLOCK_TOKENS,
        keep_hidden,
        ..SequenceOptions::new(256)
    }
}

fn prompt() -> Vec<u32> {
    (0..512).cycle().step_by(37).take(PROMPT_TOKENS).collect()
}

fn empty(model: &Arc<Model>) -> Sequence {
    Sequence::new(Arc::clone(model), options(true)).unwrap()
}

async fn open(daemon: &Daemon, model: &Model, keep_hidden: bool) -> EngineLink {
    let link = EngineLink::open(&daemon.socket(), model, &options(keep_hidden)).await;
    link.unwrap()
}

/// Scores after the prompt, bit by bit, and 16 more tokens.
fn ending(sequence: &mut Sequence) -> (Vec<u32>, Vec<u32>) {
    let scores = sequence.logits().unwrap();
    let bits = scores.iter().map(|score| score.to_bits()).collect();
    (bits, sequence.generate(16, None).unwrap())
}

/// A daemon that holds the hidden states of the prompt, and the cold run that left them behind.
struct Saved {
    daemon: Daemon,
    model: Arc<Model>,
    link: EngineLink,
    cold: Sequence,
}

impl Saved {
    async fn new() -> Self {
        let daemon = Daemon::start(Options::default().level("lossless"));
        let model = model();
        let link = open(&daemon, &model, true).await;
        let mut cold = empty(&model);
        let durable = link.prefill_saving_hidden(&mut cold, &prompt()).await;
        assert_eq!(durable.unwrap(), 6);
        Self {
            daemon,
            model,
            link,
            cold,
        }
    }
}

// Goal: what a prefill leaves as hidden states is enough to go on from, after a restart of the
// daemon, with the tokens of a cold run; and it takes a quarter of the bytes of KV.
#[test]
fn hidden_states_restore_to_the_tokens_of_a_cold_run_after_a_restart() {
    run(LIMIT, async {
        let mut saved = Saved::new().await;
        let (cold, prompt) = (ending(&mut saved.cold), prompt());
        drop(saved.link);
        saved.daemon.restart();
        let (daemon, model) = (saved.daemon, saved.model);

        let link = open(&daemon, &model, true).await;
        let mut warm = empty(&model);
        let tokens = link.restore_hidden(&mut warm, &prompt).await.unwrap();
        assert_eq!(tokens, PROMPT_TOKENS - 1);
        assert_eq!(warm.position(), tokens);
        warm.prefill(&prompt[tokens..]).unwrap();
        assert_eq!(ending(&mut warm), cold);

        let layout = |kind| link.session().layout(kind, 32).unwrap().payload_len();
        assert_eq!(layout(PayloadKind::Hidden) * 4, layout(PayloadKind::Kv));
    });
}

// Goal: a hidden block is never served as KV, nor KV as hidden states, though both have one key;
// and an engine that does not round the inputs of its layers sees neither.
#[test]
fn hidden_states_are_never_served_as_kv_nor_to_an_engine_of_other_bits() {
    run(LIMIT, async {
        let Saved {
            daemon,
            model,
            link,
            ..
        } = Saved::new().await;
        let prompt = prompt();
        let keys = link.session().prefix_keys(&prompt, b"");
        let missed = misses(&link, &keys, PayloadKind::Kv).await;
        assert_eq!(missed, vec![Miss::Absent; 6]);
        assert!(misses(&link, &keys, PayloadKind::Hidden).await.is_empty());
        let mut nothing = empty(&model);
        let restored = link.restore_prefix(&mut nothing, &prompt).await.unwrap();
        assert_eq!(restored.tokens, 0);

        // The other way round, with another prompt.
        let other: Vec<u32> = prompt.iter().map(|token| token ^ 1).collect();
        let mut cold = empty(&model);
        cold.prefill(&other).unwrap();
        assert_eq!(link.save_prefix(&cold, &other).await.unwrap().durable, 6);
        let keys = link.session().prefix_keys(&other, b"");
        let missed = misses(&link, &keys, PayloadKind::Hidden).await;
        assert_eq!(missed, vec![Miss::Absent; 6]);
        assert_eq!(
            link.restore_hidden(&mut empty(&model), &other)
                .await
                .unwrap(),
            0
        );

        let unrounded = open(&daemon, &model, false).await;
        let theirs = unrounded.session().prefix_keys(&other, b"");
        assert!(theirs.iter().all(|key| !keys.contains(key)));
        assert_eq!(misses(&unrounded, &theirs, PayloadKind::Kv).await.len(), 6);
    });
}

async fn misses(link: &EngineLink, keys: &[BlockKey], kind: PayloadKind) -> Vec<Miss> {
    let options = RestoreOptions::default().scattered();
    let restore = link.session().restore(keys, kind, options).await.unwrap();
    let missed = restore.collect().await.unwrap().missed;
    missed.into_iter().map(|(_, miss)| miss).collect()
}

/// Puts in blocks that have been leased, from the last one on, between the computations of the
/// first ones.
struct Leased {
    blocks: Vec<LeasedBlock>,
    compute: Range<usize>,
    layers: usize,
    costs: Vec<PrefillCost>,
}

impl Driver for Leased {
    fn next_compute(&mut self, intake: &mut Intake<'_>) -> Result<Option<Cells>, EngineError> {
        let next = self.compute.next();
        let some = if next.is_some() { 1 } else { self.blocks.len() };
        for block in self.blocks.drain(..some) {
            let start = block.index() * BLOCK_TOKENS;
            let payload = block
                .payload()
                .map_err(|error| EngineError::Driver(error.into()))?;
            place(intake, &block, payload, start, PROMPT_TOKENS - 1)?;
        }
        Ok(next.map(|block| Cells {
            block,
            layers: 0..self.layers,
        }))
    }

    fn computed(&mut self, _cells: &Cells, cost: PrefillCost) {
        self.costs.push(cost);
    }
}

// Goal: one restore may be all at once: some blocks computed, some loaded, some rebuilt.
#[test]
fn computed_loaded_and_rebuilt_blocks_of_one_prompt_end_in_the_tokens_of_a_cold_run() {
    run(LIMIT, async {
        let mut saved = Saved::new().await;
        let (link, prompt) = (&saved.link, prompt());
        link.save_prefix(&saved.cold, &prompt).await.unwrap();
        let cold = ending(&mut saved.cold);

        let keys = link.session().prefix_keys(&prompt, b"");
        let mut blocks = Vec::new();
        for kind in [PayloadKind::Kv, PayloadKind::Hidden] {
            let options = RestoreOptions::default();
            let restore = link.session().restore(&keys, kind, options).await.unwrap();
            let wanted = usize::from(kind == PayloadKind::Hidden);
            let of_kind = restore.collect().await.unwrap().blocks.into_iter();
            blocks
                .extend(of_kind.filter(|block| block.index() >= 2 && block.index() % 2 == wanted));
        }
        assert_eq!(blocks.len(), 4);
        blocks.sort_by_key(|block| std::cmp::Reverse(block.index()));
        let mut driver = Leased {
            blocks,
            compute: 0..2,
            layers: 3,
            costs: Vec::new(),
        };
        let mut mixed = empty(&saved.model);
        mixed
            .prefill_driven(&prompt, PROMPT_TOKENS - 1, &mut driver)
            .unwrap();
        assert_eq!(ending(&mut mixed), cold);
        let points: Vec<_> = driver
            .costs
            .iter()
            .map(|cost| (cost.before, cost.tokens))
            .collect();
        assert_eq!(points, [(0, 32), (32, 32)]);
    });
}
