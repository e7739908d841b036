//! The memory limit: plain copies of block size between arenas.
//!
//! Upstairs:   `limits`.
//! Downstairs: `memcpy`, as `copy_from_slice` calls it.
//!
//! Not here on purpose: no non-temporal copies; page movers are measured in their own suite,
//! beside these rows.

use std::sync::{Arc, Barrier};
use std::time::Instant;

use kvtier_benches::report::Report;
use kvtier_proto::units::MIB;
use kvtier_store::mem::{Arena, IoBuf, Share};

use super::{Effort, SIZES_MIB};

/// Memory on each side of a copy, per thread: far more than caches hold. Unit: bytes.
const SIDE_BYTES: u64 = 256 * MIB;

pub(super) fn run(report: &mut Report, effort: Effort) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut counts = vec![1, cores.min(4)];
    counts.dedup();
    for threads in counts {
        let Some(sides) = (0..threads).map(|_| side()).collect::<Option<Vec<_>>>() else {
            report.note("no memory for the copy rows");
            return;
        };
        let mut sides: Vec<_> = sides
            .into_iter()
            .map(|(_arena, from, to)| (from, to))
            .collect();
        for mib in SIZES_MIB {
            let speeds: Vec<_> = (0..effort.rounds)
                .map(|_| gib_s(&mut sides, mib * MIB, effort.seconds))
                .collect();
            report.row(
                format!("limit.copy.{mib}MiB.threads{threads}.gib_s"),
                "GiB/s",
                &speeds,
            );
        }
    }
}

/// Two populated stretches of memory.
fn side() -> Option<(Arc<Arena>, IoBuf, IoBuf)> {
    let len = usize::try_from(SIDE_BYTES).ok()?;
    let arena = Arena::create("bench-copy", 2 * len, Share::Private).ok()?;
    arena.populate(&mut |_, _| ()).ok()?;
    let (from, to) = (arena.alloc(len)?, arena.alloc(len)?);
    Some((arena, from, to))
}

/// Copies block by block on one thread per side; all start together.
fn gib_s(sides: &mut [(IoBuf, IoBuf)], size: u64, seconds: f64) -> f64 {
    let size = usize::try_from(size).unwrap_or(1 << 20);
    let barrier = Barrier::new(sides.len());
    let barrier = &barrier;
    let speeds: Vec<f64> = std::thread::scope(|scope| {
        let threads: Vec<_> = sides
            .iter_mut()
            .map(|(from, to)| {
                scope.spawn(move || {
                    barrier.wait();
                    let (start, mut bytes) = (Instant::now(), 0_usize);
                    while start.elapsed().as_secs_f64() < seconds / 4.0 {
                        for (to, from) in to.chunks_exact_mut(size).zip(from.chunks_exact(size)) {
                            to.copy_from_slice(std::hint::black_box(from));
                        }
                        std::hint::black_box(&mut **to);
                        bytes += from.len();
                    }
                    bytes as f64 / f64::from(1 << 30) / start.elapsed().as_secs_f64()
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or(0.0))
            .collect()
    });
    speeds.iter().sum()
}
