//! Tests of both tiers together, over files of this machine: what is saved, lost, wiped and
//! loaded again.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use kvtier_proto::descriptor::{LayerSpec, PartOrder, Shard};
use kvtier_proto::{Bytes, Element, ModelDescriptor, NamespaceId, Quality};
use kvtier_store::disk::lane::LaneKind;
use kvtier_store::mem::Pages;
use tokio::time::timeout;

use super::disk::{DiskOptions, Ledger, ScrubOptions};
use super::*;
use crate::block::{BlockFacts, Layouts, PlannedBlock};
use crate::health::Health;
use crate::metrics::{Damage, Label};

mod across;
mod quality;
mod wipes;

const TOKENS: u32 = 16;
/// A payload of the model's, and a record of it as level raw: a head and the payload.
const PAYLOAD: usize = 32 << 10;
const RECORD: usize = PAYLOAD + 4096;
/// Segments of a device, four of them, have room for 6 records each.
const SEGMENT: u64 = 256 << 10;

/// Memory in flight for each device.
const SCRATCH: usize = 64 << 10;

fn layouts(layers: Vec<LayerSpec>) -> Arc<Layouts> {
    Arc::new(Layouts::new(ModelDescriptor {
        model: "test".into(),
        revision: String::new(),
        weights_fingerprint: Vec::new(),
        adapter: String::new(),
        element: Element::Bf16,
        layers,
        d_model: 128,
        rope: None,
        block_tokens: TOKENS,
        order: PartOrder::TokenMajor,
        shard: Shard::WHOLE,
        k_after_rope: true,
    }))
}

fn attention() -> LayerSpec {
    LayerSpec::Attention {
        kv_heads: 2,
        k_dim: 32,
        v_dim: 32,
        sliding_window: 0,
    }
}

/// Memory for `blocks` records of level raw.
fn host(namespace: u32, blocks: usize) -> Arc<HostTier> {
    let host = HostTier::create(
        NamespaceId(namespace),
        "test",
        blocks * RECORD,
        Pages::Small,
    );
    Arc::new(host.unwrap())
}

struct Fixture {
    tiers: Arc<Tiers>,
    layouts: Arc<Layouts>,
    metrics: Arc<Metrics>,
    dir: PathBuf,
}

impl Fixture {
    async fn new(dir: &Path, coding: impl Into<Coding>, hosts: &[&Arc<HostTier>]) -> Self {
        Self::over(&[dir.to_owned()], coding, hosts).await
    }

    /// Over a device in each directory; the first is the state directory as well.
    async fn over(dirs: &[PathBuf], coding: impl Into<Coding>, hosts: &[&Arc<HostTier>]) -> Self {
        let coding = coding.into();
        let metrics = Arc::new(Metrics::new());
        let options = |(device, dir): (Device, &PathBuf)| DiskOptions {
            device,
            path: dir.to_owned(),
            capacity: Bytes(4 * SEGMENT),
            segment_size: Bytes(SEGMENT),
            queue_depth: 8,
            lane: LaneKind::Pread,
            read_limit: None,
            scrub: ScrubOptions::OFF,
            cold_after: coding.cold.map(|cold| cold.after),
            hosts: hosts.iter().map(|host| Arc::clone(host)).collect(),
            unusable: None,
        };
        let (health, counted) = (Arc::new(Health::new()), Arc::clone(&metrics));
        let ledger = Ledger::open(&dirs[0]).unwrap();
        let devices = <Device as Label>::all().into_iter().zip(dirs);
        let devices = devices.map(options).collect();
        let disk = DiskTier::open(devices, ledger, health, counted);
        let disk = disk.await.unwrap();
        let scratch = Scratch::create(SCRATCH * dirs.len(), Pages::Small).unwrap();
        Self {
            tiers: Tiers::new(Some(disk), coding, scratch, Arc::clone(&metrics)),
            layouts: layouts(vec![attention(); 8]),
            metrics,
            dir: dirs[0].clone(),
        }
    }

    async fn restart(self, coding: impl Into<Coding>) -> Self {
        self.tiers.disk().unwrap().close().await;
        Self::new(&self.dir, coding, &[]).await
    }

