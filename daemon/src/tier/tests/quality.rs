//! Tests of lossy levels: who gets what they restored, who does not, and what is stored so.

#![allow(clippy::cast_possible_truncation, reason = "test numbers are small")]

use kvtier_kernels::profile::Profile;
use kvtier_proto::Quality;

use super::*;
use crate::metrics::Recoded;
use kvtier_store::RecordImage;

use crate::tier::codec::Source;
use crate::tier::codecs::Tables;
use crate::tier::policy::Cold;
use crate::tier::scratch::Line;

/// A namespace that takes whatever the operator chose.
fn open_host(blocks: usize) -> Arc<HostTier> {
    let host = HostTier::create(NamespaceId(1), "test", blocks * RECORD, Pages::Small);
    Arc::new(host.unwrap().tolerating(Quality::Any))
}

/// Finite values between -4 and 4, other ones for each block.
fn values(id: &BlockId) -> Vec<u8> {
    let words = payload(id, PAYLOAD);
    let value = |word: &[u8]| {
        let number = u16::from_le_bytes([word[0], word[1]]);
        let value = f32::from(number) / 8192.0 - 4.0;
        (value.to_bits() >> 16) as u16
    };
    let values = words.chunks(2).map(value);
    values.flat_map(u16::to_le_bytes).collect()
}

/// Largest difference between two payloads.
fn distance(one: &[u8], other: &[u8]) -> f32 {
    let value =
        |word: &[u8]| f32::from_bits(u32::from(u16::from_le_bytes([word[0], word[1]])) << 16);
    let pairs = one.chunks(2).zip(other.chunks(2));
    pairs
        .map(|(a, b)| (value(a) - value(b)).abs())
        .fold(0.0, f32::max)
}

impl Fixture {
    async fn save_values(&self, host: &Arc<HostTier>, id: BlockId) {
        self.save_through(host, id, Quality::Exact).await;
    }

    /// Saves a block that was computed from bytes of this quality.
    async fn save_through(&self, host: &Arc<HostTier>, id: BlockId, through: Quality) {
        let facts = BlockFacts {
            parent: BlockKey::ROOT,
            position: 0,
            through,
            fingerprint: self.layouts.fingerprint(),
            layout: self.layouts.get(id.kind, TOKENS, 0).unwrap(),
            order: PartOrder::TokenMajor,
        };
        let planned = PlannedBlock { id, facts };
        let saved = self.tiers.save(host, planned, values(&id), None).await;
        drop(saved.unwrap());
        assert!(self.tiers.durable(host, id, through).await, "{id:?}");
    }

    /// The level of what was served, and how far it is from what was saved.
    async fn served(
        &self,
        host: &Arc<HostTier>,
        id: BlockId,
        accept: Quality,
    ) -> Result<(Level, f32), Miss> {
        let (block, _) = self.tiers.fetch(host, &self.layouts, id, accept).await?;
        Ok((block.level(), distance(block.payload(), &values(&id))))
    }

    async fn stored(&self, id: BlockId) -> (Level, Quality) {
        let found = self.tiers.disk().unwrap().find(vec![id]).await;
        found[0]
            .map(|stored| (stored.level, stored.through))
            .unwrap()
    }

    async fn stored_level(&self, id: BlockId) -> Option<Level> {
        let found = self.tiers.disk().unwrap().find(vec![id]).await;
        found[0].map(|stored| stored.level)
    }

    async fn located(&self, host: &HostTier, id: BlockId, accept: Quality) -> Result<Tier, Miss> {
        let keys = [id.key];
        let found = self.tiers.locate(host, id.kind, &keys, false, accept);
        found.await[0].map(Located::tier)
    }
}

// Goal: levels that treat the first layers with more care hear which those are.
#[test]
fn shapes_say_how_many_layers_the_model_has_whether_they_store_anything_or_not() {
    let mut layers = vec![attention(); 10];
    layers.extend([LayerSpec::State { bytes: 8 }, LayerSpec::State { bytes: 8 }]);
    let layouts = layouts(layers);
    for kind in [PayloadKind::Kv, PayloadKind::Hidden] {
        let facts = BlockFacts {
            parent: BlockKey::ROOT,
            position: 32,
            through: Quality::Exact,
            fingerprint: layouts.fingerprint(),
            layout: layouts.get(kind, TOKENS, 0).unwrap(),
            order: PartOrder::TokenMajor,
        };
        let shapes = crate::tier::codec::shapes(&facts).unwrap();
        let told = |one: &kvtier_kernels::PartShape| (one.layers(), one.position()) == (12, 32);
        assert!(shapes.iter().all(told), "{kind:?}");
    }
}

