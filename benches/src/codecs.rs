//! Suite `codecs`: ratio and speed of every codec level and page mover, one core.
//!
//! Upstairs:   `main` picks the suite.
//! Downstairs: [`input`] brings real KV (`--kv PATH`, else the committed sample) and seeded bf16.
//!
//! Speeds are GB/s (10^9) of *raw* bytes by the thread's CPU time, so that a busy neighbour blurs
//! caches but not the clock. Each round runs plain zstd, every level and a memcpy over the same
//! parts one after the other, so that the ratios are pairs of one moment. Every decoded part is
//! compared with what was encoded, outside the clock.
//!
//! Rows are `codecs.LEVEL.INPUT.WHAT`, for example `codecs.zstd.kv.ratio` and
//! `codecs.zstd.kv.decode.gb_s_core`; a level stands beside `codecs.plain_zstd1`, which gets the
//! parts as they are, and that beside `codecs.memcpy`. Movers are `codecs.gather.LAYOUT`.
//!
//! Not here on purpose: no threads. Codecs share nothing; what cores share, memory, is in the
//! suite `limits`.

use std::hint::black_box;
use std::path::PathBuf;

use kvtier_benches::report::{Problem, Report};
use kvtier_kernels::paged::layout::{HeadOrder, LayerPlace, Place, Widths};
use kvtier_kernels::{Codec, PageSpan, PagedLayout, PagedPart, Registry};
use kvtier_proto::Level;
use kvtier_proto::element::Element;
use kvtier_proto::layout::PartCode;
use rustix::time::{ClockId, clock_gettime};

use crate::Common;

mod input;

use input::Input;

/// Unit of all speeds: 10^9 raw bytes a second.
const GB_S: &str = "GB/s";

/// Options of this suite.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Safetensors file, or folder of them, with float tensors [layers, tokens, ...]; K and V of
    /// a model as a rule. Without it the sample beside the codecs is measured.
    #[arg(long, value_name = "PATH")]
    kv: Option<PathBuf>,
}

/// Runs the suite.
pub(crate) fn run(options: &Options, common: &Common) -> Result<Report, Problem> {
    let mut report = Report::new("codecs", &common.dir);
    let rounds = if common.quick { 5 } else { 25 };
    let mut inputs = match &options.kv {
        Some(path) => input::from_path(path)?,
        None => vec![input::sample()?],
    };
    report.note("GB/s are 10^9 raw bytes a second on one core; \"x\" is raw by stored bytes.");
    report.note(match &options.kv {
        Some(path) => format!("Input kv: {}.", path.display()),
        None => "Input kv: the sample beside the codecs (192 KiB of a 135M model).".to_owned(),
    });
    report.note("Input synthetic: seeded normal bf16; its ratio says nothing about a model.");
    inputs.push(input::synthetic(if common.quick { 4 } else { 16 })?);
    for input in &inputs {
        measure_codecs(input, rounds, &mut report)?;
    }
    for (name, layout, part) in layouts() {
        let part = layout.part(0, part)?;
        measure_mover(name, &layout, &part, rounds, &mut report)?;
    }
    Ok(report)
}

/// Time this thread has had a core. Unit: seconds.
fn core_seconds() -> f64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

/// Core seconds that `work` takes.
fn seconds(work: impl FnOnce() -> Result<(), String>) -> Result<f64, String> {
    let start = core_seconds();
    work()?;
    Ok(core_seconds() - start)
}

/// Core seconds of a memcpy of every part into the buffer of its own.
fn memcpy_seconds(parts: &[Vec<u8>], to: &mut [Vec<u8>]) -> f64 {
    let start = core_seconds();
    for (part, to) in parts.iter().zip(to.iter_mut()) {
        to.copy_from_slice(part);
    }
    black_box(to);
    core_seconds() - start
}

/// Encodes one part into the front of the second slice, and the length of it.
type Encode<'a> = Box<dyn FnMut(&[u8], &mut [u8]) -> Result<usize, String> + 'a>;
/// Decodes the whole of the first slice into the whole of the second.
type Decode<'a> = Box<dyn FnMut(&[u8], &mut [u8]) -> Result<(), String> + 'a>;

/// One coder and what it made. Every part has buffers of its own, touched before the first
/// measured round, so that no coder gains by a cache that memcpy does not have.
struct Coder<'a> {
    /// Second word of its rows.
    name: &'static str,
    input: &'a Input,
    encode: Encode<'a>,
    decode: Decode<'a>,
    stored: Vec<Vec<u8>>,
    lens: Vec<usize>,
    encode_speeds: Vec<f64>,
    decode_speeds: Vec<f64>,
}

