//! Model of the memory that goes from hand to hand in an arena: every order of events that the
//! memory model allows.
//!
//! Upstairs:   `cargo test`.
//! Downstairs: `mem::runs` and `mem::free`, the store's own files, with loom's lock and counter.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

#[path = "../../daemon/store/src/mem/free.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    reason = "the model takes and gives back, no more"
)]
mod free;
#[path = "../../daemon/store/src/mem/runs.rs"]
mod runs;

use runs::Runs;

/// What the files take from the store.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
    pub(crate) use loom::sync::{Mutex, MutexGuard};
}

/// Three threads share an arena of two buffers. loom fails when two accesses of one buffer, one of
/// them a write, have no order: when its bytes are handed on before their holder is done (M1, M3).
fn hand_over(hold: fn(&Runs, &UnsafeCell<()>, usize)) {
    loom::model(move || {
        let cells = [UnsafeCell::new(()), UnsafeCell::new(())];
        let shared = Arc::new((Runs::new(2), cells));
        let user = || {
            let shared = Arc::clone(&shared);
            thread::spawn(move || use_one(&shared.0, &shared.1, hold))
        };
        let users = [user(), user()];
        let mine = use_one(&shared.0, &shared.1, hold);
        let generations = users.map(|user| user.join().ok().flatten());
        let [first, second] = generations;
        let same = |a: Option<u64>, b: Option<u64>| a.is_some() && a == b;
        assert!(!same(first, second) && !same(first, mine) && !same(second, mine));
        assert_eq!(shared.0.free().bytes(), 2);
    });
}

fn use_one(
    runs: &Runs,
    cells: &[UnsafeCell<()>],
    hold: fn(&Runs, &UnsafeCell<()>, usize),
) -> Option<u64> {
    let (at, generation) = runs.take(1)?;
    hold(runs, cells.get(at)?, at);
    Some(generation)
}

#[test]
fn a_buffer_is_handed_on_whole_in_any_order() {
    hand_over(|runs, cell, at| {
        cell.with_mut(|_| ());
        runs.give_back(at, 1);
    });
}

#[test]
fn a_buffer_that_is_given_back_before_its_last_use_is_found() {
    let early = || {
        hand_over(|runs, cell, at| {
            runs.give_back(at, 1);
            cell.with_mut(|_| ());
        });
    };
    assert!(std::thread::spawn(early).join().is_err());
}
