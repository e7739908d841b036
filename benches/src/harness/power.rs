//! Real power cuts: the file system stops in the middle and forgets what was not made durable.
//!
//! Upstairs:   the suite `crash`, and a test with fewer rounds; in private mounts.
//! Downstairs: `daemon`, `journal`, `mounts`: ext4's shutdown call on an image of its own.
//!
//! A round: save and note acknowledgements; stop the daemon with SIGSTOP, so that nothing is
//! acknowledged after the cut; shut the file system down without flushing its journal; kill,
//! unmount, mount (the journal is replayed), start, compare everything. State directory, disk
//! tier and the catalog in it all lie on the file system that is cut. In every third round the
//! daemon ends in order first: then the superblock vouches for a catalog whose library only says
//! that it is on the device.
//!
//! What such a cut takes: names, lengths and the state of extents that the journal has not
//! committed, and pages that were not written back. It does not take what was written directly to
//! extents that had been written before: those bytes are in the image at once, and that a sync of
//! them is missing does not show here (it does in the store's simulated campaign). So the first cut
//! is a control: a device that only says that it syncs must lose blocks.

use std::path::Path;
use std::time::{Duration, Instant};

use kvtier_client::{Acknowledge, PayloadKind};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use rustix::process::Signal;

use super::crash::{EXIT_LIMIT, LIMIT, Tally, look_again, shuffled};
use super::journal::Journal;
use super::mounts::{remount, shut_down};
use super::{Daemon, Options, blocks, limited};

/// Most durable blocks at a time, so that none is evicted: with their 36 KiB each they and as many
/// that were wiped before fit into the device.
const BLOCKS_MAX: usize = 5000;
/// Capacity of the device. Unit: MiB.
const DISK_MIB: u64 = 384;
/// Size of the file system that holds device and state. Unit: MiB.
pub const IMAGE_MIB: u64 = 448;

/// Cuts the power of the file system on `at`, an image of [`IMAGE_MIB`], so many times.
///
/// Error: no cut can be made here, and why.
pub fn campaign(
    rounds: u32,
    seed: u64,
    at: &Path,
    tell: &mut dyn FnMut(&str),
) -> Result<Tally, String> {
    let begin = Instant::now();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (mut journal, mut tally) = (Journal::default(), Tally::default());
    // Other builds have no device that lies.
    if cfg!(debug_assertions) {
        tally.control_lost = control(at)?;
    }
    let options = Options::default()
        .host_mib(16)
        .disk_mib(DISK_MIB, 4)
        .data_dir(at);
    let mut daemon = Daemon::start(options);
    for round in 0..rounds {
        let delay = Duration::from_millis(rng.random_range(50..700));
        let (writer_seed, orderly) = (rng.random(), round % 3 == 2);
        let (after, cut) = limited(LIMIT, async {
            let writing = save_on(&daemon, journal, writer_seed);
            let ending = async {
                tokio::time::sleep(delay).await;
                let (daemon, at) = (&daemon, &at);
                if orderly {
                    daemon.signal(Signal::TERM);
                    return Ok(());
                }
                tokio::task::block_in_place(|| cut(daemon, at))
            };
            tokio::join!(writing, ending)
        });
        journal = after;
        let ended = daemon.wait_exit(EXIT_LIMIT);
        let cut = match orderly {
            true => {
                assert!(ended.success(), "after SIGTERM it ended with {ended}");
                forget(at)
            }
            false => cut,
        };
        if round == 0 {
            cut?;
        } else {
            // What worked once works.
            cut.unwrap();
        }
        mount_again(at);
        *daemon.options_mut() = shuffled(daemon.options(), &mut rng);
        look_again(&mut daemon, &mut journal, &mut tally, BLOCKS_MAX / 2);
        let rebuilt = daemon.metrics().sum("kvtier_catalog_rebuilt_total") > 0.0;
        tally.orderly += u64::from(orderly);
        tally.catalogs_rebuilt += u64::from(orderly && rebuilt);
        let (checked, lost) = (tally.checked, tally.lost);
        tell(&format!(
            "cut {round}: {checked} checked so far, {lost} lost"
        ));
    }
    tally.durable += journal.durable.len() as u64;
    tally.seconds = begin.elapsed().as_secs_f64();
    Ok(tally)
}

/// The cut of a daemon whose device does not sync and says that it does. Returns the blocks that
/// were acknowledged durable and are gone: more than 0, or no cut here shows anything.
fn control(at: &Path) -> Result<u64, String> {
    let home = at.join("control");
    let options = Options::default().host_mib(16).data_dir(&home);
    let mut daemon = Daemon::start(options);
    daemon.inject("");
    daemon.restart();
    daemon.inject("sync lost");
    let mut journal = Journal::default();
    limited(LIMIT, async {
        let session = daemon.session(&blocks::gqa()).await;
        let set = blocks::loose(&session, 1, 100, PayloadKind::Kv);
        let saved = journal.save(&session, &set, Acknowledge::Durable).await;
        saved.expect("the daemon serves");
    });
    let made = cut(&daemon, at);
    daemon.wait_exit(EXIT_LIMIT);
    made?;
    mount_again(at);
    daemon.launch();
    let found = limited(LIMIT, async {
        let session = daemon.session(&blocks::gqa()).await;
        journal.survey(&session).await
    });
    daemon.kill9();
    std::fs::remove_dir_all(&home).unwrap();
    let (durable, lost) = (journal.durable.len(), found.lost.len());
    assert!(
        durable == 100 && lost > 0,
        "a device without syncs lost {lost} of {durable} blocks in a power cut"
    );
    assert_eq!(found.wrong, Vec::<String>::new());
    Ok(lost as u64)
}

/// The file system after its cut: what nobody synced is not there.
fn mount_again(at: &Path) {
    remount(at).unwrap();
    let canary = std::fs::read(at.join(CANARY)).unwrap_or_default();
    assert!(
        canary.is_empty(),
        "the power was not cut: what nobody synced is there"
    );
}

/// File that nobody syncs: it shows that a cut forgets.
const CANARY: &str = "canary";

/// Shuts the file system down behind a write that is not synced.
fn forget(at: &Path) -> Result<(), String> {
    std::fs::write(at.join(CANARY), vec![1; 1 << 20]).map_err(|problem| problem.to_string())?;
    shut_down(at)
}

/// One cut in the middle of what the daemon does.
fn cut(daemon: &Daemon, at: &Path) -> Result<(), String> {
    freeze(daemon);
    let cut = forget(at);
    daemon.signal(Signal::KILL);
    cut
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
