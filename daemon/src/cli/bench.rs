//! `bench`: a short check of the running daemon's speed, through the same calls engines make.
//!
//! Upstairs:   `kvtier bench`.
//! Downstairs: `bench::session` makes the calls.
//!
//! It answers "is this daemon as fast as it was yesterday", one call at a time from one client.
//! What the machine could do at best, and how the daemon compares, `kvtier-bench` measures.
//!
//! Not here on purpose: no cleaning up. There is no call that forgets single blocks; the
//! benchmark's are few, belong to a model of their own and age out.

mod session;

use std::fmt::Write;
use std::time::Instant;

use kvtier_proto::descriptor::{PartOrder, Shard};
use kvtier_proto::units::MIB;
use kvtier_proto::{BlockKey, Bytes, Element, LayerSpec, ModelDescriptor};
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use super::connect::{CliError, connect};
use super::output::{Answer, size, table};
use super::{EXIT_BAD_NEWS, Target};
use session::{Block, Session};

/// Tokens of a block, so that one layer of the scratch model makes 1 MiB.
const TOKENS: u32 = 256;
/// Most bytes of all blocks together: they are held in this process's memory too.
const TOTAL_MAX: Bytes = Bytes::gib(4);

/// Flags of `bench`.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    target: Target,
    /// Blocks to save and restore; they stay in your namespace until they age out
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1024))]
    blocks: u32,
    /// Size of a block. Unit: MiB
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    block_mib: u32,
    /// How often lookups and leases are repeated
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: u32,
}

pub(super) async fn run(args: &Args) -> Result<Answer, CliError> {
    let bytes = u64::from(args.block_mib) * MIB;
    let total = bytes * u64::from(args.blocks);
    if total > TOTAL_MAX.get() {
        return Err(CliError::Usage(format!(
            "--blocks times --block-mib is {}; accepted: at most {TOTAL_MAX}",
            Bytes(total)
        )));
    }
    let model = model(args.block_mib);
    let mut session = Session::open(connect(&args.target.socket).await?, &model).await?;
    let blocks = blocks(&session, args);
    let keys: Vec<bytes::Bytes> = blocks
        .iter()
        .map(|block| bytes::Bytes::copy_from_slice(block.key.as_bytes()))
        .collect();
    let mut put = Vec::new();
    for block in &blocks {
        let start = Instant::now();
        session.put(block).await?;
        put.push(start.elapsed().as_secs_f64());
    }
    let mut get = Vec::new();
    let mut wrong = 0u32;
    for block in &blocks {
        let start = Instant::now();
        wrong += u32::from(!session.get(block).await?);
        get.push(start.elapsed().as_secs_f64());
    }
    let (lookup, lease, release, batch) = small_calls(&mut session, &keys, args.rounds).await?;
    let rate = |seconds: &[f64]| seconds.iter().map(|s| bytes as f64 / 1e9 / s).collect();
    let leased = batch.iter().map(|s| keys.len() as f64 / s).collect();
    let rows = [
        Row::new("online.lookup.us", "us", micros(&lookup)),
        Row::new("online.lease.us", "us", micros(&lease)),
        Row::new("online.release.us", "us", micros(&release)),
        Row::new("online.lease_batch.blocks_s", "blocks/s", leased),
        Row::new("online.put_inline.us", "us", micros(&put)),
        Row::new("online.put_inline.gb_s", "GB/s", rate(&put)),
        Row::new("online.get_inline.us", "us", micros(&get)),
        Row::new("online.get_inline.gb_s", "GB/s", rate(&get)),
    ];
    Ok(answer(&rows, blocks.len(), bytes, wrong))
}

type Seconds = Vec<f64>;

