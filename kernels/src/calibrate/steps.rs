//! Targets of the levels, and the step that meets one.
//!
//! Upstairs:   [`super`].
//! Downstairs: nothing.
//!
//! With gradients a level has a target KL, and one step in units of the metric serves all parts:
//! an error of a coefficient then costs the same wherever it is. Without, the step is a part of
//! each layer's size, from measurements on one model.
//!
//! What gradients predict is less than what a model shows. The Fisher matrices both choose where
//! errors go and say what they cost, tables fit the samples better than other text, and large
//! errors may cost more than their second order; how much each of these does is not known. How
//! many times more it is in all was measured with documents that are neither learnt from nor
//! judged, and stands beside each level as its optimism: a target is the KL to expect of a model.
//!
//! Not here on purpose: no samples. Costs of steps come in as numbers.

use kvtier_proto::Level;

use crate::profile::QUALITIES;

/// Steps on the grid of a target, each this much of the one before.
const RATIO: f64 = 1.189_207_115_002_721; // 2^(1/4)
/// Steps below and above the first guess.
const BELOW: i32 = 6;
const ABOVE: i32 = 30;

/// What a level aims at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Target {
    /// The level.
    pub level: Level,
    /// KL of the continuation to expect. Unit: nats a token. Used with gradients.
    pub kl: f64,
    /// How many times the KL that gradients predict is to be expected.
    pub optimism: f64,
    /// Step as a part of a layer's root mean square. Used without gradients.
    pub step_of_rms: f64,
}

/// KL to aim at: three tenths less than what the levels promise, because documents differ: on those
/// that set the optimism the mean is 1.5 to 2.4 times the median.
const KL: [f64; QUALITIES] = [9.1e-5, 7.0e-4, 7.0e-3];

/// Names of the levels that calibration makes tables for, their KL, optimism and step of a layer's
/// size. The optimism is that of one model of 30 layers; docs/LEVELS.md says how it was measured.
const LEVELS: [(&str, Level, f64, f64, f64); 6] = [
    ("transparent", Level::TRANSPARENT, KL[0], 1.7, 0.055),
    ("balanced", Level::BALANCED, KL[1], 1.1, 0.17),
    ("small", Level::SMALL, KL[2], 2.4, 0.5),
    ("transparent_x", Level::TRANSPARENT_X, KL[0], 1.3, 0.055),
    ("balanced_x", Level::BALANCED_X, KL[1], 1.15, 0.17),
    ("small_x", Level::SMALL_X, KL[2], 1.25, 0.5),
];

impl Target {
    /// The usual targets of all levels, by rising level.
    pub fn all() -> Vec<Self> {
        let of = |(_, level, kl, optimism, step_of_rms): &(_, _, _, _, _)| Self {
            level: *level,
            kl: *kl,
            optimism: *optimism,
            step_of_rms: *step_of_rms,
        };
        LEVELS.iter().map(of).collect()
    }

    /// The usual target of the level of this name, with `-` or `_`.
    ///
    /// ```
    /// use kvtier_kernels::calibrate::Target;
    ///
    /// assert_eq!(Target::of("balanced_x").map(|target| target.kl), Some(7.0e-4));
    /// assert_eq!(Target::of("lossless"), None);
    /// ```
    pub fn of(name: &str) -> Option<Self> {
        let name = name.replace('-', "_");
        Self::all().into_iter().find(|target| target.name() == name)
    }

    /// Name of the level.
    pub fn name(&self) -> &'static str {
        let found = LEVELS.iter().find(|(_, level, ..)| *level == self.level);
        found.map_or("?", |(name, ..)| name)
    }

    /// True for a level that predicts from the layers before.
    pub fn is_cross(&self) -> bool {
        self.level >= Level::TRANSPARENT_X
    }

    /// Which of transparent, balanced and small it is.
    pub(super) fn quality(&self) -> usize {
        let at = LEVELS
            .iter()
            .position(|(_, level, ..)| *level == self.level);
        at.map_or(0, |at| at % QUALITIES)
    }

    /// What gradients must predict. Unit: nats a token.
    pub(super) fn predicted_kl(&self) -> f64 {
        self.kl / self.optimism
    }

    /// The plain level of the same target.
    pub(super) fn plain(&self) -> Self {
        let of = LEVELS.get(self.quality());
        Self {
            level: of.map_or(self.level, |(_, level, ..)| *level),
            optimism: of.map_or(self.optimism, |(_, _, _, optimism, _)| *optimism),
            ..*self
        }
    }

    /// Steps to try: around the one that would meet the target if every error were of uniform
    /// rounding and `coefficients` of them counted.
    pub(super) fn grid(&self, coefficients: usize) -> Vec<f64> {
        let first = (24.0 * self.predicted_kl() / coefficients.max(1) as f64).sqrt();
        let each = -BELOW..=ABOVE;
        each.map(|at| first * RATIO.powi(at)).collect()
    }
}

/// Where a curve of costs over rising steps meets `target`, on straight lines between logarithms.
/// `None` when it does not.
pub(super) fn meet(steps: &[f64], costs: &[f64], target: f64) -> Option<f64> {
    let points = || steps.iter().copied().zip(costs.iter().copied());
    let (below, above) = points()
        .zip(points().skip(1))
        .find(|(below, above)| below.1 <= target && target <= above.1)?;
    let rise = (above.1 / below.1).ln();
    let part = match rise > 0.0 {
        true => (target / below.1).ln() / rise,
        false => 0.0,
    };
    Some(below.0 * (above.0 / below.0).powf(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meet_finds_the_step_between_two_points_when_costs_are_a_power() {
        let steps = [1.0, 2.0, 4.0];
        let costs = steps.map(|step: f64| 0.1 * step.powi(2));
        let step = meet(&steps, &costs, 0.9).unwrap();
        assert!((step - 3.0).abs() < 1e-9, "{step}");
        assert_eq!(meet(&steps, &costs, 1.7), None);
        assert_eq!(meet(&steps, &costs, 0.05), None);
    }

    #[test]
    fn grid_holds_the_step_of_uniform_errors() {
        let target = Target::of("small").unwrap();
        let grid = target.grid(1000);
        let cost = |step: &f64| 1000.0 * 0.5 * step * step / 12.0;
        let costs: Vec<f64> = grid.iter().map(cost).collect();
        let step = meet(&grid, &costs, target.kl).unwrap();
        assert!((cost(&step) - target.kl).abs() < 1e-9, "{step}");
    }
}
