//! Clients that die, and clients that write where they should not any more.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness; a dying client is a child process, a scribbling one writes the shared
//! memory through its descriptor.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvtier_client::{
    BlockKey, Client, Endpoint, PayloadKind, Reservation, RestoreOptions, SaveBlock, SessionOptions,
};
use kvtier_proto::v1;
use kvtier_tests::harness::child::{self, Role};
use kvtier_tests::harness::raw::{self, RawSession};
use kvtier_tests::harness::{Daemon, Options, blocks, daemon, eventually, run};

use super::LIMIT;

/// How long a child may take for one step.
const STEP: Duration = Duration::from_secs(60);
/// Rounds of saves with a writer that does not stop.
const SCRIBBLES: u8 = 24;

// Goal: a client that is killed while it holds leases, a region and half-filled slots leaves
// nothing behind: all of it comes back, and its blocks can be evicted.
#[test]
fn a_killed_client_leaves_no_leases_regions_or_slots_behind() {
    run(LIMIT, async {
        let daemon = Daemon::start(Options::default().host_mib(16).disk_mib(64, 4));
        let session = daemon.session(&blocks::wide()).await;
        let set = blocks::loose(&session, 1, 20, PayloadKind::Kv);
        blocks::save_durable(&session, &set).await;
        let before = daemon.metrics();
        let hex: Vec<_> = set.iter().map(|block| block.key.to_hex()).collect();
        let told = format!("{} {}", daemon.socket().display(), hex.join(" "));
        let mut victim = Role::new("clients::child_holder", told).spawn(daemon.home());
        assert_eq!(victim.hear(STEP), "holding 20");
        let during = daemon.metrics();
        assert_eq!(during.get("kvtier_leases"), 20.0);
        let regions = |scrape: &kvtier_tests::harness::Scrape| scrape.get("kvtier_region_bytes");
        assert_eq!(regions(&during) - regions(&before), f64::from(8 << 20));
        assert_eq!(during.get("kvtier_sessions"), 2.0);
        victim.kill9();
        eventually(Duration::from_secs(10), async || {
            let now = daemon.metrics();
            let held = (
                now.get("kvtier_leases"),
                now.get("kvtier_sessions"),
                regions(&now),
            );
            match held == (0.0, 1.0, regions(&before)) {
                true => Ok(()),
                false => Err(format!("leases, sessions, region bytes: {held:?}")),
            }
        })
        .await;
        // 10 of 16 MiB were leased: four times as much again goes through, so they were evicted.
        for seed in 2..6 {
            let others = blocks::loose(&session, seed, 30, PayloadKind::Kv);
            blocks::save_durable(&session, &others).await;
            blocks::restore_all(&session, &others).await;
        }
    });
}

#[test]
#[ignore = "a role that another test starts"]
fn child_holder() {
    let Some(told) = child::role() else { return };
    run(LIMIT, async {
        let mut words = told.split(' ');
        let endpoint = Endpoint::unix(words.next().unwrap());
        let client = Client::connect(endpoint, daemon::connect_options()).await;
        let options = SessionOptions::new("victim").staging_bytes(kvtier_client::Bytes::mib(8));
        let session = client.unwrap().open_session(&blocks::wide(), options).await;
        let session = session.unwrap();
        let keys: Vec<_> = words.map(|key| BlockKey::from_hex(key).unwrap()).collect();
        let options = RestoreOptions::default().scattered();
        let restore = session
            .restore(&keys, PayloadKind::Kv, options)
            .await
            .unwrap();
        let held = restore.collect().await.unwrap();
        let set = blocks::loose(&session, 99, 6, PayloadKind::Kv);
        let mut slots = session.reserve(&set).await.unwrap();
        if let Some(Reservation::Slot(slot)) = slots.first_mut() {
            let part = slot.layout().parts()[0];
            slot.fill_part(part.layer, part.code, |bytes| bytes.fill(7))
                .unwrap();
        }
        child::say(&format!("holding {}", held.blocks.len()));
        tokio::time::sleep(LIMIT).await;
    });
}

/// Writes a slot over and over, now with one byte, now with the other.
fn scribbler(memory: &File, slot: v1::Slot, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    let (memory, stop) = (memory.try_clone().unwrap(), Arc::clone(stop));
    std::thread::spawn(move || {
        let len = usize::try_from(slot.length).unwrap();
        let versions = [vec![0xaa; len], vec![0x55; len]];
        for bytes in versions.iter().cycle() {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            memory.write_all_at(bytes, slot.offset).unwrap();
        }
    })
}

/// Reads a block inline; `None` when it is not there. The transfer has a checksum of its own.
async fn read(session: &kvtier_client::Session, block: &SaveBlock) -> Option<Vec<u8>> {
    let options = RestoreOptions::default();
    let got = session
        .get_inline(&[block.key], block.kind, options)
        .await
        .unwrap();
    let mut bytes = None;
    let visit = |_: &kvtier_client::LeasedBlock, payload: &[u8]| bytes = Some(payload.to_vec());
    got.for_each(visit).await.unwrap();
    bytes
}

