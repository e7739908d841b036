//! The label that says which device of the disk tier.
//!
//! Upstairs:   `labels` gives it out with the others.
//! Downstairs: `family`.

use super::Label;
use crate::config::DISKS_MAX;

/// Number of a device of the disk tier: its place among the `[[disk]]` tables, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device(usize);

/// Texts of the numbers.
const DEVICES: [&str; DISKS_MAX] = [
    "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15",
];

impl Device {
    /// The first device, or the only one.
    pub const FIRST: Self = Self(0);

    /// Its number.
    pub fn number(self) -> u32 {
        u32::try_from(self.0).unwrap_or(u32::MAX)
    }

    /// Its place in the configuration.
    pub const fn position(self) -> usize {
        self.0
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "disk {}", self.0)
    }
}

impl Label for Device {
    const NAME: &'static str = "device";
    fn all() -> Vec<Self> {
        (0..DISKS_MAX).map(Self).collect()
    }
    fn count() -> usize {
        DISKS_MAX
    }
    fn index(self) -> usize {
        self.0
    }
    fn text(self) -> &'static str {
        DEVICES.get(self.0).copied().unwrap_or("?")
    }
}
