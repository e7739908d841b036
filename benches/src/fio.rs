//! fio as the device limit: the same file, size, depth and pages as our own run beside it.
//!
//! Upstairs:   suites that move bytes to and from a device.
//! Downstairs: the program `fio`.
//!
//! fio gets its best engine: io_uring, direct, registered files, and registered buffers where it
//! does not sync. With `fdatasync` it cannot have them (`arguments` says why): our runs beside
//! `DurableWrite` and `Mixed` have what fio lacks there. The kind of page
//! behind a buffer decides the speed of a disk, and fio cannot ask for transparent huge pages, so
//! it maps an arena of ours: both sides fill memory of the same kind.
//!
//! Not here on purpose: no fio library and no fallback. Without fio there is no limit to compare
//! with, and a number alone says nothing about the software.

use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::Command;

use kvtier_benches::report::Problem;
use kvtier_store::mem::Arena;
use serde_json::Value;

use crate::limits::Sample;

/// What fio shall do.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Pattern {
    /// Reads at random offsets, each a multiple of the size.
    RandomRead,
    /// Reads front to back.
    Read,
    /// Writes front to back, never synced: what a device takes before it has to keep it.
    Write,
    /// Writes front to back, with `fdatasync` after every `sync_every` of them.
    DurableWrite {
        /// Writes per sync.
        sync_every: u64,
    },
    /// Reads and writes at random offsets, with `fdatasync` after every `sync_every` writes.
    Mixed {
        /// Share of reads. Unit: percent.
        reads: u32,
        /// Writes per sync.
        sync_every: u64,
    },
}

/// One run of fio.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Job<'a> {
    pub(crate) pattern: Pattern,
    /// File that exists and is at least `span` long.
    pub(crate) file: &'a Path,
    /// Bytes of the file that take part.
    pub(crate) span: u64,
    /// Bytes of one operation.
    pub(crate) size: u64,
    pub(crate) depth: usize,
    pub(crate) seconds: f64,
    /// Memory for fio's buffers: at least `size * depth` and a page.
    pub(crate) arena: &'a Arena,
}

/// Version of the fio on this machine, or how to get one.
pub(crate) fn version() -> Result<String, Problem> {
    let output = Command::new("fio")
        .arg("--version")
        .output()
        .map_err(|error| {
            format!(
                "cannot run fio ({error}); install it: apt-get install fio (or dnf install fio)"
            )
        })?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

impl Job<'_> {
    /// Runs fio and reads its result.
    pub(crate) fn run(&self) -> Result<Sample, Problem> {
        let output = Command::new("fio").args(self.arguments()).output()?;
        let problem = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            return Err(format!("fio failed ({}): {}", output.status, problem.trim()).into());
        }
        let text = String::from_utf8_lossy(&output.stdout);
        // Warnings come before the object.
        let json = text
            .find('{')
            .and_then(|start| text.get(start..))
            .unwrap_or_default();
        let result = serde_json::from_str(json)?;
        let syncs = matches!(
            self.pattern,
            Pattern::DurableWrite { .. } | Pattern::Mixed { .. }
        );
        if syncs && !synced(&result) {
            return Err("this fio answers fdatasync without making it: no limit to compare".into());
        }
        sample(&result, self.pattern)
            .ok_or_else(|| "fio's result lacks the fields of version 3".into())
    }

    fn arguments(&self) -> Vec<String> {
        let memory = format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            self.arena.fd().as_fd().as_raw_fd()
        );
        let mut arguments: Vec<String> = [
            "--name=limit",
            "--ioengine=io_uring",
            "--direct=1",
            "--registerfiles",
            "--time_based",
            "--scramble_buffers=0",
            "--allow_file_create=0",
            "--output-format=json",
        ]
        .map(str::to_owned)
        .into();
        arguments.extend([
            format!("--filename={}", self.file.display()),
            format!("--size={}", self.span),
            format!("--bs={}", self.size),
            format!("--iodepth={}", self.depth),
            format!("--runtime={}ms", (self.seconds * 1000.0).round()),
            format!("--iomem=mmapshared:{memory}"),
        ]);
        match self.pattern {
            Pattern::RandomRead => {
                let flags = ["--rw=randread", "--norandommap", "--fixedbufs"];
                arguments.extend(flags.map(str::to_owned));
            }
            Pattern::Read => arguments.extend(["--rw=read", "--fixedbufs"].map(str::to_owned)),
            Pattern::Write => arguments.extend(["--rw=write", "--fixedbufs"].map(str::to_owned)),
            // Not with --fixedbufs: fio 3.33 then leaves the buffer's number in the sync request,
            // the kernel refuses it, and fio counts syncs that never happened.
            Pattern::DurableWrite { sync_every } => {
                arguments.extend(["--rw=write".to_owned(), format!("--fdatasync={sync_every}")]);
            }
            Pattern::Mixed { reads, sync_every } => arguments.extend([
                "--rw=randrw".to_owned(),
                "--norandommap".to_owned(),
                format!("--rwmixread={reads}"),
                format!("--fdatasync={sync_every}"),
            ]),
        }
        arguments
    }
}

/// Whether syncs took as long as a sync can take: the refused ones end in a few hundred ns.
fn synced(result: &Value) -> bool {
    let mean_ns = result
        .pointer("/jobs/0/sync/lat_ns/mean")
        .and_then(Value::as_f64);
    mean_ns.is_some_and(|mean_ns| mean_ns > 1000.0)
}

fn sample(result: &Value, pattern: Pattern) -> Option<Sample> {
    let job = result.get("jobs")?.get(0)?;
    let (read, write) = (job.get("read")?, job.get("write")?);
    let side = match pattern {
        Pattern::RandomRead | Pattern::Read | Pattern::Mixed { .. } => read,
        Pattern::Write | Pattern::DurableWrite { .. } => write,
    };
    let mut bytes = side.get("io_bytes")?.as_f64()?;
    if matches!(pattern, Pattern::Mixed { .. }) {
        bytes += write.get("io_bytes")?.as_f64()?;
    }
    let seconds = side.get("runtime")?.as_f64()? / 1000.0;
    let percent = job.get("usr_cpu")?.as_f64()? + job.get("sys_cpu")?.as_f64()?;
    let cpu_s = percent / 100.0 * job.get("job_runtime")?.as_f64()? / 1000.0;
    Some(Sample {
        bytes,
        seconds,
        cpu_s,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn synced_tells_a_sync_from_a_refused_one() {
        let result =
            |mean: f64| serde_json::json!({"jobs": [{"sync": {"lat_ns": {"mean": mean}}}]});
        assert!(synced(&result(146_000.0)) && !synced(&result(397.4)) && !synced(&Value::Null));
    }

    #[test]
    fn sample_reads_what_fio_3_writes() {
        let text = r#"{"jobs": [{"job_runtime": 2000, "usr_cpu": 1.5, "sys_cpu": 3.5,
            "read": {"io_bytes": 4294967296, "runtime": 2000}, "write": {"io_bytes": 0}}]}"#;
        let got = sample(&serde_json::from_str(text).unwrap(), Pattern::RandomRead).unwrap();
        assert_eq!((got.gib_s(), got.cpu_s), (2.0, 0.1));
        assert!(sample(&Value::Null, Pattern::RandomRead).is_none());
    }
}
