//! Models of an engine's region: transfers, and the end of the session, all at once.
//!
//! Upstairs:   `cargo test`.
//! Downstairs: `region::engine` and `shm::foreign`, as the daemon has them.
#![allow(clippy::unwrap_used, reason = "a panic is the failure report")]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use kvtier_models::metrics::Metrics;
use kvtier_models::planted::Bug;
use kvtier_models::region::engine::EngineRegion;
use kvtier_models::{finds, holds};
use kvtier_proto::region::Handover;
use kvtier_proto::{PayloadKind, Piece, RegionGeometry};
use rustix::fs::MemfdFlags;
use shuttle::thread;

/// Bytes of a slot, in two rows: between them whoever closes gets his turn.
const SLOT: usize = 2;

fn region() -> (Arc<EngineRegion>, OwnedFd) {
    let piece = Piece {
        offset: 0,
        slot_stride: 8,
        rows: 2,
        row_bytes: 1,
        row_stride: 4,
    };
    let geometry = RegionGeometry {
        kind: PayloadKind::Opaque,
        slots: 2,
        pieces: vec![piece],
    };
    geometry.check(16, None).unwrap();
    let region = EngineRegion::new(1, 16, geometry, Arc::new(Metrics::new()));
    let fd = rustix::fs::memfd_create("model", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, 16).unwrap();
    assert_eq!(
        region.adopt(fd.as_fd().try_clone_to_owned().unwrap()),
        Handover::Taken
    );
    (Arc::new(region), fd)
}

fn content(fd: &OwnedFd) -> [u8; 16] {
    let mut content = [0; 16];
    rustix::io::pread(fd, &mut content, 0).unwrap();
    content
}

/// Two restores write while the session ends: what the engine puts into its slots after that stays.
fn restores_and_an_end() {
    let (region, fd) = region();
    let fd = Arc::new(fd);
    let restore = |slot: u32| {
        let region = Arc::clone(&region);
        thread::spawn(move || {
            let reserved = region.reserve(&[slot]).unwrap();
            let _ = reserved.write(0, &[7; SLOT]);
        })
    };
    let restores = [restore(0), restore(1)];
    let end = {
        let (region, fd) = (Arc::clone(&region), Arc::clone(&fd));
        thread::spawn(move || {
            region.close();
            // The engine has its slots again.
            rustix::io::pwrite(&*fd, &[9; 16], 0).unwrap();
        })
    };
    for thread in restores {
        thread.join().unwrap();
    }
    end.join().unwrap();
    assert_eq!(content(&fd), [9; 16], "bytes moved after the end");
}

// Goal: R4, in every order.
#[test]
fn nothing_is_written_after_a_region_was_closed() {
    holds(restores_and_an_end);
    assert!(finds(Bug::CopyAfterClose, restores_and_an_end));
}

/// Three restores want overlapping slots.
fn restores_of_the_same_slots() {
    let (region, fd) = region();
    let restore = |number: u8, slots: [u32; 2]| {
        let region = Arc::clone(&region);
        thread::spawn(move || {
            let Ok(reserved) = region.reserve(&slots) else {
                return false;
            };
            reserved.write(0, &[number; SLOT]).unwrap();
            reserved.write(1, &[number; SLOT]).unwrap();
            true
        })
    };
    let restores = [restore(1, [0, 1]), restore(2, [1, 0]), restore(3, [0, 1])];
    let ran = restores.map(|thread| thread.join().unwrap());
    assert!(ran.contains(&true), "somebody had the slots");
    let content = content(&fd);
    let rows = [content[0], content[4], content[8], content[12]];
    assert_eq!(rows, [rows[0]; 4], "two restores shared the slots");
    assert!(region.reserve(&[0, 1]).is_ok(), "a slot was lost");
}

// Goal: R3, in every order.
#[test]
fn slots_are_of_one_restore_at_a_time() {
    holds(restores_of_the_same_slots);
}