// Goal: A1 on every way to a block: from the device, from host memory, and in a lookup.
#[tokio::test(flavor = "multi_thread")]
async fn an_exact_request_never_gets_what_a_lossy_level_restored() {
    let dir = tempfile::tempdir().unwrap();
    let (warm, cold) = (open_host(8), open_host(8));
    let fixture = Fixture::new(dir.path(), Level::INT8, &[&warm]).await;
    fixture.save_values(&warm, id(1, 1)).await;
    assert_eq!(fixture.stored_level(id(1, 1)).await, Some(Level::INT8));
    // What was saved is in host memory, and exact.
    let served = fixture.served(&warm, id(1, 1), Quality::Exact).await;
    assert_eq!(served, Ok((Level::RAW, 0.0)));
    for accept in [Quality::Exact, Quality::Small] {
        let served = fixture.served(&cold, id(1, 1), accept).await;
        assert_eq!(served, Err(Miss::Quality), "from the device");
        let located = fixture.located(&cold, id(1, 1), accept).await;
        assert_eq!(located, Err(Miss::Quality));
    }
    let (level, far) = fixture.served(&cold, id(1, 1), Quality::Any).await.unwrap();
    assert!(level == Level::INT8 && far > 0.0 && far < 0.05, "{far}");
    for accept in [Quality::Exact, Quality::Small] {
        let served = fixture.served(&cold, id(1, 1), accept).await;
        assert_eq!(served, Err(Miss::Quality), "from host memory");
        let located = fixture.located(&cold, id(1, 1), accept).await;
        assert_eq!(located, Err(Miss::Quality));
    }
    assert_eq!(
        fixture.located(&cold, id(1, 1), Quality::Any).await,
        Ok(Tier::Host)
    );
    // A save brings exact bytes, which take the place of the others.
    fixture.save_values(&cold, id(1, 1)).await;
    let served = fixture.served(&cold, id(1, 1), Quality::Exact).await;
    assert_eq!(served, Ok((Level::RAW, 0.0)));
    assert_eq!(
        fixture
            .metrics
            .corrupt
            .of(Damage::of(Miss::Undecodable).unwrap())
            .get(),
        0
    );
}

// Goal: A1 for what was computed after a lossy block: its level is exact, its bytes are not.
#[tokio::test(flavor = "multi_thread")]
async fn an_exact_request_never_gets_what_was_computed_from_worse() {
    let dir = tempfile::tempdir().unwrap();
    for (number, level) in (1..).zip([Level::RAW, Level::LOSSLESS]) {
        let (warm, id) = (host(1, 8), id(1, number));
        let fixture = Fixture::new(dir.path(), level, &[&warm]).await;
        fixture.save_through(&warm, id, Quality::Balanced).await;
        // In host memory, on the device, after a restart, and copied to host memory from there.
        let fixture = fixture.restart(level).await;
        let cold = host(1, 8);
        for host in [&warm, &cold, &cold] {
            for accept in [Quality::Exact, Quality::Transparent] {
                let served = fixture.served(host, id, accept).await;
                assert_eq!(served, Err(Miss::Quality));
                let located = fixture.located(host, id, accept).await;
                assert_eq!(located, Err(Miss::Quality));
            }
            let served = fixture.served(host, id, Quality::Balanced).await.unwrap();
            assert_eq!(served.1, 0.0);
        }
        // Saved again the same way, it is there; saved after an exact prefix, it is replaced.
        let stored = fixture.stored(id).await;
        fixture.save_through(&cold, id, Quality::Balanced).await;
        assert_eq!(fixture.stored(id).await, stored);
        assert!(!fixture.tiers.durable(&cold, id, Quality::Exact).await);
        fixture.save_values(&cold, id).await;
        assert_eq!(fixture.stored(id).await, (level, Quality::Exact));
        let served = fixture.served(&host(1, 8), id, Quality::Exact).await;
        assert_eq!(served, Ok((level, 0.0)));
        // And what is better stays.
        fixture.save_through(&cold, id, Quality::Balanced).await;
        fixture.save_through(&host(1, 8), id, Quality::Small).await;
        assert_eq!(fixture.stored(id).await, (level, Quality::Exact));
        fixture.tiers.disk().unwrap().close().await;
    }
}

