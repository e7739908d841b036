//! Tests of wipes of both tiers: what a device that hangs keeps, and what it does not.

use super::*;
use crate::tier::disk::faulty::{Mood, Switch, switch};
use kvtier_proto::Quality;

const STUCK: Mood = Mood {
    stuck: true,
    ..Mood::GOOD
};
const WAIT: Duration = Duration::from_millis(200);
/// For what comes in a moment, or never.
const LONG: Duration = Duration::from_secs(60);

/// Two devices; the second does what the switch says, and callers of a wipe wait for `WAIT`.
async fn two(home: &Path, hosts: &[&Arc<HostTier>]) -> (Fixture, Arc<Switch>) {
    let dirs = ["a", "b"].map(|name| home.join(name));
    for dir in &dirs {
        std::fs::create_dir(dir).unwrap();
    }
    let switch = switch(&dirs[1]);
    let mut fixture = Fixture::over(&dirs, Level::RAW, hosts).await;
    Arc::get_mut(&mut fixture.tiers).unwrap().wipe_wait = WAIT;
    (fixture, switch)
}

impl Fixture {
    /// The thread of the second device waits for it from now on.
    async fn stop(&self, switch: &Switch) {
        switch.set(STUCK);
        let disk = self.tiers.disk().unwrap();
        let nowhere = vec![id(3, 1)];
        switch
            .until_stuck(async || disk.find(nowhere.clone()).await)
            .await;
    }

    /// Those of the blocks that the first device has.
    async fn on_first(&self, ids: Vec<BlockId>) -> Vec<BlockId> {
        let found = self.tiers.disk().unwrap().find(ids.clone()).await;
        let first = |found: Option<OnDisk>| found.unwrap().device == Device::FIRST;
        let kept = ids.into_iter().zip(found);
        kept.filter_map(|(id, found)| first(found).then_some(id))
            .collect()
    }
}

fn is_late(failed: &Result<Wiped, WipeFailed>) -> bool {
    matches!(failed, Err(WipeFailed::NotDurable(why)) if why.contains("does not answer"))
}

/// Waits for the end of the wipe that is under way.
async fn end_of_wipe(host: &HostTier) {
    let turn = timeout(LONG, host.lines.wipes.acquire()).await;
    drop(turn.expect("it ends").unwrap());
}

// Goal: P3 on every device that answers, at once, and P2 for what they take afterwards, whichever
// namespaces' wipes wait for the one that hangs.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_hangs_keeps_no_namespaces_wipe_from_the_others() {
    let home = tempfile::tempdir().unwrap();
    let (red, blue) = (host(1, 8), host(2, 8));
    let (fixture, switch) = two(home.path(), &[&red, &blue]).await;
    for number in 0..8 {
        fixture.save_durable(&red, id(1, number)).await;
        fixture.save_durable(&blue, id(2, number)).await;
    }
    let healthy = fixture.on_first((0..8).map(|at| id(2, at)).collect()).await;
    assert!((1..8).contains(&healthy.len()), "{healthy:?}");
    fixture.stop(&switch).await;
    for host in [&red, &blue] {
        let wiped = fixture.tiers.wipe(host).await;
        assert!(is_late(&wiped), "{wiped:?}");
    }
    let ends = [&red, &blue].map(|host| host.lines.wipes.available_permits());
    assert_eq!(ends, [0, 0], "both wait for the device");
    for id in &healthy {
        let miss = fixture.fetch(&host(2, 8), *id).await.unwrap_err();
        assert_eq!(miss, Miss::Absent, "wiped");
    }
    fixture.save_durable(&blue, healthy[0]).await;
    switch.set(Mood::GOOD);
    end_of_wipe(&red).await;
    end_of_wipe(&blue).await;
    let kept = fixture.fetch(&host(2, 8), healthy[0]).await;
    kept.expect("acknowledged after the wipe");
    assert_eq!(fixture.tiers.wipe(&blue).await.unwrap().blocks, 1);
    fixture.tiers.disk().unwrap().close().await;
}

// Goal: a caller is not told that something was wiped, or is to be wiped again, when its call did
// nothing: what was saved since the wipe under way is still served.
#[tokio::test(flavor = "multi_thread")]
async fn a_wipe_that_only_waited_for_another_says_so_and_takes_nothing() {
    let home = tempfile::tempdir().unwrap();
    let host = host(1, 8);
    let (fixture, switch) = two(home.path(), &[&host]).await;
    fixture.stop(&switch).await;
    let wiped = fixture.tiers.wipe(&host).await;
    assert!(is_late(&wiped), "{wiped:?}");
    drop(fixture.save(&host, id(1, 1), 0).await);
    let waited = fixture.tiers.wipe(&host).await;
    assert_eq!(waited, Err(WipeFailed::Waited));
    assert_eq!(host.len(), 1, "nothing was wiped");
    switch.set(Mood::GOOD);
    end_of_wipe(&host).await;
    assert!(fixture.tiers.durable(&host, id(1, 1), Quality::Exact).await);
    assert_eq!(fixture.tiers.wipe(&host).await.unwrap().blocks, 1);
    fixture.tiers.disk().unwrap().close().await;
}

