//! Real power cuts: the file system stops in the middle and forgets what was not made durable.
//!
//! Upstairs:   `main`.
//! Downstairs: ext4's shutdown call on an image of its own, in private mounts; root only.
//!
//! A round: save and note acknowledgements; stop the daemon with SIGSTOP, so that nothing is
//! acknowledged after the cut; shut the file system down without flushing its journal; kill,
//! unmount, mount (the journal is replayed), start, compare everything. State directory and disk
//! tier both lie on the file system that is cut.

use std::path::Path;
use std::time::{Duration, Instant};

use kvtier_client::{Acknowledge, PayloadKind};
use kvtier_tests::harness::child;
use kvtier_tests::harness::journal::Journal;
use kvtier_tests::harness::{Daemon, Options, blocks, rounds, run};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use rustix::process::Signal;

use super::LIMIT;
use super::device::{command, in_private_mounts, loop_args, mount, told_and_mounted};

/// `EXT4_IOC_SHUTDOWN` with `NOLOGFLUSH`: no unsafe code here makes the call.
const SHUTDOWN: &str = "my $flags = pack('L', 2); open(F, '<', $ARGV[0]) or die $!; \
                        ioctl(F, 0x8004587d, $flags) or die \"shutdown: $!\";";
/// Most durable blocks at a time, so that none is evicted: with their 36 KiB each they and as many
/// that were wiped before fit into the device.
const BLOCKS_MAX: usize = 5000;
/// Capacity of the device, and size of the file system that holds it. Unit: MiB.
const DISK_MIB: u64 = 384;
const IMAGE_MIB: u64 = 448;

#[test]
fn a_power_cut_loses_no_durable_block() {
    let rounds = rounds("KVTIER_TEST_POWER_CUTS", 2);
    in_private_mounts("power::child_power_cut", LIMIT + LIMIT / 4 * rounds);
}

/// Saves until the daemon no longer answers, or there is no room for more.
async fn save_on(daemon: &Daemon, mut journal: Journal, seed: u64) -> Journal {
    let session = daemon.session(&blocks::gqa()).await;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    while journal.durable.len() < BLOCKS_MAX {
        let count = rng.random_range(1..32);
        let set = blocks::loose(&session, rng.random(), count, PayloadKind::Kv);
        let saved = journal.save(&session, &set, Acknowledge::Durable).await;
        if saved.is_err() {
            break;
        }
    }
    journal
}

/// Stops the process and waits until every thread of it has stopped.
fn freeze(daemon: &Daemon) {
    daemon.signal(Signal::STOP);
    let begin = Instant::now();
    let tasks = format!("/proc/{}/task", daemon.pid());
    let stopped = || {
        let tasks = std::fs::read_dir(&tasks).unwrap().flatten();
        tasks.into_iter().all(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit(") ")
                .next()
                .is_some_and(|rest| rest.starts_with(['T', 't']))
        })
    };
    while !stopped() {
        assert!(
            begin.elapsed() < Duration::from_secs(10),
            "the daemon does not stop"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Unmounts, as soon as the kernel has let the killed daemon's files go.
fn unmount(at: &Path) {
    let begin = Instant::now();
    while let Err(why) = command("umount", &[&at.display().to_string()]) {
        assert!(begin.elapsed() < Duration::from_secs(20), "{why}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// One cut: what was journaled, and whether the cut could be made.
fn cut(daemon: &Daemon, at: &Path) -> Result<(), String> {
    freeze(daemon);
    // Nobody syncs this: it shows that the cut forgets.
    std::fs::write(at.join("canary"), vec![1; 1 << 20]).unwrap();
    let cut = command("perl", &["-e", SHUTDOWN, &at.display().to_string()]);
    daemon.signal(Signal::KILL);
    cut
}

#[test]
#[ignore = "a role that another test starts"]
fn child_power_cut() {
    let Some(at) = told_and_mounted(|scratch| loop_args(scratch, IMAGE_MIB)) else {
        return;
    };
    let rounds = rounds("KVTIER_TEST_POWER_CUTS", 2);
    let seed = u64::from(std::process::id());
    child::say(&format!("seed {seed}, {rounds} power cuts"));
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let options = Options::default()
        .host_mib(16)
        .disk_mib(DISK_MIB, 4)
        .data_dir(&at);
    let mut daemon = Daemon::start(options);
    let mut journal = Journal::default();
    let mut total = 0;
    for round in 0..rounds {
        let delay = Duration::from_millis(rng.random_range(50..700));
        let writer_seed = rng.random();
        let (after, made) = run(LIMIT, async {
            let writing = save_on(&daemon, journal, writer_seed);
            let cutting = async {
                tokio::time::sleep(delay).await;
                let (daemon, at) = (&daemon, &at);
                tokio::task::block_in_place(|| cut(daemon, at))
            };
            tokio::join!(writing, cutting)
        });
        journal = after;
        daemon.wait_exit(Duration::from_secs(20));
        if let Err(why) = made {
            return child::say(&format!(
                "SKIPPED a_power_cut_loses_no_durable_block: {why}"
            ));
        }
        let image = at.with_file_name("image").display().to_string();
        unmount(&at);
        mount(&["-o", "loop", &image], &at).unwrap();
        let canary = std::fs::read(at.join("canary")).unwrap_or_default();
        assert!(
            canary.is_empty(),
            "the power was not cut: what nobody synced is there"
        );
        let lane = if rng.random_bool(0.5) {
            "io_uring"
        } else {
            "pread"
        };
        *daemon.options_mut() = daemon.options().clone().lane(lane);
        daemon.launch();
        run(LIMIT, async {
            let session = daemon.session(&blocks::gqa()).await;
            let survey = journal.verify(&session).await;
            let (kept, more) = (survey.kept, survey.lucky);
            child::say(&format!(
                "cut {round}: {kept} durable blocks kept, {more} more"
            ));
            if journal.durable.len() > BLOCKS_MAX / 2 {
                session.wipe().await.unwrap();
                total += journal.durable.len();
                journal = Journal::default();
            }
        });
        // What a cut in the middle of a write left is no record; it is not damage either.
        let metrics = daemon.metrics();
        assert_eq!(metrics.sum("kvtier_corrupt_total"), 0.0, "cut {round}");
    }
    total += journal.durable.len();
    child::say(&format!(
        "{rounds} power cuts: {total} durable blocks, all kept"
    ));
    assert!(total > 0, "nothing was saved between the cuts");
}
