//! Tests of the small operations against their definitions.

use pulp::{Arch, WithSimd};

use super::*;

struct Max<'a>(&'a [f32]);

impl WithSimd for Max<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        max(simd, self.0)
    }
}

#[test]
fn exp_agrees_with_the_library_over_its_whole_range() {
    for step in -8_600..=8_700_i16 {
        let x = f32::from(step) / 100.0;
        let exact = f64::from(x).exp();
        let error = (f64::from(exp(x)) - exact).abs() / exact;
        assert!(error < 3e-7, "exp({x}) is off by {error:e}");
    }
}

#[test]
fn exp_is_finite_when_the_input_is_out_of_range() {
    assert!(exp(f32::NEG_INFINITY) < 1e-37);
    assert!(exp(1e30).is_finite());
}

#[test]
fn exp_and_sum_equals_element_by_element_at_every_length() {
    for length in 0..70_u8 {
        let scores: Vec<f32> = (0..length).map(|i| f32::from(i) * 0.1 - 3.0).collect();
        let mut out = scores.clone();
        let sum = exp_and_sum(&mut out, 1.5);
        for (score, out) in scores.iter().zip(&out) {
            assert_eq!(exp(score - 1.5), *out);
        }
        assert!((sum - out.iter().sum::<f32>()).abs() <= 1e-4 * sum);
    }
}

#[test]
fn max_finds_the_largest_wherever_it_stands() {
    for place in 0..40 {
        let mut values = vec![-1.0; 40];
        values[place] = 2.0;
        assert_eq!(Arch::new().dispatch(Max(&values)), 2.0);
    }
    assert_eq!(Arch::new().dispatch(Max(&[])), f32::NEG_INFINITY);
}

#[test]
fn rope_keeps_lengths_and_depends_on_distance_only() {
    let rope = Rope::new(8, 64, 10_000.0);
    let score = |query_at: usize, key_at: usize| {
        let (mut q, mut k) = ([0.3, -1.0, 2.0, 0.5, 1.0, 0.1, -0.7, 0.2], [1.0; 8]);
        rope.turn(&mut q, query_at);
        rope.turn(&mut k, key_at);
        assert!((dot(&k, &k) - 8.0).abs() < 1e-5);
        dot(&q, &k)
    };
    assert!((score(10, 3) - score(50, 43)).abs() < 1e-4);
    assert!((score(10, 3) - score(10, 9)).abs() > 1e-3);
}

#[test]
fn rms_norm_gives_rows_of_unit_mean_square() {
    let rows: Vec<f32> = (0..64_u8).map(|i| f32::from(i) - 20.0).collect();
    let out = rms_norm(&rows, &[1.0; 32], 1e-6);
    for row in out.chunks(32) {
        assert!((dot(row, row) / 32.0 - 1.0).abs() < 1e-4);
    }
}
