//! The inline plane: payload in gRPC streams, for connections that cannot share memory.
//!
//! Upstairs:   `restore` and `save` fall back to it; `put_inline` and `get_inline` ask for it.
//! Downstairs: `GetInline` and `PutInline`.
//!
//! Invariants kept here
//!   I1  Nothing is allocated by a length that its layout does not have.
//!   I2  A block whose bytes do not have their checksum is a miss, never a hit.
//!   I3  A get with a deadline ends there with what has come: the rest are misses that say so.
//!       The deadline is kept here, for `GetInline` knows none.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use kvtier_proto::limits::INLINE_CHUNK_MAX;
use kvtier_proto::{BlockKey, BlockLayout, Level, Miss, PayloadKind, Quality, v1};
use tokio::sync::mpsc;
use tonic::Streaming;
use v1::get_inline_reply::Part as Got;
use v1::put_inline_request::Part as Put;

use crate::check;
use crate::error::{Call, Error};
use crate::layouts::Layouts;
use crate::link::{Link, Task};
use crate::mux::Feed;
use crate::restore::{Asked, Restore, Source};
use crate::save::{CommitOutcome, SaveBlock, results};
use crate::session::Session;
use crate::slot::FilledSlot;
use crate::values::{Acknowledge, BlockStatus, Lookup, Tier, grade_from_wire, miss_from_wire};

const GET: Call = Call::reads("GetInline");
const PUT: Call = Call::changes_by_parts("PutInline");

/// Blocks that wait for their reader before the stream is held back.
const AHEAD: usize = 4;

/// A block that came inline, checked.
pub(crate) struct InlineBlock {
    pub(crate) index: u32,
    pub(crate) tier: Tier,
    pub(crate) grade: (Level, Quality),
    pub(crate) layout: Arc<BlockLayout>,
    pub(crate) bytes: Bytes,
}

