//! Several devices as one tier: who has a block, what one that fails takes with it, and that a
//! wipe holds on every device, however long it was away.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use kvtier_proto::{BlockKey, Bytes, Level, NamespaceId, PayloadKind, Quality};
use kvtier_store::disk::lane::LaneKind;
use kvtier_store::mem::{Arena, Pages, Share};
use kvtier_store::{PartCode, PartSpec, RecordBuilder, RecordMeta};

use super::faulty::{Mood, switch};
use super::*;
use crate::health::Health;
use crate::metrics::{DiskState, Label, Metrics, Tier};
use crate::tier::host::HostTier;

mod queue;

const SEGMENT: u64 = 1 << 20;
const NS: NamespaceId = NamespaceId(1);
const OTHER: NamespaceId = NamespaceId(2);
const LAYOUT: LayoutFingerprint = LayoutFingerprint([1; 32]);
const LEN: u32 = 5000;

struct Fixture {
    tier: DiskTier,
    health: Arc<Health>,
    metrics: Arc<Metrics>,
    arena: Arc<Arena>,
}

fn id(namespace: NamespaceId, number: u32) -> BlockId {
    let key = BlockKey(*blake3::hash(&number.to_le_bytes()).as_bytes());
    BlockId {
        namespace,
        kind: PayloadKind::Kv,
        key,
    }
}

fn path(home: &Path, at: usize) -> PathBuf {
    home.join(format!("disk-{at}"))
}

fn options(home: &Path, at: usize) -> DiskOptions {
    std::fs::create_dir_all(path(home, at)).unwrap();
    DiskOptions {
        device: <Device as Label>::all()[at],
        path: path(home, at),
        capacity: Bytes(8 * SEGMENT),
        segment_size: Bytes(SEGMENT),
        queue_depth: 8,
        lane: LaneKind::Pread,
        read_limit: None,
        scrub: ScrubOptions::OFF,
        cold_after: None,
        hosts: Vec::new(),
        unusable: None,
    }
}

/// Opens the disks of these numbers out of as many, the others being away.
async fn try_open(home: &Path, count: usize, here: &[usize]) -> Result<Fixture, String> {
    open_with(home, count, here, Patience::USUAL, |options| options).await
}

async fn open_with(
    home: &Path,
    count: usize,
    here: &[usize],
    patience: Patience,
    change: impl Fn(DiskOptions) -> DiskOptions,
) -> Result<Fixture, String> {
    let (health, metrics) = (Arc::new(Health::new()), Arc::new(Metrics::new()));
    let devices = (0..count).map(|at| DiskOptions {
        unusable: (!here.contains(&at)).then(|| format!("disk-{at} is away")),
        ..change(options(home, at))
    });
    let ledger = Ledger::open(home).unwrap();
    let (told, counted) = (Arc::clone(&health), Arc::clone(&metrics));
    counted.set_devices(count);
    let tier = DiskTier::open_with(patience, devices.collect(), ledger, told, counted).await?;
    let arena = Arena::create("test", 8 << 20, Share::Private).unwrap();
    Ok(Fixture {
        tier,
        health,
        metrics,
        arena,
    })
}

async fn open(home: &Path, count: usize) -> Fixture {
    let all: Vec<usize> = (0..count).collect();
    try_open(home, count, &all).await.unwrap()
}

impl Fixture {
    async fn put(&self, id: BlockId) -> Result<Device, String> {
        let meta = RecordMeta {
            namespace: id.namespace,
            key: id.record_key(),
            parent: BlockKey::ROOT,
            layout: LAYOUT,
            kind: id.kind,
            level: Level::RAW,
            through: Quality::Exact,
            tokens: 16,
            position: 0,
            codec_tables: 0,
        };
        let part = PartSpec {
            layer: 0,
            code: PartCode::K,
            flags: 0,
            stored_len: LEN,
            raw_len: LEN,
        };
        let builder = RecordBuilder::new(&meta, std::slice::from_ref(&part));
        let len = builder.layout().unwrap().image_len as usize;
        let mut image = self.arena.alloc(len).unwrap();
        image.fill(id.key.0[0]);
        let image = builder.build(image).unwrap();
        self.tier.put(image, None, Arc::default(), Life(0)).await
    }

