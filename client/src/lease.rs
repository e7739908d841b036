//! A restored block: readable while its lease is held.
//!
//! Upstairs:   engines read it in place or copy it into their own buffers.
//! Downstairs: `shm` views of the arena, or bytes that came inline.
//!
//! The daemon leaves a leased slot alone until the lease is released or the session ends. When
//! the session ends first, and the daemon lives on, the slot may be reused: from the moment this
//! side knows, a block of the lost session cannot be read any more. For the moments before, ask
//! for the release to be confirmed ([`Session::release`]): a daemon that had taken a lease back
//! says so, and what was copied is discarded.
//!
//! Invariants kept here
//!   P1  A confirmed release proves that the block was right while it was read.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvtier_proto::limits::KEYS_PER_CALL_MAX;
use kvtier_proto::{BlockKey, BlockLayout, Level, PartCode, Quality, v1};

use crate::error::{Call, Error};
use crate::link::Link;
use crate::session::Session;
use crate::shm::LeasedView;
use crate::values::Tier;

const RELEASE: Call = Call::reads("Release");

/// Limit of a confirmed release that has no session at hand to ask for it.
const CONFIRM: Duration = Duration::from_secs(5);

/// Why a block cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The session that leased the block is lost, and the daemon may reuse its place. A buffer
    /// that was being copied into holds nothing of use. Restore again.
    #[error("the session that leased this block is lost; restore it again")]
    LeaseLost,
    /// The block has no such part.
    #[error("layer {layer} of this block has no part {code:?}")]
    NoSuchPart {
        /// Index of the layer.
        layer: u32,
        /// The part asked for.
        code: PartCode,
    },
    /// The layer stores nothing in this block.
    #[error("layer {layer} stores nothing in this block")]
    NoSuchPage {
        /// Index of the layer.
        layer: u32,
    },
    /// The target does not have the size of what is copied. Nothing was copied.
    #[error("a target of {given} bytes; accepted: exactly {wanted}")]
    WrongLength {
        /// Bytes to copy.
        wanted: usize,
        /// Bytes of the target.
        given: usize,
    },
}

impl From<ReadError> for Error {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::LeaseLost => Call::reads("reading a block").lost(error.to_string()),
            other => Error::invalid(other.to_string()),
        }
    }
}

pub(crate) enum Held {
    /// A view of the arena, and the link that keeps the lease.
    Arena(LeasedView, Arc<Link>),
    Owned(Bytes),
}

/// A block that can be read. Dropping it releases the lease in the background.
///
/// After [`release`](Self::release) it cannot be read:
///
/// ```compile_fail
/// # fn read(block: kvtier_client::LeasedBlock) {
/// block.release();
/// block.payload();
/// # }
/// ```
///
/// and what was borrowed from it cannot stay:
///
/// ```compile_fail
/// # fn read(block: kvtier_client::LeasedBlock) {
/// let bytes = block.payload().unwrap();
/// block.release();
/// println!("{}", bytes.len());
/// # }
/// ```
pub struct LeasedBlock {
    index: usize,
    key: BlockKey,
    tier: Tier,
    level: Level,
    quality: Quality,
    layout: Arc<BlockLayout>,
    held: Held,
}

impl LeasedBlock {
    pub(crate) fn new(
        (index, key): (usize, BlockKey),
        tier: Tier,
        (level, quality): (Level, Quality),
        layout: Arc<BlockLayout>,
        held: Held,
    ) -> Self {
        Self {
            index,
            key,
            tier,
            level,
            quality,
            layout,
            held,
        }
    }

    /// Index into the keys of the restore.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Name of the block.
    pub fn key(&self) -> BlockKey {
        self.key
    }

    /// Tokens in the block.
    pub fn tokens(&self) -> u32 {
        self.layout.tokens()
    }

    /// Where the daemon found it.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// How good its bytes are, never worse than what the restore accepts. What is computed from
    /// them is no better.
    pub fn quality(&self) -> Quality {
        self.quality
    }

    /// Codec level it was stored with. Blocks served without being asked for a lossy level are
    /// exact, whatever the level.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Where each part lies in the payload.
    pub fn layout(&self) -> &BlockLayout {
        &self.layout
    }

    /// The payload, read in place. Units: `layout().payload_len()` bytes.
    /// Errors: [`ReadError::LeaseLost`]. Blocks: no.
    ///
    /// The bytes do not change while the lease lives. A caller that reads them for long and must
    /// know that the lease lived until the end confirms it with [`Session::release`].
    pub fn payload(&self) -> Result<&[u8], ReadError> {
        match &self.held {
            Held::Arena(view, _) => view.bytes().ok_or(ReadError::LeaseLost),
            Held::Owned(bytes) => Ok(bytes),
        }
    }