// Goal: A3: a lossy level of the disk is nothing to a namespace that did not ask for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_tolerates_nothing_is_stored_exactly_at_a_lossy_level() {
    let dir = tempfile::tempdir().unwrap();
    let (warm, cold) = (host(1, 8), host(1, 8));
    for (number, level) in [Level::INT8, Level::KIVI2, Level::FP8]
        .into_iter()
        .enumerate()
    {
        let fixture = Fixture::new(dir.path(), level, &[&warm]).await;
        let id = id(1, number as u32);
        fixture.save_values(&warm, id).await;
        assert_eq!(fixture.stored_level(id).await, Some(Level::LOSSLESS));
        let served = fixture.served(&cold, id, Quality::Any).await;
        assert_eq!(served, Ok((Level::LOSSLESS, 0.0)));
        fixture.tiers.disk().unwrap().close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_replaces_what_is_stored_worse_than_it_would_be_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (warm, cold) = (open_host(8), open_host(8));
    let fixture = Fixture::new(dir.path(), Level::INT8, &[&warm]).await;
    fixture.save_values(&warm, id(1, 1)).await;
    let present = |fixture: &Fixture| fixture.tiers.quality_of_saves(&cold, Quality::Exact);
    assert_eq!(
        present(&fixture),
        Quality::Any,
        "int8 is what a save would come to"
    );
    let fixture = fixture.restart(Level::LOSSLESS).await;
    let accept = present(&fixture);
    assert_eq!(
        fixture.located(&cold, id(1, 1), accept).await,
        Err(Miss::Quality)
    );
    assert!(
        !fixture.tiers.durable(&cold, id(1, 1), Quality::Exact).await,
        "a worse one is no answer"
    );
    fixture.save_values(&cold, id(1, 1)).await;
    assert_eq!(fixture.stored_level(id(1, 1)).await, Some(Level::LOSSLESS));
    // Better than it would be stored now: it stays.
    let fixture = fixture.restart(Level::INT8).await;
    let accept = present(&fixture);
    assert_eq!(
        fixture.located(&open_host(8), id(1, 1), accept).await,
        Ok(Tier::Disk)
    );
    // Also when somebody saves it without having asked.
    fixture.save_values(&open_host(8), id(1, 1)).await;
    assert_eq!(fixture.stored_level(id(1, 1)).await, Some(Level::LOSSLESS));
}

pub(super) fn coding(level: Level, tables: &[Profile]) -> Coding {
    let dir = tempfile::tempdir().unwrap();
    let write = |(number, profile): (usize, &Profile)| {
        let path = dir.path().join(format!("{number}.kvtables"));
        std::fs::write(path, profile.to_bytes().unwrap()).unwrap();
    };
    tables.iter().enumerate().for_each(write);
    let tables: Vec<Tables> = crate::tier::tables::load(&[dir.path().to_owned()]).unwrap();
    Coding {
        tables,
        ..Coding::from(level)
    }
}

// Goal: tables that are away cost misses and nothing else; a save does not wait for them.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_whose_tables_are_not_loaded_is_a_miss_until_they_are_or_it_is_replaced() {
    use crate::tier::tables::tests::profile;
    let dir = tempfile::tempdir().unwrap();
    let (own, other) = (profile(8, 0.05), profile(8, 0.1));
    let warm = open_host(8);
    let own = coding(Level::BALANCED, &[own]);
    let fixture = Fixture::new(dir.path(), own.clone(), &[&warm]).await;
    let _ = fixture.tiers.codecs().of(&fixture.layouts);
    fixture.save_values(&warm, id(1, 1)).await;
    assert_eq!(fixture.stored_level(id(1, 1)).await, Some(Level::BALANCED));
    let other = coding(Level::BALANCED, &[other]);
    let mut fixture = fixture;
    for without in [Coding::from(Level::LOSSLESS), other.clone()] {
        fixture = fixture.restart(without).await;
        let _ = fixture.tiers.codecs().of(&fixture.layouts);
        let cold = open_host(8);
        for _ in 0..2 {
            let served = fixture.served(&cold, id(1, 1), Quality::Any).await;
            assert_eq!(served, Err(Miss::NoTables));
        }
        let located = fixture.located(&cold, id(1, 1), Quality::Any).await;
        assert_eq!(located, Err(Miss::NoTables));
        let damaged = fixture.metrics.counters().into_iter();
        let damaged = damaged.filter(|(name, _)| name.starts_with("kvtier_corrupt"));
        assert_eq!(damaged.map(|(_, count)| count).sum::<f64>(), 0.0);
        fixture = fixture.restart(own.clone()).await;
        let served = fixture.served(&cold, id(1, 1), Quality::Balanced).await;
        let (level, far) = served.unwrap();
        assert!(level == Level::BALANCED && far < 0.2, "{far}");
        assert_eq!(
            fixture.served(&cold, id(1, 1), Quality::Transparent).await,
            Err(Miss::Quality)
        );
    }
    // With other tables of the same level, a save of the block goes over the record.
    fixture = fixture.restart(other).await;
    let _ = fixture.tiers.codecs().of(&fixture.layouts);
    let cold = open_host(8);
    let served = fixture.served(&cold, id(1, 1), Quality::Any).await;
    assert_eq!(served, Err(Miss::NoTables));
    assert!(!fixture.tiers.durable(&cold, id(1, 1), Quality::Exact).await);
    fixture.save_values(&cold, id(1, 1)).await;
    let served = fixture
        .served(&open_host(8), id(1, 1), Quality::Balanced)
        .await;
    assert!(served.is_ok(), "{served:?}");
}

