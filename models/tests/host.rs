//! Models of the host tier: sessions that hold blocks, saves that publish them, wipes, and whoever
//! makes room, all at once.
//!
//! Upstairs:   `cargo test`.
//! Downstairs: `tier::host`, `tier::directory`, `tier::scratch`, `block`, as the daemon has them.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is the failure report"
)]

use std::sync::Arc;

use kvtier_models::block::{BlockFacts, BlockId, HostBlock};
use kvtier_models::planted::Bug;
use kvtier_models::sync::{AtomicU64, Ordering};
use kvtier_models::tier::directory::Name;
use kvtier_models::tier::host::{HostTier, Life};
use kvtier_models::tier::scratch::{Line, Scratch};
use kvtier_models::{finds, holds};
use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::{BlockKey, BlockLayout, LayoutFingerprint, NamespaceId, PayloadKind, Quality};
use kvtier_store::mem::{IoBuf, Pages};
use shuttle::future::block_on;
use shuttle::sync::mpsc::{Receiver, Sender, channel};
use shuttle::thread;

const BLOCK: usize = 4096;

fn tier(blocks: usize) -> Arc<HostTier> {
    let tier = HostTier::create(NamespaceId(1), "model", blocks * BLOCK, Pages::Small);
    Arc::new(tier.unwrap())
}

fn name(key: u8) -> Name {
    (PayloadKind::Kv, BlockKey([key; 32]))
}

/// A block of `key` whose every byte is `fill`.
fn block(tier: &HostTier, key: u8, mut image: IoBuf, fill: u8) -> HostBlock {
    let (kind, key) = name(key);
    let id = BlockId {
        namespace: tier.namespace(),
        kind,
        key,
    };
    let facts = BlockFacts {
        parent: BlockKey::ROOT,
        position: 0,
        through: Quality::Exact,
        fingerprint: LayoutFingerprint([0; 32]),
        layout: Arc::new(BlockLayout::opaque(16, BLOCK as u64).unwrap()),
        order: PartOrder::TokenMajor,
    };
    image.fill(fill);
    HostBlock::new(id, facts, image, 0).unwrap()
}

fn add(tier: &HostTier, key: u8, fill: u8, life: Life) -> Option<Arc<HostBlock>> {
    let image = tier.room(BLOCK).image?;
    tier.insert(block(tier, key, image, fill), false, life)
}

fn is_all(bytes: &[u8], fill: u8) -> bool {
    bytes.iter().all(|byte| *byte == fill)
}

/// Two sessions lease and release one block, while another's save takes whatever room it can.
fn leases_and_room() {
    let tier = tier(1);
    drop(add(&tier, 1, 1, tier.life()).unwrap());
    let session = |tier: Arc<HostTier>| {
        move || {
            for _ in 0..2 {
                let Some(held) = tier.get(&name(1)) else {
                    continue;
                };
                thread::yield_now();
                let info = tier
                    .info(&name(1))
                    .expect("a block that is held was evicted");
                assert!(Arc::ptr_eq(&info.block, held.raw()), "and is another now");
                assert!(info.holders > 0);
                assert!(is_all(held.payload(), 1), "its bytes are another's");
            }
        }
    };
    let sessions = [Arc::clone(&tier), Arc::clone(&tier)].map(|tier| thread::spawn(session(tier)));
    let saver = {
        let tier = Arc::clone(&tier);
        thread::spawn(move || {
            for _ in 0..2 {
                let Some(image) = tier.room(BLOCK).image else {
                    continue;
                };
                let fresh = block(&tier, 2, image, 2);
                thread::yield_now();
                drop(tier.insert(fresh, false, tier.life()));
                drop(add(&tier, 1, 1, tier.life()));
            }
        })
    };
    for thread in sessions.into_iter().chain([saver]) {
        thread.join().unwrap();
    }
    // Nobody holds anything: all of it can be had.
    assert!(tier.room(BLOCK).image.is_some());
    assert_eq!(tier.used(), 0);
}

// Goal: T1, and that the end of the last hold is never taken for the end of another.
#[test]
fn a_block_that_anybody_holds_stays_in_every_order_of_leases_and_evictions() {
    holds(leases_and_room);
    assert!(finds(Bug::ReturnWhileLent, leases_and_room));
}

/// Saves that began before a wipe, and readers, while the namespace is wiped. The bytes of a block
/// say in which life its save began.
fn saves_and_wipes() {
    let tier = tier(3);
    let fill = |life: Life| u8::try_from(life.0).unwrap();
    let saver = |key: u8| {
        let tier = Arc::clone(&tier);
        thread::spawn(move || {
            let life = tier.life();
            let Some(image) = tier.room(BLOCK).image else {
                return;
            };
            let fresh = block(&tier, key, image, fill(life));
            if let Some(kept) = tier.insert(fresh, false, life) {
                tier.set_durable(&name(key), true, life);
                assert!(is_all(kept.payload(), kept.payload()[0]));
            }
        })
    };
    let wiper = {
        let tier = Arc::clone(&tier);
        thread::spawn(move || {
            drop(tier.clear(|| ()));
            let now = fill(tier.life());
            let seen = [1, 2].map(|key| tier.get(&name(key)));
            for block in seen.iter().flatten() {
                assert!(block.payload()[0] >= now, "a block outlived its wipe");
            }
        })
    };
    let threads = [saver(1), saver(1), saver(2), wiper];
    for thread in threads {
        thread.join().unwrap();
    }
    for key in [1, 2] {
        if let Some(info) = tier.info(&name(key)) {
            assert!(is_all(info.block.payload(), fill(tier.life())));
            assert_eq!(info.holders, 0, "a hold that nobody has");
        }
    }
    drop(tier.clear(|| ()));
    assert_eq!(tier.used(), 0, "memory was lost");
}

