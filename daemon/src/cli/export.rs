//! `export`: K and V of a stored prefix as a sample for `calibrate`.
//!
//! Upstairs:   `kvtier export`.
//! Downstairs: `chain` finds the blocks, `sample` writes the file; `Explain` and `GetInline` of
//!             the control protocol.
//!
//! A key is a hash: it says nothing of its prefix. So the walk begins at the last block and asks
//! for the one before it until there is none. What the bytes of a block mean the daemon knows from
//! a session of the engine that saved it.
//!
//! Not here on purpose: no bytes of another namespace. Whoever exports is a user of the namespace;
//! an operator is not. And nothing that lost something: calibration would learn the loss.

mod chain;
mod sample;

use std::fmt::Write;
use std::io::IsTerminal;
use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};
use kvtier_proto::descriptor::{PartOrder, Shard};
use kvtier_proto::limits::BLOCK_TOKENS_MIN;
use kvtier_proto::v1::kvtier_client::KvtierClient;
use kvtier_proto::v1::{self, get_inline_reply::Part};
use kvtier_proto::{
    BlockKey, BlockLayout, Element, LayerSpec, Level, Miss, ModelDescriptor, PayloadKind, Quality,
};
use serde_json::json;
use tonic::transport::Channel;

use super::connect::{CliError, connect, question};
use super::explain::meaning;
use super::output::{Answer, size};
use super::session::{Session, unexpected};
use super::{Target, key};
use chain::Link;
use sample::{Sample, Shape};

/// What the daemon shows of these sessions.
const WHO: &str = "kvtier export";

