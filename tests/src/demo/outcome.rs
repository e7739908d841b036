//! What the demo found, and whether it is what kvtier promises. Pure.
//!
//! Upstairs:   `story` fills it; the exit code is decided here.
//! Downstairs: `job`.
//!
//! Invariants kept here
//!   O1  The demo succeeds only if every block was durable before the kill, every block was
//!       restored from the tier that was to be shown, by the engine's and the daemon's count, and
//!       every continuation, score and KV byte equals the computed one.
//!
//! Not here on purpose: bounds on time. A slow machine is not a broken promise; the ratio is shown.

use super::job::{Computed, Restore, Run, Save};

/// One run of the whole demo.
#[derive(Debug, Clone)]
pub(super) struct Outcome {
    /// Length of the prompt. Unit: tokens.
    pub(super) prompt_tokens: usize,
    /// What engine A computed.
    pub(super) computed: Computed,
    /// What became of it at each codec level.
    pub(super) levels: Vec<LevelOutcome>,
}

/// One codec level of the disk tier.
#[derive(Debug, Clone)]
pub(super) struct LevelOutcome {
    /// Name of the level.
    pub(super) level: &'static str,
    /// What engine A saved.
    pub(super) save: Save,
    /// Time after kill -9 from the daemon's start until it served.
    pub(super) ready_after_s: f64,
    /// The first restore, from NVMe.
    pub(super) disk: Restore,
    /// The second, from host memory.
    pub(super) host: Restore,
    /// What the daemon counted.
    pub(super) counted: Counted,
}

/// The daemon's own counters of restored blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counted {
    /// From NVMe.
    pub(super) disk: u64,
    /// From host memory.
    pub(super) host: u64,
}

impl LevelOutcome {
    /// Raw bytes for each stored byte.
    pub(super) fn ratio(&self) -> f64 {
        quotient(self.save.bytes, self.save.stored_bytes)
    }
}

impl Outcome {
    /// True when every continuation equals the computed one.
    pub(super) fn is_identical(&self) -> bool {
        let restores = self.levels.iter().flat_map(|one| [&one.disk, &one.host]);
        let mut runs = restores.map(|restore| &restore.run);
        !self.levels.is_empty() && runs.all(|run| *run == self.computed.run)
    }

    /// Every broken promise, in sentences; empty when the demo has succeeded.
    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.levels.is_empty() {
            problems.push("nothing was restored".to_owned());
        }
        for one in &self.levels {
            let mut say =
                |problem: String| problems.push(format!("level {}: {problem}", one.level));
            check_save(one, &mut say);
            let blocks = one.disk.blocks;
            check_restore(
                "from NVMe",
                &one.disk,
                (blocks, 0),
                self.prompt_tokens,
                &mut say,
            );
            check_restore(
                "from memory",
                &one.host,
                (0, blocks),
                self.prompt_tokens,
                &mut say,
            );
            check_run("from NVMe", &one.disk.run, &self.computed.run, &mut say);
            check_run("from memory", &one.host.run, &self.computed.run, &mut say);
            let seen = Counted {
                disk: (one.disk.from_disk + one.host.from_disk) as u64,
                host: (one.disk.from_host + one.host.from_host) as u64,
            };
            if seen != one.counted {
                say(format!(
                    "the engine saw {} blocks from NVMe and {} from memory, the daemon counted {} \
                     and {}",
                    seen.disk, seen.host, one.counted.disk, one.counted.host
                ));
            }
        }
        problems
    }
}

fn check_save(one: &LevelOutcome, say: &mut impl FnMut(String)) {
    let save = &one.save;
    if save.blocks == 0 || save.durable != save.blocks {
        say(format!(
            "{} of {} blocks were acknowledged durable",
            save.durable, save.blocks
        ));
    }
    if save.levels != [one.level] {
        say(format!(
            "the device holds the blocks at level {:?}",
            save.levels
        ));
    }
}

/// `expected` is how many blocks were to come from NVMe and from host memory.
fn check_restore(
    which: &str,
    restore: &Restore,
    expected: (usize, usize),
    prompt_tokens: usize,
    say: &mut impl FnMut(String),
) {
    if restore.from_disk + restore.from_host == 0 {
        say(format!("restore {which}: nothing was restored"));
    } else if (restore.from_disk, restore.from_host) != expected {
        say(format!(
            "restore {which}: of {} blocks {} came from NVMe and {} from host memory",
            restore.blocks, restore.from_disk, restore.from_host
        ));
    }
    // The last token is computed: its scores choose the first token of the continuation.
    if restore.tokens + 1 != prompt_tokens {
        say(format!(
            "restore {which}: {} of {prompt_tokens} tokens needed no prefill",
            restore.tokens
        ));
    }
}

fn check_run(which: &str, restored: &Run, computed: &Run, say: &mut impl FnMut(String)) {
    if restored.kv_sha256 != computed.kv_sha256 {
        say(format!(
            "restore {which}: the KV DIFFERS from the computed KV"
        ));
    }
    if restored.scores_sha256 != computed.scores_sha256 {
        say(format!(
            "restore {which}: the scores of the first token DIFFER"
        ));
    }
    if restored.tokens != computed.tokens {
        let pairs = restored.tokens.iter().zip(&computed.tokens);
        let same = pairs.take_while(|(a, b)| a == b).count();
        say(format!(
            "restore {which}: the continuation DIFFERS from token {} on",
            same + 1
        ));
    }
}

/// `bytes` over `other`, as a number for people.
#[expect(clippy::cast_precision_loss, reason = "sizes are far below 2^53")]
pub(super) fn quotient(bytes: u64, other: u64) -> f64 {
    bytes as f64 / other.max(1) as f64
}

#[cfg(test)]
pub(super) mod tests;
