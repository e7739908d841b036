//! Tests of who has a slot.

use super::*;

#[test]
fn take_gives_all_slots_or_none_and_they_come_back_when_dropped() {
    let slots = Arc::<Slots>::default();
    let first = slots.take(&[1, 2]).unwrap();
    for names in [&[2][..], &[3, 1], &[4, 4]] {
        let refused = slots.take(names).unwrap_err().to_string();
        assert!(refused.contains("is in another transfer"), "{refused}");
    }
    let rest = slots.take(&[3, 4]).unwrap();
    drop(first);
    drop(slots.take(&[1, 2]).unwrap());
    drop(rest);
    assert!(slots.lock().is_empty());
}
