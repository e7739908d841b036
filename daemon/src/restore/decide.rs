//! What a running restore decides: which block is loaded next and how many at a time, whether its
//! engine may compute, and when it may have what is on its way.
//!
//! Upstairs:   `run` acts on it. The simulator of `kvtier-bench planner` runs the same code.
//! Downstairs: `line` says which block, `flow` how fast they come, `gate` who brings the rest.
//!
//! No I/O and no clock: time comes in as what has passed since the restore began, claims come in
//! through functions, and what is decided goes out as a value for the caller to act on.
//!
//! A reader that needs a loaded prefix gets its blocks from the front, as many at a time as keep
//! the device busy. A reader that computes meanwhile gets them from the back, and no more at a time
//! than the device works on anyway: a block that is claimed and only waits in a queue is one that
//! the engine could have computed, and has to wait for.
//!
//! Invariants kept here
//!   D1  A block is named to be loaded at most once, and only after it was taken.
//!   O2  When a device is late the gate opens, and the engine may have what is on its way: nobody
//!       waits for a device that has stopped while it could compute. Until that brings something
//!       the gate stays open, and nothing more is asked of it.

use std::ops::Range;
use std::time::Duration;

use kvtier_proto::claims::{Claim, Gate};

use super::plan::Prefill;
use flow::Flow;
use gate::Ahead;
use line::Line;

mod flow;
mod gate;
mod line;

pub use flow::LOADS_MAX;
pub use gate::{SAVING_MIN_S, SAVING_PART};
pub use line::Load;

/// What is known before an engine begins to compute while blocks load.
#[derive(Debug, Clone, PartialEq)]
pub struct Known {
    /// Whether it is expected to be worth while.
    pub open: bool,
    /// Of each device, what a block takes, one after the other. Unit: seconds.
    pub load_s: Vec<Option<f64>>,
    /// What blocks take to compute.
    pub steps: Option<Steps>,
}

/// What an engine takes for its blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Steps {
    /// Of the tokens after those that it had before the restore.
    pub prefill: Prefill,
    /// Tokens of a block.
    pub block_tokens: u32,
}

impl Steps {
    /// To compute a block. Unit: seconds.
    fn block_s(&self, index: usize) -> f64 {
        let tokens = f64::from(self.block_tokens);
        self.prefill.step_s(index as f64 * tokens, tokens)
    }
}

/// The decisions of one restore.
#[derive(Debug)]
pub struct Course {
    line: Line,
    /// Of each device; of one when the reader takes a prefix.
    flows: Vec<Flow>,
    ends: Option<Ends>,
}

/// The part of a restore whose engine computes meanwhile.
#[derive(Debug)]
struct Ends {
    gate: Gate,
    steps: Option<Steps>,
    /// Every block before this one is here.
    front: usize,
    /// Blocks before it that the engine had computed when they were counted, and what each took of
    /// the time until then. Unit: seconds.
    computed: usize,
    seen_s: Option<f64>,
}

impl Ends {
    /// What the next block takes to compute, as far as known: from earlier restores, or else from
    /// this one. Unit: seconds.
    fn compute_s(&self) -> Option<f64> {
        let learned = self.steps.map(|steps| steps.block_s(self.front));
        learned.or(self.seen_s)
    }

    /// Looks how far the engine has come.
    fn look(&mut self, now: Duration, blocks: usize, claim: impl Fn(usize) -> Claim) {
        let before = self.computed;
        while self.front < blocks {
            match claim(self.front) {
                Claim::Ready => {}
                Claim::Computed => self.computed += 1,
                _ => break,
            }
            self.front += 1;
        }
        if self.computed > before {
            self.seen_s = Some(now.as_secs_f64() / self.computed as f64);
        }
    }
}

impl Course {
    /// Brings these blocks, in ascending order.
    pub fn forward(load: Vec<usize>) -> Self {
        Self {
            line: Line::forward(load),
            flows: vec![Flow::default()],
            ends: None,
        }
    }

    /// Brings these blocks, ascending, from the back, while an engine computes from the front. It
    /// has to compute those of `missing`, ascending as well.
    pub fn two_ended(load: &[Load], missing: &[usize], known: &Known) -> Self {
        let expected = known.load_s.iter();
        let flow = |load_s: &Option<f64>| load_s.map(Flow::expecting).unwrap_or_default();
        Self {
            line: Line::backward(load, missing, known.load_s.len()),
            flows: expected.map(flow).collect(),
            ends: Some(Ends {
                gate: if known.open { Gate::Open } else { Gate::Closed },
                steps: known.steps,
                front: 0,
                computed: 0,
                seen_s: None,
            }),
        }
    }

