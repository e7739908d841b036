//! Tests of the order: the front for a prefix, the back for an engine that computes.

use std::sync::Arc;

use kvtier_proto::claims::{Claim, HEAD, map_len};

use super::*;
use crate::shm::SharedMemory;

fn map(blocks: usize) -> (Arc<SharedMemory>, Claims) {
    let memory = Arc::new(SharedMemory::create(4096).unwrap());
    let length = map_len(blocks) as u64;
    let claims = Claims::new(Arc::clone(&memory), (0, length), blocks).unwrap();
    (memory, claims)
}

fn drain(order: &mut Order, wanted: Range<usize>) -> Vec<usize> {
    std::iter::from_fn(|| order.next(wanted.clone())).collect()
}

#[test]
fn next_goes_from_the_front_and_passes_over_what_nobody_wants() {
    let mut order = Order::new(vec![0, 1, 3, 4, 7], None);
    assert_eq!(drain(&mut order, 1..5), [1, 3, 4]);
}

#[test]
fn next_goes_from_the_back_of_a_map_and_leaves_what_the_engine_has() {
    let (memory, claims) = map(8);
    let engine =
        |index: usize| memory.swap_byte(HEAD + index, Claim::Empty as u8, Claim::Computing as u8);
    let mut order = Order::new(vec![0, 1, 2, 3, 5, 6], Some(claims));
    assert!(engine(0));
    assert_eq!(order.next(0..8), Some(6));
    assert_eq!(order.next(0..8), Some(5));
    assert!(engine(1) && engine(2) && !engine(5), "the two ends meet");
    assert_eq!(order.next(0..8), Some(3));
    assert_eq!(order.next(0..8), None);
    assert!(!engine(3));
}

// Goal: nobody waits for a device that hangs: what it was to bring can be computed.
#[test]
fn give_back_leaves_what_is_on_its_way_to_whoever_is_first() {
    let (memory, claims) = map(4);
    let engine =
        |index: usize| memory.swap_byte(HEAD + index, Claim::Empty as u8, Claim::Computing as u8);
    let mut order = Order::new((0..4).collect(), Some(claims.clone()));
    for want in [3, 2, 1] {
        assert_eq!(order.next(0..4), Some(want));
    }
    assert!(claims.ready(3));
    order.landed(3, Some(1));
    order.give_back();
    assert!(!engine(3) && engine(1), "what came stays");
    assert!(claims.ready(2) && !engine(2) && !claims.ready(1));
}

// Goal: on a slow device nothing is claimed long before it is read.
#[test]
fn depth_grows_with_the_rate_of_the_device_within_bounds() {
    let (_memory, claims) = map(100);
    let ms = Duration::from_millis;
    let mut slow = Order::new((0..100).collect(), Some(claims.clone()));
    assert_eq!(slow.depth(ms(0)), LOADS_MIN);
    slow.landed(99, Some(2 << 20));
    assert_eq!(slow.depth(ms(1000)), LOADS_MIN);
    let mut fast = Order::new((0..100).collect(), Some(claims));
    for _ in 0..4 {
        fast.landed(99, Some(1 << 20));
    }
    assert_eq!(fast.depth(ms(1)), 21, "20 MiB take 5 ms");
    assert_eq!(fast.depth(ms(0)), LOADS_MAX);
    assert_eq!(Order::new(Vec::new(), None).depth(ms(0)), LOADS_MAX);
}
