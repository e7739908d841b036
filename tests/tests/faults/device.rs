//! Devices that are full or fail: misses and blocks that are not durable, never an error.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness; small file systems in private mounts, so root only.

use std::path::Path;
use std::time::Duration;

use kvtier_client::{Acknowledge, Miss, PayloadKind, SaveOutcome};
use kvtier_tests::harness::child::{self, Role};
use kvtier_tests::harness::mounts::{command, image_of, loop_args, mount, remount};
use kvtier_tests::harness::{
    Daemon, Options, binary, blocks, eventually, is_root, run, skip, tell,
};

use super::LIMIT;

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
        let image = std::fs::File::options().write(true).open(image_of(&at));
        let file = image.unwrap();
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

/// Longest wait until a state shows in the metrics.
const SHOWN: Duration = Duration::from_secs(20);

async fn state_becomes(daemon: &Daemon, state: &str) {
    eventually(SHOWN, async || match daemon.metrics().disk_state() {
        now if now == state => Ok(()),
        now => Err(format!("the device is {now}, not {state}")),
    })
    .await;
}

/// A device loses the right to be written while the daemon serves. It stops writing and says so,
/// goes on reading, and starts well again behind `mend`.
async fn lose_the_right_to_write(
    at: &Path,
    take: impl Fn(&Daemon) -> Result<(), String>,
    mend: impl Fn(&mut Daemon) -> Result<(), String>,
) {
    for lane in ["io_uring", "pread"] {
        let options = Options::default().host_mib(16).disk_mib(48, 2).lane(lane);
        let mut daemon = Daemon::start(options.disk_dir(at.join(lane)));
        let session = daemon.session(&blocks::gqa()).await;
        let set = blocks::loose(&session, 1, 300, PayloadKind::Kv);
        blocks::save_durable(&session, &set).await;
        drop(session);
        daemon.restart();
        let session = daemon.session(&blocks::gqa()).await;
        if let Err(why) = take(&daemon) {
            return child::say(&format!("SKIPPED on {lane}: {why}"));
        }
        let more = blocks::loose(&session, 2, 40, PayloadKind::Kv);
        let outcomes = blocks::save(&session, &more, Acknowledge::Durable).await;
        let outcomes = outcomes.expect("a device that cannot be written is no error");
        let durable = |outcome: &SaveOutcome| outcome.is_stored(Acknowledge::Durable);
        assert!(!outcomes.iter().any(durable), "{lane}: {:?}", outcomes[0]);
        state_becomes(&daemon, "read_only").await;
        blocks::restore_all(&session, &set).await;
        assert!(daemon.is_alive());
        drop(session);
        mend(&mut daemon).unwrap();
        daemon.launch();
        let session = daemon.session(&blocks::gqa()).await;
        blocks::restore_all(&session, &set).await;
        blocks::save_durable(&session, &more).await;
        state_becomes(&daemon, "healthy").await;
        drop(session);
        assert!(daemon.stop().success());
        std::fs::remove_dir_all(at.join(lane)).unwrap();
    }
}

#[test]
fn a_file_system_that_turns_read_only_stops_the_writing_until_it_is_mended() {
    in_private_mounts("device::child_read_only", LIMIT);
}

#[test]
#[ignore = "a role that another test starts"]
fn child_read_only() {
    let Some(at) = told_and_mounted(|scratch| loop_args(scratch, 128)) else {
        return;
    };
    // What ext4 does to itself after an error; open files do not hold it up.
    let abort = |_: &Daemon| {
        let at = at.display().to_string();
        command("mount", &["-o", "remount,abort", &at])
    };
    let mend = |daemon: &mut Daemon| {
        daemon.kill9();
        remount(&at)
    };
    run(LIMIT, lose_the_right_to_write(&at, abort, mend));
}

#[test]
fn files_that_may_not_be_written_any_more_stop_the_writing_until_they_may() {
    in_private_mounts("device::child_forbidden", LIMIT);
}

