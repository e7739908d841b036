//! What the levels of a profile take in bits and in processor time, on recorded KV.
//!
//! Upstairs:   whoever tunes the levels, with
//!             `ladder_speed PROFILE KV.safetensors [BLOCK_TOKENS] [LEVEL:PATH]`.
//! Downstairs: `kvtier-kernels`.
//!
//! The file has `K` and `V`, bf16, `[layers, tokens, heads, dim]`. Times are those of this thread,
//! so that neighbours on the machine disturb them less; of several rounds the fastest counts.
//!
//! Not here on purpose: no quality. That takes the model.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "an example for developers: a bad file ends it"
)]

use std::collections::HashMap;
use std::sync::Arc;

use kvtier_kernels::codec::Restored;
use kvtier_kernels::codec::ladder::Ladder;
use kvtier_kernels::profile::Profile;
use kvtier_kernels::simd::Path;
use kvtier_kernels::{Codec, PartShape};
use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::element::Element;
use kvtier_proto::layout::PartCode;
use rustix::time::{ClockId, clock_gettime};

const ROUNDS: usize = 3;
/// Decodings in a round.
const DECODES: u32 = 8;

/// Raw parts by layer and code.
struct Block(HashMap<(u32, u8), Vec<u8>>);

impl Restored for Block {
    fn part(&self, layer: u32, code: PartCode) -> Option<&[u8]> {
        self.0.get(&(layer, code as u8)).map(Vec::as_slice)
    }
}

/// Nanoseconds that this thread ran.
fn thread_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    u64::try_from(time.tv_sec * 1_000_000_000 + time.tv_nsec).unwrap()
}

/// Shape and bytes of a tensor of a safetensors file.
fn tensor(file: &[u8], name: &str) -> ([usize; 4], Vec<u8>) {
    let len = u64::from_le_bytes(file[..8].try_into().unwrap());
    let len = usize::try_from(len).unwrap();
    let head = std::str::from_utf8(&file[8..8 + len]).unwrap();
    let own = head.split(&format!("\"{name}\":")).nth(1).unwrap();
    let numbers = |key: &str| -> Vec<usize> {
        let list = own.split(key).nth(1).unwrap();
        let list = list.split('[').nth(1).unwrap().split(']').next().unwrap();
        list.split(',').map(|n| n.trim().parse().unwrap()).collect()
    };
    let (shape, range) = (numbers("shape"), numbers("data_offsets"));
    let bytes = &file[8 + len..][range[0]..range[1]];
    (shape.try_into().unwrap(), bytes.to_vec())
}

type Parts = Vec<(PartShape, Vec<u8>)>;

/// The parts of a block from a token on.
fn block(tensors: &[([usize; 4], Vec<u8>); 2], from: usize, tokens: usize) -> Parts {
    let mut parts = Vec::new();
    let [layers, all, heads, dim] = tensors[0].0;
    let row = heads * dim * 2;
    for layer in 0..layers {
        for ((_, bytes), code) in tensors.iter().zip([PartCode::K, PartCode::V]) {
            let at = (layer * all + from) * row;
            let int = |n: usize| u32::try_from(n).unwrap();
            let shape = PartShape::new(Element::Bf16, int(tokens), int(heads * dim)).unwrap();
            let shape = shape.of_layer(int(layer), code).at_position(int(from));
            let shape = shape.with_heads(int(heads), PartOrder::TokenMajor).unwrap();
            parts.push((shape, bytes[at..at + tokens * row].to_vec()));
        }
    }
    parts
}

fn measure(codec: &dyn Codec, blocks: &[Parts]) -> [f64; 4] {
    let (mut raw_bytes, mut stored_bytes, mut exact) = (0, 0, 0_u64);
    let mut times = [0; 2];
    for parts in blocks {
        let mut done = Block(HashMap::new());
        for (shape, raw) in parts {
            let mut stored = vec![0; codec.stored_bytes_max(shape)];
            let (mut len, mut out) = (0, vec![0; raw.len()]);
            let mut best = [u64::MAX; 2];
            for _ in 0..ROUNDS {
                let start = thread_ns();
                len = codec.encode_after(shape, raw, &done, &mut stored).unwrap();
                let between = thread_ns();
                for _ in 0..DECODES {
                    let stored = &stored[..len];
                    codec.decode_after(shape, stored, &done, &mut out).unwrap();
                }
                best[0] = best[0].min(between - start);
                best[1] = best[1].min((thread_ns() - between) / u64::from(DECODES));
            }
            raw_bytes += raw.len();
            stored_bytes += len;
            exact += u64::from(u16::from_le_bytes([stored[12], stored[13]]));
            times[0] += best[0];
            times[1] += best[1];
            done.0.insert((shape.layer(), shape.code() as u8), out);
        }
    }
    let bits = 16.0 * stored_bytes as f64 / raw_bytes as f64;
    let speed = |ns: u64| raw_bytes as f64 / ns as f64;
    [
        bits,
        speed(times[0]),
        speed(times[1]),
        exact as f64 / blocks.len() as f64,
    ]
}

fn main() {
    let mut args = std::env::args().skip(1);
    let profile = std::fs::read(args.next().expect("a profile")).unwrap();
    let profile = Arc::new(Profile::from_bytes(&profile).unwrap());
    let file = std::fs::read(args.next().expect("a file of KV")).unwrap();
    let tokens = args.next().map_or(256, |tokens| tokens.parse().unwrap());
    let only: Option<String> = args.next();
    let tensors = ["K", "V"].map(|name| tensor(&file, name));
    let all = tensors[0].0[1];
    let blocks: Vec<_> = (0..all / tokens)
        .map(|at| block(&tensors, at * tokens, tokens))
        .collect();
    println!("level          path    bits   ratio  encode  decode GB/s  exact tokens a block");
    for path in Path::available() {
        for codec in Ladder::all(Arc::clone(&profile)).unwrap() {
            let name = format!("{}:{}", codec.name(), path.name());
            if only.as_ref().is_some_and(|only| *only != name) {
                continue;
            }
            let [bits, encode, decode, exact] = path.at_most(|| measure(&*codec, &blocks));
            let (name, path, ratio) = (codec.name(), path.name(), 16.0 / bits);
            println!(
                "{name:14} {path:7} {bits:5.3}  {ratio:5.2}  {encode:6.3}  {decode:6.3}  {exact:6}"
            );
        }
    }
}
