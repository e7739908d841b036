//! One prompt after another into an empty engine, from a device of one rate.
//!
//! Upstairs:   `ttft`.
//! Downstairs: the reference engine with seeded weights, slowed down; the daemon's harness.
//!
//! A round begins with a daemon that has just started: nothing is in its memory, and nothing is
//! known of device or engine. Each way has a prompt of its own, so that none finds in memory what
//! another has loaded.
//!
//! Invariants kept here
//!   B1  Every run ends in the tokens and scores of a cold run, or is told as other bits.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier_benches::machine;
use kvtier_benches::report::{Problem, Report};
use kvtier_client::PrefillStep;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use tokio::runtime::Handle;

use crate::demo::engine_link::{EngineLink, Met, Way};
use crate::engine::{Model, ModelConfig, Sequence, SequenceOptions, SlowEngine};
use crate::harness::{Daemon, Options};

const LAYERS: usize = 4;
const BLOCK_TOKENS: usize = 32;
/// Whole blocks of a prompt, and tokens after them.
const BLOCKS: usize = 24;
const REST_TOKENS: usize = 9;
const PROMPT_TOKENS: usize = BLOCKS * BLOCK_TOKENS + REST_TOKENS;
/// Tokens that are continued with and compared.
const CONTINUED: usize = 16;
/// Pages of a prompt: a layer of a block each.
pub(super) const PAGES: u32 = 100;
/// Bytes of a block. Unit: KiB.
const BLOCK_KIB: usize = 256;
/// At this rate a block is loaded in the time in which it is computed. Unit: MiB a second.
const BREAK_EVEN_MIB_S: u64 = 8;

/// A block takes 31.25 ms, a step as such 2.25 of them. K and V of a layer's input take two
/// sevenths of the products of the whole layer.
const ENGINE: SlowEngine = SlowEngine {
    step: Duration::from_micros(2250),
    token: Duration::from_nanos(906_250),
    attend: Duration::ZERO,
    rebuild: Duration::from_nanos(906_250 * 2 / 7),
};

/// A rate of the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rate {
    pub(super) name: &'static str,
    /// Most that reads may take. Unit: MiB a second.
    pub(super) mib_s: u64,
}

/// From an eighth of break-even to ten times as much.
pub(super) const RATES: [Rate; 5] = [
    rate("far_below", BREAK_EVEN_MIB_S / 8),
    rate("below", BREAK_EVEN_MIB_S / 4),
    rate("even", BREAK_EVEN_MIB_S),
    rate("above", BREAK_EVEN_MIB_S * 4),
    rate("far_above", BREAK_EVEN_MIB_S * 10),
];

const fn rate(name: &'static str, mib_s: u64) -> Rate {
    Rate { name, mib_s }
}

/// How a prompt is brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Strategy {
    /// Two-ended, when nothing is known of device and engine.
    First,
    /// Everything is loaded.
    Load,
    /// Everything is computed.
    Recompute,
    /// Computed from the front while it loads from the back.
    TwoEnded,
    /// Hidden states are loaded and made to K and V.
    Hidden,
}

impl Strategy {
    const ALL: [Self; 5] = [
        Self::First,
        Self::Load,
        Self::Recompute,
        Self::TwoEnded,
        Self::Hidden,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Load => "load",
            Self::Recompute => "recompute",
            Self::TwoEnded => "two-ended",
            Self::Hidden => "hidden",
        }
    }
}

/// What one run came to.
#[derive(Debug, Clone)]
pub(super) struct Run {
    pub(super) took: Duration,
    pub(super) met: Met,
    /// Tokens and scores are those of a cold run (B1).
    pub(super) same: bool,
}

/// All ways once, one after another.
#[derive(Debug, Clone)]
pub(super) struct Round {
    pub(super) first: Run,
    pub(super) load: Run,
    pub(super) recompute: Run,
    pub(super) two_ended: Run,
    pub(super) hidden: Run,
}

/// Scores after a prompt, bit by bit, and the tokens that follow.
type Ending = (Vec<u32>, Vec<u32>);

struct Prompt {
    tokens: Vec<u32>,
    ending: Ending,
}

/// A model and a prompt for each way, with what a cold run ends in.
pub(super) struct Subject {
    model: Arc<Model>,
    prompts: Vec<Prompt>,
}

