//! `inspect`: what lies in a disk tier's directory, without a daemon.
//!
//! Upstairs:   `kvtier inspect`.
//! Downstairs: `inspect::files` reads, through the decoders of `kvtier-store`'s format.
//!
//! It reads and never writes. Beside a running daemon it may show a segment half written.
//!
//! Not here on purpose: no judgement of payloads; `verify` reads every byte and checks it. No
//! payload is ever shown.

pub(super) mod files;

use std::fmt::Write;
use std::path::PathBuf;

use kvtier_proto::{BlockKey, NamespaceId, PayloadKind};
use kvtier_store::format::{SegmentHeader, Superblock};
use kvtier_store::{Head, Summary};
use serde_json::{Value, json};
use strum::IntoEnumIterator;

use super::connect::CliError;
use super::output::{Answer, section, size, table};
use crate::block::BlockId;
use files::{Folder, Segment, Source};

/// Most rows of a table; JSON is not shortened.
const ROWS_SHOWN: usize = 200;

/// Flags of `inspect`.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// Directory of the disk tier (disk.path)
    dir: PathBuf,
    /// List the records of this segment
    #[arg(long, short, value_name = "NUMBER")]
    segment: Option<u32>,
    /// Show one record of the segment: its header and its parts
    #[arg(long, short, value_name = "BYTES", requires = "segment")]
    offset: Option<u64>,
    /// List the records of this key, or of all keys that start with these hex digits
    #[arg(long, short, value_name = "HEX", conflicts_with = "segment", value_parser = prefix)]
    key: Option<String>,
}

/// Reads the beginning of a key.
fn prefix(text: &str) -> Result<String, String> {
    let hex = text.bytes().all(|byte| byte.is_ascii_hexdigit());
    match hex && (1..=64).contains(&text.len()) {
        true => Ok(text.to_ascii_lowercase()),
        false => Err(String::from("accepted: 1 to 64 hex digits")),
    }
}

pub(super) fn run(args: &Args) -> Result<Answer, CliError> {
    let folder = Folder::open(&args.dir)?;
    match (args.segment, args.offset, &args.key) {
        (Some(number), Some(offset), _) => {
            let segment = folder.segment(number)?;
            let head = folder.head(&segment, offset)?;
            Ok(record(&segment, offset, &head))
        }
        (Some(number), None, _) => Ok(records(&folder, &folder.segment(number)?)),
        (None, _, Some(key)) => by_key(&folder, key),
        (None, _, None) => overview(&folder),
    }
}

fn overview(folder: &Folder) -> Result<Answer, CliError> {
    let mut text = String::new();
    let superblock = folder.superblock()?;
    match &superblock {
        Some(superblock) => text += &superblock_text(superblock),
        None => text += "no sound superblock: a daemon would start over with an empty store\n",
    }
    let columns = [
        "segment",
        "state",
        ">epoch",
        ">records",
        ">used",
        ">size",
        ">first seq",
        ">last seq",
    ];
    let mut rows = table(&columns);
    let mut list = Vec::new();
    let (mut records, mut used) = (0, 0);
    for number in folder.segments() {
        let segment = folder.segment(number)?;
        let state = state(&segment, superblock.as_ref());
        records += segment.records.len();
        used += segment.used();
        let (first, last) = sequences(&segment.records);
        list.push(json!({
            "segment": number, "state": state, "epoch": segment.epoch(), "size_bytes": segment.len,
            "records": segment.records.len(), "used_bytes": segment.used(),
            "first_sequence": first, "last_sequence": last,
        }));
        if list.len() <= ROWS_SHOWN {
            rows.add_row([
                number.to_string(),
                state.to_owned(),
                segment.epoch().to_string(),
                segment.records.len().to_string(),
                size(segment.used()),
                size(segment.len),
                first.to_string(),
                last.to_string(),
            ]);
        }
    }
    let _ = writeln!(
        text,
        "{} segments, {records} records, {} used",
        list.len(),
        size(used)
    );
    text += &section("Segments", &rows);
    text += &shortened(list.len());
    let superblock = superblock.as_ref().map(superblock_json);
    Ok(Answer::new(
        json!({ "superblock": superblock, "segments": list }),
        text,
    ))
}

