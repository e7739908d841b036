//! The tables of a profile as coding takes them, made when they are first asked for.
//!
//! Upstairs:   [`super`].
//! Downstairs: [`crate::profile`], [`super::product`], [`super::stream`].
//!
//! Not here on purpose: nothing of a part's own values.

use std::sync::{Arc, OnceLock};

use kvtier_proto::layout::PartCode;

use super::product::{PANEL, Panels};
use super::rotary::{AngleCache, Angles};
use super::stream::Coding;
use crate::profile::{Cross, LevelTables, Matrix16, PartTables, Profile, QUALITIES, Transform};
use crate::shape::PartShape;

/// Errors are declared to be at most so many standard deviations of what rounding makes: not one
/// in a part reaches it by chance.
const DEVIATIONS: f64 = 8.0;

/// A profile and what was made of it; all levels share one.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) profile: Arc<Profile>,
    pub(super) identity: u32,
    parts: Vec<PartKits>,
    angles: AngleCache,
}

#[derive(Debug)]
struct PartKits {
    plain: OnceLock<Kit>,
    crosses: [OnceLock<Kit>; QUALITIES],
}

/// What one transform is coded with.
#[derive(Debug)]
pub(super) struct Kit {
    pub(super) inverse: Panels,
    /// The weights of a prediction.
    pub(super) weights: Option<Panels>,
    forward: OnceLock<Vec<[f32; PANEL]>>,
    pub(super) levels: [Option<LevelKit>; QUALITIES],
}

/// What one level is coded with.
#[derive(Debug)]
pub(super) struct LevelKit {
    pub(super) coding: Coding,
    /// What one of a channel's sums stands for.
    pub(super) out_scale: Vec<f32>,
    /// What makes steps of a coefficient's sum.
    pub(super) in_scale: Vec<f32>,
    /// Largest error of a value, beside its rounding.
    pub(super) bound: f32,
}

/// The tables of a part at a level.
#[derive(Debug, Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) tables: &'a PartTables,
    pub(super) cross: Option<&'a Cross>,
    pub(super) kit: &'a Kit,
    pub(super) level: &'a LevelKit,
}

impl Shared {
    pub(super) fn new(profile: Arc<Profile>) -> Self {
        let kits = |_: &PartTables| PartKits {
            plain: OnceLock::new(),
            crosses: std::array::from_fn(|_| OnceLock::new()),
        };
        Self {
            identity: profile.identity(),
            parts: profile.parts.iter().map(kits).collect(),
            angles: AngleCache::default(),
            profile,
        }
    }

    /// Tables of a part of this shape, and their index.
    fn part(&self, shape: &PartShape) -> Option<(usize, &PartTables)> {
        let part = self.profile.part(shape.layer(), shape.code())?;
        let fits = part.heads == shape.heads() && part.channels() == shape.width() as usize;
        let of = |other: &PartTables| std::ptr::eq(other, part);
        fits.then_some((self.profile.parts.iter().position(of)?, part))
    }

    /// Which prediction a part has at a level, and its index; `None` where it is coded plainly.
    pub(super) fn cross(part: &PartTables, quality: usize) -> Option<(usize, &Cross)> {
        let serves =
            |(_, cross): &(usize, &Cross)| matches!(cross.levels.get(quality), Some(Some(_)));
        part.crosses.iter().enumerate().find(serves)
    }

    /// The prediction of a part of this shape.
    pub(super) fn cross_of(&self, shape: &PartShape, quality: usize) -> Option<&Cross> {
        let (_, part) = self.part(shape)?;
        Self::cross(part, quality).map(|(_, cross)| cross)
    }

    /// True when a part of this shape has tables for the level.
    pub(super) fn has(&self, shape: &PartShape, quality: usize, across: bool) -> bool {
        self.part(shape).is_some_and(|(_, part)| {
            matches!(part.plain.levels.get(quality), Some(Some(_)))
                || across && Self::cross(part, quality).is_some()
        })
    }

