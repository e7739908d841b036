//! Tests of profiles: what is written is read, and what is changed is refused.
#![allow(
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    reason = "test data is small"
)]

use super::*;

/// Two layers of one head of four channels, with every kind of table.
pub(crate) fn tiny() -> Profile {
    let matrix = |rows: usize, columns: usize| {
        let value = |at: usize| ((at * 37 + 11) % 23) as f64 / 7.0 - 1.5;
        let values: Vec<f64> = (0..rows * columns).map(value).collect();
        Matrix16::quantise(&values, rows, columns).unwrap()
    };
    let transform = || Transform {
        forward: matrix(4, 4),
        inverse: matrix(4, 4),
    };
    let level = |predictor| {
        Some(LevelTables {
            step: 0.125,
            scales: vec![9, 3, 0, DEAD],
            predictor,
        })
    };
    let part = |layer, code, needs: &[(u32, PartCode)]| PartTables {
        layer,
        code,
        heads: 1,
        dim: 4,
        input: Some(Input {
            centre: vec![0.5; 4],
            scale: vec![0.25; 4],
        }),
        plain: Plain {
            mean: vec![0.5, -1.0, 2.0, 0.0],
            transform: transform(),
            levels: [
                level(TokenPredictor::Mean),
                level(TokenPredictor::Anchor { group: 8 }),
                level(TokenPredictor::First {
                    rho: vec![32, -5, 0, 64],
                }),
            ],
        },
        crosses: match needs {
            [] => vec![],
            needs => vec![Cross {
                needs: needs.to_vec(),
                weights: matrix(4, 4 * needs.len()),
                bias: vec![0.25; 4],
                transform: transform(),
                levels: [None, level(TokenPredictor::Mean), None],
            }],
        },
    };
    let (k, v) = (PartCode::K, PartCode::V);
    Profile {
        model: "tiny".to_owned(),
        revision: "1".to_owned(),
        weights_fingerprint: vec![1, 2, 3],
        element: Element::Bf16,
        rope: Some(Rope::plain(10_000.0, 4, true)),
        k_after_rope: true,
        sinks: 4,
        parts: vec![
            part(0, k, &[]),
            part(0, v, &[(0, k)]),
            part(1, k, &[(0, k), (0, v)]),
            part(1, v, &[(0, k), (0, v), (1, k)]),
        ],
        exact: Vec::new(),
        measured: vec![Measured {
            level: 3,
            bits: 2.5,
            predicted_kl: 1e-3,
            costs: vec![4e-4, 3e-4, 2e-4, 1e-4],
        }],
    }
}

#[test]
fn file_is_read_as_it_was_written() {
    let profile = tiny();
    let file = profile.to_bytes().unwrap();
    assert_eq!(Profile::from_bytes(&file).unwrap(), profile);
    let hash = file.last_chunk::<32>().unwrap();
    assert_eq!(hash[..4], profile.identity().to_le_bytes());
}

// P3: with the hash mended, every cut and every change is refused by name, or is another profile
// that is written as it was read.
#[test]
fn file_that_was_changed_is_refused_or_another_profile() {
    let file = tiny().to_bytes().unwrap();
    let body = &file[..file.len() - 32];
    for at in 0..body.len() {
        let refused = Profile::from_bytes(&file[..at]).unwrap_err();
        assert!(refused.to_string().contains("accepted: "), "{refused}");
        let mended = |body: &[u8]| [body, blake3::hash(body).as_bytes()].concat();
        match Profile::from_bytes(&mended(&body[..at])) {
            Ok(profile) => assert!(body[at..].starts_with(b"COST"), "{profile:?}"),
            Err(cut) => assert!(cut.to_string().contains("accepted: "), "{cut}"),
        }
        for change in [1, 0x80, 0xff] {
            let mut other = body.to_vec();
            other[at] ^= change;
            match Profile::from_bytes(&mended(&other)) {
                Ok(profile) => assert_eq!(profile.to_bytes().unwrap(), mended(&other), "{at}"),
                Err(problem) => assert!(problem.to_string().contains("accepted: "), "{problem}"),
            }
            let mut other = file.clone();
            other[at] ^= change;
            assert!(Profile::from_bytes(&other).is_err(), "{at}");
        }
    }
}

