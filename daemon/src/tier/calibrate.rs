//! Calibration on files: samples in, a profile out.
//!
//! Upstairs:   `kvtier calibrate`.
//! Downstairs: `kvtier_kernels::calibrate` does the work; this reads and writes.
//!
//! Invariants kept here
//!   F1  A profile appears under its name whole or not at all.
//!
//! Not here on purpose: no clock, and nothing of a running daemon.

use std::io;
use std::path::{Path, PathBuf};

use kvtier_kernels::calibrate::measure::{MeasureError, measure};
use kvtier_kernels::calibrate::samples::{Fisher, SampleError};
use kvtier_kernels::calibrate::{CalibrateError, calibrate};
use kvtier_kernels::profile::ProfileError;
use kvtier_proto::Bytes;
use kvtier_proto::layout::PartCode;

pub use kvtier_kernels::calibrate::measure::Stored;
pub use kvtier_kernels::calibrate::samples::{DOCUMENT_TOKENS_MAX, Document};
pub use kvtier_kernels::calibrate::{
    LevelReport, Model, Options, PartReport, Progress, Report, Target,
};
pub use kvtier_kernels::profile::{Rope, TokenPredictor};

/// Largest file that is read. A file is held in memory whole.
pub const FILE_BYTES_MAX: Bytes = Bytes::gib(16);

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CalibrationError {
    /// A file cannot be read or written.
    #[error("{}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A file is larger than any that is read.
    #[error("{} has {bytes}; accepted: at most {FILE_BYTES_MAX}", path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// Its size.
        bytes: Bytes,
    },
    /// A file holds no samples.
    #[error("{}", path.display())]
    Samples {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: SampleError,
    },
    /// Samples of different models.
    #[error(
        "{} has other layers, heads or elements than {}; accepted: samples of one model",
        path.display(), first.display()
    )]
    Mixed {
        /// The file that differs.
        path: PathBuf,
        /// The first of the samples.
        first: PathBuf,
    },
    /// What is to be left out is learnt from.
    #[error(
        "{} is left out, and the same as {}; accepted: samples that nothing is learnt from",
        path.display(), sample.display()
    )]
    LearntFrom {
        /// The file that was to be left out.
        path: PathBuf,
        /// The sample.
        sample: PathBuf,
    },
    /// The samples make no profile.
    #[error(transparent)]
    Calibrate(CalibrateError),
    /// The profile does not store what it was made for.
    #[error("the profile stores nothing")]
    Measure(#[source] MeasureError),
    /// The profile is none that can be written.
    #[error("the profile cannot be written")]
    Profile(#[source] ProfileError),
}

/// Files of samples, in memory.
#[derive(Debug)]
pub struct Files {
    paths: Vec<PathBuf>,
    bytes: Vec<Vec<u8>>,
}

/// Width of a head of K, and the size of an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Elements of a head of K.
    pub k_dim: usize,
    /// Bytes of an element.
    pub element_bytes: usize,
}

/// A profile that was written.
#[derive(Debug)]
pub struct Written {
    /// What records carry to name it.
    pub identity: u32,
    /// Size of the file.
    pub bytes: Bytes,
    /// What documents take at each level, every byte counted: those left out, or the first of
    /// the samples where none is.
    pub stored: Vec<Stored>,
}

impl Files {
    /// Reads all of them.
    ///
    /// # Errors
    /// [`CalibrationError`] names the file.
    pub fn read(paths: &[PathBuf]) -> Result<Self, CalibrationError> {
        Ok(Self {
            paths: paths.to_vec(),
            bytes: paths
                .iter()
                .map(|path| read(path))
                .collect::<Result<_, _>>()?,
        })
    }

