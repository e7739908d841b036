//! Faults strike as the file says, and end when it says so.

use super::super::conformance::{arena, conformance, in_directories, op, read, run, write};
use super::super::lane::{LaneKind, open_lane};
use super::*;

const BLOCK: usize = 4096;

fn lane(dir: &Path) -> Box<dyn Disk + Send> {
    std::fs::write(dir.join(FILE), "").unwrap();
    open_lane(dir, LaneKind::Pread, 4, &[]).unwrap().disk
}

fn say(dir: &Path, rules: &str) {
    std::fs::write(dir.join(FILE), rules).unwrap();
}

fn sync(disk: &mut dyn Disk, file: FileId) -> std::io::Result<usize> {
    run(disk, op(OpKind::Sync, 1, file, 0, None)).moved
}

fn try_read(disk: &mut dyn Disk, file: FileId) -> Result<Vec<u8>, Option<i32>> {
    let buf = arena(BLOCK).alloc(BLOCK);
    let done = run(disk, op(OpKind::Read, 1, file, 0, buf));
    let buf = done.buf.expect("D1: the buffer comes home");
    match done.moved {
        Ok(moved) => Ok(buf[..moved].to_vec()),
        Err(problem) => Err(problem.raw_os_error()),
    }
}

#[test]
fn fault_lane_without_rules_keeps_the_promises_of_a_disk() {
    let (home, rules) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    say(rules.path(), "");
    conformance(in_directories(&home, |path, depth| {
        let lane = open_lane(path, LaneKind::Pread, depth, &[]).unwrap();
        around(rules.path(), lane).unwrap().disk
    }));
    assert!(!rules.path().join(STRUCK).exists());
}

#[test]
fn lane_is_left_alone_without_the_file_and_says_so_with_it() {
    let home = tempfile::tempdir().unwrap();
    let report = |home: &tempfile::TempDir| {
        open_lane(home.path(), LaneKind::Pread, 4, &[])
            .unwrap()
            .report
    };
    assert!(
        !report(&home)
            .without
            .iter()
            .any(|one| one.contains("faults"))
    );
    say(home.path(), "");
    assert!(
        report(&home)
            .without
            .iter()
            .any(|one| one.contains("faults"))
    );
}

#[test]
fn faults_begin_and_end_with_the_file() {
    let home = tempfile::tempdir().unwrap();
    let mut disk = lane(home.path());
    let file = disk.create("file", 1 << 20).unwrap();
    write(&mut *disk, file, 0, &[7; BLOCK]);
    say(home.path(), "read eio # a bad sector");
    assert_eq!(try_read(&mut *disk, file), Err(Some(5)));
    assert!(sync(&mut *disk, file).is_ok(), "a rule is about its call");
    say(
        home.path(),
        "sync eio\ncreate enospc\nopen eacces\nremove erofs\nlist eio",
    );
    assert_eq!(try_read(&mut *disk, file), Ok(vec![7; BLOCK]));
    assert_eq!(sync(&mut *disk, file).unwrap_err().raw_os_error(), Some(5));
    let code = |problem: std::io::Error| problem.raw_os_error();
    assert_eq!(disk.create("b", 4096).map_err(code), Err(Some(28)));
    assert_eq!(disk.open("file").map_err(code), Err(Some(13)));
    assert_eq!(disk.remove(file).map_err(code), Err(Some(30)));
    assert!(disk.list().is_err());
    std::fs::remove_file(home.path().join(FILE)).unwrap();
    assert!(sync(&mut *disk, file).is_ok() && disk.list().is_ok());
}

#[test]
fn rules_count_what_passes_and_what_they_strike() {
    let home = tempfile::tempdir().unwrap();
    let mut disk = lane(home.path());
    let file = disk.create("file", 1 << 20).unwrap();
    say(home.path(), "sync eio after=2 times=1");
    let good: Vec<bool> = (0..5).map(|_| sync(&mut *disk, file).is_ok()).collect();
    assert_eq!(good, [true, true, false, true, true]);
    let struck = std::fs::read_to_string(home.path().join(STRUCK)).unwrap();
    assert_eq!(struck.lines().count(), 1);
    assert!(struck.starts_with("sync "), "{struck}");
}

#[test]
fn lost_writes_report_success_and_flipped_reads_differ_by_one_bit() {
    let home = tempfile::tempdir().unwrap();
    let mut disk = lane(home.path());
    let file = disk.create("file", 1 << 20).unwrap();
    write(&mut *disk, file, 0, &[7; BLOCK]);
    say(home.path(), "write lost\nread flip times=1");
    write(&mut *disk, file, 0, &[9; BLOCK]);
    let flipped = try_read(&mut *disk, file).unwrap();
    let wrong: u32 = flipped.iter().map(|byte| (byte ^ 7).count_ones()).sum();
    assert_eq!(wrong, 1, "and nothing of the write");
    assert_eq!(read(&mut *disk, file, 0, BLOCK), [7; BLOCK]);
}

#[test]
fn delayed_operations_end_after_those_that_are_not() {
    let home = tempfile::tempdir().unwrap();
    let mut disk = lane(home.path());
    let file = disk.create("file", 1 << 20).unwrap();
    say(home.path(), "read delay_ms=50 times=1");
    let memory = arena(4 * BLOCK);
    for user in 1..4 {
        let read = op(OpKind::Read, user, file, 0, memory.alloc(BLOCK));
        disk.submit(read).unwrap();
    }
    assert_eq!(disk.in_flight(), 3);
    let mut done = Vec::new();
    while disk.in_flight() > 0 {
        disk.reap(Wait::One, &mut done);
    }
    let mut order: Vec<u64> = done.iter().map(|one| one.user).collect();
    assert_eq!(order.pop(), Some(1), "the delayed one comes last");
    assert!(
        done.iter()
            .all(|one| one.buf.is_some() && one.moved.is_ok())
    );
}

#[test]
fn a_line_that_is_no_rule_is_refused_by_name() {
    let home = tempfile::tempdir().unwrap();
    for line in [
        "read",
        "read eoi",
        "reed eio",
        "read eio times",
        "read delay_ms=x",
    ] {
        say(home.path(), line);
        let error = open_lane(home.path(), LaneKind::Pread, 4, &[]).unwrap_err();
        assert!(error.to_string().contains(line), "{error}");
        assert!(error.to_string().contains("delay_ms=N"), "{error}");
    }
}
