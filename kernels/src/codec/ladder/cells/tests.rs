//! Every 16 bits come back from their cell, and tables cost what they should.
#![allow(clippy::indexing_slicing, reason = "numbers of tests fit")]

use super::*;

/// What decoding makes of a coded value.
fn decoded(form: Form, coded: Coded, cell: i32, step: i32) -> (u32, u32) {
    // What follows in the stream must not matter.
    let bits = u64::from(coded.bits) | 0xa5a5_a5a5_a5a5_a5a5 << coded.len;
    if coded.symbol == ESCAPE {
        return (low(bits, 16), 16);
    }
    let own = cell + i32::from(coded.symbol);
    if own == 0 || own == -1 {
        return form.of_first(own, step, bits);
    }
    let (whole, len) = form.of_cell(own, step);
    (whole | low(bits, len), len)
}

// X1. Goal: no bits are lost, wherever the prediction is and however large a cell is.
// Method: all 65,536 values, about predictions from far below to far above, and about themselves.
#[test]
fn every_value_comes_back_from_its_cell() {
    for element in [Element::Bf16, Element::F16] {
        let form = Form::of(element).unwrap();
        let odd = [
            0.0,
            -0.0,
            1e-9,
            -0.3,
            1.0,
            -77.5,
            3e4,
            f32::NAN,
            f32::INFINITY,
            -1e38,
        ];
        for step in [-100, -24, -9, -3, 0, 6, 15, 100] {
            for bits in 0..=u16::MAX {
                let near = form.number(bits) * 1.01;
                for about in [odd[usize::from(bits) % odd.len()], near] {
                    let cell = form.cell(about, power(-step));
                    let coded = form.code(bits, cell, (step, 127));
                    let back = decoded(form, coded, cell, step);
                    assert_eq!(
                        back,
                        (bits.into(), coded.len),
                        "{element:?} step {step}, about {about}: {coded:?}"
                    );
                    assert!(coded.len <= 30);
                }
            }
        }
    }
}

#[test]
fn numbers_are_those_of_the_element_type() {
    for bits in 0..=u16::MAX {
        let want = f32::from_bits(u32::from(bits) << 16);
        let got = Form::of(Element::Bf16).unwrap().number(bits);
        assert!(got == want || got.is_nan() && want.is_nan(), "{bits:04x}");
        let want = half::f16::from_bits(bits);
        let got = Form::of(Element::F16).unwrap().number(bits);
        assert!(got == want.to_f32() || !want.is_finite(), "{bits:04x}");
    }
}

// Goal: what is near its prediction is cheap: no value of a cell beyond the first is an escape.
#[test]
fn values_near_their_prediction_are_no_escapes() {
    let form = Form::of(Element::Bf16).unwrap();
    for bits in 0x3c00..0x4200_u16 {
        let cell = form.cell(form.number(bits), power(4));
        let coded = form.code(bits, cell, (-4, 127));
        assert!(coded.symbol.abs() <= 1, "{bits:04x} is {coded:?}");
    }
}

// T1. The hash changes only with a new version of the level.
#[test]
fn tables_are_those_of_every_other_machine() {
    let mut hash = blake3::Hasher::new();
    for (index, table) in all().iter().enumerate() {
        let (weights, reach) = weights(sigma(index));
        assert_eq!(table.reach, reach);
        let frequencies = Frequencies::in_proportion(&weights).unwrap();
        hash.update(&reach.to_le_bytes());
        for frequency in frequencies.get() {
            hash.update(&frequency.to_le_bytes());
        }
    }
    assert_eq!(&hash.finalize().to_hex()[..16], "3aea88b23904777a");
}
