//! Suite `codecs`: ratio and speed of every codec level and page mover, one core.
//!
//! Upstairs:   `main` picks the suite.
//! Downstairs: [`input`] brings real KV (`--kv PATH`, else the committed sample) and seeded bf16.
//!
//! Speeds are GB/s (10^9) of *raw* bytes by the thread's CPU time, so that a busy neighbour blurs
//! caches but not the clock. Each round runs plain zstd, every level and a memcpy over the same
//! parts one after the other, so that the ratios are pairs of one moment. Every decoded part is
//! compared with what was encoded, outside the clock; of a level that loses something, every value
//! is within the error that the part declares.
//!
//! Rows are `codecs.LEVEL.INPUT.WHAT`, for example `codecs.zstd.kv.ratio` and
//! `codecs.zstd.kv.decode.gb_s_core`; a level stands beside `codecs.plain_zstd1`, which gets the
//! parts as they are, as `codecs.plain_lz4` does, and these beside `codecs.memcpy`. `LEVEL_avx2` is
//! the level without AVX-512, on a processor that has it. What was promised of a level has rows of
//! its own, `codecs.LEVEL.INPUT.WHAT.promise`, beside the number that was promised. Movers are
//! `codecs.gather.LAYOUT`.
//!
//! Not here on purpose: no threads. Codecs share nothing; what cores share, memory, is in the
//! suite `limits`.

use std::hint::black_box;
use std::path::PathBuf;

use kvtier_benches::report::{Problem, Report};
use kvtier_kernels::codec::quant::floats;
use kvtier_kernels::paged::layout::{HeadOrder, LayerPlace, Place, Widths};
use kvtier_kernels::simd::Path;
use kvtier_kernels::{Codec, PageSpan, PagedLayout, PagedPart, PartShape, Registry};
use kvtier_proto::Level;
use kvtier_proto::element::Element;
use kvtier_proto::layout::PartCode;
use rustix::time::{ClockId, clock_gettime};

use crate::Common;

mod input;
mod promise;

use input::Input;

/// Unit of all speeds: 10^9 raw bytes a second.
const GB_S: &str = "GB/s";
/// Rounds of a level that loses something: it is there to compare with, and slow.
const ROUNDS_LOSSY: usize = 5;

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
    report.note("Input ..._f16: the same values as fp16, the mantissa bits that bf16 lacks drawn.");
    for at in 0..inputs.len() {
        let halves = inputs.get(at).map(Input::as_f16).transpose()?.flatten();
        inputs.extend(halves);
    }
    inputs.push(input::synthetic(if common.quick { 4 } else { 16 })?);
    for input in &inputs {
        measure_codecs(input, rounds, options.kv.is_some(), &mut report)?;
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

/// Encodes a part of the shape into the front of the second slice, and the length of it.
type Encode<'a> = Box<dyn FnMut(&PartShape, &[u8], &mut [u8]) -> Result<usize, String> + 'a>;
/// Decodes the whole of the first slice into the whole of the second.
type Decode<'a> = Box<dyn FnMut(&PartShape, &[u8], &mut [u8]) -> Result<(), String> + 'a>;

/// One coder and what it made. Every part has buffers of its own, touched before the first
/// measured round, so that no coder gains by a cache that memcpy does not have.
struct Coder<'a> {
    /// Second word of its rows.
    name: String,
    input: &'a Input,
    /// The level, when it loses something.
    lossy: Option<&'a dyn Codec>,
    encode: Encode<'a>,
    decode: Decode<'a>,
    stored: Vec<Vec<u8>>,
    lens: Vec<usize>,
    encode_speeds: Vec<f64>,
    decode_speeds: Vec<f64>,
}

impl<'a> Coder<'a> {
    fn new(
        name: impl Into<String>,
        input: &'a Input,
        room: usize,
        (encode, decode): (Encode<'a>, Decode<'a>),
    ) -> Self {
        let parts = input.parts.len();
        let (stored, lens) = (vec![vec![0; room]; parts], vec![0; parts]);
        Self {
            name: name.into(),
            input,
            lossy: None,
            encode,
            decode,
            stored,
            lens,
            encode_speeds: vec![],
            decode_speeds: vec![],
        }
    }

    /// A level of the registry, by the fastest path or, named after it, by another.
    fn level(codec: &'a dyn Codec, input: &'a Input, path: Option<Path>) -> Self {
        let room = codec.stored_bytes_max(&input.shape);
        let most = path.unwrap_or(Path::Amx);
        let encode = move |shape: &PartShape, raw: &[u8], out: &mut [u8]| {
            most.at_most(|| codec.encode(shape, raw, out).map_err(|e| e.to_string()))
        };
        let decode = move |shape: &PartShape, stored: &[u8], out: &mut [u8]| {
            most.at_most(|| codec.decode(shape, stored, out).map_err(|e| e.to_string()))
        };
        let name = match path {
            Some(path) => format!("{}_{}", codec.name(), path.name()),
            None => codec.name().to_owned(),
        };
        let coder: (Encode<'_>, Decode<'_>) = (Box::new(encode), Box::new(decode));
        Self {
            lossy: (!codec.exact()).then_some(codec),
            ..Self::new(name, input, room, coder)
        }
    }

