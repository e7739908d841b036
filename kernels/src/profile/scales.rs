//! Scale indices: which table of probabilities a coefficient is coded with.
//!
//! Upstairs:   calibration chooses one for each coefficient and level.
//! Downstairs: the logistic tables of [`crate::codec::ladder`].
//!
//! Index `i` is for coefficients whose rounded values have a standard deviation about
//! `2^((i - 6) / 2)` steps: half an octave an index. Above [`TABLES`] the low bits of a value are
//! stored as they are and the rest is coded with one of the two widest tables.
//!
//! Not here on purpose: no fit. Several indices are tried on data, see [`choose`].

pub use crate::codec::ladder::tables::{TABLES, bits, choose};

/// Largest scale index.
pub const SCALE_MAX: u8 = 28;
/// Index of a coefficient that is always 0. Others are possible, at 6 bytes each.
pub const DEAD: u8 = u8::MAX;

/// Standard deviation that an index is made for. Unit: steps.
pub fn sigma(index: u8) -> f64 {
    libm::exp2((f64::from(index) - 6.0) / 2.0)
}

/// Index whose standard deviation is nearest to `sigma` steps.
pub fn nearest(sigma: f64) -> u8 {
    let index = (2.0 * libm::log2(sigma) + 6.0).round();
    let most = f64::from(SCALE_MAX);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped; what is no number becomes 0"
    )]
    let index = index.clamp(0.0, most) as u8;
    index
}
