//! The generated code is what the `.proto` files say today.
#![allow(clippy::unwrap_used, reason = "a panic is the failure report")]

#[path = "../examples/regenerate.rs"]
mod regenerate;

#[test]
fn generated_code_is_current() {
    let out = std::env::temp_dir().join(format!("kvtier-generated-{}", std::process::id()));
    std::fs::create_dir_all(&out).unwrap();
    regenerate::write_to(&out).unwrap();
    let fresh = std::fs::read_to_string(out.join("kvtier.v1.rs")).unwrap();
    std::fs::remove_dir_all(&out).unwrap();
    let kept = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/generated/kvtier.v1.rs");
    assert!(
        fresh == std::fs::read_to_string(kept).unwrap(),
        "src/generated/kvtier.v1.rs is stale: run `cargo run -p kvtier-proto --example regenerate`"
    );
}