    /// What one gets by handing the parts to lz4 as they are.
    fn plain_lz4(input: &'a Input) -> Self {
        let room = lz4_flex::block::get_maximum_output_size(input.shape.raw_bytes());
        let encode = |_: &PartShape, raw: &[u8], out: &mut [u8]| {
            lz4_flex::block::compress_into(raw, out).map_err(|e| e.to_string())
        };
        let decode = |_: &PartShape, stored: &[u8], out: &mut [u8]| {
            let len = lz4_flex::block::decompress_into(stored, out);
            len.map(|_| ()).map_err(|e| e.to_string())
        };
        let coder: (Encode<'_>, Decode<'_>) = (Box::new(encode), Box::new(decode));
        Self::new("plain_lz4", input, room, coder)
    }

    /// What one gets by handing the parts to `zstd` of level 1 as they are.
    fn plain_zstd(input: &'a Input) -> Result<Self, Problem> {
        let room = zstd::zstd_safe::compress_bound(input.shape.raw_bytes());
        let mut coder = zstd::bulk::Compressor::new(1)?;
        let mut decoder = zstd::bulk::Decompressor::new()?;
        let encode = move |_: &PartShape, raw: &[u8], out: &mut [u8]| {
            coder
                .compress_to_buffer(raw, out)
                .map_err(|e| e.to_string())
        };
        let decode = move |_: &PartShape, stored: &[u8], out: &mut [u8]| {
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
            let parts = input.shapes.iter().zip(&input.parts);
            for (((shape, part), stored), len) in parts.zip(&mut *stored).zip(&mut *lens) {
                *len = encode(shape, part, stored)?;
            }
            Ok(())
        })?;
        let decode_seconds = seconds(|| {
            let parts = input.shapes.iter().zip(&*stored);
            for (((shape, stored), len), out) in parts.zip(&*lens).zip(&mut *decoded) {
                decode(shape, stored.get(..*len).unwrap_or_default(), out)?;
            }
            Ok(())
        })?;
        self.check(decoded)?;
        if keep {
            let raw = self.input.raw_bytes() as f64;
            self.encode_speeds.push(raw / encode_seconds / 1e9);
            self.decode_speeds.push(raw / decode_seconds / 1e9);
        }
        Ok(())
    }

    /// What was encoded came back, or is as near as its part declares.
    fn check(&self, decoded: &[Vec<u8>]) -> Result<(), String> {
        let Self { input, lossy, .. } = self;
        let Some(codec) = lossy else {
            let same = decoded == &input.parts[..];
            return same
                .then_some(())
                .ok_or(format!("{}: other bytes came back", self.name));
        };
        let parts = input.shapes.iter().zip(&input.parts).zip(decoded);
        for (((shape, part), decoded), (stored, len)) in
            parts.zip(self.stored.iter().zip(&self.lens))
        {
            let stored = stored.get(..*len).unwrap_or_default();
            let bound = codec.error_in(shape, stored).map_err(|e| e.to_string())?;
            // A value is rounded to its element type, by half of a unit in the last place.
            let bits = if shape.element() == Element::F16 {
                11
            } else {
                8
            };
            let read = |raw: &[u8]| floats::read(shape.element(), raw);
            for (value, other) in read(part).iter().zip(read(decoded)) {
                let rounding = other.abs() * 2_f32.powi(-bits) + 2_f32.powi(-24);
                if (value - other).abs() > bound * 1.001 + rounding {
                    return Err(format!("{}: {value} became {other}", self.name));
                }
            }
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

/// The levels, and those worth it by a slower path beside it.
fn coders<'a>(registry: &'a Registry, input: &'a Input) -> Vec<Coder<'a>> {
    // Level raw is a memcpy: the reference of the others.
    let levels = registry.iter().filter(|codec| codec.level() != Level::RAW);
    let levels = levels.filter(|codec| codec.applies(&input.shape));
    let mut coders: Vec<_> = levels
        .map(|codec| Coder::level(codec, input, None))
        .collect();
    if Path::available().any(|path| path > Path::Avx2) {
        for level in [Level::LOSSLESS, Level::LOSSLESS_C] {
            let codec = registry.get(level).ok();
            coders.extend(codec.map(|codec| Coder::level(codec, input, Some(Path::Avx2))));
        }
    }
    coders
}

/// Every level beside plain zstd of level 1, and that and plain lz4 beside memcpy; promises where
/// the input is a user's.
fn measure_codecs(
    input: &Input,
    rounds: usize,
    promised: bool,
    report: &mut Report,
) -> Result<(), Problem> {
    let registry = Registry::with_baselines();
    let mut levels = coders(&registry, input);
    let mut plain = Coder::plain_zstd(input)?;
    let mut lz4 = Coder::plain_lz4(input);
    let mut decoded = vec![vec![0; input.shape.raw_bytes()]; input.parts.len()];
    let mut memcpy = Vec::new();
    for round in 0..=rounds {
        let keep = round > 0; // the first warms caches, contexts and pages
        plain.round(&mut decoded, keep)?;
        lz4.round(&mut decoded, keep)?;
        let measured = |level: &&mut Coder<'_>| level.lossy.is_none() || round <= ROUNDS_LOSSY;
        for level in levels.iter_mut().filter(measured) {
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
    lz4.rows(None, (&copy, &memcpy), report);
    for level in &levels {
        level.rows(Some(&plain), (&copy, &memcpy), report);
        if promised {
            let speeds = [false, true].map(|decode| level.speeds(decode));
            promise::rows((&level.name, &input.name), level.ratio(), speeds, report);
        }
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
