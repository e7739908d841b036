//! What the daemon expects of a two-ended restore, as it says when the restore begins.
//!
//! Upstairs:   engines see it as [`RestoreEvent::Outlook`](crate::RestoreEvent::Outlook); `pace`
//!             reckons with it until it has seen for itself.
//! Downstairs: the message of the wire.
//!
//! Not here on purpose: no check of the figures. They decide when this side stops waiting, never
//! what it reads, and every wait has an end of its own.

use std::time::Duration;

use kvtier_proto::v1;

use crate::values::{BlockStatus, Tier};

/// What is expected of a two-ended restore, from its start until the tokens after the last block
/// are computed. What the daemon does not know is `None`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outlook {
    /// As it is planned.
    pub planned: Option<Duration>,
    /// If every block were loaded.
    pub load: Option<Duration>,
    /// If every block were computed.
    pub compute: Option<Duration>,
    /// Blocks that the engine is expected to compute; 0 where it is kept out, since loading alone
    /// is as fast.
    pub compute_blocks: usize,
    /// Blocks that are expected to be loaded.
    pub load_blocks: usize,
    /// Why, in a sentence.
    pub reason: String,
}

/// How long one block is expected to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct OfBlock {
    /// To compute it.
    pub(crate) step: Option<Duration>,
    /// To load it from a device.
    pub(crate) load: Option<Duration>,
}

impl Outlook {
    pub(crate) fn from_wire(outlook: &v1::Outlook) -> Self {
        let known = |micros| (micros > 0).then(|| Duration::from_micros(micros));
        let count = |blocks| usize::try_from(blocks).unwrap_or(usize::MAX);
        Self {
            planned: known(outlook.planned_us),
            load: known(outlook.load_us),
            compute: known(outlook.compute_us),
            compute_blocks: count(outlook.compute_blocks),
            load_blocks: count(outlook.load_blocks),
            reason: outlook.reason.clone(),
        }
    }

    /// What it says of one block of so many tokens, of a prompt whose blocks stand as in `plan`
    /// and that goes on for `suffix_tokens`.
    pub(crate) fn of_block(
        &self,
        plan: &[BlockStatus],
        block_tokens: u32,
        suffix_tokens: u32,
    ) -> OfBlock {
        let blocks = u32::try_from(plan.len()).unwrap_or(u32::MAX);
        let (block, suffix) = (f64::from(block_tokens), f64::from(suffix_tokens));
        let all = (f64::from(blocks) * block + suffix).max(1.0);
        let compute = |tokens: f64| self.compute.map(|compute| compute.mul_f64(tokens / all));
        let on_device = |one: &&BlockStatus| **one == BlockStatus::Present(Tier::Disk);
        let loaded = u32::try_from(plan.iter().filter(on_device).count()).unwrap_or(u32::MAX);
        // What is missing is computed after the last load: then this time says little of loads.
        let missing = |one: &BlockStatus| matches!(one, BlockStatus::Missing(_));
        let load = self.load.filter(|_| !plan.iter().any(missing));
        let loads = load.map(|load| load.saturating_sub(compute(suffix).unwrap_or_default()));
        OfBlock {
            step: compute(block),
            load: loads.and_then(|loads| loads.checked_div(loaded)),
        }
    }
}

#[cfg(test)]
mod tests {
    use kvtier_proto::Miss;

    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// Ten blocks of 16 tokens and 40 more, at 5 ms a token; a load takes 30 ms.
    fn wire() -> v1::Outlook {
        v1::Outlook {
            planned_us: 400_000,
            load_us: 440_000,
            compute_us: 1_000_000,
            compute_blocks: 3,
            load_blocks: 7,
            reason: "both together are faster".into(),
        }
    }

    #[test]
    fn outlook_is_what_the_daemon_said_and_nothing_where_it_said_nothing() {
        let outlook = Outlook::from_wire(&wire());
        let times = (outlook.planned, outlook.load, outlook.compute);
        assert_eq!(times, (Some(ms(400)), Some(ms(440)), Some(ms(1000))));
        assert_eq!((outlook.compute_blocks, outlook.load_blocks), (3, 7));
        let unknown = Outlook::from_wire(&v1::Outlook::default());
        assert_eq!(
            (unknown.planned, unknown.load, unknown.compute),
            (None, None, None)
        );
    }

    #[test]
    fn of_block_takes_the_suffix_off_and_shares_loads_among_blocks_of_the_device() {
        let outlook = Outlook::from_wire(&wire());
        let mut plan = vec![BlockStatus::Present(Tier::Disk); 10];
        plan[0] = BlockStatus::Present(Tier::Host);
        plan[1] = BlockStatus::Present(Tier::Host);
        let of_block = outlook.of_block(&plan, 16, 40);
        let (step, load) = (of_block.step.unwrap(), of_block.load.unwrap());
        assert!(step.abs_diff(ms(80)) < ms(1), "{step:?}");
        assert!(load.abs_diff(ms(30)) < ms(1), "{load:?}");
        plan[5] = BlockStatus::Missing(Miss::Absent);
        assert_eq!(outlook.of_block(&plan, 16, 40).load, None);
    }

    #[test]
    fn of_block_bears_any_figures() {
        let wild = v1::Outlook {
            planned_us: u64::MAX,
            load_us: 1,
            compute_us: u64::MAX,
            compute_blocks: u32::MAX,
            load_blocks: u32::MAX,
            reason: String::new(),
        };
        let outlook = Outlook::from_wire(&wild);
        let nothing = outlook.of_block(&[], 0, 0);
        assert_eq!((nothing.step, nothing.load), (Some(Duration::ZERO), None));
        let one = [BlockStatus::Present(Tier::Disk)];
        let of_block = outlook.of_block(&one, u32::MAX, u32::MAX);
        assert_eq!(of_block.load, Some(Duration::ZERO));
    }
}