/// Lookups of all keys; leases and releases of one block; leases of all blocks in one restore.
async fn small_calls(
    session: &mut Session,
    keys: &[bytes::Bytes],
    rounds: u32,
) -> Result<(Seconds, Seconds, Seconds, Seconds), CliError> {
    let (mut lookup, mut lease) = (Vec::new(), Vec::new());
    let (mut release, mut batch) = (Vec::new(), Vec::new());
    // The first restore opens the stream, which is not what is timed.
    let leases = session.lease(keys).await?;
    session.release(leases).await?;
    for (_, key) in (0..rounds).zip(keys.chunks(1).cycle()) {
        let start = Instant::now();
        session.lookup(keys).await?;
        lookup.push(start.elapsed().as_secs_f64());

        let start = Instant::now();
        let leases = session.lease(key).await?;
        lease.push(start.elapsed().as_secs_f64());

        let start = Instant::now();
        session.release(leases).await?;
        release.push(start.elapsed().as_secs_f64());

        let start = Instant::now();
        let leases = session.lease(keys).await?;
        batch.push(start.elapsed().as_secs_f64());
        session.release(leases).await?;
    }
    Ok((lookup, lease, release, batch))
}

/// A model of its own, so that nothing an engine looks up is touched: 1 MiB a layer and block.
fn model(layers: u32) -> ModelDescriptor {
    let layer = LayerSpec::Attention {
        kv_heads: 8,
        k_dim: 128,
        v_dim: 128,
        sliding_window: 0,
    };
    ModelDescriptor {
        model: String::from("kvtier-bench/scratch"),
        revision: String::from("1"),
        weights_fingerprint: Vec::new(),
        adapter: String::new(),
        element: Element::Bf16,
        layers: (0..layers).map(|_| layer).collect(),
        d_model: 1024,
        rope: None,
        block_tokens: TOKENS,
        order: PartOrder::TokenMajor,
        shard: Shard::WHOLE,
        k_after_rope: true,
    }
}

/// Blocks of one prefix that nobody saved before.
fn blocks(session: &Session, args: &Args) -> Vec<Block> {
    let mut random = rand::rngs::StdRng::from_os_rng();
    let values = numbers(&mut random);
    let mut parent = BlockKey::ROOT;
    let mut blocks = Vec::new();
    for index in 0..args.blocks {
        let tokens: Vec<u32> = (0..TOKENS)
            .map(|_| random.random_range(0..100_000))
            .collect();
        let key = session.key(&parent, &tokens);
        let payload = payload(&values, index, args.block_mib);
        blocks.push(Block {
            key,
            parent,
            position: index * TOKENS,
            crc32: crc32fast::hash(&payload),
            payload,
        });
        parent = key;
    }
    blocks
}

/// 1 MiB of bf16 numbers around zero: as compressible as real KV, unlike plain noise.
fn numbers(random: &mut rand::rngs::StdRng) -> Vec<u8> {
    let value = || {
        let sum: f32 = (0..4).map(|_| random.random_range(-0.5f32..0.5)).sum();
        let [_, _, low, high] = sum.to_le_bytes();
        [low, high]
    };
    std::iter::repeat_with(value)
        .take(1 << 19)
        .flatten()
        .collect()
}

/// The numbers over and over, from another place in every block, so that no two are equal.
fn payload(numbers: &[u8], index: u32, mib: u32) -> bytes::Bytes {
    let at = usize::try_from(index).unwrap_or(0) * 502 % numbers.len().max(1);
    let (head, tail) = numbers.split_at(at);
    let one = [tail, head].concat();
    one.repeat(usize::try_from(mib).unwrap_or(1)).into()
}

fn micros(seconds: &[f64]) -> Vec<f64> {
    seconds.iter().map(|s| s * 1e6).collect()
}

/// One line of the result.
struct Row {
    name: &'static str,
    unit: &'static str,
    sorted: Vec<f64>,
}

impl Row {
    fn new(name: &'static str, unit: &'static str, mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self {
            name,
            unit,
            sorted: values,
        }
    }

