//! What the daemon remembers of its devices while they are away: `disks.json` in the state
//! directory.
//!
//! Upstairs:   `DiskTier` compares it with what a device says of itself, and writes it on a wipe;
//!             `process` asks whether a directory held a store that is missing.
//! Downstairs: `keep`.
//!
//! A wipe must hold on a device that was not there, and on one that could not take it. So the
//! last wipe of each namespace is kept here, with the sequence below which each device's records
//! are gone. A device whose own superblock says less takes the wipe again before it serves, up to
//! the very same record; one that is not named was away, so that all it has is older.
//!
//! Invariants kept here
//!   P2  What is not exactly what was written is refused: a device that is not named forgets all
//!       that it has, so that one wrong digit of a name would cost durable blocks.
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
#[serde(deny_unknown_fields)]
pub struct Seen {
    /// Identity of its store, in hex digits.
    store: String,
    /// It was on a file system of its own.
    apart: bool,
}

impl Seen {
    /// A store that has a file system of its own, `apart` from the daemon's, or not.
    pub fn new(id: StoreId, apart: bool) -> Self {
        Self {
            store: hex(id),
            apart,
        }
    }

    /// Identity of the store.
    pub fn id(&self) -> Option<StoreId> {
        from_hex(&self.store)
    }

    /// It was on a file system of its own.
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

/// The identity that is written like this, and in no other way.
fn from_hex(text: &str) -> Option<StoreId> {
    let digits = |at: usize| u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok();
    let mut id = [0; 16];
    for (at, byte) in id.iter_mut().enumerate() {
        *byte = digits(at)?;
    }
    let id = StoreId(id);
    (hex(id) == text).then_some(id)
}

/// The file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// Of what is kept, as [`Kept::crc32`] says.
    crc32: u32,
    kept: Kept,
}

/// What is in the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    /// Devices by their path.
    seen: BTreeMap<String, Seen>,
    /// The last wipe of each namespace: for each device that heard of it, by its store's
    /// identity, the sequence below which its records are gone.
    wiped: BTreeMap<NamespaceId, BTreeMap<String, u64>>,
}

impl Kept {
    /// Of the content, written without spaces and in order: however a person may have laid out
    /// the file.
    fn crc32(&self) -> Result<u32, String> {
        let bytes = serde_json::to_vec(self).map_err(|problem| problem.to_string())?;
        Ok(crc32fast::hash(&bytes))
    }

    fn parse(text: &[u8]) -> Result<Self, String> {
        let file: File = serde_json::from_slice(text).map_err(|problem| problem.to_string())?;
        let File { crc32, kept } = file;
        if kept.crc32()? != crc32 {
            return Err("its checksum is another".to_owned());
        }
        let stores = kept.wiped.values().flat_map(BTreeMap::keys);
        let mut stores = stores.chain(kept.seen.values().map(|seen| &seen.store));
        match stores.find(|store| from_hex(store).is_none()) {
            Some(store) => Err(format!("{store:?} names no store")),
            None => Ok(kept),
        }
    }

    fn to_bytes(&self) -> Result<Vec<u8>, String> {
        let file = File {
            crc32: self.crc32()?,
            kept: self.clone(),
        };
        serde_json::to_vec_pretty(&file).map_err(|problem| problem.to_string())
    }
}

/// The file that the daemon would write after it has read one of this text. For the fuzz target of
/// the file.
///
/// # Errors
/// It is damaged.
pub fn ledger_after(text: &[u8]) -> Result<Vec<u8>, LedgerError> {
    let damaged = |problem| LedgerError::Damaged {
        path: PathBuf::from(FILE),
        problem,
    };
    Kept::parse(text)
        .and_then(|kept| kept.to_bytes())
        .map_err(damaged)
}

/// The same text with the checksum that belongs to it. For the fuzz target of the file.
pub fn ledger_mended(text: &[u8]) -> Option<Vec<u8>> {
    let file: File = serde_json::from_slice(text).ok()?;
    file.kept.to_bytes().ok()
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
            Ok(text) => Kept::parse(&text).map_err(|problem| LedgerError::Damaged {
                path: path.clone(),
                problem,
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
            let bytes = kept.to_bytes().map_err(std::io::Error::other)?;
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
        for wrong in ["c5", &"C5".repeat(16), &"+5".repeat(16), &"c5".repeat(17)] {
            assert_eq!(from_hex(wrong), None, "{wrong}");
        }
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

    // Goal: P2 when a digit of a name has changed: taken as another device, the one that was meant
    // would forget what it has.
    #[tokio::test]
    async fn a_file_of_which_any_bit_has_changed_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let mut ledger = Ledger::open(dir.path()).unwrap();
        ledger.see(Path::new("/mnt/a"), Seen::new(id(1), true));
        ledger.wipe(RED, [(id(1), 100), (id(2), 50)]);
        ledger.write().await.unwrap();
        let text = std::fs::read(&path).unwrap();
        assert_eq!(ledger_after(&text).unwrap(), text);
        for bit in 0..8 * text.len() {
            let mut changed = text.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(ledger_after(&changed).is_err(), "bit {bit}");
        }
        for wrong in ["", "{", "{}", r#"{"seen":{},"wiped":{}}"#] {
            std::fs::write(&path, wrong).unwrap();
            let problem = Ledger::open(dir.path()).unwrap_err().to_string();
            assert!(problem.contains("disks.json is damaged"), "{problem}");
        }
    }

    // Goal: the names are looked at as well, whatever the checksum says.
    #[test]
    fn a_name_that_is_no_store_is_refused() {
        for wrong in ["c5", &"C5".repeat(16)] {
            let mut kept = Kept::default();
            let devices = BTreeMap::from([(wrong.to_owned(), 7)]);
            kept.wiped.insert(RED, devices);
            let problem = ledger_after(&kept.to_bytes().unwrap()).unwrap_err();
            assert!(problem.to_string().contains("names no store"), "{problem}");
        }
    }
}