impl Session {
    /// Saves blocks whose bytes travel in the stream.
    ///
    /// Units: 1 to 4096 blocks; each payload has exactly the size of its layout.
    /// Returns one [`CommitOutcome`] a block, in order; a block that is stored already is
    /// `Stored`.
    /// Errors: `Invalid` (nothing was sent); `Daemon`, `Timeout` and `SessionLost` with
    /// [`Happened::Unknown`](crate::Happened::Unknown): blocks before the one that failed may be
    /// stored.
    /// Cancel safety: the transfer goes on without its caller. Blocks: for a checksum a block.
    ///
    /// ```no_run
    /// # use kvtier_client::{Acknowledge, Error, SaveBlock, Session};
    /// # async fn put(session: Session, block: SaveBlock, payload: Vec<u8>) -> Result<(), Error> {
    /// let blocks = vec![(block, payload.into())];
    /// let outcomes = session.put_inline(blocks, Acknowledge::Accepted).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn put_inline(
        &self,
        blocks: Vec<(SaveBlock, Bytes)>,
        wait: Acknowledge,
    ) -> Result<Vec<CommitOutcome>, Error> {
        check::count(blocks.len())?;
        for (index, (block, bytes)) in blocks.iter().enumerate() {
            let layout = self
                .inner
                .layouts
                .sized(block.kind, block.tokens, block.opaque_bytes);
            let layout = layout.map_err(|e| Error::invalid(format!("blocks[{index}]: {e}")))?;
            let (wanted, given) = (layout.payload_len(), bytes.len());
            if wanted != given {
                return Err(Error::invalid(format!(
                    "blocks[{index}] has {given} bytes; accepted: exactly {wanted}"
                )));
            }
        }
        let with_crc = |(block, bytes): (SaveBlock, Bytes)| {
            let crc32 = crc32fast::hash(&bytes);
            (block, crc32, bytes)
        };
        self.put(blocks.into_iter().map(with_crc).collect(), wait)
            .await
    }

    /// Sends slots that were filled in memory of this process.
    pub(crate) async fn put_filled(
        &self,
        slots: Vec<FilledSlot>,
        wait: Acknowledge,
    ) -> Result<Vec<CommitOutcome>, Error> {
        let owned = |slot: FilledSlot| {
            let crc32 = slot
                .crc32
                .unwrap_or_else(|| crc32fast::hash(slot.payload()));
            let block = slot.block;
            // The owner of the bytes keeps the slot, and with it its room, until they are sent.
            (block, crc32, Bytes::from_owner(Sent(slot)))
        };
        self.put(slots.into_iter().map(owned).collect(), wait).await
    }

    async fn put(
        &self,
        blocks: Vec<(SaveBlock, u32, Bytes)>,
        wait: Acknowledge,
    ) -> Result<Vec<CommitOutcome>, Error> {
        let to_wire = |(block, crc32, bytes)| (self.to_wire(&block), crc32, bytes);
        let blocks: Vec<_> = blocks.into_iter().map(to_wire).collect();
        let link = self.link().await?;
        let limit = self.timeouts().inline;
        let work = {
            let link = Arc::clone(&link);
            async move {
                let keys: Vec<_> = blocks.iter().map(|(block, ..)| block.key.clone()).collect();
                let messages = messages(link.session.clone(), blocks, wait);
                let mut rpc = link.rpc.clone();
                let answer = rpc.put_inline(tokio_stream::iter(messages));
                let reply = link.answer(PUT, answer).await?;
                results(PUT, &keys, &reply)
            }
        };
        link.see_through(PUT, limit, work).await
    }

    /// Restores blocks whose bytes travel in the stream, also where memory could be shared.
    /// The same type as [`restore`](Self::restore), which does this by itself on connections
    /// that cannot share memory. Errors: as there.
    ///
    /// ```no_run
    /// # use kvtier_client::{BlockKey, Error, PayloadKind, RestoreOptions, Session};
    /// # async fn get(session: Session, keys: Vec<BlockKey>) -> Result<(), Error> {
    /// let options = RestoreOptions::default();
    /// let got = session.get_inline(&keys, PayloadKind::Kv, options).await?.collect().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn get_inline(
        &self,
        keys: &[BlockKey],
        kind: PayloadKind,
        options: crate::RestoreOptions,
    ) -> Result<Restore, Error> {
        check::count(keys.len())?;
        let link = self.link().await?;
        Ok(self.start_inline(link, keys, kind, &options))
    }

    pub(crate) fn start_inline(
        &self,
        link: Arc<Link>,
        keys: &[BlockKey],
        kind: PayloadKind,
        options: &crate::RestoreOptions,
    ) -> Restore {
        let asked: Asked = self.asked(keys, kind, options);
        let deadline = options.deadline.unwrap_or(Duration::MAX);
        let (feed, events) = mpsc::channel(AHEAD);
        let mut getter = Getter {
            link: Arc::clone(&link),
            layouts: Arc::clone(&self.inner.layouts),
            keys: keys.to_vec(),
            kind,
            scattered: options.scattered,
            accept: options.accept,
            limit: self.timeouts().control,
            feed,
            due: (0..keys.len()).collect(),
            missed: Vec::new(),
        };
        let task = Task::spawn(async move {
            let ended = tokio::time::timeout(deadline, getter.run()).await;
            let last = match ended.unwrap_or_else(|_| getter.late()) {
                Ok(done) => Feed::Done(done),
                Err(error) => Feed::Failed(error),
            };
            let _ = getter.feed.send(last).await;
        });
        Restore::new(self, link, asked, Source::Inline(events, task), None)
    }
}

struct Sent(FilledSlot);

impl AsRef<[u8]> for Sent {
    fn as_ref(&self) -> &[u8] {
        self.0.payload()
    }
}

/// The messages of a put: a header a block, then its bytes in chunks, made as they are sent.
fn messages(
    session: Bytes,
    blocks: Vec<(v1::BlockToSave, u32, Bytes)>,
    wait: Acknowledge,
) -> impl Iterator<Item = v1::PutInlineRequest> {
    let mut first = Some(session);
    blocks
        .into_iter()
        .flat_map(move |(block, crc32, mut bytes)| {
            let session = first.take();
            let wait_for = if session.is_some() { wait.to_wire() } else { 0 };
            let header = Put::Block(v1::PutInlineBlock {
                session: session.unwrap_or_default(),
                block: Some(block),
                crc32,
                wait_for,
            });
            let chunk = usize::try_from(INLINE_CHUNK_MAX.get()).unwrap_or(1 << 20);
            let chunks = std::iter::from_fn(move || {
                let next = bytes.split_to(bytes.len().min(chunk));
                (!next.is_empty()).then_some(Put::Data(next))
            });
            let parts = std::iter::once(header).chain(chunks);
            parts.map(|part| v1::PutInlineRequest { part: Some(part) })
        })
}