// Goal: the index is believed only as far as a record says the same. Of a level that is worse than
// the index says, bytes would pass as exact.
// Method: noise, which int8 keeps as it is behind a header: a record that is long enough to be read
// as raw.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_of_another_level_than_the_index_says_is_a_miss() {
    let dir = tempfile::tempdir().unwrap();
    let (warm, cold) = (open_host(8), open_host(8));
    let fixture = Fixture::new(dir.path(), Level::INT8, &[&warm]).await;
    fixture.save_durable(&warm, id(1, 1)).await;
    let disk = fixture.tiers.disk().unwrap();
    let found = disk.find(vec![id(1, 1)]).await[0].unwrap();
    assert_eq!(found.level, Level::INT8);
    let load = async |level| {
        let mut lying = found;
        lying.stored.level = level;
        let tiers = &fixture.tiers;
        let loaded = tiers.load_once(&cold, disk, &fixture.layouts, id(1, 1), &lying);
        loaded.await.map(|block| block.level())
    };
    assert_eq!(load(Level::INT8).await, Ok(Level::INT8));
    for level in [Level::RAW, Level::LOSSLESS, Level::INT4] {
        assert_eq!(load(level).await, Err(Miss::WrongKey), "{level}");
    }
}

fn cold_coding() -> Coding {
    let cold = Cold {
        level: Level::INT8,
        after: Duration::from_millis(50),
        rate: Bytes::gib(1),
    };
    Coding {
        cold: Some(cold),
        ..Coding::from(Level::LOSSLESS)
    }
}

impl Fixture {
    /// A record of a block of values.
    async fn image(&self, id: BlockId, level: Level) -> RecordImage {
        let codecs = self.tiers.codecs().of(&self.layouts);
        let codec = codecs.get(level).unwrap();
        let facts = BlockFacts {
            parent: BlockKey::ROOT,
            position: 0,
            through: Quality::Exact,
            fingerprint: self.layouts.fingerprint(),
            layout: self.layouts.get(id.kind, TOKENS, 0).unwrap(),
            order: PartOrder::TokenMajor,
        };
        let bound = codec::image_bound(codec, &facts).unwrap();
        let room = self
            .tiers
            .scratch()
            .take(bound.image_len as usize, Line::Save);
        let payload = values(&id);
        let source = Source {
            id,
            facts: &facts,
            payload: &payload,
        };
        codec::encode(codec, source, room.await.unwrap(), 1)
            .unwrap()
            .0
    }
}

