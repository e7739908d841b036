//! When the scrub runs, who checks what it reads, and what is counted of it.
//!
//! Upstairs:   the disk thread.
//! Downstairs: `Store::scrub`; checks run on the runtime's threads for blocking work.
//!
//! Invariants kept here
//!   B2  The disk thread checks nothing itself: it would keep the device idle.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvtier_proto::Bytes;
use kvtier_store::disk::Waker;
use kvtier_store::{Checked, Counter, ScrubProgress, ToCheck};
use tokio::runtime::Handle;

use super::roll::Roll;
use super::thread::AnyStore;
use crate::metrics::{Device, Metrics};

/// How often and how fast a device is scrubbed.
#[derive(Debug, Clone, Copy)]
pub struct ScrubOptions {
    /// Bytes a second; 0 is never.
    pub rate: Bytes,
    /// From the start of the daemon to the first pass.
    pub first_after: Duration,
    /// From the end of a pass to the beginning of the next.
    pub every: Duration,
}

impl ScrubOptions {
    /// Never.
    pub const OFF: Self = Self {
        rate: Bytes(0),
        first_after: Duration::MAX,
        every: Duration::MAX,
    };
}

/// See the module.
pub(super) struct Scrubber {
    options: ScrubOptions,
    threads: Option<Handle>,
    tell: Sender<Checked>,
    checked: Receiver<Checked>,
    waker: Waker,
    /// When the next pass is due; `None` while one runs, and when none ever is.
    due: Option<Instant>,
    counted: [u64; 2],
}

impl Scrubber {
    /// A scrubber that checks on the runtime of `threads`, or not at all.
    pub(super) fn new(options: ScrubOptions, threads: Option<Handle>, waker: Waker) -> Self {
        let (tell, checked) = channel();
        let on = options.rate.get() > 0 && threads.is_some();
        let first = Instant::now().checked_add(options.first_after);
        Self {
            options,
            threads,
            tell,
            checked,
            waker,
            due: first.filter(|_| on),
            counted: [0; 2],
        }
    }

    /// Time until a pass is due.
    pub(super) fn due_in(&self) -> Option<Duration> {
        self.due
            .map(|due| due.saturating_duration_since(Instant::now()))
    }

    /// Starts a pass when it is time for one.
    pub(super) fn start_if_due(&mut self, store: &mut AnyStore, device: Device) {
        if self.due.is_some_and(|due| due <= Instant::now()) {
            self.due = None;
            store.scrub(self.options.rate.get());
            let (device, rate) = (device.number(), self.options.rate);
            tracing::info!(device, %rate, "scrub started");
        }
    }

    /// Has a record checked.
    pub(super) fn check(&self, to_check: ToCheck) {
        let Some(threads) = &self.threads else { return };
        let (tell, waker) = (self.tell.clone(), self.waker.clone());
        threads.spawn_blocking(move || {
            let _ = tell.send(to_check.check());
            waker.wake();
        });
    }

    /// A check that has ended.
    pub(super) fn take_checked(&self) -> Option<Checked> {
        self.checked.try_recv().ok()
    }

    /// A pass is over.
    pub(super) fn ended(&mut self, pass: &ScrubProgress, device: Device, roll: &Roll) {
        self.due = Instant::now().checked_add(self.options.every);
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        roll.metrics.scrub_ended.of(device).set(now.as_secs_f64());
        tracing::info!(
            device = device.number(),
            segments = pass.segments,
            records = pass.records,
            bytes = pass.bytes,
            bad = pass.bad,
            seconds = pass.time.as_secs_f64(),
            "scrub ended"
        );
    }

    /// Carries the store's numbers to the metrics.
    pub(super) fn report(&mut self, store: &AnyStore, device: Device, metrics: &Metrics) {
        let counters = [Counter::ScrubBytes, Counter::ScrubBad];
        let families = [&metrics.scrub_bytes, &metrics.scrub_bad];
        let pairs = counters.into_iter().zip(families);
        for ((counter, family), counted) in pairs.zip(&mut self.counted) {
            let now = store.counters().get(counter);
            family.of(device).inc_by(now.saturating_sub(*counted));
            *counted = now;
        }
        let position = store.scrub_progress().map_or(0.0, |pass| {
            pass.segments_done as f64 / pass.segments.max(1) as f64
        });
        metrics.scrub_position.of(device).set(position);
    }
}
