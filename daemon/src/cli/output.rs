//! What a command prints, and in which form.
//!
//! Upstairs:   every command gives an [`Answer`].
//! Downstairs: standard output and standard error.

use std::io::Write;
use std::process::ExitCode;

use comfy_table::presets::NOTHING;
use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, TableComponent};
use kvtier_proto::Bytes;
use serde_json::Value;

use super::connect::CliError;
use crate::config::EXIT_BAD_CONFIG;

/// What a command found out.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// For machines.
    pub json: Value,
    /// For people.
    pub text: String,
    /// Exit code of the process.
    pub code: u8,
}

impl Answer {
    /// An answer that is good news.
    pub(super) fn new(json: Value, text: impl Into<String>) -> Self {
        Self {
            json,
            text: text.into(),
            code: 0,
        }
    }
}

/// Prints an answer. A reader that went away (`kvtier status | head`) is no failure.
pub(super) fn print(answer: &Answer, json: bool) -> ExitCode {
    let text = match json {
        true => format!("{:#}", answer.json),
        false => answer.text.clone(),
    };
    let text = text.trim_end();
    let _ = match answer.code == EXIT_BAD_CONFIG && !json {
        true => writeln!(std::io::stderr(), "{text}"),
        false => writeln!(std::io::stdout(), "{text}"),
    };
    ExitCode::from(answer.code)
}

/// Prints why a command could not be done.
pub(super) fn fail(error: &CliError, json: bool, code: u8) -> ExitCode {
    let text = match json {
        true => format!("{:#}", serde_json::json!({ "error": error.to_string() })),
        false => format!("kvtier: {error}"),
    };
    let _ = writeln!(std::io::stderr(), "{text}");
    ExitCode::from(code)
}

/// A table with these columns; a name that starts with `>` is a column of numbers.
pub(super) fn table(columns: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(NOTHING);
    table.set_style(TableComponent::HeaderLines, '-');
    table.set_style(TableComponent::MiddleHeaderIntersections, '-');
    table.set_content_arrangement(ContentArrangement::Disabled);
    let names = columns
        .iter()
        .map(|name| Cell::new(name.trim_start_matches('>')));
    table.set_header(names);
    for (index, name) in columns.iter().enumerate() {
        if let Some(column) = table.column_mut(index).filter(|_| name.starts_with('>')) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// A heading above a table, or nothing when there are no rows.
pub(super) fn section(heading: &str, table: &Table) -> String {
    match table.is_empty() {
        true => String::new(),
        false => format!("\n{heading}\n{table}\n"),
    }
}

/// A size for a table.
pub(super) fn size(bytes: u64) -> String {
    Bytes(bytes).to_string()
}

/// A duration for a table.
pub(super) fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, ..) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

/// A part of a whole in percent; nothing of nothing is a dash.
pub(super) fn percent(part: f64, whole: f64) -> String {
    match whole > 0.0 {
        true => format!("{:.1} %", 100.0 * part / whole),
        false => String::from("-"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_people_say_them() {
        let shown = [0, 59, 60, 3_599, 3_600, 90_000].map(duration);
        let want = [
            "0 s",
            "59 s",
            "1 min 0 s",
            "59 min 59 s",
            "1 h 0 min",
            "1 d 1 h",
        ];
        assert_eq!(shown, want);
    }

    #[test]
    fn empty_tables_leave_no_heading() {
        assert_eq!(section("Sessions", &table(&["client"])), "");
        let mut one = table(&["client", ">leases"]);
        one.add_row(["x", "1"]);
        assert!(section("Sessions", &one).starts_with("\nSessions\n"));
    }

    #[test]
    fn percentages_of_nothing_are_a_dash() {
        assert_eq!(
            (percent(1.0, 4.0).as_str(), percent(0.0, 0.0).as_str()),
            ("25.0 %", "-")
        );
    }
}
