//! What the daemon calls a block: its identity, its facts, and its bytes in host memory.
//!
//! Upstairs:   sessions, restores and tiers.
//! Downstairs: `kvtier_store::mem` holds the bytes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::layout::LayoutError;
use kvtier_proto::limits::BLOCK_TOKENS_MAX;
use kvtier_proto::{
    BlockKey, BlockLayout, LayoutFingerprint, Level, ModelDescriptor, NamespaceId, PayloadKind,
    Quality,
};
use kvtier_store::mem::IoBuf;

/// Identity of a stored block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId {
    /// Whose it is.
    pub namespace: NamespaceId,
    /// What its bytes are.
    pub kind: PayloadKind,
    /// Which tokens it stands for.
    pub key: BlockKey,
}

/// Domain of the names of records that do not hold attention KV.
const RECORD_KEY_CONTEXT: &str = "kvtier 2026 record key of a kind";

impl BlockId {
    /// Name of the record that holds this block on a device. The store keeps one record a name,
    /// and blocks of one key but different kinds (its KV, its hidden states) live side by side:
    /// KV is named by the key itself, every other kind by a hash of kind and key.
    pub fn record_key(&self) -> BlockKey {
        if self.kind == PayloadKind::Kv {
            return self.key;
        }
        let mut hash = blake3::Hasher::new_derive_key(RECORD_KEY_CONTEXT);
        hash.update(&[self.kind as u8]);
        hash.update(self.key.as_bytes());
        BlockKey(*hash.finalize().as_bytes())
    }
}

/// Facts about a block that every tier keeps.
#[derive(Debug, Clone)]
pub struct BlockFacts {
    /// Key of the block before; [`BlockKey::ROOT`] for the first.
    pub parent: BlockKey,
    /// Index of the first token in the prefix.
    pub position: u32,
    /// Layout the bytes were written for.
    pub fingerprint: LayoutFingerprint,
    /// Where the parts lie in the payload; also says how many tokens.
    pub layout: Arc<BlockLayout>,
    /// Order of the elements of a part.
    pub order: PartOrder,
    /// What its bytes were made of before they were saved: no better than that are they.
    pub through: Quality,
}

/// A block that is to come.
#[derive(Debug, Clone)]
pub struct PlannedBlock {
    /// Identity.
    pub id: BlockId,
    /// Facts.
    pub facts: BlockFacts,
}

/// Layouts kept besides those of full blocks. A prefix ends in one short block, so that few
/// lengths are in use at a time; more are made again whenever they are asked for.
const SHORT_LAYOUTS_KEPT: usize = 64;

/// Layouts of one model's blocks: those of full blocks, and some of shorter ones, are made once.
#[derive(Debug)]
pub struct Layouts {
    model: ModelDescriptor,
    fingerprint: LayoutFingerprint,
    made: Mutex<HashMap<(PayloadKind, u32), Arc<BlockLayout>>>,
}

impl Layouts {
    /// Layouts of `model`, which has been validated.
    pub fn new(model: ModelDescriptor) -> Self {
        let fingerprint = model.fingerprint();
        Self {
            model,
            fingerprint,
            made: Mutex::default(),
        }
    }

    /// The model.
    pub fn model(&self) -> &ModelDescriptor {
        &self.model
    }

    /// Hash of the model's layout.
    pub fn fingerprint(&self) -> LayoutFingerprint {
        self.fingerprint
    }

    /// Layout of a block of `tokens` tokens. `opaque_bytes` above 0 is the size of an opaque
    /// payload that the descriptor says nothing of; it counts for [`PayloadKind::Opaque`] only.
    pub fn get(
        &self,
        kind: PayloadKind,
        tokens: u32,
        opaque_bytes: u64,
    ) -> Result<Arc<BlockLayout>, LayoutError> {
        let max = self.model.block_tokens.min(BLOCK_TOKENS_MAX);
        if tokens == 0 || tokens > max {
            return Err(LayoutError::Tokens { tokens, max });
        }
        if kind == PayloadKind::Opaque && opaque_bytes > 0 {
            return BlockLayout::opaque(tokens, opaque_bytes).map(Arc::new);
        }
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(layout) = made.get(&(kind, tokens)) {
            return Ok(Arc::clone(layout));
        }
        let layout = Arc::new(BlockLayout::new(&self.model, kind, tokens)?);
        if tokens == max || made.len() < SHORT_LAYOUTS_KEPT {
            made.insert((kind, tokens), Arc::clone(&layout));
        }
        Ok(layout)
    }
}