    /// The tables of a part of this shape at a level, across layers where there is such a table.
    pub(super) fn view(&self, shape: &PartShape, quality: usize, across: bool) -> Option<View<'_>> {
        let (at, tables) = self.part(shape)?;
        let kits = self.parts.get(at)?;
        let cross = Self::cross(tables, quality).filter(|_| across);
        let kit = match cross {
            Some((index, cross)) => kits.crosses.get(index)?.get_or_init(|| {
                let weights = Some(Panels::new(&cross.weights));
                Kit::new(&cross.transform, weights, &cross.levels)
            }),
            None => kits
                .plain
                .get_or_init(|| Kit::new(&tables.plain.transform, None, &tables.plain.levels)),
        };
        Some(View {
            tables,
            cross: cross.map(|(_, cross)| cross),
            kit,
            level: kit.levels.get(quality)?.as_ref()?,
        })
    }

    /// How a part's K is turned; `None` where it is not, or is coded as it is.
    pub(super) fn angles(&self, shape: &PartShape, code: PartCode) -> Option<Arc<Angles>> {
        let turned = code == PartCode::K && self.profile.k_after_rope;
        let rope = self.profile.rope.as_ref().filter(|_| turned)?;
        Some(self.angles.of(rope, shape))
    }
}

impl Kit {
    fn new(
        transform: &Transform,
        weights: Option<Panels>,
        levels: &[Option<LevelTables>; QUALITIES],
    ) -> Self {
        let level = |level: &Option<LevelTables>| {
            let level = level.as_ref()?;
            let scales = |matrix: &Matrix16, by: f32| {
                let scales = matrix.scale().iter();
                scales.map(|scale| scale * by).collect::<Vec<_>>()
            };
            Some(LevelKit {
                coding: Coding::new(level),
                out_scale: scales(&transform.inverse, level.step),
                in_scale: scales(&transform.forward, 1.0 / level.step),
                bound: bound(&transform.inverse, level.step),
            })
        };
        Self {
            inverse: Panels::new(&transform.inverse),
            weights,
            forward: OnceLock::new(),
            levels: levels.each_ref().map(level),
        }
    }

    /// The forward matrix in panels: of each coefficient of a panel, one channel's number.
    pub(super) fn forward(&self, view: &View<'_>) -> &[[f32; PANEL]] {
        self.forward.get_or_init(|| {
            let matrix = match view.cross {
                Some(cross) => &cross.transform.forward,
                None => &view.tables.plain.transform.forward,
            };
            let (rows, columns) = (matrix.rows(), matrix.columns());
            let number = |row, column| match row < rows {
                true => matrix.data().get(row * columns + column).copied(),
                false => None,
            };
            let panels = (0..rows).step_by(PANEL);
            let all = panels.flat_map(|first| (0..columns).map(move |column| (first, column)));
            let column = |(first, column)| {
                std::array::from_fn(|lane| f32::from(number(first + lane, column).unwrap_or(0)))
            };
            all.map(column).collect()
        })
    }
}

/// The largest error of a channel that rounding every coefficient leads to, in all likelihood.
fn bound(inverse: &Matrix16, step: f32) -> f32 {
    let rows = inverse.data().chunks_exact(inverse.columns());
    let variance = |(row, scale): (&[i16], &f32)| {
        let squares: i64 = row.iter().map(|n| i64::from(*n) * i64::from(*n)).sum();
        squares as f64 * f64::from(*scale) * f64::from(*scale)
    };
    let most = rows.zip(inverse.scale()).map(variance).fold(0.0, f64::max);
    // Finite, so that no infinite error is ever small enough.
    let bound = (DEVIATIONS * f64::from(step) * (most / 12.0).sqrt()).min(f32::MAX.into());
    #[expect(
        clippy::cast_possible_truncation,
        reason = "rounding to single precision is meant"
    )]
    let bound = bound as f32;
    bound
}
