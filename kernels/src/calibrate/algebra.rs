//! Linear algebra of calibration: moments, roots, eigenvectors, ridge regression.
//!
//! Upstairs:   the steps of [`super`].
//! Downstairs: `nalgebra`, in `f64`.
//!
//! A matrix of samples has one column a token, so that a token's channels lie side by side.
//!
//! Invariants kept here
//!   A1  The same samples in the same order give the same bits on the same machine: nothing here
//!       depends on threads or time. Products may round differently on another machine, where
//!       the library takes other instructions; tables are data, so decoding does not mind.
//!
//! Not here on purpose: no samples are read and nothing is decided.

use nalgebra::{Cholesky, DMatrix, DVector, SymmetricEigen};

/// Numbers of the statistics.
pub(super) type Matrix = DMatrix<f64>;
/// Samples: one column a token.
pub(super) type Samples = DMatrix<f32>;

/// Tokens that are multiplied at a time: bounds the copy in `f64`.
const CHUNK: usize = 1024;
/// Sweeps of the eigenvalue iteration for each row; a few are the rule.
const SWEEPS: usize = 100;

/// Count, sum and second moments of samples.
#[derive(Debug, Clone)]
pub(super) struct Moments {
    count: f64,
    sum: DVector<f64>,
    gram: Matrix,
}

impl Moments {
    pub(super) fn of(samples: &Samples) -> Self {
        let rows = samples.nrows();
        let mut all = Self {
            count: samples.ncols() as f64,
            sum: DVector::zeros(rows),
            gram: Matrix::zeros(rows, rows),
        };
        for block in chunks(samples) {
            all.sum += block.column_sum();
            all.gram.gemm(1.0, &block, &block.transpose(), 1.0);
        }
        all
    }

    /// Sum of all columns.
    pub(super) fn of_sum(samples: &Samples) -> DVector<f64> {
        let zero = DVector::zeros(samples.nrows());
        chunks(samples).fold(zero, |sum, block| sum + block.column_sum())
    }

    pub(super) fn mean(&self) -> DVector<f64> {
        &self.sum / self.count.max(1.0)
    }

    /// About the mean.
    pub(super) fn covariance(&self) -> Matrix {
        let mean = self.mean();
        &self.gram / self.count.max(1.0) - &mean * mean.transpose()
    }
}

/// The samples in `f64`, some columns at a time.
pub(super) fn chunks(samples: &Samples) -> impl Iterator<Item = Matrix> {
    let all = samples.ncols();
    (0..all).step_by(CHUNK).map(move |from| {
        samples
            .columns(from, CHUNK.min(all - from))
            .map(f64::from)
            .clone_owned()
    })
}

/// Sum over the tokens of the products of the channels of two parts: `A B^T`. A chunk is summed in
/// `f32`: exact where both are integers of 8 bits.
pub(super) fn product(a: &Samples, b: &Samples) -> Matrix {
    let mut sum = Matrix::zeros(a.nrows(), b.nrows());
    let mut one = Samples::zeros(a.nrows(), b.nrows());
    let all = a.ncols().min(b.ncols());
    for from in (0..all).step_by(CHUNK) {
        let len = CHUNK.min(all - from);
        let turned = b.columns(from, len).transpose();
        one.gemm(1.0, &a.columns(from, len), &turned, 0.0);
        sum.zip_apply(&one, |sum, one| *sum += f64::from(one));
    }
    sum
}

/// Eigenvalues of a symmetric matrix, falling, and their vectors as columns. `None` when the
/// iteration does not end, as with numbers that are not finite.
pub(super) fn eigen(symmetric: Matrix) -> Option<(DVector<f64>, Matrix)> {
    if !symmetric.iter().all(|value| value.is_finite()) {
        return None;
    }
    let sweeps = SWEEPS * symmetric.nrows().max(1);
    let found = SymmetricEigen::try_new(symmetric, f64::EPSILON, sweeps)?;
    let mut order: Vec<(usize, f64)> = found.eigenvalues.iter().copied().enumerate().collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1));
    let values = DVector::from_iterator(order.len(), order.iter().map(|(_, value)| *value));
    let columns: Vec<_> = order
        .iter()
        .map(|(at, _)| found.eigenvectors.column(*at))
        .collect();
    Some((values, Matrix::from_columns(&columns)))
}

