//! Tests of readers: nothing said is the least, round trips, and refusals by field.

use super::*;
use crate::descriptor::tests::small_llama;

fn cost() -> LayerCost {
    LayerCost {
        token_flop: 7_077_888,
        pair_flop: 2304,
        projection_flop: 442_368,
    }
}

// Goal: an engine that was built before readers existed is planned for as what it is.
#[test]
fn reader_of_a_client_that_says_nothing_takes_a_prefix_only() {
    let model = small_llama();
    let silent = ReaderSpec::from_wire(None, &model).unwrap();
    assert_eq!(silent, ReaderSpec::default());
    assert!(silent.is_prefix_only() && !silent.hidden_projection);
    let empty = v1::ReaderSpec::default();
    assert_eq!(ReaderSpec::from_wire(Some(&empty), &model), Ok(silent));
}

#[test]
fn reader_survives_the_wire_whole() {
    let model = small_llama();
    let all = ReaderSpec::default()
        .two_ended()
        .layer_events()
        .hidden_projection()
        .layers(vec![cost(); 30]);
    let each = [
        ReaderSpec::default().two_ended(),
        ReaderSpec::default().layer_events(),
        ReaderSpec::default().hidden_projection(),
        all,
    ];
    for spec in each {
        let wire = v1::ReaderSpec::from(&spec);
        assert_eq!(ReaderSpec::from_wire(Some(&wire), &model), Ok(spec.clone()));
        let waits = !(spec.two_ended || spec.layer_events);
        assert_eq!(spec.is_prefix_only(), waits);
    }
}

// Goal: F3, and a person who reads the refusal knows what to send.
#[test]
fn reader_is_refused_by_field_when_it_does_not_fit_the_model() {
    let model = small_llama();
    let refused = |spec: &ReaderSpec, model: &ModelDescriptor| {
        let wire = v1::ReaderSpec::from(spec);
        let problem = ReaderSpec::from_wire(Some(&wire), model).unwrap_err();
        assert_eq!(spec.check(model), Err(problem.clone()));
        problem.to_string()
    };
    for count in [1, 29, 31] {
        let text = refused(&ReaderSpec::default().layers(vec![cost(); count]), &model);
        assert!(
            text.contains("reader.layers is") && text.contains("0 or 30"),
            "{text}"
        );
    }
    let with = |change: fn(&mut LayerCost)| {
        let mut layers = vec![cost(); 30];
        change(&mut layers[29]);
        refused(&ReaderSpec::default().layers(layers), &model)
    };
    let text = with(|cost| cost.token_flop = 0);
    assert_eq!(
        text,
        "reader.layers[29].token_flop is 0; accepted: 1 to 1125899906842624"
    );
    assert!(with(|cost| cost.token_flop = u64::MAX).contains("[29].token_flop"));
    assert!(with(|cost| cost.pair_flop = LAYER_FLOP_MAX + 1).contains("[29].pair_flop"));
    assert!(with(|cost| cost.projection_flop = u64::MAX).contains("[29].projection_flop"));

    let mut stateful = model.clone();
    stateful.layers[3] = LayerSpec::State { bytes: 64 };
    let text = refused(&ReaderSpec::default().hidden_projection(), &stateful);
    assert!(text.contains("layer 3 stores"), "{text}");
    let shared = LayerSpec::SharesWith(0);
    stateful.layers[3] = shared;
    assert_eq!(
        ReaderSpec::default().hidden_projection().check(&stateful),
        Ok(())
    );
}
