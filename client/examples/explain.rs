//! Says for every block of a prompt where it is, or why it misses.
//!
//! `cargo run -p kvtier-client --example explain [SOCKET [TOKENS]]`
//!
//! Asks about the prompt of the `save_restore` example: run that one first, or every block is
//! absent. With more `TOKENS` than its 4,000 the rest of the prompt shows what a miss looks like.
//!
//! Upstairs:   whoever tries the SDK, with a kvtierd that runs.
//! Downstairs: the public face of the SDK.

use kvtier_client::{
    Bytes, Client, ConnectOptions, Element, Endpoint, LayerSpec, ModelDescriptor, PartOrder,
    SessionOptions, Shard,
};

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

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let socket = arguments
        .next()
        .unwrap_or_else(|| "/run/kvtier/kvtierd.sock".into());
    let tokens: u32 = arguments.next().map_or(Ok(4000), |text| text.parse())?;
    let client = Client::connect(Endpoint::unix(socket), ConnectOptions::default()).await?;
    // Reads only: no staging memory.
    let options = SessionOptions::new("example explain").staging_bytes(Bytes(0));
    let session = client.open_session(&model(), options).await?;

    let tokens: Vec<u32> = (0..tokens).collect();
    for (index, key) in session.prefix_keys(&tokens, b"").iter().enumerate() {
        let explained = session.explain(key).await?;
        let miss = explained.miss.map_or("hit", |miss| miss.as_str());
        println!("block {index} {key}: {miss}");
        for variant in &explained.variants {
            println!(
                "  {} on {:?}, level {} ({}), {} of {} bytes {}",
                variant.kind.as_str(),
                variant.tier,
                variant.level,
                variant.level_name,
                variant.stored_bytes,
                variant.raw_bytes,
                variant.place
            );
        }
        for note in &explained.notes {
            println!("  {note}");
        }
    }
    Ok(())
}