// Goal: P3 when whoever asked for a wipe goes away in the middle of it: it is made durable all the
// same, and never at the same time as the next one.
#[tokio::test(flavor = "multi_thread")]
async fn a_wipe_goes_on_when_its_caller_goes_away_and_the_next_waits_for_it() {
    let home = tempfile::tempdir().unwrap();
    let host = host(1, 8);
    let (mut fixture, switch) = two(home.path(), &[&host]).await;
    Arc::get_mut(&mut fixture.tiers).unwrap().wipe_wait = LONG;
    for number in 0..3 {
        fixture.save_durable(&host, id(1, number)).await;
    }
    let named = || {
        let text = std::fs::read_to_string(home.path().join("a/disks.json")).unwrap();
        let file: serde_json::Value = serde_json::from_str(&text).unwrap();
        file["kept"]["wiped"]["1"].is_object()
    };
    fixture.stop(&switch).await;
    let gone = timeout(WAIT, fixture.tiers.wipe(&host)).await;
    assert!(gone.is_err(), "it waits for the device");
    assert!(host.is_empty() && !named());
    drop(fixture.save(&host, id(1, 9), 0).await);
    let mut next = std::pin::pin!(fixture.tiers.wipe(&host));
    assert!(timeout(WAIT, next.as_mut()).await.is_err());
    assert_eq!(host.len(), 1, "the next one has not begun");
    switch.set(Mood::GOOD);
    let wiped = timeout(LONG, next).await.expect("the first one ended");
    assert_eq!(wiped.unwrap().blocks, 1, "the first took all of before");
    assert!(named() && host.is_empty());
    fixture.tiers.disk().unwrap().close().await;
    Ledger::open(&home.path().join("a")).unwrap();
}

// Goal: what a device that hangs keeps of scratch memory leaves the others enough, for saves and
// for restores.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_hangs_keeps_no_scratch_that_the_others_need() {
    let home = tempfile::tempdir().unwrap();
    let warm = host(1, 40);
    let dirs = ["a", "b"].map(|name| home.path().join(name));
    for dir in &dirs {
        std::fs::create_dir(dir).unwrap();
    }
    let switch = switch(&dirs[1]);
    let fixture = Fixture::over(&dirs, Level::ZSTD, &[&warm]).await;
    for number in 0..16 {
        fixture.save_durable(&warm, id(1, number)).await;
    }
    let ids: Vec<_> = (0..16).map(|at| id(1, at)).collect();
    let healthy = fixture.on_first(ids.clone()).await;
    let lost = ids.iter().filter(|id| !healthy.contains(id));
    let lost: Vec<_> = lost.copied().collect();
    assert!(
        lost.len() > 2 && !healthy.is_empty(),
        "more than it may hold"
    );
    switch.set(Mood {
        hangs: true,
        ..Mood::GOOD
    });
    // More than scratch memory holds are to be written to the device, and to be read from it.
    for number in 16..28 {
        drop(fixture.save(&warm, id(1, number), 0).await);
    }
    let cold = host(1, 40);
    let mut reads = tokio::task::JoinSet::new();
    for id in lost {
        let (tiers, layouts) = (Arc::clone(&fixture.tiers), Arc::clone(&fixture.layouts));
        let cold = Arc::clone(&cold);
        reads.spawn(async move {
            tiers
                .fetch(&cold, &layouts, id, Quality::Exact)
                .await
                .map(|_| ())
        });
    }
    let save = async {
        while fixture.tiers.pending_writes() > 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let save = timeout(Duration::from_secs(20), save).await;
    save.expect("all but what the device may hold go elsewhere");
    let other = host(1, 8);
    let newest = *healthy.last().unwrap();
    let read = fixture.fetch(&other, newest);
    let read = timeout(Duration::from_secs(20), read).await;
    read.expect("it does not wait for the device").unwrap();
    switch.set(Mood::GOOD);
    while reads.join_next().await.is_some() {}
    fixture.tiers.flush().await;
    assert_eq!(fixture.tiers.pending_writes(), 0);
    fixture.tiers.disk().unwrap().close().await;
}
