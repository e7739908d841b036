//! How the device does: what holds of it now, and the worst of that as its state.
//!
//! Upstairs:   `Store::state`, and [`Event::Device`] with every change.
//! Downstairs: `lane` says whether it is slow; rooms of the store say the rest.
//!
//! A device may be full and slow at once; when it is quick again it is still full. What cannot be
//! mended before the store is opened again is never taken back.

use crate::disk::Disk;
use crate::events::{DeviceState, Event};

use super::Store;

/// What holds now besides the state that is always there, `Healthy`.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Condition {
    full: bool,
    slow: bool,
    read_only: bool,
    failed: bool,
}

impl Condition {
    /// The worst of what holds.
    pub(super) fn state(self) -> DeviceState {
        let holds = [
            (self.failed, DeviceState::Failed),
            (self.read_only, DeviceState::ReadOnly),
            (self.slow, DeviceState::Slow),
            (self.full, DeviceState::Full),
        ];
        let worst = holds.into_iter().find(|(holds, _)| *holds);
        worst.map_or(DeviceState::Healthy, |(_, state)| state)
    }

    fn note(&mut self, state: DeviceState, holds: bool) {
        match state {
            DeviceState::Healthy => {}
            DeviceState::Full => self.full = holds,
            DeviceState::Slow => self.slow = holds,
            DeviceState::ReadOnly => self.read_only |= holds,
            DeviceState::Failed => self.failed |= holds,
        }
    }
}

impl<D: Disk> Store<D> {
    /// How the device does.
    pub fn state(&self) -> DeviceState {
        self.condition.state()
    }

    /// `state` holds of the device from now on, or does not any more.
    pub(crate) fn note_state(&mut self, state: DeviceState, holds: bool, events: &mut Vec<Event>) {
        let before = self.condition.state();
        self.condition.note(state, holds);
        let now = self.condition.state();
        if now != before {
            tracing::warn!(from = before.as_str(), to = now.as_str(), "device state");
            events.push(Event::Device(now));
        }
    }

    /// Asks the lane whether the device is slow.
    pub(super) fn note_speed(&mut self, events: &mut Vec<Event>) {
        let slow = self.lane.slow();
        if let Some(slow) = slow.filter(|_| !self.condition.slow) {
            tracing::warn!(
                operations = slow.what,
                own_time_us = slow.mean_us,
                baseline_us = slow.baseline_us,
                "the device is much slower than it was"
            );
        }
        self.note_state(DeviceState::Slow, slow.is_some(), events);
    }
}

#[cfg(test)]
mod tests;
