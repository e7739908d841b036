//! Which block is loaded next.
//!
//! Upstairs:   `decide`.
//! Downstairs: nothing.
//!
//! For a loaded prefix it is the first. While an engine computes it is the last, so that both ends
//! meet; of several devices each brings its own last one. But a block that nobody can load has to
//! be computed, when all before it are here: what lies before the first such block comes first,
//! from its back, then what lies before the next.

use std::collections::VecDeque;

/// A block to load, and which of the restore's devices has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Its place in the prompt.
    pub index: usize,
    /// Counted from 0.
    pub device: usize,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Line {
    /// What lies between two gaps.
    parts: Vec<Part>,
    backward: bool,
    blocks: usize,
}

#[derive(Debug)]
struct Part {
    /// The gap behind it.
    end: usize,
    /// Of each device, blocks that were not named yet, ascending.
    left: Vec<VecDeque<usize>>,
}

impl Line {
    /// All of one device.
    pub(super) fn forward(load: Vec<usize>) -> Self {
        let blocks = load.last().map_or(0, |last| last + 1);
        let left = vec![load.into()];
        Self {
            parts: vec![Part { end: blocks, left }],
            backward: false,
            blocks,
        }
    }

    /// Ascending; the gaps are the blocks of `missing`.
    pub(super) fn backward(load: &[Load], missing: &[usize], devices: usize) -> Self {
        let last = load.last().map(|load| load.index);
        let blocks = last.max(missing.last().copied()).map_or(0, |last| last + 1);
        let ends = missing.iter().copied().chain([blocks]);
        let mut load = load.iter().peekable();
        let part = |end: usize| {
            let mut left = vec![VecDeque::new(); devices];
            while let Some(one) = load.next_if(|one| one.index < end) {
                if let Some(left) = left.get_mut(one.device) {
                    left.push_back(one.index);
                }
            }
            Part { end, left }
        };
        Self {
            parts: ends.map(part).collect(),
            backward: true,
            blocks,
        }
    }

    /// Up to the last block that was planned for.
    pub(super) fn blocks(&self) -> usize {
        self.blocks
    }

    /// The next block that is `ours`, of a device that has room; those that are not ours are never
    /// named.
    pub(super) fn next(
        &mut self,
        has_room: impl Fn(usize) -> bool,
        ours: impl Fn(usize) -> bool,
    ) -> Option<Load> {
        let backward = self.backward;
        self.parts.iter_mut().find_map(|part| {
            let next = || part.pop(backward, &has_room);
            std::iter::from_fn(next).find(|load| ours(load.index))
        })
    }

    /// The gap behind a block, or the end. `None` when nothing is there.
    pub(super) fn gap_behind(&self, front: usize) -> Option<usize> {
        let part = self.parts.iter().find(|part| front < part.end);
        part.map(|part| part.end)
    }

    /// Blocks of a device from `front` to the gap behind it that were not named yet.
    pub(super) fn left(&self, front: usize, device: usize) -> usize {
        let part = self.parts.iter().find(|part| front < part.end);
        let left = part.and_then(|part| part.left.get(device));
        left.map_or(0, |left| {
            left.len() - left.partition_point(|index| *index < front)
        })
    }
}

impl Part {
    fn pop(&mut self, backward: bool, has_room: impl Fn(usize) -> bool) -> Option<Load> {
        let left = self.left.iter().enumerate();
        let ends = left.filter(|(device, _)| has_room(*device));
        let (index, device) = match backward {
            true => ends
                .filter_map(|(at, left)| Some((*left.back()?, at)))
                .max(),
            false => ends
                .filter_map(|(at, left)| Some((*left.front()?, at)))
                .min(),
        }?;
        let left = self.left.get_mut(device)?;
        match backward {
            true => left.pop_back(),
            false => left.pop_front(),
        };
        Some(Load { index, device })
    }
}
