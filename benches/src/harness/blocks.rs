//! Models, blocks and payloads in which a wrong byte is always seen.
//!
//! Upstairs:   tests and crash campaigns save and restore these.
//! Downstairs: the SDK.
//!
//! A payload is a stream seeded by the block's key and kind: no two blocks, and no two places in
//! one block, hold the same bytes, so bytes of another block, place or time never pass.

use kvtier_client::{
    Acknowledge, BlockKey, Element, Error, LayerSpec, Miss, ModelDescriptor, PartOrder,
    PayloadKind, RestoreOptions, Rope, SaveBlock, SaveOutcome, Session, Shard, Tier,
};
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// Most blocks of one restore that `restore` asks for.
const RESTORE_MAX: usize = 512;

fn model(name: &str, layers: Vec<LayerSpec>) -> ModelDescriptor {
    ModelDescriptor {
        model: format!("kvtier-tests/{name}"),
        revision: "1".into(),
        weights_fingerprint: vec![7; 32],
        adapter: String::new(),
        element: Element::Bf16,
        layers,
        d_model: 128,
        rope: Some(Rope {
            theta: 10_000.0,
            rotary_dim: 32,
            rotate_half: true,
            scaling: String::new(),
        }),
        block_tokens: 16,
        order: PartOrder::TokenMajor,
        shard: Shard::WHOLE,
        k_after_rope: true,
    }
}

/// Grouped-query attention; a full block is 32 KiB.
pub fn gqa() -> ModelDescriptor {
    let layer = LayerSpec::Attention {
        kv_heads: 2,
        k_dim: 32,
        v_dim: 32,
        sliding_window: 0,
    };
    model("gqa", vec![layer; 8])
}

/// The same with blocks of 512 KiB.
pub fn wide() -> ModelDescriptor {
    let layer = LayerSpec::Attention {
        kv_heads: 8,
        k_dim: 128,
        v_dim: 128,
        sliding_window: 0,
    };
    model("wide", vec![layer; 8])
}

/// Latent attention, with and without a rope part.
pub fn mla() -> ModelDescriptor {
    let latent = |rope_dim| LayerSpec::Latent {
        latent_dim: 96,
        rope_dim,
    };
    model("mla", vec![latent(16), latent(16), latent(0)])
}

/// Everything at once: K and V of different widths, a window, shared KV, recurrent state, bytes
/// that only the engine understands.
pub fn hybrid() -> ModelDescriptor {
    let attention = |k_dim, v_dim, sliding_window| LayerSpec::Attention {
        kv_heads: 1,
        k_dim,
        v_dim,
        sliding_window,
    };
    let layers = vec![
        attention(48, 32, 0),
        attention(32, 32, 512),
        LayerSpec::SharesWith(0),
        LayerSpec::State { bytes: 5_003 },
        LayerSpec::Opaque {
            bytes_per_token: 3,
            bytes_per_block: 17,
        },
        LayerSpec::Latent {
            latent_dim: 8,
            rope_dim: 0,
        },
    ];
    model("hybrid", layers)
}

/// The payload of a block: half of every element's bits are random, so that level zstd finds
/// something and raw bytes never repeat.
pub fn payload(key: &BlockKey, kind: PayloadKind, len: usize) -> Vec<u8> {
    let mut seed = *key.as_bytes();
    seed[0] ^= kind as u8;
    let mut rng = ChaCha8Rng::from_seed(seed);
    let mut bytes = vec![0; len];
    rng.fill_bytes(&mut bytes);
    for high in bytes.iter_mut().skip(1).step_by(2) {
        *high = 0x3c | (*high & 3);
    }
    bytes
}

/// Blocks of one prefix of `tokens` tokens; the last one is short where they do not fit.
pub fn chain(session: &Session, seed: u64, tokens: usize, kind: PayloadKind) -> Vec<SaveBlock> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let ids: Vec<u32> = (0..tokens).map(|_| rng.random_range(0..50_000)).collect();
    let keys = session.prefix_keys(&ids, b"");
    SaveBlock::chain(&keys, tokens, session.model().block_tokens, kind)
}

/// Full blocks that follow nothing and that nothing follows.
pub fn loose(session: &Session, seed: u64, count: usize, kind: PayloadKind) -> Vec<SaveBlock> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut block = || {
        let mut key = [0; 32];
        rng.fill_bytes(&mut key);
        SaveBlock {
            key: BlockKey(key),
            parent: BlockKey::ROOT,
            position: 0,
            tokens: session.model().block_tokens,
            kind,
            opaque_bytes: 0,
        }
    };
    (0..count).map(|_| block()).collect()
}

/// Keys of blocks.
pub fn keys(blocks: &[SaveBlock]) -> Vec<BlockKey> {
    blocks.iter().map(|block| block.key).collect()
}

/// Saves blocks with their payloads.
pub async fn save(
    session: &Session,
    blocks: &[SaveBlock],
    wait: Acknowledge,
) -> Result<Vec<SaveOutcome>, Error> {
    let mut current: Option<(BlockKey, PayloadKind, Vec<u8>)> = None;
    let fill = |block: &SaveBlock, part: &kvtier_client::Part, bytes: &mut [u8]| {
        let same = |(key, kind, _): &(BlockKey, PayloadKind, Vec<u8>)| {
            (*key, *kind) == (block.key, block.kind)
        };
        if !current.as_ref().is_some_and(same) {
            let len = len_of(session, block);
            current = Some((block.key, block.kind, payload(&block.key, block.kind, len)));
        }
        let (_, _, whole) = current.as_ref().unwrap();
        bytes.copy_from_slice(&whole[part.offset..part.offset + part.len]);
    };
    session.save_blocks(blocks.to_vec(), wait, fill).await
}