fn superblock_text(superblock: &Superblock) -> String {
    let closed = match superblock.clean {
        Some(clean) => format!("closed in order with a catalog of {} blocks", clean.rows),
        None => String::from("open now, or not closed in order"),
    };
    let mut text = format!(
        "store {:?}, opened {} times, {closed}\n",
        superblock.store_id, superblock.incarnation
    );
    for wiped in &superblock.wiped {
        let _ = writeln!(
            text,
            "namespace {} was wiped: its records below sequence {} are gone",
            wiped.namespace, wiped.below
        );
    }
    text
}

fn superblock_json(superblock: &Superblock) -> Value {
    let wiped = superblock.wiped.iter();
    let wiped = wiped.map(|one| json!({ "namespace_id": one.namespace.0, "below": one.below }));
    json!({
        "revision": superblock.revision, "incarnation": superblock.incarnation,
        "segment_bytes": superblock.segment_size, "floor": superblock.floor,
        "clean": superblock.clean.is_some(), "wiped": wiped.collect::<Vec<_>>(),
    })
}

/// What a segment is, as far as header and footer tell.
fn state(segment: &Segment, superblock: Option<&Superblock>) -> &'static str {
    let foreign = |header: &SegmentHeader| {
        superblock.is_some_and(|superblock| superblock.store_id != header.store_id)
    };
    match (&segment.header, segment.source) {
        (None, _) if segment.blank => "never written",
        (None, _) => "no sound header",
        (Some(header), _) if foreign(header) => "of an earlier store",
        (Some(_), Source::Footer) => "sealed",
        (Some(_), Source::Walk) => "no footer",
    }
}

fn sequences(records: &[Summary]) -> (u64, u64) {
    let sequences = || records.iter().map(|record| record.place.sequence);
    (
        sequences().min().unwrap_or(0),
        sequences().max().unwrap_or(0),
    )
}

fn shortened(rows: usize) -> String {
    match rows.checked_sub(ROWS_SHOWN) {
        Some(more @ 1..) => format!("and {more} more: --json shows all\n"),
        _ => String::new(),
    }
}

fn records(folder: &Folder, segment: &Segment) -> Answer {
    let superblock = folder.superblock().ok().flatten();
    let text = format!(
        "segment {}: {}, epoch {}, {} records{}\n",
        segment.number,
        state(segment, superblock.as_ref()),
        segment.epoch(),
        segment.records.len(),
        match segment.refused {
            0 => String::new(),
            refused => format!(", {refused} blocks that are no record"),
        }
    );
    list(&segment.records, superblock.as_ref(), text)
}

/// Records by the beginning of their name, which for KV is the block's key; with the whole key
/// of a block, the records of all its kinds.
fn by_key(folder: &Folder, prefix: &str) -> Result<Answer, CliError> {
    let names: Vec<BlockKey> = BlockKey::from_hex(prefix).map_or_else(Vec::new, record_names);
    let is_meant =
        |record: &Summary| record.key.to_hex().starts_with(prefix) || names.contains(&record.key);
    let mut found = Vec::new();
    for number in folder.segments() {
        found.extend(folder.segment(number)?.records.into_iter().filter(is_meant));
    }
    found.sort_by_key(|record| std::cmp::Reverse(record.place.sequence));
    let text = format!(
        "{} records of keys {prefix}.., the newest first\n",
        found.len()
    );
    Ok(list(&found, folder.superblock()?.as_ref(), text))
}

