//! Tests of the inner loop against the sum it stands for.

use pulp::{Arch, WithSimd};

use super::*;

struct Product<'a> {
    left: Left<'a>,
    panels: &'a [Vec<f32>],
    out: Out<'a>,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        multiply_add(
            simd,
            self.left,
            self.panels.iter().map(Vec::as_slice),
            &mut self.out,
        );
    }
}

/// A number that depends on all three, small enough to sum exactly.
fn number(a: usize, b: usize, salt: usize) -> f32 {
    u8::try_from((a * 31 + b * 17 + salt) % 13).map_or(0.0, f32::from) - 6.0
}

fn product(rows: usize, depth: usize, columns: usize) -> Vec<f32> {
    let (stride, out_stride) = (depth + 3, columns + 2);
    let values: Vec<f32> = (0..rows * stride)
        .map(|i| number(i / stride, i % stride, 1))
        .collect();
    let panel = |p: usize| {
        (0..depth * PANEL)
            .map(|i| number(i / PANEL, p * PANEL + i % PANEL, 2))
            .collect()
    };
    let panels: Vec<Vec<f32>> = (0..columns.div_ceil(PANEL)).map(panel).collect();
    let mut values_out = vec![0.5; rows * out_stride];
    let left = Left {
        values: &values,
        stride,
        depth,
    };
    let out = Out {
        values: &mut values_out,
        stride: out_stride,
        columns,
    };
    Arch::new().dispatch(Product {
        left,
        panels: &panels,
        out,
    });
    values_out
}

#[test]
fn multiply_add_is_exact_for_whole_numbers_of_every_remainder() {
    for rows in 1..=13 {
        for (depth, columns) in [(1, 1), (7, 16), (40, 33), (300, 17)] {
            let out = product(rows, depth, columns);
            for (i, got) in out.iter().enumerate() {
                let (row, column) = (i / (columns + 2), i % (columns + 2));
                let sum: f32 = (0..depth)
                    .map(|d| number(row, d, 1) * number(d, column, 2))
                    .sum();
                let expected = if column < columns { 0.5 + sum } else { 0.5 };
                assert_eq!(*got, expected, "{rows}x{depth}x{columns} at {row},{column}");
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_others() {
    let panels: Vec<Vec<f32>> = vec![(0..600 * PANEL).map(|i| (i as f32).sin()).collect(); 2];
    let values: Vec<f32> = (0..7 * 600).map(|i| (i as f32).cos()).collect();
    let run = |values: &[f32]| {
        let mut out = vec![0.0; values.len() / 600 * 20];
        let left = Left {
            values,
            stride: 600,
            depth: 600,
        };
        let into = Out {
            values: &mut out,
            stride: 20,
            columns: 20,
        };
        Arch::new().dispatch(Product {
            left,
            panels: &panels,
            out: into,
        });
        out
    };
    let together = run(&values);
    for (row, values) in values.chunks(600).enumerate() {
        assert_eq!(run(values), together[row * 20..(row + 1) * 20]);
    }
}
