//! The life of a segment, and the choice of the next victim.

use super::*;

const LIVES: [Life; 7] = [
    Life::Free,
    Life::Preparing,
    Life::Ready,
    Life::Open,
    Life::Sealing,
    Life::Sealed,
    Life::Draining,
];
const STEPS: [Step; 7] = [
    Step::Allocate,
    Step::Prepared,
    Step::Use,
    Step::Full,
    Step::Seal,
    Step::Chosen,
    Step::Emptied,
];

// L4: the picture's seven edges are the machine, and there is no other.
#[test]
fn a_segment_has_one_way_out_of_every_state() {
    for (number, life) in LIVES.into_iter().enumerate() {
        for (other, step) in STEPS.into_iter().enumerate() {
            let want = (number == other).then(|| LIVES[(number + 1) % LIVES.len()]);
            assert_eq!(life.next(step), want, "{life:?} at {step:?}");
        }
    }
    let picture = include_str!("../segments.rs");
    for word in LIVES
        .iter()
        .map(|one| format!("{one:?}"))
        .chain(STEPS.map(|one| format!("{one:?}")))
    {
        let drawn = picture
            .lines()
            .filter(|line| line.starts_with("///"))
            .any(|line| line.contains(&word));
        assert!(drawn, "{word} is not in the picture");
    }
}

#[test]
fn a_vacant_number_is_the_least_that_no_file_has() {
    let mut segments = Segments::default();
    assert_eq!(segments.vacant(), 0);
    for number in [0, 1, 3] {
        segments.add(Segment::new(number, FileId(number), 4096));
    }
    segments.leave_alone(2);
    segments.leave_alone(4);
    assert_eq!(
        (segments.vacant(), segments.count(), segments.files()),
        (5, 3, 5)
    );
    segments.remove(1);
    assert_eq!((segments.vacant(), segments.files()), (1, 4));
}

fn candidate(segment: u32, epoch: u64, readers: u32, pinned_bytes: u64) -> Candidate {
    Candidate {
        segment,
        epoch,
        readers,
        live: 1,
        pinned_bytes,
    }
}

#[test]
fn the_oldest_segment_without_readers_is_chosen() {
    let all = [
        candidate(0, 30, 0, 0),
        candidate(1, 10, 2, 0),
        candidate(2, 20, 0, 0),
    ];
    assert_eq!(choose_victim(&all, 0), Some(2));
    let read = [candidate(1, 10, 1, 0), candidate(2, 20, 3, 0)];
    assert_eq!(
        choose_victim(&read, 0),
        Some(1),
        "steady readers must not stop all writing"
    );
    assert_eq!(choose_victim(&[], 0), None);
}

#[test]
fn a_segment_whose_pins_fit_goes_before_an_older_one_whose_pins_do_not() {
    let all = [candidate(0, 10, 0, 900), candidate(1, 20, 0, 100)];
    assert_eq!(choose_victim(&all, 500), Some(1));
    assert_eq!(choose_victim(&all, 1000), Some(0));
    assert_eq!(
        choose_victim(&all, 50),
        Some(0),
        "when none fits, the oldest goes"
    );
}