    async fn save(&self, host: &Arc<HostTier>, id: BlockId, opaque: u64) -> Arc<HostBlock> {
        let layout = self.layouts.get(id.kind, TOKENS, opaque).unwrap();
        let payload = payload(&id, layout.payload_len());
        let facts = BlockFacts {
            parent: BlockKey::ROOT,
            position: 0,
            through: Quality::Exact,
            fingerprint: self.layouts.fingerprint(),
            layout,
            order: PartOrder::TokenMajor,
        };
        let planned = PlannedBlock { id, facts };
        self.tiers.save(host, planned, payload, None).await.unwrap()
    }

    async fn save_durable(&self, host: &Arc<HostTier>, id: BlockId) {
        drop(self.save(host, id, 0).await);
        assert!(self.tiers.durable(host, id, Quality::Exact).await, "{id:?}");
    }

    /// The block, compared byte by byte.
    async fn fetch(&self, host: &Arc<HostTier>, id: BlockId) -> Result<Arc<HostBlock>, Miss> {
        let (block, _) = self
            .tiers
            .fetch(host, &self.layouts, id, Quality::Exact)
            .await?;
        assert_eq!(block.payload(), payload(&id, block.payload().len()));
        Ok(block)
    }

    fn segments(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&self.dir).unwrap();
        let files = entries.map(|entry| entry.unwrap().path());
        let segments = files.filter(|path| path.is_file());
        let long = |path: &PathBuf| std::fs::metadata(path).unwrap().len() == SEGMENT;
        segments.filter(long).collect()
    }
}

fn id(namespace: u32, number: u32) -> BlockId {
    let mut key = [7; 32];
    key[..4].copy_from_slice(&number.to_le_bytes());
    BlockId {
        namespace: NamespaceId(namespace),
        kind: PayloadKind::Kv,
        key: BlockKey(key),
    }
}

/// Bytes that a block of no other name has.
fn payload(id: &BlockId, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut hash = blake3::Hasher::new();
    hash.update(&id.namespace.0.to_le_bytes());
    hash.update(&[id.kind as u8]);
    hash.update(id.key.as_bytes());
    hash.finalize_xof().fill(&mut bytes);
    bytes
}

// Goal: an opaque payload is never taken for the descriptor's own because it is as long.
#[tokio::test(flavor = "multi_thread")]
async fn an_opaque_payload_as_long_as_the_descriptors_own_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let (warm, cold) = (host(1, 8), host(1, 8));
    let mut fixture = Fixture::new(dir.path(), Level::RAW, &[&warm]).await;
    let own = LayerSpec::Opaque {
        bytes_per_token: 0,
        bytes_per_block: 128,
    };
    fixture.layouts = layouts(vec![attention(), own]);
    let of = |number| BlockId {
        kind: PayloadKind::Opaque,
        ..id(1, number)
    };
    // As long as the descriptor says, but of one part at layer 0; its own; and of another length.
    for (number, opaque) in [(1, 128), (2, 0), (3, 129)] {
        drop(fixture.save(&warm, of(number), opaque).await);
        assert!(
            fixture
                .tiers
                .durable(&warm, of(number), Quality::Exact)
                .await
        );
        let block = fixture.fetch(&cold, of(number)).await;
        assert!(block.is_ok(), "{number}: {block:?}");
    }
    assert_eq!(
        fixture
            .metrics
            .corrupt
            .of(Damage::of(Miss::WrongLayout).unwrap())
            .get(),
        0
    );
}

// Goal: what is saved after a wipe is a write of its own, though the write of its name that the
// wipe has ended still runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_block_saved_again_after_a_wipe_becomes_durable_while_its_first_write_runs() {
    let dir = tempfile::tempdir().unwrap();
    let warm = host(1, 8);
    let fixture = Fixture::new(dir.path(), Level::ZSTD, &[&warm]).await;
    let cores = fixture.tiers.cpu.available_permits();
    let busy = fixture.tiers.cpu.acquire_many(cores.try_into().unwrap());
    let busy = busy.await.unwrap();
    drop(fixture.save(&warm, id(1, 1), 0).await);
    fixture.tiers.wipe(&warm).await.unwrap();
    drop(fixture.save(&warm, id(1, 1), 0).await);
    assert_eq!(fixture.tiers.pending_writes(), 2);
    drop(busy);
    assert!(fixture.tiers.durable(&warm, id(1, 1), Quality::Exact).await);
    assert_eq!(fixture.tiers.flush().await, 0, "the first is refused");
    let fixture = fixture.restart(Level::ZSTD).await;
    fixture.fetch(&host(1, 8), id(1, 1)).await.unwrap();
}