/// A raw block in a namespace's host arena: what the host tier keeps. Its bytes never change.
#[derive(Debug)]
pub struct RawBlock {
    id: BlockId,
    facts: BlockFacts,
    level: Level,
    image: IoBuf,
    payload_at: usize,
}

impl RawBlock {
    /// Identity.
    pub fn id(&self) -> BlockId {
        self.id
    }

    /// Facts.
    pub fn facts(&self) -> &BlockFacts {
        &self.facts
    }

    /// The level that its bytes went through in this daemon: they are no better than that.
    pub fn level(&self) -> Level {
        self.level
    }

    /// How good its bytes are.
    pub fn quality(&self) -> Quality {
        self.level.quality().max(self.facts.through)
    }

    /// The raw payload.
    pub fn payload(&self) -> &[u8] {
        let end = self.payload_at + self.facts.layout.payload_len();
        self.image.get(self.payload_at..end).unwrap_or_default()
    }

    /// Offset of the payload in the arena. Unit: bytes.
    pub fn arena_offset(&self) -> usize {
        self.image.offset() + self.payload_at
    }

    /// Number of this use of the place in the arena.
    pub fn generation(&self) -> u64 {
        self.image.generation()
    }

    /// Arena memory it takes. Unit: bytes.
    pub fn footprint(&self) -> usize {
        self.image.len()
    }
}

/// Whoever lends blocks and wants to know when the last holder has gone.
pub trait Lender: std::fmt::Debug + Send + Sync {
    /// Nobody holds the block any more.
    fn returned(&self, id: BlockId);
}

/// A raw block in somebody's hands: a lease, a restore, a write. While any of its `Arc`s lives
/// the block stays where it is; the drop of the last one tells the lender.
#[derive(Debug)]
pub struct HostBlock {
    // Dropped in this order: what the lender hears of is gone already.
    raw: Arc<RawBlock>,
    _lent: Option<Lent>,
}

#[derive(Debug)]
struct Lent {
    lender: Arc<dyn Lender>,
    id: BlockId,
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.lender.returned(self.id);
    }
}

impl HostBlock {
    /// A new block as somebody saved it. See [`HostBlock::restored`].
    pub fn new(id: BlockId, facts: BlockFacts, image: IoBuf, payload_at: usize) -> Option<Self> {
        Self::restored(id, facts, Level::RAW, (image, payload_at))
    }

    /// A new block, which is nobody's yet, from a record of `level`. `image` holds the payload from
    /// `payload_at` on. `None` when it is too short for it.
    pub fn restored(
        id: BlockId,
        facts: BlockFacts,
        level: Level,
        (image, payload_at): (IoBuf, usize),
    ) -> Option<Self> {
        let end = payload_at.checked_add(facts.layout.payload_len())?;
        let raw = RawBlock {
            id,
            facts,
            level,
            image,
            payload_at,
        };
        (end <= raw.image.len()).then(|| Self {
            raw: Arc::new(raw),
            _lent: None,
        })
    }

    /// A block that `lender` keeps and hands out.
    pub fn lent(raw: Arc<RawBlock>, lender: Arc<dyn Lender>) -> Self {
        let id = raw.id;
        Self {
            raw,
            _lent: Some(Lent { lender, id }),
        }
    }

    /// The block itself, without the hold on it.
    pub fn raw(&self) -> &Arc<RawBlock> {
        &self.raw
    }
}

impl std::ops::Deref for HostBlock {
    type Target = RawBlock;

    fn deref(&self) -> &RawBlock {
        &self.raw
    }
}

#[cfg(test)]
mod tests;