/// Flags of `export`.
#[derive(Debug, Clone, clap::Args)]
#[command(
    after_help = "Run it as a user of the namespace, while the daemon knows the model: a session \
of its engine has been open since the daemon started. Every block of the prefix must be stored \
exactly."
)]
pub(super) struct Args {
    #[command(flatten)]
    target: Target,
    /// Key of the last block of the prefix: 64 hex digits
    #[arg(long, value_parser = key)]
    key: BlockKey,
    /// File of the sample
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub(super) async fn run(args: &Args) -> Result<Answer, CliError> {
    let client = connect(&args.target.socket).await?;
    let (chain, model) = walk(client.clone(), args.key).await?;
    let shape = Shape::of(&model).map_err(CliError::Usage)?;
    let tokens = chain.iter().map(|link| link.tokens).sum();
    let mut sample = Sample::create(&args.out, shape, tokens).map_err(CliError::Usage)?;
    let mut session = Session::open(client, &model, WHO).await?;
    let bar = bar(chain.len());
    for link in &chain {
        let layout = BlockLayout::new(&model, PayloadKind::Kv, link.tokens);
        let layout = layout.map_err(|problem| unexpected(problem.to_string()))?;
        let payload = get(&mut session, link, &layout).await?;
        let put = sample.put(&layout, link.position, &payload);
        put.map_err(CliError::Usage)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    let bytes = sample.finish().map_err(CliError::Usage)?;
    Ok(answer(args, &model, (chain.len(), tokens, bytes)))
}

/// The blocks of the prefix that ends with `last`, first one first, and the model that they are of.
async fn walk(
    client: KvtierClient<Channel>,
    last: BlockKey,
) -> Result<(Vec<Link>, ModelDescriptor), CliError> {
    let mut session = Session::open(client, &unknown(), WHO).await?;
    let (mut chain, mut model) = (Vec::new(), None);
    let mut key = last;
    loop {
        let request = v1::ExplainRequest {
            session: session.id.clone(),
            namespace_id: 0,
            key: bytes::Bytes::copy_from_slice(key.as_bytes()),
        };
        let reply = session.client.explain(question(request)).await?;
        let (link, of) = chain::link(key, &reply.into_inner()).map_err(CliError::Usage)?;
        if model.get_or_insert_with(|| of.clone()) != &of {
            let key = key.to_hex();
            let text = format!("block {key} is of another model than those after it");
            return Err(CliError::Usage(text));
        }
        chain::follows(&link, chain.last()).map_err(CliError::Usage)?;
        key = link.parent;
        chain.push(link);
        if key == BlockKey::ROOT {
            break;
        }
    }
    chain.reverse();
    let model = model.as_ref().map(ModelDescriptor::try_from).transpose();
    let model = model.map_err(|problem| unexpected(problem.to_string()))?;
    let model = model.ok_or_else(|| unexpected("a prefix without blocks"))?;
    Ok((chain, model))
}

/// What a session is of that does not know its model yet.
fn unknown() -> ModelDescriptor {
    ModelDescriptor {
        model: String::from("kvtier-export/unknown"),
        revision: String::new(),
        weights_fingerprint: Vec::new(),
        adapter: String::new(),
        element: Element::U8,
        layers: vec![LayerSpec::Opaque {
            bytes_per_token: 1,
            bytes_per_block: 0,
        }],
        d_model: 1,
        rope: None,
        block_tokens: BLOCK_TOKENS_MIN,
        order: PartOrder::TokenMajor,
        shard: Shard::WHOLE,
        k_after_rope: true,
    }
}

/// The bytes of a block, which are those that were saved.
async fn get(
    session: &mut Session,
    link: &Link,
    layout: &BlockLayout,
) -> Result<Vec<u8>, CliError> {
    let request = v1::GetInlineRequest {
        session: session.id.clone(),
        keys: vec![bytes::Bytes::copy_from_slice(link.key.as_bytes())],
        kind: v1::PayloadKind::Kv as i32,
        scattered: false,
        accept: v1::Quality::Exact as i32,
    };
    let mut stream = session.client.get_inline(request).await?.into_inner();
    let (want, mut payload, mut checksum) = (layout.payload_len(), Vec::new(), None);
    while let Some(reply) = stream.message().await? {
        match reply.part {
            Some(Part::Block(block)) => {
                let level = u8::try_from(block.level).map(Level).map(Level::quality);
                if level != Ok(Quality::Exact) || block.length != want as u64 {
                    return Err(unexpected("a block of another level or size"));
                }
                checksum = Some(block.crc32);
            }
            Some(Part::Data(data)) if payload.len() + data.len() <= want => {
                payload.extend_from_slice(&data);
            }
            Some(Part::Data(_)) => return Err(unexpected("more bytes than a block has")),
            Some(Part::Done(done)) => arrived(link, &done)?,
            None => {}
        }
    }
    let right = payload.len() == want && checksum == Some(crc32fast::hash(&payload));
    let wrong = || unexpected(format!("other bytes of block {}", link.key.to_hex()));
    right.then_some(payload).ok_or_else(wrong)
}

/// Did the block come?
fn arrived(link: &Link, done: &v1::RestoreDone) -> Result<(), CliError> {
    if done.usable_blocks == 1 {
        return Ok(());
    }
    let reason = done.missed.first().map(v1::MissedBlock::reason);
    let reason = reason.and_then(|reason| Miss::try_from(reason).ok());
    let why = reason.map_or("The daemon gives no reason.", meaning);
    let (key, reason) = (link.key.to_hex(), reason.map_or("unknown", Miss::as_str));
    let text = format!("block {key} did not come: {reason}. {why}");
    Err(CliError::Usage(text))
}

fn bar(blocks: usize) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(blocks as u64);
    match ProgressStyle::with_template("[{wide_bar}] {pos} of {len} blocks, {eta} left") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn answer(
    args: &Args,
    model: &ModelDescriptor,
    (blocks, tokens, bytes): (usize, u32, u64),
) -> Answer {
    let file = args.out.display().to_string();
    let command = calibrate(model, &file);
    let name = crate::log::clean(&model.model);
    let mut text = format!(
        "{file}: {tokens} tokens of {name} in {blocks} blocks, {}\n\nA few such samples, of texts \
         like those to come, make tables:\n{}\n",
        size(bytes),
        command
            .iter()
            .map(|one| quoted(one))
            .collect::<Vec<_>>()
            .join(" ")
    );
    for note in notes(model) {
        let _ = writeln!(text, "\n{note}");
    }
    let json = json!({
        "file": file, "tokens": tokens, "blocks": blocks, "bytes": bytes, "model": model.model,
        "revision": model.revision, "layers": model.layers.len(), "calibrate": command,
        "notes": notes(model),
    });
    Answer::new(json, text)
}

/// The command that makes tables of the sample.
fn calibrate(model: &ModelDescriptor, file: &str) -> Vec<String> {
    let mut command = vec!["kvtier".to_owned(), "calibrate".to_owned()];
    let mut flag = |name: &str, value: String| command.extend([name.to_owned(), value]);
    flag("--model-name", model.model.clone());
    if !model.revision.is_empty() {
        flag("--revision", model.revision.clone());
    }
    if !model.weights_fingerprint.is_empty() {
        let digits = model.weights_fingerprint.iter();
        let digits = digits.map(|byte| format!("{byte:02x}")).collect();
        flag("--weights-fingerprint", digits);
    }
    match model.rope.as_ref().filter(|_| model.k_after_rope) {
        None => flag("--rope", "none".to_owned()),
        Some(rope) => {
            flag("--rope-theta", rope.theta.to_string());
            flag("--rotary-dim", rope.rotary_dim.to_string());
            flag("--rotate-half", rope.rotate_half.to_string());
        }
    }
    flag("--out", "model.kvtables".to_owned());
    command.push(file.to_owned());
    command
}

/// What the command does not know.
fn notes(model: &ModelDescriptor) -> Vec<String> {
    let mut notes = Vec::new();
    match &model.rope {
        Some(rope) if !rope.scaling.is_empty() && model.k_after_rope => notes.push(format!(
            "K was rotated by scaled angles ({}), and calibrate knows plain ones only: the levels \
             take more bits than they could.",
            crate::log::clean(&rope.scaling)
        )),
        None if model.k_after_rope => notes.push(String::from(
            "The engine does not say that K is rotated. If it is, give --rope-theta instead of \
             --rope none.",
        )),
        _ => {}
    }
    if model.shard.pp_size > 1 {
        let text = "These are layers of one stage of a pipeline: tables of it are not used.";
        notes.push(text.to_owned());
    }
    notes
}

/// A word of a command line, as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |one: char| one.is_ascii_alphanumeric() || "-_./=:,@+".contains(one);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!(
            "'{}'",
            crate::log::clean(word).to_string().replace('\'', r"'\''")
        ),
    }
}

