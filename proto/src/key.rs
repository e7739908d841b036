//! Block keys: 32 bytes that name one block of one prefix in one namespace.
//!
//! Upstairs:   the SDK derives keys; daemon and store only compare them.
//! Downstairs: BLAKE3 in keyed mode.
//!
//! `key[i] = BLAKE3-keyed(secret, fields(layout, adapter, extra, key[i-1], tokens[i]))`.
//! Every field is a tag byte, a 64-bit length and its bytes, so two different lists of fields
//! never feed the hash the same input (vLLM#44701 shows what happens otherwise).
//! The secret belongs to the namespace: the same prompt in two namespaces has unrelated keys,
//! and nobody who lacks the secret can compute or probe for a key.
//!
//! Invariants kept here
//!   K1  Two different (secret, layout, adapter, extra, parent, tokens) give different keys,
//!       up to a collision of a 256-bit hash.

use std::fmt;

/// Domain separation: changed whenever the list of fields or their order changes.
const DOMAIN: &[u8] = b"kvtier block key v1";

/// 32-byte name of a block. Compared whole on every read.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockKey(pub [u8; 32]);

impl BlockKey {
    /// Parent of the first block of a prefix.
    pub const ROOT: BlockKey = BlockKey([0; 32]);

    /// Reads a key from the wire. `None` unless exactly 32 bytes.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The bytes of the key.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// First 8 hex digits: the only part that logs show.
    pub fn short(&self) -> String {
        self.0
            .iter()
            .take(4)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// Reads 64 hex digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut key = [0u8; 32];
        // Digits only: the parser below would also take a sign.
        if text.len() != 64 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        for (at, byte) in key.iter_mut().enumerate() {
            *byte = u8::from_str_radix(text.get(at * 2..at * 2 + 2)?, 16).ok()?;
        }
        Some(Self(key))
    }

    /// All 64 hex digits, for operators' tools.
    pub fn to_hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl fmt::Debug for BlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockKey({}..)", self.short())
    }
}

impl fmt::Display for BlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.short())
    }
}

/// 32-byte hash of everything that decides what a block's bytes mean.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayoutFingerprint(pub [u8; 32]);

impl LayoutFingerprint {
    /// First 8 hex digits, for logs and tables.
    pub fn short(&self) -> String {
        BlockKey(self.0).short()
    }
}

impl fmt::Debug for LayoutFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LayoutFingerprint({}..)", self.short())
    }
}

/// Secret of a namespace that keys are derived under. Never printed, never logged.
#[derive(Clone, PartialEq, Eq)]
pub struct KeySecret([u8; 32]);

impl KeySecret {
    /// Wraps 32 secret bytes.
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes, for the one reply that hands them to an authenticated peer.
    pub const fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for KeySecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeySecret(hidden)")
    }
}

/// Derives the keys of one model layout and adapter in one namespace.
#[derive(Debug, Clone)]
pub struct KeyDeriver {
    secret: KeySecret,
    layout: LayoutFingerprint,
    adapter: String,
}

impl KeyDeriver {
    /// `adapter` is the LoRA adapter's identity, empty for the base model.
    pub fn new(secret: KeySecret, layout: LayoutFingerprint, adapter: impl Into<String>) -> Self {
        Self {
            secret,
            layout,
            adapter: adapter.into(),
        }
    }

    /// The same for another adapter of the same model: an engine that serves several has one
    /// session for all.
    #[must_use]
    pub fn with_adapter(&self, adapter: impl Into<String>) -> Self {
        Self::new(self.secret.clone(), self.layout, adapter)
    }

    /// Key of the block that follows `parent` ([`BlockKey::ROOT`] for the first) and holds
    /// `tokens`. `extra` carries whatever else tells blocks apart: a cache salt, hashes of
    /// images, the engine's own block hash.
    pub fn derive(&self, parent: &BlockKey, tokens: &[u32], extra: &[u8]) -> BlockKey {
        let mut hash = blake3::Hasher::new_keyed(&self.secret.0);
        hash.update(DOMAIN);
        field(&mut hash, b'l', &self.layout.0);
        field(&mut hash, b'a', self.adapter.as_bytes());
        field(&mut hash, b'x', extra);
        field(&mut hash, b'p', &parent.0);
        hash.update(b"t");
        hash.update(&(tokens.len() as u64 * 4).to_le_bytes());
        let mut buffer = [0u8; 1024];
        for run in tokens.chunks(buffer.len() / 4) {
            for (token, place) in run.iter().zip(buffer.chunks_exact_mut(4)) {
                place.copy_from_slice(&token.to_le_bytes());
            }
            hash.update(buffer.get(..run.len() * 4).unwrap_or_default());
        }
        BlockKey(*hash.finalize().as_bytes())
    }

    /// Keys of all blocks of `tokens`, `block_tokens` a block; the last block may be short.
    /// `extra` goes into every block.
    pub fn chain(&self, tokens: &[u32], block_tokens: usize, extra: &[u8]) -> Vec<BlockKey> {
        let mut parent = BlockKey::ROOT;
        tokens
            .chunks(block_tokens.max(1))
            .map(|block| {
                parent = self.derive(&parent, block, extra);
                parent
            })
            .collect()
    }
}

/// Adds one tagged, length-prefixed field to a hash.
pub(crate) fn field(hash: &mut blake3::Hasher, tag: u8, bytes: &[u8]) {
    hash.update(&[tag]);
    hash.update(&(bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

#[cfg(test)]
mod tests;
