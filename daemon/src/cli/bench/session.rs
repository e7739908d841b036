//! One session of the benchmark: the calls that are timed, without any measuring.
//!
//! Upstairs:   `bench`.
//! Downstairs: `cli::session`, the control protocol.
//!
//! Not here on purpose: no shared memory. A lease is timed until the daemon has granted it; what
//! the engine then does with the mapped bytes is its own time.

use kvtier_proto::limits::INLINE_CHUNK_MAX;
use kvtier_proto::v1::kvtier_client::KvtierClient;
use kvtier_proto::v1::{
    self, get_inline_reply, put_inline_request, restore_command, restore_event,
};
use kvtier_proto::{BlockKey, KeyDeriver, KeySecret, Miss, ModelDescriptor};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::cli::connect::CliError;
use crate::cli::session::{self, unexpected};

/// A block that was made for the benchmark.
#[derive(Debug, Clone)]
pub(super) struct Block {
    pub(super) key: BlockKey,
    pub(super) parent: BlockKey,
    pub(super) position: u32,
    pub(super) payload: bytes::Bytes,
    pub(super) crc32: u32,
}

/// An open session and its restore stream.
pub(super) struct Session {
    session: session::Session,
    deriver: KeyDeriver,
    commands: mpsc::Sender<v1::RestoreCommand>,
    restores: Option<Streaming<v1::RestoreEvent>>,
    commands_taken: Option<mpsc::Receiver<v1::RestoreCommand>>,
    restore_id: u64,
    tokens: u32,
}

impl Session {
    pub(super) async fn open(
        client: KvtierClient<Channel>,
        model: &ModelDescriptor,
    ) -> Result<Self, CliError> {
        let session = session::Session::open(client, model, "kvtier bench").await?;
        let secret = <[u8; 32]>::try_from(session.opened.key_secret.as_ref());
        let secret = secret.map_err(|_| unexpected("key_secret is not 32 bytes"))?;
        let (commands, taken) = mpsc::channel(16);
        Ok(Self {
            session,
            deriver: KeyDeriver::new(KeySecret::new(secret), model.fingerprint(), ""),
            commands,
            restores: None,
            commands_taken: Some(taken),
            restore_id: 0,
            tokens: model.block_tokens,
        })
    }

    /// Key of the block of `tokens` that follows `parent`.
    pub(super) fn key(&self, parent: &BlockKey, tokens: &[u32]) -> BlockKey {
        self.deriver.derive(parent, tokens, b"kvtier bench")
    }

    /// Saves one block; its bytes travel in the stream.
    pub(super) async fn put(&mut self, block: &Block) -> Result<(), CliError> {
        let mut parts = vec![put_inline_request::Part::Block(v1::PutInlineBlock {
            session: self.session.id.clone(),
            block: Some(v1::BlockToSave {
                key: bytes::Bytes::copy_from_slice(block.key.as_bytes()),
                parent: bytes::Bytes::copy_from_slice(block.parent.as_bytes()),
                position: block.position,
                tokens: self.tokens,
                kind: v1::PayloadKind::Kv as i32,
                opaque_bytes: 0,
                through: 0,
                slot: 0,
            }),
            crc32: block.crc32,
            wait_for: v1::Acknowledge::Accepted as i32,
        })];
        let mut rest = block.payload.clone();
        while !rest.is_empty() {
            let chunk = usize::try_from(INLINE_CHUNK_MAX.get()).unwrap_or(rest.len());
            parts.push(put_inline_request::Part::Data(
                rest.split_to(chunk.min(rest.len())),
            ));
        }
        let requests = parts
            .into_iter()
            .map(|part| v1::PutInlineRequest { part: Some(part) });
        let reply = self
            .session
            .client
            .put_inline(tokio_stream::iter(requests))
            .await?
            .into_inner();
        match reply.results.first().and_then(|result| result.result) {
            Some(v1::commit_result::Result::Acknowledged(_)) => Ok(()),
            Some(v1::commit_result::Result::Failed(why)) => {
                let why = v1::CommitFailure::try_from(why).unwrap_or_default();
                Err(CliError::Usage(format!(
                    "a block was not saved: {}",
                    why.as_str_name()
                )))
            }
            None => Err(unexpected("no result for a saved block")),
        }
    }

