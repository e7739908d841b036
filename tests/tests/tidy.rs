//! Tidy: what every file of the workspace keeps to, checked on the files as they are.
//!
//! Upstairs:   `cargo test`.
//! Downstairs: the working tree.
//!
//! Each check names the file, the line and the way out. A limit that cannot hold everywhere yet
//! is a ratchet: the current worst is written here and may only shrink.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is the failure report"
)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

const FILE_LINES_MAX: usize = 500;
const FUNCTION_LINES_MAX: usize = 70;
const COLUMNS_MAX: usize = 100;

/// Files that may hold unsafe code: the rooms of docs/decisions/0001.
const UNSAFE_ROOMS: [&str; 6] = [
    "daemon/store/src/mem",
    "daemon/store/src/disk/ring",
    "daemon/src/shm",
    "client/src/shm",
    "client/python/src/memory",
    "kernels/src/simd/",
];

/// All modules of the daemon from the top. A module uses only those after it.
const LAYERS: [&str; 20] = [
    "fuzzing", "cli", "process", "http", "server", "session", "region", "tenant", "restore",
    "tier", "shm", "block", "metrics", "health", "log", "config", "keep", "golden", "planted",
    "sync",
];

/// Packages in the order of their layers; a package uses only those listed with it.
const PACKAGES: [(&str, &[&str]); 9] = [
    ("proto", &[]),
    ("kernels", &["kvtier-proto"]),
    ("daemon/store", &["kvtier-proto"]),
    (
        "daemon",
        &["kvtier-proto", "kvtier-kernels", "kvtier-store"],
    ),
    ("client", &["kvtier-proto"]),
    ("client/python", &["kvtier-client"]),
    (
        "models",
        &["kvtier-proto", "kvtier-kernels", "kvtier-store"],
    ),
    (
        "tests",
        &[
            "kvtier-proto",
            "kvtier-kernels",
            "kvtier-store",
            "kvtier-client",
            "kvtier-benches",
            "kvtierd",
        ],
    ),
    (
        "benches",
        &[
            "kvtier-proto",
            "kvtier-kernels",
            "kvtier-store",
            "kvtier-client",
            "kvtierd",
        ],
    ),
];

struct File {
    name: String,
    text: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

fn walk(dir: &Path, files: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    entries.sort();
    for path in entries {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if !name.starts_with('.') && name != "target" && name != "generated" {
                walk(&path, files);
            }
        } else if name.ends_with(".rs") {
            files.push(path);
        }
    }
}

fn sources() -> Vec<File> {
    let (root, mut files) = (root(), Vec::new());
    walk(&root, &mut files);
    let read = |path: PathBuf| File {
        name: path
            .strip_prefix(&root)
            .unwrap()
            .to_string_lossy()
            .into_owned(),
        text: std::fs::read_to_string(&path).unwrap(),
    };
    files.into_iter().map(read).collect()
}

/// Tests, benches of tests and examples are judged by fewer rules.
fn is_test(file: &File) -> bool {
    [
        "/tests/",
        "/tests.rs",
        "/examples/",
        "testkit",
        "/conformance",
        "/disk/sim",
        "/campaign/",
    ]
    .iter()
    .any(|part| file.name.contains(part))
        || file.name.starts_with("tests/")
}

fn fail_if_any(problems: Vec<String>, way_out: &str) {
    assert!(problems.is_empty(), "{}\n{way_out}", problems.join("\n"));
}

#[test]
fn every_file_opens_with_a_header() {
    let bare = sources()
        .into_iter()
        .filter(|file| !file.text.starts_with("//! "));
    let bare = bare.map(|file| file.name).collect();
    fail_if_any(
        bare,
        "Begin each file with `//!`: what it is, Upstairs, Downstairs, invariants.",
    );
}