    async fn put_all(&self, namespace: NamespaceId, numbers: std::ops::Range<u32>) {
        for number in numbers {
            self.put(id(namespace, number)).await.unwrap();
        }
    }

    /// The device that has each block, after a look at every byte of it.
    async fn places(
        &self,
        namespace: NamespaceId,
        numbers: std::ops::Range<u32>,
    ) -> Vec<Option<usize>> {
        let ids: Vec<_> = numbers.map(|number| id(namespace, number)).collect();
        let mut places = Vec::new();
        for (id, found) in ids.iter().zip(self.tier.find(ids.clone()).await) {
            let Some(found) = found else {
                places.push(None);
                continue;
            };
            let buf = self.arena.alloc(found.place.len as usize).unwrap();
            let got = self.tier.get(*id, LAYOUT, buf, found.device, None).await;
            let record = got.unwrap().verify().map_err(|(_, miss)| miss).unwrap();
            let head = record.head().header.summary.place.head_len as usize;
            let bytes = record.into_buf();
            assert!(
                bytes[head..][..LEN as usize]
                    .iter()
                    .all(|byte| *byte == id.key.0[0])
            );
            places.push(Some(found.device.position()));
        }
        places
    }

    async fn count(&self, namespace: NamespaceId, numbers: std::ops::Range<u32>) -> usize {
        let places = self.places(namespace, numbers).await;
        places.iter().flatten().count()
    }

    fn is(&self, at: usize, state: DiskState) -> bool {
        let device = <Device as Label>::all()[at];
        self.metrics.disk_state.of((device, state)).get() == 1
    }

    async fn wipe(&self, namespace: NamespaceId) -> Result<Wiped, String> {
        self.tier.wipe(self.tier.forget(namespace)).await
    }