// Goal: what the store writes before a payload (its identity, its numbers) is not for clients,
// who map the arena.
#[tokio::test(flavor = "multi_thread")]
async fn a_raw_block_shows_nothing_of_the_records_head() {
    let dir = tempfile::tempdir().unwrap();
    let (warm, cold) = (host(1, 8), host(1, 8));
    let fixture = Fixture::new(dir.path(), Level::RAW, &[&warm]).await;
    fixture.save_durable(&warm, id(1, 1)).await;
    let block = fixture.fetch(&cold, id(1, 1)).await.unwrap();
    let mut head = [1; 4096];
    let at = block.arena_offset() as u64 - 4096;
    let memory = File::from(cold.arena().fd().try_clone_to_owned().unwrap());
    memory.read_exact_at(&mut head, at).unwrap();
    assert_eq!(head, [0; 4096]);
}

// Goal: M4. One namespace's clients hold all of its memory; its prefetches wait for room, and
// nobody else waits with them.
#[tokio::test(flavor = "multi_thread")]
async fn loads_that_wait_for_room_keep_no_scratch_from_other_namespaces() {
    let dir = tempfile::tempdir().unwrap();
    let (red, blue) = (host(1, 4), host(2, 4));
    let fixture = Fixture::new(dir.path(), Level::ZSTD, &[&red, &blue]).await;
    fixture.save_durable(&blue, id(2, 1)).await;
    for number in 0..8 {
        fixture.save_durable(&red, id(1, number)).await;
    }
    let mut leased = Vec::new();
    while let Some(image) = red.room(RECORD).image {
        leased.push(image);
    }
    let wanted = (0..8).map(|number| id(1, number));
    assert_eq!(
        fixture
            .tiers
            .prefetch(&red, &fixture.layouts, wanted, Quality::Exact),
        8
    );
    tokio::time::sleep(Duration::from_millis(300)).await;
    let cold = host(2, 4);
    let other = fixture.fetch(&cold, id(2, 1));
    let other = timeout(Duration::from_secs(3), other).await;
    other.expect("not behind the other namespace").unwrap();
    // With room they come, whoever asks.
    leased.clear();
    let late = fixture.fetch(&red, id(1, 0));
    timeout(Duration::from_secs(3), late)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefetch_brings_every_block_and_the_next_finds_nothing_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let (warm, cold) = (host(1, 30), host(1, 30));
    let fixture = Fixture::new(dir.path(), Level::RAW, &[&warm]).await;
    for number in 0..10 {
        fixture.save_durable(&warm, id(1, number)).await;
    }
    let wanted = || (0..10).map(|number| id(1, number));
    assert_eq!(
        fixture
            .tiers
            .prefetch(&cold, &fixture.layouts, wanted(), Quality::Exact),
        10
    );
    for id in wanted() {
        fixture.fetch(&cold, id).await.unwrap();
    }
    assert_eq!(
        fixture
            .tiers
            .prefetch(&cold, &fixture.layouts, wanted(), Quality::Exact),
        0
    );
}

