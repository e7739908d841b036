//! `calibrate`: makes the tables of a model from samples of its KV, without a daemon.
//!
//! Upstairs:   `kvtier calibrate`.
//! Downstairs: `tier::calibrate` reads the files, does the work and writes the profile.
//!
//! Not here on purpose: no sampling. Whoever runs the model records its K and V, and the gradients
//! if they want the better steps.

use std::fmt::Write;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use kvtier_proto::Level;
use serde_json::{Value, json};

use super::connect::CliError;
use super::output::{Answer, duration, section, size, table};
use crate::tier::calibrate::{
    Files, LevelReport, Model, Options, Report, Rope, Shape, Stored, Target, TokenPredictor,
    Written,
};

/// Flags of `calibrate`.
#[derive(Debug, Clone, clap::Args)]
#[command(
    after_help = "A sample is a safetensors file of one document: K and V of [layers, tokens, \
heads, dim] in bf16, f16 or f32, K after RoPE, from position 0. A Fisher file has fisher_k and \
fisher_v of [layers, heads, dim, dim] and the scalar tokens. Without one, steps are a fixed part \
of each layer's size: about a third more bits at the same quality, and no KL is predicted.",
    group = clap::ArgGroup::new("rotation").required(true).args(["rope", "rope_theta"])
)]
pub(super) struct Args {
    /// Files of samples
    #[arg(required = true)]
    samples: Vec<PathBuf>,
    /// Name of the model, as engines give it
    #[arg(long, value_name = "NAME")]
    model_name: String,
    /// Revision of the model
    #[arg(long, default_value = "")]
    revision: String,
    /// Hash of the weights, in hex digits
    #[arg(long, value_name = "HEX", default_value = "", value_parser = hex)]
    weights_fingerprint: Hex,
    /// Base of the frequencies that K was rotated with
    #[arg(long, value_name = "BASE", value_parser = theta)]
    rope_theta: Option<f64>,
    /// K was not rotated
    #[arg(long, value_name = "none", value_parser = ["none"])]
    rope: Option<String>,
    /// Leading elements of a head that rotate; all of them by default
    #[arg(long, value_name = "ELEMENTS", requires = "rope_theta")]
    rotary_dim: Option<u32>,
    /// Pairs are (i, i + n/2) of n elements; false: (2i, 2i + 1)
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    rotate_half: bool,
    /// How much the next token minds errors: a file of Fisher matrices
    #[arg(long, value_name = "FILE")]
    fisher: Option<PathBuf>,
    /// Samples that nothing is learnt from: what they take when stored is the rate to expect. The
    /// first of the samples stands in for them
    #[arg(long, value_name = "FILE")]
    held_out: Vec<PathBuf>,
    /// Levels to make tables for; all by default
    #[arg(long, value_delimiter = ',', value_parser = level)]
    levels: Vec<Target>,
    /// KL to expect that a level aims at, with --fisher: balanced=8e-4
    #[arg(long, value_name = "LEVEL=NATS", value_parser = kl)]
    kl: Vec<Target>,
    /// Tokens at the front of a prefix that every level keeps exactly
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=64))]
    sinks: u32,
    /// Also make tables of `lossless_x`, the bit-exact level across layers
    #[arg(long)]
    lossless_x: bool,
    /// Layers that the levels across layers look back
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=2))]
    back: u32,
    /// File of the profile
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Bytes that were given in hex digits.
#[derive(Debug, Clone, Default)]
struct Hex(Vec<u8>);

fn hex(text: &str) -> Result<Hex, String> {
    let refuse = || String::from("accepted: an even number of hex digits");
    let digits: Option<Vec<u32>> = text.chars().map(|digit| digit.to_digit(16)).collect();
    let (pairs, rest) = digits.as_deref().ok_or_else(refuse)?.as_chunks::<2>();
    let byte = |[high, low]: &[u32; 2]| u8::try_from(16 * high + low).ok();
    let bytes = pairs.iter().map(byte).collect::<Option<Vec<u8>>>();
    bytes
        .filter(|_| rest.is_empty())
        .map(Hex)
        .ok_or_else(refuse)
}

fn theta(text: &str) -> Result<f64, String> {
    let base = text.parse::<f64>().ok();
    base.filter(|base| base.is_finite() && *base > 1.0)
        .ok_or_else(|| String::from("accepted: a number above 1"))
}

