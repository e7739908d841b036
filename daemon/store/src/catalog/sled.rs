//! The catalog in sled, kept at arm's length.
//!
//! Upstairs:   `catalog` and `recover`.
//! Downstairs: the `sled` crate, in a folder of its own.
//!
//! Every call runs under `catch_unwind`: sled can panic on files that a power cut left behind.
//! What sled says is durable is not (its flush uses `sync_file_range`), which is why nothing here
//! decides whether it may be trusted: the superblock and the sum over the rows do.
//!
//! Not here on purpose: no background flush. A crash makes the next opening rebuild anyway.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use kvtier_proto::{BlockKey, NamespaceId};

use super::{Catalog, CatalogError, Stamp, read_row, row_key, row_of};
use crate::index::Stored;

/// Tree with one row a block.
const BLOCKS: &str = "blocks";
/// Key of the stamp, in the default tree.
const STAMP: &str = "stamp";
/// Memory that sled may use for pages. Unit: bytes.
const CACHE: u64 = 32 << 20;

/// What sled says when somebody else has its folder open.
const LOCKED: &str = "could not acquire lock";
/// Times that a locked folder is tried, and the pause between two of them: 3 s in all.
const TRIES: u32 = 300;
const PAUSE: std::time::Duration = std::time::Duration::from_millis(10);

/// A catalog in a folder.
pub struct SledCatalog {
    folder: PathBuf,
    open: Option<Open>,
}

struct Open {
    db: sled::Db,
    blocks: sled::Tree,
}

impl SledCatalog {
    /// The catalog in `folder`, which belongs to it alone. Touches nothing yet.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            open: None,
        }
    }

    /// Where an unsound catalog is moved; the one that lay there before is removed.
    pub fn aside(folder: &Path) -> PathBuf {
        let mut name = folder.as_os_str().to_owned();
        name.push(".unsound");
        PathBuf::from(name)
    }

    fn db(&mut self) -> Result<&Open, CatalogError> {
        if self.open.is_none() {
            self.open = Some(self.open_in_time()?);
        }
        self.open.as_ref().ok_or_else(|| CatalogError::Library {
            what: "not open".to_owned(),
        })
    }
}

impl SledCatalog {
    /// Opens the folder. A sled of this process that was dropped a moment ago may still hold its
    /// lock, on threads of its own; that is waited for, and only that.
    fn open_in_time(&self) -> Result<Open, CatalogError> {
        let mut tries = 1;
        loop {
            let config = sled::Config::new()
                .path(&self.folder)
                .cache_capacity(CACHE)
                .flush_every_ms(None);
            let opened = guard(|| {
                let db = config.open()?;
                let blocks = db.open_tree(BLOCKS)?;
                Ok(Open { db, blocks })
            });
            match opened {
                Err(CatalogError::Library { what }) if what.contains(LOCKED) && tries < TRIES => {
                    tries += 1;
                    std::thread::sleep(PAUSE);
                }
                opened => return opened,
            }
        }
    }
}

impl std::fmt::Debug for SledCatalog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SledCatalog({})", self.folder.display())
    }
}

/// Runs sled so that neither an error nor a panic of it gets further.
fn guard<T>(run: impl FnOnce() -> sled::Result<T>) -> Result<T, CatalogError> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(problem)) => Err(CatalogError::Library {
            what: problem.to_string(),
        }),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Err(CatalogError::Library {
                what: format!("panic: {}", text.unwrap_or("no text")),
            })
        }
    }
}

fn unsound(what: &str) -> CatalogError {
    CatalogError::Unsound {
        what: what.to_owned(),
    }
}

impl Catalog for SledCatalog {
    fn load(&mut self, stamp: &Stamp, each: &mut dyn FnMut(&Stored)) -> Result<(), CatalogError> {
        if !self.folder.exists() {
            return Err(CatalogError::Missing);
        }
        let open = self.db()?;
        let found = guard(|| open.db.get(STAMP))?;
        if found.as_deref() != Some(stamp.to_bytes().as_slice()) {
            return Err(unsound("its stamp is not the one of the last clean close"));
        }
        let mut bad = false;
        guard(|| {
            for row in open.blocks.iter() {
                let (key, row) = row?;
                match read_row(&key, &row) {
                    Some(stored) => each(&stored),
                    None => bad = true,
                }
            }
            Ok(())
        })?;
        if bad {
            Err(unsound("a row has the wrong form"))
        } else {
            Ok(())
        }
    }

    fn reset(&mut self) -> Result<(), CatalogError> {
        if let Some(open) = self.open.take() {
            // Dropping a broken sled may panic as well.
            guard(|| {
                drop(open);
                Ok(())
            })
            .ok();
        }
        if self.folder.exists() {
            let aside = Self::aside(&self.folder);
            match std::fs::symlink_metadata(&aside) {
                Ok(found) if found.is_dir() => std::fs::remove_dir_all(&aside)?,
                Ok(_) => std::fs::remove_file(&aside)?,
                Err(_) => {}
            }
            std::fs::rename(&self.folder, &aside)?;
        }
        self.db().map(|_| ())
    }

    fn put(&mut self, rows: &[Stored]) -> Result<(), CatalogError> {
        let open = self.db()?;
        guard(|| {
            let mut batch = sled::Batch::default();
            for stored in rows {
                batch.insert(
                    row_key(stored.namespace, &stored.key).to_vec(),
                    row_of(stored).to_vec(),
                );
            }
            open.blocks.apply_batch(batch)
        })
    }

    fn remove(&mut self, keys: &[(NamespaceId, BlockKey)]) -> Result<(), CatalogError> {
        let open = self.db()?;
        guard(|| {
            let mut batch = sled::Batch::default();
            for (namespace, key) in keys {
                batch.remove(row_key(*namespace, key).to_vec());
            }
            open.blocks.apply_batch(batch)
        })
    }

    fn close(&mut self, stamp: &Stamp) -> Result<(), CatalogError> {
        let open = self.db()?;
        guard(|| {
            open.db.insert(STAMP, stamp.to_bytes().as_slice())?;
            open.blocks.flush()?;
            open.db.flush()?;
            Ok(())
        })?;
        let open = self.open.take();
        guard(|| {
            drop(open);
            Ok(())
        })
    }
}