impl<'a> Coder<'a> {
    fn new(
        name: &'static str,
        input: &'a Input,
        room: usize,
        (encode, decode): (Encode<'a>, Decode<'a>),
    ) -> Self {
        let parts = input.parts.len();
        let (stored, lens) = (vec![vec![0; room]; parts], vec![0; parts]);
        Self {
            name,
            input,
            encode,
            decode,
            stored,
            lens,
            encode_speeds: vec![],
            decode_speeds: vec![],
        }
    }

    /// A level of the registry.
    fn level(codec: &'a dyn Codec, input: &'a Input) -> Self {
        let (room, shape) = (codec.stored_bytes_max(&input.shape), &input.shape);
        let encode = move |raw: &[u8], out: &mut [u8]| {
            codec.encode(shape, raw, out).map_err(|e| e.to_string())
        };
        let decode = move |stored: &[u8], out: &mut [u8]| {
            codec.decode(shape, stored, out).map_err(|e| e.to_string())
        };
        Self::new(
            codec.name(),
            input,
            room,
            (Box::new(encode), Box::new(decode)),
        )
    }

    /// What one gets by handing the parts to `zstd` of level 1 as they are.
    fn plain_zstd(input: &'a Input) -> Result<Self, Problem> {
        let room = zstd::zstd_safe::compress_bound(input.shape.raw_bytes());
        let mut coder = zstd::bulk::Compressor::new(1)?;
        let mut decoder = zstd::bulk::Decompressor::new()?;
        let encode = move |raw: &[u8], out: &mut [u8]| {
            coder
                .compress_to_buffer(raw, out)
                .map_err(|e| e.to_string())
        };
        let decode = move |stored: &[u8], out: &mut [u8]| {
            decoder
                .decompress_to_buffer(stored, out)
                .map(|_| ())
                .map_err(|e| e.to_string())
        };
        let coder: (Encode<'_>, Decode<'_>) = (Box::new(encode), Box::new(decode));
        Ok(Self::new("plain_zstd1", input, room, coder))
    }

    /// Encodes and decodes everything once, and compares.
    fn round(&mut self, decoded: &mut [Vec<u8>], keep: bool) -> Result<(), String> {
        let Self {
            input,
            encode,
            decode,
            stored,
            lens,
            ..
        } = self;
        let encode_seconds = seconds(|| {
            for ((part, stored), len) in input.parts.iter().zip(&mut *stored).zip(&mut *lens) {
                *len = encode(part, stored)?;
            }
            Ok(())
        })?;
        let decode_seconds = seconds(|| {
            for ((stored, len), out) in stored.iter().zip(&*lens).zip(&mut *decoded) {
                decode(stored.get(..*len).unwrap_or_default(), out)?;
            }
            Ok(())
        })?;
        if decoded != &input.parts[..] {
            return Err("decoded parts are not what was encoded".to_owned());
        }
        if keep {
            let raw = input.raw_bytes() as f64;
            self.encode_speeds.push(raw / encode_seconds / 1e9);
            self.decode_speeds.push(raw / decode_seconds / 1e9);
        }
        Ok(())
    }

    /// Raw bytes by stored bytes.
    fn ratio(&self) -> f64 {
        self.input.raw_bytes() as f64 / self.lens.iter().sum::<usize>() as f64
    }

    fn speeds(&self, decode: bool) -> &[f64] {
        if decode {
            &self.decode_speeds
        } else {
            &self.encode_speeds
        }
    }

    /// Ratio and speeds, beside those of `plain`, else the speeds beside memcpy.
    fn rows(&self, plain: Option<&Self>, memcpy: (&str, &[f64]), report: &mut Report) {
        let name = |coder: &Self, what| format!("codecs.{}.{}.{what}", coder.name, self.input.name);
        let ratio = name(self, "ratio");
        match plain {
            Some(plain) => {
                let limit = (&name(plain, "ratio")[..], &[plain.ratio()][..]);
                report.beside((ratio, "x"), &[self.ratio()], limit, None);
            }
            None => report.row(ratio, "x", &[self.ratio()]),
        }
        for (what, decode) in [("encode.gb_s_core", false), ("decode.gb_s_core", true)] {
            let row = (name(self, what), GB_S);
            match plain {
                Some(plain) => {
                    let limit = (&name(plain, what)[..], plain.speeds(decode));
                    report.beside(row, self.speeds(decode), limit, None);
                }
                None => report.beside(row, self.speeds(decode), memcpy, None),
            }
        }
    }
}

