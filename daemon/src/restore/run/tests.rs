//! Tests of the bookkeeping of a restore: each block arrives, is missed once, or is not needed.

use super::*;

fn missed(state: &State) -> Vec<(usize, Miss)> {
    state
        .missed
        .iter()
        .map(|(index, miss)| (*index, *miss))
        .collect()
}

// Goal: a deadline adds what is late and says nothing twice: a client refuses more misses than it
// asked for blocks.
#[test]
fn give_up_misses_what_is_due_once_and_nothing_that_was_computed() {
    let mut state = State::new(8);
    state.miss(4, Miss::Absent, true);
    state.miss(6, Miss::WrongLayout, true);
    state.arrived[5] = true;
    state.give_up(2, |_| false);
    let late = |index| (index, Miss::Deadline);
    let want = [
        late(2),
        late(3),
        (4, Miss::Absent),
        (6, Miss::WrongLayout),
        late(7),
    ];
    assert_eq!(missed(&state), want);
    state.give_up(0, |_| false);
    assert_eq!(missed(&state)[..2], [late(0), late(1)]);
    assert_eq!(missed(&state)[2..], want);
}

#[test]
fn give_up_misses_nothing_behind_the_end_of_a_prefix() {
    let mut state = State::new(8);
    state.miss(5, Miss::Absent, false);
    state.miss(3, Miss::PayloadCrc, false);
    state.arrived[0] = true;
    state.give_up(0, |_| false);
    let want = [
        (1, Miss::Deadline),
        (2, Miss::Deadline),
        (3, Miss::PayloadCrc),
        (5, Miss::Absent),
    ];
    assert_eq!(missed(&state), want);
}

#[test]
fn came_from_keeps_the_slowest_tier_and_the_latest_time() {
    let mut state = State::new(3);
    let ms = Duration::from_millis;
    state.came_from(Tier::Disk, ms(5));
    state.came_from(Tier::Host, ms(7));
    assert_eq!(state.last, Some((ms(7), Tier::Disk)));
}
