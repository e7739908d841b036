//! Runs without data faults: everything that is promised is found.

use super::*;

fn disk(seed: u64) -> SimDisk {
    SimDisk::new(device(seed))
}

/// One run, read back.
pub(super) fn run(seed: u64, counts: &mut Counts) -> u64 {
    let mut run = Run::new(seed, disk(seed)).unwrap();
    run.act(600);
    run.rest();
    let hits = run.model.hits;
    run.read_all();
    // The hit floor: the store hits whatever the model says must be there.
    assert!(run.model.hits - hits >= run.model.durable.len() as u64);
    assert!(run.model.hits > 0);
    assert_eq!(run.model.damage, 0, "seed {seed}");
    counts.add(&run);
    run.model.evictions
}

#[test]
fn without_faults_every_promised_block_hits_and_none_is_damaged() {
    let mut counts = Counts::default();
    let evictions: u64 = (0..20).map(|seed| run(seed, &mut counts)).sum();
    assert!(evictions > 100, "the runs never filled the disk");
    assert!(counts.reordered > 0, "operations never overtook each other");
}

#[test]
fn what_fits_without_eviction_hits_completely() {
    let mut run = Run::new(5, disk(5)).unwrap();
    for number in 0..60 {
        let tag = run.tag();
        let image = image(&run.arena, NS, number, 0);
        let promise = run.model.took((NS, number), 0);
        run.puts.insert(tag, promise);
        run.store.put(tag, image).unwrap();
    }
    run.rest();
    assert_eq!((run.model.acked, run.model.evictions), (60, 0));
    run.read_all();
    assert_eq!(run.model.hits, 60, "hit ratio must equal the model's");
}

// P7, for restarts at rest.
#[test]
fn the_rebuilt_index_is_the_live_one_and_else_only_what_was_evicted() {
    for seed in 0..20 {
        let mut run = Run::new(seed, disk(seed)).unwrap();
        run.act(500);
        run.rest();
        let live = run.index();
        let recycled = run.store.counters().get(Counter::Recycled);
        let run = run.reopen(|disk| disk.crash(seed)).unwrap();
        let rebuilt = run.index();
        for (name, place) in &live {
            assert_eq!(rebuilt.get(name), Some(place), "P7, seed {seed} {name:?}");
        }
        assert!(
            recycled > 0 || rebuilt.len() == live.len(),
            "P7, seed {seed}"
        );
    }
}

#[test]
fn clean_closes_and_restarts_lose_nothing_that_was_promised() {
    for seed in 0..10 {
        let mut run = Run::new(seed, disk(seed)).unwrap();
        for life in 0..4 {
            run.act(150);
            run = run.close(seed + life);
            assert_eq!(
                run.report.scanned, 0,
                "an end in order leaves nothing to scan"
            );
            run.read_all();
        }
        assert_eq!(run.model.damage, 0);
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let fingerprint = |seed| {
        let mut run = Run::new(seed, disk(seed)).unwrap();
        run.act(400);
        run.rest();
        (
            run.random.draw(),
            run.store.disk().taken(),
            run.model.hits,
            run.index(),
        )
    };
    assert_eq!(fingerprint(11), fingerprint(11));
    assert_ne!(fingerprint(11).0, fingerprint(12).0);
}