#[test]
fn files_functions_and_lines_stay_small() {
    let mut problems = Vec::new();
    for file in sources() {
        for (number, line) in (1..).zip(file.text.lines()) {
            // A link or a literal that cannot be broken is no reason to fail.
            if line.chars().count() > COLUMNS_MAX && !line.contains("http") && !line.contains('"') {
                problems.push(format!(
                    "{}:{number}: over {COLUMNS_MAX} columns",
                    file.name
                ));
            }
        }
        if is_test(&file) {
            continue;
        }
        let lines = file.text.lines().count();
        if lines > FILE_LINES_MAX {
            problems.push(format!(
                "{}: {lines} lines, at most {FILE_LINES_MAX}",
                file.name
            ));
        }
        for (name, at, lines) in functions(&file.text) {
            if lines > FUNCTION_LINES_MAX {
                problems.push(format!(
                    "{}:{at}: fn {name} has {lines} lines, at most {FUNCTION_LINES_MAX}",
                    file.name
                ));
            }
        }
    }
    fail_if_any(
        problems,
        "Split what grew; put tests next door in foo/tests.rs.",
    );
}

/// Name, first line and length of each function of formatted code.
fn functions(text: &str) -> Vec<(String, usize, usize)> {
    let (mut found, mut open): (_, Option<(String, usize, usize)>) = (Vec::new(), None);
    for (number, line) in (1..).zip(text.lines()) {
        let indent = line.len() - line.trim_start().len();
        match &open {
            Some((name, at, depth)) => {
                if indent == *depth && line.trim_end() == format!("{}}}", " ".repeat(indent)) {
                    found.push((name.clone(), *at, number - at + 1));
                    open = None;
                } else if indent == *depth && line.trim_end().ends_with(';') {
                    open = None;
                }
            }
            None => {
                let words: Vec<&str> = line.split_whitespace().collect();
                let starts = words.iter().position(|word| *word == "fn");
                let comment = line.trim_start().starts_with("//");
                if let (Some(at), false) = (starts, comment || line.trim_end().ends_with('}'))
                    && let Some(name) = words.get(at + 1)
                {
                    let name = name.split(['(', '<']).next().unwrap_or_default();
                    open = Some((name.to_owned(), number, indent));
                }
            }
        }
    }
    found
}

#[test]
fn unsafe_code_stays_in_its_rooms() {
    let mut problems = Vec::new();
    for file in sources() {
        if UNSAFE_ROOMS.iter().any(|room| file.name.starts_with(room)) {
            continue;
        }
        for (number, line) in (1..).zip(file.text.lines()) {
            let code = line.split("//").next().unwrap_or_default();
            let marks = ["unsafe {", "unsafe fn ", "unsafe impl ", "unsafe extern "];
            if marks.iter().any(|mark| code.contains(mark)) && !code.contains('"') {
                problems.push(format!("{}:{number}: {}", file.name, line.trim()));
            }
        }
    }
    fail_if_any(
        problems,
        "Move it into a room of docs/decisions/0001, or do without.",
    );
}

#[test]
fn layers_are_used_downwards_only() {
    let mut problems = Vec::new();
    for file in sources() {
        let Some(inside) = file.name.strip_prefix("daemon/src/") else {
            continue;
        };
        let layer = inside.split(['/', '.']).next().unwrap_or_default();
        if ["lib", "bin"].contains(&layer) {
            continue;
        }
        let name = &file.name;
        let Some(depth) = LAYERS.iter().position(|one| *one == layer) else {
            problems.push(format!("{name}: `{layer}` has no place among the layers"));
            continue;
        };
        for (number, line) in (1..).zip(file.text.lines()) {
            let mut problem = |what: &str| problems.push(format!("{name}:{number}: {what}"));
            if line.contains("crate::{") {
                problem("a grouped import hides which layers it names");
            }
            if layer != "tier" && line.contains("kvtier_kernels") {
                problem("only `tier` calls the kernels");
            }
            for above in LAYERS.iter().take(depth) {
                let (_, rest) = line.split_once("crate::").unwrap_or_default();
                let used = rest
                    .split(|at: char| at != '_' && !at.is_alphanumeric())
                    .next();
                if used == Some(above) {
                    problem(&format!("`{layer}` uses `{above}` above it"));
                }
            }
        }
    }
    for (package, allowed) in PACKAGES {
        let manifest = root().join(package).join("Cargo.toml");
        let text = std::fs::read_to_string(&manifest).unwrap();
        for line in text.lines().filter(|line| line.starts_with("kvtier")) {
            let used = line.split(['.', ' ', '=']).next().unwrap_or_default();
            if !allowed.contains(&used) {
                problems.push(format!("{package}/Cargo.toml uses {used}"));
            }
        }
    }
    fail_if_any(
        problems,
        "Turn the arrow round: let the lower layer define a trait.",
    );
}

