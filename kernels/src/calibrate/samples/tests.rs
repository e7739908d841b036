//! Tests of reading samples.

use safetensors::tensor::TensorView;

use super::*;

fn file(tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        let view = TensorView::new(*dtype, shape.to_vec(), data).unwrap();
        (*name, view)
    });
    safetensors::serialize(views, None).unwrap()
}

fn floats_of(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

#[test]
fn document_gives_the_values_of_each_layer() {
    let k: Vec<f32> = (0..24).map(|at| at as f32).collect();
    let v: Vec<f32> = (0..12).map(|at| 100.0 + at as f32).collect();
    let bytes = file(&[
        ("K", Dtype::F32, &[2, 3, 2, 2], floats_of(&k)),
        ("V", Dtype::F32, &[2, 3, 2, 1], floats_of(&v)),
    ]);
    let document = Document::parse(&bytes).unwrap();
    assert_eq!((document.layers(), document.tokens()), (2, 3));
    let tensor = document.tensor(PartCode::K);
    assert_eq!((tensor.heads, tensor.dim, tensor.width()), (2, 2, 4));
    assert_eq!(tensor.layer(1).unwrap(), k[12..]);
    assert_eq!(document.tensor(PartCode::V).layer(0).unwrap(), v[..6]);
}

#[test]
fn documents_that_are_cut_or_of_other_shapes_are_refused() {
    let good = file(&[
        ("K", Dtype::F32, &[1, 2, 1, 1], floats_of(&[1.0, 2.0])),
        ("V", Dtype::F32, &[1, 2, 1, 1], floats_of(&[1.0, 2.0])),
    ]);
    for len in 0..good.len() {
        assert!(Document::parse(&good[..len]).is_err(), "{len}");
    }
    let kv = |k: (Dtype, &[usize], Vec<u8>), v: (Dtype, &[usize], Vec<u8>)| {
        let bytes = file(&[("K", k.0, k.1, k.2), ("V", v.0, v.1, v.2)]);
        Document::parse(&bytes).unwrap_err().to_string()
    };
    let two = || (Dtype::F32, &[1, 2, 1, 1][..], floats_of(&[1.0, 2.0]));
    let flat = (Dtype::F32, &[2][..], floats_of(&[1.0, 2.0]));
    assert!(kv(flat, two()).starts_with("tensor K has shape [2]; accepted: [layers"));
    let longer = (Dtype::F32, &[1, 3, 1, 1][..], floats_of(&[1.0, 2.0, 3.0]));
    assert!(kv(two(), longer).starts_with("tensor V has shape [1, 3, 1, 1]"));
    let none = (Dtype::F32, &[0, 2, 1, 1][..], vec![]);
    assert!(kv(none, two()).starts_with("tensor K has shape [0, 2, 1, 1]"));
    let whole = (Dtype::I16, &[1, 2, 1, 1][..], vec![0; 4]);
    assert!(kv(whole, two()).ends_with("accepted: BF16, F16, F32"));
    let only = file(&[("K", Dtype::F32, &[1, 1, 1, 1], floats_of(&[1.0]))]);
    let missing = Document::parse(&only).unwrap_err().to_string();
    assert_eq!(missing, "has no tensor V");
}

#[test]
fn layers_with_a_value_that_is_not_finite_are_refused_by_name() {
    let bytes = file(&[
        ("K", Dtype::F32, &[2, 1, 1, 1], floats_of(&[1.0, f32::NAN])),
        ("V", Dtype::F32, &[2, 1, 1, 1], floats_of(&[1.0, 2.0])),
    ]);
    let document = Document::parse(&bytes).unwrap();
    assert!(document.tensor(PartCode::K).layer(0).is_ok());
    let problem = document.tensor(PartCode::K).layer(1).unwrap_err();
    assert_eq!(
        problem.to_string(),
        "tensor K has a value that is not finite in layer 1"
    );
}

#[test]
fn fisher_gives_each_head_its_matrix() {
    let k: Vec<f32> = (0..16).map(|at| at as f32).collect();
    let bytes = file(&[
        ("fisher_k", Dtype::F32, &[2, 2, 2, 2], floats_of(&k)),
        ("fisher_v", Dtype::F32, &[2, 2, 1, 1], floats_of(&k[..4])),
        ("tokens", Dtype::F32, &[], floats_of(&[700.0])),
    ]);
    let fisher = Fisher::parse(&bytes).unwrap();
    assert_eq!(fisher.tokens, 700.0);
    assert_eq!(fisher.head(1, PartCode::K, 0).unwrap(), &k[8..12]);
    assert_eq!(fisher.head(0, PartCode::V, 1).unwrap(), [1.0]);
    for (layer, head) in [(0, 2), (2, 0), (usize::MAX / 8, 0)] {
        assert!(fisher.head(layer, PartCode::K, head).is_none());
    }
}
