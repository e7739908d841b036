//! Whether an engine computes the next block, or leaves what is left to the device.
//!
//! Upstairs:   `decide`, while a restore runs; `outlook`, before it does.
//! Downstairs: nothing.
//!
//! An engine that begins with a block ends with it, however fast the others come meanwhile. So it
//! does not begin where that takes longer than to load everything that is left.

use kvtier_proto::claims::Gate;

/// An engine that does not compute is not let in for less than this. Unit: seconds.
pub const SAVING_MIN_S: f64 = 2e-3;
/// Or for less than this part of the time.
pub const SAVING_PART: f64 = 0.03;

/// What is left to bring before the engine can go on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Ahead {
    /// Blocks that can be loaded or computed.
    pub(super) blocks: usize,
    /// What it takes to load all of them. Unit: seconds.
    pub(super) load_all_s: f64,
    /// What each takes to compute. Unit: seconds.
    pub(super) compute_s: f64,
}

impl Ahead {
    /// The gate, which was like this.
    pub(super) fn gate(&self, was: Gate) -> Gate {
        let saving_s = self.saving_s();
        let enough = match was {
            Gate::Open => saving_s > 0.0,
            Gate::Closed => saving_s >= SAVING_MIN_S.max(SAVING_PART * self.load_all_s),
        };
        if enough { Gate::Open } else { Gate::Closed }
    }

    /// What it saves that the engine computes as well, whole blocks. Unit: seconds.
    fn saving_s(&self) -> f64 {
        let (all_s, compute_s) = (self.load_all_s, self.compute_s);
        let load_s = all_s / self.blocks as f64;
        let meeting = (all_s / (load_s + compute_s)).floor();
        let end_s = |computed: f64| {
            let left_s = all_s - computed * load_s;
            left_s.max(computed * compute_s)
        };
        let both_s = end_s(meeting).min(end_s(meeting + 1.0));
        // Where nothing is left, or all of it takes no time, there is nothing to save.
        if both_s.is_nan() { 0.0 } else { all_s - both_s }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(was: Gate, blocks: usize, load_s: f64, compute_s: f64) -> Gate {
        let ahead = Ahead {
            blocks,
            load_all_s: blocks as f64 * load_s,
            compute_s,
        };
        ahead.gate(was)
    }

    #[test]
    fn gate_opens_where_both_ends_together_are_faster_by_enough() {
        assert_eq!(gate(Gate::Closed, 20, 10e-3, 10e-3), Gate::Open);
        // One block of 64 is saved, 1.6 %.
        assert_eq!(gate(Gate::Closed, 64, 10e-3, 600e-3), Gate::Closed);
        // Half is saved, and that is a millisecond.
        assert_eq!(gate(Gate::Closed, 20, 100e-6, 100e-6), Gate::Closed);
        assert_eq!(gate(Gate::Closed, 0, 10e-3, 10e-3), Gate::Closed);
    }

    // Goal: nobody waits for a long step whose block would have come long before it ends.
    #[test]
    fn gate_closes_when_all_that_is_left_comes_before_a_step_would_end() {
        for (left, open) in [(12, Gate::Open), (11, Gate::Open), (10, Gate::Closed)] {
            assert_eq!(gate(Gate::Open, left, 10e-3, 100e-3), open, "{left}");
        }
        assert_eq!(gate(Gate::Open, 1, 10e-3, 9e-3), Gate::Open);
    }

    #[test]
    fn gate_is_closed_by_numbers_that_say_nothing() {
        assert_eq!(gate(Gate::Open, 10, 0.0, 0.0), Gate::Closed);
        assert_eq!(
            gate(Gate::Closed, 10, f64::INFINITY, f64::INFINITY),
            Gate::Closed
        );
    }
}