#[test]
fn metrics_are_registered_in_one_place() {
    let mut problems = Vec::new();
    for file in sources()
        .into_iter()
        .filter(|file| !file.name.starts_with("daemon/src/metrics"))
    {
        if file.name != "tests/tests/tidy.rs" && file.text.contains("prometheus::") {
            problems.push(file.name);
        }
    }
    fail_if_any(
        problems,
        "Declare the metric in daemon/src/metrics.rs and count through its field.",
    );
}

#[test]
fn nothing_is_left_to_do_later_without_a_number() {
    let mut problems = Vec::new();
    let marks = [["TO", "DO"].concat(), ["FIX", "ME"].concat()];
    for file in sources() {
        for (number, line) in (1..).zip(file.text.lines()) {
            if marks.iter().any(|mark| line.contains(mark.as_str())) && !line.contains('#') {
                problems.push(format!("{}:{number}: {}", file.name, line.trim()));
            }
        }
    }
    fail_if_any(
        problems,
        "Do it, or file it and write its number beside the mark.",
    );
}

#[test]
fn sources_are_ascii_outside_of_drawings() {
    let mut problems = Vec::new();
    for file in sources().into_iter().filter(|file| !is_test(file)) {
        for (number, line) in (1..).zip(file.text.lines()) {
            let drawing = line.trim_start().starts_with("//") || line.contains('"');
            if !line.is_ascii() && !drawing {
                problems.push(format!("{}:{number}: {}", file.name, line.trim()));
            }
        }
    }
    fail_if_any(
        problems,
        "Write it in ASCII; only drawings in comments may differ.",
    );
}

#[test]
fn every_exhibit_of_the_bug_museum_has_its_test() {
    let page = std::fs::read_to_string(root().join("docs/MUSEUM.md")).unwrap();
    let first = |line: &str| line.split('|').nth(1)?.trim().parse::<u32>().ok();
    let rows: Vec<u32> = page.lines().filter_map(first).collect();
    assert!(rows.len() >= 12, "the table of docs/MUSEUM.md: {rows:?}");
    let mut found = BTreeSet::new();
    for file in sources() {
        let lines: Vec<&str> = file.text.lines().map(str::trim).collect();
        for pair in lines.windows(2) {
            // A helper of that name is no test.
            let is_test = ["#[test]", "#[tokio::test]"].contains(&pair[0]);
            if let (true, Some((_, name))) = (is_test, pair[1].split_once("fn museum_")) {
                found.extend(name.get(..2).and_then(|row| row.parse::<u32>().ok()));
            }
        }
    }
    let problem = |row: &u32| format!("museum row {row} has no test");
    let missing = rows.iter().filter(|row| !found.contains(row));
    let unknown = found.iter().filter(|row| !rows.contains(row));
    let unknown = unknown.map(|row| format!("there is no museum row {row}"));
    fail_if_any(
        missing.map(problem).chain(unknown).collect(),
        "Name a test museum_NN_what_it_promises; docs/MUSEUM.md lists the rows.",
    );
}

#[test]
fn protocol_page_speaks_of_the_protocol_as_it_is() {
    let mut hash = Sha256::new();
    for name in [
        "proto/kvtier/v1/kvtier.proto",
        "proto/kvtier/v1/model.proto",
    ] {
        hash.update(std::fs::read(root().join(name)).unwrap());
    }
    let hash: String = hash
        .finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let page = std::fs::read_to_string(root().join("docs/PROTOCOL.md")).unwrap();
    assert!(
        page.contains(&hash),
        "the .proto files changed: read docs/PROTOCOL.md against them, then write {hash} into it"
    );
}
