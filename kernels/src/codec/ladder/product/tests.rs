//! Tests of products: every path makes the sums that are defined.
#![allow(
    clippy::indexing_slicing,
    reason = "test data is cut to size on purpose"
)]

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::simd::{Path, ladder};

/// Sums of the tokens with each row, as they are defined.
fn sums(matrix: &Matrix16, tokens: &[Vec<i16>]) -> Vec<Vec<i32>> {
    let rows = || matrix.data().chunks(matrix.columns());
    let sum = |row: &[i16], token: &[i16]| {
        let products = row.iter().zip(token);
        products.fold(0_i32, |sum, (a, b)| {
            sum.wrapping_add(i32::from(*a) * i32::from(*b))
        })
    };
    let of = |token: &Vec<i16>| rows().map(|row| sum(row, token)).collect();
    tokens.iter().map(of).collect()
}

// Goal: T2 for numbers of one byte, of two, and of those that no byte with a sign and another
// make, in shapes that fill no panel, no tile and no square.
// Method: a matrix is made on each path and multiplied on each, so that each form is also made of
// the other.
#[test]
fn sums_are_exact_on_every_path() {
    let mut random = ChaCha8Rng::seed_from_u64(5);
    for most in [127, 128, 0x7f7f, i16::MAX] {
        for (rows, columns) in [(1, 1), (36, 36), (32, 63), (192, 192), (70, 200)] {
            let mut numbers = |most: i16, count: usize| -> Vec<i16> {
                let edge = |random: &mut ChaCha8Rng| match random.random_range(0..8) {
                    0 => most,
                    1 => -most - 1,
                    _ => random.random_range(-most..=most),
                };
                (0..count).map(|_| edge(&mut random)).collect()
            };
            let data = numbers(i16::MAX, rows * columns);
            let matrix = Matrix16::new(rows, columns, data, vec![1.0; rows]).unwrap();
            let tokens: Vec<_> = (0..2 * TILE).map(|_| numbers(most, columns)).collect();
            let pairs = columns.div_ceil(2);
            let mut words = vec![0; pairs * 2 * TILE];
            for (at, token) in tokens.iter().enumerate() {
                for (pair, both) in token.chunks(2).enumerate() {
                    let high = both.get(1).copied().unwrap_or(0);
                    words[pair * 2 * TILE + at] = word(both[0], high);
                }
            }
            let with = Operand {
                words: &words,
                pair_stride: 2 * TILE,
                tile_stride: TILE,
                pairs,
            };
            let want = sums(&matrix, &tokens);
            for made in Path::available() {
                let panels = made.at_most(|| Panels::new(&matrix));
                for path in Path::available() {
                    let mut out = Vec::new();
                    path.at_most(|| ladder::product(&panels, &with, 1, &mut out));
                    for (token, want) in want[TILE..].iter().enumerate() {
                        let got = out.iter().flat_map(|panel| panel[token]).take(rows);
                        assert!(got.eq(want.iter().copied()), "{path:?} {rows} {columns}");
                    }
                }
            }
        }
    }
}
