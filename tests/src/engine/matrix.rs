//! Dense products: the one place that touches the tensor library's arithmetic.
//!
//! Upstairs:   `layer`, `attention`, `model`.
//! Downstairs: `candle_core::Tensor`, whose f32 product picks SIMD kernels at run time.
//!
//! Invariant: a product's bits depend on its operands and their shape only. The library splits
//! rows and columns over threads, never the sum; a single row goes through our own loop, because
//! the library would read the weights of a decode step with one core.
//!
//! Not here on purpose: quantised products. Weights are dequantised once, at load.

use std::ops::Deref;

use candle_core::{CpuStorage, Device, Storage, Tensor};
use rayon::prelude::*;

use super::error::EngineError;
use super::math::dot;

/// Outputs that one task of a single-row product computes.
const ROW_TASK_OUTPUTS: usize = 64;

/// A matrix of activations, row major and whole.
#[derive(Debug)]
pub(super) struct Rows(Tensor);

impl Rows {
    pub(super) fn new(values: Vec<f32>, width: usize) -> Result<Self, EngineError> {
        let rows = values.len() / width;
        Ok(Self(Tensor::from_vec(values, (rows, width), &Device::Cpu)?))
    }

    /// Columns `from .. from + width` as an operand; copies nothing.
    pub(super) fn columns(&self, from: usize, width: usize) -> Result<Operand, EngineError> {
        Ok(Operand(self.0.narrow(1, from, width)?))
    }

    /// The values, row major.
    pub(super) fn values(&self) -> impl Deref<Target = [f32]> {
        Values(self.0.storage_and_layout().0)
    }

    /// `self * other`.
    pub(super) fn times(&self, other: &Operand) -> Result<Self, EngineError> {
        Ok(Self(self.0.matmul(&other.0)?))
    }

    /// `self * other` transposed.
    pub(super) fn times_transposed(&self, other: &Operand) -> Result<Self, EngineError> {
        Ok(Self(self.0.matmul(&other.0.t()?)?))
    }
}

/// A view that can stand on the right of a product.
#[derive(Debug)]
pub(super) struct Operand(Tensor);

/// Read access to the numbers of [`Rows`].
struct Values<G>(G);

impl<G: Deref<Target = Storage>> Deref for Values<G> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.0 {
            Storage::Cpu(CpuStorage::F32(values)) => values,
            // `Rows` is built from f32 on the CPU only.
            _ => &[],
        }
    }
}

/// A weight matrix `[outputs, inputs]`.
#[derive(Debug)]
pub(super) struct Weight {
    matrix: Rows,
    transposed: Operand,
    inputs: usize,
    outputs: usize,
}

impl Weight {
    pub(super) fn new(values: Vec<f32>, inputs: usize) -> Result<Self, EngineError> {
        let outputs = values.len() / inputs;
        let matrix = Rows::new(values, inputs)?;
        let transposed = Operand(matrix.0.t()?);
        Ok(Self {
            matrix,
            transposed,
            inputs,
            outputs,
        })
    }

    /// The weights themselves, one row an output.
    pub(super) fn values(&self) -> impl Deref<Target = [f32]> {
        self.matrix.values()
    }

    /// Width of what comes out.
    pub(super) const fn outputs(&self) -> usize {
        self.outputs
    }

    /// Applies the weights to every row of `input`.
    pub(super) fn apply(&self, input: Vec<f32>) -> Result<Rows, EngineError> {
        if input.len() != self.inputs {
            return Rows::new(input, self.inputs)?.times(&self.transposed);
        }
        let weights = self.values();
        let mut out = vec![0.0; self.outputs];
        out.par_chunks_mut(ROW_TASK_OUTPUTS)
            .zip(weights.par_chunks(ROW_TASK_OUTPUTS * self.inputs))
            .for_each(|(out, weights)| {
                for (out, row) in out.iter_mut().zip(weights.chunks_exact(self.inputs)) {
                    *out = dot(row, &input);
                }
            });
        Rows::new(out, self.outputs)
    }
}