impl Subject {
    pub(super) fn new() -> Result<Self, Problem> {
        let model = Arc::new(Model::random(ModelConfig::wide_heads(LAYERS), 3)?);
        let prompt = |seed: u64| {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let tokens: Vec<u32> = (0..PROMPT_TOKENS)
                .map(|_| random.next_u32() % 512)
                .collect();
            let mut cold = Sequence::new(Arc::clone(&model), options(None))?;
            cold.prefill(&tokens)?;
            let ending = ending(&mut cold)?;
            Ok(Prompt { tokens, ending })
        };
        let prompts = (1..).map(prompt).take(Strategy::ALL.len());
        let prompts = prompts.collect::<Result<_, Problem>>()?;
        Ok(Self { model, prompts })
    }

    fn prompt(&self, strategy: Strategy) -> Result<&Prompt, Problem> {
        let at = Strategy::ALL.iter().position(|one| *one == strategy);
        let prompt = at.and_then(|at| self.prompts.get(at));
        prompt.ok_or_else(|| "a way without a prompt".into())
    }

    fn empty(&self, slow: Option<SlowEngine>) -> Result<Sequence, Problem> {
        Ok(Sequence::new(Arc::clone(&self.model), options(slow))?)
    }
}

/// Layer inputs are rounded in every run, since those that are restored are.
fn options(slow: Option<SlowEngine>) -> SequenceOptions {
    SequenceOptions {
        block_tokens: BLOCK_TOKENS,
        keep_hidden: true,
        slow,
        ..SequenceOptions::new(PROMPT_TOKENS + CONTINUED)
    }
}

fn ending(sequence: &mut Sequence) -> Result<Ending, Problem> {
    let scores = sequence.logits()?;
    let bits = scores.iter().map(|score| score.to_bits()).collect();
    Ok((bits, sequence.generate(CONTINUED, None)?))
}

/// A daemon that holds all prompts on a device of one rate.
pub(super) struct Bed {
    rate: Rate,
    daemon: Daemon,
}

impl Bed {
    pub(super) fn new(
        rate: Rate,
        dir: &Path,
        subject: &Subject,
        runtime: &Handle,
    ) -> Result<Self, Problem> {
        let limited = Options::default().level("raw").read_limit_mib(rate.mib_s);
        let daemon = Daemon::start_in(limited.host_mib(64).disk_mib(128, 8), dir);
        let bed = Self { rate, daemon };
        let link = bed.link(subject, runtime)?;
        for strategy in Strategy::ALL {
            let prompt = subject.prompt(strategy)?;
            let mut sequence = subject.empty(None)?;
            let save = async {
                if strategy == Strategy::Hidden {
                    let saved = link.prefill_saving_hidden(&mut sequence, &prompt.tokens);
                    return Ok(saved.await?);
                }
                sequence.prefill(&prompt.tokens)?;
                let saved = link.save_prefix(&sequence, &prompt.tokens).await?;
                Ok::<_, Problem>(saved.durable)
            };
            let durable = runtime.block_on(save)?;
            if durable <= BLOCKS {
                return Err(format!("{durable} blocks of a prompt were saved").into());
            }
        }
        Ok(bed)
    }

    fn link(&self, subject: &Subject, runtime: &Handle) -> Result<EngineLink, Problem> {
        let socket = self.daemon.socket();
        let options = options(None);
        let link = EngineLink::open(&socket, &subject.model, &options);
        Ok(runtime.block_on(link)?)
    }

    /// All ways once, from a fresh start.
    pub(super) fn round(
        &mut self,
        subject: &Subject,
        runtime: &Handle,
        number: usize,
    ) -> Result<Round, Problem> {
        self.daemon.restart();
        let link = self.link(subject, runtime)?;
        let run = |strategy: Strategy| {
            let run = self.run(&link, subject, runtime, strategy)?;
            tell(number, self.rate, strategy, &run);
            // What is still on its way would take of the device's time in the next run.
            std::thread::sleep(self.block_load() * 3);
            Ok::<_, Problem>(run)
        };
        Ok(Round {
            first: run(Strategy::First)?,
            load: run(Strategy::Load)?,
            recompute: run(Strategy::Recompute)?,
            two_ended: run(Strategy::TwoEnded)?,
            hidden: run(Strategy::Hidden)?,
        })
    }

