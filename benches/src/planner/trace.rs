//! How fast something is over time, as numbers that a run and a bound both look at.
//!
//! Upstairs:   `weather` makes traces, `world` and `bound` ask them.
//! Downstairs: nothing.
//!
//! A rate holds until the next one begins, the last one for ever. What was done by a time and when
//! something is done are exact inverses of each other.

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Trace {
    /// From the beginning on, ascending.
    knots: Vec<Knot>,
}

#[derive(Debug, Clone, Copy)]
struct Knot {
    at_s: f64,
    /// Units a second from here on; 0 while nothing moves.
    rate: f64,
    /// Units up to here.
    done: f64,
}

impl Trace {
    /// One rate, above zero.
    pub(super) fn steady(rate: f64) -> Self {
        Self::new([], rate)
    }

    /// These rates, each for so many seconds, then `last` for ever, which is above zero.
    pub(super) fn new(steps: impl IntoIterator<Item = (f64, f64)>, last: f64) -> Self {
        let (mut at_s, mut done) = (0.0, 0.0);
        let mut knots = Vec::new();
        for (seconds, rate) in steps {
            knots.push(Knot { at_s, rate, done });
            at_s += seconds;
            done += seconds * rate;
        }
        let rate = last;
        knots.push(Knot { at_s, rate, done });
        Self { knots }
    }

    /// The same, so many times as fast.
    #[must_use]
    pub(super) fn times(mut self, factor: f64) -> Self {
        for knot in &mut self.knots {
            knot.rate *= factor;
            knot.done *= factor;
        }
        self
    }

    /// Units that are done by a time, when something is always there to be done.
    pub(super) fn done_by(&self, at_s: f64) -> f64 {
        let next = self.knots.partition_point(|knot| knot.at_s <= at_s);
        let knot = next.checked_sub(1).and_then(|at| self.knots.get(at));
        knot.map_or(0.0, |knot| knot.done + (at_s - knot.at_s) * knot.rate)
    }

    /// When so many units are done that begin at `start_s`.
    pub(super) fn after(&self, start_s: f64, amount: f64) -> f64 {
        if amount <= 0.0 {
            return start_s;
        }
        let total = self.done_by(start_s) + amount;
        let next = self.knots.partition_point(|knot| knot.done < total);
        let knot = next.checked_sub(1).and_then(|at| self.knots.get(at));
        knot.map_or(start_s, |knot| knot.at_s + (total - knot.done) / knot.rate)
    }
}