    /// The next block to load, if one is to be begun now. It is of `wanted`, and `take` said that
    /// it is ours. Whoever asks begins to load it.
    pub fn next(
        &mut self,
        now: Duration,
        wanted: &Range<usize>,
        take: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let most = |flow: &Flow| match self.ends {
            Some(_) => flow.depth(),
            None => LOADS_MAX,
        };
        let flows = &self.flows;
        let has_room = |device: usize| {
            let flow = flows.get(device);
            flow.is_some_and(|flow| !flow.is_stuck() && flow.loading() < most(flow))
        };
        let ours = |index: usize| wanted.contains(&index) && take(index);
        let load = self.line.next(has_room, ours)?;
        self.flows.get_mut(load.device)?.begin(now, load.index);
        Some(load.index)
    }

    /// Loads under way.
    pub fn loading(&self) -> usize {
        self.flows.iter().map(Flow::loading).sum()
    }

    /// Their blocks.
    pub fn under_way(&self) -> Vec<usize> {
        self.flows.iter().flat_map(Flow::under_way).collect()
    }

    /// A load has ended, with its block or without.
    pub fn landed(&mut self, now: Duration, index: usize, came: bool) {
        let flows = self.flows.iter_mut();
        flows.for_each(|flow| flow.end(now, index, came));
    }

    /// What the gate is to be now, when that is something else than it was. `claim` says who has a
    /// block.
    pub fn turn_gate(&mut self, now: Duration, claim: impl Fn(usize) -> Claim) -> Option<Gate> {
        let blocks = self.line.blocks();
        self.ends.as_mut()?.look(now, blocks, &claim);
        let gate = self.weigh(now, claim)?;
        let ends = self.ends.as_mut()?;
        (std::mem::replace(&mut ends.gate, gate) != gate).then_some(gate)
    }

    /// Whether the engine is to compute, as far as that can be told now.
    fn weigh(&self, now: Duration, claim: impl Fn(usize) -> Claim) -> Option<Gate> {
        let ends = self.ends.as_ref()?;
        if self.flows.iter().any(Flow::is_stuck) {
            return Some(Gate::Open);
        }
        // What it has in hand is no longer to be weighed.
        let front = ends.front + usize::from(claim(ends.front) == Claim::Computing);
        let compute_s = ends.compute_s()?;
        let gap = self.line.gap_behind(front)?;
        let (mut blocks, mut load_all_s) = (0, 0.0_f64);
        for (device, flow) in self.flows.iter().enumerate() {
            let of_device = self.line.left(front, device) + flow.loading_of(front..gap);
            if of_device > 0 {
                blocks += of_device;
                load_all_s = load_all_s.max(of_device as f64 * flow.block_s(now)?);
            }
        }
        let ahead = Ahead {
            blocks,
            load_all_s,
            compute_s,
        };
        Some(ahead.gate(ends.gate))
    }

    /// What the gate is.
    pub fn gate(&self) -> Gate {
        self.ends.as_ref().map_or(Gate::Closed, |ends| ends.gate)
    }

    /// When a device is late, if nothing comes before.
    pub fn late_at(&self) -> Option<Duration> {
        let compute_s = self.ends.as_ref()?.compute_s().unwrap_or(0.0);
        let flows = self.flows.iter();
        flows.filter_map(|flow| flow.late_at(compute_s)).min()
    }

    /// A device is late: the gate is open, and the engine may have these blocks, whose loads are
    /// under way. The first of the two to finish brings them (O2).
    pub fn give_back(&mut self, now: Duration) -> Vec<usize> {
        let Some(ends) = &mut self.ends else {
            return Vec::new();
        };
        ends.gate = Gate::Open;
        let compute_s = ends.compute_s().unwrap_or(0.0);
        let mut given = Vec::new();
        for flow in &mut self.flows {
            if flow.late_at(compute_s).is_some_and(|late| late <= now) {
                flow.set_late();
                given.extend(flow.under_way());
            }
        }
        given
    }
}

#[cfg(test)]
mod tests;
