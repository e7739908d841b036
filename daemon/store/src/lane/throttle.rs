//! An operator's limit on what reads may take of the device.
//!
//! Upstairs:   `lane` asks before it hands a read to the device.
//! Downstairs: nothing. Time comes in as an argument.
//!
//! A read goes out when a device of that rate would have finished it: whoever waits sees the rate
//! from the first read on, and not only in the long run.

use std::time::Duration;

use super::pace::time_of;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Throttle {
    /// Unit: bytes a second; none: no limit.
    rate: Option<u64>,
    /// When the last read was due.
    free: Duration,
    /// When the read at the head of the queue is due.
    due: Option<Duration>,
}

impl Throttle {
    /// A limit, in bytes a second; none takes it away.
    pub(crate) fn set(&mut self, rate: Option<u64>) {
        self.rate = rate;
        self.due = None;
    }

    /// True when there is a limit.
    pub(crate) fn is_set(&self) -> bool {
        self.rate.is_some()
    }

    /// When the next read, of `bytes`, may go; `None` when it may now.
    pub(crate) fn wait(&mut self, bytes: u64, now: Duration) -> Option<Duration> {
        let rate = self.rate?;
        let free = self.free.max(now);
        let due = *self.due.get_or_insert_with(|| free + time_of(bytes, rate));
        (due > now).then_some(due)
    }

    /// It went.
    pub(crate) fn sent(&mut self) {
        self.free = self.due.take().unwrap_or(self.free);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn wait_lets_each_read_go_when_a_device_of_that_rate_would_have_finished_it() {
        let mut throttle = Throttle::default();
        assert_eq!(throttle.wait(1 << 30, MS(0)), None, "no limit");
        throttle.sent();
        throttle.set(Some(1_000_000));
        assert_eq!(throttle.wait(50_000, MS(100)), Some(MS(150)));
        assert_eq!(
            throttle.wait(50_000, MS(140)),
            Some(MS(150)),
            "it does not start anew"
        );
        assert_eq!(throttle.wait(50_000, MS(151)), None);
        throttle.sent();
        assert_eq!(throttle.wait(10_000, MS(151)), Some(MS(161)));
        assert_eq!(throttle.wait(10_000, MS(161)), None);
        throttle.sent();
        assert_eq!(
            throttle.wait(10_000, MS(500)),
            Some(MS(510)),
            "idle time is no credit"
        );
        throttle.set(None);
        assert_eq!(throttle.wait(10_000, MS(500)), None);
    }
}
