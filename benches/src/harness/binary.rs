//! Finding the binaries of the daemon: beside the running executable, built when they are stale.
//!
//! Upstairs:   `daemon`, and whoever runs `kvtier`.
//! Downstairs: cargo, once a process.
//!
//! `cargo test -p kvtier-tests` does not build another package's binaries. A binary that is
//! missing, or older than a source file of the daemon, is built in the same profile and folder.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::SystemTime;

use crate::launch;

/// Source folders that the binaries are made of, from the workspace's root.
const SOURCES: [&str; 5] = [
    "daemon/src",
    "daemon/store/src",
    "kernels/src",
    "proto/src",
    "daemon/Cargo.toml",
];

/// Folder of the profile that this executable belongs to.
fn profile_dir() -> PathBuf {
    launch::profile_dir().unwrap()
}

/// Path of `kvtierd`, current.
pub fn kvtierd() -> PathBuf {
    current("kvtierd")
}

/// Path of `kvtier`, current.
pub fn kvtier() -> PathBuf {
    current("kvtier")
}

fn current(name: &str) -> PathBuf {
    static CHECKED: OnceLock<()> = OnceLock::new();
    CHECKED.get_or_init(|| {
        let fresh = |name| is_fresh(&profile_dir().join(name));
        if !(fresh("kvtierd") && fresh("kvtier")) {
            build();
        }
    });
    let path = profile_dir().join(name);
    assert!(path.is_file(), "{} is not there", path.display());
    path
}

fn is_fresh(binary: &Path) -> bool {
    let built = std::fs::metadata(binary).and_then(|meta| meta.modified());
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    built.is_ok_and(|built| {
        let newest = SOURCES.iter().map(|source| newest(&root.join(source)));
        newest.max().is_none_or(|newest| newest <= built)
    })
}

/// Latest change below a path; the beginning of time for what is not there.
fn newest(path: &Path) -> SystemTime {
    let Ok(meta) = std::fs::metadata(path) else {
        return SystemTime::UNIX_EPOCH;
    };
    let own = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    if !meta.is_dir() {
        return own;
    }
    let inside = std::fs::read_dir(path).into_iter().flatten().flatten();
    // The time of a folder itself changes with every editor's temporary file.
    let inside = inside.map(|entry| newest(&entry.path()));
    inside.max().unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Package of the running executable: see [`launch::build`].
fn package() -> &'static str {
    let exe = std::env::current_exe().unwrap_or_default();
    let name = exe.file_name().unwrap_or_default().to_string_lossy();
    let own = name.starts_with("kvtier-bench") || name.starts_with("kvtier_bench");
    if own {
        env!("CARGO_PKG_NAME")
    } else {
        "kvtier-tests"
    }
}

fn build() {
    eprintln!("building kvtierd");
    let built = launch::build(&profile_dir(), package())
        .arg("--quiet")
        .status();
    let built = built.unwrap_or_else(|problem| panic!("cargo cannot be run: {problem}"));
    assert!(built.success(), "kvtierd could not be built");
}
