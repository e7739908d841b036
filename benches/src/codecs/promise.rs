//! What is promised of levels on real KV, as rows with a bar.
//!
//! Upstairs:   [`super`], for inputs that a user names.
//! Downstairs: [`Report`].
//!
//! The numbers are those of the design of the ladder: ratios count every stored byte of parts of
//! 256 tokens; speeds are a core's, of raw bytes. A row stands beside the number itself: its ratio
//! is how much of it was reached.
//!
//! Not here on purpose: no promise of scalar paths, and none of levels to compare with.

use kvtier_benches::report::Report;

use super::GB_S;

/// Least ratio, encoding and decoding speed of a level; 0 where nothing is promised.
struct Promise {
    level: &'static str,
    bf16: f64,
    f16: f64,
    encode: f64,
    decode: f64,
}

const PROMISES: [Promise; 4] = [
    Promise {
        level: "lossless",
        bf16: 1.47,
        f16: 1.155,
        encode: 1.5,
        decode: 5.0,
    },
    Promise {
        level: "lossless_avx2",
        bf16: 0.0,
        f16: 0.0,
        encode: 1.5,
        decode: 3.0,
    },
    Promise {
        level: "lossless_c",
        bf16: 1.52,
        f16: 1.18,
        encode: 0.0,
        decode: 2.5,
    },
    Promise {
        level: "lossless_c_avx2",
        bf16: 0.0,
        f16: 0.0,
        encode: 0.0,
        decode: 2.5,
    },
];

/// Rows of what is promised of `level` on `input`: `ratio`, and the speeds of encoding and
/// decoding. On a processor without AVX-512 the level itself is held to what AVX2 promises.
pub(super) fn rows(
    (level, input): (&str, &str),
    ratio: f64,
    [encode, decode]: [&[f64]; 2],
    report: &mut Report,
) {
    let find = |name: &str| PROMISES.iter().find(|promise| promise.level == name);
    let Some(own) = find(level) else { return };
    let speeds = match kvtier_kernels::simd::path() {
        "avx512" => Some(own),
        "avx2" => find(&format!("{level}_avx2")),
        _ => None,
    };
    let least = match input {
        "kv" => own.bf16,
        "kv_f16" => own.f16,
        _ => return,
    };
    let mut row = |what: &str, unit, values: &[f64], least: f64| {
        if least > 0.0 {
            let name = format!("codecs.{level}.{input}.{what}.promise");
            let limit = format!("{least} {unit}");
            let limits = vec![least; values.len()];
            report.beside((name, unit), values, (&limit, &limits), Some(1.0));
        }
    };
    row("ratio", "x", &[ratio], least);
    if let Some(speeds) = speeds {
        row("encode.gb_s_core", GB_S, encode, speeds.encode);
        row("decode.gb_s_core", GB_S, decode, speeds.decode);
    }
}