/// What the records of a block are called, one name a kind.
fn record_names(key: BlockKey) -> Vec<BlockKey> {
    let id = |kind| BlockId {
        // Not part of the name.
        namespace: NamespaceId(0),
        kind,
        key,
    };
    PayloadKind::iter()
        .map(|kind| id(kind).record_key())
        .collect()
}

fn list(records: &[Summary], superblock: Option<&Superblock>, mut text: String) -> Answer {
    let wiped = |record: &Summary| {
        superblock.is_some_and(|now| now.is_wiped(record.namespace, record.place.sequence))
    };
    let columns = [
        "key",
        ">ns",
        "kind",
        ">level",
        ">position",
        ">tokens",
        ">segment",
        ">offset",
        ">stored",
        ">sequence",
        "layout",
        "",
    ];
    let mut rows = table(&columns);
    for record in records.iter().take(ROWS_SHOWN) {
        rows.add_row([
            record.key.short(),
            record.namespace.to_string(),
            record.kind.as_str().to_owned(),
            record.level.to_string(),
            record.position.to_string(),
            record.tokens.to_string(),
            record.place.segment.to_string(),
            record.place.offset.to_string(),
            size(u64::from(record.place.len)),
            record.place.sequence.to_string(),
            record.layout.short(),
            String::from(if wiped(record) { "wiped" } else { "" }),
        ]);
    }
    text += &section("Records", &rows);
    text += &shortened(records.len());
    let with_wiped = |record: &Summary| {
        let mut json = summary_json(record);
        if let Value::Object(fields) = &mut json {
            fields.insert(String::from("wiped"), wiped(record).into());
        }
        json
    };
    let records: Vec<Value> = records.iter().map(with_wiped).collect();
    Answer::new(json!({ "records": records }), text)
}

fn summary_json(record: &Summary) -> Value {
    json!({
        "key": record.key.to_hex(), "parent": record.parent.to_hex(),
        "namespace_id": record.namespace.0, "kind": record.kind.as_str(),
        "level": record.level.0, "position": record.position, "tokens": record.tokens,
        "segment": record.place.segment, "offset": record.place.offset,
        "image_bytes": record.place.len, "sequence": record.place.sequence,
        "epoch": record.place.epoch, "layout": record.layout.short(),
    })
}

fn record(segment: &Segment, offset: u64, head: &Head) -> Answer {
    let header = &head.header;
    let summary = &header.summary;
    let mut text = format!(
        "record at {offset} of segment {}\nkey {}\nparent {}\n",
        segment.number,
        summary.key.to_hex(),
        summary.parent.to_hex()
    );
    let _ = writeln!(
        text,
        "namespace {}, {} at level {}, tokens {} to {}, {} stored of {} raw, sequence {}",
        summary.namespace,
        summary.kind.as_str(),
        summary.level,
        summary.position,
        summary.position.saturating_add(summary.tokens),
        size(u64::from(header.stored_len)),
        size(u64::from(header.raw_len)),
        summary.place.sequence
    );
    let mut rows = table(&[">layer", "part", ">offset", ">stored", ">raw", ">checksums"]);
    let mut parts = Vec::new();
    for part in head.parts() {
        let code: &'static str = part.code.into();
        rows.add_row([
            part.layer.to_string(),
            code.to_owned(),
            part.offset.to_string(),
            part.stored_len.to_string(),
            part.raw_len.to_string(),
            part.spans().to_string(),
        ]);
        parts.push(json!({
            "layer": part.layer, "part": code, "offset": part.offset,
            "stored_bytes": part.stored_len, "raw_bytes": part.raw_len,
        }));
    }
    text += &section("Parts", &rows);
    let mut json = summary_json(summary);
    if let Value::Object(fields) = &mut json {
        fields.insert(String::from("stored_bytes"), header.stored_len.into());
        fields.insert(String::from("raw_bytes"), header.raw_len.into());
        fields.insert(String::from("parts"), parts.into());
    }
    Answer::new(json, text)
}

#[cfg(test)]
mod tests;
