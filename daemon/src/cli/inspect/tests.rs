//! `inspect` against directories that the store itself wrote.

use std::path::Path;

use crate::cli::stores;

use super::*;

fn inspect(dir: &Path, tune: impl FnOnce(&mut Args)) -> Result<Answer, CliError> {
    let mut args = Args {
        dir: dir.to_owned(),
        segment: None,
        offset: None,
        key: None,
    };
    tune(&mut args);
    run(&args)
}

#[test]
fn overview_counts_what_the_store_wrote() {
    let dir = tempfile::tempdir().unwrap();
    stores::with_blocks(dir.path(), 5);
    let answer = inspect(dir.path(), |_| {}).unwrap();
    assert!(
        answer
            .text
            .contains("closed in order with a catalog of 5 blocks"),
        "{}",
        answer.text
    );
    assert!(answer.text.contains(" 5 records, "), "{}", answer.text);
    assert_eq!(answer.json["superblock"]["clean"], true);
    let records = answer.json["segments"].as_array().unwrap().iter();
    let sum: u64 = records
        .map(|segment| segment["records"].as_u64().unwrap())
        .sum();
    assert_eq!(sum, 5);
}

#[test]
fn records_are_listed_by_segment_and_found_by_key() {
    let dir = tempfile::tempdir().unwrap();
    stores::with_blocks(dir.path(), 3);
    let overview = inspect(dir.path(), |_| {}).unwrap();
    let number = overview.json["segments"][0]["segment"].as_u64().unwrap();
    let listed = inspect(dir.path(), |args| args.segment = u32::try_from(number).ok()).unwrap();
    let keys: Vec<&str> = listed.json["records"]
        .as_array()
        .unwrap()
        .iter()
        .map(|record| record["key"].as_str().unwrap())
        .collect();
    assert_eq!(keys, [0, 1, 2].map(|number| stores::key(number).to_hex()));
    let hex = stores::key(1).to_hex();
    let found = inspect(dir.path(), |args| args.key = Some(hex[..8].to_owned())).unwrap();
    assert_eq!(found.json["records"].as_array().unwrap().len(), 1);
    assert_eq!(found.json["records"][0]["key"], hex);
}

// Goal: a segment whose footer is lost shows the same records as before.
#[test]
fn records_are_found_without_a_footer() {
    let dir = tempfile::tempdir().unwrap();
    stores::with_blocks(dir.path(), 4);
    let before = inspect(dir.path(), |args| args.segment = Some(stores::SEGMENT)).unwrap();
    assert!(before.text.contains("sealed"), "{}", before.text);
    stores::scribble(dir.path(), stores::SEGMENT, stores::SEGMENT_SIZE - 4096, 64);
    let after = inspect(dir.path(), |args| args.segment = Some(stores::SEGMENT)).unwrap();
    assert!(after.text.contains("no footer"), "{}", after.text);
    assert_eq!(after.json, before.json);
}

#[test]
fn record_shows_its_parts() {
    let dir = tempfile::tempdir().unwrap();
    stores::with_blocks(dir.path(), 2);
    let listed = inspect(dir.path(), |args| args.segment = Some(stores::SEGMENT)).unwrap();
    let offset = listed.json["records"][1]["offset"].as_u64();
    let record = inspect(dir.path(), |args| {
        args.segment = Some(stores::SEGMENT);
        args.offset = offset;
    });
    let record = record.unwrap();
    assert_eq!(record.json["key"], stores::key(1).to_hex());
    assert_eq!(record.json["parts"].as_array().unwrap().len(), 2);
    assert_eq!(record.json["parts"][1]["part"], "v");
    assert_eq!(record.json["raw_bytes"], stores::PAYLOAD);
}

#[test]
fn wrong_offset_is_told_where_records_begin() {
    let dir = tempfile::tempdir().unwrap();
    stores::with_blocks(dir.path(), 1);
    let error = inspect(dir.path(), |args| {
        args.segment = Some(stores::SEGMENT);
        args.offset = Some(8192);
    });
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("--offset is 8192") && error.contains("begin at 4096"),
        "{error}"
    );
}

#[test]
fn other_directories_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let error = inspect(dir.path(), |_| {}).unwrap_err().to_string();
    assert!(
        error.contains("is not a disk tier") && error.contains("disk.path"),
        "{error}"
    );
    let error = inspect(Path::new("/nonexistent"), |_| {})
        .unwrap_err()
        .to_string();
    assert!(error.contains("/nonexistent cannot be read"), "{error}");
}

#[test]
fn key_prefix_is_hex() {
    assert_eq!(prefix("AB01"), Ok(String::from("ab01")));
    assert!(prefix("").is_err() && prefix("xy").is_err() && prefix(&"a".repeat(65)).is_err());
}

// Goal: an operator who knows a block's key finds its hidden states too, whose record the daemon
// names otherwise.
#[test]
fn whole_key_stands_for_the_records_of_all_kinds() {
    let names = record_names(stores::key(1));
    assert!(
        names.contains(&stores::key(1)),
        "KV is found under its own key"
    );
    assert_eq!(names.len(), PayloadKind::iter().count());
    let dir = tempfile::tempdir().unwrap();
    stores::with_blocks(dir.path(), 3);
    let found = inspect(dir.path(), |args| args.key = Some(stores::key(1).to_hex())).unwrap();
    assert_eq!(found.json["records"].as_array().unwrap().len(), 1);
}
