//! Several disks of which one fails, is away, and comes back: its blocks are misses, nothing else
//! is, and what was wiped meanwhile stays gone.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness; the fault lane that builds with debug assertions have.

use std::path::{Path, PathBuf};

use kvtier_client::{Miss, PayloadKind, SaveBlock, Session};
use kvtier_tests::harness::{Daemon, Options, blocks, run, skip};

use super::LIMIT;

/// Two disks, of which the second can be made to fail.
struct Two {
    daemon: Daemon,
    disk: PathBuf,
}

impl Two {
    fn start() -> Self {
        let mut daemon = Daemon::start(Options::default().disks(2).host_mib(16));
        let disk = daemon.disk_dirs().pop().unwrap();
        assert!(daemon.stop().success());
        // There when the disk is opened, so that the lane looks at it.
        daemon.inject_into(&disk, "");
        daemon.launch();
        Self { daemon, disk }
    }

    /// Every call to the second disk fails, or none.
    fn fails(&self, fails: bool) {
        let rules = if fails { "any eio\n" } else { "" };
        self.daemon.inject_into(&self.disk, rules);
    }

    /// Stops the daemon, moves the second disk away or back, and starts again.
    fn restart_with(&mut self, here: bool) {
        let away = self.disk.with_file_name("away");
        let moved = |from: &Path, to: &Path| {
            if from.is_dir() && !to.exists() {
                std::fs::rename(from, to).unwrap();
            }
        };
        assert!(self.daemon.stop().success());
        match here {
            true => moved(&away, &self.disk),
            false => moved(&self.disk, &away),
        }
        self.daemon.launch();
    }

    async fn session(&self) -> Session {
        self.daemon.session(&blocks::gqa()).await
    }

    fn held(&self, disk: u32) -> f64 {
        let series = format!("kvtier_disk_blocks{{device=\"{disk}\"}}");
        self.daemon.metrics().get(&series)
    }

    fn is(&self, disk: u32, state: &str) -> bool {
        let series = format!("kvtier_disk_state{{device=\"{disk}\",state=\"{state}\"}}");
        self.daemon.metrics().get(&series) == 1.0
    }
}

/// The device that each block is on, as `explain` says.
async fn devices(session: &Session, blocks: &[SaveBlock]) -> Vec<Option<u32>> {
    let mut devices = Vec::new();
    for block in blocks {
        let explained = session.explain(&block.key).await.unwrap();
        devices.push(explained.variants.iter().find_map(|variant| variant.device));
    }
    devices
}

// Goal: the whole life of a disk that fails under load: its blocks are misses for `device`, the
// others come back right, saves go on and are kept, and bad health restarts nothing.
#[test]
fn a_disk_that_fails_takes_its_blocks_with_it_and_no_others() {
    if !cfg!(debug_assertions) {
        let why = "a build without debug assertions has no fault lane";
        return skip("a_disk_that_fails", why);
    }
    run(LIMIT, async {
        let mut two = Two::start();
        let session = two.session().await;
        let set = blocks::loose(&session, 1, 200, PayloadKind::Kv);
        blocks::save_durable(&session, &set).await;
        assert!(
            two.held(0) > 40.0 && two.held(1) > 40.0,
            "both have a share"
        );
        let places = devices(&session, &set).await;
        drop(session);
        two.restart_with(true);
        let session = two.session().await;
        two.fails(true);
        let found = blocks::restore(&session, &set)
            .await
            .expect("EIO is no error");
        for (at, place) in places.iter().enumerate() {
            let hit = found.hits.iter().any(|(hit, _)| *hit == at);
            assert_eq!(hit, *place == Some(0), "block {at} is on {place:?}");
        }
        let other = found.misses.iter().find(|(_, miss)| *miss != Miss::Device);
        assert_eq!(other, None);
        let more = blocks::loose(&session, 2, 100, PayloadKind::Kv);
        blocks::save_durable(&session, &more).await;
        assert!(two.is(1, "read_only") && two.is(0, "healthy"));
        let (code, health) = two.daemon.http("/healthz");
        assert_eq!(code, 200, "the other disk serves: {health}");
        assert!(health.contains("disk 1 takes no writes"), "{health}");
        assert_eq!(devices(&session, &more).await, vec![Some(0); 100]);
        drop(session);
        // The device works again. Nothing that it acknowledged is lost, though the daemon gave
        // those blocks up while it could not read them.
        two.fails(false);
        two.daemon.crash();
        let session = two.session().await;
        blocks::restore_all(&session, &set).await;
        blocks::restore_all(&session, &more).await;
        assert!(two.is(1, "healthy"));
    });
}

#[test]
fn a_disk_that_is_away_is_done_without_and_serves_again_when_it_is_back() {
    run(LIMIT, async {
        let mut two = Two::start();
        let session = two.session().await;
        let set = blocks::loose(&session, 1, 200, PayloadKind::Kv);
        blocks::save_durable(&session, &set).await;
        let places = devices(&session, &set).await;
        drop(session);
        two.restart_with(false);
        assert!(two.is(1, "failed") && two.is(0, "healthy"));
        let (code, health) = two.daemon.http("/readyz");
        assert_eq!(code, 200, "{health}");
        assert!(health.contains("disk 1 serves nothing"), "{health}");
        assert!(two.daemon.log().contains("a disk is out of service"));
        assert!(
            !two.disk.exists(),
            "it is not made anew where it should be mounted"
        );
        let session = two.session().await;
        let found = blocks::restore(&session, &set).await.unwrap();
        let lost = |(at, miss): &(usize, Miss)| places[*at] == Some(1) && *miss == Miss::Device;
        assert!(found.misses.iter().all(lost), "{:?}", found.misses);
        let kept = places.iter().filter(|place| **place == Some(0)).count();
        assert_eq!(found.hits.len(), kept);
        let more = blocks::loose(&session, 2, 50, PayloadKind::Kv);
        blocks::save_durable(&session, &more).await;
        drop(session);
        two.restart_with(true);
        let session = two.session().await;
        blocks::restore_all(&session, &set).await;
        blocks::restore_all(&session, &more).await;
    });
}

// Goal: gone is gone (P3), also on a disk that was not there to hear of it.
#[test]
fn a_disk_that_was_away_serves_nothing_that_was_wiped_meanwhile() {
    run(LIMIT, async {
        let mut two = Two::start();
        let session = two.session().await;
        let gone = blocks::loose(&session, 1, 200, PayloadKind::Kv);
        blocks::save_durable(&session, &gone).await;
        assert!(two.held(1) > 40.0);
        drop(session);
        two.restart_with(false);
        let session = two.session().await;
        session.wipe().await.unwrap();
        let kept = blocks::loose(&session, 2, 100, PayloadKind::Kv);
        blocks::save_durable(&session, &kept).await;
        drop(session);
        for round in 0..2 {
            two.restart_with(true);
            let session = two.session().await;
            let found = blocks::restore(&session, &gone).await.unwrap();
            assert_eq!(found.hits, vec![], "round {round}");
            blocks::restore_all(&session, &kept).await;
            if round == 0 {
                // Of the new life, on both disks, and no older than the wipe that was made up for.
                blocks::save_durable(&session, &gone[..60]).await;
                assert!(two.held(1) > 0.0);
                blocks::restore_all(&session, &gone[..60]).await;
                session.wipe().await.unwrap();
                blocks::save_durable(&session, &kept).await;
            }
        }
    });
}
