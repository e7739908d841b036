//! Tests of the queue to a device's thread: who waits while it is full, and who does not.

use std::sync::atomic::AtomicUsize;
use std::task::{Context, Poll, Wake, Waker};

use super::super::device::Question;
use super::*;

/// More questions than wait in the queue of a device.
const MANY: usize = 1100;

/// Counts how often a task is woken.
#[derive(Debug, Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A tier of one device whose thread waits for it, and has more to answer than its queue holds.
async fn full(
    home: &Path,
) -> (
    Fixture,
    Arc<super::super::faulty::Switch>,
    Vec<Question<bool>>,
) {
    let switch = switch(&path(home, 0));
    let fixture = open(home, 1).await;
    fixture.put_all(NS, 0..3).await;
    switch.set(Mood {
        stuck: true,
        ..Mood::GOOD
    });
    let find = async || fixture.tier.find(vec![id(NS, 1)]).await;
    switch.until_stuck(find).await;
    let handle = fixture.tier.slots[0].handle.as_ref().unwrap();
    let look = |reply| Command::Find {
        ids: vec![id(NS, 1)],
        reply,
    };
    let ask = |_| -> Question<bool> {
        let found = handle.ask(look);
        Box::pin(async move { Some(found.await?[0].is_some()) })
    };
    let asked = (0..MANY).map(ask).collect();
    (fixture, switch, asked)
}

// Goal: whoever waits for a device that hangs costs nothing meanwhile, however many they are.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_looks_again_and_again_for_a_place_in_a_queue_that_is_full() {
    let home = tempfile::tempdir().unwrap();
    let (fixture, switch, mut asked) = full(home.path()).await;
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&woken));
    let mut context = Context::from_waker(&waker);
    for question in &mut asked {
        assert!(matches!(
            question.as_mut().poll(&mut context),
            Poll::Pending
        ));
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    for question in &mut asked {
        let _ = question.as_mut().poll(&mut context);
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(woken.0.load(Ordering::SeqCst), 0);
    switch.set(Mood::GOOD);
    for question in asked {
        assert_eq!(question.await, Some(true), "everybody is answered");
    }
    fixture.close().await;
}

// Goal: P3. What is asked after a wipe has begun comes behind it, though its device has very many
// questions to answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_wipe_waits_for_no_place_in_a_queue_that_is_full() {
    let home = tempfile::tempdir().unwrap();
    let (fixture, switch, mut asked) = full(home.path()).await;
    // What has a place already, whatever was asked before, and what has none.
    let late = asked.split_off(1050);
    let forgetting = fixture.tier.forget(NS);
    switch.set(Mood::GOOD);
    for question in asked.into_iter().take(1000) {
        assert_eq!(question.await, Some(true), "asked before");
    }
    for question in late {
        assert_eq!(question.await, Some(false), "asked in truth after it");
    }
    assert_eq!(fixture.tier.wipe(forgetting).await.unwrap().blocks, 3);
    fixture.close().await;
}
