//! Tests of reading GGUF that need no download.

use std::fs;

use super::*;

#[test]
fn unpermute_puts_even_rows_before_odd_rows_of_each_head() {
    // Two heads of four rows, one column; the value is the row's place in the file.
    let values: Vec<f32> = (0..8_u8).map(f32::from).collect();
    assert_eq!(
        unpermute(&values, 1, 4),
        [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    );
}

#[test]
fn load_names_the_file_when_it_is_missing_or_no_gguf() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let error = load(&path, [0; 32]).unwrap_err().to_string();
    assert!(error.contains("m.gguf: No such file"), "{error}");
    fs::write(&path, "not a model").unwrap();
    let error = load(&path, [0; 32]).unwrap_err().to_string();
    assert!(
        error.contains("m.gguf: is not a readable GGUF file"),
        "{error}"
    );
}
