//! The protocol without the SDK: what a careless or hostile client can send.
//!
//! Upstairs:   tests of malformed requests and of clients that misuse shared memory.
//! Downstairs: the generated gRPC client and the companion socket.
//!
//! Memory is written through its descriptor, not through a mapping: no unsafe code is needed to
//! scribble on it while the daemon reads.

use std::fs::File;
use std::io::{IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use kvtier_client::{ModelDescriptor, SaveBlock};
use kvtier_proto::limits::PROTOCOL_VERSION;
use kvtier_proto::v1::kvtier_client::KvtierClient;
use kvtier_proto::v1::{self, session_event::Event};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

/// Longest wait of any call.
const LIMIT: Duration = Duration::from_secs(20);

/// The generated client, without its own limits on size.
pub type Rpc = KvtierClient<Channel>;

/// Connects to the Unix socket.
pub async fn connect(socket: &Path) -> Rpc {
    let uri = format!("unix:{}", socket.display());
    let endpoint = Endpoint::from_shared(uri).unwrap().timeout(LIMIT);
    let endpoint = endpoint.initial_stream_window_size(8 << 20);
    let channel = endpoint.connect().await.unwrap();
    KvtierClient::new(channel)
        .max_decoding_message_size(64 << 20)
        .max_encoding_message_size(64 << 20)
}

/// A request that opens a session of `model`.
pub fn opening(model: &ModelDescriptor) -> v1::OpenSessionRequest {
    v1::OpenSessionRequest {
        protocol_version: PROTOCOL_VERSION,
        client: "kvtier-tests raw".into(),
        model: Some(model.into()),
        reader: None,
    }
}

/// A session by hand.
pub struct RawSession {
    /// The connection.
    pub rpc: Rpc,
    /// What the daemon said when it opened.
    pub opened: v1::SessionOpened,
    /// The stream that is the session's life.
    pub events: Streaming<v1::SessionEvent>,
}

impl RawSession {
    /// Opens a session; the refusal when there is one.
    pub async fn open(socket: &Path, request: v1::OpenSessionRequest) -> Result<Self, Status> {
        // The session's stream must not end at the limit of a call.
        let uri = format!("unix:{}", socket.display());
        let channel = Endpoint::from_shared(uri).unwrap().connect().await.unwrap();
        let mut rpc = KvtierClient::new(channel)
            .max_decoding_message_size(64 << 20)
            .max_encoding_message_size(64 << 20);
        let mut events = rpc.open_session(request).await?.into_inner();
        let first = events.message().await?.and_then(|first| first.event);
        match first {
            Some(Event::Opened(opened)) => Ok(Self {
                rpc,
                opened,
                events,
            }),
            other => panic!("the first event is {other:?}"),
        }
    }

    /// The session's name.
    pub fn token(&self) -> bytes::Bytes {
        self.opened.session.clone()
    }

    /// Makes a staging region and fetches its memory.
    pub async fn region(&mut self, bytes: u64) -> (v1::RegionGrant, File) {
        let session = self.token();
        let request = v1::RegisterRegionRequest {
            session,
            bytes,
            ..v1::RegisterRegionRequest::default()
        };
        let reply = self.rpc.register_region(request).await.unwrap();
        let grant = reply.into_inner().grant.unwrap();
        let file = fetch(Path::new(&self.opened.descriptor_socket), &grant.ticket);
        (grant, file.expect("the ticket is good"))
    }

    /// The code with which a staging region is refused.
    pub async fn region_refused(&mut self) -> tonic::Code {
        let request = v1::RegisterRegionRequest {
            session: self.token(),
            bytes: 1 << 20,
            ..v1::RegisterRegionRequest::default()
        };
        self.rpc.register_region(request).await.unwrap_err().code()
    }

    /// Makes a region for claims and fetches its memory.
    pub async fn claims(&mut self, bytes: u64) -> Result<(v1::RegionGrant, File), Status> {
        let request = v1::RegisterRegionRequest {
            session: self.token(),
            bytes,
            purpose: v1::RegionPurpose::Claims.into(),
            ..v1::RegisterRegionRequest::default()
        };
        let reply = self.rpc.register_region(request).await?;
        let grant = reply.into_inner().grant.unwrap();
        let file = fetch(Path::new(&self.opened.descriptor_socket), &grant.ticket);
        Ok((grant, file.expect("the ticket is good")))
    }

    /// Asks for slots.
    pub async fn save(
        &mut self,
        region: u32,
        blocks: Vec<v1::BlockToSave>,
    ) -> Result<Vec<v1::SaveGrant>, Status> {
        let request = v1::SaveRequest {
            session: self.token(),
            region,
            blocks,
        };
        Ok(self.rpc.save(request).await?.into_inner().grants)
    }

    /// Hands slots over.
    pub async fn commit(
        &mut self,
        blocks: Vec<v1::FilledSlot>,
        wait_for: v1::Acknowledge,
    ) -> Result<Vec<v1::CommitResult>, Status> {
        let request = v1::CommitRequest {
            session: self.token(),
            blocks,
            wait_for: wait_for.into(),
        };
        Ok(self.rpc.commit(request).await?.into_inner().results)
    }
}

/// A block as the wire names it.
pub fn block(block: &SaveBlock) -> v1::BlockToSave {
    v1::BlockToSave {
        key: block.key.0.to_vec().into(),
        parent: block.parent.0.to_vec().into(),
        position: block.position,
        tokens: block.tokens,
        kind: v1::PayloadKind::from(block.kind).into(),
        opaque_bytes: block.opaque_bytes,
        through: 0,
        slot: 0,
    }
}

/// Shows a ticket on the companion socket; `None` when it is refused.
pub fn fetch(socket: &Path, ticket: &[u8]) -> Option<File> {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(ticket).unwrap();
    let mut byte = [0u8; 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut byte)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    rustix::net::recvmsg(&stream, &mut into, &mut control, flags).unwrap();
    let rights = control.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    rights.map(File::from)
}