    async fn close(self) {
        self.tier.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_device_has_its_share_of_the_blocks_and_finds_it_after_a_restart() {
    let home = tempfile::tempdir().unwrap();
    let fixture = open(home.path(), 3).await;
    fixture.put_all(NS, 0..90).await;
    let places = fixture.places(NS, 0..90).await;
    for at in 0..3 {
        let held = places.iter().filter(|place| **place == Some(at)).count();
        assert!((10..60).contains(&held), "disk {at} has {held} of 90");
    }
    let status = fixture.tier.status();
    assert_eq!(status.iter().map(|one| one.blocks).sum::<u64>(), 90);
    fixture.close().await;
    let fixture = open(home.path(), 3).await;
    assert_eq!(fixture.places(NS, 0..90).await, places);
    assert_eq!(fixture.metrics.recovered_blocks.get(), 90);
    fixture.close().await;
}

// Goal: what was written before a device came is found all the same, and new blocks use it.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_from_before_a_device_was_added_still_hit() {
    let home = tempfile::tempdir().unwrap();
    let fixture = open(home.path(), 1).await;
    fixture.put_all(NS, 0..40).await;
    fixture.close().await;
    let fixture = open(home.path(), 2).await;
    assert_eq!(fixture.places(NS, 0..40).await, vec![Some(0); 40]);
    fixture.put_all(NS, 40..80).await;
    let added = fixture.places(NS, 40..80).await;
    assert!(
        added.contains(&Some(0)) && added.contains(&Some(1)),
        "{added:?}"
    );
    let hour = Some(Duration::from_secs(3600));
    let pinned = fixture
        .tier
        .pin((0..81).map(|at| id(NS, at)).collect(), hour);
    let pinned: Vec<usize> = pinned.await.into_iter().map(usize::from).collect();
    assert_eq!(pinned.iter().sum::<usize>(), 80, "wherever they are");
    fixture.close().await;
}

// Goal: a device that takes no writes costs no durability while there is another.
#[tokio::test(flavor = "multi_thread")]
async fn a_block_goes_to_the_next_device_when_its_own_takes_no_writes() {
    let home = tempfile::tempdir().unwrap();
    for (at, mood) in [
        Mood {
            writes_fail: true,
            ..Mood::GOOD
        },
        Mood {
            syncs_fail: true,
            ..Mood::GOOD
        },
    ]
    .into_iter()
    .enumerate()
    {
        let home = home.path().join(at.to_string());
        let switch = switch(&path(&home, 1));
        let fixture = open(&home, 2).await;
        fixture.put_all(NS, 0..20).await;
        switch.set(mood);
        fixture.put_all(NS, 20..60).await;
        assert!(switch.failed.load(Ordering::SeqCst) > 0);
        let places = fixture.places(NS, 0..60).await;
        assert!(places.iter().all(Option::is_some), "{places:?}");
        assert_eq!(places[20..], [Some(0); 40]);
        assert!(fixture.is(1, DiskState::ReadOnly) && fixture.is(0, DiskState::Healthy));
        assert_eq!(fixture.health.live(), Ok(()));
        let shown = fixture.health.to_string();
        assert!(shown.contains("disk 1 takes no writes"), "{shown}");
        fixture.close().await;
        switch.set(Mood::GOOD);
        let fixture = open(&home, 2).await;
        // One whose sync failed may have got there all the same: it is found where it belongs.
        assert_eq!(fixture.count(NS, 0..60).await, 60);
        fixture.put_all(NS, 60..90).await;
        assert!(fixture.places(NS, 60..90).await.contains(&Some(1)));
        fixture.close().await;
    }
}

// Goal: what a device takes with it is a miss that says so; the rest goes on, and the daemon is
// well while one device serves.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_fails_takes_its_blocks_with_it_and_no_others() {
    let home = tempfile::tempdir().unwrap();
    for (at, mood) in [
        Mood {
            gone: true,
            ..Mood::GOOD
        },
        Mood {
            breaks: true,
            ..Mood::GOOD
        },
    ]
    .into_iter()
    .enumerate()
    {
        let home = home.path().join(at.to_string());
        let switch = switch(&path(&home, 1));
        let fixture = open(&home, 2).await;
        fixture.put_all(NS, 0..40).await;
        let before = fixture.places(NS, 0..40).await;
        let lost: Vec<u32> = (0..40)
            .filter(|at| before[*at as usize] == Some(1))
            .collect();
        switch.set(mood);
        // Whoever uses the device next finds out.
        let owned = (40..)
            .find(|at| fixture.tier.owner(&id(NS, *at)) == Some(1))
            .unwrap();
        let _ = fixture.put(id(NS, owned)).await;
        while !fixture.is(1, DiskState::Failed) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let after = fixture.places(NS, 0..40).await;
        let kept = before.iter().map(|place| place.filter(|at| *at == 0));
        assert_eq!(after, kept.collect::<Vec<_>>());
        for number in 0..40 {
            let miss = fixture.tier.why_not(&id(NS, number));
            let want = if lost.contains(&number) {
                Miss::Device
            } else {
                Miss::Absent
            };
            assert_eq!(miss, want, "{number}");
        }
        assert_eq!(fixture.health.live(), Ok(()));
        let status = &fixture.tier.status()[1];
        assert!(!status.problem.is_empty());
        assert_eq!(status.blocks, 0, "none can be restored");
        for number in &lost {
            let device = fixture.put(id(NS, *number)).await.unwrap();
            assert_eq!(device.position(), 0, "saved anew");
        }
        assert_eq!(fixture.count(NS, 0..40).await, 40);
        fixture.close().await;
        switch.set(Mood::GOOD);
        let fixture = open(&home, 2).await;
        assert_eq!(
            fixture.places(NS, 0..40).await,
            before,
            "it is back with its blocks"
        );
        fixture.close().await;
    }
}

impl Fixture {
    /// A block that belongs to the second device and was not saved.
    fn owned_by_second(&self) -> BlockId {
        let mut ids = (1000..).map(|number| id(NS, number));
        ids.find(|id| self.tier.owner(id) == Some(1)).unwrap()
    }

    /// Blocks of which the second device says something, or why not.
    async fn misses(&self, numbers: std::ops::Range<u32>) -> Vec<Option<Miss>> {
        let ids: Vec<_> = numbers.map(|number| id(NS, number)).collect();
        let found = self.tier.find(ids.clone()).await;
        let miss = |(id, found): (&BlockId, Option<OnDisk>)| match found {
            Some(_) => None,
            None => Some(self.tier.why_not(id)),
        };
        ids.iter().zip(found).map(miss).collect()
    }

