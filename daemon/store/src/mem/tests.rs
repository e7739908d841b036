//! Promises of `mem`: M1, M2 and M3.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use proptest::prelude::*;
use rustix::mm::{MapFlags, ProtFlags};

use super::*;

fn arena(len: usize) -> Arc<Arena> {
    Arena::create("test", len, Share::Private).unwrap()
}

fn runs(arena: &Arena) -> usize {
    arena.runs.free().count()
}

fn map_again(arena: &Arena, prot: ProtFlags) -> rustix::io::Result<*mut std::ffi::c_void> {
    let (len, fd) = (arena.capacity(), arena.fd());
    // SAFETY: a new mapping at an address of the kernel's choice.
    unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, fd, 0) }
}

#[test]
fn shared_arena_cannot_be_mapped_writable_by_a_second_mapping() {
    for len in [64 << 10, 4 << 20] {
        let arena = Arena::create("test", len, Share::ReadOnly).unwrap();
        let writable = map_again(&arena, ProtFlags::READ | ProtFlags::WRITE);
        assert_eq!(writable, Err(rustix::io::Errno::PERM));

        let readable = map_again(&arena, ProtFlags::READ).unwrap();
        // SAFETY: the mapping was just made and is this long.
        let later = unsafe {
            rustix::mm::mprotect(
                readable,
                arena.capacity(),
                rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::WRITE,
            )
        };
        assert_eq!(
            later,
            Err(rustix::io::Errno::ACCESS),
            "a reader made itself a writer"
        );
        // SAFETY: unmaps the mapping made above; nothing refers to it.
        unsafe { rustix::mm::munmap(readable, arena.capacity()) }.unwrap();
    }
}

#[test]
fn shared_arena_cannot_be_resized_written_punched_or_unsealed_through_its_descriptor() {
    let arena = Arena::create("test", 64 << 10, Share::ReadOnly).unwrap();
    let refused = Err(rustix::io::Errno::PERM);
    assert_eq!(rustix::fs::ftruncate(arena.fd(), 0), refused);
    assert_eq!(rustix::fs::ftruncate(arena.fd(), 128 << 10), refused);
    assert_eq!(
        rustix::io::write(arena.fd(), b"scribble").map(|_| ()),
        refused
    );
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    assert_eq!(rustix::fs::fallocate(arena.fd(), punch, 0, 4096), refused);
    assert_eq!(
        rustix::fs::fcntl_add_seals(arena.fd(), SealFlags::WRITE),
        refused
    );
}

#[test]
fn shared_arena_shows_a_reader_what_its_owner_writes() {
    let arena = Arena::create("test", 64 << 10, Share::ReadOnly).unwrap();
    let mut buf = arena.alloc(5000).unwrap();
    buf.fill(7);
    let mut seen = vec![0; 5000];
    let got = rustix::io::pread(arena.fd().as_fd(), &mut seen, buf.offset() as u64).unwrap();
    assert_eq!((got, seen), (5000, vec![7; 5000]));
}

// Goal: an operator who wants no large pages gets none, and all the memory all the same.
#[test]
fn arena_of_small_pages_takes_no_others_and_has_its_memory_after_populate() {
    let arena = Arena::create_on("test", 8 << 20, Share::Private, Pages::Small).unwrap();
    assert_eq!(arena.populate(&mut |_, _| {}).unwrap(), PageKind::Small);
    assert_eq!(arena.huge_bytes(), 0);
    let taken = rustix::fs::fstat(arena.fd()).unwrap().st_blocks * 512;
    assert_eq!(taken, 8 << 20);
}

#[test]
fn populate_keeps_content_reports_progress_and_names_the_pages() {
    let arena = arena(8 << 20);
    let mut first = arena.alloc(3 << 20).unwrap();
    first.fill(0x5A);
    let mut heard = Vec::new();
    let kind = arena
        .populate(&mut |done, total| heard.push((done, total)))
        .unwrap();

    assert!(
        first.iter().all(|byte| *byte == 0x5A),
        "populate changed content"
    );
    assert!(heard.is_sorted(), "{heard:?}");
    assert_eq!(heard.last(), Some(&(8 << 20, 8 << 20)));
    assert_eq!(kind, arena.page_kind());
    assert_eq!(
        kind == PageKind::Small,
        arena.huge_bytes() < (8 << 20) / 10 * 9
    );
    println!("pages of this arena: {kind}");
}

#[test]
fn small_arena_is_rounded_to_pages_and_large_to_huge_pages() {
    assert_eq!(arena(1).capacity(), BUF_ALIGN);
    assert_eq!(arena(5000).capacity(), 2 * BUF_ALIGN);
    assert_eq!(arena(HUGE_PAGE + 1).capacity(), 2 * HUGE_PAGE);
    assert_eq!(arena(HUGE_PAGE).base().addr() % HUGE_PAGE, 0);
}

