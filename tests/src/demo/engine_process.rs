//! An engine process: loads the model, does one job, writes its report, ends.
//!
//! Upstairs:   the hidden subcommand `engine`, started by `story`.
//! Downstairs: the reference engine and `engine_link`.
//!
//! Invariants kept here
//!   T1  Time to first token runs from a prompt of token ids to the first token of the
//!       continuation. Loading the model, opening the session and making room for the cache
//!       happen before it, as they do in a serving engine, for both kinds of run alike.
//!   T2  Nothing but the daemon brings KV into a process that restores.
//!
//! Not here on purpose: judging. The process reports; `outcome` compares.

use std::fs;
use std::io::IsTerminal;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::DemoError;
use super::engine_link::EngineLink;
use super::job::{Computed, Job, Restore, Run, Save, Work, prompt};
use crate::engine::{KvCache, Model, Observer, Sequence, SequenceOptions};

/// Does the job in the file `job` and writes the report to the file `report`.
pub(super) fn run(job: &Path, report: &Path) -> Result<(), DemoError> {
    let text = fs::read(job).map_err(DemoError::io("cannot read the job"))?;
    let job: Job = serde_json::from_slice(&text).map_err(DemoError::json("the job"))?;
    let (model, tokenizer) = job.model.load()?;
    let prompt = prompt(tokenizer.as_ref(), model.config().vocab, job.prompt_tokens)?;
    let options = SequenceOptions::new(job.prompt_tokens + job.generate);
    let runtime = tokio::runtime::Runtime::new();
    let engine = Engine {
        model,
        prompt,
        options,
        generate: job.generate,
        runtime: runtime.map_err(DemoError::io("cannot start the runtime"))?,
    };
    match job.work {
        Work::Compute { save_to } => {
            let mut computed = engine.compute(&save_to)?;
            if let Some(tokenizer) = tokenizer {
                computed.text = tokenizer.decode(&computed.run.tokens)?;
            }
            write(report, &computed)
        }
        Work::Restore { from, times, flip } => {
            let restores = (0..times).map(|_| engine.restore(&from, flip));
            write(report, &restores.collect::<Result<Vec<_>, _>>()?)
        }
    }
}

fn write(report: &Path, content: &impl Serialize) -> Result<(), DemoError> {
    let text = serde_json::to_vec(content).map_err(DemoError::json("the report"))?;
    fs::write(report, text).map_err(DemoError::io("cannot write the report"))
}

struct Engine {
    model: Arc<Model>,
    prompt: Vec<u32>,
    options: SequenceOptions,
    generate: usize,
    runtime: tokio::runtime::Runtime,
}

impl Engine {
    fn sequence(&self) -> Result<Sequence, DemoError> {
        Ok(Sequence::new(Arc::clone(&self.model), self.options)?)
    }

    fn compute(&self, save_to: &[PathBuf]) -> Result<Computed, DemoError> {
        let mut sequence = self.sequence()?;
        let mut progress = Progress::new(self.prompt.len(), self.model.config().layers.len());
        let begin = Instant::now();
        sequence.prefill_observed(&self.prompt, &mut progress)?;
        let first = sequence.generate(1, None)?;
        let ttft = begin.elapsed();
        progress.bar.finish_and_clear();
        eprintln!(
            "engine A: first token of {} after {:.2} s of prefill",
            self.prompt.len(),
            ttft.as_secs_f64()
        );
        let saves = save_to.iter().map(|socket| self.save(socket, &sequence));
        let saves = saves.collect::<Result<_, _>>()?;
        Ok(Computed {
            model: self.model.config().name.clone(),
            ttft_s: ttft.as_secs_f64(),
            saves,
            run: self.finish(sequence, first)?,
            text: String::new(),
        })
    }

    fn save(&self, socket: &Path, sequence: &Sequence) -> Result<Save, DemoError> {
        self.runtime.block_on(async {
            let link = EngineLink::open(socket, &self.model, &self.options).await?;
            let begin = Instant::now();
            let saved = link.save_prefix(sequence, &self.prompt).await?;
            let took = begin.elapsed();
            let stored = link.stored(&self.prompt).await?;
            let mut levels: Vec<String> = stored.iter().map(|one| one.level.clone()).collect();
            levels.sort_unstable();
            levels.dedup();
            eprintln!(
                "engine A: {} of {} blocks durable at level {} after {:.2} s",
                saved.durable,
                saved.blocks,
                levels.join(" and "),
                took.as_secs_f64()
            );
            Ok(Save {
                blocks: saved.blocks,
                durable: saved.durable,
                bytes: saved.bytes as u64,
                stored_bytes: stored.iter().map(|one| one.bytes).sum(),
                levels,
                seconds: took.as_secs_f64(),
            })
        })
    }

