//! A small kvtierd for the SDK's own tests: speaks the protocol, shares real memfds, and can be
//! told to misbehave.
//!
//! Upstairs:   the tests of this folder.
//! Downstairs: tonic, memfds written with `pwrite`: no mapping, so no unsafe code.
//!
//! What is stored lives in [`Store`] and survives a restart, as on a disk. Everything else dies
//! with the [`Fake`], whose runtime is its process: dropping it closes every connection at once.

mod calls;
mod descriptors;
mod restore;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use kvtier_client::{
    Client, ConnectOptions, Element, Endpoint, LayerSpec, ModelDescriptor, PartOrder, Session,
    SessionOptions, Shard,
};
use kvtier_proto::v1;
use kvtier_proto::v1::kvtier_server::KvtierServer;
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};

pub(crate) const ARENA_LEN: u64 = 1 << 20;

/// A stored block.
#[derive(Clone)]
pub(crate) struct Stored {
    pub payload: Vec<u8>,
    pub tokens: u32,
    pub durable: bool,
}

/// What survives a restart, and what tests look at.
#[derive(Default)]
pub(crate) struct Store {
    pub blocks: HashMap<Vec<u8>, Stored>,
    pub calls: Vec<&'static str>,
    pub leases_given: u64,
    pub leases: HashSet<u64>,
    pub slots: usize,
    pub cancels: Vec<u64>,
    pub progress: Vec<u32>,
    /// Where the maps of two-ended restores lay; none for one that had no map.
    pub maps: Vec<Option<v1::Slot>>,
    /// Prefill steps that were reported.
    pub steps: Vec<v1::PrefillReport>,
    pub widest_save: usize,
    pub sessions: usize,
}

/// How to misbehave. Everything off: a daemon that works.
#[derive(Clone, Default)]
pub(crate) struct Knobs {
    pub wrong_fingerprint: bool,
    pub secret: u8,
    pub unsealed: bool,
    pub short_descriptor: bool,
    pub refuse_tickets: bool,
    pub hang: Option<&'static str>,
    pub refuse: Option<(&'static str, tonic::Code)>,
    pub bad_grant: bool,
    pub overlapping_grants: bool,
    pub bad_lease: bool,
    pub lease_twice: bool,
    pub hold_restore: bool,
    /// The stream fails where the restore would end; the session lives on.
    pub break_restore: bool,
    /// What a two-ended restore is told.
    pub outlook: Option<v1::Outlook>,
    pub forget_leases: bool,
    pub corrupt_inline: bool,
    /// Inline blocks after which nothing more comes; 0 for all.
    pub stall_inline: usize,
    pub oversized: bool,
}

/// Places of a region that are taken.
#[derive(Default)]
pub(crate) struct Places {
    pub len: u64,
    taken: BTreeMap<u64, u64>,
}

impl Places {
    pub(crate) fn take(&mut self, length: u64) -> Option<u64> {
        let mut at = 0;
        for (start, end) in &self.taken {
            if start - at >= length {
                break;
            }
            at = *end;
        }
        (at + length <= self.len).then(|| {
            self.taken.insert(at, at + length);
            at
        })
    }

    pub(crate) fn free(&mut self, at: u64) -> bool {
        self.taken.remove(&at).is_some()
    }
}

pub(crate) struct Region {
    pub file: File,
    pub places: Places,
}

/// One open session.
pub(crate) struct Open {
    pub model: ModelDescriptor,
    pub staging: Option<Region>,
    pub generation: u64,
    pub keys: HashMap<u64, (Vec<u8>, u32)>,
}

pub(crate) struct State {
    pub store: Arc<Mutex<Store>>,
    pub knobs: Arc<Mutex<Knobs>>,
    pub sessions: Mutex<HashMap<Vec<u8>, Open>>,
    pub tickets: Mutex<HashMap<Vec<u8>, File>>,
    pub arena: Mutex<Region>,
    pub lease_places: Mutex<HashMap<u64, u64>>,
    pub descriptor_socket: PathBuf,
    pub shared: bool,
    pub drain: tokio::sync::watch::Sender<bool>,
}

impl State {
    pub(crate) fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap()
    }

    pub(crate) fn knobs(&self) -> Knobs {
        self.knobs.lock().unwrap().clone()
    }

    /// Notes the call, and hangs or refuses when told to.
    pub(crate) async fn enter(&self, call: &'static str) -> Result<(), tonic::Status> {
        self.store().calls.push(call);
        let knobs = self.knobs();
        if knobs.hang == Some(call) {
            std::future::pending::<()>().await;
        }
        match knobs.refuse {
            Some((name, code)) if name == call => Err(tonic::Status::new(code, "told to refuse")),
            _ => Ok(()),
        }
    }
}

#[derive(Clone)]
pub(crate) struct Service(pub Arc<State>);

