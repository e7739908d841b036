//! Tests of scratch memory: who waits, and who is served first.

use std::pin::pin;
use std::task::{Context, Waker};

use super::*;

fn scratch() -> Scratch {
    Scratch::create(16 << 10, Pages::Small).unwrap()
}

/// Whether a future is ready when it is looked at.
fn ready<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Option<T> {
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        std::task::Poll::Ready(value) => Some(value),
        std::task::Poll::Pending => None,
    }
}

#[tokio::test]
async fn take_refuses_what_can_never_be_had() {
    assert!(scratch().take((16 << 10) + 1, Line::Load).await.is_none());
}

// Goal: a large record is not passed for ever by small ones that fit into every gap.
#[tokio::test]
async fn take_serves_a_line_in_the_order_it_was_joined() {
    let scratch = scratch();
    let first = scratch.take(8 << 10, Line::Load).await.unwrap();
    let second = scratch.take(8 << 10, Line::Load).await.unwrap();
    let mut large = pin!(scratch.take(16 << 10, Line::Load));
    let mut small = pin!(scratch.take(4 << 10, Line::Load));
    assert!(ready(large.as_mut()).is_none() && ready(small.as_mut()).is_none());
    drop(first);
    assert!(ready(small.as_mut()).is_none(), "the large one was first");
    assert!(ready(large.as_mut()).is_none());
    drop(second);
    let large = ready(large.as_mut()).expect("woken by the drop").unwrap();
    assert!(ready(small.as_mut()).is_none());
    drop(large);
    assert!(ready(small.as_mut()).is_some());
}

#[tokio::test]
async fn take_for_a_load_does_not_wait_behind_saves() {
    let scratch = scratch();
    let held = scratch.take(12 << 10, Line::Save).await.unwrap();
    let mut save = pin!(scratch.take(8 << 10, Line::Save));
    assert!(ready(save.as_mut()).is_none());
    let load = scratch.take(4 << 10, Line::Load).await;
    assert!(load.is_some(), "it fits, whoever waits to save");
    drop((held, load));
    assert!(ready(save.as_mut()).is_some());
}