#[cfg(test)]
mod tests {
    use kvtier_proto::descriptor::Rope;

    use super::*;

    #[test]
    fn command_says_of_the_model_what_calibrate_asks_for() {
        let mut model = unknown();
        model.model = "a model's".to_owned();
        let words = calibrate(&model, "a.safetensors").join(" ");
        assert_eq!(
            words,
            "kvtier calibrate --model-name a model's --rope none --out model.kvtables a.safetensors"
        );
        assert_eq!(quoted(&model.model), r"'a model'\''s'");
        assert!(notes(&model)[0].contains("--rope-theta"));
        model.revision = "main".to_owned();
        model.weights_fingerprint = vec![10, 0xbc];
        model.rope = Some(Rope {
            theta: 100_000.0,
            rotary_dim: 64,
            rotate_half: false,
            scaling: "yarn".to_owned(),
        });
        let words = calibrate(&model, "a").join(" ");
        let want = "--revision main --weights-fingerprint 0abc --rope-theta 100000 --rotary-dim 64 \
                    --rotate-half false --out";
        assert!(words.contains(want), "{words}");
        assert!(notes(&model)[0].contains("scaled angles (yarn)"));
        model.k_after_rope = false;
        assert!(calibrate(&model, "a").join(" ").contains("--rope none"));
        assert!(notes(&model).is_empty());
    }
}
