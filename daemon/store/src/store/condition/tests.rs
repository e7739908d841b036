//! States of a device: slow and well again, and what is worse stays.

use std::time::Duration;

use crate::disk::sim::{Fault, Faults};
use crate::testkit::*;
use crate::*;

fn read_often(store: &mut Fixture, times: u64) {
    for number in 0..times {
        assert!(store.hits(number % 20));
    }
}

#[test]
fn a_device_that_becomes_slow_says_so_and_is_well_again_when_it_is_quick() {
    let mut store = Fixture::new();
    store.put_all(0..20);
    read_often(&mut store, 100);
    assert_eq!(store.store.state(), DeviceState::Healthy);
    let slow = Faults::default().with(Fault::Slow, 1_000_000);
    store.store.disk_mut().set_faults(slow);
    read_often(&mut store, 30);
    assert_eq!(store.store.state(), DeviceState::Slow);
    assert!(store.store.disk_mut().fired().times(Fault::Slow) > 0);
    store.store.disk_mut().set_faults(Faults::default());
    read_often(&mut store, 100);
    assert_eq!(store.states, [DeviceState::Slow, DeviceState::Healthy]);
}

#[test]
fn a_slow_device_that_nobody_asks_is_well_again_after_a_while() {
    let mut store = Fixture::new();
    store.put_all(0..20);
    read_often(&mut store, 100);
    let slow = Faults::default().with(Fault::Slow, 1_000_000);
    store.store.disk_mut().set_faults(slow);
    read_often(&mut store, 30);
    assert_eq!(store.store.state(), DeviceState::Slow);
    store.store.disk_mut().pass(Duration::from_secs(31));
    store.step();
    assert_eq!(store.store.state(), DeviceState::Healthy);
}

#[test]
fn the_worst_that_holds_is_the_state_and_what_cannot_be_mended_stays() {
    use DeviceState::{Failed, Full, Healthy, ReadOnly, Slow};
    let (mut store, mut events) = (Fixture::new(), Vec::new());
    let steps = [
        (Full, true, Full),
        (Slow, true, Slow),
        (Full, false, Slow),
        (Full, true, Slow),
        (Slow, false, Full),
        (Full, false, Healthy),
        (ReadOnly, true, ReadOnly),
        (Slow, true, ReadOnly),
        (ReadOnly, false, ReadOnly),
        (Failed, true, Failed),
        (Failed, false, Failed),
    ];
    for (state, holds, want) in steps {
        store.store.note_state(state, holds, &mut events);
        assert_eq!(store.store.state(), want, "{state:?} {holds}");
    }
    let changes = events.iter().filter(|one| matches!(one, Event::Device(_)));
    assert_eq!(changes.count(), 6, "an event for each change, and no other");
}
