//! What nobody is faster than who knows the future, and what those do who decide nothing.
//!
//! Upstairs:   the suite.
//! Downstairs: `world` has the scene, `trace` its rates.
//!
//! The clairvoyant splits blocks as he likes and computes any of them without those before, but for
//! what lies in host memory in front: he too has to have that first. By a time, each device can
//! have brought so many bytes and the GPU can have done so many seconds. Blocks that take longest
//! to compute are best loaded, as far as their devices and the link reach: the sets of blocks that
//! can be brought are a polymatroid, so that taking them in this order is exact. The time at which
//! the GPU can do the rest is found by bisection.

use std::ops::Range;

use super::world::{Place, Scene};

/// Bisection ends within this part of the time.
const EXACT: f64 = 1e-9;

/// First token of the clairvoyant. Unit: seconds.
pub(super) fn clairvoyant_s(scene: &Scene) -> f64 {
    let places = scene.places.iter();
    let front = places.take_while(|place| **place == Place::Memory).count();
    let front_s = earliest_s(|by_s| is_enough(scene, 0..front, 0.0, by_s));
    let all = 0..scene.places.len();
    let all_s = earliest_s(|by_s| is_enough(scene, all.clone(), 0.0, by_s));
    let rest_s = earliest_s(|by_s| is_enough(scene, front..all.end, front_s, by_s));
    scene.gpu.after(all_s.max(rest_s), scene.suffix_s())
}

/// The earliest time at which something holds that holds ever after. Unit: seconds.
fn earliest_s(holds: impl Fn(f64) -> bool) -> f64 {
    let (mut low, mut high) = (0.0, 1e-3);
    while !holds(high) {
        (low, high) = (high, high * 2.0);
    }
    while high - low > EXACT * high {
        let middle = f64::midpoint(low, high);
        match holds(middle) {
            true => high = middle,
            false => low = middle,
        }
    }
    low
}

/// Whether these blocks can be there by a time, when the GPU works on them from `from_s` on.
fn is_enough(scene: &Scene, blocks: Range<usize>, from_s: f64, by_s: f64) -> bool {
    let moves = |line: &super::world::Line| {
        let from = line.trace.done_by(line.latency_s);
        (line.trace.done_by(by_s) - from).max(0.0) / scene.block_bytes
    };
    let mut devices: Vec<f64> = scene.devices.iter().map(moves).collect();
    let mut link = scene.link.done_by(by_s) / scene.block_bytes;
    let mut rest_s = 0.0;
    // Later blocks take longer to compute.
    for index in blocks.rev() {
        let place = scene.places.get(index).unwrap_or(&Place::Missing);
        let mut unlimited = f64::INFINITY;
        let mut nothing = 0.0;
        let source = match place {
            Place::Memory => &mut unlimited,
            Place::Missing => &mut nothing,
            Place::Device(at) => devices.get_mut(*at).unwrap_or(&mut nothing),
        };
        let part = source.min(link).clamp(0.0, 1.0);
        *source -= part;
        link -= part;
        rest_s += (1.0 - part) * scene.compute_s(index);
    }
    rest_s <= scene.gpu.done_by(by_s) - scene.gpu.done_by(from_s)
}

/// Everything that is stored is loaded, every device and the link busy all the time; what is
/// missing is computed after that. Unit: seconds.
pub(super) fn load_s(scene: &Scene) -> f64 {
    let bytes = |wanted: &dyn Fn(&Place) -> bool| {
        let blocks = scene.places.iter().filter(|place| wanted(place)).count();
        blocks as f64 * scene.block_bytes
    };
    let devices = scene.devices.iter().enumerate().map(|(at, line)| {
        let wanted = bytes(&|place: &Place| *place == Place::Device(at));
        line.trace.after(line.latency_s, wanted)
    });
    let link = bytes(&|place: &Place| *place != Place::Missing);
    let there_s = devices.fold(scene.link.after(0.0, link), f64::max);
    let places = scene.places.iter().enumerate();
    let missing = places.filter(|(_, place)| **place == Place::Missing);
    let missing_s: f64 = missing.map(|(index, _)| scene.compute_s(index)).sum();
    scene.gpu.after(there_s, missing_s + scene.suffix_s())
}

/// Everything is computed, block by block. Unit: seconds.
pub(super) fn compute_s(scene: &Scene) -> f64 {
    let blocks = 0..scene.places.len();
    let all_s: f64 = blocks.map(|index| scene.compute_s(index)).sum();
    scene.gpu.after(0.0, all_s + scene.suffix_s())
}