/// The symmetric root of a matrix and the root's inverse. `None` where an eigenvalue is below
/// `least`, which is positive.
pub(super) fn roots(positive: Matrix, least: f64) -> Option<(Matrix, Matrix)> {
    let (values, vectors) = eigen(positive)?;
    if values.iter().any(|value| *value < least) {
        return None;
    }
    let power = |exponent: f64| {
        let scaled = values.map(|value| value.powf(exponent));
        let mut left = vectors.clone();
        for (mut column, scale) in left.column_iter_mut().zip(scaled.iter()) {
            column *= *scale;
        }
        left * vectors.transpose()
    };
    Some((power(0.5), power(-0.5)))
}

/// Weights `W` that make `|Y - W X|^2 + ridge |W|^2` least, given `X X^T` and `Y X^T`. The ridge
/// is one number an input. `None` when the inputs do not determine them.
pub(super) fn ridge(mut gram: Matrix, cross: &Matrix, ridge: &DVector<f64>) -> Option<Matrix> {
    for (at, more) in ridge.iter().enumerate() {
        *gram.get_mut((at, at))? += more;
    }
    let solved = Cholesky::new(gram)?.solve(&cross.transpose());
    Some(solved.transpose())
}

/// The nearest `f32`.
#[expect(clippy::cast_possible_truncation, reason = "rounding is the purpose")]
pub(super) fn narrow(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, values: &[f64]) -> Matrix {
        Matrix::from_row_slice(rows, values.len() / rows, values)
    }

    #[test]
    fn moments_are_those_of_all_columns_when_there_are_several_chunks() {
        let samples = Samples::from_fn(2, 2 * CHUNK + 2, |row, column| {
            [1.0, 3.0][column % 2] * [1.0, -1.0][row] + 5.0
        });
        let moments = Moments::of(&samples);
        assert_eq!(moments.mean().as_slice(), [7.0, 3.0]);
        let error = moments.covariance() - matrix(2, &[1.0, -1.0, -1.0, 1.0]);
        assert!(error.norm() < 1e-9, "{error}");
    }

    #[test]
    fn eigenvalues_fall_and_vectors_give_the_matrix_back() {
        let given = matrix(3, &[2.0, 1.0, 0.0, 1.0, 5.0, -1.0, 0.0, -1.0, 3.0]);
        let (values, vectors) = eigen(given.clone()).unwrap();
        assert!(values.as_slice().is_sorted_by(|a, b| a >= b), "{values}");
        let back = &vectors * Matrix::from_diagonal(&values) * vectors.transpose();
        assert!((back - given).norm() < 1e-12);
    }

    #[test]
    fn eigen_refuses_what_is_not_finite() {
        assert!(eigen(matrix(2, &[1.0, 0.0, 0.0, f64::NAN])).is_none());
    }

    #[test]
    fn root_times_root_is_the_matrix_and_times_its_inverse_is_one() {
        let given = matrix(2, &[4.0, 1.0, 1.0, 3.0]);
        let (root, inverse) = roots(given.clone(), 1.0).unwrap();
        assert!((&root * &root - &given).norm() < 1e-12);
        assert!((root * inverse - Matrix::identity(2, 2)).norm() < 1e-12);
        assert!(roots(given, 3.0).is_none(), "it has an eigenvalue below 3");
    }

    #[test]
    fn ridge_finds_the_weights_that_made_the_outputs() {
        let x = Samples::from_fn(3, 50, |row, column| ((row * 31 + column * 17) % 23) as f32);
        let x = x.map(f64::from);
        let weights = matrix(2, &[1.0, -2.0, 0.5, 0.0, 3.0, 1.0]);
        let y = &weights * &x;
        let (gram, cross) = (&x * x.transpose(), &y * x.transpose());
        let found = ridge(gram, &cross, &DVector::from_element(3, 1e-9)).unwrap();
        assert!((found - weights).norm() < 1e-6);
    }
}
