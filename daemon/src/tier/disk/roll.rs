//! How the devices do together: one progress of all recoveries, one health of the process.
//!
//! Upstairs:   every device's thread says how its device does; who waits for one says when it does
//!             not answer.
//! Downstairs: `health`, `metrics`.
//!
//! Invariants kept here
//!   E2  A device that has failed stays so: what its thread says afterwards changes nothing.
//!   E3  The process is unwell when its last device has failed, and not before: a restart, which is
//!       what bad health asks for, would not bring the device back and would cost host memory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvtier_store::DeviceState;

use crate::health::{Health, Progress};
use crate::metrics::{Device, DiskState, Metrics};

/// See the module.
#[derive(Debug)]
pub(super) struct Roll {
    health: Arc<Health>,
    /// What the devices count.
    pub(super) metrics: Arc<Metrics>,
    each: Mutex<Vec<One>>,
}

#[derive(Debug, Clone, Copy)]
struct One {
    progress: Progress,
    /// When the progress was another.
    moved: Instant,
    failed: bool,
}

impl Roll {
    /// Of `devices` devices, of which nothing is known yet.
    pub(super) fn new(devices: usize, health: Arc<Health>, metrics: Arc<Metrics>) -> Self {
        let one = One {
            progress: Progress::default(),
            moved: Instant::now(),
            failed: false,
        };
        Self {
            health,
            metrics,
            each: Mutex::new(vec![one; devices]),
        }
    }

    /// How far the recovery of a device is.
    pub(super) fn recovered(&self, device: Device, progress: Progress) {
        let mut each = self.each();
        if let Some(one) = each.get_mut(device.position()) {
            one.progress = progress;
            one.moved = Instant::now();
        }
        let sum = |of: fn(&One) -> u64| each.iter().map(of).sum();
        self.health.recovered(Progress {
            done: sum(|one| one.progress.done),
            total: sum(|one| one.progress.total),
        });
    }

    /// How long the recovery of a device has not moved on.
    pub(super) fn unmoved(&self, device: Device) -> Duration {
        let each = self.each();
        let one = each.get(device.position());
        one.map_or(Duration::ZERO, |one| one.moved.elapsed())
    }

    /// A device does not answer, or does again.
    pub(super) fn answers(&self, device: Device, answers: bool) {
        let number = device.number();
        match answers {
            true => tracing::info!(device = number, "the disk answers again"),
            false => tracing::error!(
                device = number,
                "the disk does not answer; its blocks are misses until it does"
            ),
        }
        let what = (!answers).then(|| "does not answer".to_owned());
        self.health.trouble(format!("the thread of {device}"), what);
    }

    /// How a device does from now on, and why, when it has failed.
    pub(super) fn state(&self, device: Device, state: DeviceState, why: &str) {
        let mut each = self.each();
        if let Some(one) = each.get_mut(device.position()) {
            if one.failed {
                return;
            }
            one.failed = state == DeviceState::Failed;
        }
        self.metrics.set_disk_state(device, label(state));
        let trouble = match state {
            DeviceState::Healthy | DeviceState::Full => None,
            DeviceState::Slow => Some("is slow".to_owned()),
            DeviceState::ReadOnly => Some("takes no writes until a restart".to_owned()),
            DeviceState::Failed => Some(format!("serves nothing: {why}")),
        };
        self.health.trouble(device, trouble);
        if each.iter().all(|one| one.failed) {
            let reason = format!("the disk tier failed: {device} serves nothing: {why}");
            self.health.fail(reason);
        }
    }

    fn each(&self) -> MutexGuard<'_, Vec<One>> {
        self.each.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn label(state: DeviceState) -> DiskState {
    match state {
        DeviceState::Healthy => DiskState::Healthy,
        DeviceState::Full => DiskState::Full,
        DeviceState::Slow => DiskState::Slow,
        DeviceState::ReadOnly => DiskState::ReadOnly,
        DeviceState::Failed => DiskState::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Label;

    fn roll(devices: usize) -> (Roll, Vec<Device>) {
        let roll = Roll::new(devices, Arc::default(), Arc::default());
        (roll, <Device as Label>::all())
    }

    #[test]
    fn progress_of_all_recoveries_is_their_sum() {
        let (roll, devices) = roll(2);
        let progress = |done, total| Progress { done, total };
        roll.recovered(devices[0], progress(1, 10));
        roll.recovered(devices[1], progress(4, 5));
        roll.recovered(devices[0], progress(2, 10));
        assert_eq!(roll.health.progress(), progress(6, 15));
    }

    #[test]
    fn the_process_is_unwell_once_every_device_has_failed() {
        let (roll, devices) = roll(2);
        roll.state(devices[1], DeviceState::Failed, "it burns");
        assert_eq!(roll.health.live(), Ok(()));
        assert!(
            roll.health
                .to_string()
                .contains("disk 1 serves nothing: it burns")
        );
        roll.state(devices[0], DeviceState::ReadOnly, "");
        assert_eq!(roll.health.live(), Ok(()), "it serves");
        roll.state(devices[1], DeviceState::Healthy, "");
        assert_eq!(
            roll.metrics
                .disk_state
                .of((devices[1], DiskState::Failed))
                .get(),
            1
        );
        roll.state(devices[0], DeviceState::Failed, "it burns too");
        let why = roll.health.live().unwrap_err();
        assert!(why.contains("disk 0 serves nothing: it burns too"), "{why}");
    }

    #[test]
    fn every_state_shows_in_the_metric_of_its_device() {
        let (roll, devices) = roll(2);
        for (state, want) in [
            (DeviceState::Healthy, DiskState::Healthy),
            (DeviceState::Full, DiskState::Full),
            (DeviceState::Slow, DiskState::Slow),
            (DeviceState::Healthy, DiskState::Healthy),
            (DeviceState::ReadOnly, DiskState::ReadOnly),
            (DeviceState::Failed, DiskState::Failed),
        ] {
            roll.state(devices[1], state, "");
            let is = |device| roll.metrics.disk_state.of((device, want)).get();
            assert_eq!((is(devices[0]), is(devices[1])), (0, 1), "{state:?}");
            let quiet = matches!(state, DeviceState::Healthy | DeviceState::Full);
            assert_eq!(roll.health.to_string() == "starting", quiet, "{state:?}");
        }
    }
}
