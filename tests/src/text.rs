//! The real texts that demo, tests and the judge of codecs prefill.
//!
//! Upstairs:   the demo, benches, tests, `judge`.
//! Downstairs: the files in `text/`, compiled in, and `generated`.
//!
//! Invariants kept here
//!   X1  No document of one set is part of a document of another, so what is measured on the
//!       held-out set was never seen by calibration, and nothing was chosen by it.
//!
//! Not here on purpose: tokens; how many there are depends on the model.

use std::borrow::Cow;

mod generated;

/// The Constitution of the United States with its amendments; see `text/README.md`.
pub const CONSTITUTION: &str = include_str!("text/constitution.txt");

/// One text of a set.
#[derive(Debug, Clone)]
pub struct Document {
    /// Name for people.
    pub name: &'static str,
    /// What it says. At least 1,024 tokens of the reference model.
    pub text: Cow<'static, str>,
}

macro_rules! documents {
    ($folder:literal: $($name:literal)*) => {
        vec![$(Document {
            name: $name,
            text: Cow::Borrowed(include_str!(concat!("text/", $folder, "/", $name, ".txt"))),
        }),*]
    };
}

/// What tables are calibrated on: prose, technical documents and code.
pub fn calibration() -> Vec<Document> {
    documents!("calibration":
        "constitution" "jargon-culture" "jargon-crackers" "jargon-folklore" "jargon-entries"
        "sqlite-testing" "sqlite-locking" "sqlite-format" "sqlite-planner" "aho-corasick-design"
        "architecture-md" "heapq-py" "textwrap-py" "graphlib-py" "byteorder-rs" "aho-corasick-rs"
    )
}

/// Documents of the same world that are neither learnt from nor quoted: what choices are made by,
/// so that nothing is tuned on [`heldout`].
pub fn dev() -> Vec<Document> {
    documents!("dev":
        "constitution-articles" "constitution-amendments" "decision-devices" "protocol-md"
        "walkdir-rs" "shlex-py"
    )
}

/// Other documents of the same world: what the numbers to quote are measured on.
pub fn heldout() -> Vec<Document> {
    documents!("heldout":
        "declaration" "jargon-portrait" "sqlite-corrupt" "memchr-readme" "difflib-py" "sqlite3-h"
    )
}

/// Nothing like what calibration sees: other languages, and what no person wrote.
pub fn foreign() -> Vec<Document> {
    let mut all = documents!("foreign": "german" "chinese" "korean");
    all.push(Document {
        name: "json",
        text: generated::json().into(),
    });
    all.push(Document {
        name: "base64",
        text: generated::base64().into(),
    });
    all.push(Document {
        name: "numbers",
        text: generated::numbers().into(),
    });
    all
}

#[cfg(test)]
mod tests;
