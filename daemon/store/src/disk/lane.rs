//! Chooses a lane for a directory, and says why.
//!
//! Upstairs:   `kvtierd::tier` and `kvtier-bench`.
//! Downstairs: `disk::ring`, `disk::file`.
//!
//! Not here on purpose: no quiet fallback. What was not used, and what would change that, is in
//! the report for log, status and metrics.

use std::fmt;
use std::io::{Error, ErrorKind};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use super::Disk;
use super::file::FileLane;
use super::ring::{self, RingLane};
use crate::mem::Arena;

/// Most operations in flight on one lane. More than any device queue, and small enough that the
/// bookkeeping of a lane stays in cache.
pub const DEPTH_MAX: usize = 4096;

/// Which lane is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LaneKind {
    /// io_uring where the kernel allows it, else `pread`.
    #[default]
    Auto,
    /// io_uring or an error.
    IoUring,
    /// `pread` and `pwrite`.
    Pread,
}

/// An open lane and how it came about.
#[derive(Debug)]
pub struct Lane {
    /// The lane.
    pub disk: Box<dyn Disk + Send>,
    /// What it uses and what it does without.
    pub report: LaneReport,
}

/// What a lane uses, for log and status.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct LaneReport {
    /// `io_uring` or `pread`.
    pub lane: &'static str,
    /// Whether the page cache is bypassed (`O_DIRECT`).
    pub direct: bool,
    /// Alignment of operations. Unit: bytes.
    pub align: usize,
    /// What was wanted and is not used, each with the reason and what would change it.
    pub without: Vec<String>,
}

/// Opens the existing directory `path` with room for `depth` operations (1 ..= [`DEPTH_MAX`]).
/// Buffers of `arenas` move without per-operation page pinning where the lane can register them.
pub fn open_lane(
    path: &Path,
    kind: LaneKind,
    depth: usize,
    arenas: &[Arc<Arena>],
) -> std::io::Result<Lane> {
    let lane = choose(path, kind, depth, arenas)?;
    #[cfg(debug_assertions)]
    let lane = super::fault::around(path, lane)?;
    Ok(lane)
}

fn choose(
    path: &Path,
    kind: LaneKind,
    depth: usize,
    arenas: &[Arc<Arena>],
) -> std::io::Result<Lane> {
    let mut without = Vec::new();
    if kind != LaneKind::Pread {
        let ring = ring::probe()
            .map_err(Error::other)
            .and_then(|()| RingLane::open(path, depth));
        match ring {
            Ok(mut lane) => {
                for arena in arenas {
                    lane.attach(arena);
                }
                let report = lane.report();
                return Ok(Lane {
                    disk: Box::new(lane),
                    report,
                });
            }
            Err(why) if kind == LaneKind::IoUring => return Err(why),
            // A wrong path or depth is refused below for the same reason.
            Err(why) => {
                tracing::warn!(%why, "io_uring is not usable; using pread and pwrite");
                without.push(why.to_string());
            }
        }
    }
    let lane = FileLane::open(path, depth)?;
    if !lane.direct() {
        without.push(buffered(path));
    }
    let report = LaneReport {
        lane: lane.lane(),
        direct: lane.direct(),
        align: lane.align(),
        without,
    };
    Ok(Lane {
        disk: Box::new(lane),
        report,
    })
}

/// The line about a filesystem without direct I/O.
pub(super) fn buffered(path: &Path) -> String {
    let path = path.display();
    format!("the filesystem of {path} takes no O_DIRECT: I/O goes through the page cache")
}

/// A depth inside the bounds, or an error that names them.
pub(super) fn check_depth(depth: usize) -> std::io::Result<usize> {
    if (1..=DEPTH_MAX).contains(&depth) {
        return Ok(depth);
    }
    let text = format!("queue depth {depth} is not in 1 ..= {DEPTH_MAX}");
    Err(Error::new(ErrorKind::InvalidInput, text))
}

/// A text that names no lane.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a lane; write auto, io_uring or pread")]
pub struct BadLane(String);

impl FromStr for LaneKind {
    type Err = BadLane;

    fn from_str(text: &str) -> Result<Self, BadLane> {
        match text {
            "auto" => Ok(Self::Auto),
            "io_uring" => Ok(Self::IoUring),
            "pread" => Ok(Self::Pread),
            _ => Err(BadLane(text.to_owned())),
        }
    }
}

impl fmt::Display for LaneKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::IoUring => "io_uring",
            Self::Pread => "pread",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lane_kind_round_trips_and_refuses_other_words() {
        for kind in [LaneKind::Auto, LaneKind::IoUring, LaneKind::Pread] {
            assert_eq!(kind.to_string().parse(), Ok(kind));
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.to_string());
        }
        assert!(
            "uring"
                .parse::<LaneKind>()
                .unwrap_err()
                .to_string()
                .contains("io_uring")
        );
    }

    #[test]
    fn open_lane_refuses_a_depth_outside_its_bounds() {
        let home = tempfile::tempdir().unwrap();
        for depth in [0, DEPTH_MAX + 1] {
            let error = open_lane(home.path(), LaneKind::Pread, depth, &[]).unwrap_err();
            assert!(error.to_string().contains("1 ..= 4096"), "{error}");
        }
    }

    #[test]
    fn open_lane_says_what_it_opened() {
        let home = tempfile::tempdir().unwrap();
        let lane = open_lane(home.path(), LaneKind::Pread, 4, &[]).unwrap();
        assert_eq!((lane.report.lane, lane.disk.lane()), ("pread", "pread"));
        assert_eq!(lane.report.align, lane.disk.align());
        assert_eq!(lane.report.without.is_empty(), lane.report.direct);
    }
}