    /// How many leading blocks of `keys` could be restored.
    pub(super) async fn lookup(&mut self, keys: &[bytes::Bytes]) -> Result<u32, CliError> {
        let request = v1::LookupRequest {
            session: self.session.id.clone(),
            keys: keys.to_vec(),
            kind: v1::PayloadKind::Kv as i32,
            prefix_only: true,
            accept: v1::Quality::Exact as i32,
        };
        Ok(self
            .session
            .client
            .lookup(request)
            .await?
            .into_inner()
            .prefix_blocks)
    }

    /// Restores `keys` until every block is leased; gives the leases.
    pub(super) async fn lease(&mut self, keys: &[bytes::Bytes]) -> Result<Vec<u64>, CliError> {
        self.restore_id += 1;
        let restore_id = self.restore_id;
        let start = v1::RestoreStart {
            session: self.session.id.clone(),
            keys: keys.to_vec(),
            kind: v1::PayloadKind::Kv as i32,
            deadline_ms: 0,
            scattered: false,
            accept: v1::Quality::Exact as i32,
            two_ended: None,
            into: None,
        };
        let command = v1::RestoreCommand {
            restore_id,
            command: Some(restore_command::Command::Start(start)),
        };
        let gone = |_| unexpected("the restore stream ended");
        self.commands.send(command).await.map_err(gone)?;
        let mut leases = Vec::with_capacity(keys.len());
        loop {
            let event = self.restore_event().await?;
            match event.event.filter(|_| event.restore_id == restore_id) {
                Some(restore_event::Event::Ready(ready)) => {
                    leases.extend(ready.blocks.iter().map(|block| block.lease));
                }
                Some(restore_event::Event::Done(done)) => {
                    return whole(&done, keys.len()).map(|()| leases);
                }
                Some(restore_event::Event::Plan(_) | restore_event::Event::Hint(_)) | None => {}
            }
        }
    }

    async fn restore_event(&mut self) -> Result<v1::RestoreEvent, CliError> {
        // The first command must be on its way before the daemon answers the stream's header.
        if let Some(commands) = self.commands_taken.take() {
            let stream = self
                .session
                .client
                .restore(ReceiverStream::new(commands))
                .await?;
            self.restores = Some(stream.into_inner());
        }
        let ended = || CliError::from(Status::unavailable("the restore stream ended"));
        let restores = self.restores.as_mut().ok_or_else(ended)?;
        restores.message().await?.ok_or_else(ended)
    }

    /// Gives leases back.
    pub(super) async fn release(&mut self, leases: Vec<u64>) -> Result<(), CliError> {
        let request = v1::ReleaseRequest {
            session: self.session.id.clone(),
            leases,
            slots: Vec::new(),
        };
        self.session.client.release(request).await?;
        Ok(())
    }

    /// Restores one block; its bytes travel in the stream. True when they are the right ones.
    pub(super) async fn get(&mut self, block: &Block) -> Result<bool, CliError> {
        let request = v1::GetInlineRequest {
            session: self.session.id.clone(),
            keys: vec![bytes::Bytes::copy_from_slice(block.key.as_bytes())],
            kind: v1::PayloadKind::Kv as i32,
            scattered: false,
            accept: v1::Quality::Exact as i32,
        };
        let mut stream = self.session.client.get_inline(request).await?.into_inner();
        let mut got = 0;
        let mut right = true;
        while let Some(reply) = stream.message().await? {
            match reply.part {
                Some(get_inline_reply::Part::Data(data)) => {
                    let end = got + data.len();
                    right &= block.payload.get(got..end).is_some_and(|want| want == data);
                    got = end;
                }
                Some(get_inline_reply::Part::Done(done)) => whole(&done, 1)?,
                Some(get_inline_reply::Part::Block(_)) | None => {}
            }
        }
        Ok(right && got == block.payload.len())
    }
}

/// Did every block arrive?
fn whole(done: &v1::RestoreDone, asked: usize) -> Result<(), CliError> {
    if usize::try_from(done.usable_blocks).is_ok_and(|usable| usable == asked) {
        return Ok(());
    }
    let reason = done.missed.first().map(v1::MissedBlock::reason);
    let reason = reason.and_then(|reason| Miss::try_from(reason).ok());
    Err(CliError::Usage(format!(
        "{} of {asked} blocks came back, the first miss is {}: use fewer or smaller blocks, or \
         look at `kvtier status`",
        done.usable_blocks,
        reason.map_or("without a reason", Miss::as_str)
    )))
}