/// One get: asks what is there, then takes what comes.
struct Getter {
    link: Arc<Link>,
    layouts: Arc<Layouts>,
    keys: Vec<BlockKey>,
    kind: PayloadKind,
    scattered: bool,
    accept: Quality,
    limit: Duration,
    feed: mpsc::Sender<Feed>,
    /// Indices of blocks that may still come.
    due: BTreeSet<usize>,
    missed: Vec<v1::MissedBlock>,
}

/// A block of which bytes are still coming.
struct Coming {
    /// Index into the keys of the restore.
    index: usize,
    header: v1::GetInlineBlock,
    layout: Arc<BlockLayout>,
    bytes: BytesMut,
}

impl Getter {
    async fn run(&mut self) -> Result<v1::RestoreDone, Error> {
        let lookup = self.lookup().await?;
        for index in 0..self.keys.len() {
            match lookup.blocks.get(index) {
                Some(BlockStatus::Present(_)) => {}
                Some(BlockStatus::Missing(miss)) => self.miss(index, *miss),
                None => self.miss(index, Miss::Absent),
            }
        }
        let plan = Feed::Plan(plan(&lookup));
        if self.feed.send(plan).await.is_ok() && !self.due.is_empty() {
            self.get().await?;
        }
        Ok(self.done())
    }

    /// The deadline has passed: whatever is still due is late.
    fn late(&mut self) -> Result<v1::RestoreDone, Error> {
        while let Some(index) = self.due.first().copied() {
            self.miss(index, Miss::Deadline);
        }
        Ok(self.done())
    }

    fn miss(&mut self, index: usize, miss: Miss) {
        if self.due.remove(&index) {
            self.missed.push(v1::MissedBlock {
                index: u32::try_from(index).unwrap_or(u32::MAX),
                reason: v1::MissReason::from(miss).into(),
            });
        }
    }

    /// How it ended. How many blocks are usable, the reader counts.
    fn done(&mut self) -> v1::RestoreDone {
        let mut missed = std::mem::take(&mut self.missed);
        missed.sort_by_key(|missed| missed.index);
        v1::RestoreDone {
            usable_blocks: u32::MAX,
            missed,
            cancelled: false,
        }
    }

    async fn lookup(&self) -> Result<Lookup, Error> {
        let prefix_only = !self.scattered;
        let request = v1::LookupRequest {
            session: self.link.session.clone(),
            keys: check::keys_to_wire(&self.keys)?,
            kind: v1::PayloadKind::from(self.kind).into(),
            prefix_only,
            accept: v1::Quality::from(self.accept).into(),
        };
        let mut rpc = self.link.rpc.clone();
        let reply = self.link.call(GET, self.limit, rpc.lookup(request)).await?;
        Lookup::from_wire(GET, self.keys.len(), prefix_only, &reply)
    }

    /// Gets what is due. GetInline stops at the first miss, so it is asked for what is there
    /// only, and for every block of that.
    async fn get(&mut self) -> Result<(), Error> {
        let wanted: Vec<usize> = self.due.iter().copied().collect();
        let keys: Vec<BlockKey> = wanted
            .iter()
            .filter_map(|index| self.keys.get(*index).copied())
            .collect();
        let request = v1::GetInlineRequest {
            session: self.link.session.clone(),
            keys: check::keys_to_wire(&keys)?,
            kind: v1::PayloadKind::from(self.kind).into(),
            scattered: true,
            accept: v1::Quality::from(self.accept).into(),
        };
        let mut rpc = self.link.rpc.clone();
        let mut stream = self
            .link
            .call(GET, self.limit, rpc.get_inline(request))
            .await?;
        let mut coming: Option<Coming> = None;
        loop {
            match self.message(&mut stream).await? {
                Got::Block(header) if coming.is_none() => {
                    coming = Some(self.header(header, &wanted)?);
                }
                Got::Data(data) => {
                    let Some(block) = coming.as_mut() else {
                        return Err(GET.bad_reply("bytes of no block"));
                    };
                    if block.bytes.len() + data.len() > block.layout.payload_len() {
                        return Err(GET.bad_reply("more bytes than the block has"));
                    }
                    block.bytes.extend_from_slice(&data);
                }
                Got::Done(done) if coming.is_none() => {
                    for missed in &done.missed {
                        let miss = miss_from_wire(GET, missed.reason)?;
                        self.miss(place(&wanted, missed.index)?, miss);
                    }
                    return Ok(());
                }
                Got::Block(_) | Got::Done(_) => {
                    return Err(GET.bad_reply("a block ended before its bytes came"));
                }
            }
            let full = |block: &mut Coming| block.bytes.len() == block.layout.payload_len();
            if let Some(block) = coming.take_if(full) {
                self.hand_out(block).await?;
            }
        }
    }

