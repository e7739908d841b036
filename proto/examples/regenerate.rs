//! Writes the generated gRPC code: `cargo run -p kvtier-proto --example regenerate`.
//!
//! Upstairs:   a builder who changed a `.proto` file; a test calls `write_to` and compares.
//! Downstairs: `protox` (a protobuf compiler in Rust, so that no system `protoc` is needed).

use std::error::Error;
use std::path::Path;

/// Compiles the `.proto` files into `out`, which must exist.
pub(crate) fn write_to(out: &Path) -> Result<(), Box<dyn Error>> {
    let files = protox::compile(["kvtier/v1/kvtier.proto"], [env!("CARGO_MANIFEST_DIR")])?;
    tonic_prost_build::configure()
        .bytes(".kvtier.v1")
        .build_client(true)
        .build_server(true)
        .emit_rerun_if_changed(false)
        .out_dir(out)
        .compile_fds(files)?;
    Ok(())
}

#[allow(
    dead_code,
    reason = "unused where a test includes this file as a module"
)]
fn main() -> Result<(), Box<dyn Error>> {
    let out = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/generated");
    std::fs::create_dir_all(&out)?;
    write_to(&out)?;
    println!("wrote {}", out.display());
    Ok(())
}