// An immutable file refuses even root, and descriptors that were open before.
#[test]
#[ignore = "a role that another test starts"]
fn child_forbidden() {
    let Some(at) = told_and_mounted(|scratch| loop_args(scratch, 128)) else {
        return;
    };
    let mark = |daemon: &Daemon, how: &str| {
        let files = daemon.segments().into_iter().map(|(_, path)| path);
        let files = files.chain([daemon.disk_dir()]);
        let files: Vec<String> = files.map(|path| path.display().to_string()).collect();
        let mut args = vec![how];
        args.extend(files.iter().map(String::as_str));
        command("chattr", &args)
    };
    let mend = |daemon: &mut Daemon| {
        assert!(daemon.stop().success(), "it ends in order all the same");
        mark(daemon, "-i")
    };
    run(
        LIMIT,
        lose_the_right_to_write(&at, |daemon| mark(daemon, "+i"), mend),
    );
}

/// The kernel may hold files of a ring for a moment after their process has ended.
async fn remount_read_only(at: &str) {
    for _ in 0..50 {
        if command("mount", &["-o", "remount,ro", at]).is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    command("mount", &["-o", "remount,ro", at]).unwrap();
}

#[test]
fn a_read_only_device_is_refused_at_the_start_by_its_name() {
    in_private_mounts("device::child_starts_read_only", LIMIT);
}

#[test]
#[ignore = "a role that another test starts"]
fn child_starts_read_only() {
    let Some(at) = told_and_mounted(|scratch| loop_args(scratch, 128)) else {
        return;
    };
    run(LIMIT, async {
        let options = Options::default().disk_mib(48, 2).disk_dir(at.join("disk"));
        let mut daemon = Daemon::start(options);
        let session = daemon.session(&blocks::gqa()).await;
        let set = blocks::loose(&session, 1, 50, PayloadKind::Kv);
        blocks::save_durable(&session, &set).await;
        drop(session);
        assert!(daemon.stop().success());
        let here = at.display().to_string();
        remount_read_only(&here).await;
        let why = daemon.try_launch().unwrap_err();
        assert!(why.contains("Read-only file system"), "{why}");
        assert!(why.contains(&here), "{why}");
        let verify = binary::kvtier().display().to_string();
        let disk = daemon.disk_dir().display().to_string();
        command(&verify, &["verify", &disk]).expect("a read-only store can be verified");
        command("mount", &["-o", "remount,rw", &here]).unwrap();
        daemon.launch();
        let session = daemon.session(&blocks::gqa()).await;
        blocks::restore_all(&session, &set).await;
    });
}

#[test]
fn a_device_that_gets_room_again_is_healthy_again() {
    in_private_mounts("device::child_room_again", LIMIT);
}

#[test]
#[ignore = "a role that another test starts"]
fn child_room_again() {
    let Some(at) = told_and_mounted(|scratch| loop_args(scratch, 128)) else {
        return;
    };
    run(LIMIT, async {
        let ballast = at.join("ballast");
        let len = (80 << 20).to_string();
        command("fallocate", &["-l", &len, &ballast.display().to_string()]).unwrap();
        let options = Options::default().host_mib(16).disk_mib(64, 1);
        let daemon = Daemon::start(options.disk_dir(at.join("disk")));
        let session = daemon.session(&blocks::gqa()).await;
        let used = || {
            daemon
                .metrics()
                .get("kvtier_tier_used_bytes{tier=\"disk\"}")
        };
        let fill = async |seeds: std::ops::Range<u64>| {
            for seed in seeds {
                let set = blocks::loose(&session, seed, 100, PayloadKind::Kv);
                blocks::save_durable(&session, &set).await;
            }
        };
        fill(0..20).await;
        state_becomes(&daemon, "full").await;
        let full = used();
        std::fs::remove_file(ballast).unwrap();
        fill(100..130).await;
        state_becomes(&daemon, "healthy").await;
        assert!(used() > full, "it uses the room that it was given");
    });
}
