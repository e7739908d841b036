//! fio's reads, alone and beside fio's own writes.
//!
//! Upstairs:   `fair`.
//! Downstairs: the program `fio`.
//!
//! Not here on purpose: no search for the writes that disturb least. Size and depth are those of
//! the pieces in which the store lets saves go beside reads.

use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use kvtier_benches::report::Problem;
use kvtier_proto::units::{KIB, MIB};
use kvtier_store::disk::lane::{LaneKind, open_lane};
use kvtier_store::mem::Arena;
use serde_json::Value;

use super::bed::Seen;
use crate::limits::lane::Run as LaneRun;
use crate::limits::noisy_arena;

/// Length of a write. Unit: bytes.
const WRITE: u64 = 128 * KIB;
/// Writes per sync: 16 MiB.
const SYNC_EVERY: u64 = 128;

/// A file to read, one to write, and fio's memory.
pub(super) struct Fio {
    file: PathBuf,
    written: PathBuf,
    span: u64,
    size: u64,
    depth: usize,
    arena: Arc<Arena>,
}

impl Fio {
    /// Writes both files once: what lies there is overwritten, as a store does with its segments.
    pub(super) fn make(home: &Path, size: u64, depth: usize, span: u64) -> Result<Self, Problem> {
        let arena = noisy_arena("bench-fio", (size * depth as u64).max(16 * MIB) + MIB)?;
        let mut disk = open_lane(home, LaneKind::Auto, 8, std::slice::from_ref(&arena))?.disk;
        for name in ["span", "written"] {
            let file = disk.create(name, span)?;
            let bar = indicatif::ProgressBar::hidden();
            LaneRun::new(&mut *disk, file, &arena, MIB, span, 8).fill(&bar)?;
        }
        Ok(Self {
            file: home.join("span"),
            written: home.join("written"),
            span,
            size,
            depth,
            arena,
        })
    }

    /// Random reads for this long, beside writes of `writes` MiB a second if any.
    pub(super) fn read(&self, span: Duration, writes: Option<f64>) -> Result<Seen, Problem> {
        let output = Command::new("fio")
            .args(self.arguments(span, writes))
            .output()?;
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
        seen(&result).ok_or_else(|| "fio's result lacks the fields of version 3".into())
    }

    fn arguments(&self, span: Duration, writes: Option<f64>) -> Vec<String> {
        let fd = self.arena.fd().as_fd().as_raw_fd();
        let memory = format!("/proc/{}/fd/{fd}", std::process::id());
        let common = [
            "--ioengine=io_uring".to_owned(),
            "--direct=1".to_owned(),
            "--time_based".to_owned(),
            "--scramble_buffers=0".to_owned(),
            "--allow_file_create=0".to_owned(),
            format!("--size={}", self.span),
            format!("--runtime={}ms", span.as_millis()),
            format!("--iomem=mmapshared:{memory}"),
        ];
        let mut arguments = vec!["--output-format=json".to_owned(), "--name=read".to_owned()];
        arguments.extend(common.clone());
        arguments.extend(
            [
                "--rw=randread",
                "--norandommap",
                "--fixedbufs",
                "--registerfiles",
            ]
            .map(str::to_owned),
        );
        arguments.extend([
            format!("--filename={}", self.file.display()),
            format!("--bs={}", self.size),
            format!("--iodepth={}", self.depth),
        ]);
        if let Some(mib_s) = writes {
            arguments.push("--name=write".to_owned());
            arguments.extend(common);
            arguments.extend([
                "--rw=write".to_owned(),
                format!("--filename={}", self.written.display()),
                format!("--bs={WRITE}"),
                "--iodepth=4".to_owned(),
                format!("--fdatasync={SYNC_EVERY}"),
                format!("--rate={}k", (mib_s * 1024.0).round().max(1.0)),
            ]);
        }
        arguments
    }
}

fn seen(result: &Value) -> Option<Seen> {
    let jobs = result.get("jobs")?.as_array()?;
    let read = jobs.first()?.get("read")?;
    let us = |percentile: &str| {
        let ns = read.get("clat_ns")?.get("percentile")?.get(percentile)?;
        Some(ns.as_f64()? / 1000.0)
    };
    let mib_s = |side: &Value| {
        let seconds = side.get("runtime")?.as_f64()? / 1000.0;
        Some(side.get("io_bytes")?.as_f64()? / MIB as f64 / seconds)
    };
    Some(Seen {
        us_p50: us("50.000000")?,
        us_p99: us("99.000000")?,
        read_mib_s: mib_s(read)?,
        other_mib_s: match jobs.get(1) {
            Some(job) => mib_s(job.get("write")?)?,
            None => 0.0,
        },
        copied_mib_s: 0.0,
        cpu: 0.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seen_reads_what_fio_3_writes() {
        let text = r#"{"jobs": [
            {"read": {"io_bytes": 2097152, "runtime": 500, "clat_ns":
                {"percentile": {"50.000000": 100000, "99.000000": 900000}}}},
            {"write": {"io_bytes": 1048576, "runtime": 1000}}]}"#;
        let got = seen(&serde_json::from_str(text).unwrap()).unwrap();
        assert_eq!((got.us_p50, got.us_p99), (100.0, 900.0));
        assert_eq!((got.read_mib_s, got.other_mib_s), (4.0, 1.0));
        assert!(seen(&Value::Null).is_none());
    }
}
