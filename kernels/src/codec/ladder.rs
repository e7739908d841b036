//! Levels that code with the tables of a model: transparent, balanced and small, each plain and
//! predicted from the layers before.
//!
//! Upstairs:   [`crate::profile`] offers what calibration needs to know of the tables.
//! Downstairs: [`tables`] are the probabilities that all coefficients share.
//!
//! Not here on purpose: no choice of the numbers. Calibration makes them, see [`crate::profile`].

pub mod tables;
