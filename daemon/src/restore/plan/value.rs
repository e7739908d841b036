//! What a stored form is worth: the seconds that restores take less for it.
//!
//! Upstairs:   whoever decides what to keep, by this per byte.
//! Downstairs: `plan`.
//!
//! The same costs decide what is written and how it is read, so that the two cannot disagree: under
//! a reader that computes from the front the first chunks are worth next to nothing, under one that
//! only takes a loaded prefix the last ones are.

use super::plan;
use super::request::{Invalid, PlanRequest, Variant};

/// Expected seconds saved by the variants that `kept` names (by chunk and layer), all of them
/// together: `reuse` expected restores, each as much faster as its plan is with them. The request
/// is one restore with everything that would be stored.
pub fn saved_s(
    request: &PlanRequest,
    reuse: f64,
    kept: impl Fn(usize, usize, &Variant) -> bool,
) -> Result<f64, Invalid> {
    let sound = reuse.is_finite() && reuse >= 0.0;
    if !sound {
        return Err(Invalid::Number {
            what: "expected restores",
        });
    }
    let with = plan(request)?;
    let mut without = request.clone();
    for (cell, variants) in without.cells.iter_mut().enumerate() {
        let (chunk, layer) = (cell / request.layers, cell % request.layers);
        variants.retain(|variant| !kept(chunk, layer, variant));
    }
    let without = plan(&without)?;
    Ok(reuse * (without.ttft_s - with.ttft_s).max(0.0))
}
