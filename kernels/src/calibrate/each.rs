//! Work on many parts at a time.
//!
//! Upstairs:   the steps of [`super`].
//! Downstairs: threads of the standard library, which end with the call.
//!
//! Invariants kept here
//!   E1  Answers come in the order of what was asked, whatever thread was first, and each depends
//!       on its own item only: the number of threads changes no bit.
//!
//! Not here on purpose: no pool. A call takes seconds.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What `work` makes of each item, on at most `threads` threads. The first error wins and ends
/// the work of all.
pub(super) fn each<T: Sync, R: Send, E: Send>(
    threads: usize,
    items: &[T],
    work: impl Fn(&T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(items.len()));
    let one = || {
        while let Some((at, item)) = {
            let at = next.fetch_add(1, Ordering::Relaxed);
            items.get(at).map(|item| (at, item))
        } {
            let answer = work(item);
            if answer.is_err() {
                next.store(items.len(), Ordering::Relaxed);
            }
            let mut done = done
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            done.push((at, answer));
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(items.len()) {
            scope.spawn(one);
        }
        one();
    });
    let mut done = done
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, answer)| answer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_in_the_order_of_the_items_when_there_are_several_threads() {
        let items: Vec<usize> = (0..100).collect();
        let doubled = each(4, &items, |item| Ok::<_, ()>(2 * item)).unwrap();
        assert!(doubled.into_iter().eq(items.iter().map(|item| 2 * item)));
    }

    #[test]
    fn an_error_is_the_answer_when_one_item_fails() {
        let items: Vec<usize> = (0..100).collect();
        let work = |item: &usize| if *item == 7 { Err(*item) } else { Ok(()) };
        assert_eq!(each(3, &items, work), Err(7));
    }
}
