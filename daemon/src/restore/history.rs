//! The last two-ended restores: what was expected of each, and what came of it.
//!
//! Upstairs:   `run` tells, status asks.
//! Downstairs: nothing.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kvtier_proto::NamespaceId;

use super::outlook::Outlook;

/// Restores that are remembered.
const KEPT: usize = 32;

/// One restore that has ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Met {
    /// Whose it was.
    pub namespace: NamespaceId,
    /// What was expected.
    pub outlook: Outlook,
    /// From its start to its last block.
    pub took: Duration,
    /// Blocks that the engine had when it ended.
    pub computed: usize,
    /// Blocks that were loaded.
    pub loaded: usize,
}

/// See the module.
#[derive(Debug, Default)]
pub struct History {
    met: Mutex<VecDeque<Met>>,
}

impl History {
    /// Remembers one more; the oldest is forgotten.
    pub fn add(&self, met: Met) {
        let mut all = self.met.lock().unwrap_or_else(PoisonError::into_inner);
        all.truncate(KEPT - 1);
        all.push_front(met);
    }

    /// The latest first.
    pub fn all(&self) -> Vec<Met> {
        let all = self.met.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn add_keeps_the_latest() {
        let history = History::default();
        let met = |computed| Met {
            namespace: NamespaceId(1),
            outlook: Outlook {
                planned: None,
                load: None,
                compute: None,
                compute_blocks: 0,
                load_blocks: 0,
                open: true,
                reason: "",
            },
            took: Duration::ZERO,
            computed,
            loaded: 0,
        };
        (0..100).for_each(|computed| history.add(met(computed)));
        let all: Vec<usize> = history.all().iter().map(|met| met.computed).collect();
        assert_eq!(all, (68..100).rev().collect::<Vec<_>>());
    }
}