fn len_of(session: &Session, block: &SaveBlock) -> usize {
    match block.opaque_bytes {
        0 => session
            .layout(block.kind, block.tokens)
            .unwrap()
            .payload_len(),
        bytes => usize::try_from(bytes).unwrap(),
    }
}

/// Saves blocks and insists that all are durable now.
pub async fn save_durable(session: &Session, blocks: &[SaveBlock]) {
    let outcomes = save(session, blocks, Acknowledge::Durable).await.unwrap();
    for (block, outcome) in blocks.iter().zip(&outcomes) {
        let stored = outcome.is_stored(Acknowledge::Durable);
        assert!(stored, "{} is not durable: {outcome:?}", block.key.short());
    }
    assert_eq!(outcomes.len(), blocks.len());
}

/// What a restore brought.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Index and tier of blocks that came back right and whole.
    pub hits: Vec<(usize, Tier)>,
    /// Index and reason of those that did not come.
    pub misses: Vec<(usize, Miss)>,
    /// Index of blocks that came back with bytes that are not theirs, and what was found.
    pub wrong: Vec<(usize, String)>,
    /// Leading blocks that came.
    pub usable: usize,
}

impl Found {
    /// Blocks that came from this tier.
    pub fn from(&self, tier: Tier) -> usize {
        self.hits.iter().filter(|(_, from)| *from == tier).count()
    }
}

/// Restores every block on its own and compares every byte. A wrong one ends the test.
pub async fn restore(session: &Session, blocks: &[SaveBlock]) -> Result<Found, Error> {
    look(session, blocks).await.map(right)
}

/// As [`restore`], but wrong blocks are counted and do not end anything.
pub async fn look(session: &Session, blocks: &[SaveBlock]) -> Result<Found, Error> {
    let mut all = Found::default();
    for (number, part) in blocks.chunks(RESTORE_MAX).enumerate() {
        let options = RestoreOptions::default().scattered();
        let found = look_with(session, part, options).await?;
        let base = number * RESTORE_MAX;
        let hits = found.hits.into_iter().map(|(at, tier)| (base + at, tier));
        all.hits.extend(hits);
        let misses = found.misses.into_iter().map(|(at, miss)| (base + at, miss));
        all.misses.extend(misses);
        let wrong = found.wrong.into_iter().map(|(at, what)| (base + at, what));
        all.wrong.extend(wrong);
        if all.usable == base {
            all.usable += found.usable;
        }
    }
    Ok(all)
}

/// Restores blocks of one kind as `options` say, and compares every byte.
pub async fn restore_with(
    session: &Session,
    blocks: &[SaveBlock],
    options: RestoreOptions,
) -> Result<Found, Error> {
    look_with(session, blocks, options).await.map(right)
}

/// What was found, where nothing of it is wrong.
fn right(found: Found) -> Found {
    if let Some((_, what)) = found.wrong.first() {
        panic!("{what}");
    }
    found
}

async fn look_with(
    session: &Session,
    blocks: &[SaveBlock],
    options: RestoreOptions,
) -> Result<Found, Error> {
    let kind = blocks[0].kind;
    assert!(blocks.iter().all(|block| block.kind == kind));
    let restore = session.restore(&keys(blocks), kind, options).await?;
    let mut found = Found::default();
    let visit = |leased: &kvtier_client::LeasedBlock, bytes: &[u8]| {
        let block = &blocks[leased.index()];
        assert_eq!(
            leased.tokens(),
            block.tokens,
            "tokens of {}",
            block.key.short()
        );
        match difference(session, block, bytes) {
            None => found.hits.push((leased.index(), leased.tier())),
            Some(what) => found.wrong.push((leased.index(), what)),
        }
    };
    let summary = restore.for_each(visit).await?;
    found.hits.sort_unstable();
    found.usable = summary.usable_blocks;
    found.misses = summary.missed;
    Ok(found)
}

/// Restores blocks and insists that all come back.
pub async fn restore_all(session: &Session, blocks: &[SaveBlock]) -> Found {
    let found = restore(session, blocks).await.unwrap();
    assert_eq!(found.misses, vec![], "of {} blocks", blocks.len());
    assert_eq!(found.hits.len(), blocks.len());
    assert_eq!(found.usable, blocks.len());
    found
}

/// Compares bytes with what the block was saved with.
pub fn check(session: &Session, block: &SaveBlock, bytes: &[u8]) {
    if let Some(what) = difference(session, block, bytes) {
        panic!("{what}");
    }
}

/// Says how bytes differ from what the block was saved with.
fn difference(session: &Session, block: &SaveBlock, bytes: &[u8]) -> Option<String> {
    let wanted = payload(&block.key, block.kind, len_of(session, block));
    if bytes == wanted {
        return None;
    }
    let differs = |(a, b): (&u8, &u8)| a != b;
    let first = bytes.iter().zip(&wanted).position(differs);
    let wrong = bytes.iter().zip(&wanted).filter(|(a, b)| a != b).count();
    Some(format!(
        "WRONG BYTES in block {}: {} of {}, the first at {first:?}; wanted {} bytes",
        block.key.short(),
        wrong,
        bytes.len(),
        wanted.len()
    ))
}
