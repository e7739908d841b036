//! `kvtier calibrate` as an operator meets it: the real binary on small files of samples.
//!
//! Upstairs:   `cargo test`.
//! Downstairs: the `kvtier` binary.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is the failure report"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const LAYERS: usize = 2;
const TOKENS: usize = 80;
const HEADS: usize = 1;
const DIM: usize = 4;

/// A safetensors file: a JSON header behind its length, then the tensors.
fn write(path: &Path, tensors: &[(&str, &[usize], Vec<f32>)]) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape, values) in tensors {
        let from = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        let tensor = serde_json::json!({
            "dtype": "F32", "shape": shape, "data_offsets": [from, data.len()],
        });
        header.insert((*name).to_owned(), tensor);
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    // Data begins at a multiple of 8.
    header.resize(header.len().next_multiple_of(8), b' ');
    let length = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [&length[..], &header, &data].concat()).unwrap();
}

/// Numbers that look random, between -1 and 1.
fn values(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from(u16::try_from(state >> 16).unwrap()) / 32_768.0 - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}

fn sample(dir: &Path, name: &str, seed: u32) -> PathBuf {
    let path = dir.join(name);
    let shape = [LAYERS, TOKENS, HEADS, DIM];
    let count = shape.iter().product();
    let (k, v) = (values(seed, count), values(seed + 1, count));
    write(&path, &[("K", &shape, k), ("V", &shape, v)]);
    path
}

/// A sample of another model: of more layers.
fn of_another(dir: &Path) -> PathBuf {
    let path = dir.join("another");
    let shape = [LAYERS + 1, TOKENS, HEADS, DIM];
    let count = shape.iter().product();
    let (k, v) = (values(3, count), values(4, count));
    write(&path, &[("K", &shape, k), ("V", &shape, v)]);
    path
}

fn fisher(dir: &Path) -> PathBuf {
    let path = dir.join("fisher.safetensors");
    let one: Vec<f32> = (0..DIM * DIM)
        .map(|at| if at % (DIM + 1) == 0 { 0.5 } else { 0.0 })
        .collect();
    let all = || one.repeat(LAYERS * HEADS);
    let shape = [LAYERS, HEADS, DIM, DIM];
    let tensors = [
        ("fisher_k", &shape[..], all()),
        ("fisher_v", &shape[..], all()),
        ("tokens", &[][..], vec![70.0]),
    ];
    write(&path, &tensors);
    path
}

fn calibrate(dir: &Path, args: &[&str], files: &[&Path]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvtier"))
        .args(["calibrate", "--model-name", "tiny", "--out"])
        .arg(dir.join("tiny.kvtables"))
        .args(args)
        .args(files)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn calibrate_writes_a_profile_and_says_what_its_levels_cost() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (sample(dir.path(), "a", 1), sample(dir.path(), "b", 7));
    let made = calibrate(dir.path(), &["--rope-theta", "10000"], &[&a, &b]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let out = text(&made.stdout);
    for part in [
        "tiny.kvtables: ",
        "from 158 tokens of 2 documents",
        "transparent_x",
        "bits a value of the first sample, which was learnt from, every byte counted",
        "Without --fisher no KL is predicted",
    ] {
        assert!(out.contains(part), "{part} not in {out}");
    }
    let profile = std::fs::read(dir.path().join("tiny.kvtables")).unwrap();
    assert!(profile.starts_with(b"KVTPROF"), "{profile:?}");
    let names = std::fs::read_dir(dir.path()).unwrap();
    assert_eq!(names.count(), 3, "something is left beside the profile");
}

#[test]
fn calibrate_speaks_json_and_predicts_a_kl_when_it_has_gradients() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (sample(dir.path(), "a", 1), sample(dir.path(), "b", 7));
    let fisher = fisher(dir.path());
    let fisher = fisher.to_str().unwrap();
    let left_out = sample(dir.path(), "left-out", 99);
    let left_out = left_out.to_str().unwrap();
    let args = [
        "--held-out",
        left_out,
        "--json",
        "--rope",
        "none",
        "--fisher",
        fisher,
        "--levels",
        "small,balanced",
        "--kl",
        "small=0.02",
    ];
    let made = calibrate(dir.path(), &args, &[&a, &b]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let json: serde_json::Value = serde_json::from_str(&text(&made.stdout)).unwrap();
    let [balanced, small] = json["levels"].as_array().unwrap().as_slice() else {
        panic!("{json:#}")
    };
    for (level, name, want) in [(balanced, "balanced", 7e-4), (small, "small", 0.02)] {
        assert_eq!(level["name"], name);
        let kl = level["expected_kl"].as_f64().unwrap();
        assert!((kl / want - 1.0).abs() < 0.1, "{kl}");
        assert_eq!(level["parts"].as_array().unwrap().len(), 2 * LAYERS);
    }
    assert_eq!(json["held_out"], 1);
    assert_eq!(small["raw_bytes"], 4 * 2 * LAYERS * TOKENS * HEADS * DIM);
    assert!(balanced["bits"].as_f64() > small["bits"].as_f64());
}

#[test]
fn calibrate_refuses_what_makes_no_profile_and_writes_none() {
    let dir = tempfile::tempdir().unwrap();
    let a = sample(dir.path(), "a", 1);
    let other = dir.path().join("other");
    std::fs::write(&other, b"no samples").unwrap();
    let rope = ["--rope", "none"];
    let absent = Path::new("/nonexistent/x.safetensors");
    let with = |more: &[&'static str]| [&rope[..], more].concat();
    let another = of_another(dir.path());
    let held_out = |path: &Path| {
        let path = path.to_str().unwrap().to_owned();
        ["--rope=none".to_owned(), format!("--held-out={path}")]
    };
    let copy = dir.path().join("copy");
    std::fs::copy(&a, &copy).unwrap();
    let (mixed, learnt) = (held_out(&another), held_out(&copy));
    let cases: [(&[&str], &[&Path], &str); 11] = [
        (&[], &[&a], "--rope"),
        (&rope, &[&a, &another], "another has other layers, heads"),
        (
            &mixed.each_ref().map(String::as_str),
            &[&a],
            "another has other layers, heads",
        ),
        (
            &learnt.each_ref().map(String::as_str),
            &[&a],
            "accepted: samples that nothing is learnt from",
        ),
        (&rope, &[absent], "/nonexistent/x.safetensors: "),
        (&rope, &[&other], "other: is no safetensors file"),
        (
            &with(&["--sinks", "60"]),
            &[&a],
            "20 tokens after the sinks are too few",
        ),
        (
            &with(&["--levels", "tiny"]),
            &[&a],
            "accepted: transparent, balanced, small,",
        ),
        (&with(&["--kl", "small=1"]), &[&a], "--kl needs --fisher"),
        (
            &with(&["--weights-fingerprint", "abc"]),
            &[&a],
            "an even number of hex digits",
        ),
        (
            &["--rope-theta", "1e4", "--rotary-dim", "3"],
            &[&a],
            "accepted: an even number of 2 to 4",
        ),
    ];
    for (args, files, part) in cases {
        let refused = calibrate(dir.path(), args, files);
        assert_eq!(refused.status.code(), Some(2), "{args:?}");
        let problem = text(&refused.stderr);
        assert!(problem.contains(part), "{part} not in {problem}");
    }
    assert!(!dir.path().join("tiny.kvtables").exists());
}