    /// The value that `part` (0 to 1) of all values do not exceed.
    fn quantile(&self, part: f64) -> f64 {
        let last = self.sorted.len().saturating_sub(1);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an index below the length of a list"
        )]
        let index = (part * last as f64).round() as usize;
        self.sorted.get(index).copied().unwrap_or(0.0)
    }

    /// A quantile for a table: small numbers with more digits.
    fn shown(&self, part: f64) -> String {
        match self.quantile(part) {
            value if value < 10.0 => format!("{value:.2}"),
            value => format!("{value:.0}"),
        }
    }

    fn to_json(&self) -> Value {
        json!({
            "name": self.name, "unit": self.unit, "n": self.sorted.len(),
            "min": self.quantile(0.0), "median": self.quantile(0.5), "p99": self.quantile(0.99),
            "max": self.quantile(1.0), "limit": null, "ratio": null,
        })
    }
}

fn answer(rows: &[Row], blocks: usize, bytes: u64, wrong: u32) -> Answer {
    let mut text = format!("{blocks} blocks of {}, one call at a time\n", size(bytes));
    let mut shown = table(&["what", "unit", ">n", ">min", ">median", ">p99", ">max"]);
    for row in rows {
        let numbers = [0.0, 0.5, 0.99, 1.0].map(|part| row.shown(part));
        let [min, median, p99, max] = numbers;
        let name = row.name.trim_start_matches("online.");
        let n = row.sorted.len().to_string();
        shown.add_row([name, row.unit, &n, &min, &median, &p99, &max]);
    }
    let _ = writeln!(text, "{shown}");
    if wrong > 0 {
        let _ = writeln!(
            text,
            "{wrong} blocks came back with WRONG BYTES: stop using this daemon"
        );
    }
    let mut answer = Answer::new(
        json!({
            "suite": "online", "blocks": blocks, "block_bytes": bytes, "wrong_blocks": wrong,
            "rows": rows.iter().map(Row::to_json).collect::<Vec<_>>(),
        }),
        text,
    );
    answer.code = if wrong > 0 { EXIT_BAD_NEWS } else { 0 };
    answer
}

#[cfg(test)]
mod tests {
    use kvtier_proto::{BlockLayout, PayloadKind};

    use super::*;

    #[test]
    fn scratch_model_makes_blocks_of_the_size_asked_for() {
        for mib in [1, 2, 64] {
            let model = model(mib);
            assert_eq!(model.validate(), []);
            let layout = BlockLayout::new(&model, PayloadKind::Kv, TOKENS).unwrap();
            assert_eq!(layout.payload_len() as u64, u64::from(mib) * MIB);
        }
    }

    #[test]
    fn payloads_have_their_size_and_differ() {
        let numbers = numbers(&mut rand::rngs::StdRng::seed_from_u64(1));
        let hashes = (0..64).map(|index| crc32fast::hash(&payload(&numbers, index, 1)));
        let different: std::collections::BTreeSet<u32> = hashes.collect();
        assert_eq!(different.len(), 64);
        assert_eq!(payload(&numbers, 3, 5).len(), 5 << 20);
    }

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let row = Row::new("x", "us", vec![3.0, 1.0, 2.0]);
        assert_eq!(
            [0.0, 0.5, 0.99, 1.0].map(|part| row.quantile(part)),
            [1.0, 2.0, 3.0, 3.0]
        );
        assert_eq!(Row::new("x", "us", Vec::new()).quantile(0.5), 0.0);
    }

    #[test]
    fn wrong_bytes_are_bad_news_in_every_form() {
        let rows = [Row::new("online.lookup.us", "us", vec![1.0])];
        let good = answer(&rows, 2, MIB, 0);
        let bad = answer(&rows, 2, MIB, 1);
        assert_eq!((good.code, bad.code), (0, EXIT_BAD_NEWS));
        assert!(
            bad.text.contains("1 blocks came back with WRONG BYTES"),
            "{}",
            bad.text
        );
        assert_eq!(bad.json["wrong_blocks"], 1);
        assert_eq!(bad.json["rows"][0]["median"], 1.0);
    }
}