    /// One part, read in place. Errors: [`ReadError`]. Blocks: no.
    pub fn part(&self, layer: u32, code: PartCode) -> Result<&[u8], ReadError> {
        let part = self.layout.part(layer, code);
        let missing = ReadError::NoSuchPart { layer, code };
        let part = part.ok_or_else(|| missing.clone())?;
        let bytes = self.payload()?.get(part.offset..part.offset + part.len);
        bytes.ok_or(missing)
    }

    /// All parts of one layer, read in place. Errors: [`ReadError`]. Blocks: no.
    pub fn page(&self, layer: u32) -> Result<&[u8], ReadError> {
        let missing = || ReadError::NoSuchPage { layer };
        let page = self.layout.page(layer).ok_or_else(missing)?;
        self.payload()?.get(page).ok_or_else(missing)
    }

    /// Copies the payload. Units: `target` is exactly the payload's size.
    /// Errors: [`ReadError`]; after `LeaseLost` the target holds nothing of use.
    /// Blocks: for one copy.
    pub fn copy_into(&self, target: &mut [u8]) -> Result<(), ReadError> {
        self.copy(self.payload()?, target)
    }

    /// Copies one part. Units: `target` is exactly the part's size.
    /// Errors: [`ReadError`]; after `LeaseLost` the target holds nothing of use.
    /// Blocks: for one copy.
    pub fn copy_part_into(
        &self,
        layer: u32,
        code: PartCode,
        target: &mut [u8],
    ) -> Result<(), ReadError> {
        self.copy(self.part(layer, code)?, target)
    }

    /// Copies, and looks once more whether the lease lived until the copy was done.
    fn copy(&self, bytes: &[u8], target: &mut [u8]) -> Result<(), ReadError> {
        let (wanted, given) = (bytes.len(), target.len());
        if wanted != given {
            return Err(ReadError::WrongLength { wanted, given });
        }
        target.copy_from_slice(bytes);
        self.payload().map(|_| ())
    }

    /// Ends reading and gives the lease back in the background; the same as dropping.
    /// [`Session::release`] confirms it.
    pub fn release(self) {
        drop(self);
    }
}

impl std::fmt::Debug for LeasedBlock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LeasedBlock")
            .field("index", &self.index)
            .field("key", &self.key)
            .field("tier", &self.tier)
            .field("level", &self.level)
            .field("bytes", &self.layout.payload_len())
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Gives leases back and confirms that all were alive until now (P1).
    ///
    /// `Ok` proves that everything read or copied from these blocks was right and whole.
    /// Errors: `LeaseLost`, `SessionLost`, `Timeout`: discard what was read.
    /// Cancel safety: the leases are released or die with the session. Blocks: no.
    ///
    /// ```no_run
    /// # use kvtier_client::{Error, LeasedBlock, Session};
    /// # async fn done(session: Session, blocks: Vec<LeasedBlock>) -> Result<(), Error> {
    /// session.release(blocks).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn release(&self, blocks: Vec<LeasedBlock>) -> Result<(), Error> {
        let mut rest = blocks;
        while !rest.is_empty() {
            // Blocks of different links can meet here after a reconnect; each link confirms its
            // own, and a lost one cannot.
            let link = rest.iter().find_map(|block| match &block.held {
                Held::Arena(_, link) => Some(Arc::clone(link)),
                Held::Owned(_) => None,
            });
            let Some(link) = link else { break };
            let mine = |block: &LeasedBlock| match &block.held {
                Held::Arena(_, other) => Arc::ptr_eq(other, &link),
                Held::Owned(_) => true,
            };
            let (batch, others) = rest.into_iter().partition(mine);
            rest = others;
            release(&link, batch).await?;
        }
        Ok(())
    }
}

/// Confirmed release of blocks of one link.
pub(crate) async fn release(link: &Arc<Link>, blocks: Vec<LeasedBlock>) -> Result<(), Error> {
    let views = blocks.into_iter().filter_map(|block| match block.held {
        Held::Arena(view, _) => Some(view),
        Held::Owned(_) => None,
    });
    let mut guards: Vec<_> = views.map(LeasedView::into_lease).collect();
    while !guards.is_empty() {
        let batch = guards.split_off(guards.len().saturating_sub(KEYS_PER_CALL_MAX));
        let count = batch.len();
        let work = {
            let link = Arc::clone(link);
            // The names leave their guards only inside the task that sees the call through.
            async move {
                let leases = batch.into_iter().map(|guard| guard.take()).collect();
                let request = v1::ReleaseRequest {
                    session: link.session.clone(),
                    leases,
                    slots: Vec::new(),
                };
                let mut rpc = link.rpc.clone();
                let reply = link.answer(RELEASE, rpc.release(request)).await;
                // Leases that were neither released nor kept would stay with the daemon.
                reply.inspect_err(|error| link.life.lose(&error.to_string()))
            }
        };
        let reply = link.see_through(RELEASE, CONFIRM, work).await?;
        let released = usize::try_from(reply.released).unwrap_or(usize::MAX);
        if released < count {
            let lost = count - released;
            return Err(Error::LeaseLost { lost, of: count });
        }
    }
    Ok(())
}
