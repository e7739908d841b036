//! `verify`: reads every byte of a disk tier and checks every checksum, without a daemon.
//!
//! Upstairs:   `kvtier verify`.
//! Downstairs: `kvtier_store::verify`, which judges and never repairs.
//!
//! Exit codes, by severity: 0 sound or untidy: no damage was found; 1 damaged; 3 lost; 2 it could
//! not be done. In a segment without a footer a block that fails its checksum is no damage found:
//! it may as well be a write that was cut off. Such blocks are counted beside the segment.
//!
//! Not here on purpose: no repair. A damaged record is a miss to the daemon, and its space comes
//! back when the segment is recycled.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs::File;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use kvtier_proto::Miss;
use kvtier_store::disk::file::FileLane;
use kvtier_store::format::superblock::{SLOT_LEN, SLOTS};
use kvtier_store::verify::{RecordRow, Report, SegmentRow, Severity, VerifyProgress};
use serde_json::{Value, json};

use super::connect::CliError;
use super::inspect::files::Folder;
use super::output::{Answer, section, size, table};
use super::{EXIT_BAD_NEWS, EXIT_FAILED};

/// Operations in flight while reading: enough to keep a device busy with large reads.
const DEPTH: usize = 16;
/// Most rows of a table; JSON is not shortened.
const ROWS_SHOWN: usize = 200;
/// File in the directory that a running daemon holds locked.
const LOCK: &str = "lock";

/// Exit code when the whole store is lost.
const EXIT_LOST: u8 = 3;

/// Flags of `verify`.
#[derive(Debug, Clone, clap::Args)]
#[command(
    after_help = "Exit codes: 0 no damage was found (sound, or untidy after a crash); 1 records \
are damaged; 2 it could not be done; 3 the store is lost: a daemon would start over. Nothing is \
changed or repaired."
)]
pub(super) struct Args {
    /// Directory of a disk (disk.path); with several, each is verified and the worst one decides
    #[arg(required = true)]
    dirs: Vec<PathBuf>,
    /// Show every record with its verdict, not only the damaged ones
    #[arg(long)]
    records: bool,
}

pub(super) fn run(args: &Args) -> Result<Answer, CliError> {
    if let [dir] = args.dirs.as_slice() {
        return verify(dir, args.records);
    }
    let (mut disks, mut text, mut code) = (Vec::new(), String::new(), 0);
    for dir in &args.dirs {
        let shown = dir.display().to_string();
        let mut answer = verify(dir, args.records).unwrap_or_else(|error| Answer {
            code: EXIT_FAILED,
            ..Answer::new(json!({ "error": error.to_string() }), error.to_string())
        });
        text += &format!("{shown}\n{}\n\n", answer.text.trim_end());
        code = code.max(answer.code);
        if let Some(fields) = answer.json.as_object_mut() {
            fields.insert("dir".to_owned(), json!(shown));
        }
        disks.push(answer.json);
    }
    Ok(Answer {
        code,
        ..Answer::new(json!({ "disks": disks }), text)
    })
}

fn verify(dir: &Path, every_record: bool) -> Result<Answer, CliError> {
    // Says what is wrong with the directory when it holds no store.
    Folder::open(dir)?;
    let _lock = lock(dir)?;
    let failed = |what: &dyn std::fmt::Display| {
        CliError::Usage(format!("{} cannot be verified: {what}", dir.display()))
    };
    crate::process::allow_open_files();
    let disk = FileLane::open_to_read(dir, DEPTH).map_err(|error| failed(&error))?;
    let bar = bar();
    let mut records = Vec::new();
    let report =
        kvtier_store::verify::run_each(disk, &mut |progress| show(&bar, progress), &mut |row| {
            records.extend(Some(*row).filter(|_| every_record))
        });
    bar.finish_and_clear();
    let report = report.map_err(|error| failed(&crate::log::chain(&error)))?;
    let mut answer = answer(&report);
    if every_record {
        answer.text += &verdicts(&records);
        let verdicts = records.iter().map(verdict).collect();
        if let Some(fields) = answer.json.as_object_mut() {
            fields.insert("verdicts".to_owned(), verdicts);
        }
    }
    Ok(answer)
}

