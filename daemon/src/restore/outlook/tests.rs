//! Tests of the outlook: when an engine is let in, and what it is told.

use kvtier_store::DeviceState;

use super::*;
use crate::restore::plan::found;

const BLOCKS: usize = 20;
/// 1 MiB each.
const ASKED: Asked = Asked {
    block_tokens: 256,
    block_bytes: 1 << 20,
    first_token: 0,
    suffix_tokens: 1,
};

fn found() -> Vec<Result<Located, Miss>> {
    let on_disk = Located::Disk(Device::FIRST, DeviceState::Healthy, Level::RAW);
    vec![Ok(on_disk); BLOCKS]
}

/// Blocks take this long to load and to compute.
fn knowing(load: Duration, compute: Duration) -> (Rates, Option<Prefill>) {
    let rates = Rates::default();
    rates.saw((Device::FIRST, Level::RAW), 1, 1 << 20, load);
    let prefill = Prefill {
        per_token_s: compute.as_secs_f64() / 256.0,
        ..Prefill::default()
    };
    (rates, Some(prefill))
}

const MS: fn(u64) -> Duration = Duration::from_millis;

#[test]
fn outlook_lets_the_engine_in_where_both_ends_together_are_faster() {
    let (rates, prefill) = knowing(MS(10), MS(10));
    let outlook = outlook(&found(), &ASKED, prefill, &rates);
    assert!(outlook.open, "{outlook:?}");
    assert!((9..=11).contains(&outlook.compute_blocks), "{outlook:?}");
    assert_eq!(outlook.compute_blocks + outlook.load_blocks, BLOCKS);
    let near = |time: Option<Duration>, ms: u64| {
        let time = time.unwrap();
        assert!(
            time >= MS(ms * 9 / 10) && time <= MS(ms * 11 / 10),
            "{time:?} where {ms}"
        );
    };
    near(outlook.planned, 100);
    near(outlook.load, 200);
    near(outlook.compute, 200);
}

#[test]
fn outlook_keeps_the_engine_out_where_loading_alone_is_as_fast() {
    let (rates, prefill) = knowing(MS(10), MS(1000));
    let outlook = outlook(&found(), &ASKED, prefill, &rates);
    assert!(!outlook.open && outlook.compute_blocks == 0, "{outlook:?}");
    assert_eq!(outlook.load_blocks, BLOCKS);
    let (rates, prefill) = knowing(Duration::from_micros(50), MS(1));
    let quick = super::outlook(&found(), &ASKED, prefill, &rates);
    assert!(!quick.open, "hardly a millisecond to save: {quick:?}");
}

// Goal: an engine that must compute something is not kept from it.
#[test]
fn outlook_lets_the_engine_in_where_blocks_are_missing() {
    let (rates, prefill) = knowing(MS(10), MS(1000));
    let mut found = found();
    found[3] = Err(Miss::Absent);
    let outlook = outlook(&found, &ASKED, prefill, &rates);
    assert!(outlook.open, "{outlook:?}");
}

#[test]
fn outlook_guesses_nothing_that_is_not_known() {
    let (rates, prefill) = knowing(MS(10), MS(10));
    let told = outlook(&found(), &ASKED, None, &rates);
    assert!(told.open && told.planned.is_none() && told.reason.contains("prefill"));
    let told = outlook(&found(), &ASKED, prefill, &Rates::default());
    assert!(told.open && told.planned.is_none() && told.reason.contains("device"));
    let resident = vec![Ok(Located::Host); BLOCKS];
    for prefill in [prefill, None] {
        let told = outlook(&resident, &ASKED, prefill, &Rates::default());
        assert!(!told.open && told.load_blocks == 0, "{told:?}");
    }
}

// Goal: what was learned of each device and level is what a restore expects of it: a device is late
// after four of its blocks.
#[test]
fn course_expects_of_each_device_what_was_learned_of_it() {
    let (rates, prefill) = knowing(MS(10), MS(1));
    rates.saw((Device::FIRST, Level::LOSSLESS), 1, 1 << 20, MS(30));
    let mut found = found();
    let coded = Located::Disk(Device::FIRST, DeviceState::Healthy, Level::LOSSLESS);
    found[..BLOCKS / 2].fill(Ok(coded));
    found[7] = Err(Miss::Absent);
    found[8] = Ok(Located::Host);
    let todo = found::plan(&found, true);
    let mut course = course(&found, &todo, &ASKED, prefill, &rates, true);
    let wanted = 0..BLOCKS;
    assert_eq!(
        course.next(MS(0), &wanted, |_| true),
        Some(6),
        "before the gap"
    );
    // Eight of 30 ms and ten of 10.
    let late = course.late_at().unwrap().as_secs_f64();
    assert!((late - 4.0 * 340e-3 / 18.0).abs() < 1e-3, "{late}");
}

// Goal: a prompt of which the engine has the front costs what its later tokens cost.
#[test]
fn after_counts_from_the_first_token_on() {
    let prefill = Prefill {
        fixed_s: 1e-3,
        per_context_s: 1e-7,
        per_token_s: 1e-5,
        attention_s: 1e-9,
    };
    let shifted = after(prefill, 10_000);
    let (want, got) = (
        prefill.step_s(12_000.0, 256.0),
        shifted.step_s(2_000.0, 256.0),
    );
    assert!((want - got).abs() < 1e-9, "{got} where {want}");
}