    fn documents(&self) -> Result<Vec<Document<'_>>, CalibrationError> {
        let mut documents = Vec::with_capacity(self.paths.len());
        for (path, bytes) in self.paths.iter().zip(&self.bytes) {
            let document = Document::parse(bytes);
            documents.push(document.map_err(|source| CalibrationError::Samples {
                path: path.clone(),
                source,
            })?);
        }
        Ok(documents)
    }

    /// What the first document is like; `None` without documents.
    ///
    /// # Errors
    /// [`CalibrationError`] names a file that holds no samples.
    pub fn shape(&self) -> Result<Option<Shape>, CalibrationError> {
        let shape = |document: &Document<'_>| Shape {
            k_dim: document.tensor(PartCode::K).dim,
            element_bytes: document.element().bytes(),
        };
        Ok(self.documents()?.first().map(shape))
    }

    /// Makes a profile of them, stores the documents of `left_out` with it to see what they take,
    /// and writes it to `out`.
    ///
    /// # Errors
    /// [`CalibrationError`] says what is wrong with which file, or what is missing.
    pub fn calibrate(
        &self,
        left_out: &Files,
        fisher: Option<&Path>,
        (model, options): (&Model, &Options),
        out: &Path,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<(Report, Written), CalibrationError> {
        let documents = self.documents()?;
        let left_out = self.left_out(&documents, left_out)?;
        let fisher = fisher.map(read_fisher).transpose()?;
        let made = calibrate(&documents, fisher.as_ref(), (model, options), progress);
        let (mut profile, report) = made.map_err(|error| self.named(error))?;
        let judged = match left_out.is_empty() {
            true => documents.get(..1).unwrap_or_default(),
            false => &left_out,
        };
        let stored = measure(profile.clone(), judged, options.threads);
        let stored = stored.map_err(CalibrationError::Measure)?;
        for level in &mut profile.measured {
            let of = |stored: &&Stored| stored.level.0 == level.level;
            if let Some(stored) = stored.iter().find(of) {
                level.bits = bits(stored, profile.element.bytes());
            }
        }
        let identity = profile.identity();
        let bytes = profile.to_bytes().map_err(CalibrationError::Profile)?;
        write(out, &bytes)?;
        let bytes = Bytes(bytes.len() as u64);
        let written = Written {
            identity,
            bytes,
            stored,
        };
        Ok((report, written))
    }

    /// The documents that nothing is learnt from: of the same model, and none of the samples.
    fn left_out<'a>(
        &self,
        documents: &[Document<'_>],
        files: &'a Files,
    ) -> Result<Vec<Document<'a>>, CalibrationError> {
        let left_out = files.documents()?;
        for ((path, bytes), document) in files.paths.iter().zip(&files.bytes).zip(&left_out) {
            let same = |code| {
                let first = documents.first().map(|first| first.tensor(code));
                first.is_none_or(|first| first.is_like(document.tensor(code)))
            };
            if ![PartCode::K, PartCode::V].into_iter().all(same) {
                return Err(self.mixed(path));
            }
            let mut samples = self.paths.iter().zip(&self.bytes);
            if let Some((sample, _)) = samples.find(|(_, sample)| *sample == bytes) {
                let (path, sample) = (path.clone(), sample.clone());
                return Err(CalibrationError::LearntFrom { path, sample });
            }
        }
        Ok(left_out)
    }

    fn mixed(&self, path: &Path) -> CalibrationError {
        CalibrationError::Mixed {
            path: path.to_owned(),
            first: self.paths.first().cloned().unwrap_or_default(),
        }
    }

    /// Calls a document by the name of its file.
    fn named(&self, error: CalibrateError) -> CalibrationError {
        match error {
            CalibrateError::Document { index, source } => match self.paths.get(index) {
                Some(path) => CalibrationError::Samples {
                    path: path.clone(),
                    source,
                },
                None => CalibrationError::Calibrate(CalibrateError::Document { index, source }),
            },
            CalibrateError::Mixed { index } => match self.paths.get(index) {
                Some(path) => self.mixed(path),
                None => CalibrationError::Calibrate(CalibrateError::Mixed { index }),
            },
            other => CalibrationError::Calibrate(other),
        }
    }
}

/// Bits of a value.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a few bits, to seven digits"
)]
fn bits(stored: &Stored, element_bytes: usize) -> f32 {
    let values = stored.raw_bytes as f64 / element_bytes as f64;
    (8.0 * stored.stored_bytes as f64 / values.max(1.0)) as f32
}

fn read(path: &Path) -> Result<Vec<u8>, CalibrationError> {
    let file = |source| CalibrationError::File {
        path: path.to_owned(),
        source,
    };
    let bytes = Bytes(std::fs::metadata(path).map_err(file)?.len());
    match bytes > FILE_BYTES_MAX {
        true => Err(CalibrationError::TooLarge {
            path: path.to_owned(),
            bytes,
        }),
        false => std::fs::read(path).map_err(file),
    }
}

fn read_fisher(path: &Path) -> Result<Fisher, CalibrationError> {
    let bytes = read(path)?;
    Fisher::parse(&bytes).map_err(|source| CalibrationError::Samples {
        path: path.to_owned(),
        source,
    })
}

/// Writes beside the name and moves the file there (F1).
fn write(path: &Path, bytes: &[u8]) -> Result<(), CalibrationError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".part");
    let beside = PathBuf::from(beside);
    let written = std::fs::write(&beside, bytes).and_then(|()| std::fs::rename(&beside, path));
    written.map_err(|source| {
        // What is left of it is of no use; the error is about the write.
        let _ = std::fs::remove_file(&beside);
        CalibrationError::File {
            path: path.to_owned(),
            source,
        }
    })
}
