//! What a daemon has promised, written down outside of it, and what it kept.
//!
//! Upstairs:   `kill` and `power`, and tests that kill the daemon.
//! Downstairs: `blocks`.
//!
//! Invariants kept here
//!   J1  A block is noted as durable only after its acknowledgement arrived.

use kvtier_client::{Acknowledge, Error, Miss, SaveBlock, Session};

use super::blocks;

/// Blocks that were saved, by what was said of them.
#[derive(Debug, Default)]
pub struct Journal {
    /// Acknowledged durable: must come back.
    pub durable: Vec<SaveBlock>,
    /// Sent without an answer, or acknowledged as accepted: may come back, right and whole.
    pub perhaps: Vec<SaveBlock>,
    /// Of a namespace whose wipe was acknowledged last: must not come back.
    pub wiped: Vec<SaveBlock>,
}

/// What was found again.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Survey {
    /// Durable blocks that came back.
    pub kept: usize,
    /// Durable blocks that did not.
    pub lost: Vec<(String, Miss)>,
    /// Blocks that came back with bytes that are not theirs.
    pub wrong: Vec<String>,
    /// Wiped blocks that came back.
    pub ghosts: usize,
    /// Other blocks that came back all the same.
    pub lucky: usize,
}

impl Journal {
    /// Saves blocks and notes what is acknowledged. An error is noted too: nothing is known then.
    pub async fn save(
        &mut self,
        session: &Session,
        batch: &[SaveBlock],
        wait: Acknowledge,
    ) -> Result<(), Error> {
        match blocks::save(session, batch, wait).await {
            Ok(outcomes) => {
                for (block, outcome) in batch.iter().zip(outcomes) {
                    match outcome.is_stored(Acknowledge::Durable) {
                        true => self.durable.push(*block),
                        false => self.perhaps.push(*block),
                    }
                }
                Ok(())
            }
            Err(error) => {
                self.perhaps.extend_from_slice(batch);
                Err(error)
            }
        }
    }

    /// Restores everything that was ever saved.
    pub async fn survey(&self, session: &Session) -> Survey {
        let mut survey = Survey::default();
        for set in by_kind(&self.durable) {
            let found = blocks::look(session, &set).await.unwrap();
            survey.kept += found.hits.len();
            let lost = |(at, miss): &(usize, Miss)| (set[*at].key.short(), *miss);
            survey.lost.extend(found.misses.iter().map(lost));
            let wrong = found.wrong.into_iter().map(|(_, what)| what);
            survey.wrong.extend(wrong);
        }
        for set in by_kind(&self.perhaps) {
            let found = blocks::look(session, &set).await.unwrap();
            survey.lucky += found.hits.len();
            let wrong = found.wrong.into_iter().map(|(_, what)| what);
            survey.wrong.extend(wrong);
        }
        for set in by_kind(&self.wiped) {
            let found = blocks::look(session, &set).await.unwrap();
            survey.ghosts += found.hits.len() + found.wrong.len();
        }
        survey
    }

    /// Wipes the namespace and starts over: nothing saved so far may come back.
    pub async fn wipe(&mut self, session: &Session) {
        session.wipe().await.unwrap();
        self.wiped = std::mem::take(&mut self.durable);
        self.wiped.append(&mut self.perhaps);
    }

    /// Insists that everything durable comes back.
    pub async fn verify(&self, session: &Session) -> Survey {
        let survey = self.survey(session).await;
        assert_eq!(survey.wrong, Vec::<String>::new());
        assert_eq!(survey.ghosts, 0, "wiped blocks came back");
        assert_eq!(
            survey.lost,
            vec![],
            "LOST DURABLE BLOCKS; kept {}",
            survey.kept
        );
        assert_eq!(survey.kept, self.durable.len());
        survey
    }
}

/// A restore asks for one kind.
fn by_kind(blocks: &[SaveBlock]) -> Vec<Vec<SaveBlock>> {
    let mut kinds: Vec<_> = blocks.iter().map(|block| block.kind).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let of = |kind| blocks.iter().filter(move |block| block.kind == kind);
    kinds
        .into_iter()
        .map(|kind| of(kind).copied().collect())
        .collect()
}
