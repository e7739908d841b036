//! A small profile for fuzz targets and tests, the same on every machine, and the target that
//! reads profiles.
//!
//! Upstairs:   [`super`], tests of the levels with tables.
//! Downstairs: [`crate::profile`].
//!
//! Not here on purpose: no statistics. Its matrices are reflections, its scales a falling row.

use kvtier_proto::element::Element;
use kvtier_proto::layout::PartCode;

use crate::profile::exact::{PAIR, WITHIN};
use crate::profile::{
    Cross, ExactTables, Input, LevelTables, Matrix16, Measured, PartTables, Plain, Profile,
    ProfileError, QUALITIES, Rope, TokenPredictor, Transform, scales,
};

/// A profile of so many layers of these heads, with every kind of table. V has as many channels
/// as K.
///
/// # Errors
/// [`ProfileError`] when the numbers are no shape of a part.
pub fn fixture(layers: u32, heads: u32, dim: u32) -> Result<Profile, ProfileError> {
    let mut parts = Vec::new();
    for layer in 0..layers {
        for code in [PartCode::K, PartCode::V] {
            parts.push(part((layer, code), heads, dim)?);
        }
    }
    let profile = Profile {
        model: "fixture".to_owned(),
        revision: "1".to_owned(),
        weights_fingerprint: vec![1, 2, 3],
        element: Element::Bf16,
        rope: Some(Rope::plain(10_000.0, dim / 2 * 2, heads.is_multiple_of(2))),
        k_after_rope: true,
        sinks: 4,
        parts,
        exact: Vec::new(),
        measured: vec![Measured {
            level: 3,
            bits: 2.5,
            predicted_kl: 1e-3,
            costs: Vec::new(),
        }],
    };
    profile.check()?;
    Ok(profile)
}

/// [`fixture`] with tables of the exact level as well.
///
/// # Errors
/// [`ProfileError`] when the numbers are no shape of a part, or `dim` is odd.
pub fn exact_fixture(layers: u32, heads: u32, dim: u32) -> Result<Profile, ProfileError> {
    let mut profile = fixture(layers, heads, dim)?;
    for layer in 0..layers {
        for code in [PartCode::K, PartCode::V] {
            profile.exact.push(exact((layer, code), heads, dim)?);
        }
    }
    profile.check()?;
    Ok(profile)
}

fn exact(
    (layer, code): (u32, PartCode),
    heads: u32,
    dim: u32,
) -> Result<ExactTables, ProfileError> {
    let channels = (heads * dim) as usize;
    let (k, v) = (PartCode::K, PartCode::V);
    let before = layer.checked_sub(1).map(|layer| [(layer, k), (layer, v)]);
    let own = (code == v).then_some((layer, k));
    let needs: Vec<_> = before.into_iter().flatten().chain(own).collect();
    let columns = (needs.len() + 1) * channels;
    let seed = layer as usize * 2 + code as usize;
    let weight = |at: usize| 1e-5 * wave(at * 7 + seed);
    let weights: Vec<f64> = (0..channels * columns).map(weight).collect();
    #[expect(clippy::cast_possible_truncation, reason = "any number will do")]
    let within = (0..channels * WITHIN).map(|at| (0.02 * wave(at + seed)) as f32);
    let pairs = [0.1, 0.05, 0.02].into_iter().cycle();
    Ok(ExactTables {
        layer,
        code,
        heads,
        dim,
        input: Input {
            centre: vec![0.5; channels],
            scale: vec![1.0 / 256.0; channels],
        },
        needs,
        weights: Matrix16::quantise(&weights, channels, columns)?,
        bias: vec![0.5; channels],
        within: within.collect(),
        pairs: pairs.take(channels / 2 * PAIR).collect(),
        steps: [-4, -4, -4].into_iter().cycle().take(channels).collect(),
        tables: [14, 13, 15, 12]
            .into_iter()
            .cycle()
            .take(channels)
            .collect(),
    })
}

