//! Tests of whole calibrations, on seeded data of which the answer is known.
#![allow(clippy::cast_possible_truncation, reason = "small numbers of our own")]

use nalgebra::DMatrix;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::{Dtype, TensorView};

use super::*;
use crate::codec::Codec;
use crate::codec::lossless_c::LosslessC;
use crate::codec::quant::floats;
use crate::shape::PartShape;
use kvtier_proto::Level;
use kvtier_proto::element::Element;

const HEADS: usize = 2;
const DIM: usize = 6;
const WIDTH: usize = HEADS * DIM;
const TOKENS: usize = 4000;
const LAYERS: usize = 2;

fn normal(random: &mut ChaCha8Rng) -> f64 {
    (0..12).map(|_| random.random::<f64>()).sum::<f64>() - 6.0
}

fn mixed(random: &mut ChaCha8Rng, columns: usize) -> DMatrix<f64> {
    DMatrix::from_fn(WIDTH, columns, |_, _| normal(random))
}

/// What made the samples of one part: a mean, and a matrix that mixes independent sources.
struct Source {
    mean: DMatrix<f64>,
    mix: DMatrix<f64>,
}

impl Source {
    /// Sources of falling size, so that a transform has much to gain.
    fn new(random: &mut ChaCha8Rng) -> Self {
        let falling = DMatrix::from_fn(WIDTH, WIDTH, |row, column| {
            if row == column {
                0.75_f64.powi(column as i32)
            } else {
                0.0
            }
        });
        Self {
            mean: 3.0 * mixed(random, 1),
            mix: mixed(random, WIDTH) * falling,
        }
    }

    fn draw(&self, random: &mut ChaCha8Rng, tokens: usize) -> DMatrix<f64> {
        let mut drawn = &self.mix * mixed(random, tokens);
        for mut column in drawn.column_iter_mut() {
            column += &self.mean.column(0);
        }
        drawn
    }

    fn covariance(&self) -> DMatrix<f64> {
        &self.mix * self.mix.transpose()
    }
}

fn tensor(parts: &[DMatrix<f64>]) -> Vec<u8> {
    let values = parts.iter().flat_map(|part| part.iter());
    values
        .flat_map(|value| (*value as f32).to_le_bytes())
        .collect()
}

fn document(k: &[DMatrix<f64>], v: &[DMatrix<f64>]) -> Vec<u8> {
    let shape = vec![k.len(), k[0].ncols(), HEADS, DIM];
    let (k, v) = (tensor(k), tensor(v));
    let views = [("K", &k), ("V", &v)].map(|(name, data)| {
        (
            name,
            TensorView::new(Dtype::F32, shape.clone(), data).unwrap(),
        )
    });
    safetensors::serialize(views, None).unwrap()
}

/// The same matrix for every head of every layer, K and V.
fn fisher(matrix: &[f32]) -> Fisher {
    let data: Vec<u8> = std::iter::repeat_n(matrix, LAYERS * HEADS)
        .flatten()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let shape = vec![LAYERS, HEADS, DIM, DIM];
    let tokens = 700.0_f32.to_le_bytes();
    let of = |data| TensorView::new(Dtype::F32, shape.clone(), data).unwrap();
    let views = [
        ("fisher_k", of(&data)),
        ("fisher_v", of(&data)),
        (
            "tokens",
            TensorView::new(Dtype::F32, vec![], &tokens).unwrap(),
        ),
    ];
    Fisher::parse(&safetensors::serialize(views, None).unwrap()).unwrap()
}

fn options(levels: &[&str]) -> Options {
    let target = |name: &&str| Target::of(name).unwrap();
    Options {
        rope: None,
        sinks: 4,
        back: 1,
        targets: levels.iter().map(target).collect(),
        lossless_x: false,
        threads: 2,
    }
}

