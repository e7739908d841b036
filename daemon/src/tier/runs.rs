//! The parts of one block, coded by several workers at once.
//!
//! Upstairs:   `codec`, for levels whose parts need no others.
//! Downstairs: `kvtier_kernels`; threads that live as long as one block.
//!
//! Each worker has a run of neighbouring parts of about the same size. Encoding, each run goes to
//! the place where it would lie if all parts before it were as large as can be, and is moved up
//! afterwards; decoding, each run has its own part of the target. So nothing is copied twice where
//! one worker does it all, and the bytes do not depend on how many there were.
//!
//! Not here on purpose: no word on how many workers there may be. The caller has their permits.

use std::ops::Range;
use std::time::{Duration, Instant};

use kvtier_kernels::{Codec, PartShape};
use kvtier_proto::{BlockLayout, Miss};
use kvtier_store::Record;

/// Raw bytes that are worth a worker of their own: a thread costs what a few KiB of them do.
pub(super) const BYTES_A_WORKER: usize = 1 << 20;

/// Runs of parts, at most `workers` and at least one, of about the same number of raw bytes.
fn runs(lens: &[usize], workers: usize) -> Vec<Range<usize>> {
    let all: usize = lens.iter().sum();
    let workers = workers.clamp(1, lens.len().max(1));
    let mut runs = Vec::with_capacity(workers);
    let (mut from, mut done) = (0, 0);
    for (at, len) in lens.iter().enumerate() {
        done += len;
        // The share of all that this run and those before it have.
        let due = all * (runs.len() + 1) / workers;
        if done >= due && runs.len() + 1 < workers {
            runs.push(from..at + 1);
            from = at + 1;
        }
    }
    if from < lens.len() || runs.is_empty() {
        runs.push(from..lens.len());
    }
    runs
}

/// Runs `work` on each job, the last one on this thread. The results in order; a worker that broke
/// breaks this one.
fn on_each<J: Send, T: Send>(mut jobs: Vec<J>, work: impl Fn(J) -> T + Sync) -> Vec<T> {
    let Some(own) = jobs.pop() else {
        return Vec::new();
    };
    let work = &work;
    std::thread::scope(|scope| {
        let others: Vec<_> = jobs
            .into_iter()
            .map(|job| scope.spawn(move || work(job)))
            .collect();
        let own = work(own);
        let join = |one: std::thread::ScopedJoinHandle<'_, T>| match one.join() {
            Ok(done) => done,
            Err(broken) => std::panic::resume_unwind(broken),
        };
        let mut done: Vec<T> = others.into_iter().map(join).collect();
        done.push(own);
        done
    })
}

/// Encodes all parts, one behind the other, to the front of `room`. Returns their stored sizes and
/// how long the workers ran.
///
/// # Errors
/// What a part was not encoded for.
pub(super) fn encode(
    codec: &dyn Codec,
    layout: &BlockLayout,
    shapes: &[PartShape],
    payload: &[u8],
    room: &mut [u8],
    workers: usize,
) -> Result<(Vec<usize>, Duration), String> {
    let lens: Vec<usize> = layout.parts().iter().map(|part| part.len).collect();
    let (mut jobs, mut starts, mut start, mut rest) = (Vec::new(), Vec::new(), 0, &mut *room);
    for run in runs(&lens, workers) {
        let most = shapes.get(run.clone()).unwrap_or_default();
        let most: usize = most.iter().map(|shape| codec.stored_bytes_max(shape)).sum();
        let (own, after) = rest
            .split_at_mut_checked(most)
            .ok_or("the room for a block is too small")?;
        jobs.push((run, own));
        starts.push(start);
        (rest, start) = (after, start + most);
    }
    let work = |(run, out): (Range<usize>, &mut [u8])| {
        let (begin, mut end, mut sizes) = (Instant::now(), 0, Vec::with_capacity(run.len()));
        let parts = layout.parts().get(run.clone()).unwrap_or_default();
        for (part, shape) in parts.iter().zip(shapes.get(run).unwrap_or_default()) {
            let raw = payload.get(part.offset..part.offset + part.len);
            let out = out.get_mut(end..).unwrap_or_default();
            let size = codec.encode(shape, raw.unwrap_or_default(), out);
            let size = size.map_err(|problem| problem.to_string())?;
            end += size;
            sizes.push(size);
        }
        Ok::<_, String>((sizes, begin.elapsed()))
    };
    let (mut sizes, mut time, mut end) = (Vec::with_capacity(lens.len()), Duration::ZERO, 0);
    for (start, done) in starts.into_iter().zip(on_each(jobs, work)) {
        let (own, ran) = done?;
        let len: usize = own.iter().sum();
        if start != end {
            room.copy_within(start..start + len, end);
        }
        (end, time) = (end + len, time + ran);
        sizes.extend(own);
    }
    Ok((sizes, time))
}

/// Decodes all parts of a record to their places in `out`. Returns how long the workers ran.
///
/// # Errors
/// Why the block is a miss.
pub(super) fn decode(
    codec: &dyn Codec,
    record: &Record,
    layout: &BlockLayout,
    shapes: &[PartShape],
    out: &mut [u8],
    workers: usize,
) -> Result<Duration, Miss> {
    let lens: Vec<usize> = layout.parts().iter().map(|part| part.len).collect();
    let (mut jobs, mut rest, mut at) = (Vec::new(), out, 0);
    for run in runs(&lens, workers) {
        let parts = layout.parts().get(run.clone()).unwrap_or_default();
        let end = parts.last().map_or(at, |part| part.offset + part.len);
        let len = end.checked_sub(at).ok_or(Miss::WrongLayout)?;
        let (own, after) = rest.split_at_mut_checked(len).ok_or(Miss::WrongLayout)?;
        jobs.push((run, at, own));
        (rest, at) = (after, end);
    }
    let work = |(run, from, out): (Range<usize>, usize, &mut [u8])| {
        let begin = Instant::now();
        for index in run {
            let part = layout.parts().get(index).ok_or(Miss::WrongLayout)?;
            let shape = shapes.get(index).ok_or(Miss::WrongLayout)?;
            let (_, stored) = record.part(index).ok_or(Miss::Undecodable)?;
            let at = part.offset.checked_sub(from).ok_or(Miss::WrongLayout)?;
            let raw = out.get_mut(at..at + part.len).ok_or(Miss::WrongLayout)?;
            let decoded = codec.decode(shape, stored, raw);
            decoded.map_err(|_| Miss::Undecodable)?;
        }
        Ok::<_, Miss>(begin.elapsed())
    };
    on_each(jobs, work).into_iter().sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_have_every_part_once_in_order_and_are_alike(
            lens in proptest::collection::vec(1usize..1000, 1..70), workers in 0usize..20,
        ) {
            let runs = runs(&lens, workers);
            prop_assert!(!runs.is_empty() && runs.len() <= workers.max(1));
            let all: Vec<usize> = runs.iter().cloned().flatten().collect();
            prop_assert_eq!(all, (0..lens.len()).collect::<Vec<_>>());
            let (sum, most) = (lens.iter().sum::<usize>(), lens.iter().max().unwrap());
            for run in &runs {
                let own: usize = lens[run.clone()].iter().sum();
                prop_assert!(own > 0 && own <= sum / runs.len() + 2 * most + 2);
            }
        }
    }
}