    fn restore(&self, from: &Path, flip: bool) -> Result<Restore, DemoError> {
        let mut sequence = self.sequence()?;
        let link = EngineLink::open(from, &self.model, &self.options);
        let link = self.runtime.block_on(link)?;
        let begin = Instant::now();
        let restored = link.restore_prefix(&mut sequence, &self.prompt);
        let restored = self.runtime.block_on(restored)?;
        if flip {
            flip_a_bit(&mut sequence)?;
        }
        let rest = self.prompt.get(sequence.position()..).unwrap_or_default();
        sequence.prefill(rest)?;
        let first = sequence.generate(1, None)?;
        let ttft = begin.elapsed();
        let from_tier = |tier| restored.by_tier.get(&tier).copied().unwrap_or(0);
        let report = Restore {
            blocks: restored.asked,
            from_disk: from_tier(kvtier_client::Tier::Disk),
            from_host: from_tier(kvtier_client::Tier::Host),
            bytes: restored.bytes as u64,
            tokens: restored.tokens,
            lookup_s: restored.lookup.as_secs_f64(),
            transfer_s: restored.transfer.as_secs_f64(),
            ttft_s: ttft.as_secs_f64(),
            run: self.finish(sequence, first)?,
        };
        eprintln!(
            "engine B: {} of {} blocks restored ({} from NVMe, {} from host memory), first token \
             after {:.3} s",
            restored.blocks(),
            report.blocks,
            report.from_disk,
            report.from_host,
            report.ttft_s
        );
        Ok(report)
    }

    /// Hashes what the run stands on and continues after its `first` token.
    fn finish(&self, mut sequence: Sequence, first: Vec<u32>) -> Result<Run, DemoError> {
        let scores = sequence.logits()?;
        let scores = scores.iter().fold(Sha256::new(), |hash, score| {
            hash.chain_update(score.to_bits().to_le_bytes())
        });
        let kv_sha256 = hash_kv(&sequence, self.prompt.len())?;
        let mut tokens = first;
        if let Some(&last) = tokens.last() {
            sequence.decode(last)?;
            tokens.extend(sequence.generate(self.generate.saturating_sub(1), None)?);
        }
        Ok(Run {
            tokens,
            kv_sha256,
            scores_sha256: hex(scores),
        })
    }
}

/// SHA-256 of the KV of the first `tokens` tokens, layer after layer.
fn hash_kv(sequence: &Sequence, tokens: usize) -> Result<String, DemoError> {
    let mut hash = Sha256::new();
    for (layer, attention) in sequence.model().config().layers.iter().enumerate() {
        for spec in attention.parts() {
            hash.update(sequence.cache().bytes(layer, spec.part, 0..tokens)?);
        }
    }
    Ok(hex(hash))
}

fn hex(hash: Sha256) -> String {
    let bytes = hash.finalize();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A planted fault: the restored KV of the first layer is not what was computed, by one bit.
fn flip_a_bit(sequence: &mut Sequence) -> Result<(), DemoError> {
    let tokens = 0..sequence.position();
    let mut kept = Vec::new();
    for (layer, attention) in sequence.model().config().layers.iter().enumerate() {
        for spec in attention.parts() {
            let bytes = sequence.cache().bytes(layer, spec.part, tokens.clone())?;
            kept.push((layer, spec.part, bytes.to_vec()));
        }
    }
    let middle = kept.first_mut().and_then(|(_, _, bytes)| {
        let at = bytes.len() / 2;
        bytes.get_mut(at)
    });
    if let Some(byte) = middle {
        *byte ^= 1;
    }
    sequence.rewind(0)?;
    for (layer, part, bytes) in &kept {
        sequence.import(*layer, *part, tokens.clone(), bytes)?;
    }
    Ok(sequence.resume_at(tokens.end)?)
}

/// Shows the prefill on a terminal, and a line now and then elsewhere.
struct Progress {
    bar: ProgressBar,
    layers: usize,
    total: usize,
    begin: Instant,
    told: Duration,
}

impl Progress {
    /// Pause between two lines where there is no terminal.
    const PAUSE: Duration = Duration::from_secs(5);

    fn new(total: usize, layers: usize) -> Self {
        let bar = ProgressBar::new(total as u64);
        let style = "engine A: prefill {bar:32} {pos}/{len} tokens, {per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        bar.tick();
        Self {
            bar,
            layers,
            total,
            begin: Instant::now(),
            told: Duration::ZERO,
        }
    }
}

impl Observer for Progress {
    fn layer_done(&mut self, _cache: &KvCache, layer: usize, tokens: Range<usize>) {
        if layer + 1 != self.layers {
            return;
        }
        self.bar.set_position(tokens.end as u64);
        let now = self.begin.elapsed();
        if !std::io::stderr().is_terminal() && now >= self.told + Self::PAUSE {
            self.told = now;
            eprintln!("engine A: prefill, {} of {} tokens", tokens.end, self.total);
        }
    }
}
