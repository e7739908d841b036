//! Saves the KV of a prompt, restores it and compares: the whole round with a running kvtierd.
//!
//! `cargo run -p kvtier-client --example save_restore [SOCKET]`
//!
//! The KV here is a pattern; an engine would copy its own pages in the same two closures.
//!
//! Upstairs:   whoever tries the SDK, with a kvtierd that runs.
//! Downstairs: the public face of the SDK.

use kvtier_client::{
    Acknowledge, Bytes, Client, ConnectOptions, Element, Endpoint, LayerSpec, ModelDescriptor,
    Part, PartOrder, PayloadKind, RestoreOptions, SessionOptions, Shard,
};

/// 24 layers, 8 KV heads of 64 in bfloat16: 48 KiB a token, 12 MiB a block of 256.
fn model() -> ModelDescriptor {
    let layer = LayerSpec::Attention {
        kv_heads: 8,
        k_dim: 64,
        v_dim: 64,
        sliding_window: 0,
    };
    ModelDescriptor {
        model: "examples/save_restore".into(),
        revision: String::new(),
        weights_fingerprint: Vec::new(),
        adapter: String::new(),
        element: Element::Bf16,
        layers: vec![layer; 24],
        d_model: 1024,
        rope: None,
        block_tokens: 256,
        order: PartOrder::TokenMajor,
        shard: Shard::WHOLE,
        k_after_rope: true,
    }
}

/// What stands in for the engine's KV cache.
fn kv(position: u32, part: &Part) -> u8 {
    let number = position / 256 * 31 + part.layer * 2 + u32::from(part.code as u8);
    u8::try_from(number % 251).unwrap_or_default()
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let socket = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "/run/kvtier/kvtierd.sock".into());
    let client = Client::connect(Endpoint::unix(socket), ConnectOptions::default()).await?;
    let options = SessionOptions::new("example save_restore").staging_bytes(Bytes::mib(64));
    let session = client.open_session(&model(), options).await?;
    println!(
        "namespace {}, daemon {}",
        session.namespace(),
        session.daemon_version()
    );

    // 4,000 tokens: 15 full blocks and a short one.
    let tokens: Vec<u32> = (0..4000).collect();
    let wait = if session.is_durable() {
        Acknowledge::Durable
    } else {
        Acknowledge::Accepted
    };
    let saving = session.save_prefix(&tokens, b"", wait, |block, part, bytes| {
        bytes.fill(kv(block.position, part));
    });
    let outcomes = saving.await?;
    let stored = outcomes
        .iter()
        .filter(|outcome| outcome.is_stored(wait))
        .count();
    println!("saved {stored} of {} blocks, {wait:?}", outcomes.len());

    let keys = session.prefix_keys(&tokens, b"");
    let lookup = session.lookup(&keys, PayloadKind::Kv).await?;
    println!("lookup: {} leading blocks", lookup.prefix_blocks);

    let restore = session
        .restore(&keys, PayloadKind::Kv, RestoreOptions::default())
        .await?;
    let mut wrong = 0;
    let checking = restore.for_each(|block, payload| {
        let position = u32::try_from(block.index()).unwrap_or(u32::MAX) * 256;
        for part in block.layout().parts() {
            let bytes = payload
                .get(part.offset..part.offset + part.len)
                .unwrap_or_default();
            let right = bytes.len() == part.len && bytes.iter().all(|b| *b == kv(position, part));
            wrong += usize::from(!right);
        }
    });
    let summary = checking.await?;
    println!(
        "restored {} leading blocks, {wrong} parts wrong",
        summary.usable_blocks
    );
    for (index, why) in &summary.missed {
        println!("block {index} missed: {}", why.as_str());
    }
    if wrong > 0 {
        return Err(format!("{wrong} parts are not what was saved").into());
    }
    Ok(())
}
