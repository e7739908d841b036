//! kill -9 at any moment: what was acknowledged durable is there, and what comes back is right.
//!
//! Upstairs:   the suite `crash`, and a test with fewer rounds.
//! Downstairs: `daemon`, `journal`.
//!
//! A round: random saves and restores; SIGKILL after a random time; another lane, queue depth and
//! level; every third time a second SIGKILL while it starts or recovers; sometimes the catalog is
//! deleted; everything compared.

use std::path::Path;
use std::time::{Duration, Instant};

use kvtier_client::{Acknowledge, PayloadKind};
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use rustix::process::Signal;

use super::crash::{EXIT_LIMIT, LIMIT, Tally, look_again, shuffled};
use super::journal::Journal;
use super::{Daemon, Options, blocks, limited};

/// Blocks after which a campaign starts over, so that none is evicted.
const BLOCKS_MAX: usize = 3000;
/// Length of a block's record on the device. Unit: bytes.
const RECORD_BYTES: u64 = 36 << 10;
/// Capacity of the device. Unit: MiB.
const DISK_MIB: u64 = 384;

/// Kills a daemon in a folder of `parent` so many times. `tell` hears how it goes.
pub fn campaign(rounds: u32, seed: u64, parent: &Path, tell: &mut dyn FnMut(&str)) -> Tally {
    let begin = Instant::now();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let options = Options::default().host_mib(16).disk_mib(DISK_MIB, 4);
    let mut daemon = Daemon::start_in(options, parent);
    let (mut journal, mut tally) = (Journal::default(), Tally::default());
    for round in 0..rounds {
        let delay = Duration::from_millis(rng.random_range(2..300));
        let writer_seed = rng.random();
        journal = limited(LIMIT, async {
            let writing = save_until_gone(&daemon, journal, writer_seed);
            let killing = async {
                tokio::time::sleep(delay).await;
                daemon.signal(Signal::KILL);
            };
            tokio::join!(writing, killing).0
        });
        daemon.wait_exit(EXIT_LIMIT);
        *daemon.options_mut() = shuffled(daemon.options(), &mut rng);
        if round % 3 == 1 {
            // Recovery must survive its own crash.
            let watch = round % 2 == 0;
            tally.killed_starting += 1;
            tally.killed_recovering += u64::from(kill_at_start(&mut daemon, watch, &mut rng));
        }
        if rng.random_bool(0.2) {
            // Nothing may depend on it.
            let _ = std::fs::remove_dir_all(daemon.catalog_dir());
        }
        let saved = (journal.durable.len() + journal.perhaps.len()) as u64;
        assert!(
            saved * RECORD_BYTES < DISK_MIB << 20,
            "the campaign itself filled the device: {saved} blocks"
        );
        look_again(&mut daemon, &mut journal, &mut tally, BLOCKS_MAX);
        if round % 20 == 19 {
            let (checked, lost) = (tally.checked, tally.lost);
            tell(&format!(
                "{} kills: {checked} checked, {lost} lost",
                round + 1
            ));
        }
    }
    tally.durable += journal.durable.len() as u64;
    tally.seconds = begin.elapsed().as_secs_f64();
    tally
}

/// A start that does not get far: killed at some moment of it, or, with `watch`, soon after the
/// store's next life is on the device. True when it was.
fn kill_at_start(daemon: &mut Daemon, watch: bool, rng: &mut ChaCha8Rng) -> bool {
    let (before, begin) = (daemon.incarnation(), Instant::now());
    let most = daemon.took_to_start();
    daemon.spawn();
    while watch && daemon.incarnation() == before {
        assert!(begin.elapsed() < LIMIT, "the daemon does not recover");
        std::thread::sleep(Duration::from_millis(1));
    }
    let rest = if watch { most / 4 } else { most };
    std::thread::sleep(rest.mul_f64(rng.random_range(0.0..1.0)));
    daemon.kill9();
    daemon.incarnation() > before
}

/// Saves and restores until the daemon is gone; notes what it acknowledged.
pub async fn save_until_gone(daemon: &Daemon, mut journal: Journal, seed: u64) -> Journal {
    let Ok(session) = daemon.try_session(&blocks::gqa()).await else {
        return journal;
    };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    loop {
        let kind = *[PayloadKind::Kv, PayloadKind::Kv, PayloadKind::Hidden]
            .choose(&mut rng)
            .unwrap();
        let count = rng.random_range(1..24);
        let set = blocks::loose(&session, rng.random(), count, kind);
        let wait = *[
            Acknowledge::Durable,
            Acknowledge::Durable,
            Acknowledge::Accepted,
        ]
        .choose(&mut rng)
        .unwrap();
        if journal.save(&session, &set, wait).await.is_err() {
            return journal;
        }
        if rng.random_bool(0.2) && !journal.durable.is_empty() {
            // Reads in between, so that a kill meets them too.
            let known = journal.durable.choose(&mut rng).copied().unwrap();
            if blocks::restore(&session, &[known]).await.is_err() {
                return journal;
            }
        }
    }
}
