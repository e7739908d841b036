//! Restores of the same blocks at once, over a device that is slow: each block is read once.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness; `two_ended` plays engines.

use std::time::Duration;

use kvtier_client::{PayloadKind, Session};
use kvtier_tests::harness::{Daemon, Options, blocks, run};

use super::LIMIT;
use super::two_ended::{By, meet};

const READ: &str = "kvtier_disk_bytes_total{device=\"0\",direction=\"read\"}";
const BLOCKS: usize = 32;
/// Half a MiB of payload and a page that says what it is.
const RECORD_BYTES: f64 = 516.0 * 1024.0;

/// 32 blocks on a device that brings 64 of them a second, and two engines of one tenant.
async fn both(level: &'static str) -> (Daemon, [Session; 2], Vec<kvtier_client::SaveBlock>) {
    let options = Options::default().level(level).read_limit_mib(32);
    let model = blocks::wide();
    let (daemon, set) = Daemon::cold(options.host_mib(64), &model, |session| {
        blocks::chain(session, 1, 16 * BLOCKS, PayloadKind::Kv)
    })
    .await;
    let sessions = [daemon.session(&model).await, daemon.session(&model).await];
    (daemon, sessions, set)
}

/// Bytes that were read of the device since the start; the disk thread counts a little after it
/// answered.
async fn read(daemon: &Daemon) -> f64 {
    tokio::time::sleep(Duration::from_millis(200)).await;
    daemon.metrics().get(READ)
}

#[test]
fn two_restores_of_a_prefix_at_once_read_every_block_once() {
    run(LIMIT, async {
        for level in ["raw", "lossless"] {
            let (daemon, [one, other], set) = both(level).await;
            let before = read(&daemon).await;
            tokio::join!(blocks::restore_all(&one, &set), async {
                // Half of them are on their way or here, the others are not.
                tokio::time::sleep(Duration::from_millis(200)).await;
                blocks::restore_all(&other, &set).await;
            });
            let read = read(&daemon).await - before;
            let all = RECORD_BYTES * BLOCKS as f64;
            assert!(
                read > 0.5 * all,
                "{level}: {read} bytes: memory was not empty"
            );
            assert!(
                read < 1.1 * all,
                "{level}: {read} bytes were read for {all}"
            );
        }
    });
}

// Goal: two engines that compute the same prompt while it loads share every load, though each has
// a map of its own and they go at different speeds.
#[test]
fn two_ended_restores_at_once_read_every_block_once() {
    run(LIMIT, async {
        let (daemon, [one, other], set) = both("raw").await;
        let before = read(&daemon).await;
        let (fast, slow) = tokio::join!(
            meet(&one, &set, Duration::from_millis(10)),
            meet(&other, &set, Duration::from_millis(40)),
        );
        let by_daemon = |by: &&By| **by == By::Daemon;
        let of = |by: &[By]| by.iter().filter(by_daemon).count();
        let (fast, slow) = (of(&fast.by), of(&slow.by));
        assert!(
            fast >= 8 && slow > fast,
            "{fast} and {slow} blocks were loaded"
        );
        let read = read(&daemon).await - before;
        // Each engine may take over what is in flight where it meets the loads.
        let most = RECORD_BYTES * (slow + 4) as f64;
        assert!(
            read < most,
            "{read} bytes were read for {slow} blocks, {fast} of which both wanted"
        );
    });
}
