//! Tests of the exact level across layers, whose blocks need tables of their model.

use kvtier_kernels::fuzzing::profile::exact_fixture;
use kvtier_kernels::profile::Profile;
use kvtier_proto::Quality;

use super::quality::coding;
use super::*;

/// Tables of the test model that keep so many tokens as they are: other ones for each number.
fn profile(sinks: u32) -> Profile {
    Profile {
        model: "test".into(),
        revision: String::new(),
        weights_fingerprint: Vec::new(),
        sinks,
        ..exact_fixture(8, 2, 32).unwrap()
    }
}

/// Values as the tables expect them, other ones for each block.
fn values(id: &BlockId) -> Vec<u8> {
    let bytes = payload(id, PAYLOAD);
    let value = |pair: &[u8]| {
        let sum = f32::from(pair[0]) + f32::from(pair[1]);
        let [_, _, low, high] = (0.5 + sum / 2048.0).to_le_bytes();
        [low, high]
    };
    bytes.chunks(2).flat_map(value).collect()
}

impl Fixture {
    /// With the model known, as when a session of it is open.
    async fn of_model(self, coding: Coding) -> Self {
        let fixture = self.restart(coding).await;
        let _ = fixture.tiers.codecs().of(&fixture.layouts);
        fixture
    }

    async fn keep(&self, host: &Arc<HostTier>, id: BlockId) -> Level {
        let facts = BlockFacts {
            parent: BlockKey::ROOT,
            position: 0,
            through: Quality::Exact,
            fingerprint: self.layouts.fingerprint(),
            layout: self.layouts.get(id.kind, TOKENS, 0).unwrap(),
            order: PartOrder::TokenMajor,
        };
        let planned = PlannedBlock { id, facts };
        let saved = self.tiers.save(host, planned, values(&id), None).await;
        drop(saved.unwrap());
        assert!(self.tiers.durable(host, id, Quality::Exact).await, "{id:?}");
        let found = self.tiers.disk().unwrap().find(vec![id]).await;
        found[0].unwrap().level
    }

    /// The level of a block that a cold host restores bit by bit.
    async fn restored(&self, id: BlockId) -> Result<Level, Miss> {
        let (cold, accept) = (host(1, 8), Quality::Exact);
        let (block, tier) = self.tiers.fetch(&cold, &self.layouts, id, accept).await?;
        assert!(tier == Tier::Disk && block.payload() == values(&id));
        Ok(block.level())
    }
}

// Goal: the level is exact for a namespace that tolerates no loss, and its tables, when they are
// away, cost misses and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn a_block_predicted_across_layers_comes_back_bit_by_bit_or_is_a_miss_without_its_tables() {
    let dir = tempfile::tempdir().unwrap();
    let own = coding(Level::LOSSLESS_X, &[profile(0)]);
    let other = coding(Level::LOSSLESS_X, &[profile(1)]);
    let fixture = Fixture::new(dir.path(), Level::LOSSLESS, &[]).await;
    let mut fixture = fixture.of_model(own.clone()).await;
    let level = fixture.keep(&host(1, 8), id(1, 1)).await;
    assert_eq!(level, Level::LOSSLESS_X);
    let found = fixture.tiers.disk().unwrap().find(vec![id(1, 1)]).await;
    let len = found[0].unwrap().place.len as usize;
    assert!(len < RECORD * 9 / 10, "it is coded: {len}");
    assert_eq!(fixture.restored(id(1, 1)).await, Ok(Level::LOSSLESS_X));
    for without in [Coding::from(Level::LOSSLESS), other.clone()] {
        fixture = fixture.of_model(without).await;
        for _ in 0..2 {
            let restored = fixture.restored(id(1, 1)).await;
            assert_eq!(restored, Err(Miss::NoTables));
        }
        let (cold, keys) = (host(1, 8), [id(1, 1).key]);
        let kind = PayloadKind::Kv;
        let found = fixture
            .tiers
            .locate(&cold, kind, &keys, false, Quality::Exact);
        assert_eq!(found.await[0].map(Located::tier), Err(Miss::NoTables));
        let counters = fixture.metrics.counters().into_iter();
        let damaged = counters.filter(|(name, _)| name.starts_with("kvtier_corrupt"));
        assert_eq!(damaged.map(|(_, count)| count).sum::<f64>(), 0.0);
        fixture = fixture.of_model(own.clone()).await;
        assert_eq!(fixture.restored(id(1, 1)).await, Ok(Level::LOSSLESS_X));
    }
    // A save of the block with other tables goes over the record.
    fixture = fixture.of_model(other.clone()).await;
    assert_eq!(fixture.restored(id(1, 1)).await, Err(Miss::NoTables));
    fixture.keep(&host(1, 8), id(1, 1)).await;
    assert_eq!(fixture.restored(id(1, 1)).await, Ok(Level::LOSSLESS_X));
    fixture = fixture.of_model(own).await;
    assert_eq!(fixture.restored(id(1, 1)).await, Err(Miss::NoTables));
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_are_stored_as_lossless_where_no_tables_of_their_model_are() {
    let dir = tempfile::tempdir().unwrap();
    let mut another = profile(0);
    another.model = "another".into();
    let fixture = Fixture::new(dir.path(), Level::LOSSLESS, &[]).await;
    let of = coding(Level::LOSSLESS_X, &[another]);
    let fixture = fixture.of_model(of).await;
    let level = fixture.keep(&host(1, 8), id(1, 1)).await;
    assert_eq!(level, Level::LOSSLESS);
    assert_eq!(fixture.restored(id(1, 1)).await, Ok(Level::LOSSLESS));
}