    async fn until_it_answers(&self) {
        while self.tier.slots[1].handle.as_ref().unwrap().is_late() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

// Goal: a device of which nothing comes back, not even an error, costs what one that has failed
// does: its own blocks, and a wait that is bounded. It is back when it answers.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_whose_thread_hangs_takes_its_blocks_with_it_until_it_answers() {
    let home = tempfile::tempdir().unwrap();
    let switch = switch(&path(home.path(), 1));
    let fixture = open(home.path(), 2).await;
    fixture.put_all(NS, 0..40).await;
    let before = fixture.places(NS, 0..40).await;
    switch.set(Mood {
        stuck: true,
        ..Mood::GOOD
    });
    let put = fixture.put(fixture.owned_by_second());
    let short = Duration::from_millis(100);
    assert!(
        tokio::time::timeout(short, put).await.is_err(),
        "it waits for the device"
    );
    let lost = |place: &Option<usize>| (*place == Some(1)).then_some(Miss::Device);
    let want: Vec<_> = before.iter().map(lost).collect();
    assert_eq!(fixture.misses(0..40).await, want);
    let begin = std::time::Instant::now();
    for _ in 0..10 {
        assert_eq!(fixture.misses(0..40).await, want);
    }
    assert!(
        begin.elapsed() < 5 * fixture.tier.patience.look,
        "each waits anew"
    );
    let shown = fixture.health.to_string();
    assert!(
        shown.contains("the thread of disk 1 does not answer"),
        "{shown}"
    );
    assert!(fixture.tier.status()[1].problem.contains("does not answer"));
    for number in (0..40).filter(|at| want[*at as usize].is_some()) {
        let device = fixture.put(id(NS, number)).await.unwrap();
        assert_eq!(device.position(), 0, "saved anew");
    }
    let ids = (0..40).map(|at| id(NS, at)).collect();
    let pinned = fixture.tier.pin(ids, Some(Duration::from_secs(3600))).await;
    assert_eq!(pinned, [true; 40]);
    switch.set(Mood::GOOD);
    fixture.until_it_answers().await;
    assert_eq!(fixture.places(NS, 0..40).await, before);
    assert_eq!(fixture.tier.status()[1].problem, "");
    let shown = fixture.health.to_string();
    assert!(!shown.contains("does not answer"), "{shown}");
    fixture.close().await;
}

// Goal: the same when the thread is well and what it asks of the device does not come back.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_does_not_come_back_ends_and_costs_no_block() {
    let home = tempfile::tempdir().unwrap();
    let switch = switch(&path(home.path(), 1));
    let patience = Patience {
        get: Duration::from_millis(200),
        put: Duration::from_millis(200),
        ..Patience::USUAL
    };
    let fixture = open_with(home.path(), 2, &[0, 1], patience, |options| options)
        .await
        .unwrap();
    fixture.put_all(NS, 0..40).await;
    let before = fixture.places(NS, 0..40).await;
    let number = (0..40).find(|at| before[*at as usize] == Some(1)).unwrap();
    let one = id(NS, number);
    let found = fixture.tier.find(vec![one]).await[0].unwrap();
    switch.set(Mood {
        hangs: true,
        ..Mood::GOOD
    });
    let buf = fixture.arena.alloc(found.place.len as usize).unwrap();
    let got = fixture.tier.get(one, LAYOUT, buf, found.device, None).await;
    assert_eq!(got.err(), Some(Miss::Deadline));
    assert_eq!(
        fixture.misses(number..number + 1).await,
        [Some(Miss::Device)]
    );
    switch.set(Mood::GOOD);
    fixture.until_it_answers().await;
    assert_eq!(fixture.places(NS, 0..40).await, before);
    // A write is waited for, since nobody else has the record; others go elsewhere.
    switch.set(Mood {
        hangs: true,
        ..Mood::GOOD
    });
    let second = fixture.owned_by_second();
    let (waits, other) = tokio::join!(fixture.put(second), async {
        while !fixture.tier.slots[1].handle.as_ref().unwrap().is_late() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let other = fixture.put(one).await;
        switch.set(Mood::GOOD);
        other
    });
    let devices = [waits, other].map(|device| device.unwrap().position());
    assert_eq!(devices, [1, 0]);
    fixture.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_several_devices_that_hangs_while_it_opens_is_done_without() {
    let home = tempfile::tempdir().unwrap();
    let fixture = open(home.path(), 2).await;
    fixture.put_all(NS, 0..40).await;
    let before = fixture.places(NS, 0..40).await;
    fixture.close().await;
    let switch = switch(&path(home.path(), 1));
    switch.set(Mood {
        stuck: true,
        ..Mood::GOOD
    });
    let patience = Patience {
        open: Duration::from_secs(2),
        ..Patience::USUAL
    };
    let fixture = open_with(home.path(), 2, &[0, 1], patience, |options| options)
        .await
        .unwrap();
    let status = &fixture.tier.status()[1];
    assert!(
        status.problem.contains("did not open"),
        "{}",
        status.problem
    );
    // What comes too late changes nothing: it is out of service until a restart.
    switch.set(Mood::GOOD);
    let want = before.iter().map(|place| place.filter(|at| *at == 0));
    assert_eq!(fixture.places(NS, 0..40).await, want.collect::<Vec<_>>());
    assert!(fixture.is(1, DiskState::Failed));
    fixture.close().await;
}

// Goal: the scrub that nobody asks for: what is damaged is found, told and counted, once.
#[tokio::test(flavor = "multi_thread")]
async fn the_scrub_finds_a_damaged_record_before_anybody_reads_it() {
    use std::os::unix::fs::FileExt as _;
    let home = tempfile::tempdir().unwrap();
    let fixture = open(home.path(), 1).await;
    fixture.put_all(NS, 0..40).await;
    let bad = fixture.tier.find(vec![id(NS, 7)]).await[0].unwrap();
    fixture.close().await;
    let name = kvtier_store::format::segment::segment_name(bad.place.segment);
    let mut options = std::fs::File::options();
    let file = options
        .read(true)
        .write(true)
        .open(path(home.path(), 0).join(name))
        .unwrap();
    let (mut byte, at) = ([0], bad.place.offset + u64::from(bad.place.len) / 2);
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    let host = HostTier::create(NS, "test", 1 << 20, Pages::Small).unwrap();
    let host = Arc::new(host);
    let mut events = host.watch();
    let scrubbed = |options| DiskOptions {
        scrub: ScrubOptions {
            rate: Bytes::gib(1),
            first_after: Duration::ZERO,
            every: Duration::MAX,
        },
        hosts: vec![Arc::clone(&host)],
        ..options
    };
    let fixture = open_with(home.path(), 1, &[0], Patience::USUAL, scrubbed)
        .await
        .unwrap();
    let event = events.recv().await.unwrap();
    assert_eq!((event.key, event.tier), (id(NS, 7).key, Tier::Disk));
    assert_eq!(event.removed, Some(Miss::PayloadCrc));
    let metrics = &fixture.metrics;
    while metrics.scrub_ended.of(Device::FIRST).get() == 0.0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // The thread has ended, and has told everything.
    fixture.tier.close().await;
    assert_eq!(metrics.scrub_bad.of(Device::FIRST).get(), 1);
    let damage = crate::metrics::Damage::of(Miss::PayloadCrc).unwrap();
    assert_eq!(metrics.corrupt.of(damage).get(), 1);
    assert!(metrics.scrub_bytes.of(Device::FIRST).get() > 40 * u64::from(LEN));
    let fixture = open(home.path(), 1).await;
    assert_eq!(fixture.count(NS, 0..40).await, 39);
    fixture.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_away_keeps_its_share_and_the_only_one_is_an_error() {
    let home = tempfile::tempdir().unwrap();
    let fixture = open(home.path(), 2).await;
    fixture.put_all(NS, 0..40).await;
    let before = fixture.places(NS, 0..40).await;
    fixture.close().await;
    let fixture = try_open(home.path(), 2, &[0]).await.unwrap();
    assert!(fixture.is(1, DiskState::Failed));
    let shown = fixture.health.to_string();
    assert!(
        shown.contains("disk 1 serves nothing: disk-1 is away"),
        "{shown}"
    );
    assert_eq!(fixture.tier.status()[1].problem, "disk-1 is away");
    let after = fixture.places(NS, 0..40).await;
    for (number, (before, after)) in (0..).zip(before.iter().zip(&after)) {
        assert_eq!(*after, before.filter(|at| *at == 0), "{number}");
        let miss = fixture.tier.why_not(&id(NS, number));
        assert_eq!(miss == Miss::Device, *before == Some(1), "{number}");
    }
    fixture.put_all(NS, 40..60).await;
    assert_eq!(fixture.places(NS, 40..60).await, vec![Some(0); 20]);
    fixture.close().await;
    let fixture = open(home.path(), 2).await;
    assert_eq!(fixture.places(NS, 0..40).await, before);
    assert_eq!(fixture.count(NS, 40..60).await, 20);
    fixture.close().await;
    let none = try_open(home.path(), 2, &[]).await.err().unwrap();
    assert_eq!(none, "disk-0 is away; disk-1 is away");
    let only = try_open(home.path(), 1, &[]).await.err().unwrap();
    assert_eq!(only, "disk-0 is away");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_a_store_is_not_served_beside_it() {
    let home = tempfile::tempdir().unwrap();
    let fixture = open(home.path(), 1).await;
    fixture.put_all(NS, 0..10).await;
    fixture.close().await;
    std::fs::create_dir(path(home.path(), 1)).unwrap();
    for file in std::fs::read_dir(path(home.path(), 0)).unwrap() {
        let file = file.unwrap();
        if file.file_type().unwrap().is_file() {
            std::fs::copy(file.path(), path(home.path(), 1).join(file.file_name())).unwrap();
        }
    }
    let fixture = open(home.path(), 2).await;
    let problem = &fixture.tier.status()[1].problem;
    assert!(
        problem.contains("holds a copy of the store in"),
        "{problem}"
    );
    assert_eq!(fixture.places(NS, 0..10).await, vec![Some(0); 10]);
    // The thread of the copy has closed it, though nothing happens on its device.
    let closed = async {
        while !path(home.path(), 1).join("catalog").exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let limit = Duration::from_secs(30);
    tokio::time::timeout(limit, closed).await.expect("it ends");
    fixture.close().await;
}

// Goal: P3 on all devices, and only for the namespace that is meant.
#[tokio::test(flavor = "multi_thread")]
async fn a_wipe_holds_on_every_device_after_every_restart() {
    let home = tempfile::tempdir().unwrap();
    let fixture = open(home.path(), 3).await;
    fixture.put_all(NS, 0..60).await;
    fixture.put_all(OTHER, 0..20).await;
    let wiped = fixture.wipe(NS).await.unwrap();
    assert_eq!((wiped.blocks, wiped.waiting), (60, Vec::new()));
    assert_eq!(fixture.count(NS, 0..60).await, 0);
    fixture.put_all(NS, 30..40).await;
    fixture.close().await;
    for _ in 0..2 {
        let fixture = open(home.path(), 3).await;
        assert_eq!(fixture.count(NS, 0..30).await, 0);
        assert_eq!(fixture.count(NS, 30..40).await, 10, "saved since");
        assert_eq!(fixture.count(OTHER, 0..20).await, 20);
        fixture.close().await;
    }
}

// Goal: P3 for a device that was not there when the namespace was wiped, once or twice, and P2
// for what was saved on it afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_was_away_takes_the_wipe_before_it_serves() {
    let home = tempfile::tempdir().unwrap();
    let fixture = open(home.path(), 2).await;
    fixture.put_all(NS, 0..40).await;
    fixture.put_all(OTHER, 0..20).await;
    assert_eq!(
        fixture.wipe(NS).await.unwrap().blocks,
        40,
        "it took this one"
    );
    fixture.put_all(NS, 0..40).await;
    fixture.close().await;
    let fixture = try_open(home.path(), 2, &[0]).await.unwrap();
    let wiped = fixture.wipe(NS).await.unwrap();
    assert_eq!(wiped.waiting.len(), 1);
    assert!(
        wiped.waiting[0].starts_with("disk 1 ("),
        "{:?}",
        wiped.waiting
    );
    fixture.put_all(NS, 40..50).await;
    fixture.close().await;
    for round in 0..3 {
        let fixture = open(home.path(), 2).await;
        assert_eq!(fixture.count(NS, 0..40).await, 0, "round {round}");
        assert_eq!(
            u32::try_from(fixture.count(NS, 40..50 + 20 * round).await).unwrap(),
            10 + 20 * round
        );
        assert_eq!(fixture.count(OTHER, 0..20).await, 20);
        fixture.put_all(NS, 50 + 20 * round..70 + 20 * round).await;
        fixture.close().await;
    }
}

// Goal: P3 for a device that does not take the wipe while it serves, and P2 for what it takes
// after it. A failed sync of the superblock poisons; a failed write does not.
#[tokio::test(flavor = "multi_thread")]
async fn a_wipe_that_a_device_does_not_take_is_refused_and_holds_all_the_same() {
    let home = tempfile::tempdir().unwrap();
    for (at, mood) in [
        Mood {
            writes_fail: true,
            ..Mood::GOOD
        },
        Mood {
            syncs_fail: true,
            ..Mood::GOOD
        },
    ]
    .into_iter()
    .enumerate()
    {
        let home = home.path().join(at.to_string());
        let switch = switch(&path(&home, 1));
        let fixture = open(&home, 2).await;
        fixture.put_all(NS, 0..40).await;
        fixture.put_all(OTHER, 0..20).await;
        switch.set(mood);
        let why = fixture.wipe(NS).await.unwrap_err();
        assert!(why.contains("disk 1") && !why.contains("disk 0"), "{why}");
        assert_eq!(fixture.count(NS, 0..40).await, 0, "at once");
        switch.set(Mood::GOOD);
        fixture.put_all(NS, 40..80).await;
        let places = fixture.places(NS, 40..80).await;
        assert_eq!(places.contains(&Some(1)), mood.writes_fail, "{places:?}");
        // One that takes no writes has it from the ledger: no wipe fails for its sake.
        let wiped = fixture.wipe(OTHER).await.unwrap();
        assert_eq!(
            (wiped.blocks, wiped.waiting.len()),
            (20, usize::from(mood.syncs_fail))
        );
        // As a kill would: the superblock never hears of it.
        switch.set(Mood::DEAD);
        fixture.close().await;
        switch.set(Mood::GOOD);
        for _ in 0..2 {
            let fixture = open(&home, 2).await;
            assert_eq!(fixture.count(NS, 0..40).await, 0, "after a restart");
            assert_eq!(fixture.count(OTHER, 0..20).await, 0, "after a restart");
            assert_eq!(
                fixture.places(NS, 40..80).await,
                places,
                "acknowledged since"
            );
            fixture.close().await;
        }
    }
}

// Goal: without the ledger a device that is away would never hear of it, so that is an error too.
#[tokio::test(flavor = "multi_thread")]
async fn a_wipe_that_the_state_directory_does_not_take_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let state = home.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let ledger = Ledger::open(&state).unwrap();
    let tier = DiskTier::open(
        vec![options(home.path(), 0)],
        ledger,
        Arc::default(),
        Arc::default(),
    );
    let tier = tier.await.unwrap();
    std::fs::remove_dir_all(&state).unwrap();
    let why = tier.wipe(tier.forget(NS)).await.unwrap_err();
    assert!(
        why.contains("cannot keep") && why.contains("disks.json"),
        "{why}"
    );
    std::fs::create_dir(&state).unwrap();
    tier.wipe(tier.forget(NS)).await.unwrap();
    assert!(state.join("disks.json").is_file());
    tier.close().await;
}

// Goal: a device that was set back to an earlier copy of itself has forgotten its wipes, not we.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_set_back_to_before_a_wipe_takes_it_again() {
    let home = tempfile::tempdir().unwrap();
    let fixture = open(home.path(), 1).await;
    fixture.put_all(NS, 0..20).await;
    fixture.close().await;
    let (disk, copy) = (path(home.path(), 0), home.path().join("copy"));
    let copy_files = |from: &Path, to: &Path| {
        std::fs::create_dir_all(to).unwrap();
        for file in std::fs::read_dir(from).unwrap() {
            let file = file.unwrap();
            if file.file_type().unwrap().is_file() {
                std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
            }
        }
    };
    copy_files(&disk, &copy);
    let fixture = open(home.path(), 1).await;
    assert_eq!(fixture.count(NS, 0..20).await, 20);
    fixture.wipe(NS).await.unwrap();
    fixture.close().await;
    std::fs::remove_dir_all(&disk).unwrap();
    copy_files(&copy, &disk);
    for round in 0..2 {
        let fixture = open(home.path(), 1).await;
        assert_eq!(fixture.count(NS, 0..20).await, 0);
        assert_eq!(
            fixture.count(NS, 20..40).await,
            20 * round,
            "of the life since"
        );
        fixture.put_all(NS, 20..40).await;
        fixture.close().await;
    }
}
