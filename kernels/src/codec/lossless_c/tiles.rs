//! Pieces of a part in which channels are coded one after the other.
//!
//! Upstairs:   [`super`].
//! Downstairs: [`crate::shape`]; [`crate::simd`] turns blocks.
//!
//! A tile is a run of values that lie together: some rows of all channels, head after head where
//! heads come first. Its symbols are coded class after class, in a class channel after channel,
//! of a channel row after row; a class is padded to whole steps of the coder.

use std::ops::Range;

use kvtier_proto::descriptor::PartOrder;

use crate::rans::LANES;
use crate::shape::PartShape;
use crate::simd::{self, BLOCK, ROWS};

/// Most values of a tile: their numbers have 16 bits.
pub(super) const TILE_VALUES: usize = 1 << 16;
/// Most channels that are told apart; a row of more is a run of values of one channel.
pub(super) const CHANNELS_MAX: usize = 1 << 14;
/// Most symbols of a tile with what pads its classes.
pub(super) const TILE_SYMBOLS: usize = TILE_VALUES + super::CLASSES_MAX * LANES;

/// Rows of some channels that lie together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tile {
    /// Number of its first value in the part.
    pub(super) first: usize,
    /// Its first channel.
    pub(super) channel: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl Tile {
    pub(super) const fn values(&self) -> usize {
        self.rows * self.columns
    }

    pub(super) const fn bytes(&self) -> Range<usize> {
        2 * self.first..2 * (self.first + self.values())
    }
}

/// Channels that a part of this shape has; 1 when they are too many to be told apart.
pub(super) const fn channels(shape: &PartShape) -> usize {
    let width = shape.width() as usize;
    if width > CHANNELS_MAX { 1 } else { width }
}

/// The tiles of a part of `channels` channels: as many as its shape has, or 1.
pub(super) fn tiles(shape: &PartShape, channels: usize) -> Vec<Tile> {
    let values = shape.raw_bytes() / 2;
    let heads = match shape.order() {
        PartOrder::HeadMajor if channels > 1 => shape.heads() as usize,
        _ => 1,
    };
    let columns = (channels / heads).max(1);
    let rows = values / heads / columns;
    let most = match TILE_VALUES / columns {
        few @ ..LANES => few.max(1),
        many => many - many % LANES,
    };
    let mut tiles = Vec::new();
    for head in 0..heads {
        for row in (0..rows).step_by(most) {
            tiles.push(Tile {
                first: (head * rows + row) * columns,
                channel: head * columns,
                rows: most.min(rows - row),
                columns,
            });
        }
    }
    tiles
}

/// Where the symbols of a tile stand when they are coded.
#[derive(Debug, Default)]
pub(super) struct Order {
    /// The first symbol of each channel of the tile.
    places: Vec<usize>,
    /// The symbols of each class, and how many of them are a channel's.
    runs: Vec<(Range<usize>, usize)>,
}

impl Order {
    /// The order of a tile whose channels are of these classes.
    pub(super) fn new(tile: &Tile, classes: &[u8], count: usize) -> Self {
        let mut sizes = [0; 256];
        for class in classes {
            if let Some(size) = sizes.get_mut(usize::from(*class)) {
                *size += tile.rows;
            }
        }
        let mut next = [0; 256];
        let (mut runs, mut first) = (Vec::with_capacity(count), 0);
        for (size, next) in sizes.into_iter().zip(&mut next).take(count) {
            let end = first + usize::next_multiple_of(size, LANES);
            runs.push((first..end, size));
            *next = first;
            first = end;
        }
        let mut place = |class: &u8| {
            let next = next.get_mut(usize::from(*class));
            next.map_or(0, |next| std::mem::replace(next, *next + tile.rows))
        };
        let places = classes.iter().map(&mut place).collect();
        Self { places, runs }
    }

    /// Symbols of each class, with what pads them, and how many they are without it.
    pub(super) fn runs(&self) -> &[(Range<usize>, usize)] {
        &self.runs
    }

    /// From rows to the order of coding; `masks` change the symbols of a channel.
    pub(super) fn to_columns(&self, tile: &Tile, rows: &[u8], masks: &[u8], columns: &mut [u8]) {
        let width = tile.columns;
        for (c, (places, masks)) in self.blocks(masks) {
            for r in (0..tile.rows).step_by(BLOCK) {
                let from = |at: usize| rows.get((r + at) * width + c..)?.first_chunk::<BLOCK>();
                if places.len() == BLOCK && r + BLOCK <= tile.rows {
                    let mut block = [[0; BLOCK]; BLOCK];
                    for (at, to) in block.iter_mut().enumerate() {
                        *to = from(at).copied().unwrap_or_default();
                    }
                    let mut turned = [[0; BLOCK]; BLOCK];
                    simd::turn(&block, &mut turned);
                    for ((row, place), mask) in turned.iter().zip(places).zip(masks) {
                        let to = columns.get_mut(place + r..);
                        if let Some(to) = to.and_then(<[u8]>::first_chunk_mut::<BLOCK>) {
                            *to = row.map(|symbol| symbol ^ mask);
                        }
                    }
                    continue;
                }
                for row in r..tile.rows.min(r + BLOCK) {
                    let from = rows.get(row * width + c..).unwrap_or_default();
                    for ((symbol, place), mask) in from.iter().zip(places).zip(masks) {
                        if let Some(to) = columns.get_mut(place + row) {
                            *to = symbol ^ mask;
                        }
                    }
                }
            }
        }
    }

    /// Back from the order of coding.
    pub(super) fn to_rows(&self, tile: &Tile, columns: &[u8], masks: &[u8], rows: &mut [u8]) {
        let width = tile.columns;
        for (c, (places, masks)) in self.blocks(masks) {
            for r in (0..tile.rows).step_by(ROWS) {
                let rows = rows.get_mut(r * width + c..).unwrap_or_default();
                if r + ROWS <= tile.rows
                    && let (Some(places), Some(masks)) = (places.first_chunk(), masks.first_chunk())
                {
                    let of = |place: usize| columns.get(place + r..)?.first_chunk();
                    let columns = places.map(|place| of(place).unwrap_or(&[0; ROWS]));
                    simd::turn_to_rows(&columns, masks, rows, width);
                    continue;
                }
                for (row, to) in (r..tile.rows.min(r + ROWS)).zip(rows.chunks_mut(width)) {
                    for ((to, place), mask) in to.iter_mut().zip(places).zip(masks) {
                        *to = columns.get(place + row).copied().unwrap_or(0) ^ mask;
                    }
                }
            }
        }
    }

    /// Blocks of channels: the first of each, places and masks.
    fn blocks<'a>(
        &'a self,
        masks: &'a [u8],
    ) -> impl Iterator<Item = (usize, (&'a [usize], &'a [u8]))> {
        let blocks = self.places.chunks(BLOCK).zip(masks.chunks(BLOCK));
        (0..).step_by(BLOCK).zip(blocks)
    }
}
