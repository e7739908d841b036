//! The demo, scene by scene: compute, save, kill, restore, compare.
//!
//! Upstairs:   `demo` runs it for the arguments that were given.
//! Downstairs: `daemon` and `children` for processes, `job` for what engines are asked.
//!
//! ```text
//!   two daemons start, one a codec level            raw       lossless
//!   engine A  prefill -> first token -> save to      |            |
//!                                      both, durable v            v
//!   SIGKILL                                          X            X
//!   for one level after the other:
//!     the daemon starts again over the same folders
//!     engine B (new process)  restore -> first token -> 47 more    from NVMe
//!                             again, with an empty cache           from host memory
//! ```
//!
//! The two levels share one prefill: both daemons get the same KV from the same engine, and are
//! idle while it computes. While engine B restores, one daemon runs.
//!
//! Invariants kept here
//!   Y1  Only the device connects engine A's KV with engine B: the daemons that took it are dead
//!       by SIGKILL before the ones that give it back start.
//!   Y2  Whatever way the demo ends, its processes end and its folders go (see `children`).

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvtier_benches::machine::{Machine, load};
use kvtier_benches::report::Report;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::TempDir;

use super::children::{self, Child};
use super::daemon::{self, Daemon, Plan};
use super::job::{Computed, Job, ModelSource, Restore, Work, prompt};
use super::outcome::{Counted, LevelOutcome, Outcome};
use super::{Arguments, DemoError, Fault, show};
use crate::engine::DEFAULT_BLOCK_TOKENS;
use crate::weights;

/// Codec levels of the disk tier, in the order they are shown.
const LEVELS: [&str; 2] = ["raw", "lossless"];
/// Length of the continuation. Unit: tokens.
const GENERATE: usize = 48;
/// Longest time that an engine process may take; a long prompt on a small busy machine.
const ENGINE_LIMIT: Duration = Duration::from_secs(15 * 60);
/// What a planted fault destroys on the device. Unit: bytes.
const FAULT_BYTES: usize = 4096;

/// Runs the demo and prints what it found. Returns every broken promise.
pub(super) fn run(arguments: &Arguments) -> Result<Vec<String>, DemoError> {
    children::listen()?;
    let begin = Instant::now();
    let binary = daemon::binary()?;
    let model = model(arguments)?;
    children::check()?;
    // Loaded once here for its sizes; every engine process loads it again.
    let (token_bytes, name) = {
        let (loaded, tokenizer) = model.load()?;
        let config = loaded.config();
        prompt(tokenizer.as_ref(), config.vocab, arguments.tokens)?;
        (config.bytes_per_token() as u64, config.name.clone())
    };
    let stage = Stage::set(arguments, binary, model, token_bytes)?;
    let machine = Machine::look(stage.store.path());
    eprintln!(
        "{name}, prompt of {} tokens, {machine}; load average {}",
        arguments.tokens,
        load()
    );
    if machine.is_in_memory() {
        eprintln!("note: the disk tier lies in memory here; pass --dir DIR on a real device");
    }
    let outcome = stage.play(arguments.plant)?;
    println!("\n{}\n", show::table(&outcome));
    if !outcome.computed.text.is_empty() {
        println!(
            "The continuation: {}\n",
            outcome.computed.text.trim().escape_debug()
        );
    }
    println!("Measured on {machine}; load average {}\n", load());
    if let Some(path) = &arguments.json {
        let report = Report::new("demo", stage.store.path());
        let wall_s = begin.elapsed().as_secs_f64();
        write(path, &show::rows(report, &outcome, wall_s))?;
    }
    Ok(outcome.problems())
}

fn model(arguments: &Arguments) -> Result<ModelSource, DemoError> {
    if arguments.tiny {
        return Ok(ModelSource::Tiny);
    }
    match weights::model_file(arguments.model.as_deref()) {
        Ok(file) => Ok(ModelSource::File(file.path)),
        Err(error) => {
            // Ctrl-C ends the fetch, which then looks as if it had failed.
            children::check()?;
            Err(error.into())
        }
    }
}

/// Everything that exists while the demo runs, and goes with it.
struct Stage {
    plans: Vec<Plan>,
    model: ModelSource,
    prompt_tokens: usize,
    store: TempDir,
    /// Socket paths must be short, so they have a folder of their own.
    _sockets: TempDir,
}

