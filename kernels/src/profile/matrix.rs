//! Matrices of 16-bit integers with a scale a row, which every machine multiplies alike.
//!
//! Upstairs:   the tables of a profile; calibration makes them of real matrices.
//! Downstairs: nothing.
//!
//! Invariants kept here
//!   P2  Absolute values of a row sum to less than 2^24.
//!
//! Not here on purpose: no product. Where it runs decides how the numbers lie.

use super::ProfileError;

/// Most that the absolute values of a row sum to (P2).
pub const ROW_SUM_MAX: u32 = (1 << 24) - 1;

/// A matrix of integers. The number at row `i`, column `j` is `data[i * columns + j] * scale[i]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix16 {
    rows: usize,
    columns: usize,
    data: Vec<i16>,
    scale: Vec<f32>,
}

impl Matrix16 {
    /// The nearest matrix with 16-bit numbers, each row with the finest scale it can have. `values`
    /// lie row after row.
    ///
    /// ```
    /// use kvtier_kernels::profile::Matrix16;
    ///
    /// let matrix = Matrix16::quantise(&[0.5, -0.25, 0.0, 1e-9], 2, 2)?;
    /// assert!((matrix.value(0, 0) - 0.5).abs() < 1e-6);
    /// assert!((matrix.value(1, 1) - 1e-9).abs() < 1e-15);
    /// # Ok::<(), kvtier_kernels::profile::ProfileError>(())
    /// ```
    ///
    /// # Errors
    /// [`ProfileError`] when a value is not finite, or there are not `rows * columns` of them.
    pub fn quantise(values: &[f64], rows: usize, columns: usize) -> Result<Self, ProfileError> {
        let wrong = |got| ProfileError::length("matrix", got, rows.saturating_mul(columns));
        if rows.checked_mul(columns) != Some(values.len()) || columns == 0 {
            return Err(wrong(values.len()));
        }
        let mut data = Vec::with_capacity(values.len());
        let mut scale = Vec::with_capacity(rows);
        for row in values.chunks_exact(columns) {
            let most = row.iter().map(|v| v.abs()).fold(0.0, f64::max);
            let sum: f64 = row.iter().map(|v| v.abs()).sum();
            if !sum.is_finite() {
                return Err(ProfileError::number("matrix", sum, "finite numbers"));
            }
            // Each rounding may add a half to the sum.
            let room = f64::from(ROW_SUM_MAX) - columns as f64;
            let step = (most / f64::from(i16::MAX)).max(sum / room);
            let step = narrow(step);
            scale.push(step);
            let number = |value: &f64| match step > 0.0 {
                true => to_i16(value / f64::from(step)),
                false => 0,
            };
            data.extend(row.iter().map(number));
        }
        Self::new(rows, columns, data, scale)
    }

    /// [`Matrix16::quantise`] of numbers of single precision.
    ///
    /// # Errors
    /// Those of [`Matrix16::quantise`].
    pub fn quantise_f32(values: &[f32], rows: usize, columns: usize) -> Result<Self, ProfileError> {
        let values: Vec<f64> = values.iter().copied().map(f64::from).collect();
        Self::quantise(&values, rows, columns)
    }

    /// A matrix of these integers.
    ///
    /// # Errors
    /// [`ProfileError`] when lengths differ, a scale is negative or not finite, or a row's sum is
    /// too large (P2).
    pub fn new(
        rows: usize,
        columns: usize,
        data: Vec<i16>,
        scale: Vec<f32>,
    ) -> Result<Self, ProfileError> {
        let want = rows.saturating_mul(columns);
        if data.len() != want || columns == 0 {
            return Err(ProfileError::length("matrix", data.len(), want));
        }
        if scale.len() != rows {
            return Err(ProfileError::length("matrix scale", scale.len(), rows));
        }
        for number in &scale {
            if !(number.is_finite() && *number >= 0.0) {
                let got = f64::from(*number);
                return Err(ProfileError::number("matrix scale", got, "0 and above"));
            }
        }
        for row in data.chunks_exact(columns) {
            let sum: u64 = row.iter().map(|v| u64::from(v.unsigned_abs())).sum();
            if sum > ROW_SUM_MAX.into() {
                let want = "at most 16777215";
                return Err(ProfileError::number(
                    "sum of a matrix row",
                    sum as f64,
                    want,
                ));
            }
        }
        Ok(Self {
            rows,
            columns,
            data,
            scale,
        })
    }

    /// Rows.
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub const fn columns(&self) -> usize {
        self.columns
    }

    /// The integers, row after row.
    pub fn data(&self) -> &[i16] {
        &self.data
    }

    /// What one step of each row stands for.
    pub fn scale(&self) -> &[f32] {
        &self.scale
    }

    /// The real number that stands at a place; 0 outside.
    pub fn value(&self, row: usize, column: usize) -> f64 {
        if column >= self.columns {
            return 0.0;
        }
        let number = self.data.get(row * self.columns + column);
        let scale = self.scale.get(row);
        number.map_or(0.0, |n| f64::from(*n)) * scale.map_or(0.0, |s| f64::from(*s))
    }
}

/// The nearest single-precision number that is no less, so that what is divided by it fits.
fn narrow(step: f64) -> f32 {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "rounding to single precision is meant"
    )]
    let near = step as f32;
    // A number with too few bits left would make a coarse row of a tiny one.
    match near {
        near if near < f32::MIN_POSITIVE => 0.0,
        near if f64::from(near) < step => near.next_up(),
        near => near,
    }
}

fn to_i16(value: f64) -> i16 {
    let most = f64::from(i16::MAX);
    #[expect(clippy::cast_possible_truncation, reason = "clamped")]
    let number = value.round_ties_even().clamp(-most, most) as i16;
    number
}
