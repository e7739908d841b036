//! Model of the bell that wakes a lane: every order of events that the memory model allows.
//!
//! Upstairs:   `cargo test`.
//! Downstairs: `disk::rung`, the store's own file, with loom's atomics.

use std::cell::Cell;

use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use loom::thread;

use sync::{AtomicBool, Ordering};

#[path = "../../daemon/store/src/disk/rung.rs"]
mod rung;

use rung::Rung;

thread_local! {
    /// Planted: an answer clears the flag without reading it.
    static BLIND: Cell<bool> = const { Cell::new(false) };
}

/// What the file takes from the store.
mod sync {
    pub(crate) use loom::sync::atomic::Ordering;

    /// loom's, and one that forgets to read what it overwrites.
    #[derive(Debug)]
    pub(crate) struct AtomicBool(loom::sync::atomic::AtomicBool);

    impl AtomicBool {
        pub(crate) fn new(value: bool) -> Self {
            Self(loom::sync::atomic::AtomicBool::new(value))
        }

        pub(crate) fn swap(&self, value: bool, order: Ordering) -> bool {
            if super::BLIND.get() && !value {
                self.0.store(value, Ordering::SeqCst);
                return true;
            }
            self.0.swap(value, order)
        }

        pub(crate) fn load(&self, order: Ordering) -> bool {
            self.0.load(order)
        }

        pub(crate) fn store(&self, value: bool, order: Ordering) {
            self.0.store(value, order);
        }
    }
}

/// One thread leaves a command and rings, another does so twice; the lane answers whenever it hears
/// something. In the end it has seen every command, or there is a noise that it will hear (B1).
fn bell(answer: fn(&Rung, &AtomicU64)) {
    loom::model(move || {
        let commands = [false; 3].map(|left| Arc::new(AtomicBool::new(left)));
        let shared = Arc::new((Rung::new(), AtomicU64::new(0)));
        let [first, second, third] = commands.clone();
        let ringers = [vec![first], vec![second, third]].map(|commands| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let (rung, noise) = &*shared;
                for command in commands {
                    // Nothing but the bell carries this over.
                    command.store(true, Ordering::Relaxed);
                    rung.ring(|| {
                        noise.fetch_add(1, Ordering::Release);
                    });
                }
            })
        });
        let (rung, noise) = &*shared;
        let mut seen = 0;
        for _ in 0..2 {
            if noise.load(Ordering::Acquire) > 0 {
                answer(rung, noise);
                let left = commands
                    .iter()
                    .map(|command| command.load(Ordering::Relaxed));
                seen = left.filter(|left| *left).count();
            }
        }
        for ringer in ringers {
            assert!(ringer.join().is_ok());
        }
        let heard = noise.load(Ordering::Acquire) > 0;
        assert!(
            heard || seen == commands.len(),
            "a ring was lost: {seen} seen"
        );
    });
}

fn answered(rung: &Rung, noise: &AtomicU64) {
    rung.answer(|| {
        noise.swap(0, Ordering::Acquire);
    });
}

fn is_found(model: impl Fn() + Send + 'static) -> bool {
    std::thread::spawn(model).join().is_err()
}

// Goal: no put waits for a lane that sleeps on, on any machine.
#[test]
fn no_ring_of_two_threads_is_lost_in_any_order() {
    bell(answered);
}

#[test]
fn an_answer_that_does_not_read_the_flag_loses_a_ring_and_is_found() {
    assert!(is_found(|| {
        BLIND.set(true);
        bell(answered);
    }));
}

#[test]
fn an_answer_that_clears_the_flag_first_loses_a_ring_and_is_found() {
    let wrong = |rung: &Rung, noise: &AtomicU64| {
        rung.answer(|| {});
        noise.swap(0, Ordering::Acquire);
    };
    assert!(is_found(move || bell(wrong)));
}
