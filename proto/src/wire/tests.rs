//! Tests of the door: round trips, one-to-one enums, clear refusals, and no panic on any bytes.

use proptest::prelude::*;
use prost::Message;
use strum::IntoEnumIterator;

use super::*;
use crate::descriptor::tests::small_llama;
use crate::layout::tests::any_model;
use crate::vocabulary::Level;

#[test]
fn misses_and_elements_are_one_to_one_with_the_wire() {
    for miss in Miss::iter() {
        let wire = v1::MissReason::from(miss);
        assert_ne!(
            wire,
            v1::MissReason::Unspecified,
            "{miss:?} has no wire value"
        );
        assert_eq!(Miss::try_from(wire), Ok(miss));
        let name = wire
            .as_str_name()
            .trim_start_matches("MISS_REASON_")
            .to_lowercase();
        assert_eq!(name, miss.as_str());
    }
    for element in Element::iter() {
        assert_eq!(element_from_wire(element as i32), Ok(element));
    }
    for kind in PayloadKind::iter() {
        assert_eq!(PayloadKind::try_from(v1::PayloadKind::from(kind)), Ok(kind));
        assert_eq!(v1::PayloadKind::from(kind) as i32, i32::from(kind as u8));
    }
    for quality in Quality::iter() {
        let wire = v1::Quality::from(quality);
        assert_eq!(quality_from_wire("accept", wire as i32), Ok(quality));
        let name = wire.as_str_name().trim_start_matches("QUALITY_");
        assert_eq!(name.to_lowercase(), quality.as_str());
    }
}

// Goal: a request of an older client gets exact bytes, and one of a newer client never gets worse
// than it accepts.
#[test]
fn quality_that_is_not_given_is_exact_and_one_that_is_not_known_is_refused() {
    let start = v1::RestoreStart::default();
    assert_eq!(
        quality_from_wire("accept", start.accept),
        Ok(Quality::Exact)
    );
    for number in [-1, 5, i32::MAX] {
        let text = quality_from_wire("accept", number).unwrap_err().to_string();
        assert!(text.contains("accepted: EXACT, TRANSPARENT"), "{text}");
    }
}

#[test]
fn quality_accepts_itself_and_what_is_better() {
    let levels: Vec<Level> = (0..=u8::MAX).map(Level).collect();
    for level in &levels {
        assert!(Quality::Any.accepts(level.quality()));
        for quality in Quality::iter() {
            assert_eq!(quality.accepts(level.quality()), level.quality() <= quality);
        }
    }
    let exact = levels
        .iter()
        .filter(|level| Quality::Exact.accepts(level.quality()));
    let exact: Vec<u8> = exact.map(|level| level.0).collect();
    assert_eq!(exact, [0, 1, 8, 9, 10]);
}

#[test]
fn keys_from_wire_refuses_wrong_lengths_none_and_too_many() {
    let message = |keys: &[Vec<u8>]| keys_from_wire("keys", keys).unwrap_err().to_string();
    assert_eq!(
        message(&[]),
        "keys is 0 entries long; accepted: 1 to 4096 entries"
    );
    assert_eq!(
        message(&[vec![0; 32], vec![0; 31]]),
        "keys[1] is 31 bytes long; accepted: 32 bytes"
    );
    assert!(message(&vec![vec![0; 32]; 4097]).contains("4097 entries"));
}

#[test]
fn descriptor_from_wire_names_an_empty_layer_and_an_unknown_element() {
    let mut wire = v1::ModelDescriptor::from(&small_llama());
    wire.layers[2].spec = None;
    let text = ModelDescriptor::try_from(&wire).unwrap_err().to_string();
    assert!(
        text.starts_with("model.layers[2] is empty; accepted: attention"),
        "{text}"
    );

    let mut wire = v1::ModelDescriptor::from(&small_llama());
    wire.element = 99;
    let text = ModelDescriptor::try_from(&wire).unwrap_err().to_string();
    assert!(
        text.starts_with("model.element is 99; accepted: BF16"),
        "{text}"
    );
}

// Goal: a refusal fits into the header of the reply that carries it, however much is wrong.
#[test]
fn descriptor_with_a_thousand_problems_is_refused_in_few_words() {
    let layer = v1::layer_spec::Spec::State(v1::StateSpec { bytes: 0 });
    let layer = v1::LayerSpec { spec: Some(layer) };
    let wire = v1::ModelDescriptor {
        layers: vec![layer; LAYERS_MAX],
        ..v1::ModelDescriptor::from(&small_llama())
    };
    let text = ModelDescriptor::try_from(&wire).unwrap_err().to_string();
    assert!(text.contains("layers[0].bytes is 0"), "{text}");
    assert!(text.ends_with("; and 1008 more"), "{text}");
}

proptest! {
    #[test]
    fn descriptor_round_trips_through_its_bytes_on_the_wire(model in any_model()) {
        let bytes = v1::ModelDescriptor::from(&model).encode_to_vec();
        let wire = v1::ModelDescriptor::decode(bytes.as_slice()).unwrap();
        let back = ModelDescriptor::try_from(&wire).unwrap();
        prop_assert_eq!(back.fingerprint(), model.fingerprint());
        prop_assert_eq!(back, model);
    }

    // Goal: whatever a peer sends as a descriptor, the answer is a descriptor within the limits
    // or a refusal.
    #[test]
    fn descriptor_from_any_bytes_is_refused_or_usable(
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        if let Ok(wire) = v1::ModelDescriptor::decode(bytes.as_slice())
            && let Ok(model) = ModelDescriptor::try_from(&wire)
        {
            prop_assert_eq!(model.validate(), vec![]);
        }
    }
}
