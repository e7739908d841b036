//! What the daemon calls a block: its identity, its facts, and its bytes in host memory.
//!
//! Upstairs:   sessions, restores and tiers.
//! Downstairs: `kvtier_store::mem` holds the bytes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::layout::LayoutError;
use kvtier_proto::{
    BlockKey, BlockLayout, LayoutFingerprint, ModelDescriptor, NamespaceId, PayloadKind,
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
}

/// A block that is to come.
#[derive(Debug, Clone)]
pub struct PlannedBlock {
    /// Identity.
    pub id: BlockId,
    /// Facts.
    pub facts: BlockFacts,
}

/// Layouts of one model's blocks: made once for each kind and length.
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
        if kind == PayloadKind::Opaque && opaque_bytes > 0 {
            return BlockLayout::opaque(tokens, opaque_bytes).map(Arc::new);
        }
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(layout) = made.get(&(kind, tokens)) {
            return Ok(Arc::clone(layout));
        }
        let layout = Arc::new(BlockLayout::new(&self.model, kind, tokens)?);
        made.insert((kind, tokens), Arc::clone(&layout));
        Ok(layout)
    }
}

/// A raw block in a namespace's host arena. Its bytes never change while anybody holds it.
#[derive(Debug)]
pub struct HostBlock {
    id: BlockId,
    facts: BlockFacts,
    image: IoBuf,
    payload_at: usize,
}

impl HostBlock {
    /// `image` holds the payload from `payload_at` on. `None` when it is too short for it.
    pub fn new(id: BlockId, facts: BlockFacts, image: IoBuf, payload_at: usize) -> Option<Self> {
        let end = payload_at.checked_add(facts.layout.payload_len())?;
        (end <= image.len()).then_some(Self {
            id,
            facts,
            image,
            payload_at,
        })
    }

    /// Identity.
    pub fn id(&self) -> BlockId {
        self.id
    }

    /// Facts.
    pub fn facts(&self) -> &BlockFacts {
        &self.facts
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

#[cfg(test)]
mod tests {
    use strum::IntoEnumIterator;

    use super::*;

    // Goal: saving the hidden states of a block never replaces its KV.
    #[test]
    fn record_key_differs_for_every_kind_and_key() {
        let mut seen = std::collections::BTreeSet::new();
        for (kind, byte) in PayloadKind::iter().flat_map(|kind| [(kind, 1u8), (kind, 2)]) {
            let id = BlockId {
                namespace: NamespaceId(1),
                kind,
                key: BlockKey([byte; 32]),
            };
            assert!(seen.insert(id.record_key()), "{id:?}");
        }
        let kv = BlockId {
            namespace: NamespaceId(1),
            kind: PayloadKind::Kv,
            key: BlockKey([7; 32]),
        };
        assert_eq!(
            kv.record_key(),
            kv.key,
            "an operator finds KV under its own key"
        );
    }
}
