//! Tests of the choice of a path.
use super::*;

#[test]
fn a_path_is_taken_only_inside_of_what_was_allowed() {
    let all: Vec<_> = Path::available().collect();
    assert_eq!(all[0], Path::Scalar);
    assert_eq!(path(), all[all.len() - 1].name());
    for limit in [Path::Scalar, Path::Avx2, Path::Avx512, Path::Amx] {
        limit.at_most(|| {
            let best = all.iter().rfind(|path| **path <= limit);
            assert_eq!(Some(path()), best.map(|path| path.name()));
            assert_eq!(fast().is_some(), path() != "scalar");
            assert_eq!(fast512().is_some(), ["avx512", "amx"].contains(&path()));
        });
    }
    let _ = std::panic::catch_unwind(|| Path::Scalar.at_most(|| panic!("on purpose")));
    assert_eq!(path(), all[all.len() - 1].name(), "the limit is back");
}
