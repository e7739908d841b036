//! What the daemon remembers of its devices while they are away: `disks.json` in the state
//! directory.
//!
//! Upstairs:   `DiskTier` compares it with what a device says of itself, and writes it on a wipe;
//!             `process` asks whether a directory that is missing held a store.
//! Downstairs: `keep`.
//!
//! A wipe must hold on a device that was not there, and on one that could not take it. So the
//! last wipe of each namespace is kept here, with the sequence below which each device's records
//! are gone. A device whose own superblock says less takes the wipe again before it serves, up to
//! the very same record; one that is not named was away, so that all it has is older.
//!
//! Invariants kept here
//!   P3  A wipe is written here before the call that asked for it is answered.
//!
//! Not here on purpose: no word on where blocks are. Lost, this file costs nothing but the wipes
//! that devices have missed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use kvtier_proto::NamespaceId;
use kvtier_store::StoreId;
use serde::{Deserialize, Serialize};

use crate::keep;

/// Name of the file in the state directory.
const FILE: &str = "disks.json";

/// Why the daemon does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// The file cannot be read or written.
    #[error("cannot keep {path}")]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what the daemon wrote.
    #[error(
        "{path} is damaged ({problem}); restore it, or remove it: a disk that was away while a \
         namespace was wiped would then serve what it has of that namespace"
    )]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// A device as it was seen last under its path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Identity of its store, in hex digits.
    store: String,
    /// It was on another file system than the state directory.
    apart: bool,
}

impl Seen {
    /// A store that is `apart` from the state directory's file system, or not.
    pub fn new(id: StoreId, apart: bool) -> Self {
        Self {
            store: hex(id),
            apart,
        }
    }

    /// Identity of the store.
    pub fn id(&self) -> Option<StoreId> {
        let digits = |at: usize| u8::from_str_radix(self.store.get(2 * at..2 * at + 2)?, 16).ok();
        let mut id = [0; 16];
        for (at, byte) in id.iter_mut().enumerate() {
            *byte = digits(at)?;
        }
        Some(StoreId(id))
    }

    /// It was on another file system than the state directory.
    pub fn apart(&self) -> bool {
        self.apart
    }
}

fn hex(id: StoreId) -> String {
    id.0.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// What is in the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    /// Devices by their path.
    seen: BTreeMap<String, Seen>,
    /// The last wipe of each namespace: for each device that heard of it, by its store's
    /// identity, the sequence below which its records are gone.
    wiped: BTreeMap<NamespaceId, BTreeMap<String, u64>>,
}

/// A wipe that a device has yet to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owed {
    /// Whose records.
    pub(super) namespace: NamespaceId,
    /// Those with a lower sequence; all that it has when the device was away.
    pub(super) below: Option<u64>,
}

/// See the module.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    kept: Kept,
    /// What the file holds.
    written: Option<Kept>,
}

