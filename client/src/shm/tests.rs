//! Tests of shared memory: bounds, exclusive spans, and the end of a lease.

use std::os::fd::AsFd;

use rustix::fs::MemfdFlags;

use super::*;
use crate::release::{Life, Releases};

fn memory(len: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("kvtier-test", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    fd
}

fn staging(len: u64) -> (OwnedFd, Arc<Staging>) {
    let fd = memory(len);
    let staging = Staging::map(&fd, usize::try_from(len).unwrap()).unwrap();
    (fd, staging)
}

#[test]
fn claim_refuses_what_overlaps_or_leaves_the_region() {
    let (_fd, staging) = staging(8192);
    let held = staging.claim(100..200).unwrap();
    for range in [0..101, 199..300, 100..200, 120..130, 0..8192] {
        assert!(staging.claim(range.clone()).is_none(), "{range:?} overlaps");
    }
    #[expect(clippy::reversed_empty_ranges, reason = "what is refused")]
    for range in [8192..8193, 0..8193, 5..5, 6..5, usize::MAX - 1..usize::MAX] {
        assert!(
            staging.claim(range.clone()).is_none(),
            "{range:?} is no place"
        );
    }
    let touching = (staging.claim(0..100), staging.claim(200..8192));
    assert!(touching.0.is_some() && touching.1.is_some());
    drop(held);
    assert!(
        staging.claim(100..200).is_some(),
        "a dropped claim is free again"
    );
}

#[test]
fn span_writes_where_the_other_end_reads() {
    let (fd, staging) = staging(8192);
    let mut span = staging.claim(4000..4010).unwrap();
    span.bytes_mut().copy_from_slice(b"0123456789");
    assert_eq!(span.bytes(), b"0123456789");
    let mut seen = [0; 12];
    rustix::io::pread(fd.as_fd(), &mut seen, 3999).unwrap();
    assert_eq!(&seen, b"\x000123456789\x00");
}

#[tokio::test]
async fn view_reads_its_lease_and_nothing_once_the_session_is_lost() {
    let fd = memory(8192);
    rustix::io::pwrite(&fd, b"block", 100).unwrap();
    let arena = Arc::new(Arena::map(&fd, 8192).unwrap());
    let life = Life::new();
    let releases = Releases::new(Arc::clone(&life));
    let outside = LeasedView::new(Arc::clone(&arena), 8190..8193, releases.guard(1));
    assert!(outside.is_none());
    let view = LeasedView::new(arena, 100..105, releases.guard(2)).unwrap();
    assert_eq!(view.bytes(), Some(b"block".as_slice()));
    life.lose("gone");
    assert_eq!(view.bytes(), None);
}