    async fn message(&self, stream: &mut Streaming<v1::GetInlineReply>) -> Result<Got, Error> {
        loop {
            let next = tokio::select! {
                next = stream.message() => next,
                reason = self.link.life.lost() => return Err(GET.lost(reason)),
            };
            let next = next.map_err(|status| self.link.noticed(GET.failed(&status)))?;
            let next = next.ok_or_else(|| GET.bad_reply("the stream ended without `done`"))?;
            if let Some(part) = next.part {
                return Ok(part);
            }
        }
    }

    /// Checks a header before anything is allocated from it (I1).
    fn header(&self, header: v1::GetInlineBlock, wanted: &[usize]) -> Result<Coming, Error> {
        let index = place(wanted, header.index)?;
        let layout = self
            .layouts
            .of_length(self.kind, header.tokens, header.length);
        let layout = layout.map_err(|error| GET.bad_reply(error.to_string()))?;
        let wanted = layout.payload_len();
        if u64::try_from(wanted) != Ok(header.length) {
            let length = header.length;
            return Err(GET.bad_reply(format!("{length} bytes for a payload of {wanted}")));
        }
        let bytes = BytesMut::with_capacity(wanted);
        Ok(Coming {
            index,
            header,
            layout,
            bytes,
        })
    }

    /// A block whose bytes are not those that were sent is a miss (I2).
    async fn hand_out(&mut self, block: Coming) -> Result<(), Error> {
        let Coming {
            index,
            header,
            layout,
            bytes,
        } = block;
        if crc32fast::hash(&bytes) != header.crc32 {
            tracing::warn!(index, "an inline block fails its checksum: a miss");
            self.miss(index, Miss::PayloadCrc);
            return Ok(());
        }
        let block = InlineBlock {
            index: u32::try_from(index).unwrap_or(u32::MAX),
            tier: Tier::from_wire(GET, header.tier)?,
            grade: grade_from_wire(GET, header.level, header.quality)?,
            layout,
            bytes: bytes.freeze(),
        };
        // A reader that is gone takes this task along.
        let _ = self.feed.send(Feed::Inline(block)).await;
        self.due.remove(&index);
        Ok(())
    }
}

fn plan(lookup: &Lookup) -> v1::RestorePlan {
    use v1::block_status::Status;
    let status = |status: &BlockStatus| v1::BlockStatus {
        status: Some(match *status {
            BlockStatus::Present(Tier::Host) => Status::Tier(v1::Tier::Host.into()),
            BlockStatus::Present(Tier::Disk) => Status::Tier(v1::Tier::Disk.into()),
            BlockStatus::Missing(miss) => Status::Miss(v1::MissReason::from(miss).into()),
        }),
    };
    v1::RestorePlan {
        blocks: lookup.blocks.iter().map(status).collect(),
        outlook: None,
    }
}

/// Index into the keys of the restore of an index into those that were asked for.
fn place(wanted: &[usize], index: u32) -> Result<usize, Error> {
    let at = usize::try_from(index).unwrap_or(usize::MAX);
    wanted.get(at).copied().ok_or_else(|| {
        let asked = wanted.len();
        GET.bad_reply(format!("block {index} came, where {asked} were asked for"))
    })
}