fn profile_and_report(
    documents: &[Document<'_>],
    fisher: Option<&Fisher>,
    options: &Options,
) -> Result<(Profile, Report), CalibrateError> {
    let model = Model {
        name: "tiny".to_owned(),
        ..Model::default()
    };
    calibrate(documents, fisher, (&model, options), &|_| {})
}

fn run(bytes: &[Vec<u8>], fisher: Option<&Fisher>, options: &Options) -> Report {
    let documents: Vec<_> = bytes
        .iter()
        .map(|bytes| Document::parse(bytes).unwrap())
        .collect();
    profile_and_report(&documents, fisher, options).unwrap().1
}

/// Independent K and V in two layers; the covariance of each part in the order of the report.
fn independent(seed: u64) -> (Vec<u8>, Vec<DMatrix<f64>>) {
    let random = &mut ChaCha8Rng::seed_from_u64(seed);
    let sources: Vec<Source> = (0..2 * LAYERS).map(|_| Source::new(random)).collect();
    let drawn: Vec<_> = sources
        .iter()
        .map(|source| source.draw(random, TOKENS))
        .collect();
    let of = |code: usize| {
        drawn
            .iter()
            .skip(code)
            .step_by(2)
            .cloned()
            .collect::<Vec<_>>()
    };
    let bytes = document(&of(0), &of(1));
    (bytes, sources.iter().map(Source::covariance).collect())
}

/// Entropy of a normal number rounded to whole steps. Unit: bits.
fn entropy(sigma_of_step: f64) -> f64 {
    let density = |at: f64| (-0.5 * (at / sigma_of_step).powi(2)).exp();
    let fine = 64;
    let weight = |whole: i32| -> f64 {
        let at = |part: i32| f64::from(whole) - 0.5 + (f64::from(part) + 0.5) / f64::from(fine);
        (0..fine).map(|part| density(at(part))).sum()
    };
    let reach = (8.0 * sigma_of_step).ceil() as i32 + 1;
    let weights: Vec<f64> = (-reach..=reach).map(weight).collect();
    let sum: f64 = weights.iter().sum();
    let each = weights
        .iter()
        .map(|weight| weight / sum)
        .filter(|part| *part > 0.0);
    -each.map(|part| part * part.log2()).sum::<f64>()
}

/// Mean entropy of a value when the eigenvectors are the coefficients.
fn of_transform(covariance: &DMatrix<f64>, step: f64) -> f64 {
    let eigen = covariance.clone().symmetric_eigen().eigenvalues;
    eigen
        .iter()
        .map(|value| entropy(value.max(0.0).sqrt() / step))
        .sum::<f64>()
        / WIDTH as f64
}

/// The same when the channels are the coefficients.
fn of_channels(covariance: &DMatrix<f64>, step: f64) -> f64 {
    let diagonal = covariance.diagonal();
    diagonal
        .iter()
        .map(|value| entropy(value.sqrt() / step))
        .sum::<f64>()
        / WIDTH as f64
}

// Goal: calibration finds what a transform can gain, and nothing that is not there.
// Method: normal sources of known covariance; the rate of each part against the entropy of its
// eigenvectors' integers.
#[test]
fn rate_is_that_of_the_known_covariance_without_gradients() {
    let (bytes, covariances) = independent(1);
    let report = run(&[bytes], None, &options(&["transparent", "balanced"]));
    for level in &report.levels {
        let (mut got, mut want, mut channels) = (0.0, 0.0, 0.0);
        for (part, covariance) in level.parts.iter().zip(&covariances) {
            let rms = (covariance.trace() / WIDTH as f64).sqrt();
            let step = rms * level.target.step_of_rms;
            got += part.bits;
            want += of_transform(covariance, step);
            channels += of_channels(covariance, step);
            assert_eq!(part.predictor, TokenPredictor::Mean);
        }
        assert!((got / want - 1.0).abs() < 0.02, "{got} {want} bits");
        assert!(
            got < channels - 4.0,
            "{got} of {channels} bits of the channels"
        );
        assert_eq!(level.kl(), None);
    }
}

// Goal: with gradients the step meets the target, and errors go where they cost little.
// Method: a metric that minds half of the directions a hundred times less.
#[test]
fn step_meets_the_target_and_errors_go_where_they_are_cheap_with_gradients() {
    let (bytes, covariances) = independent(2);
    let mut matrix = [0.0; DIM * DIM];
    for at in 0..DIM {
        matrix[at * (DIM + 1)] = if at % 2 == 0 { 2e-2 } else { 2e-4 };
    }
    let (levels, fisher) = (["transparent", "balanced", "small"], fisher(&matrix));
    let report = run(&[bytes], Some(&fisher), &options(&levels));
    assert_eq!(report.fisher_tokens, Some(700.0));
    for level in &report.levels {
        let kl = level.kl().unwrap();
        assert!((kl / level.target.kl - 1.0).abs() < 0.03, "{kl:e}");
        // Uniform errors that cost as much take more bits.
        let trace: f64 = covariances.len() as f64 * WIDTH as f64 * (2e-2 + 2e-4) / 2.0;
        let step = (24.0 * kl / level.target.optimism / trace).sqrt();
        let uniform: f64 = covariances
            .iter()
            .map(|part| of_transform(part, step))
            .sum();
        let got: f64 = level.parts.iter().map(|part| part.bits).sum();
        assert!(got < uniform - 2.0, "{got} {uniform}");
    }
}

// Goal: a part that follows from the one before costs only what is new in it.
// Method: V of each layer and K of the second are a fixed product of the part before, and a
// little more.
#[test]
fn cross_levels_code_only_what_the_parts_before_do_not_tell() {
    let random = &mut ChaCha8Rng::seed_from_u64(3);
    let first = Source::new(random).draw(random, TOKENS);
    let mut parts = vec![first];
    for _ in 1..2 * LAYERS {
        let turn = mixed(random, WIDTH) / (WIDTH as f64).sqrt();
        let new = mixed(random, TOKENS) * 0.3;
        parts.push(turn * parts.last().unwrap() + new);
    }
    let of = |code: usize| {
        parts
            .iter()
            .skip(code)
            .step_by(2)
            .cloned()
            .collect::<Vec<_>>()
    };
    let bytes = [document(&of(0), &of(1))];
    let report = run(&bytes, None, &options(&["balanced", "balanced_x"]));
    let [plain, cross] = &report.levels[..] else {
        panic!("{} levels", report.levels.len())
    };
    assert!((plain.parts[0].bits / cross.parts[0].bits - 1.0).abs() < 1e-6);
    for (part, at) in cross.parts.iter().zip(0..).skip(1) {
        let covariance = algebra::Moments::of(&parts[at].map(|value| value as f32)).covariance();
        let rms = (covariance.trace() / WIDTH as f64).sqrt();
        let new = DMatrix::identity(WIDTH, WIDTH) * 0.09;
        let want = of_transform(&new, rms * cross.target.step_of_rms);
        // What was lost of the part before is new as well.
        assert!(
            (want..want + 0.6).contains(&part.bits),
            "{at}: {} {want}",
            part.bits
        );
        assert!(part.bits < plain.parts[at].bits - 0.4, "{at}");
    }
}

// Goal: a level's optimism makes its steps finer and nothing else: the KL to expect is the target.
#[test]
fn step_is_finer_by_the_optimism_when_a_model_shows_more_than_gradients_predict() {
    let (bytes, _) = independent(11);
    let mut matrix = [0.0; DIM * DIM];
    matrix.iter_mut().step_by(DIM + 1).for_each(|on| *on = 1e-2);
    let fisher = fisher(&matrix);
    let step = |optimism| {
        let mut options = options(&["transparent"]);
        options.targets[0].optimism = optimism;
        let report = run(std::slice::from_ref(&bytes), Some(&fisher), &options);
        let kl = report.levels[0].kl().unwrap();
        assert!((kl / options.targets[0].kl - 1.0).abs() < 0.03, "{kl:e}");
        report.levels[0].parts[0].step
    };
    let apart = step(1.0) / step(4.0);
    assert!((apart - 2.0).abs() < 0.1, "{apart}");
}

// Goal: a level across layers meets its target too, in its closed loop.
#[test]
fn cross_levels_meet_the_target_with_gradients() {
    let (bytes, _) = independent(4);
    let mut matrix = [0.0; DIM * DIM];
    matrix.iter_mut().step_by(DIM + 1).for_each(|on| *on = 1e-2);
    let report = run(&[bytes], Some(&fisher(&matrix)), &options(&["small_x"]));
    let kl = report.levels[0].kl().unwrap();
    assert!((kl / 7e-3 - 1.0).abs() < 0.06, "{kl:e}");
}

// Goal: K is learnt from as it was before its rotation.
// Method: the same K as it is and rotated cost the same bits, when the rotation is named.
#[test]
fn rotated_k_costs_as_much_as_k_when_the_rotation_is_named() {
    let random = &mut ChaCha8Rng::seed_from_u64(5);
    let sources: Vec<_> = (0..4).map(|_| Source::new(random)).collect();
    let plain: Vec<_> = sources
        .iter()
        .map(|source| source.draw(random, TOKENS))
        .collect();
    let rope = Rope::plain(10_000.0, 4, true);
    let mut rotated = plain[..2].to_vec();
    for (position, mut column) in rotated
        .iter_mut()
        .flat_map(|k| k.column_iter_mut().enumerate())
    {
        for head in 0..HEADS {
            for pair in 0..2 {
                let (sin, cos) = (position as f64 * 0.01_f64.powi(pair)).sin_cos();
                let (a, b) = (head * DIM + pair as usize, head * DIM + pair as usize + 2);
                let (x, y) = (column[a], column[b]);
                (column[a], column[b]) = (x * cos - y * sin, y * cos + x * sin);
            }
        }
    }
    let bits = |k: &[DMatrix<f64>], rope| {
        let options = Options {
            rope,
            ..options(&["balanced"])
        };
        run(&[document(k, &plain[2..])], None, &options).levels[0].bits()
    };
    let want = bits(&plain[..2], None);
    assert!((bits(&rotated, Some(rope)) / want - 1.0).abs() < 1e-3);
    assert!(bits(&rotated, None) > want + 0.05);
}

#[test]
fn report_is_the_same_on_any_number_of_threads() {
    let (bytes, _) = independent(6);
    let bytes = [bytes];
    let on = |threads| {
        let options = Options {
            threads,
            ..options(&["balanced", "balanced_x"])
        };
        format!("{:?}", run(&bytes, None, &options))
    };
    assert_eq!(on(1), on(3));
}

#[test]
fn samples_that_do_not_suit_are_refused_with_what_is_needed() {
    let random = &mut ChaCha8Rng::seed_from_u64(7);
    let parts = |tokens| -> Vec<_> { vec![DMatrix::from_element(WIDTH, tokens, 1.0); LAYERS] };
    let problem = |bytes: &[Vec<u8>], fisher: Option<&Fisher>, levels: &[&str]| {
        let documents: Vec<_> = bytes
            .iter()
            .map(|bytes| Document::parse(bytes).unwrap())
            .collect();
        let answer = profile_and_report(&documents, fisher, &options(levels));
        answer.unwrap_err().to_string()
    };
    let need = WIDTH * TOKENS_PER_CHANNEL;
    let few = vec![document(&parts(need), &parts(need))];
    let text = problem(&few, None, &["small"]);
    let want = format!(
        "{} tokens after the sinks are too few for a layer's channels",
        need - 4
    );
    assert!(
        text.starts_with(&want) && text.contains(&format!("at least {need}")),
        "{text}"
    );
    let text = problem(&few, None, &["small_x"]);
    assert!(
        text.contains(&format!("at least {}", 3 * WIDTH * TOKENS_PER_INPUT)),
        "{text}"
    );
    assert!(problem(&[], None, &["small"]).starts_with("0 tokens"));

    let one = mixed(random, 500);
    let good = document(&[one.clone(), one.clone()], &[one.clone(), one.clone()]);
    let other = document(std::slice::from_ref(&one), std::slice::from_ref(&one));
    let text = problem(&[good.clone(), other.clone()], None, &["small"]);
    assert!(text.starts_with("document 1 has other"), "{text}");
    let matrix = [1e-2; DIM * DIM];
    let text = problem(&[other], Some(&fisher(&matrix)), &["small"]);
    assert!(text.starts_with("the Fisher matrices"), "{text}");
    let text = problem(&[good], Some(&fisher(&[1e-9; DIM * DIM])), &["small"]);
    assert!(
        text.starts_with("level small cannot have a KL of 7e-3"),
        "{text}"
    );
}

// Goal: a Fisher file that is wrong is blamed, and not the samples.
// Method: matrices that are symmetric and have the eigenvalues that are told, by halves of a head.
#[test]
fn matrix_that_is_no_sum_of_outer_products_is_refused_with_its_head() {
    let (bytes, _) = independent(12);
    let documents = [Document::parse(&bytes).unwrap()];
    let options = options(&["small"]);
    let made = |first: f32, second: f32| {
        let mut matrix = [0.0; DIM * DIM];
        for at in 0..DIM {
            matrix[at * (DIM + 1)] = if at < DIM / 2 { first } else { second };
        }
        profile_and_report(&documents, Some(&fisher(&matrix)), &options)
    };
    for (first, second) in [(1e-2, -1e-2), (1e-2, -3e-3), (-1e-2, -1e-2), (1e-2, -1.0)] {
        let text = made(first, second).unwrap_err().to_string();
        assert!(
            text.starts_with("the Fisher matrix of head 0 of the k part of layer 0 has a negative"),
            "{text}"
        );
    }
    // What rounding leaves of a direction that no gradient had.
    assert!(made(1e-2, -1e-7).is_ok() && made(1e-2, 0.0).is_ok());
}

/// A matrix of a table, in real numbers.
fn real(matrix: &crate::profile::Matrix16) -> DMatrix<f64> {
    let (rows, columns) = (matrix.rows(), matrix.columns());
    DMatrix::from_fn(rows, columns, |row, column| matrix.value(row, column))
}

// Goal: the tables that are written restore what they were made for.
// Method: every token through forward, rounding and inverse of the tables, read back from their
// file; no error in the metric is larger than half a step, and all of them cost the predicted KL.
#[test]
fn profile_restores_tokens_within_its_step_when_read_back() {
    let random = &mut ChaCha8Rng::seed_from_u64(8);
    let parts: Vec<_> = (0..4)
        .map(|_| Source::new(random).draw(random, TOKENS))
        .collect();
    let bytes = document(&parts[..2], &parts[2..]);
    let documents = [Document::parse(&bytes).unwrap()];
    let mut matrix = [0.0; DIM * DIM];
    for at in 0..DIM {
        matrix[at * (DIM + 1)] = 10_f32.powi(-2 - at as i32 % 3);
    }
    let fisher = fisher(&matrix);
    let options = options(&["transparent"]);
    let (profile, report) = profile_and_report(&documents, Some(&fisher), &options).unwrap();
    let read = Profile::from_bytes(&profile.to_bytes().unwrap()).unwrap();
    assert_eq!(read, profile);
    let measured = &read.measured[0];
    let mut kl = 0.0;
    assert_eq!(
        (measured.level, measured.bits),
        (2, report.levels[0].bits() as f32)
    );

    for (samples, (layer, code)) in parts.iter().zip([
        (0, PartCode::K),
        (1, PartCode::K),
        (0, PartCode::V),
        (1, PartCode::V),
    ]) {
        let tables = &read.part(layer, code).unwrap().plain;
        let level = tables.levels[0].as_ref().unwrap();
        let step = f64::from(level.step);
        let mut centred = samples.clone();
        for mut column in centred.column_iter_mut() {
            for (value, mean) in column.iter_mut().zip(&tables.mean) {
                *value -= f64::from(*mean);
            }
        }
        let whole = (real(&tables.transform.forward) * &centred).map(|y| (y / step).round());
        let error = real(&tables.transform.inverse) * whole * step - centred;
        let in_metric = real(&tables.transform.forward) * &error / step;
        assert!(in_metric.amax() < 0.51, "{}", in_metric.amax());
        for (channel, row) in error.row_iter().enumerate() {
            let minds = f64::from(matrix[channel % DIM * (DIM + 1)]);
            kl += 0.5 * minds * row.norm_squared() / TOKENS as f64;
        }
    }
    let parts: f64 = measured.costs.iter().map(|cost| f64::from(*cost)).sum();
    let expected = f64::from(measured.predicted_kl);
    assert!(
        (parts / expected - 1.0).abs() < 1e-5,
        "{parts:e} {expected:e}"
    );
    let predicted = expected / options.targets[0].optimism;
    assert!((kl / predicted - 1.0).abs() < 0.02, "{kl:e} {predicted:e}");
}

// Goal: tables of levels across layers name what they need and fall back where there is nothing.
#[test]
fn profile_of_cross_levels_names_the_parts_before_each() {
    let (bytes, _) = independent(9);
    let documents = [Document::parse(&bytes).unwrap()];
    let options = options(&["small_x"]);
    let (profile, _) = profile_and_report(&documents, None, &options).unwrap();
    let needs = |layer, code| {
        let part = profile.part(layer, code).unwrap();
        assert!(part.input.is_some() && part.plain.levels[2].is_some());
        let cross = part.crosses.first()?;
        assert!(cross.levels[2].is_some());
        Some(cross.needs.clone())
    };
    let (k, v) = (PartCode::K, PartCode::V);
    assert_eq!(needs(0, k), None);
    assert_eq!(needs(0, v), Some(vec![(0, k)]));
    assert_eq!(needs(1, k), Some(vec![(0, k), (0, v)]));
    assert_eq!(needs(1, v), Some(vec![(0, k), (0, v), (1, k)]));
}

/// A document of 16-bit floats.
fn document_of(element: Element, k: &[DMatrix<f64>], v: &[DMatrix<f64>]) -> Vec<u8> {
    let shape = vec![k.len(), k[0].ncols(), HEADS, DIM];
    let dtype = match element {
        Element::F16 => Dtype::F16,
        _ => Dtype::BF16,
    };
    let [k, v] = [k, v].map(|parts| {
        let values = parts.iter().flat_map(|part| part.iter());
        let values: Vec<f32> = values.map(|value| *value as f32).collect();
        let mut bytes = vec![0; 2 * values.len()];
        floats::write(element, &values, &mut bytes);
        bytes
    });
    let views = [("K", &k), ("V", &v)]
        .map(|(name, data)| (name, TensorView::new(dtype, shape.clone(), data).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

/// Parts of which each is a fixed product of the one before, and a little more.
fn chained(first: &Source, turns: &[DMatrix<f64>], tokens: usize, seed: u64) -> Vec<DMatrix<f64>> {
    let random = &mut ChaCha8Rng::seed_from_u64(seed);
    let mut parts = vec![first.draw(random, tokens)];
    for turn in turns {
        let new = mixed(random, tokens) * 0.3;
        parts.push(turn * parts.last().unwrap() + new);
    }
    parts
}

/// Bits of a value of a document at level lossless_c, every byte counted.
fn bits_of_classes(document: &Document<'_>) -> f64 {
    let (mut bytes, mut values) = (0, 0);
    for (layer, code) in (0..LAYERS).flat_map(|layer| [(layer, PartCode::K), (layer, PartCode::V)])
    {
        let raw = document.tensor(code).layer_bytes(layer);
        let shape = PartShape::new(document.element(), document.tokens() as u32, WIDTH as u32);
        let (shape, codec) = (shape.unwrap(), LosslessC::new());
        let mut stored = vec![0; codec.stored_bytes_max(&shape)];
        bytes += codec.encode(&shape, raw, &mut stored).unwrap();
        values += raw.len() / 2;
    }
    8.0 * bytes as f64 / values as f64
}

// Goal: what layers tell of each other is not stored twice, and every bit still comes back.
// Method: a document that nothing was learnt from, of the same sources; the exact level across
// layers against the best that knows no model, of both 16-bit floats.
#[test]
fn exact_level_across_layers_takes_fewer_bits_of_unseen_samples_than_one_without_tables() {
    let random = &mut ChaCha8Rng::seed_from_u64(13);
    let first = Source::new(random);
    let turns: Vec<_> = (1..2 * LAYERS)
        .map(|_| mixed(random, WIDTH) / (WIDTH as f64).sqrt())
        .collect();
    let drawn = |element, tokens, seed| {
        let parts = chained(&first, &turns, tokens, seed);
        let of = |code: usize| parts.iter().skip(code).step_by(2).cloned();
        let (k, v): (Vec<_>, Vec<_>) = (of(0).collect(), of(1).collect());
        document_of(element, &k, &v)
    };
    for element in [Element::Bf16, Element::F16] {
        let (learnt, unseen) = (drawn(element, TOKENS, 14), drawn(element, 256, 15));
        let documents = [Document::parse(&learnt).unwrap()];
        let unseen = Document::parse(&unseen).unwrap();
        let options = Options {
            lossless_x: true,
            ..options(&["small"])
        };
        let (profile, _) = profile_and_report(&documents, None, &options).unwrap();
        let stored = measure::measure(profile, &[unseen], 2).unwrap();
        let stored = stored.iter().find(|one| one.level == Level::LOSSLESS_X);
        let stored = stored.unwrap();
        let bits = 16.0 * stored.stored_bytes as f64 / stored.raw_bytes as f64;
        let without = bits_of_classes(&unseen);
        assert!(bits < without - 1.5, "{element:?}: {bits} of {without}");
    }
}
