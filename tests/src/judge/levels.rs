//! `kvtier-judge quality`: every level over every document, and what each layer minds.
//!
//! Upstairs:   `judge` parses the command line.
//! Downstairs: `quality` measures, `verdict` and `plot` tell.
//!
//! Not here on purpose: a time. Speed of codecs is measured by the suite `codecs` of the benches.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use kvtier_benches::report::{Problem, Report};
use kvtier_kernels::codec::ladder::Ladder;
use kvtier_kernels::profile::Profile;
use kvtier_kernels::{Codec, Registry};

use super::quality::{Bench, Cut};
use super::subject::{self, Tokens};
use super::verdict::{SetFigures, table};
use super::{CONTEXT_TOKENS, plot, say};
use crate::engine::{Model, Tokenizer};
use crate::text::{self, Document};

/// Documents of each layer's sensitivity, spread over the set.
const SENSITIVITY_DOCUMENTS: usize = 2;

/// Options of the job.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// Tables of this model: adds the levels that they serve
    #[arg(long, value_name = "FILE.kvtables")]
    tables: Option<PathBuf>,

    /// Also write the results to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Also draw divergence over rate into this file
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,

    /// Only these levels, by name, separated by commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    levels: Vec<String>,

    /// Levels whose damage is measured layer by layer, by name; none leaves it out
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "int4"
    )]
    layers: Vec<String>,

    /// Sets of texts: heldout, foreign, and dev, which is there to make choices by
    #[arg(
        long,
        value_name = "SETS",
        value_delimiter = ',',
        default_value = "heldout,foreign"
    )]
    sets: Vec<Set>,

    /// Keep so many tokens at the front exact instead of what the tables say
    #[arg(long, value_name = "TOKENS")]
    sinks: Option<u32>,

    /// Two documents of each set and no layers: to see that everything works
    #[arg(long)]
    quick: bool,
}

/// A set of texts to judge on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Set {
    Dev,
    Heldout,
    Foreign,
}

impl Set {
    fn documents(self) -> (&'static str, Vec<Document>) {
        match self {
            Self::Dev => ("dev", text::dev()),
            Self::Heldout => ("heldout", text::heldout()),
            Self::Foreign => ("foreign", text::foreign()),
        }
    }
}

/// Judges all levels; false when a promise is not kept.
pub(super) fn run(
    options: &Options,
    model: &Arc<Model>,
    tokenizer: &Tokenizer,
) -> Result<bool, Problem> {
    let registry = registry(options.tables.as_deref(), options.sinks)?;
    let chosen: Vec<&dyn Codec> = if options.levels.is_empty() {
        registry.iter().collect()
    } else {
        let named = options.levels.iter().map(|name| registry.by_name(name));
        named.collect::<Result<_, _>>()?
    };
    let cut = Cut {
        context: CONTEXT_TOKENS,
        targets: 192,
        greedy: 64,
    };
    let mut report = Report::new("quality", Path::new("."));
    report.note(format!(
        "{}; {} tokens restored, {} given, {} continued",
        model.config().name,
        cut.context,
        cut.targets,
        cut.greedy
    ));
    let mut figures = Vec::new();
    for set in &options.sets {
        let (set, documents) = set.documents();
        let mut documents = subject::tokens(tokenizer, &documents, cut.tokens())?;
        if options.quick {
            documents.truncate(2);
        }
        let of_set = judge_set(model, set, &documents, &chosen, cut)?;
        println!("{}\n", table(&of_set));
        figures.extend(of_set);
    }
    for one in &figures {
        one.rows(&mut report);
    }
    let layers = options.layers.iter().filter(|name| *name != "none");
    for name in layers.take(if options.quick { 0 } else { usize::MAX }) {
        let codec = registry.by_name(name)?;
        let documents = subject::tokens(tokenizer, &text::dev(), cut.tokens())?;
        let each = documents.len().div_ceil(SENSITIVITY_DOCUMENTS).max(1);
        let few: Vec<Tokens> = documents.into_iter().step_by(each).collect();
        sensitivity(model, &few, codec, cut, &mut report)?;
    }
    report.finish(options.json.as_deref())?;
    if let Some(path) = &options.plot {
        plot::draw(path, &figures)?;
    }
    Ok(report.holds() && !report.has_failed())
}

/// The levels of this build, and those that `tables` bring.
fn registry(tables: Option<&Path>, sinks: Option<u32>) -> Result<Registry, Problem> {
    let mut all = Registry::with_baselines();
    if let Some(path) = tables {
        let told = |problem: &dyn std::fmt::Display| format!("{}: {problem}", path.display());
        let bytes = std::fs::read(path).map_err(|problem| told(&problem))?;
        let mut profile = Profile::from_bytes(&bytes).map_err(|problem| told(&problem))?;
        profile.sinks = sinks.unwrap_or(profile.sinks);
        for codec in Ladder::all(Arc::new(profile)).map_err(|problem| told(&problem))? {
            all.add(codec)?;
        }
    }
    Ok(all)
}

/// Every level over every document of a set; in the order of the levels.
pub(super) fn judge_set(
    model: &Arc<Model>,
    set: &'static str,
    documents: &[Tokens],
    levels: &[&dyn Codec],
    cut: Cut,
) -> Result<Vec<SetFigures>, Problem> {
    let empty = |codec: &&dyn Codec| SetFigures {
        set,
        name: codec.name(),
        level: codec.level(),
        documents: Vec::with_capacity(documents.len()),
    };
    let mut figures: Vec<SetFigures> = levels.iter().map(empty).collect();
    for document in documents {
        let begin = Instant::now();
        let mut bench = Bench::new(model, document, cut)?;
        for (codec, figures) in levels.iter().zip(&mut figures) {
            let judged = bench.judge(*codec)?;
            if codec.exact() && judged.change.kl() != 0.0 {
                return Err(format!("level {} changed a prediction", codec.name()).into());
            }
            figures.documents.push(judged);
        }
        let seconds = begin.elapsed().as_secs();
        say("judged", &format!("{set} {} in {seconds} s", document.name));
    }
    Ok(figures)
}

/// Rows `quality.layer.LEVEL.NN.PART.kl`: the damage when only that part goes through `codec`.
fn sensitivity(
    model: &Arc<Model>,
    documents: &[Tokens],
    codec: &dyn Codec,
    cut: Cut,
    report: &mut Report,
) -> Result<(), Problem> {
    let parts: Vec<_> = (model.config().layers.iter().enumerate())
        .flat_map(|(layer, attention)| attention.parts().map(|spec| (layer, spec.part)))
        .collect();
    let mut divergences = vec![Vec::new(); parts.len()];
    for document in documents {
        let cut = Cut { greedy: 0, ..cut };
        let mut bench = Bench::new(model, document, cut)?;
        for ((layer, part), values) in parts.iter().zip(&mut divergences) {
            values.push(bench.sensitivity(codec, *layer, *part)?.kl());
        }
        say("judged each layer of", &document.name);
    }
    for ((layer, part), values) in parts.iter().zip(&divergences) {
        let part = format!("{part:?}").to_lowercase();
        let name = format!("quality.layer.{}.{layer:02}.{part}.kl", codec.name());
        report.row(name, "nats", values);
    }
    Ok(())
}
