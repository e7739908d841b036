//! The policy against a device of one queue: shares, floors, and what a reader notices.

use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

/// A device that serves in order at `rate`, and the work that is offered to it.
struct Bench {
    pace: Pace,
    rate: u64,
    now: Duration,
    queue: std::collections::VecDeque<(Class, u64, Duration)>,
    /// Bytes moved of reads, saves and background.
    moved: [u64; 3],
    waits: Vec<Duration>,
    idle: Duration,
}

/// What is offered: `size` and number of reads kept open, and who else always has work.
#[derive(Debug, Clone, Copy)]
struct Offer {
    reads: (u64, u64),
    saves: bool,
    background: bool,
}

impl Bench {
    fn new(rate: u64) -> Self {
        Self {
            pace: Pace::default(),
            rate,
            now: Duration::ZERO,
            queue: std::collections::VecDeque::new(),
            moved: [0; 3],
            waits: Vec::new(),
            idle: Duration::ZERO,
        }
    }

    fn send(&mut self, class: Class, bytes: u64) {
        let cost = time_of(bytes, self.rate);
        self.pace.sent(class, bytes, self.now, cost);
        self.queue.push_back((class, bytes, self.now));
    }

    /// Runs for `span` with this work always on offer.
    fn run(&mut self, offer: Offer, span: Duration) {
        let until = self.now + span;
        let held = [
            (Class::Save, offer.saves),
            (Class::Background, offer.background),
        ];
        for (class, _) in held.iter().filter(|(_, on)| *on) {
            self.pace.begin(*class);
        }
        let (size, depth) = offer.reads;
        let mut open = 0;
        while self.now < until {
            while open < depth {
                self.pace.begin(Class::Read);
                self.send(Class::Read, size);
                open += 1;
            }
            let mut at = None;
            for (class, _) in held.iter().filter(|(_, on)| *on) {
                loop {
                    match self.pace.turn(*class, self.now, self.rate) {
                        Turn::Go(most) => self.send(*class, (most as u64).min(MIB)),
                        Turn::At(then) => {
                            at = Some(at.map_or(then, |at: Duration| at.min(then)));
                            break;
                        }
                        Turn::Full => break,
                    }
                }
            }
            let Some((class, bytes, sent)) = self.queue.pop_front() else {
                let then = at.expect("held, and nothing to wait for").max(self.now);
                self.idle += then - self.now;
                self.now = then;
                continue;
            };
            self.now += time_of(bytes, self.rate);
            self.pace.back(class, bytes);
            self.moved[class as usize] += bytes;
            if class == Class::Read {
                self.pace.end(class, self.now);
                self.waits.push(self.now - sent);
                open -= 1;
            }
        }
        for (class, _) in held.iter().filter(|(_, on)| *on) {
            self.pace.end(*class, self.now);
        }
    }
}

