//! Tests of the sets of texts.

use super::*;

/// Lines long enough not to be the same by chance.
fn lines(document: &Document) -> impl Iterator<Item = &str> {
    document.text.lines().filter(|line| line.len() > 40)
}

// Goal: X1.
// Method: no long line of the judging sets stands in any text of calibration, nor in the other
// judging set, nor twice in different documents of one.
#[test]
fn sets_of_texts_share_no_line() {
    let sets = [calibration(), dev(), heldout(), foreign()];
    let all: Vec<&Document> = sets.iter().flatten().collect();
    for (at, document) in all.iter().enumerate() {
        for other in all.iter().take(at) {
            let shared = lines(document).find(|line| other.text.contains(line));
            assert_eq!(shared, None, "{} and {}", document.name, other.name);
        }
    }
}

#[test]
fn sets_of_texts_have_the_documents_that_figures_are_quoted_for() {
    let sets = [calibration(), dev(), heldout(), foreign()];
    assert_eq!(sets.each_ref().map(Vec::len), [16, 6, 6, 6]);
    let mut names: Vec<_> = sets
        .iter()
        .flatten()
        .map(|document| document.name)
        .collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), 34);
    assert!(
        sets.iter()
            .flatten()
            .all(|document| document.text.len() > 3000)
    );
}

#[test]
fn generated_texts_are_the_same_every_time() {
    let lens: Vec<_> = foreign().iter().map(|one| one.text.len()).collect();
    let again: Vec<_> = foreign().iter().map(|one| one.text.len()).collect();
    assert_eq!(lens, again);
    let json = generated::json();
    let parsed: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(parsed.as_array().unwrap().len() > 20);
    assert!(generated::base64().starts_with(|c: char| c.is_ascii_alphanumeric()));
}
