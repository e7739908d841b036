//! Tests of 8-bit floats: every code, and the nearest of any value.
use proptest::prelude::*;

use super::*;

#[test]
fn every_code_is_the_code_of_its_value() {
    for bits in 0..=u8::MAX {
        if bits & 0x7f == 0x7f {
            continue; // no number
        }
        assert_eq!(to_bits(of_bits(bits)), bits, "{bits:#04x}");
    }
    assert_eq!(of_bits(0x7e), MAX);
    assert_eq!(of_bits(1), 2_f32.powi(-9));
    assert_eq!(of_bits(0x38), 1.0);
}

proptest! {
    #[test]
    fn a_value_gets_the_nearest_code(value in -448.0_f32..448.0) {
        let error = (of_bits(to_bits(value)) - value).abs();
        let codes = (0..=u8::MAX).filter(|bits| bits & 0x7f != 0x7f);
        let least = codes.map(|bits| (of_bits(bits) - value).abs()).fold(f32::MAX, f32::min);
        prop_assert_eq!(error, least);
    }

    #[test]
    fn small_values_get_the_nearest_code_as_well(value in -0.02_f32..0.02) {
        let error = (of_bits(to_bits(value)) - value).abs();
        prop_assert!(error <= 2_f32.powi(-10), "{error}");
    }
}
