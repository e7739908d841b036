//! Files of the repository that are rendered from code, kept current by tests.
//!
//! Upstairs:   tests of `config` and `metrics`.
//! Downstairs: the repository's files.

use std::path::Path;

/// Compares `file` (relative to the repository) with what the code renders, or writes it when
/// `KVTIER_TEST_REGENERATE` is set.
pub(crate) fn check(file: &str, rendered: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
    if std::env::var_os("KVTIER_TEST_REGENERATE").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, rendered).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        kept == rendered,
        "{file} is stale: run `KVTIER_TEST_REGENERATE=1 cargo test -p kvtierd --lib`"
    );
}
