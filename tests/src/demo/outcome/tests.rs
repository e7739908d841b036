//! Tests of the verdict: each way in which the demo can go wrong makes it fail.
//!
//! Upstairs:   nobody.
//! Downstairs: `outcome`.

use super::*;

fn run() -> Run {
    Run {
        tokens: vec![5, 6, 7],
        kv_sha256: "kv".into(),
        scores_sha256: "scores".into(),
    }
}

fn restore(from_disk: usize, from_host: usize) -> Restore {
    Restore {
        blocks: 16,
        from_disk,
        from_host,
        bytes: 1 << 20,
        tokens: 4095,
        lookup_s: 0.001,
        transfer_s: 0.1,
        ttft_s: 0.2,
        run: run(),
    }
}

/// A demo in which everything went well.
pub(in crate::demo) fn good() -> Outcome {
    let save = |level: &str, stored_bytes| Save {
        blocks: 16,
        durable: 16,
        bytes: 3 << 20,
        stored_bytes,
        levels: vec![level.to_owned()],
        seconds: 0.5,
    };
    let level = |level, stored_bytes| LevelOutcome {
        level,
        save: save(level, stored_bytes),
        ready_after_s: 0.25,
        disk: restore(16, 0),
        host: restore(0, 16),
        counted: Counted { disk: 16, host: 16 },
    };
    let levels = vec![level("raw", 3 << 20), level("lossless", 2 << 20)];
    Outcome {
        prompt_tokens: 4096,
        computed: Computed {
            model: "model".into(),
            ttft_s: 10.0,
            saves: levels.iter().map(|one| one.save.clone()).collect(),
            run: run(),
            text: "the continuation".into(),
        },
        levels,
    }
}

#[test]
fn outcome_has_no_problem_when_all_is_as_promised() {
    assert_eq!(good().problems(), Vec::<String>::new());
    assert!(good().is_identical());
}

/// Spoils a good outcome and returns what the demo says about it.
fn spoiled(spoil: impl FnOnce(&mut LevelOutcome)) -> String {
    let mut outcome = good();
    spoil(&mut outcome.levels[1]);
    let problems = outcome.problems();
    assert!(
        problems
            .iter()
            .all(|one| one.starts_with("level lossless: "))
    );
    problems.join("\n")
}

#[test]
fn outcome_names_a_continuation_that_differs_and_where() {
    let said = spoiled(|level| level.host.run.tokens[1] = 9);
    assert!(
        said.contains("the continuation DIFFERS from token 2 on"),
        "{said}"
    );
    let said = spoiled(|level| level.disk.run.tokens.truncate(2));
    assert!(
        said.contains("the continuation DIFFERS from token 3 on"),
        "{said}"
    );
}

#[test]
fn outcome_names_kv_and_scores_that_differ_even_if_the_tokens_are_the_same() {
    let said = spoiled(|level| level.disk.run.kv_sha256 = "other".into());
    assert!(said.contains("the KV DIFFERS"), "{said}");
    let said = spoiled(|level| level.disk.run.scores_sha256 = "other".into());
    assert!(
        said.contains("the scores of the first token DIFFER"),
        "{said}"
    );
}

#[test]
fn outcome_is_a_failure_when_nothing_or_not_all_was_restored() {
    let said = spoiled(|level| {
        level.disk.from_disk = 0;
        level.disk.tokens = 0;
    });
    assert!(said.contains("nothing was restored"), "{said}");
    let said = spoiled(|level| {
        level.disk.from_disk = 15;
        level.disk.tokens = 3840;
    });
    assert!(said.contains("of 16 blocks 15 came from NVMe"), "{said}");
    assert!(said.contains("3840 of 4096 tokens"), "{said}");
    let mut outcome = good();
    outcome.levels.clear();
    assert_eq!(outcome.problems(), ["nothing was restored"]);
    assert!(!outcome.is_identical());
}

#[test]
fn outcome_is_a_failure_when_the_tier_is_not_the_one_to_be_shown() {
    let said = spoiled(|level| (level.disk.from_disk, level.disk.from_host) = (15, 1));
    assert!(
        said.contains("15 came from NVMe and 1 from host memory"),
        "{said}"
    );
    let said = spoiled(|level| (level.host.from_disk, level.host.from_host) = (16, 0));
    assert!(
        said.contains("restore from memory: of 16 blocks 16 came from NVMe"),
        "{said}"
    );
    let said = spoiled(|level| level.counted.disk = 0);
    assert!(said.contains("the daemon counted 0 and 16"), "{said}");
}

#[test]
fn outcome_is_a_failure_when_a_block_was_not_durable_or_at_another_level() {
    let said = spoiled(|level| level.save.durable = 15);
    assert!(
        said.contains("15 of 16 blocks were acknowledged durable"),
        "{said}"
    );
    let said = spoiled(|level| level.save.levels = vec!["raw".into()]);
    assert!(said.contains(r#"the blocks at level ["raw"]"#), "{said}");
}
