//! Prints how fast the reference engine prefills, decodes and moves its cache on this machine.
//!
//! Upstairs:   people, and whoever needs the engine's speed for a claim.
//! Downstairs: `kvtier_tests::engine` with the weights of `kvtier_tests::weights`.
//!
//! Beside the wall clock it prints the processor time, which other work on the machine hardly
//! changes: divided by the cores it is what an idle machine would need.
//!
//! Not here on purpose: assertions. Speed belongs to the machine and to its load, which is
//! printed too.

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use kvtier_tests::engine::{self, Model, Sequence, SequenceOptions};
use kvtier_tests::{text, weights};

/// Measures the reference engine.
#[derive(Parser)]
struct Arguments {
    /// A llama GGUF file instead of the reference model.
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// Prompt lengths to measure. Unit: tokens.
    #[arg(long, value_delimiter = ',', default_values_t = [1024, 4096])]
    tokens: Vec<usize>,
    /// Tokens to generate after each prompt.
    #[arg(long, default_value_t = 32)]
    generate: usize,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let began = Instant::now();
    let file = weights::model_file(arguments.model.as_deref())?;
    println!("find and hash    {:8.3} s", began.elapsed().as_secs_f64());
    let began = Instant::now();
    let (model, tokenizer) = engine::load(&file.path, file.sha256)?;
    println!("load             {:8.3} s", began.elapsed().as_secs_f64());
    let (model, prompt) = (Arc::new(model), tokenizer.encode(text::CONSTITUTION)?);
    println!("shipped text     {:8} tokens", prompt.len());
    for tokens in arguments.tokens {
        let prompt = prompt
            .get(..tokens)
            .ok_or(format!("at most {} tokens", prompt.len()))?;
        measure(&model, prompt, arguments.generate)?;
    }
    println!(
        "load average     {}",
        std::fs::read_to_string("/proc/loadavg")?.trim()
    );
    Ok(())
}

fn measure(model: &Arc<Model>, prompt: &[u32], generate: usize) -> Result<(), Box<dyn Error>> {
    let tokens = prompt.len();
    let options = SequenceOptions::new(tokens + generate);
    let mut sequence = Sequence::new(Arc::clone(model), options)?;
    let clock = Clock::start();
    sequence.prefill(prompt)?;
    clock.report("prefill", tokens, tokens);
    let clock = Clock::start();
    let generated = sequence.generate(generate, None)?.len();
    clock.report("decode", tokens, generated);

    let mut restored = Sequence::new(Arc::clone(model), options)?;
    let clock = Clock::start();
    for (layer, attention) in model.config().layers.iter().enumerate() {
        for spec in attention.parts() {
            let bytes = sequence.cache().bytes(layer, spec.part, 0..tokens)?;
            restored.import(layer, spec.part, 0..tokens, bytes)?;
        }
    }
    restored.resume_at(tokens)?;
    clock.report("import", tokens, tokens);
    let clock = Clock::start();
    restored.decode(0)?;
    clock.report("first token after import", tokens, 1);
    Ok(())
}

/// Wall clock and processor time of this process.
struct Clock {
    wall: Instant,
    processor: Duration,
}

impl Clock {
    fn start() -> Self {
        Self {
            wall: Instant::now(),
            processor: processor_time(),
        }
    }

    fn report(&self, what: &str, context: usize, tokens: usize) {
        let wall = self.wall.elapsed().as_secs_f64();
        let processor = (processor_time() - self.processor).as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "token counts are small")]
        let rate = tokens as f64 / wall;
        println!(
            "{what} at {context}: {rate:.1} tokens/s ({wall:.3} s, processor {processor:.3} s)"
        );
    }
}

fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}