// Goal: a block that somebody used or pinned while it was being encoded again stays as it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_block_that_was_used_or_pinned_since_it_was_found_cold_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let warm = open_host(16);
    let mut coding = cold_coding();
    coding.cold.as_mut().unwrap().after = Duration::from_millis(1500);
    let fixture = Fixture::new(dir.path(), coding, &[&warm]).await;
    for number in 0..12 {
        fixture.save_values(&warm, id(1, number)).await;
    }
    let disk = fixture.tiers.disk().unwrap();
    let limit = Instant::now() + Duration::from_secs(30);
    let cold = loop {
        let (_, cold) = disk.cold_after(Device::FIRST, 0).await.unwrap_or_default();
        if cold.len() >= 4 || Instant::now() > limit {
            break cold;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let recode = async |at: usize| {
        let block = BlockId {
            namespace: cold[at].namespace,
            kind: cold[at].kind,
            key: cold[at].key,
        };
        let found = disk.find(vec![block]).await[0].unwrap();
        let image = fixture.image(block, Level::INT8).await;
        let done = disk.recode(image, &found, warm.lives(), warm.life()).await;
        (done.is_ok(), fixture.stored_level(block).await.unwrap())
    };
    let id_of = |at: usize| BlockId {
        namespace: cold[at].namespace,
        kind: cold[at].kind,
        key: cold[at].key,
    };
    disk.pin(vec![id_of(1)], Some(Duration::from_secs(60)))
        .await;
    fixture.save_values(&open_host(4), id_of(2)).await;
    let read = fixture
        .served(&open_host(4), id_of(3), Quality::Exact)
        .await;
    assert_eq!(read, Ok((Level::LOSSLESS, 0.0)));
    assert_eq!(recode(0).await, (true, Level::INT8));
    for at in 1..4 {
        assert_eq!(recode(at).await, (false, Level::LOSSLESS), "{at}");
    }
}

// Goal: cold blocks go down where that is tolerated, none is lost, and a restart in the middle
// changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn cold_blocks_are_re_encoded_in_the_background_and_none_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let warm = open_host(16);
    let mut fixture = Fixture::new(dir.path(), cold_coding(), &[&warm]).await;
    for number in 0..12 {
        fixture.save_values(&warm, id(1, number)).await;
    }
    for life in 0..3 {
        let _ = fixture.tiers.codecs().of(&fixture.layouts);
        // In host memory is nothing of them: nobody uses them.
        let hosts = vec![open_host(16)];
        let recoding = tokio::spawn(Arc::clone(&fixture.tiers).recode_cold(hosts));
        let done = || fixture.metrics.recoded_blocks.of(Recoded::Done).get();
        let limit = Instant::now() + Duration::from_secs(30);
        while life == 0 && done() < 3 && Instant::now() < limit {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(life > 0 || done() >= 3, "{}", done());
        recoding.abort();
        fixture = fixture.restart(cold_coding()).await;
    }
    let cold = open_host(16);
    let mut lossy = 0;
    for number in 0..12 {
        let served = fixture.served(&cold, id(1, number), Quality::Any).await;
        let (level, far) = served.unwrap();
        match level {
            Level::INT8 => assert!(far > 0.0 && far < 0.05, "{far}"),
            level => assert_eq!((level, far), (Level::LOSSLESS, 0.0)),
        }
        lossy += u32::from(level == Level::INT8);
    }
    assert!(lossy >= 3, "{lossy}");
}

#[tokio::test(flavor = "multi_thread")]
async fn cold_blocks_of_a_namespace_that_tolerates_nothing_and_blocks_in_use_stay() {
    let dir = tempfile::tempdir().unwrap();
    let (closed, used) = (host(1, 16), open_host(16));
    let fixture = Fixture::new(dir.path(), cold_coding(), &[&closed]).await;
    let _ = fixture.tiers.codecs().of(&fixture.layouts);
    for number in 0..12 {
        fixture.save_values(&closed, id(1, number)).await;
    }
    let recoding = Arc::clone(&fixture.tiers).recode_cold(vec![host(1, 16)]);
    let _ = timeout(Duration::from_millis(900), recoding).await;
    let counted = |outcome| fixture.metrics.recoded_blocks.of(outcome).get();
    assert_eq!((counted(Recoded::Done), counted(Recoded::InUse)), (0, 0));
    // The same blocks, tolerated, but in host memory.
    for number in 0..12 {
        let served = fixture.served(&used, id(1, number), Quality::Exact).await;
        assert_eq!(served, Ok((Level::LOSSLESS, 0.0)));
    }
    let recoding = Arc::clone(&fixture.tiers).recode_cold(vec![used]);
    let _ = timeout(Duration::from_millis(900), recoding).await;
    assert_eq!(counted(Recoded::Done), 0);
    assert!(counted(Recoded::InUse) > 0);
    for number in 0..12 {
        let level = fixture.stored_level(id(1, number)).await;
        assert_eq!(level, Some(Level::LOSSLESS));
    }
}
