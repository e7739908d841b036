//! `kvtier export`: what an engine saved, in files that `kvtier calibrate` reads.
//!
//! Upstairs:   `main`.
//! Downstairs: the daemon of a test, and the control protocol by hand in place of an engine.

use std::path::Path;

use kvtier_kernels::calibrate::samples::Document;
use kvtier_proto::descriptor::{PartOrder, Rope, Shard};
use kvtier_proto::layout::PartCode;
use kvtier_proto::limits::PROTOCOL_VERSION;
use kvtier_proto::v1::kvtier_client::KvtierClient;
use kvtier_proto::v1::{self, put_inline_request::Part, session_event::Event};
use kvtier_proto::{
    BlockKey, BlockLayout, Element, LayerSpec, ModelDescriptor, Part as LayoutPart, PayloadKind,
};
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

use super::{Daemon, Value, arg, offline};

const BLOCK_TOKENS: u32 = 64;
/// Tokens of the blocks of a prefix.
const BLOCKS: [u32; 3] = [BLOCK_TOKENS, BLOCK_TOKENS, 40];
const TOKENS: u32 = 168;

fn model() -> ModelDescriptor {
    let layer = LayerSpec::Attention {
        kv_heads: 2,
        k_dim: 4,
        v_dim: 6,
        sliding_window: 0,
    };
    ModelDescriptor {
        model: "tiny".to_owned(),
        revision: "1".to_owned(),
        weights_fingerprint: vec![0xa1, 2],
        adapter: "an adapter".to_owned(),
        element: Element::Bf16,
        layers: vec![layer; 2],
        d_model: 8,
        rope: Some(Rope {
            theta: 10_000.0,
            rotary_dim: 4,
            rotate_half: false,
            scaling: String::new(),
        }),
        block_tokens: BLOCK_TOKENS,
        order: PartOrder::HeadMajor,
        shard: Shard::WHOLE,
        k_after_rope: true,
    }
}

/// A bf16 number of either sign that looks random.
fn value(text: u8, code: PartCode, place: [u32; 4]) -> [u8; 2] {
    let mut state = u32::from(text) << 8 | code as u32;
    for number in place {
        state = (state ^ number).wrapping_mul(0x9e37_79b1);
        state ^= state >> 15;
    }
    let [low, high, ..] = state.to_le_bytes();
    [low, 0x3e + (high & 0x81)]
}

/// The bytes of a block, heads before tokens.
fn payload(text: u8, first: u32, tokens: u32) -> Vec<u8> {
    let layout = BlockLayout::new(&model(), PayloadKind::Kv, tokens).unwrap();
    let values = |part: &LayoutPart| {
        let (layer, code, heads) = (part.layer, part.code, part.heads);
        let dim = part.width / heads;
        let rows = (0..heads).flat_map(move |head| (0..tokens).map(move |token| (head, token)));
        let places = rows.flat_map(move |(head, token)| (0..dim).map(move |at| (head, token, at)));
        places
            .flat_map(move |(head, token, at)| value(text, code, [layer, first + token, head, at]))
    };
    layout.parts().iter().flat_map(values).collect()
}

/// What a sample has of a layer: all tokens, heads within.
fn of_layer(text: u8, code: PartCode, layer: u32) -> Vec<u8> {
    let dim = if code == PartCode::K { 4 } else { 6 };
    let rows = (0..TOKENS).flat_map(|token| (0..2).map(move |head| (token, head)));
    let places = rows.flat_map(|(token, head)| (0..dim).map(move |at| [layer, token, head, at]));
    places.flat_map(|place| value(text, code, place)).collect()
}

/// Key of a block of a text.
fn key(text: u8, block: u8) -> BlockKey {
    let mut key = [text; 32];
    key[31] = block;
    BlockKey(key)
}

/// The session of an engine.
struct Engine {
    rpc: KvtierClient<Channel>,
    session: bytes::Bytes,
    _events: Streaming<v1::SessionEvent>,
}

impl Engine {
    async fn connect(daemon: &Daemon) -> Self {
        let socket = daemon.dir.path().join("s");
        let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display())).unwrap();
        let mut rpc = KvtierClient::new(endpoint.connect().await.unwrap());
        let request = v1::OpenSessionRequest {
            protocol_version: PROTOCOL_VERSION,
            client: "an engine".to_owned(),
            model: Some((&model()).into()),
            reader: None,
        };
        let mut events = rpc.open_session(request).await.unwrap().into_inner();
        let first = events.message().await.unwrap().unwrap().event;
        let Some(Event::Opened(opened)) = first else {
            panic!("{first:?}")
        };
        Self {
            rpc,
            session: opened.session,
            _events: events,
        }
    }

    /// Saves blocks of a text until they are durable, from one on.
    async fn save(&mut self, text: u8, from: usize) {
        let (mut parts, mut position) = (Vec::new(), 0);
        for (block, tokens) in (0..).zip(BLOCKS) {
            let parent = match block {
                0 => BlockKey::ROOT,
                block => key(text, block - 1),
            };
            let bytes = payload(text, position, tokens);
            if usize::from(block) >= from {
                parts.push(Part::Block(v1::PutInlineBlock {
                    session: self.session.clone(),
                    block: Some(v1::BlockToSave {
                        key: key(text, block).0.to_vec().into(),
                        parent: parent.0.to_vec().into(),
                        position,
                        tokens,
                        kind: v1::PayloadKind::Kv as i32,
                        opaque_bytes: 0,
                        slot: 0,
                        through: 0,
                    }),
                    crc32: crc32fast::hash(&bytes),
                    wait_for: v1::Acknowledge::Durable as i32,
                }));
                parts.push(Part::Data(bytes.into()));
            }
            position += tokens;
        }
        let parts = parts.into_iter();
        let parts = parts.map(|part| v1::PutInlineRequest { part: Some(part) });
        let parts = tokio_stream::iter(parts.collect::<Vec<_>>());
        let reply = self.rpc.put_inline(parts).await.unwrap().into_inner();
        let durable = v1::commit_result::Result::Acknowledged(v1::Acknowledge::Durable as i32);
        let all = |one: &v1::CommitResult| one.result == Some(durable);
        assert!(reply.results.iter().all(all), "{reply:?}");
    }
}

fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build();
    runtime.unwrap().block_on(work)
}

fn export(daemon: &Daemon, text: u8, out: &Path) -> Result<Value, String> {
    let last = key(text, 2).to_hex();
    let output = daemon.kvtier(&["export", "--key", &last, "--out", arg(out), "--json"]);
    match output.status.success() {
        true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
        false => Err(String::from_utf8(output.stderr).unwrap()),
    }
}

// Goal: what an engine saved makes tables, without a file of anybody's own making.
// Method: two prefixes through the daemon, exported from host memory and, after a kill, from the
// disk; every byte against what was saved; calibrate as export says.
#[test]
fn saved_prefix_is_exported_as_it_was_and_makes_tables() {
    run(async {
        let daemon = Daemon::start();
        let at = |daemon: &Daemon, name: &str| daemon.dir.path().join(name);
        let mut engine = Engine::connect(&daemon).await;
        for text in [1, 2] {
            engine.save(text, 0).await;
            let path = at(&daemon, &format!("{text}.safetensors"));
            let told = export(&daemon, text, &path).unwrap();
            assert_eq!((&told["tokens"], &told["blocks"]), (&168.into(), &3.into()));
            assert_eq!(told["model"], "tiny");
            let bytes = std::fs::read(&path).unwrap();
            assert_eq!(told["bytes"], bytes.len());
            let document = Document::parse(&bytes).unwrap();
            for code in [PartCode::K, PartCode::V] {
                for layer in 0..2 {
                    let got = document.tensor(code).layer_bytes(layer as usize);
                    assert!(
                        got == of_layer(text, code, layer),
                        "{text} {code:?} {layer}"
                    );
                }
            }
        }
        drop(engine);
        let daemon = daemon.restart();
        let again = at(&daemon, "again");
        let unknown = export(&daemon, 1, &again).unwrap_err();
        assert!(unknown.contains("no session with its model"), "{unknown}");
        let _engine = Engine::connect(&daemon).await;
        let told = export(&daemon, 1, &again).unwrap();
        let first = at(&daemon, "1.safetensors");
        let same = std::fs::read(&again).unwrap() == std::fs::read(&first).unwrap();
        assert!(same, "from the disk comes what came from host memory");
        calibrate(&told, &daemon, &at(&daemon, "2.safetensors"));
    });
}

/// Makes tables as `export` said.
fn calibrate(told: &Value, daemon: &Daemon, held_out: &Path) {
    let words = told["calibrate"].as_array().unwrap().iter();
    let words: Vec<&str> = words.map(|word| word.as_str().unwrap()).collect();
    let tables = daemon.dir.path().join("tiny.kvtables");
    let mut args: Vec<&str> = words[1..].to_vec();
    let out = args.iter().position(|word| *word == "model.kvtables");
    args[out.unwrap()] = arg(&tables);
    args.extend(["--held-out", arg(held_out), "--lossless-x", "--json"]);
    let made = offline(&args);
    assert!(made.status.success(), "{args:?}: {made:?}");
    let made: Value = serde_json::from_slice(&made.stdout).unwrap();
    assert_eq!(
        (&made["tokens"], &made["held_out"]),
        (&167.into(), &1.into())
    );
    let names = made["levels"].as_array().unwrap().iter();
    let names: Vec<&str> = names.map(|level| level["name"].as_str().unwrap()).collect();
    assert!(
        names.contains(&"balanced_x") && names.contains(&"lossless_x"),
        "{names:?}"
    );
    let profile = kvtier_kernels::profile::Profile::from_bytes(&std::fs::read(tables).unwrap());
    let profile = profile.unwrap();
    assert_eq!(
        (profile.model.as_str(), profile.revision.as_str()),
        ("tiny", "1")
    );
    assert_eq!(profile.weights_fingerprint, [0xa1, 2]);
    let rope = kvtier_kernels::profile::Rope::plain(10_000.0, 4, false);
    assert_eq!(profile.rope, Some(rope));
}

#[test]
fn prefix_that_is_not_whole_is_refused_and_leaves_no_file() {
    run(async {
        let daemon = Daemon::start();
        let out = daemon.dir.path().join("out");
        let absent = export(&daemon, 1, &out).unwrap_err();
        let text = format!("there is no KV of block {}: absent", key(1, 2).to_hex());
        assert!(absent.contains(&text), "{absent}");
        let mut engine = Engine::connect(&daemon).await;
        engine.save(1, 1).await;
        let absent = export(&daemon, 1, &out).unwrap_err();
        let text = format!("there is no KV of block {}: absent", key(1, 0).to_hex());
        assert!(absent.contains(&text), "{absent}");
        assert!(!out.exists() && !out.with_extension("part").exists());
    });
}