fn p99(waits: &mut [Duration]) -> Duration {
    waits.sort();
    waits[waits.len() * 99 / 100]
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_class_that_is_alone_gets_all_of_the_device() {
    for (saves, background) in [(true, false), (false, true)] {
        let mut bench = Bench::new(1024 * MIB);
        let offer = Offer {
            reads: (0, 0),
            saves,
            background,
        };
        bench.run(offer, SECOND);
        assert_eq!(bench.idle, Duration::ZERO, "F3");
        assert!(bench.moved.iter().sum::<u64>() >= 1023 * MIB);
    }
}

#[test]
fn a_class_that_is_alone_has_no_more_in_flight_than_its_window() {
    let (mut pace, rate) = (Pace::default(), 4096 * MIB);
    pace.begin(Class::Save);
    let mut flying = 0;
    while let Turn::Go(_) = pace.turn(Class::Save, SECOND, rate) {
        pace.sent(Class::Save, MIB, SECOND, time_of(MIB, rate));
        flying += MIB;
    }
    assert_eq!(pace.turn(Class::Save, SECOND, rate), Turn::Full);
    assert!(
        (19..=20).contains(&(flying / MIB)),
        "5 ms of 4 GiB/s, not {flying}"
    );
}

// Whatever is offered: the last operation that fits ends with the window, and none is a crumb.
#[test]
fn operations_of_every_length_stay_within_the_window() {
    for len in [64 << 10, MIB, 2 * MIB + 4096, 5 * MIB, 256 * MIB] {
        for rate in [MIB, 700 * MIB, 4000 * MIB] {
            let mut pace = Pace::default();
            pace.begin(Class::Save);
            let mut flying = 0;
            while let Turn::Go(most) = pace.turn(Class::Save, SECOND, rate) {
                assert!(most as u64 >= ROOM_MIN && most.is_multiple_of(4096));
                let bytes = len.min(most as u64);
                pace.sent(Class::Save, bytes, SECOND, time_of(bytes, rate));
                flying += bytes;
            }
            let window = window(rate);
            assert!(
                flying <= window,
                "{flying} of {window} in operations of {len}"
            );
            assert!(flying > window - 2 * ROOM_MIN, "{flying} of {window}");
        }
    }
}

#[test]
fn a_pause_between_two_reads_lets_no_flood_in() {
    let (mut pace, rate, mut now) = (Pace::default(), 1024 * MIB, SECOND);
    pace.begin(Class::Save);
    for _ in 0..10 {
        pace.begin(Class::Read);
        pace.end(Class::Read, now);
        now += LINGER / 2;
        assert!(!matches!(pace.turn(Class::Save, now, rate), Turn::Go(most) if most > PIECE));
    }
    assert_eq!(pace.turn(Class::Save, now + LINGER, rate), Turn::Go(ALONE));
}

proptest! {
    // F1, F2 and the promise of the module: whatever the readers do, saves and background move,
    // and a reader's wait grows by less than their shares and one piece of each.
    #[test]
    fn nobody_starves_and_readers_hardly_notice(
        size in prop::sample::select(vec![64 << 10, 256 << 10, MIB, 2 * MIB]),
        depth in 1..64u64,
        gib in 1..8u64,
    ) {
        let rate = gib * 1024 * MIB;
        let reads = (size, depth);
        let mut alone = Bench::new(rate);
        alone.run(Offer { reads, saves: false, background: false }, SECOND);
        let mut beside = Bench::new(rate);
        beside.run(Offer { reads, saves: true, background: true }, SECOND);
        prop_assert!(beside.now >= SECOND && !beside.waits.is_empty());
        let [_, saves, background] = beside.moved;
        // Where an eighth of what is in flight is less than a piece, a piece at a time is the
        // bound.
        let one_at_a_time = rate * (PIECE as u64) / (size * depth + 3 * PIECE as u64);
        let due = (rate / ONE_IN).min(one_at_a_time.max(rate / ONE_IN / 8)) / 2;
        prop_assert!(saves >= due, "F2: saves {} of {} KiB", saves >> 10, due >> 10);
        let due = RATE_MIN.min(one_at_a_time) / 2;
        prop_assert!(background >= due, "F2: background {}", background >> 10);
        prop_assert!(background <= RATE_MIN + MIB, "background {}", background >> 10);
        let (before, after) = (p99(&mut alone.waits), p99(&mut beside.waits));
        let allowed = before + before * 2 / 10 + time_of(3 * PIECE as u64, rate);
        prop_assert!(after <= allowed, "{before:?} became {after:?}");
    }

    // A device that is slower than anybody knew: shares of what is in flight hold all the same.
    #[test]
    fn a_rate_that_is_far_too_high_floods_no_device(depth in 4..32u64, rate in 1..50u64) {
        let (mut pace, rate) = (Pace::default(), rate << 30);
        pace.begin(Class::Save);
        for _ in 0..depth {
            pace.begin(Class::Read);
            pace.sent(Class::Read, 2 * MIB, SECOND, time_of(2 * MIB, rate));
        }
        let (mut now, mut flying) = (SECOND, 0);
        loop {
            match pace.turn(Class::Save, now, rate) {
                Turn::Go(most) => {
                    pace.sent(Class::Save, most as u64, now, time_of(most as u64, rate));
                    flying += most as u64;
                }
                Turn::At(then) => now = then,
                Turn::Full => break,
            }
        }
        prop_assert!(flying <= 2 * MIB * depth / ONE_IN + PIECE as u64);
    }
}
