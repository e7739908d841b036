//! Random sequences against a model of a few lines: what it says is what the daemon does.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness; proptest finds and shrinks sequences.
//!
//! The daemon has room for everything, so a block that the model has must be a hit, and one that
//! it has not must be a miss: a cache that always misses fails here. `KVTIER_TEST_MODEL_CASES`
//! raises the number of sequences.

use std::collections::HashMap;
use std::time::Duration;

use kvtier_client::{Acknowledge, BlockKey, PayloadKind, SaveBlock, Session};
use kvtier_tests::harness::{Daemon, Options, blocks, rounds, run};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// Different blocks a sequence can name.
const NAMES: usize = 40;

/// Kinds of blocks that a sequence names.
const KINDS: [PayloadKind; 2] = [PayloadKind::Kv, PayloadKind::Hidden];

#[derive(Debug, Clone)]
enum Step {
    /// Blocks from..from+count of a kind, with an acknowledgement.
    Save(usize, usize, PayloadKind, Acknowledge),
    Restore(usize, usize, PayloadKind),
    Lookup(usize, usize, PayloadKind),
    Wipe,
    Restart,
    Crash,
    /// Another session of the same model takes over.
    Reconnect,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let kind = prop::sample::select(&KINDS[..]);
    let wait = prop_oneof![Just(Acknowledge::Durable), Just(Acknowledge::Accepted)];
    let from = 0..NAMES;
    let step = prop_oneof![
        6 => (from.clone(), 1..12usize, kind.clone(), wait)
            .prop_map(|(from, count, kind, wait)| Step::Save(from, count, kind, wait)),
        5 => (from.clone(), 1..20usize, kind.clone())
            .prop_map(|(from, count, kind)| Step::Restore(from, count, kind)),
        3 => (from, 1..20usize, kind)
            .prop_map(|(from, count, kind)| Step::Lookup(from, count, kind)),
        1 => Just(Step::Wipe),
        2 => Just(Step::Restart),
        2 => Just(Step::Crash),
        1 => Just(Step::Reconnect),
    ];
    prop::collection::vec(step, 8..24)
}

/// What is known of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    There,
    /// Accepted before a crash: there or not.
    Perhaps,
}

type Model = HashMap<(PayloadKind, BlockKey), (Known, Acknowledge)>;

struct World {
    daemon: Daemon,
    session: Session,
    names: Vec<SaveBlock>,
    model: Model,
}

impl World {
    async fn new(level: &'static str) -> Self {
        let daemon = Daemon::start(Options::default().level(level));
        let session = daemon.session(&blocks::gqa()).await;
        let mut names = blocks::loose(&session, 5, NAMES, PayloadKind::Kv);
        for (block, tokens) in names.iter_mut().zip([16, 16, 1, 7].into_iter().cycle()) {
            block.tokens = tokens;
        }
        let model = Model::new();
        Self {
            daemon,
            session,
            names,
            model,
        }
    }

    fn named(&self, from: usize, count: usize, kind: PayloadKind) -> Vec<SaveBlock> {
        let some = self.names.iter().skip(from).take(count);
        some.map(|block| SaveBlock { kind, ..*block }).collect()
    }

    async fn step(&mut self, step: &Step) {
        match *step {
            Step::Save(from, count, kind, wait) => {
                let set = self.named(from, count, kind);
                let outcomes = blocks::save(&self.session, &set, wait).await.unwrap();
                for (block, outcome) in set.iter().zip(outcomes) {
                    assert!(outcome.is_stored(Acknowledge::Accepted), "{outcome:?}");
                    let durable = outcome.is_stored(Acknowledge::Durable);
                    let now = if durable {
                        Acknowledge::Durable
                    } else {
                        Acknowledge::Accepted
                    };
                    let entry = (Known::There, now);
                    let known = self.model.entry((kind, block.key)).or_insert(entry);
                    *known = (Known::There, known.1.max(now));
                }
            }
            Step::Restore(from, count, kind) => {
                let set = self.named(from, count, kind);
                let found = blocks::restore(&self.session, &set).await.unwrap();
                let hits: Vec<usize> = found.hits.iter().map(|(at, _)| *at).collect();
                self.agrees(&set, |at| hits.contains(&at));
            }
            Step::Lookup(from, count, kind) => {
                let set = self.named(from, count, kind);
                let lookup = self.session.lookup_each(&blocks::keys(&set), kind).await;
                let found = lookup.unwrap().blocks;
                self.agrees(&set, |at| found[at].is_present());
            }
            Step::Wipe => {
                self.session.wipe().await.unwrap();
                self.model.clear();
            }
            Step::Restart => {
                self.daemon.restart();
                self.session.reopen().await.unwrap();
                // An end in order makes everything durable.
                for known in self.model.values_mut() {
                    if known.0 == Known::There {
                        known.1 = Acknowledge::Durable;
                    }
                }
            }
            Step::Crash => {
                self.daemon.crash();
                self.session.reopen().await.unwrap();
                for known in self.model.values_mut() {
                    if known.1 == Acknowledge::Accepted {
                        known.0 = Known::Perhaps;
                    }
                }
            }
            Step::Reconnect => self.session = self.daemon.session(&blocks::gqa()).await,
        }
    }

    /// What the daemon has is what the model says; where it does not know, it learns.
    fn agrees(&mut self, set: &[SaveBlock], has: impl Fn(usize) -> bool) {
        for (at, block) in set.iter().enumerate() {
            let name = (block.kind, block.key);
            let known = self.model.get(&name).copied();
            let (kind, short) = (block.kind, block.key.short());
            match (known, has(at)) {
                (Some((Known::There, _)), true) | (None, false) => {}
                (Some((Known::There, how)), false) => {
                    panic!("{kind:?} {short} is gone; it was {how:?}")
                }
                (None, true) => panic!("{kind:?} {short} is there and never was saved"),
                // It came back from the device, or it did not.
                (Some((Known::Perhaps, _)), true) => {
                    self.model
                        .insert(name, (Known::There, Acknowledge::Durable));
                }
                (Some((Known::Perhaps, _)), false) => drop(self.model.remove(&name)),
            }
        }
    }
}

#[test]
fn random_sequences_do_what_the_model_says() {
    let cases = rounds("KVTIER_TEST_MODEL_CASES", 6);
    let config = Config {
        cases,
        max_shrink_iters: 24,
        failure_persistence: None,
        ..Config::default()
    };
    let mut runner = TestRunner::new(config);
    let level = prop_oneof![Just("raw"), Just("lossless"), Just("zstd")];
    let outcome = runner.run(&(level, steps()), |(level, steps)| {
        let limit = Duration::from_secs(120);
        let sequence = async {
            let mut world = World::new(level).await;
            for step in &steps {
                world.step(step).await;
            }
            for kind in KINDS {
                world.step(&Step::Restore(0, NAMES, kind)).await;
            }
        };
        run(limit, sequence);
        Ok(())
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
}