/// A running fake daemon.
pub(crate) struct Fake {
    pub state: Arc<State>,
    pub endpoint: Endpoint,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Fake {
    /// Starts over a Unix socket in `dir`.
    pub(crate) fn start(dir: &Path, store: &Arc<Mutex<Store>>, knobs: Knobs) -> Self {
        Self::start_on(dir, store, knobs, true)
    }

    /// Starts over TCP: no descriptors.
    pub(crate) fn start_tcp(dir: &Path, store: &Arc<Mutex<Store>>, knobs: Knobs) -> Self {
        Self::start_on(dir, store, knobs, false)
    }

    fn start_on(dir: &Path, store: &Arc<Mutex<Store>>, knobs: Knobs, shared: bool) -> Self {
        let (socket, descriptor_socket) = (dir.join("s"), dir.join("s.fd"));
        for path in [&socket, &descriptor_socket] {
            let _ = std::fs::remove_file(path);
        }
        let arena = descriptors::memory(ARENA_LEN, knobs.unsealed, knobs.short_descriptor);
        let state = Arc::new(State {
            store: Arc::clone(store),
            knobs: Arc::new(Mutex::new(knobs)),
            sessions: Mutex::default(),
            tickets: Mutex::default(),
            arena: Mutex::new(Region {
                file: arena,
                places: Places {
                    len: ARENA_LEN,
                    ..Places::default()
                },
            }),
            lease_places: Mutex::default(),
            descriptor_socket: descriptor_socket.clone(),
            shared,
            drain: tokio::sync::watch::channel(false).0,
        });
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let service = KvtierServer::new(Service(Arc::clone(&state)));
        let server = tonic::transport::Server::builder().add_service(service);
        let guard = runtime.enter();
        let endpoint = if shared {
            let incoming = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
            runtime.spawn(server.serve_with_incoming(incoming));
            let handing_out = UnixListener::bind(&descriptor_socket).unwrap();
            runtime.spawn(descriptors::serve(handing_out, Arc::clone(&state)));
            Endpoint::unix(socket)
        } else {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            let address = listener.local_addr().unwrap();
            let incoming = TcpListenerStream::new(TcpListener::from_std(listener).unwrap());
            runtime.spawn(server.serve_with_incoming(incoming));
            Endpoint::tcp(address)
        };
        drop(guard);
        let runtime = Some(runtime);
        Self {
            state,
            endpoint,
            runtime,
        }
    }

    pub(crate) fn set(&self, change: impl FnOnce(&mut Knobs)) {
        change(&mut self.state.knobs.lock().unwrap());
    }

    pub(crate) fn store(&self) -> MutexGuard<'_, Store> {
        self.state.store()
    }

    pub(crate) fn drain(&self) {
        self.state.drain.send_replace(true);
    }

    /// Ends as `kill -9` does: every connection closes, nothing is answered.
    pub(crate) fn kill(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.stop();
    }
}

pub(crate) fn new_store() -> Arc<Mutex<Store>> {
    Arc::default()
}

/// 3 layers of 2 KV heads of 8: 96 bytes a token and layer for K and V, in blocks of 16 tokens.
pub(crate) fn model() -> ModelDescriptor {
    let layer = LayerSpec::Attention {
        kv_heads: 2,
        k_dim: 8,
        v_dim: 16,
        sliding_window: 0,
    };
    ModelDescriptor {
        model: "tests/tiny".into(),
        revision: String::new(),
        weights_fingerprint: Vec::new(),
        adapter: String::new(),
        element: Element::Bf16,
        layers: vec![layer; 3],
        d_model: 32,
        rope: None,
        block_tokens: 16,
        order: PartOrder::TokenMajor,
        shard: Shard::WHOLE,
        k_after_rope: true,
    }
}

/// Payload of a full block of [`model`].
pub(crate) const BLOCK_LEN: usize = 3 * 96 * 16;

/// Short limits, so that a test of a limit is quick; long enough for a busy machine elsewhere.
pub(crate) fn options() -> ConnectOptions {
    let mut options = ConnectOptions::default();
    options.timeouts.control = Duration::from_secs(20);
    options
}

pub(crate) async fn open(fake: &Fake) -> Session {
    open_with(fake, options(), SessionOptions::new("test")).await
}

pub(crate) async fn open_with(
    fake: &Fake,
    options: ConnectOptions,
    session: SessionOptions,
) -> Session {
    let client = Client::connect(fake.endpoint.clone(), options)
        .await
        .unwrap();
    client.open_session(&model(), session).await.unwrap()
}

/// Token ids of `blocks` full blocks; `seed` tells prompts apart.
pub(crate) fn prompt(seed: u32, blocks: usize) -> Vec<u32> {
    (0..blocks * 16)
        .map(|at| seed * 100_000 + u32::try_from(at).unwrap())
        .collect()
}

/// What the tests fill in: recognisable, and different for every part of every block.
pub(crate) fn pattern(position: u32, layer: u32, code: kvtier_client::PartCode, bytes: &mut [u8]) {
    let seed = position.wrapping_mul(31) + layer * 7 + code as u32;
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::try_from((u32::try_from(at).unwrap() * 13 + seed) % 251).unwrap();
    }
}

/// The payload that [`pattern`] makes of a block at `position`.
pub(crate) fn payload(session: &Session, position: u32, tokens: u32) -> Vec<u8> {
    let layout = session
        .layout(kvtier_client::PayloadKind::Kv, tokens)
        .unwrap();
    let mut bytes = vec![0; layout.payload_len()];
    for part in layout.parts() {
        let place = &mut bytes[part.offset..part.offset + part.len];
        pattern(position, part.layer, part.code, place);
    }
    bytes
}

/// Waits until something becomes true; fails with `what` after 20 s.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..4000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never: {what}");
}

pub(crate) fn read(file: &File, slot: &v1::Slot) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(slot.length).unwrap()];
    file.read_exact_at(&mut bytes, slot.offset).unwrap();
    bytes
}