/// Every level beside plain zstd of level 1, and that beside memcpy.
fn measure_codecs(input: &Input, rounds: usize, report: &mut Report) -> Result<(), Problem> {
    let registry = Registry::builtin();
    // Level raw is a memcpy: the reference of the others.
    let levels = registry.iter().filter(|codec| codec.level() != Level::RAW);
    let mut levels: Vec<_> = levels.map(|codec| Coder::level(codec, input)).collect();
    let mut plain = Coder::plain_zstd(input)?;
    let mut decoded = vec![vec![0; input.shape.raw_bytes()]; input.parts.len()];
    let mut memcpy = Vec::new();
    for round in 0..=rounds {
        let keep = round > 0; // the first warms caches, contexts and pages
        plain.round(&mut decoded, keep)?;
        for level in &mut levels {
            level.round(&mut decoded, keep)?;
        }
        let copied = memcpy_seconds(&input.parts, &mut decoded);
        if keep {
            memcpy.push(input.raw_bytes() as f64 / copied / 1e9);
        }
    }
    let copy = format!("codecs.memcpy.{}.gb_s_core", input.name);
    report.row(&copy, GB_S, &memcpy);
    plain.rows(None, (&copy, &memcpy), report);
    for level in &levels {
        level.rows(Some(&plain), (&copy, &memcpy), report);
    }
    Ok(())
}

/// Paged layouts worth a figure: the shapes of an 8-billion-parameter model and of MLA.
fn layouts() -> Vec<(&'static str, PagedLayout, PartCode)> {
    let kv = |order, layer| PagedLayout {
        element: Element::Bf16,
        pages: 256,
        page_tokens: 16,
        heads: 8,
        widths: Widths::Kv { k: 128, v: 128 },
        order,
        layers: vec![layer],
    };
    let page = 16 * 8 * 128 * 2;
    let apart = |page_stride| Place {
        base: 0,
        page_stride,
    };
    let split = LayerPlace::Split([
        apart(2 * page),
        Place {
            base: page,
            page_stride: 2 * page,
        },
    ]);
    let mla = PagedLayout {
        heads: 1,
        page_tokens: 64,
        widths: Widths::Latent {
            latent: 512,
            rope: 64,
        },
        ..kv(HeadOrder::Nhd, LayerPlace::Interleaved(apart(64 * 576 * 2)))
    };
    let joint = LayerPlace::Interleaved(apart(2 * page));
    vec![
        ("nhd", kv(HeadOrder::Nhd, split), PartCode::K),
        ("hnd", kv(HeadOrder::Hnd, split), PartCode::K),
        ("nhd_interleaved", kv(HeadOrder::Nhd, joint), PartCode::V),
        ("mla", mla, PartCode::Latent),
    ]
}

/// Gather and scatter of blocks of 256 tokens through shuffled pages, beside memcpy.
fn measure_mover(
    name: &str,
    layout: &PagedLayout,
    part: &PagedPart,
    rounds: usize,
    report: &mut Report,
) -> Result<(), Problem> {
    const TOKENS: u32 = 256;
    let mut pool: Vec<u8> = (0..part.pool_bytes())
        .map(|at| at.to_le_bytes()[0])
        .collect();
    // 97 is prime: every page once, none beside the last.
    let table: Vec<u32> = (0..layout.pages)
        .map(|page| page * 97 % layout.pages)
        .collect();
    let all = layout.pages * layout.page_tokens;
    let spans: Result<Vec<_>, _> = (0..all / TOKENS)
        .map(|i| {
            let tokens = i * TOKENS..(i + 1) * TOKENS;
            PageSpan::new(&table, tokens, layout.page_tokens, layout.pages)
        })
        .collect();
    let spans = spans?;
    let len = spans.first().map_or(0, |span| part.part_bytes(span));
    let mut parts = vec![vec![0; len]; spans.len()];
    let source = parts.clone();
    let [mut gather, mut scatter, mut memcpy] = [vec![], vec![], vec![]];
    for round in 0..=rounds {
        let gathered = seconds(|| {
            let mut pairs = spans.iter().zip(&mut parts);
            pairs
                .try_for_each(|(span, to)| part.gather(&pool, span, to))
                .map_err(|e| e.to_string())
        })?;
        let scattered = seconds(|| {
            let mut pairs = spans.iter().zip(&parts);
            let mut put = |(span, from): (&PageSpan<'_>, &Vec<u8>)| {
                part.scatter(from, span, &mut pool)
                    .map_err(|e| e.to_string())
            };
            pairs.try_for_each(&mut put)
        })?;
        let copied = memcpy_seconds(&source, &mut parts);
        if round > 0 {
            let speed = |seconds: f64| (len * spans.len()) as f64 / seconds / 1e9;
            gather.push(speed(gathered));
            scatter.push(speed(scattered));
            memcpy.push(speed(copied));
        }
    }
    let copy = format!("codecs.memcpy.{name}.gb_s_core");
    report.row(&copy, GB_S, &memcpy);
    for (what, values) in [("gather", gather), ("scatter", scatter)] {
        let row = (format!("codecs.{what}.{name}.gb_s_core"), GB_S);
        report.beside(row, &values, (&copy, &memcpy), None);
    }
    Ok(())
}
