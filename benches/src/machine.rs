//! Facts about the machine that a number is worthless without.
//!
//! Upstairs:   `report`, the demo.
//! Downstairs: `/proc`, `/sys`.
//!
//! Not here on purpose: no host name and no user name; result files are published.

use std::fmt;
use std::path::Path;

use serde::Serialize;

/// File systems that live in memory: what is read from there did not come from a device.
const IN_MEMORY: [&str; 2] = ["tmpfs", "ramfs"];

/// Where a result comes from.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    cores: usize,
    cpu: String,
    kernel: String,
    device: String,
}

impl Machine {
    /// Looks at this machine and at the device below `dir`.
    pub fn look(dir: &Path) -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok();
        Self {
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            cpu: cpu.map_or("unknown", |(_, name)| name).to_owned(),
            kernel: kernel.map_or("unknown".to_owned(), |text| text.trim().to_owned()),
            device: device(dir).unwrap_or_else(|| "unknown".to_owned()),
        }
    }

    /// True when what was measured as a device lies in memory.
    pub fn is_in_memory(&self) -> bool {
        IN_MEMORY.iter().any(|kind| self.device.starts_with(kind))
    }
}

/// How busy the machine is: its load average of the last minute.
pub fn load() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').next().unwrap_or_default().to_owned()
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            cores,
            cpu,
            kernel,
            device,
        } = self;
        write!(f, "{cores} cores of {cpu}, Linux {kernel}, {device}")
    }
}

/// Filesystem and block device below `dir`, as `/proc/self/mountinfo` tells it.
fn device(dir: &Path) -> Option<String> {
    let dev = rustix::fs::stat(dir).ok()?.st_dev;
    let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let wanted = format!("{major}:{minor}");
    let line = mounts
        .lines()
        .find(|line| line.split(' ').nth(2) == Some(wanted.as_str()))?;
    let (_, after) = line.split_once(" - ")?;
    let mut fields = after.split(' ');
    let (kind, source) = (fields.next()?, fields.next()?);
    let model = std::fs::read_to_string(format!("/sys/dev/block/{wanted}/device/model"));
    let model = model.map_or(String::new(), |text| format!(" ({})", text.trim()));
    Some(format!("{kind} on {source}{model}"))
}
