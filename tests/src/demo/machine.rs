//! Facts about the machine that a number is worthless without.
//!
//! Upstairs:   `show`.
//! Downstairs: `/proc`, `/sys`.
//!
//! Not here on purpose: no host name and no user name; result files are published.

use std::path::Path;

use serde::Serialize;

/// File systems that live in memory: what is restored from there did not come from a device.
const IN_MEMORY: [&str; 2] = ["tmpfs", "ramfs"];

/// Where a result comes from.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Machine {
    cores: usize,
    cpu: String,
    kernel: String,
    device: String,
}

impl Machine {
    /// Looks at this machine and at the device below `folder`.
    pub(super) fn look(folder: &Path) -> Self {
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = cpu.lines().find(|line| line.starts_with("model name"));
        let name = name.and_then(|line| line.split_once(": "));
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            cpu: name.map_or("unknown", |(_, name)| name).to_owned(),
            kernel: kernel.trim().to_owned(),
            device: device(folder).unwrap_or_else(|| "unknown".to_owned()),
        }
    }

    /// True when the disk tier lies in memory.
    pub(super) fn is_in_memory(&self) -> bool {
        IN_MEMORY.iter().any(|kind| self.device.starts_with(kind))
    }

    /// One line for people, with how busy the machine is.
    pub(super) fn line(&self) -> String {
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load = load.split(' ').next().unwrap_or("unknown");
        let Self {
            cores,
            cpu,
            kernel,
            device,
        } = self;
        format!("{cores} cores of {cpu}, Linux {kernel}, {device}; load average {load}")
    }
}

/// File system and block device below `folder`, as `/proc/self/mountinfo` tells it.
fn device(folder: &Path) -> Option<String> {
    let number = rustix::fs::stat(folder).ok()?.st_dev;
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let number = format!("{major}:{minor}");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mount = mounts
        .lines()
        .find(|line| line.split(' ').nth(2) == Some(&number))?;
    let (_, after) = mount.split_once(" - ")?;
    let mut fields = after.split(' ');
    let (kind, source) = (fields.next()?, fields.next()?);
    let model = std::fs::read_to_string(format!("/sys/dev/block/{number}/device/model"));
    let model = model.map_or(String::new(), |model| format!(" ({})", model.trim()));
    Some(format!("{kind} on {source}{model}"))
}
