//! The metric in which an error of a part is measured, and the transform that suits it.
//!
//! Upstairs:   the steps of [`super`].
//! Downstairs: [`super::algebra`].
//!
//! With Fisher matrices a head's metric is the root of `F + 0.1 trace(F) / dim * I`: the second
//! term keeps directions that the gradients never saw from being given away. Without, all
//! channels of a part count alike, and as much as the part's size: a part is divided by the root
//! mean square of what is left of it without its mean.
//!
//! Not here on purpose: no steps. They are the same number for every part of a level.

use kvtier_proto::layout::PartCode;
use nalgebra::DVector;

use super::algebra::{Matrix, Moments, eigen, roots};
use super::samples::Fisher;

/// How much of a head's mean sensitivity every direction of it has at least.
const FLOOR: f64 = 0.1;

/// How to measure errors of one part.
#[derive(Debug, Clone)]
pub(super) struct Metric {
    /// Symmetric, block diagonal over heads.
    root: Matrix,
    inverse: Matrix,
    /// Fisher matrix of the whole part without the floor; `None` where there are no gradients.
    fisher: Option<Matrix>,
}

/// Into coefficients and back, in the order of falling variance.
#[derive(Debug, Clone)]
pub(super) struct Basis {
    /// One row a coefficient. Unit of a coefficient: that of the metric.
    pub(super) forward: Matrix,
    /// One column a coefficient.
    pub(super) inverse: Matrix,
    /// What an error of one in a coefficient, squared, is expected to cost. Unit: nats.
    pub(super) cost: Option<DVector<f64>>,
}

impl Metric {
    /// All channels count alike.
    pub(super) fn flat(moments: &Moments) -> Self {
        let covariance = moments.covariance();
        let channels = covariance.nrows();
        let mean_square = covariance.trace() / channels.max(1) as f64;
        // A part that never changes has no size; any metric will do.
        let rms = if mean_square > 0.0 {
            mean_square.sqrt()
        } else {
            1.0
        };
        Self {
            root: Matrix::identity(channels, channels) / rms,
            inverse: Matrix::identity(channels, channels) * rms,
            fisher: None,
        }
    }

    /// That of the gradients.
    ///
    /// # Errors
    /// Index of the first head whose matrix is no sum of outer products, or is not there.
    pub(super) fn of(
        fisher: &Fisher,
        (layer, code): (usize, PartCode),
        (heads, dim): (usize, usize),
        least_trace: f64,
    ) -> Result<Self, usize> {
        let channels = heads * dim;
        let mut all = [(); 3].map(|()| Matrix::zeros(channels, channels));
        for head in 0..heads {
            let given = fisher.head(layer, code, head).ok_or(head)?;
            let given = Matrix::from_row_iterator(dim, dim, given.iter().copied().map(f64::from));
            // Sums of outer products are symmetric; files need not be, to the last bit.
            let plain = (&given + given.transpose()) / 2.0;
            let floor = FLOOR * plain.trace().max(least_trace) / dim.max(1) as f64;
            // Such a sum has no negative eigenvalue, beside what rounding left of it.
            let positive = &plain + Matrix::identity(dim, dim) * floor;
            let (root, inverse) = roots(positive, floor / 2.0).ok_or(head)?;
            let at = head * dim;
            for (whole, block) in all.iter_mut().zip([root, inverse, plain]) {
                whole.view_mut((at, at), (dim, dim)).copy_from(&block);
            }
        }
        let [root, inverse, fisher] = all;
        Ok(Self {
            root,
            inverse,
            fisher: Some(fisher),
        })
    }

    /// Karhunen-Loeve transform of samples with this covariance, in this metric. `None` when the
    /// eigenvalues are not found.
    pub(super) fn basis(&self, covariance: &Matrix) -> Option<Basis> {
        let (_, vectors) = eigen(&self.root * covariance * &self.root)?;
        let inverse = &self.inverse * &vectors;
        let cost = self.fisher.as_ref().map(|fisher| {
            let product = fisher * &inverse;
            let columns = inverse.column_iter().zip(product.column_iter());
            let cost: Vec<f64> = columns.map(|(a, b)| 0.5 * a.dot(&b).max(0.0)).collect();
            DVector::from_vec(cost)
        });
        Some(Basis {
            forward: vectors.transpose() * &self.root,
            inverse,
            cost,
        })
    }
}

/// The least trace that a head's matrix is taken to have: a head that the gradients never saw
/// still gets a metric that can be inverted.
pub(super) fn least_trace(
    fisher: &Fisher,
    layers: usize,
    shapes: &[(PartCode, usize, usize)],
) -> f64 {
    let (mut sum, mut heads_seen) = (0.0, 0_u32);
    for layer in 0..layers {
        for &(code, heads, dim) in shapes {
            for head in 0..heads {
                let matrix = fisher.head(layer, code, head).unwrap_or_default();
                let diagonal = matrix.iter().step_by(dim + 1);
                sum += diagonal.map(|value| f64::from(*value)).sum::<f64>();
                heads_seen += 1;
            }
        }
    }
    (1e-6 * sum / f64::from(heads_seen.max(1))).max(f64::MIN_POSITIVE.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: coefficients are uncorrelated, of falling variance, and an error of a coefficient
    // costs what the Fisher matrix says.
    // Method: two channels, a covariance and a metric that disagree; one head of two elements.
    #[test]
    fn basis_makes_coefficients_independent_in_the_metric_when_there_are_gradients() {
        let covariance = Matrix::from_row_slice(2, 2, &[3.0, 1.0, 1.0, 2.0]);
        let fisher = Matrix::from_row_slice(2, 2, &[0.5, -0.2, -0.2, 4.0]);
        let (root, inverse) = roots(fisher.clone(), 0.1).unwrap();
        let metric = Metric {
            root,
            inverse,
            fisher: Some(fisher),
        };
        let basis = metric.basis(&covariance).unwrap();
        let of_coefficients = &basis.forward * &covariance * basis.forward.transpose();
        assert!(of_coefficients[(0, 1)].abs() < 1e-12, "{of_coefficients}");
        assert!(of_coefficients[(0, 0)] > of_coefficients[(1, 1)]);
        assert!((&basis.forward * &basis.inverse - Matrix::identity(2, 2)).norm() < 1e-12);
        // In the metric of the gradients themselves every coefficient costs the same.
        let cost = basis.cost.unwrap();
        assert!(
            (cost[0] - 0.5).abs() < 1e-12 && (cost[1] - 0.5).abs() < 1e-12,
            "{cost}"
        );
    }

    #[test]
    fn flat_metric_gives_coefficients_a_mean_square_of_one() {
        let samples = super::super::algebra::Samples::from_fn(2, 8, |row, column| {
            [3.0, 8.0][row] * [1.0, -1.0][column % 2] + 1.0
        });
        let moments = Moments::of(&samples);
        let basis = Metric::flat(&moments).basis(&moments.covariance()).unwrap();
        let of_coefficients = &basis.forward * moments.covariance() * basis.forward.transpose();
        assert!(
            (of_coefficients.trace() - 2.0).abs() < 1e-9,
            "{of_coefficients}"
        );
    }
}
