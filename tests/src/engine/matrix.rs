//! Weight matrices, packed once, and their products with rows of activations.
//!
//! Upstairs:   `layer`, `model`.
//! Downstairs: `kernel` multiplies; `rayon` lends the cores.
//!
//! Invariant E3: how rows and columns are dealt to threads changes no bit of the result.
//!
//! Not here on purpose: quantised products. Weights are dequantised once, at load.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::kernel::{Left, Out, PANEL, multiply_add};

/// Panels that one task of a single-row product takes.
const ROW_TASK_PANELS: usize = 4;

/// Rows of a task are a multiple of this, so that few tasks end in a partial block.
const ROWS_STEP: usize = 6;

/// A weight matrix `[outputs, inputs]`, packed in panels of outputs.
#[derive(Debug)]
pub(super) struct Weight {
    panels: Vec<f32>,
    inputs: usize,
    outputs: usize,
}

impl Weight {
    /// Packs `values`, row major `[outputs, inputs]`.
    pub(super) fn new(values: &[f32], inputs: usize) -> Self {
        let outputs = values.len() / inputs;
        let mut panels = vec![0.0; outputs.div_ceil(PANEL) * inputs * PANEL];
        panels
            .par_chunks_mut(inputs * PANEL)
            .zip(values.par_chunks(inputs * PANEL))
            .for_each(|(panel, rows)| {
                for (column, row) in rows.chunks_exact(inputs).enumerate() {
                    let places = panel.iter_mut().skip(column).step_by(PANEL);
                    places.zip(row).for_each(|(place, value)| *place = *value);
                }
            });
        Self {
            panels,
            inputs,
            outputs,
        }
    }

    /// Width of what comes out.
    pub(super) const fn outputs(&self) -> usize {
        self.outputs
    }

    /// Adds the weights of one output to the end of `into`.
    #[expect(
        clippy::indexing_slicing,
        reason = "an output too many must not pass for nothing"
    )]
    pub(super) fn append_row(&self, output: usize, into: &mut Vec<f32>) {
        let panel = &self.panels[output / PANEL * PANEL * self.inputs..][..PANEL * self.inputs];
        into.extend(panel.iter().skip(output % PANEL).step_by(PANEL));
    }

    /// The same weights with inputs and outputs exchanged: what gradients pass on their way back.
    pub(super) fn transposed(&self) -> Self {
        let mut values = Vec::with_capacity(self.inputs * self.outputs);
        for input in 0..self.inputs {
            let places = self.panels.chunks_exact(PANEL).skip(input);
            let of_input = places.step_by(self.inputs).flatten();
            values.extend(of_input.take(self.outputs));
        }
        Self::new(&values, self.outputs)
    }

    /// Applies the weights to every row of `input`.
    pub(super) fn apply(&self, input: &[f32]) -> Vec<f32> {
        let rows = input.len() / self.inputs;
        let mut out = vec![0.0; rows * self.outputs];
        if rows == 1 {
            let panels = self
                .panels
                .par_chunks(ROW_TASK_PANELS * self.inputs * PANEL);
            out.par_chunks_mut(ROW_TASK_PANELS * PANEL)
                .zip(panels)
                .for_each(|(out, panels)| self.run(input, panels, out));
        } else {
            // One task a core: every task reads all weights, so more tasks only read more.
            let share = rows
                .div_ceil(rayon::current_num_threads())
                .next_multiple_of(ROWS_STEP);
            out.par_chunks_mut(share * self.outputs)
                .zip(input.par_chunks(share * self.inputs))
                .for_each(|(out, input)| self.run(input, &self.panels, out));
        }
        out
    }

    /// Applies only the weights of the outputs from `first` on: the same bits that
    /// [`Weight::apply`] has there.
    pub(super) fn apply_from(&self, input: &[f32], first: usize) -> Vec<f32> {
        let rows = input.len() / self.inputs;
        let skipped = first / PANEL;
        let panels = self.panels.get(skipped * self.inputs * PANEL..);
        let panels = panels.unwrap_or_default();
        // Panels are taken whole: the first may begin before the first output asked for.
        let (width, before) = (self.outputs - skipped * PANEL, first % PANEL);
        let mut out = vec![0.0; rows * width];
        let share = rows.div_ceil(rayon::current_num_threads());
        out.par_chunks_mut(share.max(1) * width)
            .zip(input.par_chunks(share.max(1) * self.inputs))
            .for_each(|(out, input)| self.run(input, panels, out));
        if before > 0 {
            let rows = out.chunks_exact(width);
            return rows
                .flat_map(|row| row.iter().skip(before))
                .copied()
                .collect();
        }
        out
    }

    /// Whole rows of `input` times some panels; `out` has just their columns.
    fn run(&self, input: &[f32], panels: &[f32], out: &mut [f32]) {
        let columns = out.len() / (input.len() / self.inputs);
        Arch::new().dispatch(Product {
            left: Left {
                values: input,
                stride: self.inputs,
                depth: self.inputs,
            },
            panels,
            out: Out {
                values: out,
                stride: columns,
                columns,
            },
        });
    }
}

struct Product<'a> {
    left: Left<'a>,
    panels: &'a [f32],
    out: Out<'a>,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let panels = self.panels.chunks_exact(self.left.depth * PANEL);
        multiply_add(simd, self.left, panels, &mut self.out);
    }
}
