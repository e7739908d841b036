//! Tests of who keeps a lease when a stream is lost: the client what it may know of, nobody else
//! anything.

use std::path::Path;

use kvtier_proto::{BlockKey, Level, PayloadKind};
use kvtier_store::mem::Pages;
use tokio_stream::StreamExt;

use super::*;
use crate::metrics::Metrics;
use crate::session::tests::{block, session, tenant};
use crate::tier::Tiers;
use crate::tier::scratch::Scratch;

const BLOCKS: u8 = 6;

/// A session whose namespace holds some blocks, and a restore of them all.
fn restore(dir: &Path, events: mpsc::Sender<run::Event>) -> (Arc<Session>, Restore) {
    let session = Arc::new(session(&tenant(dir)));
    let host = &session.tenant.host;
    for number in 1..=BLOCKS {
        host.insert(block(&session, number), true, host.life())
            .unwrap();
    }
    let (metrics, scratch) = (
        Arc::new(Metrics::new()),
        Scratch::create(1 << 20, Pages::Small).unwrap(),
    );
    let (_control, listen) = watch::channel(Control::default());
    let restore = Restore {
        reader: Arc::<Session>::clone(&session),
        learned: Arc::default(),
        tiers: Tiers::new(None, Level::RAW, scratch, Arc::clone(&metrics)),
        metrics,
        request: run::Request {
            keys: (1..=BLOCKS).map(|number| BlockKey([number; 32])).collect(),
            kind: PayloadKind::Kv,
            deadline: None,
            scattered: true,
            accept: kvtier_proto::Quality::Exact,
            two_ended: None,
        },
        control: listen,
        events,
    };
    (session, restore)
}

// Goal: what a queue still holds when its stream is lost is given back (E5).
#[tokio::test]
async fn leases_stay_with_the_client_only_once_their_event_was_taken() {
    let dir = tempfile::tempdir().unwrap();
    let (sender, mut happened) = mpsc::channel(8);
    let (session, restore) = restore(dir.path(), sender);
    restore.run().await;
    assert_eq!(session.leases(), usize::from(BLOCKS));
    // One event a block, as if each had been loaded for itself.
    let (out, queue) = mpsc::channel(16);
    while let Some(event) = happened.recv().await {
        let run::Event::Ready(ready) = event else {
            continue;
        };
        for leased in ready {
            let (event, holds) = to_wire(1, run::Event::Ready(vec![leased]));
            out.send((Ok(event), holds)).await.unwrap();
        }
    }
    let mut events = Events(queue);
    for _ in 0..2 {
        events.next().await.unwrap().unwrap();
    }
    drop(events);
    assert_eq!(session.leases(), 2, "the client may know of two");
}

#[tokio::test]
async fn a_restore_that_nobody_listens_to_holds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for heard in 0..3 {
        let (sender, mut happened) = mpsc::channel(1);
        let (session, restore) = restore(&dir.path().join(heard.to_string()), sender);
        let running = tokio::spawn(restore.run());
        for _ in 0..heard {
            happened.recv().await.unwrap();
        }
        drop(happened);
        running.await.unwrap();
        assert_eq!(session.leases(), 0, "after {heard} events");
    }
}
