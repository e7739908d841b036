//! Tests of the stopwatch and of chosen times.
//!
//! Upstairs:   nobody.
//! Downstairs: `cost`.

use super::*;

const MS: Duration = Duration::from_millis(1);

#[test]
fn a_step_costs_its_tokens_and_all_that_stand_before_them() {
    let slow = SlowEngine {
        step: 3 * MS,
        token: MS,
        attend: 4 * MS,
        rebuild: 2 * MS,
    };
    assert_eq!(slow.prefill(0, 0), 3 * MS);
    // 64 tokens, each before on average 32 of its own step: 2048 pairs.
    assert_eq!(slow.prefill(0, 64), (3 + 64 + 8) * MS);
    assert_eq!(slow.prefill(1024, 64), (3 + 64 + 8 + 256) * MS);
    assert_eq!(slow.projection(64), 128 * MS);
    assert_eq!(SlowEngine::default().prefill(1 << 20, 2048), Duration::ZERO);
}

// Goal: layers take the time that was chosen, together and not each a little more, and a run that
// takes longer by itself is not made slower still.
#[test]
fn a_stopwatch_stretches_a_run_to_the_chosen_time_and_no_further() {
    let mut watch = Stopwatch::new(Some(40 * MS), 20);
    let begin = Instant::now();
    (0..20).for_each(|_| watch.layer(|| ()));
    assert!(begin.elapsed() >= 40 * MS, "{:?}", begin.elapsed());
    assert!(watch.took() >= 40 * MS && watch.took() <= begin.elapsed());

    let mut watch = Stopwatch::new(Some(2 * MS), 2);
    watch.layer(|| std::thread::sleep(5 * MS));
    let before = watch.took();
    let inner = watch.layer(Instant::now);
    assert!(watch.took() - before <= inner.elapsed() + MS);
    assert!(Stopwatch::new(None, 3).took().is_zero());
}
