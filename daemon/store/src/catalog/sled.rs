//! The catalog in sled, kept at arm's length.
//!
//! Upstairs:   `catalog` and `recover`.
//! Downstairs: the `sled` crate, in a folder of its own.
//!
//! Every call runs under `catch_unwind`: sled can panic on files that a power cut left behind.
//! What sled says is durable is not (its flush uses `sync_file_range`), which is why nothing here
//! decides whether it may be trusted: the superblock and the sum over the rows do.
//!
//! A value holds a piece of a segment's rows, so that sled has a thousand pages where it had a
//! few hundred thousand. A page takes up to 16 values and must stay below its own segment of
//! 512 KiB: beyond that sled makes a file of each.
//!
//! Not here on purpose: no background flush. A crash makes the next opening rebuild anyway.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use super::{Catalog, CatalogError, Piece, ROW_LEN, Stamp, read_row, row_of};
use crate::index::Stored;
use crate::mem::trim_heap;

/// Tree with the rows of each segment, in pieces.
const ROWS: &str = "rows";
/// Key of the stamp, in the default tree.
const STAMP: &str = "stamp";
/// Memory that sled may use for pages. Unit: bytes.
const CACHE: u64 = 8 << 20;
/// File of sled's log in its folder.
const LOG: &str = "db";

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
    rows: sled::Tree,
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
                let rows = db.open_tree(ROWS)?;
                Ok(Open { db, rows })
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

impl SledCatalog {
    /// Lets sled go: it holds memory and threads for as long as it is open.
    fn drop_open(&mut self) -> Result<(), CatalogError> {
        let open = self.open.take();
        // Dropping a broken sled may panic as well.
        let dropped = guard(|| {
            drop(open);
            Ok(())
        });
        // Else most of it would stay with this process, more than half of what the index takes.
        trim_heap();
        dropped
    }

    /// Has the kernel read ahead what sled will read page by page.
    fn read_ahead(&self) {
        if let Ok(log) = std::fs::File::open(self.folder.join(LOG)) {
            // A wish: without it the opening takes longer.
            let _ = rustix::fs::fadvise(&log, 0, None, rustix::fs::Advice::WillNeed);
        }
    }
}

/// Name of a piece: sorted by segment, then by number.
fn name_of(segment: u32, number: u32) -> [u8; 8] {
    (u64::from(segment) << 32 | u64::from(number)).to_be_bytes()
}

/// Gives the rows of a piece to `each`. False when it is none.
fn read_piece(name: &[u8], rows: &[u8], each: &mut dyn FnMut(&Stored)) -> bool {
    let segment = name.first_chunk().map(|number| u32::from_be_bytes(*number));
    let (rows, rest) = rows.as_chunks::<ROW_LEN>();
    let whole = name.len() == 8 && rest.is_empty();
    whole
        && rows.iter().all(|row| match read_row(row) {
            Some(stored) if segment == Some(stored.place.segment) => {
                each(&stored);
                true
            }
            _ => false,
        })
}

impl Drop for SledCatalog {
    fn drop(&mut self) {
        if self.open.is_some() {
            // What a broken sled says at its end is of no use.
            let _ = self.drop_open();
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
        self.read_ahead();
        let open = self.db()?;
        let found = guard(|| open.db.get(STAMP))?;
        if found.as_deref() != Some(stamp.to_bytes().as_slice()) {
            return Err(unsound("its stamp is not the one of the last clean close"));
        }
        let mut sound = true;
        guard(|| {
            for piece in open.rows.iter() {
                let (name, rows) = piece?;
                sound &= read_piece(&name, &rows, each);
            }
            Ok(())
        })?;
        self.drop_open()?;
        if sound {
            Ok(())
        } else {
            Err(unsound("a row has the wrong form"))
        }
    }

    fn reset(&mut self) -> Result<(), CatalogError> {
        // What a broken sled says at its end is of no use.
        let _ = self.drop_open();
        if self.folder.exists() {
            let aside = Self::aside(&self.folder);
            match std::fs::symlink_metadata(&aside) {
                Ok(found) if found.is_dir() => std::fs::remove_dir_all(&aside)?,
                Ok(_) => std::fs::remove_file(&aside)?,
                Err(_) => {}
            }
            std::fs::rename(&self.folder, &aside)?;
        }
        Ok(())
    }

    fn put(&mut self, piece: &Piece<'_>) -> Result<(), CatalogError> {
        let open = self.db()?;
        guard(|| {
            let next = if piece.rows.is_empty() {
                piece.number
            } else {
                let mut rows = Vec::with_capacity(piece.rows.len() * ROW_LEN);
                for row in piece.rows {
                    rows.extend_from_slice(&row_of(row));
                }
                open.rows
                    .insert(name_of(piece.segment, piece.number), rows)?;
                piece.number + 1
            };
            if piece.last {
                let behind = name_of(piece.segment, next)..=name_of(piece.segment, u32::MAX);
                for name in open.rows.range(behind).keys() {
                    open.rows.remove(name?)?;
                }
            }
            Ok(())
        })
    }

    fn close(&mut self, stamp: &Stamp) -> Result<(), CatalogError> {
        let open = self.db()?;
        guard(|| {
            open.db.insert(STAMP, stamp.to_bytes().as_slice())?;
            open.rows.flush()?;
            open.db.flush()?;
            Ok(())
        })?;
        self.drop_open()
    }
}
