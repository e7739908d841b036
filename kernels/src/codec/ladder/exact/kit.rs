//! The tables of a part as coding takes them, in blocks of channels.
//!
//! Upstairs:   [`super`].
//! Downstairs: [`crate::profile::exact`], [`super::super::product`].
//!
//! Not here on purpose: nothing of a part's own values.

use crate::codec::ladder::cells::{Table, all, power};
use crate::codec::ladder::product::{PANEL, Panels};
use crate::profile::exact::{PAIR, WITHIN, order};
use crate::profile::{ExactTables, Matrix16, Profile};

/// Pairs of channels of a block.
pub(super) const PAIRS: usize = WITHIN / 2;

const _: () = assert!(WITHIN == PANEL && PAIR == 3);

/// What one part is coded with.
#[derive(Debug)]
pub(super) struct Kit {
    /// Channel at each place of the order of coding.
    pub(super) order: Vec<usize>,
    /// How each channel is read where it predicts others, in the order of channels.
    pub(super) centre: Vec<f32>,
    pub(super) reciprocal: Vec<f32>,
    pub(super) blocks: Vec<Block>,
}

/// What one block of channels is coded with. Places beyond the last channel are 0.
#[derive(Debug)]
pub(super) struct Block {
    /// Place of its first row in the order of coding.
    pub(super) first: usize,
    /// Pairs that are there.
    pub(super) pairs: usize,
    /// Weights of all that came before; `None` where nothing did.
    pub(super) weights: Option<Panels>,
    pub(super) scale: [f32; WITHIN],
    pub(super) bias: [f32; WITHIN],
    /// What a row takes of the errors of the rows before.
    pub(super) within: [[f32; WITHIN]; WITHIN],
    /// Pair of RoPE, where there is one.
    pub(super) turned: [Option<usize>; PAIRS],
    pub(super) spread: [Spread; PAIRS],
    pub(super) steps: [i32; WITHIN],
    /// Cells in 1.
    pub(super) per_step: [f32; WITHIN],
    pub(super) tables: [&'static Table; WITHIN],
    pub(super) centre: [f32; WITHIN],
    pub(super) reciprocal: [f32; WITHIN],
}

/// Errors of two channels that RoPE turns together.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Spread {
    first: f32,
    second: f32,
    both: f32,
    /// What a variance is at least.
    least: f32,
}

impl Spread {
    fn new([first, second, both]: [f32; PAIR]) -> Self {
        Self {
            first,
            second,
            both,
            least: (first + second) * 1e-6,
        }
    }

    /// What an error of the first of the two, after turning them, says of the second.
    #[inline(always)]
    pub(super) fn slope(&self, c: f32, s: f32) -> f32 {
        let (cc, ss, cs) = (c * c, s * s, c * s);
        let variance = cc * self.first - (cs + cs) * self.both + ss * self.second;
        let together = cs * (self.first - self.second) + (cc - ss) * self.both;
        let variance = if variance > self.least {
            variance
        } else {
            self.least
        };
        together / variance
    }
}

impl Kit {
    /// The kit of a part; `None` when the tables are none of a profile.
    pub(super) fn new(profile: &Profile, part: &ExactTables) -> Option<Self> {
        let places = order(
            profile.turned(part.code),
            (part.heads as usize, part.dim as usize),
        );
        let needed = part.weights.columns().checked_sub(part.channels())?;
        let reciprocal = part.input.scale.iter().map(|scale| 1.0 / scale).collect();
        let mut kit = Self {
            order: places.iter().map(|(channel, _)| *channel).collect(),
            centre: part.input.centre.clone(),
            reciprocal,
            blocks: Vec::new(),
        };
        for first in (0..part.channels()).step_by(WITHIN) {
            let own = places.get(first..)?;
            let block = Block::new(part, (first, needed), own, &kit)?;
            kit.blocks.push(block);
        }
        Some(kit)
    }
}

impl Block {
    fn new(
        part: &ExactTables,
        (first, needed): (usize, usize),
        places: &[(usize, Option<usize>)],
        kit: &Kit,
    ) -> Option<Self> {
        let rows = places.len().min(WITHIN);
        let before = needed + first;
        let weights = match before {
            0 => None,
            _ => Some(Panels::new(&cut(&part.weights, (first, rows), before)?)),
        };
        let row = |at: usize| (at < rows).then_some(first + at);
        let float = |list: &[f32], at: Option<usize>| {
            let number = at.and_then(|at| list.get(at));
            number.copied().unwrap_or(0.0)
        };
        let at = |list: &[f32], lane| float(list, row(lane));
        let channel = |lane: usize| Some(places.get(lane).filter(|_| lane < rows)?.0);
        let steps = std::array::from_fn(|lane| {
            let step = row(lane).and_then(|at| part.steps.get(at));
            step.copied().map_or(0, i32::from)
        });
        let table = |lane| {
            let table = row(lane).and_then(|at| part.tables.get(at)).copied();
            all().get(usize::from(table.unwrap_or(0)))
        };
        let [first_table, ..] = all();
        Some(Self {
            first,
            pairs: rows / 2,
            weights,
            scale: std::array::from_fn(|lane| at(part.weights.scale(), lane)),
            bias: std::array::from_fn(|lane| at(&part.bias, lane)),
            within: std::array::from_fn(|lane| {
                let own = row(lane).map(|at| at * WITHIN);
                std::array::from_fn(|other| float(&part.within, own.map(|own| own + other)))
            }),
            turned: std::array::from_fn(|pair| places.get(2 * pair)?.1),
            spread: std::array::from_fn(|pair| {
                let pairs = part.pairs.as_chunks::<PAIR>().0;
                let own = pairs.get(first / 2 + pair);
                Spread::new(own.copied().unwrap_or([1.0, 1.0, 0.0]))
            }),
            steps,
            per_step: steps.map(|step| power(-step)),
            tables: std::array::from_fn(|lane| table(lane).unwrap_or(first_table)),
            centre: std::array::from_fn(|lane| float(&kit.centre, channel(lane))),
            reciprocal: std::array::from_fn(|lane| float(&kit.reciprocal, channel(lane))),
        })
    }
}

/// Some rows of a matrix, and its first columns.
fn cut(matrix: &Matrix16, (first, rows): (usize, usize), columns: usize) -> Option<Matrix16> {
    let all = matrix.data().chunks_exact(matrix.columns());
    let mut data = Vec::with_capacity(rows * columns);
    for row in all.skip(first).take(rows) {
        data.extend(row.get(..columns)?);
    }
    let scale = matrix.scale().get(first..first + rows)?.to_vec();
    Matrix16::new(rows, columns, data, scale).ok()
}