/// Every record, in the order of their places.
fn verdicts(records: &[RecordRow]) -> String {
    let mut rows = table(&["key", ">ns", ">segment", ">offset", ">bytes", "verdict"]);
    for row in records {
        rows.add_row([
            row.key.short(),
            row.namespace.to_string(),
            row.segment.to_string(),
            row.offset.to_string(),
            row.len.to_string(),
            row.verdict.as_str().to_owned(),
        ]);
    }
    section("Records", &rows)
}

fn verdict(row: &RecordRow) -> Value {
    json!({
        "key": row.key.to_hex(), "namespace_id": row.namespace.0, "segment": row.segment,
        "offset": row.offset, "bytes": row.len, "verdict": row.verdict.as_str(),
    })
}

/// Keeps a daemon from starting on the directory meanwhile, and refuses where one runs.
fn lock(dir: &Path) -> Result<Option<File>, CliError> {
    let Ok(file) = File::open(dir.join(LOCK)) else {
        return Ok(None);
    };
    let shared = rustix::fs::FlockOperation::NonBlockingLockShared;
    match rustix::fs::flock(&file, shared) {
        Err(rustix::io::Errno::WOULDBLOCK) => Err(CliError::Usage(format!(
            "{} is in use by a running daemon: stop it first, or what it is writing would look \
             like damage",
            dir.display()
        ))),
        _ => Ok(Some(file)),
    }
}

fn bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    let template = "{msg} [{wide_bar}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn show(bar: &ProgressBar, progress: &VerifyProgress) {
    bar.set_length(progress.bytes_total);
    bar.set_position(progress.bytes);
    bar.set_message(format!(
        "segment {} of {}",
        progress.segments_done, progress.segments_total
    ));
}

fn answer(report: &Report) -> Answer {
    let severity = report.severity();
    let name: &'static str = severity.into();
    let mut text = format!(
        "{name}: {} records in {} segments, {} read. {}\n",
        report.records,
        report.segments.len(),
        size(report.bytes),
        meaning(severity)
    );
    text += &superblock(report);
    if report.unopened > 0 {
        let _ = writeln!(
            text,
            "{} segment files did not open; nothing is known of them (the log says why)",
            report.unopened
        );
    }
    text += &reasons(&report.damage);
    text += &segments(&report.segments);
    text += &damaged(&report.segments);
    let mut answer = Answer::new(to_json(report, name), text);
    answer.code = match severity {
        Severity::Sound | Severity::Untidy => 0,
        Severity::Damaged => EXIT_BAD_NEWS,
        Severity::Lost => EXIT_LOST,
    };
    answer
}

/// What is wrong with the superblock, if anything.
fn superblock(report: &Report) -> String {
    let mut text = String::new();
    if report.bad_slots > 0 {
        let _ = writeln!(
            text,
            "{} slots of the superblock are not sound",
            report.bad_slots
        );
    }
    let whole = SLOTS * SLOT_LEN;
    match report.superblock_misfit {
        Some(len) if report.superblock.is_some() => {
            let _ = writeln!(
                text,
                "superblock.kvs is {len} bytes long and was made with {whole}: no daemon starts \
                 until it has its length again (truncate -s {whole})"
            );
        }
        _ => {}
    }
    if report.superblock_outdated {
        text += "A segment is younger than the superblock, which has forgotten something, perhaps \
                 a wipe: it counts for nothing.\n";
    }
    text
}