fn level(name: &str) -> Result<Target, String> {
    let names = || {
        Target::all()
            .iter()
            .map(Target::name)
            .collect::<Vec<_>>()
            .join(", ")
    };
    Target::of(name).ok_or_else(|| format!("accepted: {}", names()))
}

fn kl(text: &str) -> Result<Target, String> {
    let (name, number) = text.split_once('=').ok_or("accepted: LEVEL=NATS")?;
    let kl = number.parse().ok().filter(|kl| (1e-9..=10.0).contains(kl));
    Ok(Target {
        kl: kl.ok_or("accepted: LEVEL=NATS, of 1e-9 to 10 nats")?,
        ..level(name)?
    })
}

pub(super) fn run(args: &Args) -> Result<Answer, CliError> {
    let failed = |error| CliError::Usage(crate::log::chain(&error));
    let start = Instant::now();
    let files = Files::read(&args.samples).map_err(failed)?;
    let left_out = Files::read(&args.held_out).map_err(failed)?;
    let shape = files.shape().map_err(failed)?;
    let shape = shape.ok_or_else(|| CliError::Usage(String::from("there are no samples")))?;
    let options = options(args, shape)?;
    let model = Model {
        name: args.model_name.clone(),
        revision: args.revision.clone(),
        weights_fingerprint: args.weights_fingerprint.0.clone(),
    };
    let bar = bar();
    let made = files.calibrate(
        &left_out,
        args.fisher.as_deref(),
        (&model, &options),
        &args.out,
        &|progress| {
            bar.set_length(progress.total as u64);
            bar.set_position(progress.done as u64);
        },
    );
    bar.finish_and_clear();
    let (report, written) = made.map_err(failed)?;
    Ok(answer(args, (&report, shape), &written, start.elapsed()))
}

fn options(args: &Args, shape: Shape) -> Result<Options, CliError> {
    let rope = match args.rope_theta {
        None => None,
        Some(theta) => {
            let all = u32::try_from(shape.k_dim).unwrap_or(u32::MAX);
            let rotary = args.rotary_dim.unwrap_or(all);
            if rotary > all || rotary % 2 == 1 || rotary == 0 {
                return Err(CliError::Usage(format!(
                    "--rotary-dim is {rotary}; accepted: an even number of 2 to {all}, the \
                     elements of a head"
                )));
            }
            Some(Rope::plain(theta, rotary, args.rotate_half))
        }
    };
    let mut targets = match args.levels.is_empty() {
        true => Target::all(),
        false => args.levels.clone(),
    };
    targets.sort_by_key(|target| target.level);
    targets.dedup_by_key(|target| target.level);
    for chosen in &args.kl {
        let known = targets
            .iter_mut()
            .find(|target| target.level == chosen.level);
        match (known, &args.fisher) {
            (Some(target), Some(_)) => target.kl = chosen.kl,
            (_, None) => {
                let text = "--kl needs --fisher: without gradients no KL can be predicted";
                return Err(CliError::Usage(String::from(text)));
            }
            (None, _) => {
                let name = chosen.name();
                let text = format!("--kl {name} is not among the levels to make");
                return Err(CliError::Usage(text));
            }
        }
    }
    Ok(Options {
        rope,
        sinks: args.sinks,
        back: args.back,
        targets,
        lossless_x: args.lossless_x,
        threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
    })
}

fn bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    match ProgressStyle::with_template("[{wide_bar}] {pos} of {len} parts, {eta} left") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// What is said of each level.
const COLUMNS: [&str; 6] = [
    "level",
    ">bits",
    ">ratio",
    ">learnt",
    ">expected KL",
    "predictors",
];

