//! Prints how fast the reference engine prefills, decodes and moves its cache on this machine.
//!
//! Upstairs:   people, and whoever needs the engine's speed for a claim.
//! Downstairs: `kvtier_tests::engine` with the weights of `kvtier_tests::weights`.
//!
//! Not here on purpose: assertions. Speed belongs to the machine and to its load, which is
//! printed beside it.

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

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
    let options = SequenceOptions::new(prompt.len() + generate);
    let mut sequence = Sequence::new(Arc::clone(model), options)?;
    let began = Instant::now();
    sequence.prefill(prompt)?;
    report("prefill", prompt.len(), prompt.len(), began);
    let began = Instant::now();
    let generated = sequence.generate(generate, None)?.len();
    report("decode", prompt.len(), generated, began);

    let mut restored = Sequence::new(Arc::clone(model), options)?;
    let began = Instant::now();
    for (layer, attention) in model.config().layers.iter().enumerate() {
        for spec in attention.parts() {
            let bytes = sequence.cache().bytes(layer, spec.part, 0..prompt.len())?;
            restored.import(layer, spec.part, 0..prompt.len(), bytes)?;
        }
    }
    restored.resume_at(prompt.len())?;
    report("import", prompt.len(), prompt.len(), began);
    Ok(())
}

fn report(what: &str, context: usize, tokens: usize, began: Instant) {
    let seconds = began.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "token counts are small")]
    let rate = tokens as f64 / seconds;
    println!("{what:<8} {context:>7} {rate:8.1} tokens/s ({seconds:.3} s)");
}
