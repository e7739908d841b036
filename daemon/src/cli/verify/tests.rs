//! `verify` against directories that the store itself wrote, whole and damaged.

use crate::cli::stores;

use super::*;

fn verify(dir: &Path) -> Result<Answer, CliError> {
    run(&Args {
        dirs: vec![dir.to_owned()],
        records: false,
    })
}

fn superblock(dir: &Path) -> File {
    let path = dir.join("superblock.kvs");
    File::options().write(true).open(path).unwrap()
}

#[test]
fn verify_is_quiet_about_a_sound_store() {
    let dir = tempfile::tempdir().unwrap();
    stores::with_blocks(dir.path(), 4);
    let answer = verify(dir.path()).unwrap();
    assert_eq!(answer.code, 0, "{}", answer.text);
    assert!(
        answer.text.starts_with("sound: 4 records in "),
        "{}",
        answer.text
    );
    assert_eq!(answer.json["severity"], "sound");
    assert_eq!(answer.json["records"], 4);
}

// Goal: one flipped byte anywhere in a payload is found, named and changes the exit code.
#[test]
fn verify_names_the_damaged_record_and_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    stores::with_blocks(dir.path(), 4);
    // Head room of one block, then the payload of block 0.
    stores::scribble(dir.path(), stores::SEGMENT, 2 * 4096 + 100, 1);
    let answer = verify(dir.path()).unwrap();
    assert_eq!(answer.code, EXIT_BAD_NEWS);
    assert_eq!(answer.json["severity"], "damaged");
    assert_eq!(answer.json["damage"]["payload_crc"], 1);
    assert_eq!(answer.json["records"], 3);
    let bad = &answer.json["segments"][0]["damaged"][0];
    assert_eq!(bad["key"], stores::key(0).to_hex());
    assert!(answer.text.contains("payload_crc"), "{}", answer.text);
    assert!(
        answer.text.contains(&stores::key(0).short()),
        "{}",
        answer.text
    );
}

#[test]
fn verify_takes_a_lost_footer_for_untidy_not_for_damage() {
    let dir = tempfile::tempdir().unwrap();
    stores::with_blocks(dir.path(), 4);
    stores::scribble(dir.path(), stores::SEGMENT, stores::SEGMENT_SIZE - 4096, 64);
    let answer = verify(dir.path()).unwrap();
    assert_eq!(
        (answer.code, &answer.json["severity"]),
        (0, &json!("untidy"))
    );
    assert_eq!(answer.json["records"], 4);
}

#[test]
fn verify_says_lost_by_its_own_exit_code_without_a_superblock() {
    let dir = tempfile::tempdir().unwrap();
    stores::with_blocks(dir.path(), 4);
    std::fs::write(dir.path().join("superblock.kvs"), vec![0; 128 << 10]).unwrap();
    let answer = verify(dir.path()).unwrap();
    assert_eq!(answer.code, EXIT_LOST, "{}", answer.text);
    assert_eq!(answer.json["severity"], "lost");
}

// Nothing is lost: a daemon refuses to start until the file has its length again.
#[test]
fn verify_tells_how_to_mend_a_superblock_file_of_another_length() {
    let dir = tempfile::tempdir().unwrap();
    stores::with_blocks(dir.path(), 4);
    superblock(dir.path()).set_len(64 << 10).unwrap();
    let answer = verify(dir.path()).unwrap();
    assert_eq!(answer.code, EXIT_BAD_NEWS);
    assert_eq!(answer.json["records"], 4);
    assert_eq!(answer.json["superblock_misfit_bytes"], 64 << 10);
    assert!(
        answer.text.contains("truncate -s 131072"),
        "{}",
        answer.text
    );
    superblock(dir.path()).set_len(128 << 10).unwrap();
    let answer = verify(dir.path()).unwrap();
    assert_eq!(
        (answer.code, &answer.json["severity"]),
        (0, &json!("untidy"))
    );
}

#[test]
fn verify_lists_every_record_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    stores::with_blocks(dir.path(), 4);
    stores::scribble(dir.path(), stores::SEGMENT, 2 * 4096 + 100, 1);
    let args = Args {
        dirs: vec![dir.path().to_owned()],
        records: true,
    };
    let answer = run(&args).unwrap();
    let verdicts = answer.json["verdicts"].as_array().unwrap();
    let named = |word: &str| verdicts.iter().filter(|row| row["verdict"] == word).count();
    assert_eq!((named("sound"), named("payload_crc")), (3, 1));
    assert!(
        answer.text.contains(&stores::key(3).short()),
        "{}",
        answer.text
    );
    assert!(verify(dir.path()).unwrap().json["verdicts"].is_null());
}

#[test]
fn verify_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    stores::with_blocks(dir.path(), 2);
    let content = || {
        let mut files: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_file())
            .map(|path| (path.clone(), std::fs::read(path).unwrap()))
            .collect();
        files.sort();
        files
    };
    let before = content();
    verify(dir.path()).unwrap();
    assert!(content() == before, "files changed");
}

#[test]
fn verify_refuses_a_directory_that_a_daemon_holds() {
    let dir = tempfile::tempdir().unwrap();
    stores::with_blocks(dir.path(), 1);
    let held = File::create(dir.path().join(LOCK)).unwrap();
    let exclusive = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    rustix::fs::flock(&held, exclusive).unwrap();
    let error = verify(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("in use by a running daemon: stop it first"),
        "{error}"
    );
    drop(held);
    assert!(verify(dir.path()).is_ok());
}

// Goal: one look at all disks of a daemon, of which the worst decides, and none hides another.
#[test]
fn verify_of_several_disks_says_which_is_which_and_ends_as_the_worst() {
    let home = tempfile::tempdir().unwrap();
    let dirs = ["sound", "damaged", "no-store"].map(|name| home.path().join(name));
    dirs.iter()
        .for_each(|dir| std::fs::create_dir(dir).unwrap());
    stores::with_blocks(&dirs[0], 3);
    stores::with_blocks(&dirs[1], 3);
    stores::scribble(&dirs[1], stores::SEGMENT, 4096 + 4096 + 100, 8);
    let verify = |count: usize| {
        run(&Args {
            dirs: dirs[..count].to_vec(),
            records: false,
        })
        .unwrap()
    };
    let two = verify(2);
    assert_eq!(two.code, 1, "{}", two.text);
    assert_eq!(two.json["disks"][0]["severity"], "sound");
    assert_eq!(two.json["disks"][1]["severity"], "damaged");
    assert_eq!(two.json["disks"][1]["dir"], dirs[1].display().to_string());
    let three = verify(3);
    assert_eq!(three.code, 2, "{}", three.text);
    assert!(three.text.contains("is not a disk tier"), "{}", three.text);
}

#[test]
fn verify_refuses_a_directory_without_a_store() {
    let dir = tempfile::tempdir().unwrap();
    let error = verify(dir.path()).unwrap_err().to_string();
    assert!(error.contains("is not a disk tier"), "{error}");
}