fn answer(
    args: &Args,
    (report, shape): (&Report, Shape),
    written: &Written,
    took: Duration,
) -> Answer {
    let bits = |bytes: u64, raw: u64| {
        let values = raw as f64 / shape.element_bytes as f64;
        8.0 * bytes as f64 / values.max(1.0)
    };
    let mut text = format!(
        "{}: {}, tables {:08x}, from {} tokens of {} documents, in {}\n",
        args.out.display(),
        size(written.bytes.get()),
        written.identity,
        report.tokens,
        args.samples.len(),
        duration(took.as_secs())
    );
    let (mut rows, mut levels) = (table(&COLUMNS), Vec::new());
    for level in &report.levels {
        let of = |stored: &&Stored| stored.level == level.target.level;
        let Some(stored) = written.stored.iter().find(of) else {
            continue;
        };
        let ratio = stored.raw_bytes as f64 / stored.stored_bytes.max(1) as f64;
        let bits = bits(stored.stored_bytes, stored.raw_bytes);
        rows.add_row([
            level.target.name().to_owned(),
            format!("{bits:.3}"),
            format!("{ratio:.2}"),
            format!("{:.3}", level.bits()),
            level
                .kl()
                .map_or_else(|| String::from("-"), |kl| format!("{kl:.1e}")),
            predictors(level),
        ]);
        levels.push(to_json(level, stored, (bits, ratio)));
    }
    let of_exact = |stored: &&Stored| stored.level == Level::LOSSLESS_X;
    if let Some(stored) = written.stored.iter().find(of_exact) {
        let bits = bits(stored.stored_bytes, stored.raw_bytes);
        let (row, json) = exact_row(stored, bits);
        rows.add_row(row);
        levels.push(json);
    }
    let judged = match args.held_out.is_empty() {
        true => "the first sample, which was learnt from",
        false => "samples left out",
    };
    let heading = format!("Levels: bits a value of {judged}, every byte counted");
    text += &section(&heading, &rows);
    if report.fisher_tokens.is_none() {
        let _ = writeln!(
            text,
            "\nWithout --fisher no KL is predicted, and steps are a fixed part of each layer's \
             size. Measure the quality before you serve these levels."
        );
    }
    let json = json!({
        "profile": args.out.display().to_string(), "bytes": written.bytes.get(),
        "tables": format!("{:08x}", written.identity), "model": args.model_name,
        "documents": args.samples.len(), "held_out": args.held_out.len(),
        "tokens": report.tokens, "fisher_tokens": report.fisher_tokens,
        "seconds": took.as_secs_f64(), "levels": levels,
    });
    Answer::new(json, text)
}

/// What the bit-exact level across layers takes.
fn exact_row(stored: &Stored, bits: f64) -> ([String; 6], Value) {
    let ratio = stored.raw_bytes as f64 / stored.stored_bytes.max(1) as f64;
    let none = || String::from("-");
    let (name, exact) = (String::from("lossless_x"), String::from("0"));
    let (shown, times) = (format!("{bits:.3}"), format!("{ratio:.2}"));
    let json = json!({
        "level": stored.level.0, "name": "lossless_x", "bits": bits, "ratio": ratio,
        "raw_bytes": stored.raw_bytes, "stored_bytes": stored.stored_bytes,
    });
    ([name, shown, times, none(), exact, none()], json)
}

/// A kind of predictor: its name, and what is one.
type Kind = (&'static str, fn(&TokenPredictor) -> bool);

/// How many parts have which predictor.
fn predictors(level: &LevelReport) -> String {
    let kinds: [Kind; 3] = [
        ("mean", |of| matches!(of, TokenPredictor::Mean)),
        ("anchor", |of| matches!(of, TokenPredictor::Anchor { .. })),
        ("token before", |of| {
            matches!(of, TokenPredictor::First { .. })
        }),
    ];
    let counts = kinds.map(|(name, is)| {
        let parts = level.parts.iter();
        (name, parts.filter(|part| is(&part.predictor)).count())
    });
    let some = counts.iter().filter(|(_, count)| *count > 0);
    let some: Vec<String> = some
        .map(|(name, count)| format!("{count} {name}"))
        .collect();
    some.join(", ")
}

fn to_json(level: &LevelReport, stored: &Stored, (bits, ratio): (f64, f64)) -> Value {
    let predictor = |of: &TokenPredictor| match of {
        TokenPredictor::Mean => "mean",
        TokenPredictor::Anchor { .. } => "anchor",
        TokenPredictor::First { .. } => "first",
    };
    let parts = level.parts.iter().map(|part| {
        json!({
            "layer": part.layer, "code": <&str>::from(part.code), "learnt_bits": part.bits,
            "mean_bits": part.mean_bits, "step": part.step, "expected_kl": part.kl,
            "predictor": predictor(&part.predictor),
        })
    });
    json!({
        "level": level.target.level.0, "name": level.target.name(), "bits": bits,
        "ratio": ratio, "raw_bytes": stored.raw_bytes, "stored_bytes": stored.stored_bytes,
        "learnt_bits": level.bits(), "optimism": level.target.optimism, "expected_kl": level.kl(),
        "parts": parts.collect::<Vec<_>>(),
    })
}