// Goal: P3 in host memory, however late a save of the life before arrives.
#[test]
fn nothing_of_the_life_before_a_wipe_is_published_in_any_order() {
    holds(saves_and_wipes);
    assert!(finds(Bug::PublishAcrossWipe, saves_and_wipes));
}

/// What the thread of a device is asked, in this order: of one block, whose bytes are a number.
enum Ask {
    Put(u8, Life, Sender<bool>),
    Find(Sender<Option<u8>>),
    Forget(Sender<()>),
}

/// A device's thread: it answers one after the other, and checks the life of what it stores.
fn device(lives: Arc<AtomicU64>, asked: Receiver<Ask>, mut stored: Option<u8>) -> Option<u8> {
    while let Ok(ask) = asked.recv() {
        match ask {
            Ask::Put(fill, life, reply) => {
                let alive = lives.load(Ordering::SeqCst) == life.0;
                if alive {
                    stored = Some(fill);
                }
                let _ = reply.send(alive);
            }
            Ask::Find(reply) => drop(reply.send(stored)),
            Ask::Forget(reply) => {
                stored = None;
                let _ = reply.send(());
            }
        }
    }
    stored
}

/// A load and a save while a namespace is wiped. The bytes of a block say in which life its save
/// began; the device had one of the first life.
fn loads_saves_and_wipes() {
    let tier = tier(3);
    let fill = |life: Life| u8::try_from(life.0).unwrap();
    let (ask, asked) = channel();
    let first = Some(fill(tier.life()));
    let lives = tier.lives();
    let disk = thread::spawn(move || device(lives, asked, first));
    let loader = {
        let (tier, ask) = (Arc::clone(&tier), ask.clone());
        thread::spawn(move || {
            let life = tier.life();
            let (reply, found) = channel();
            ask.send(Ask::Find(reply)).unwrap();
            let Some(found) = found.recv().unwrap() else {
                return;
            };
            let image = tier.room(BLOCK).image.unwrap();
            drop(tier.insert(block(&tier, 1, image, found), true, life));
        })
    };
    let saver = {
        let (tier, ask) = (Arc::clone(&tier), ask.clone());
        thread::spawn(move || {
            let life = tier.life();
            let (reply, done) = channel();
            ask.send(Ask::Put(fill(life), life, reply)).unwrap();
            done.recv().unwrap().then_some(fill(life))
        })
    };
    let (reply, forgotten) = channel();
    drop(tier.clear(|| ask.send(Ask::Forget(reply)).unwrap()));
    forgotten.recv().unwrap();
    let now = fill(tier.life());
    loader.join().unwrap();
    if let Some(loaded) = tier.get(&name(1)) {
        assert!(
            is_all(loaded.payload(), now),
            "a load brought back what was wiped"
        );
    }
    let durable = saver.join().unwrap();
    drop(ask);
    let stored = disk.join().unwrap();
    assert_eq!(stored, durable.filter(|fill| *fill == now));
}

// Goal: P3 and P2 on the way from a device and to it. What was wiped is never loaded again, and
// what was acknowledged after the wipe stays.
#[test]
fn a_load_brings_back_nothing_of_the_life_before_a_wipe_in_any_order() {
    holds(loads_saves_and_wipes);
    assert!(finds(Bug::LifeBeforeForget, loads_saves_and_wipes));
}

/// Whoever finds no room waits for what frees some, and looks again.
async fn wait_for_room(tier: &HostTier) -> IoBuf {
    loop {
        let freed = tier.freed();
        if let Some(image) = tier.room(BLOCK).image {
            return image;
        }
        freed.await;
    }
}

// Goal: nobody waits for ever for memory that is free. A wake-up that is lost is a deadlock, which
// shuttle reports.
#[test]
fn whoever_waits_for_room_is_woken_in_every_order() {
    holds(|| {
        let tier = tier(1);
        let held = add(&tier, 1, 1, tier.life()).unwrap();
        let waiter = || {
            let tier = Arc::clone(&tier);
            thread::spawn(move || drop(block_on(wait_for_room(&tier))))
        };
        let waiters = [waiter(), waiter()];
        drop(held);
        for waiter in waiters {
            waiter.join().unwrap();
        }
    });
}

// Goal: both lines of scratch memory are served to their ends, also when somebody leaves one.
#[test]
fn scratch_memory_reaches_everybody_in_both_lines_in_every_order() {
    holds(|| {
        let scratch = Arc::new(Scratch::create(2 * BLOCK, Pages::Small).unwrap());
        let taker = |len: usize, line: Line| {
            let scratch = Arc::clone(&scratch);
            thread::spawn(move || {
                let mut buf = block_on(scratch.take(len, line)).unwrap();
                buf.fill(7);
                thread::yield_now();
                assert!(is_all(&buf, 7));
            })
        };
        let takers = [
            taker(2 * BLOCK, Line::Save),
            taker(BLOCK, Line::Save),
            taker(2 * BLOCK, Line::Load),
            taker(BLOCK, Line::Load),
        ];
        for taker in takers {
            taker.join().unwrap();
        }
        assert_eq!(scratch.arena().free_bytes(), 2 * BLOCK);
    });
}