impl Ledger {
    /// Reads the file; there is none before the first start.
    ///
    /// # Errors
    /// It cannot be read, or is damaged.
    pub fn open(state_dir: &Path) -> Result<Self, LedgerError> {
        let path = state_dir.join(FILE);
        let kept = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|problem| LedgerError::Damaged {
                path: path.clone(),
                problem: problem.to_string(),
            })?,
            Err(problem) if problem.kind() == std::io::ErrorKind::NotFound => Kept::default(),
            Err(source) => return Err(LedgerError::File { path, source }),
        };
        Ok(Self {
            path,
            written: Some(kept.clone()),
            kept,
        })
    }

    /// Directory of the file.
    pub fn state_dir(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("."))
    }

    /// Namespaces that were ever wiped.
    pub(super) fn namespaces(&self) -> Vec<NamespaceId> {
        self.kept.wiped.keys().copied().collect()
    }

    /// The device that was seen under this path.
    pub fn seen(&self, path: &Path) -> Option<&Seen> {
        self.kept.seen.get(&path.display().to_string())
    }

    /// A device was seen.
    pub(super) fn see(&mut self, path: &Path, seen: Seen) {
        self.kept.seen.insert(path.display().to_string(), seen);
    }

    /// What the device `id` has yet to take, when `below` is what it says that it took.
    pub(super) fn owed(&self, id: StoreId, below: impl Fn(NamespaceId) -> u64) -> Vec<Owed> {
        let name = hex(id);
        let owed = |(namespace, devices): (&NamespaceId, &BTreeMap<String, u64>)| {
            let (namespace, want) = (*namespace, devices.get(&name).copied());
            let taken = want.is_some_and(|want| below(namespace) >= want);
            (!taken).then_some(Owed {
                namespace,
                below: want,
            })
        };
        self.kept.wiped.iter().filter_map(owed).collect()
    }

    /// A namespace is wiped: on these devices below these sequences, on any other whole.
    pub(super) fn wipe(
        &mut self,
        namespace: NamespaceId,
        devices: impl IntoIterator<Item = (StoreId, u64)>,
    ) {
        let devices = devices.into_iter().map(|(id, below)| (hex(id), below));
        self.kept.wiped.insert(namespace, devices.collect());
    }

    /// A device has heard of the last wipe of a namespace after all.
    pub(super) fn join(&mut self, namespace: NamespaceId, id: StoreId, below: u64) {
        let devices = self.kept.wiped.entry(namespace).or_default();
        devices.insert(hex(id), below);
    }

    /// Makes durable what was said, off this thread. Does nothing when nothing has changed.
    ///
    /// # Errors
    /// The state directory does not take it. What was said stays, and goes with the next write.
    pub(super) async fn write(&mut self) -> Result<(), LedgerError> {
        if self.written.as_ref() == Some(&self.kept) {
            return Ok(());
        }
        let (path, kept) = (self.path.clone(), self.kept.clone());
        // What a write that failed has left is not known.
        self.written = None;
        let write = tokio::task::spawn_blocking(move || {
            let bytes = serde_json::to_vec_pretty(&kept)?;
            keep::replace(&path, &bytes)?;
            Ok(kept)
        });
        let written = write
            .await
            .unwrap_or_else(|lost| Err(std::io::Error::other(lost)));
        let path = self.path.clone();
        self.written = Some(written.map_err(|source| LedgerError::File { path, source })?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RED: NamespaceId = NamespaceId(1);
    const BLUE: NamespaceId = NamespaceId(2);

    fn id(number: u8) -> StoreId {
        StoreId([number; 16])
    }

    fn owed(ledger: &Ledger, number: u8, below: u64) -> Vec<(NamespaceId, Option<u64>)> {
        let owed = ledger.owed(id(number), |_| below);
        owed.iter().map(|one| (one.namespace, one.below)).collect()
    }

    // Goal: P3 for devices that were there, that could not take it, and that were away.
    #[tokio::test]
    async fn a_device_owes_the_last_wipe_until_it_says_that_it_took_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::open(dir.path()).unwrap();
        assert_eq!(owed(&ledger, 1, 0), []);
        ledger.wipe(RED, [(id(1), 100), (id(2), 50)]);
        ledger.write().await.unwrap();
        let mut ledger = Ledger::open(dir.path()).unwrap();
        assert_eq!(owed(&ledger, 1, 100), [], "took it");
        assert_eq!(
            owed(&ledger, 1, 99),
            [(RED, Some(100))],
            "took an older one"
        );
        assert_eq!(owed(&ledger, 3, 1 << 60), [(RED, None)], "was away");
        ledger.join(RED, id(3), 7);
        assert_eq!(owed(&ledger, 3, 7), []);
        // Device 2 misses the next one: what it took before does not count.
        ledger.wipe(RED, [(id(1), 200)]);
        ledger.wipe(BLUE, [(id(2), 60)]);
        assert_eq!(owed(&ledger, 2, 60), [(RED, None)]);
        assert_eq!(owed(&ledger, 1, 200), [(BLUE, None)]);
    }

    #[tokio::test]
    async fn a_device_is_known_again_by_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::open(dir.path()).unwrap();
        let (path, seen) = (Path::new("/mnt/a"), Seen::new(id(0xc5), true));
        assert_eq!(ledger.seen(path), None);
        ledger.see(path, seen.clone());
        ledger.write().await.unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        assert_eq!(ledger.seen(path), Some(&seen));
        assert_eq!(seen.id(), Some(id(0xc5)));
        let broken = Seen {
            store: "c5".into(),
            apart: true,
        };
        assert_eq!(broken.id(), None);
    }

    #[tokio::test]
    async fn what_could_not_be_written_goes_with_the_next_write() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let mut ledger = Ledger::open(&state).unwrap();
        ledger.wipe(RED, [(id(1), 100)]);
        let problem = ledger.write().await.unwrap_err();
        assert!(problem.to_string().contains(FILE), "{problem}");
        std::fs::create_dir(&state).unwrap();
        ledger.write().await.unwrap();
        let again = Ledger::open(&state).unwrap();
        assert_eq!(owed(&again, 1, 99), [(RED, Some(100))]);
    }

    #[test]
    fn a_damaged_file_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), "{").unwrap();
        let problem = Ledger::open(dir.path()).unwrap_err().to_string();
        assert!(problem.contains("disks.json is damaged"), "{problem}");
    }
}