// Goal: what a client does to its slot during and after a commit cannot make the daemon store a
// record that fails its own checksum, change a block that was accepted, or fall over.
#[test]
fn a_client_that_writes_during_a_save_gets_one_version_or_a_refusal() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default().level("zstd"));
        let request = raw::opening(&blocks::wide());
        let mut hostile = RawSession::open(&daemon.socket(), request).await.unwrap();
        let sdk = daemon.session(&blocks::wide()).await;
        let (grant, memory) = hostile.region(2 << 20).await;
        let set = blocks::loose(&sdk, 1, usize::from(SCRIBBLES), PayloadKind::Kv);
        let (mut stored, mut refusals) = (Vec::new(), 0);
        for (number, block) in set.iter().enumerate() {
            let grants = hostile
                .save(grant.region, vec![raw::block(block)])
                .await
                .unwrap();
            let Some(v1::save_grant::Grant::Slot(slot)) = grants[0].grant else {
                panic!("{grants:?}");
            };
            memory
                .write_all_at(&vec![0xaa; 512 << 10], slot.offset)
                .unwrap();
            let stop = Arc::new(AtomicBool::new(false));
            let writer = scribbler(&memory, slot, &stop);
            let filled = v1::FilledSlot {
                key: block.key.0.to_vec().into(),
                slot: Some(slot),
                // Every other save says which bytes it means.
                crc32: (number % 2 == 0).then(|| crc32fast::hash(&[0xaa; 512 << 10])),
                through: 0,
            };
            let result = hostile.commit(vec![filled], v1::Acknowledge::Durable).await;
            use v1::commit_result::Result as Outcome;
            match result.unwrap()[0].result {
                Some(Outcome::Acknowledged(_)) => {
                    let bytes = read(&sdk, block).await.expect("it was acknowledged");
                    let known = |byte: &u8| [0xaa, 0x55].contains(byte);
                    assert!(bytes.iter().all(known), "bytes that nobody wrote");
                    let whole = bytes.iter().all(|byte| *byte == 0xaa);
                    assert!(whole || number % 2 == 1, "not what the checksum says");
                    stored.push((block, bytes));
                }
                Some(Outcome::Failed(_)) => refusals += 1,
                None => panic!("no result"),
            }
            stop.store(true, Ordering::Relaxed);
            writer.join().unwrap();
        }
        assert!(
            stored.len() >= usize::from(SCRIBBLES) / 2,
            "{refusals} refused"
        );
        assert!(daemon.is_alive());
        drop((hostile, sdk));
        daemon.crash();
        let sdk = daemon.session(&blocks::wide()).await;
        for (block, bytes) in stored {
            let again = read(&sdk, block).await.expect("it was durable");
            assert!(
                again == bytes,
                "the record holds other bytes than were accepted"
            );
        }
        assert_eq!(daemon.metrics().sum("kvtier_corrupt_total"), 0.0);
    });
}

// Goal: the arena that a client maps cannot be written by it, in no way a descriptor offers.
#[test]
fn a_client_cannot_write_the_arena_or_resize_shared_memory() {
    run(LIMIT, async {
        let daemon = Daemon::start(Options::default());
        let request = raw::opening(&blocks::gqa());
        let mut hostile = RawSession::open(&daemon.socket(), request).await.unwrap();
        let companion = hostile.opened.descriptor_socket.clone();
        let grant = hostile.opened.arena.clone().unwrap();
        let arena = raw::fetch(Path::new(&companion), &grant.ticket).unwrap();
        assert!(
            raw::fetch(Path::new(&companion), &grant.ticket).is_none(),
            "a ticket is good once"
        );
        let sdk = daemon.session(&blocks::gqa()).await;
        let set = blocks::chain(&sdk, 1, 16 * 20, PayloadKind::Kv);
        blocks::save_durable(&sdk, &set).await;
        assert!(
            arena.write_at(&[0xff; 4096], 0).is_err(),
            "a write to the arena"
        );
        let again = format!("/proc/self/fd/{}", arena.as_raw_fd());
        if let Ok(writable) = File::options().write(true).open(again) {
            let wrote = writable.write_at(&[0xff; 4096], 0);
            assert!(wrote.is_err(), "a write to the arena, opened again");
            assert!(writable.set_len(4096).is_err(), "the arena cut short");
        }
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        assert!(
            rustix::fs::fallocate(&arena, punch, 0, 1 << 20).is_err(),
            "a hole in the arena"
        );
        let (_, staging) = hostile.region(1 << 20).await;
        assert!(staging.set_len(0).is_err(), "staging memory cut short");
        assert!(
            staging.set_len(8 << 20).is_err(),
            "staging memory made longer"
        );
        blocks::restore_all(&sdk, &set).await;
    });
}

#[test]
fn every_opening_is_a_session_of_its_own_whatever_its_model() {
    run(LIMIT, async {
        let daemon = Daemon::start(Options::default());
        let request = raw::opening(&blocks::gqa());
        let first = RawSession::open(&daemon.socket(), request.clone())
            .await
            .unwrap();
        let second = RawSession::open(&daemon.socket(), request).await.unwrap();
        let request = raw::opening(&blocks::wide());
        let third = RawSession::open(&daemon.socket(), request).await.unwrap();
        assert_ne!(first.token(), second.token());
        assert_ne!(first.token(), third.token());
        assert_eq!(daemon.metrics().get("kvtier_sessions"), 3.0);
        drop((first, third));
        eventually(Duration::from_secs(10), async || {
            match daemon.metrics().get("kvtier_sessions") {
                1.0 => Ok(()),
                open => Err(format!("{open} sessions are open")),
            }
        })
        .await;
    });
}