fn part((layer, code): (u32, PartCode), heads: u32, dim: u32) -> Result<PartTables, ProfileError> {
    let channels = (heads * dim) as usize;
    let seed = layer as usize * 2 + code as usize;
    let (k, v) = (PartCode::K, PartCode::V);
    let before = (1..=layer.min(2)).flat_map(|back| [(layer - back, k), (layer - back, v)]);
    let own = (code == v).then_some((layer, k));
    let needs: Vec<_> = before.chain(own).collect();
    let predictors = [
        TokenPredictor::Mean,
        TokenPredictor::Anchor { group: 5 },
        TokenPredictor::First {
            rho: [60, -7, 0, 64].into_iter().cycle().take(channels).collect(),
        },
    ];
    let levels = |predictors: [TokenPredictor; QUALITIES]| {
        let mut step = 0.01;
        predictors.map(|predictor| {
            step *= 4.0;
            let sigma = |at: usize| 2.0 / (1.0 + at as f64) / f64::from(step);
            let index = |at: usize| match sigma(at) {
                sigma if sigma < 0.1 => scales::DEAD,
                sigma => scales::nearest(sigma),
            };
            Some(LevelTables {
                step,
                scales: (0..channels).map(index).collect(),
                predictor,
            })
        })
    };
    let columns = needs.len() * channels;
    let weight = |at: usize| match (at / columns, at % columns) {
        (row, column) if column % channels == row => 0.25,
        (row, column) => 0.01 * wave(row * 31 + column + seed),
    };
    let weights: Vec<f64> = (0..channels * columns).map(weight).collect();
    let mut crosses = Vec::new();
    if !needs.is_empty() {
        crosses.push(Cross {
            weights: Matrix16::quantise(&weights, channels, columns)?,
            needs,
            bias: vec![0.125; channels],
            transform: reflection(channels, seed + 1)?,
            levels: levels([const { TokenPredictor::Mean }; QUALITIES]),
        });
    }
    Ok(PartTables {
        layer,
        code,
        heads,
        dim,
        input: Some(Input {
            centre: vec![0.5; channels],
            scale: vec![1.0 / 16.0; channels],
        }),
        plain: Plain {
            mean: [0.5, -1.0, 2.0]
                .into_iter()
                .cycle()
                .take(channels)
                .collect(),
            transform: reflection(channels, seed)?,
            levels: levels(predictors),
        },
        crosses,
    })
}

/// Numbers within -1 and 1 that look like none in particular.
fn wave(at: usize) -> f64 {
    let [_, b, ..] = at.wrapping_mul(0x9E37_79B9).to_be_bytes().map(f64::from);
    let [.., c, _, _] = at.wrapping_mul(0x9E37_79B9).to_le_bytes().map(f64::from);
    (b + c) / 255.0 - 1.0
}

/// A reflection at a plane: its own inverse.
fn reflection(channels: usize, seed: usize) -> Result<Transform, ProfileError> {
    let normal: Vec<f64> = (0..channels).map(|at| 1.5 + wave(at + seed)).collect();
    let square: f64 = normal.iter().map(|n| n * n).sum();
    let mut values = Vec::with_capacity(channels * channels);
    for (row, a) in normal.iter().enumerate() {
        for (column, b) in normal.iter().enumerate() {
            let own = if row == column { 1.0 } else { 0.0 };
            values.push(own - 2.0 * a * b / square);
        }
    }
    let matrix = Matrix16::quantise(&values, channels, channels)?;
    Ok(Transform {
        forward: matrix.clone(),
        inverse: matrix,
    })
}

/// Whatever is read as a profile is written as it was read, and prepares the levels it has.
pub(super) fn open(data: &[u8]) {
    check(data);
    // The hash keeps changed bytes out: mend it.
    if let Some((body, _)) = data.split_last_chunk::<32>() {
        check(&[body, blake3::hash(body).as_bytes()].concat());
    }
}

fn check(file: &[u8]) {
    match Profile::from_bytes(file) {
        Ok(profile) => {
            let written = profile.to_bytes();
            assert!(written.is_ok_and(|written| written == file), "other bytes");
        }
        Err(problem) => {
            let text = problem.to_string();
            assert!(text.contains("accepted: "), "no way out is named: {text}");
        }
    }
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let sizes = [(1, 1, 2), (2, 1, 3), (3, 2, 4)];
    let file = |profile: Result<Profile, ProfileError>| {
        let bytes = profile.and_then(|profile| profile.to_bytes());
        bytes.unwrap_or_default()
    };
    let plain = sizes.map(|(layers, heads, dim)| file(fixture(layers, heads, dim)));
    let exact = file(exact_fixture(2, 1, 2));
    plain.into_iter().chain([exact]).collect()
}
