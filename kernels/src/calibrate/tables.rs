//! What was found, as the tables of a profile.
//!
//! Upstairs:   [`super::calibrate`].
//! Downstairs: [`crate::profile`].
//!
//! Not here on purpose: no statistics. Numbers are rounded and put in their places.

use kvtier_proto::element::Element;

use super::algebra::narrow;
use super::cross::{Fit, Name, Tables, matrix16};
use super::metric::Basis;
use super::rate::Choice;
use super::run::{Coded, Found, Run};
use super::{CalibrateError, LevelReport, Model};
use crate::profile::{
    Cross, Input, LevelTables, Measured, PartTables, Plain, Profile, QUALITIES, Transform,
};

/// What stands for a KL that nobody predicted.
const NO_KL: f32 = -1.0;

/// The profile of everything that was found.
pub(super) fn profile(
    run: &Run<'_>,
    model: &Model,
    (found, plain, cross): (&[Found], &[Vec<Coded>], &[Vec<Fit>]),
    levels: &[LevelReport],
) -> Result<Profile, CalibrateError> {
    let mut parts = Vec::with_capacity(found.len());
    for (at, (part, coded)) in found.iter().zip(plain).enumerate() {
        let fits: Vec<_> = cross.iter().filter_map(|level| level.get(at)).collect();
        let (layer, code) = part.name;
        let tables = part_tables(run, part, coded, &fits);
        parts.push(tables.ok_or(CalibrateError::Singular { layer, code })?);
    }
    let measured = levels.iter().map(|level| Measured {
        level: level.target.level.0,
        bits: narrow(level.bits()),
        predicted_kl: level.kl().map_or(NO_KL, narrow),
        costs: costs(level),
    });
    let element = run.input.documents.first();
    let profile = Profile {
        model: model.name.clone(),
        revision: model.revision.clone(),
        weights_fingerprint: model.weights_fingerprint.clone(),
        element: element.map_or(Element::Bf16, |document| document.element()),
        rope: run.options.rope.clone(),
        k_after_rope: run.options.rope.is_some(),
        sinks: run.options.sinks,
        parts,
        measured: measured.collect(),
        exact: Vec::new(),
    };
    profile.check().map_err(CalibrateError::Profile)?;
    Ok(profile)
}

/// What each part costs; empty where none was predicted.
fn costs(level: &LevelReport) -> Vec<f32> {
    let each = level.parts.iter().map(|part| part.kl.map(narrow));
    each.collect::<Option<_>>().unwrap_or_default()
}

/// `None` when a number is not finite.
fn part_tables(run: &Run<'_>, part: &Found, coded: &[Coded], fits: &[&Fit]) -> Option<PartTables> {
    let (layer, code) = part.name;
    let mut plain_levels = [const { None }; QUALITIES];
    for (target, coded) in run.plain.iter().zip(coded) {
        let slot = plain_levels.get_mut(target.quality())?;
        *slot = Some(level_tables(coded.step, &coded.choice));
    }
    let mut crosses = Vec::new();
    for (target, fit) in run.cross.iter().zip(fits) {
        // A part without a prediction is coded with its plain tables there.
        let Some(tables) = &fit.tables else { continue };
        let mut levels = [const { None }; QUALITIES];
        let slot = levels.get_mut(target.quality())?;
        *slot = Some(level_tables(fit.step, &fit.choice));
        crosses.push(cross_tables(tables, levels)?);
    }
    let input = (!run.cross.is_empty()).then(|| Input {
        centre: part.centre.clone(),
        scale: part.scale.clone(),
    });
    Some(PartTables {
        layer: u32::try_from(layer).ok()?,
        code,
        heads: u32::try_from(part.heads).ok()?,
        dim: u32::try_from(part.dim).ok()?,
        input,
        plain: Plain {
            mean: part.mean.iter().copied().map(narrow).collect(),
            transform: transform(&part.basis)?,
            levels: plain_levels,
        },
        crosses,
    })
}

fn cross_tables(tables: &Tables, levels: [Option<LevelTables>; QUALITIES]) -> Option<Cross> {
    let need = |(layer, code): &Name| Some((u32::try_from(*layer).ok()?, *code));
    Some(Cross {
        needs: tables.needs.iter().map(need).collect::<Option<_>>()?,
        weights: tables.weights.clone(),
        bias: tables.bias.clone(),
        transform: transform(&tables.basis)?,
        levels,
    })
}

fn transform(basis: &Basis) -> Option<Transform> {
    Some(Transform {
        forward: matrix16(&basis.forward)?,
        inverse: matrix16(&basis.inverse)?,
    })
}

fn level_tables(step: f64, choice: &Choice) -> LevelTables {
    LevelTables {
        step: narrow(step),
        scales: choice.scales.clone(),
        predictor: choice.predictor.clone(),
    }
}