impl Stage {
    fn set(
        arguments: &Arguments,
        binary: PathBuf,
        model: ModelSource,
        token_bytes: u64,
    ) -> Result<Self, DemoError> {
        let below = match &arguments.dir {
            Some(folder) => folder.clone(),
            None => build_folder().unwrap_or_else(std::env::temp_dir),
        };
        let making = |folder: &Path| format!("cannot make a folder in {}", folder.display());
        let named = |folder: &Path| {
            let made = tempfile::Builder::new()
                .prefix("kvtier-demo-")
                .tempdir_in(folder);
            made.map_err(DemoError::io(making(folder)))
        };
        fs::create_dir_all(&below).map_err(DemoError::io(making(&below)))?;
        let (store, sockets) = (named(&below)?, named(&std::env::temp_dir())?);
        let plan = |level: &&'static str| Plan {
            binary: binary.clone(),
            folder: store.path().join(level),
            sockets: sockets.path().to_owned(),
            level,
            payload: token_bytes * arguments.tokens as u64,
            block: token_bytes * DEFAULT_BLOCK_TOKENS as u64,
        };
        Ok(Self {
            plans: LEVELS.iter().map(plan).collect(),
            model,
            prompt_tokens: arguments.tokens,
            store,
            _sockets: sockets,
        })
    }

    fn play(&self, fault: Option<Fault>) -> Result<Outcome, DemoError> {
        let daemons = self.plans.iter().map(Plan::start);
        let daemons = daemons.collect::<Result<Vec<_>, _>>()?;
        eprintln!(
            "kvtierd serves at levels {}; engine A starts",
            LEVELS.join(" and ")
        );
        let save_to = self.plans.iter().map(Plan::socket).collect();
        let computed: Computed = self.engine("engine A", Work::Compute { save_to })?;
        for daemon in daemons {
            eprintln!("kill -9 {} (kvtierd)", daemon.id());
            daemon.kill()?;
        }
        if fault == Some(Fault::StoredBytes) {
            self.plans
                .iter()
                .try_for_each(|plan| destroy(&plan.disk()))?;
        }
        let mut levels = Vec::new();
        for (plan, save) in self.plans.iter().zip(&computed.saves) {
            let daemon = plan.start()?;
            eprintln!(
                "kvtierd serves again at level {}; engine B starts",
                plan.level
            );
            let flip = fault == Some(Fault::RestoredBit);
            let (disk, host) = self.restore(plan, flip).inspect_err(|_| {
                eprintln!("the daemon's log ends with\n{}", plan.log_tail());
            })?;
            levels.push(LevelOutcome {
                level: plan.level,
                save: save.clone(),
                ready_after_s: daemon.ready_after.as_secs_f64(),
                disk,
                host,
                counted: counted(&daemon)?,
            });
        }
        Ok(Outcome {
            prompt_tokens: self.prompt_tokens,
            computed,
            levels,
        })
    }

    fn restore(&self, plan: &Plan, flip: bool) -> Result<(Restore, Restore), DemoError> {
        let from = plan.socket();
        let work = Work::Restore {
            from,
            times: 2,
            flip,
        };
        let restores: Vec<Restore> = self.engine("engine B", work)?;
        match <[Restore; 2]>::try_from(restores) {
            Ok([disk, host]) => Ok((disk, host)),
            Err(other) => Err(DemoError::Child(format!(
                "engine B reported {} restores; expected 2",
                other.len()
            ))),
        }
    }

    /// Runs one engine process to its end.
    fn engine<Report: DeserializeOwned>(
        &self,
        name: &str,
        work: Work,
    ) -> Result<Report, DemoError> {
        let (job, report) = (
            self.store.path().join("job"),
            self.store.path().join("report"),
        );
        let what = Job {
            model: self.model.clone(),
            prompt_tokens: self.prompt_tokens,
            generate: GENERATE,
            work,
        };
        write(&job, &what)?;
        // A report of an earlier process must not be taken for this one's.
        let _ = fs::remove_file(&report);
        let itself = std::env::current_exe().map_err(DemoError::io("cannot find this program"))?;
        let arguments = [OsStr::new("engine"), job.as_os_str(), report.as_os_str()];
        Child::start(name, &itself, &arguments, None)?.finish(ENGINE_LIMIT)?;
        let text = fs::read(&report).map_err(DemoError::io(format!("{name} left no report")))?;
        serde_json::from_slice(&text).map_err(DemoError::json("a report"))
    }
}

fn counted(daemon: &Daemon) -> Result<Counted, DemoError> {
    Ok(Counted {
        disk: daemon.counter(r#"kvtier_restore_blocks_total{tier="disk"}"#)?,
        host: daemon.counter(r#"kvtier_restore_blocks_total{tier="host"}"#)?,
    })
}

/// The folder of this build's temporary files: on a device more often than /tmp is.
fn build_folder() -> Option<PathBuf> {
    let itself = std::env::current_exe().ok()?;
    let target = itself.ancestors().nth(2)?;
    let tmp = target.join("tmp");
    fs::create_dir_all(&tmp).ok()?;
    Some(tmp)
}

/// A planted fault: destroys a page in the middle of the blocks of the store in `folder`.
fn destroy(folder: &Path) -> Result<(), DemoError> {
    let spoiling = || DemoError::io(format!("cannot spoil {}", folder.display()));
    let mut filled: Option<(PathBuf, usize)> = None;
    for entry in fs::read_dir(folder).map_err(spoiling())? {
        let path = entry.map_err(spoiling())?.path();
        if path.extension() != Some(OsStr::new("kvs")) {
            continue;
        }
        let bytes = fs::read(&path).map_err(spoiling())?;
        let end = bytes.iter().rposition(|byte| *byte != 0).unwrap_or(0);
        if filled.as_ref().is_none_or(|(_, most)| end > *most) {
            filled = Some((path, end));
        }
    }
    let Some((path, end)) = filled else {
        return Err(DemoError::Child(format!(
            "no segment in {}",
            folder.display()
        )));
    };
    let middle = (end / 2 / FAULT_BYTES * FAULT_BYTES) as u64;
    let file = fs::OpenOptions::new().read(true).write(true).open(path);
    let file = file.map_err(spoiling())?;
    let mut page = [0; FAULT_BYTES];
    file.read_exact_at(&mut page, middle).map_err(spoiling())?;
    page.iter_mut().for_each(|byte| *byte = !*byte);
    file.write_all_at(&page, middle).map_err(spoiling())
}

fn write(path: &Path, content: &impl Serialize) -> Result<(), DemoError> {
    let mut text = serde_json::to_vec_pretty(content).map_err(DemoError::json("a file"))?;
    text.push(b'\n');
    fs::write(path, text).map_err(DemoError::io(format!("cannot write {}", path.display())))
}