/// Damages every segment by `damage`, and insists on this: the block is a miss of `reason`, and
/// counted; saved again it is durable in truth, through a restart.
async fn is_saved_anew_after(reason: Miss, damage: impl Fn(&Path, &[u8])) {
    let dir = tempfile::tempdir().unwrap();
    let warm = host(1, 40);
    let fixture = Fixture::new(dir.path(), Level::RAW, &[&warm]).await;
    // Every segment has a life before the one that is damaged.
    for number in 0..40 {
        fixture.save_durable(&warm, id(1, number)).await;
    }
    let read = |path: &PathBuf| std::fs::read(path).unwrap();
    let before: Vec<_> = fixture.segments().iter().map(read).collect();
    assert_eq!(before.len(), 4);
    for number in 100..140 {
        fixture.save_durable(&warm, id(1, number)).await;
    }
    for (path, before) in fixture.segments().iter().zip(&before) {
        damage(path, before);
    }
    let (cold, lost) = (host(1, 8), id(1, 132));
    let mut events = cold.watch();
    let miss = fixture.fetch(&cold, lost).await.unwrap_err();
    assert_eq!(miss, reason);
    let counted = fixture.metrics.corrupt.of(Damage::of(reason).unwrap());
    assert_eq!(counted.get(), 1);
    let removed = BlockEvent {
        key: lost.key,
        tier: Tier::Disk,
        removed: Some(reason),
    };
    assert_eq!(events.try_recv().unwrap(), removed);
    let found = fixture
        .tiers
        .locate(&cold, lost.kind, &[lost.key], false, Quality::Exact)
        .await;
    assert_eq!(found, [Err(Miss::Absent)], "it can be saved again");
    fixture.save_durable(&cold, lost).await;
    let fixture = fixture.restart(Level::RAW).await;
    fixture.fetch(&host(1, 8), lost).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_with_a_flipped_bit_is_saved_anew() {
    is_saved_anew_after(Miss::PayloadCrc, |path, _| {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let mut at = 4096;
        while at + (RECORD as u64) < SEGMENT {
            let (mut byte, place) = ([0], at + 4096 + 100);
            file.read_exact_at(&mut byte, place).unwrap();
            file.write_all_at(&[byte[0] ^ 1], place).unwrap();
            at += RECORD as u64;
        }
    })
    .await;
}

// As when the device acknowledged a write that never reached it.
#[tokio::test(flavor = "multi_thread")]
async fn a_block_whose_write_was_lost_is_saved_anew() {
    is_saved_anew_after(Miss::StaleEpoch, |path, before| {
        let file = File::options().write(true).open(path).unwrap();
        let records = 4096..4096 + 6 * RECORD;
        file.write_all_at(&before[records], 4096).unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_that_cannot_be_read_is_saved_anew() {
    is_saved_anew_after(Miss::Device, |path, _| {
        let file = File::options().write(true).open(path).unwrap();
        file.set_len(4096).unwrap();
        file.set_len(SEGMENT).unwrap();
        file.set_len(4096).unwrap();
    })
    .await;
}

// Goal: watchers hear what leaves either tier to make room, and it is counted.
#[tokio::test(flavor = "multi_thread")]
async fn eviction_is_announced_and_counted_on_both_tiers() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(1, 32);
    let fixture = Fixture::new(dir.path(), Level::RAW, &[&host]).await;
    let mut events = host.watch();
    for number in 0..60 {
        fixture.save_durable(&host, id(1, number)).await;
    }
    let (mut left, of) = (Vec::new(), |tier| {
        u32::try_from(fixture.metrics.evicted_blocks.of(tier).get()).unwrap()
    });
    let counts = [of(Tier::Host), of(Tier::Disk)];
    while let Ok(event) = events.try_recv() {
        if event.removed == Some(Miss::Evicted) {
            left.push((event.tier, event.key));
        }
    }
    for (tier, count) in [Tier::Host, Tier::Disk].into_iter().zip(counts) {
        assert!(count > 0, "60 blocks fit into neither");
        let oldest: Vec<_> = (0..count).map(|number| (tier, id(1, number).key)).collect();
        let mut heard: Vec<_> = left.iter().filter(|(of, _)| *of == tier).copied().collect();
        heard.sort_unstable();
        let mut oldest = oldest;
        oldest.sort_unstable();
        assert_eq!(heard, oldest);
    }
    // Host memory keeps more than the device, and does not call the rest durable.
    let resident = |number| host.info(&(PayloadKind::Kv, id(1, number).key));
    let stored: Vec<_> = (0..60).map(|number| id(1, number)).collect();
    let stored = fixture.tiers.disk().unwrap().find(stored).await;
    for (number, stored) in (0..60).zip(stored) {
        if let Some(info) = resident(number) {
            assert_eq!(info.durable, stored.is_some(), "block {number}");
        }
    }
}

// Goal: bytes of a record that was replaced between finding and reading it are never taken for
// the record that was found: their level may be another.
// Method: the record that is found is raw; an encoded one of the same block replaces it.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_was_replaced_since_it_was_found_is_a_miss() {
    let dir = tempfile::tempdir().unwrap();
    let (warm, one) = (host(1, 8), id(1, 1));
    let fixture = Fixture::new(dir.path(), Level::RAW, &[&warm]).await;
    fixture.save_durable(&warm, one).await;
    let fixture = fixture.restart(Level::ZSTD).await;
    let disk = fixture.tiers.disk().unwrap();
    let found = disk.find(vec![one]).await[0].unwrap();
    let get = || async {
        let buf = warm.arena().alloc(2 * RECORD).unwrap();
        let got = load::get_found(disk, one, &fixture.layouts, &found, buf, None).await;
        got.map(|unverified| unverified.place())
    };
    assert_eq!(get().await, Ok(found.place));
    fixture.save_durable(&host(1, 8), one).await;
    assert_ne!(disk.find(vec![one]).await[0].unwrap().level, found.level);
    assert_eq!(get().await, Err(Miss::Evicted));
}