#[test]
fn tables_that_do_not_fit_are_refused_by_name() {
    type Change = fn(&mut Profile);
    let cases: [(Change, &str); 14] = [
        (|p| p.sinks = 65, "sinks is 65; accepted: 0 to 64"),
        (|p| p.parts.swap(0, 1), "k of layer 0 is out of order"),
        (
            |p| p.parts[0].plain.mean.truncate(3),
            "mean has 3 entries; accepted: 4",
        ),
        (
            |p| p.parts[0].plain.mean[1] = f32::NAN,
            "mean is NaN; accepted: finite numbers",
        ),
        (
            |p| p.parts[0].dim = 5000,
            "channels is 5000; accepted: 1 to 4096",
        ),
        (|p| p.parts[3].code = PartCode::Latent, "part code is 3"),
        (
            |p| p.parts[0].input = None,
            "predicted from k of layer 0; accepted",
        ),
        (
            |p| p.parts[1].crosses[0].needs[0].0 = 1,
            "v of layer 0 is predicted from k of layer 1",
        ),
        (
            |p| p.parts[1].crosses[0].needs.clear(),
            "needed parts has 0 entries",
        ),
        (
            |p| p.parts[2].crosses[0].needs.truncate(1),
            "weights has 8 entries; accepted: 4",
        ),
        (
            |p| p.parts[0].plain.levels[0].as_mut().unwrap().scales[0] = 29,
            "scale index is 29; accepted: 0 to 28, or 255",
        ),
        (
            |p| p.parts[0].plain.levels[0].as_mut().unwrap().step = 0.0,
            "step is 0; accepted: 1e-30 to 1e30",
        ),
        (
            |p| p.measured[0].costs.truncate(3),
            "costs has 3 entries; accepted: 4",
        ),
        (
            |p| p.measured[0].costs[1] = f32::INFINITY,
            "costs is inf; accepted: finite numbers",
        ),
    ];
    for (change, want) in cases {
        let mut profile = tiny();
        change(&mut profile);
        let problem = profile.to_bytes().unwrap_err().to_string();
        assert!(problem.contains(want), "{problem}, not {want}");
    }
}

// Goal: K turns by as many channels as it has, whatever V is like.
#[test]
fn heads_of_v_may_be_narrower_than_what_turns() {
    let mut profile = tiny();
    let rope = Rope::plain(10_000.0, 8, true);
    profile.rope = Some(rope);
    let refused = profile.check().unwrap_err().to_string();
    assert_eq!(refused, "rope frequencies has 4 entries; accepted: 2");
    profile.parts.retain(|part| part.code == PartCode::V);
    profile.parts.truncate(1);
    profile.parts[0].crosses.clear();
    for one in &mut profile.measured {
        one.costs.clear();
    }
    assert_eq!(profile.check(), Ok(()));
}

#[test]
fn matrix_is_within_half_a_step_of_what_it_was_made_of() {
    let value = |at: usize| ((at * 7919) % 1000) as f64 / 500.0 - 1.0;
    for columns in [1, 7, 4096] {
        let values: Vec<f64> = (0..3 * columns).map(value).collect();
        let matrix = Matrix16::quantise(&values, 3, columns).unwrap();
        for (at, value) in values.iter().enumerate() {
            let (row, column) = (at / columns, at % columns);
            let error = (matrix.value(row, column) - value).abs();
            assert!(error <= 0.501 * f64::from(matrix.scale()[row]));
        }
    }
    assert!(Matrix16::quantise(&[f64::NAN], 1, 1).is_err());
    assert!(Matrix16::new(1, 513, vec![i16::MIN; 513], vec![1.0]).is_err());
}
