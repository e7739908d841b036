//! What campaigns of crashes share: the count of what was kept, and another daemon each time.
//!
//! Upstairs:   `kill`, `power`; the suite `crash` and the tests show a [`Tally`].
//! Downstairs: `daemon`, `journal`.

use std::time::Duration;

use rand::Rng;
use rand::seq::IndexedRandom as _;
use serde::{Deserialize, Serialize};

use super::journal::{Journal, Survey};
use super::{Daemon, Options, blocks, limited};

/// Longest time of one round's saves, and of looking at everything afterwards.
pub(super) const LIMIT: Duration = Duration::from_secs(120);
/// Longest wait for a process that was killed.
pub(super) const EXIT_LIMIT: Duration = Duration::from_secs(60);
/// Most examples of lost and wrong blocks that are kept.
const EXAMPLES: usize = 20;

/// What a campaign of crashes found.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tally {
    /// Crashes.
    pub rounds: u64,
    /// Blocks that were acknowledged durable.
    pub durable: u64,
    /// Durable blocks that were compared after a crash, each as often as it had to come back.
    pub checked: u64,
    /// Durable blocks that did not come back.
    pub lost: u64,
    /// Blocks that came back with bytes that are not theirs.
    pub wrong: u64,
    /// Blocks that came back although a wipe of them had been acknowledged.
    pub ghosts: u64,
    /// Records that a daemon called damaged. A write that was cut off is no record.
    pub damaged: u64,
    /// Blocks that came back although nobody had promised it.
    pub lucky: u64,
    /// Crashes behind an end in order, and how many of their catalogs were not trusted.
    pub orderly: u64,
    /// See `orderly`.
    pub catalogs_rebuilt: u64,
    /// Daemons that were killed while they started, and those of them that had begun to recover:
    /// the store's next life was on the device.
    pub killed_starting: u64,
    /// See `killed_starting`.
    pub killed_recovering: u64,
    /// Blocks that a device without syncs lost; 0 where there was none.
    pub control_lost: u64,
    /// What some of the lost and wrong ones were.
    pub examples: Vec<String>,
    /// Time of the whole campaign. Unit: seconds.
    pub seconds: f64,
}

impl Tally {
    /// True when every promise was kept and there was something to keep.
    pub fn holds(&self) -> bool {
        let broken = self.lost + self.wrong + self.ghosts + self.damaged;
        broken == 0 && self.durable > 0 && self.checked >= self.durable
    }

    /// Counts what one look found, and takes the lost ones out of the journal: each counts once.
    fn note(&mut self, survey: &Survey, journal: &mut Journal) {
        self.checked += (survey.kept + survey.lost.len()) as u64;
        self.lucky = self.lucky.max(survey.lucky as u64);
        self.lost += survey.lost.len() as u64;
        self.wrong += survey.wrong.len() as u64;
        self.ghosts += survey.ghosts as u64;
        let lost = survey
            .lost
            .iter()
            .map(|(key, miss)| format!("lost {key}: {}", miss.as_str()));
        self.examples
            .extend(lost.chain(survey.wrong.iter().cloned()));
        self.examples.truncate(EXAMPLES);
        let is_lost = |key: &str| survey.lost.iter().any(|(lost, _)| lost == key);
        journal.durable.retain(|block| !is_lost(&block.key.short()));
    }
}

/// The same daemon with another lane, depth and level.
pub(super) fn shuffled(options: &Options, rng: &mut impl Rng) -> Options {
    let lane = ["io_uring", "pread"].choose(rng).copied();
    let level = ["raw", "lossless", "zstd"].choose(rng).copied();
    let depth = [1, 2, 7, 64, 256].choose(rng).copied();
    (options.clone())
        .lane(lane.unwrap_or("auto"))
        .level(level.unwrap_or("raw"))
        .queue_depth(depth.unwrap_or(64))
}

/// Starts the daemon again, compares everything, and starts over with an empty namespace when
/// there are more than `most` blocks, so that none is evicted.
pub(super) fn look_again(
    daemon: &mut Daemon,
    journal: &mut Journal,
    tally: &mut Tally,
    most: usize,
) {
    daemon.launch();
    let before = journal.durable.len();
    let survey = limited(LIMIT, async {
        let session = daemon.session(&blocks::gqa()).await;
        let survey = journal.survey(&session).await;
        if journal.durable.len() + journal.perhaps.len() > most {
            tally.durable += journal.durable.len() as u64;
            journal.wipe(&session).await;
        }
        survey
    });
    tally.note(&survey, journal);
    assert!(survey.kept <= before, "more came back than were saved");
    let damaged = daemon.metrics().sum("kvtier_corrupt_total");
    // A count of whole records, exact in a float.
    tally.damaged += u64::from(damaged > 0.0);
    if damaged > 0.0 {
        tally.examples.push(format!("{damaged} damaged records"));
    }
    tally.rounds += 1;
}
