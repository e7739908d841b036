//! Devices that are full or fail: misses and blocks that are not durable, never an error.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness; small file systems in private mounts, so root only.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kvtier_client::{Acknowledge, Miss, PayloadKind, SaveOutcome};
use kvtier_tests::harness::child::{self, Role};
use kvtier_tests::harness::{Daemon, Options, binary, blocks, is_root, run, skip, tell};

use super::LIMIT;

/// Runs a command; its complaint when it fails.
pub(crate) fn command(program: &str, args: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(args).output();
    let output = output.map_err(|problem| format!("{program}: {problem}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "{program}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
    }
}

/// Starts a role in private mounts. What it says first is that it works, or why it cannot.
pub(crate) fn in_private_mounts(name: &str, limit: Duration) {
    let test = name.rsplit("::").next().unwrap_or(name);
    if !is_root() {
        return skip(test, "not root");
    }
    // A build of the daemon, where one is due, is not the role's time.
    binary::kvtierd();
    let scratch = tempfile::tempdir().unwrap();
    let told = scratch.path().display().to_string();
    let mut role = Role::new(name, told).private_mounts().spawn(scratch.path());
    let first = role.hear(limit);
    if let Some(why) = first.strip_prefix("cannot: ") {
        return skip(test, why);
    }
    for line in role.finish(limit) {
        tell(&line);
    }
}

/// Makes this process's mounts private and mounts `source` on a new folder.
pub(crate) fn mount(args: &[&str], at: &Path) -> Result<(), String> {
    std::fs::create_dir_all(at).unwrap();
    command("mount", &["--make-rprivate", "/"])?;
    let at = at.display().to_string();
    command("mount", &[args, &[at.as_str()]].concat())
}

/// In the role: says whether the mount works, and ends the role when it does not.
pub(crate) fn told_and_mounted(args: impl Fn(&Path) -> Vec<String>) -> Option<std::path::PathBuf> {
    let scratch = std::path::PathBuf::from(child::role()?);
    let at = scratch.join("mount");
    let args = args(&scratch);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match mount(&args, &at) {
        Ok(()) => {
            child::say("works");
            Some(at)
        }
        Err(why) => {
            child::say(&format!("cannot: {why}"));
            None
        }
    }
}

/// An ext4 file system in a file. Unit of `size`: MiB.
pub(crate) fn image(scratch: &Path, size: u64) -> Result<std::path::PathBuf, String> {
    let image = scratch.join("image");
    let file = std::fs::File::create(&image).map_err(|problem| problem.to_string())?;
    file.set_len(size << 20)
        .map_err(|problem| problem.to_string())?;
    command("mkfs.ext4", &["-q", "-F", &image.display().to_string()])?;
    Ok(image)
}

/// The mount's arguments for an image, or ones that fail with the reason.
pub(crate) fn loop_args(scratch: &Path, size: u64) -> Vec<String> {
    match image(scratch, size) {
        Ok(image) => vec!["-o".into(), "loop".into(), image.display().to_string()],
        Err(why) => vec![why],
    }
}

#[test]
fn a_device_without_room_evicts_and_goes_on() {
    in_private_mounts("device::child_small_device", LIMIT);
}

// The quota says 128 MiB, the device has a fraction of it.
#[test]
#[ignore = "a role that another test starts"]
fn child_small_device() {
    let Some(at) = told_and_mounted(|scratch| loop_args(scratch, 40)) else {
        return;
    };
    run(LIMIT, async {
        for lane in ["io_uring", "pread"] {
            let options = Options::default().host_mib(32).disk_mib(128, 4).lane(lane);
            let mut daemon = Daemon::start(options.disk_dir(at.join(lane)));
            let session = daemon.session(&blocks::gqa()).await;
            let mut sets = Vec::new();
            for seed in 0..20 {
                let set = blocks::loose(&session, seed, 100, PayloadKind::Kv);
                let outcomes = blocks::save(&session, &set, Acknowledge::Durable).await;
                let outcomes = outcomes.expect("a full device is no error");
                let bad = |outcome: &&SaveOutcome| {
                    use kvtier_client::CommitFailure::NotDurable;
                    !outcome.is_stored(Acknowledge::Accepted)
                        && **outcome != SaveOutcome::Failed(NotDurable)
                };
                assert_eq!(outcomes.iter().find(bad), None, "{lane}, set {seed}");
                sets.push((set, outcomes));
            }
            let (newest, outcomes) = sets.last().unwrap();
            let durable = |outcome: &SaveOutcome| outcome.is_stored(Acknowledge::Durable);
            assert!(outcomes.iter().all(durable), "{lane}: {:?}", outcomes[0]);
            assert!(daemon.is_alive());
            drop(session);
            daemon.crash();
            let session = daemon.session(&blocks::gqa()).await;
            blocks::restore_all(&session, newest).await;
            let oldest = blocks::restore(&session, &sets[0].0).await.unwrap();
            assert_eq!(oldest.hits, vec![], "{lane}: 64 MiB on a device of 40");
            drop(session);
            assert!(daemon.stop().success());
            std::fs::remove_dir_all(at.join(lane)).unwrap();
        }
    });
}

#[test]
fn a_memory_file_system_without_room_evicts_and_goes_on() {
    in_private_mounts("device::child_small_tmpfs", LIMIT);
}

#[test]
#[ignore = "a role that another test starts"]
fn child_small_tmpfs() {
    let tmpfs = |_: &Path| {
        ["-t", "tmpfs", "-o", "size=30m", "tmpfs"]
            .map(str::to_owned)
            .to_vec()
    };
    let Some(at) = told_and_mounted(tmpfs) else {
        return;
    };
    run(LIMIT, async {
        let options = Options::default().host_mib(32).disk_mib(128, 2);
        let mut daemon = Daemon::start(options.disk_dir(at.join("disk")));
        let session = daemon.session(&blocks::gqa()).await;
        let (mut newest, mut outcomes) = (Vec::new(), Vec::new());
        for seed in 0..15 {
            newest = blocks::loose(&session, seed, 100, PayloadKind::Kv);
            let saved = blocks::save(&session, &newest, Acknowledge::Durable).await;
            outcomes = saved.expect("a full device is no error");
        }
        let durable = |at: &usize| outcomes[*at].is_stored(Acknowledge::Durable);
        let durable: Vec<usize> = (0..newest.len()).filter(durable).collect();
        assert!(durable.len() > 50, "{} of the newest 100", durable.len());
        blocks::restore_all(&session, &newest).await;
        assert!(daemon.is_alive());
        drop(session);
        daemon.crash();
        let session = daemon.session(&blocks::gqa()).await;
        let found = blocks::restore(&session, &newest).await.unwrap();
        let kept = |at: &usize| found.hits.iter().any(|(hit, _)| hit == at);
        let lost: Vec<usize> = durable.into_iter().filter(|at| !kept(at)).collect();
        assert_eq!(lost, [0; 0], "acknowledged as durable");
    });
}

#[test]
fn a_device_that_fails_gives_misses_and_the_daemon_goes_on() {
    in_private_mounts("device::child_failing_device", LIMIT);
}

// The file under the file system is cut short: what lies behind the cut answers EIO.
#[test]
#[ignore = "a role that another test starts"]
fn child_failing_device() {
    let Some(at) = told_and_mounted(|scratch| loop_args(scratch, 128)) else {
        return;
    };
    run(LIMIT, async {
        let options = Options::default().host_mib(16).disk_mib(96, 4);
        let mut daemon = Daemon::start(options.disk_dir(at.join("disk")));
        let session = daemon.session(&blocks::gqa()).await;
        let set = blocks::loose(&session, 1, 1500, PayloadKind::Kv);
        blocks::save_durable(&session, &set).await;
        drop(session);
        daemon.restart();
        let image = at.with_file_name("image");
        let file = std::fs::File::options().write(true).open(image).unwrap();
        file.set_len(40 << 20).unwrap();
        let session = daemon.session(&blocks::gqa()).await;
        let found = blocks::restore(&session, &set)
            .await
            .expect("EIO is no error");
        let late = |(_, miss): &(usize, Miss)| *miss == Miss::Device || miss.is_damage();
        assert!(found.misses.iter().all(late), "{:?}", found.misses.first());
        assert!(
            !found.misses.is_empty(),
            "two thirds of the device are gone"
        );
        assert!(!found.hits.is_empty(), "a third of the device is there");
        for seed in 2..8 {
            let more = blocks::loose(&session, seed, 50, PayloadKind::Kv);
            let outcomes = blocks::save(&session, &more, Acknowledge::Durable).await;
            outcomes.expect("a failing device is no error");
            let found = blocks::restore(&session, &more).await.unwrap();
            assert_eq!(found.hits.len(), 50, "host memory has them");
        }
        assert!(daemon.is_alive());
        assert_eq!(daemon.http("/metrics").0, 200);
    });
}