    /// Time in which the device brings a block.
    fn block_load(&self) -> Duration {
        let mib = u64::try_from(BLOCK_KIB).unwrap_or(u64::MAX);
        Duration::from_secs(1) * u32::try_from(mib).unwrap_or(u32::MAX)
            / u32::try_from(self.rate.mib_s * 1024).unwrap_or(u32::MAX)
    }

    fn run(
        &self,
        link: &EngineLink,
        subject: &Subject,
        runtime: &Handle,
        strategy: Strategy,
    ) -> Result<Run, Problem> {
        let prompt = subject.prompt(strategy)?;
        let (mut sequence, tokens) = (subject.empty(Some(ENGINE))?, &prompt.tokens);
        let begin = Instant::now();
        let mut met = Met::default();
        match strategy {
            Strategy::First | Strategy::TwoEnded => {
                met = link.prefill(runtime, &mut sequence, tokens, Way::TwoEnded)?;
            }
            Strategy::Load => {
                met = link.prefill(runtime, &mut sequence, tokens, Way::PrefixOnly)?;
            }
            Strategy::Recompute => sequence.prefill(tokens)?,
            Strategy::Hidden => {
                let restored = link.restore_hidden(&mut sequence, tokens);
                let restored = runtime.block_on(restored)?;
                sequence.prefill(tokens.get(restored..).unwrap_or_default())?;
            }
        }
        let took = begin.elapsed();
        if strategy == Strategy::Recompute {
            link.session().report_prefill(&steps(&mut sequence));
        }
        let same = ending(&mut sequence)? == prompt.ending;
        Ok(Run { took, met, same })
    }
}

/// What the engine tells of an ordinary prefill.
fn steps(sequence: &mut Sequence) -> Vec<PrefillStep> {
    let number = |value| u32::try_from(value).unwrap_or(u32::MAX);
    let costs = sequence.take_costs().into_iter();
    let step = costs.map(|cost| PrefillStep {
        before: number(cost.before),
        tokens: number(cost.tokens),
        took: cost.took,
    });
    step.collect()
}

/// A line of progress, with what explains the time.
fn tell(round: usize, rate: Rate, strategy: Strategy, run: &Run) {
    let met = &run.met;
    let mut line = format!(
        "{round} {:>9} {:>9} {:8.1} ms",
        rate.name,
        strategy.name(),
        run.took.as_secs_f64() * 1e3
    );
    if matches!(strategy, Strategy::First | Strategy::TwoEnded) {
        let outlook = met.outlook.as_ref();
        let expected = outlook.and_then(|outlook| outlook.planned);
        line += &format!(
            ", {} computed, {} loaded, {:.1} ms waited; {}, {} to compute, {}",
            met.computed.len(),
            met.loaded.len(),
            met.waited.as_secs_f64() * 1e3,
            expected.map_or("nothing expected".to_owned(), |time| {
                format!("{:.1} ms expected", time.as_secs_f64() * 1e3)
            }),
            outlook.map_or(0, |outlook| outlook.compute_blocks),
            outlook.map_or("no outlook", |outlook| &outlook.reason),
        );
    }
    if !run.same {
        line += ", OTHER BITS";
    }
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// What a reader of the numbers must know.
pub(super) fn notes(report: &mut Report) {
    report.note(format!(
        "{PROMPT_TOKENS} tokens in blocks of {BLOCK_TOKENS}, {LAYERS} layers, {BLOCK_KIB} KiB of \
         K and V a block; hidden states are a quarter of that"
    ));
    let step = ENGINE.prefill(0, BLOCK_TOKENS).as_secs_f64() * 1e3;
    let rates = RATES.map(|rate| format!("{} {} MiB/s", rate.name, rate.mib_s));
    report.note(format!(
        "an engine slowed to {step:.2} ms a block, reads limited to: {}",
        rates.join(", ")
    ));
    let profile = if cfg!(debug_assertions) {
        "development"
    } else {
        "release"
    };
    report.note(format!(
        "{profile} build; load average at the end {}",
        machine::load()
    ));
}