fn meaning(severity: Severity) -> &'static str {
    match severity {
        Severity::Sound => "Everything that should be there is there and right.",
        Severity::Untidy => {
            "The daemon was not stopped in order: a segment has no footer, and the next start reads it \
             record by record. Other blocks there are writes that were cut off, or damage: without \
             the footer nobody can tell."
        }
        Severity::Damaged => {
            "Damaged records are misses to the daemon, never wrong bytes. Check the device."
        }
        Severity::Lost => "No superblock counts: a daemon would start over with an empty store.",
    }
}

fn reasons(damage: &BTreeMap<Miss, u64>) -> String {
    let mut rows = table(&["damage", ">records"]);
    for (miss, count) in damage {
        rows.add_row([miss.as_str().to_owned(), count.to_string()]);
    }
    section("Damage", &rows)
}

/// Segments with something to say; the others are only counted.
fn segments(all: &[SegmentRow]) -> String {
    let quiet = |row: &&SegmentRow| row.header && row.footer && row.bad.is_empty();
    let mut rows = table(&[
        "segment",
        "header",
        "footer",
        ">records",
        ">wiped",
        ">damaged",
        "other blocks",
    ]);
    let word = |sound| if sound { "sound" } else { "no" };
    let loud = || all.iter().filter(|row| !quiet(row));
    for row in loud().take(ROWS_SHOWN) {
        let other = row
            .other
            .iter()
            .map(|(miss, count)| format!("{count} {}", miss.as_str()));
        rows.add_row([
            row.segment.to_string(),
            word(row.header).to_owned(),
            word(row.footer).to_owned(),
            row.records.to_string(),
            row.wiped.to_string(),
            row.bad.len().to_string(),
            other.collect::<Vec<_>>().join(", "),
        ]);
    }
    let mut text = section("Segments that are not sealed and whole", &rows);
    if let Some(more @ 1..) = loud().count().checked_sub(ROWS_SHOWN) {
        let _ = writeln!(text, "and {more} more: --json shows all");
    }
    text
}

fn damaged(all: &[SegmentRow]) -> String {
    let mut rows = table(&["key", ">ns", ">segment", ">offset", "reason"]);
    let bad = || {
        all.iter()
            .flat_map(|row| row.bad.iter().map(move |bad| (row.segment, bad)))
    };
    for (segment, bad) in bad().take(ROWS_SHOWN) {
        rows.add_row([
            bad.key.short(),
            bad.namespace.to_string(),
            segment.to_string(),
            bad.offset.to_string(),
            bad.reason.as_str().to_owned(),
        ]);
    }
    let mut text = section("Damaged records", &rows);
    if let Some(more @ 1..) = bad().count().checked_sub(ROWS_SHOWN) {
        let _ = writeln!(text, "and {more} more: --json shows all");
    }
    text
}

fn counts(counts: &BTreeMap<Miss, u64>) -> Value {
    counts
        .iter()
        .map(|(miss, count)| (miss.as_str().to_owned(), json!(count)))
        .collect()
}

fn to_json(report: &Report, severity: &str) -> Value {
    let segments = report.segments.iter().map(|row| {
        let bad = row.bad.iter().map(|bad| {
            json!({
                "offset": bad.offset, "namespace_id": bad.namespace.0, "key": bad.key.to_hex(),
                "reason": bad.reason.as_str(),
            })
        });
        json!({
            "segment": row.segment, "epoch": row.epoch, "size_bytes": row.size,
            "header": row.header, "footer": row.footer, "records": row.records,
            "wiped": row.wiped, "record_bytes": row.bytes, "other": counts(&row.other),
            "damaged": bad.collect::<Vec<_>>(),
        })
    });
    json!({
        "severity": severity, "records": report.records, "read_bytes": report.bytes,
        "bad_superblock_slots": report.bad_slots,
        "superblock_misfit_bytes": report.superblock_misfit,
        "superblock_outdated": report.superblock_outdated,
        "unopened_segments": report.unopened, "damage": counts(&report.damage),
        "segments": segments.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests;
