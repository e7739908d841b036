//! What counts as slow and what does not, and what a device's rate is.

use super::*;

const MIB: u64 = 1 << 20;
const MS: Duration = Duration::from_millis(1);
const READ: (Class, OpKind, u64) = (Class::Read, OpKind::Read, 2 * MIB);

/// A device that is asked for one thing after the other.
#[derive(Default)]
struct Device {
    gauge: Gauge,
    now: Duration,
    user: u64,
}

impl Device {
    /// `count` rounds of `depth` operations, each round served in order, `own` for each.
    fn serve(&mut self, count: u64, depth: u64, own: Duration) {
        for _ in 0..count {
            let first = self.user;
            for _ in 0..depth {
                self.gauge.sent(self.user, READ, self.now);
                self.user += 1;
            }
            for user in first..self.user {
                self.now += own;
                self.gauge.back(user, true, self.now).unwrap();
            }
        }
    }

    fn slow(&mut self) -> bool {
        self.gauge.slow(self.now).is_some()
    }
}

#[test]
fn a_device_that_takes_many_times_longer_is_slow_until_it_recovers() {
    let mut device = Device::default();
    device.serve(100, 1, MS);
    assert!(!device.slow());
    device.serve(20, 1, MS * 300);
    assert!(device.slow(), "300 times as long");
    device.serve(20, 1, MS);
    assert!(device.slow(), "not yet sure");
    device.serve(40, 1, MS);
    assert!(!device.slow());
}

#[test]
fn a_long_queue_is_no_slow_device() {
    let mut device = Device::default();
    device.serve(100, 1, MS);
    device.serve(100, 64, MS * 3);
    assert!(!device.slow(), "each waits 200 ms for the others");
    device.serve(100, 1, MS);
    assert!(!device.slow());
}

#[test]
fn a_device_that_is_slower_by_little_or_for_once_is_not_slow() {
    let mut device = Device::default();
    device.serve(100, 1, MS);
    device.serve(1000, 1, MS * 5);
    assert!(!device.slow(), "five times");
    device.serve(1, 1, MS * 700);
    assert!(!device.slow(), "once");
    let mut quick = Device::default();
    quick.serve(100, 1, MS / 20);
    quick.serve(1000, 1, MS * 20);
    assert!(
        !quick.slow(),
        "20 ms are 400 times as long, and worth no alarm"
    );
}

#[test]
fn a_device_that_was_never_quick_is_slow_above_a_second() {
    let mut device = Device::default();
    device.serve(5, 1, MS * 1500);
    assert!(device.slow());
}

#[test]
fn an_operation_that_does_not_come_back_makes_a_device_slow() {
    let mut device = Device::default();
    device.serve(100, 1, MS);
    device.gauge.sent(device.user, READ, device.now);
    assert!(!device.slow());
    let again = device
        .gauge
        .look_again(device.now)
        .expect("it is being waited for");
    device.now = again;
    assert!(device.slow());
    device.gauge.back(device.user, true, device.now);
    device.serve(100, 1, MS);
    assert!(!device.slow());
}

// However deep the queue: nobody waits a second for each of its places.
#[test]
fn a_device_with_a_full_queue_that_stands_still_is_slow_after_two_seconds() {
    let mut device = Device::default();
    device.serve(100, 64, MS * 3);
    (0..64).for_each(|user| device.gauge.sent(device.user + user, READ, device.now));
    for _ in 0..32 {
        device.now += MS * 3;
        device.gauge.back(device.user, true, device.now).unwrap();
        device.user += 1;
    }
    device.now += MS * 1900;
    assert!(!device.slow(), "it may have to tidy up");
    let again = device.gauge.look_again(device.now).expect("looked at");
    assert!(again <= device.now + MS * 101, "{again:?}");
    device.now = again;
    assert!(device.slow());
    device.gauge.back(device.user, true, device.now).unwrap();
    assert!(!device.slow(), "it moves");
}

#[test]
fn a_slow_device_that_nobody_asks_is_forgiven() {
    let mut device = Device::default();
    device.serve(100, 1, MS);
    device.serve(20, 1, MS * 300);
    assert!(device.slow());
    device.now = device
        .gauge
        .look_again(device.now)
        .expect("a verdict ends by itself");
    assert!(!device.slow() && device.gauge.look_again(device.now).is_none());
}

#[test]
fn errors_say_nothing_about_speed() {
    let mut device = Device::default();
    device.serve(100, 1, MS);
    for user in 10_000..10_100 {
        device.gauge.sent(user, READ, device.now);
        device.now += MS * 900;
        device.gauge.back(user, false, device.now);
    }
    assert!(!device.slow());
}

#[test]
fn the_rate_is_what_the_device_moved_while_it_was_busy() {
    let mut device = Device::default();
    for _ in 0..50 {
        device.serve(1, 8, MS);
        device.now += MS * 100;
    }
    let rate = device.gauge.rate() / MIB;
    assert!(
        (1900..=2100).contains(&rate),
        "2 MiB in each millisecond, not {rate} MiB/s"
    );
    device.serve(200, 1, MS * 10);
    let less = device.gauge.rate() / MIB;
    assert!((500..1900).contains(&less), "it falls, and slowly: {less}");
}