#[test]
fn alloc_refuses_what_does_not_fit_and_takes_the_tightest_hole() {
    let arena = arena(16 * BUF_ALIGN);
    assert!(arena.alloc(17 * BUF_ALIGN).is_none());
    assert!(arena.alloc(usize::MAX).is_none());
    let held: Vec<_> = [4, 1, 2, 1]
        .map(|n| arena.alloc(n * BUF_ALIGN).unwrap())
        .into();
    let [wide, _keep, tight, _keep2] = held.try_into().unwrap();
    let tight_at = tight.offset();
    drop((wide, tight));
    assert_eq!(arena.alloc(2 * BUF_ALIGN).unwrap().offset(), tight_at);
}

#[test]
fn buffers_freed_in_any_order_merge_into_one_run() {
    let arena = arena(8 * BUF_ALIGN);
    let mut held: Vec<_> = (0..8).map(|_| arena.alloc(1).unwrap()).collect();
    assert!(arena.alloc(1).is_none());
    for index in [3, 0, 4, 1, 1, 2, 1, 0] {
        held.remove(index);
    }
    assert_eq!((runs(&arena), arena.largest_free()), (1, 8 * BUF_ALIGN));
}

// Museum row 6 (LMCache#1858): free without the lock that alloc takes.
#[test]
fn museum_06_buffers_taken_and_freed_by_many_threads_are_never_shared() {
    let arena = arena(8 << 20);
    let threads: Vec<_> = (0..4_u8)
        .map(|n| {
            let arena = Arc::clone(&arena);
            std::thread::spawn(move || {
                for len in (1..400).map(|i| i * 97) {
                    let mut buf = arena.alloc(len).unwrap();
                    buf.fill(n);
                    assert!(
                        buf.iter().all(|byte| *byte == n),
                        "another thread wrote here"
                    );
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(arena.free_bytes(), arena.capacity());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    // Goal: M1 and M3 for any order of taking and dropping.
    // Method: every buffer is filled with a tag of its own; an overlap would show as a foreign
    // tag when it is dropped. What is free must be exactly what nobody holds.
    #[test]
    fn buffers_never_overlap_and_generations_never_repeat(
        steps in prop::collection::vec(
            (any::<bool>(), 1_usize..60_000, any::<prop::sample::Index>()), 1..200,
        )
    ) {
        let arena = arena(1 << 20);
        let mut held: Vec<(IoBuf, u8)> = Vec::new();
        let mut generations = BTreeSet::new();
        for (n, (take, len, which)) in steps.into_iter().enumerate() {
            let tag = u8::try_from(n % 251).unwrap();
            if take && let Some(mut buf) = arena.alloc(len) {
                prop_assert!(buf.offset() % BUF_ALIGN == 0 && buf.len() == len);
                prop_assert!(buf.offset() + len <= arena.capacity());
                prop_assert!(generations.insert(buf.generation()), "M3");
                buf.fill(tag);
                held.push((buf, tag));
            } else if !held.is_empty() {
                let (buf, tag) = held.swap_remove(which.index(held.len()));
                prop_assert!(buf.iter().all(|byte| *byte == tag), "M1");
            }
            let taken: usize = held.iter().map(|(b, _)| b.len().next_multiple_of(BUF_ALIGN)).sum();
            prop_assert_eq!(arena.free_bytes() + taken, arena.capacity());
        }
        held.clear();
        prop_assert_eq!((runs(&arena), arena.largest_free()), (1, arena.capacity()));
    }
}

/// Maps, fills, checks and unmaps memory of its own, as an allocator does.
fn use_own_memory(fill: u8) {
    const LEN: usize = 256 << 10;
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    for _ in 0..700 {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let own = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), LEN, prot, flags) };
        let own = own.unwrap();
        // SAFETY: the mapping was just made, is this long, and is unmapped after the last use.
        let bytes = unsafe { std::slice::from_raw_parts_mut(own.cast::<u8>(), LEN) };
        bytes.fill(fill);
        assert!(bytes.iter().all(|byte| *byte == fill));
        // SAFETY: unmaps what was mapped above.
        unsafe { rustix::mm::munmap(own, LEN) }.unwrap();
    }
}

// Goal: making an arena never touches memory that another thread maps meanwhile.
// Method: without a pool of huge pages every large arena first fails to map one; threads that make
// arenas and threads that use memory of their own run side by side. A breach ends the process.
#[test]
fn making_arenas_leaves_the_memory_of_other_threads_alone() {
    std::thread::scope(|scope| {
        for thread in 0..2u8 {
            scope.spawn(|| (0..500).for_each(|_| drop(arena(4 << 20))));
            scope.spawn(move || use_own_memory(thread + 1));
        }
    });
}
