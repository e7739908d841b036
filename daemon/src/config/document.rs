//! The settings as documents: the sample file and the reference page.
//!
//! Upstairs:   a test keeps `systemd/kvtier.toml` and `docs/CONFIG.md` equal to these;
//!             `kvtier check-config --sample` prints the first.
//! Downstairs: `tables`.

use std::fmt::Write;

use super::layers::variable_of;
use super::settings::{Field, Initial};
use super::tables::{
    CodecConfig, DiskConfig, HostConfig, LimitsConfig, LogConfig, NamespaceConfig, OperatorConfig,
    RegionsConfig, ServerConfig, StateConfig,
};

/// One table of the configuration.
struct Section {
    name: &'static str,
    about: &'static [&'static str],
    fields: Vec<Field>,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// `[server]`: always there, each setting with a default.
    Single,
    /// `[[disk]]`: there when written.
    List,
}

impl Section {
    fn head(&self) -> String {
        match self.kind {
            Kind::Single => format!("[{}]", self.name),
            Kind::List => format!("[[{}]]", self.name),
        }
    }
}

macro_rules! section {
    ($table:ty, $kind:expr) => {
        Section {
            name: <$table>::TABLE,
            about: <$table>::ABOUT,
            fields: <$table>::fields(),
            kind: $kind,
        }
    };
}

fn sections() -> [Section; 10] {
    [
        section!(ServerConfig, Kind::Single),
        section!(StateConfig, Kind::Single),
        section!(HostConfig, Kind::Single),
        section!(DiskConfig, Kind::List),
        section!(CodecConfig, Kind::Single),
        section!(NamespaceConfig, Kind::List),
        section!(OperatorConfig, Kind::Single),
        section!(RegionsConfig, Kind::Single),
        section!(LimitsConfig, Kind::Single),
        section!(LogConfig, Kind::Single),
    ]
}

const SAMPLE_HEAD: &str = "\
# Configuration of kvtierd. Everything here is optional: a line that is commented out shows the
# default. Check a changed file with: kvtier check-config --config FILE
# Variables KVTIER_<TABLE>_<SETTING> override this file, and flags override those.
";

/// A configuration file that says what the defaults are.
pub fn sample() -> String {
    let mut text = String::from(SAMPLE_HEAD);
    for section in sections() {
        text.push('\n');
        for line in section.about {
            let _ = writeln!(text, "#{line}");
        }
        let off = if section.kind == Kind::List { "# " } else { "" };
        let _ = writeln!(text, "{off}{}", section.head());
        for field in &section.fields {
            text.push('\n');
            for line in field.about {
                let _ = writeln!(text, "#{line}");
            }
            let _ = writeln!(text, "# Accepted: {}.", field.accepts);
            let _ = match &field.initial {
                Initial::Default(value) => writeln!(text, "# {} = {value}", field.name),
                Initial::Unset(means) => writeln!(text, "# {} =   (not set: {means})", field.name),
                Initial::Required => writeln!(text, "# {} =   (must be set)", field.name),
            };
        }
    }
    text
}

const PAGE_HEAD: &str = "\
# Configuration

Generated from the settings' declarations in `daemon/src/config/tables.rs`; a test keeps it
current.

Precedence: defaults, then the file (`--config FILE` or `KVTIER_CONFIG`), then environment
variables, then flags. Frequent settings have flags of their own (`kvtierd --help`); `--set` goes
over them. `--set table.setting=value` sets anything, in every `[[disk]]` where there are several,
and in those that a later flag makes; `--set disk.NUMBER.setting=value` (from 0 on) and `--set
namespace.NAME.setting=value` set it in one, and make the next disk or that namespace. Sizes are whole numbers with B, KiB, MiB, GiB or TiB: `\"256 MiB\"`.

A daemon whose configuration is not usable names every problem and exits with code 64. So does
`kvtier check-config`, which prints the effective configuration otherwise. An unknown setting or
`KVTIER_*` variable is a problem too, except `KVTIER_CONFIG`, `KVTIER_CACHE` (where the demo and
the tests keep downloaded weights) and `KVTIER_TEST_*`.
";

/// The reference page.
pub fn page() -> String {
    let mut text = String::from(PAGE_HEAD);
    for section in sections() {
        let _ = writeln!(text, "\n## `{}`\n", section.head());
        let about: Vec<&str> = section.about.iter().map(|line| line.trim()).collect();
        let _ = writeln!(text, "{}\n", about.join("\n"));
        text.push_str("| setting | default | accepted | meaning |\n|---|---|---|---|\n");
        for field in &section.fields {
            let initial = match &field.initial {
                Initial::Default(value) => format!("`{value}`"),
                Initial::Unset(means) => (*means).to_owned(),
                Initial::Required => String::from("none, must be set"),
            };
            let about: Vec<&str> = field.about.iter().map(|line| line.trim()).collect();
            let variable = match section.name {
                NamespaceConfig::TABLE => String::new(),
                table => format!("<br>`{}`", variable_of(table, field.name)),
            };
            let _ = writeln!(
                text,
                "| `{}`{variable} | {initial} | {} | {} |",
                field.name,
                field.accepts,
                about.join(" ")
            );
        }
    }
    text
}
