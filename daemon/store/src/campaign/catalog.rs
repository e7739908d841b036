//! A catalog in memory that loses what a real one may lose, and a shelf that outlives the store.
//!
//! Upstairs:   the runs: every store of the campaign has one.
//! Downstairs: the `Catalog` trait.
//!
//! The store may trust a catalog after an end in order and at no other time; whatever else comes
//! back from the shelf must cost a rebuild and nothing more.

use std::sync::{Mutex, MutexGuard};

use strum::{EnumIter, IntoEnumIterator as _, IntoStaticStr};

use super::*;
use crate::catalog::{Piece, Stamp};
use crate::disk::sim::Seeded;

/// States that are remembered: so much of the end may be lost.
const HISTORY: usize = 24;

/// What happens to a catalog between two lives of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, EnumIter, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(crate) enum Spoil {
    /// Nothing.
    Intact,
    /// The last changes are not there.
    LostEnd,
    /// It is the one of an earlier end.
    Older,
    /// Its folder is there and empty.
    Empty,
    /// Its folder is gone.
    Missing,
    /// Its library cannot open it.
    Unreadable,
    /// Some rows are gone, and its stamp says that all is well.
    DroppedRows,
    /// A row leads elsewhere, and its stamp says that all is well.
    ChangedRow,
    /// A row is there that was taken out, and its stamp says that all is well.
    OldRow,
}

/// What the catalog's folder holds.
#[derive(Debug, Clone, Default)]
struct Folder {
    exists: bool,
    unreadable: bool,
    stamp: Option<Stamp>,
    /// By segment and piece.
    pieces: BTreeMap<(u32, u32), Vec<Stored>>,
}

#[derive(Debug, Clone, Default)]
struct Inner {
    now: Folder,
    /// Earlier states, oldest first.
    before: Vec<Folder>,
    /// States at ends in order, oldest first.
    ends: Vec<Folder>,
    /// Somebody took the folder away under an open catalog: what is written goes nowhere.
    deleted: bool,
    /// Every call fails from now on.
    failing: bool,
}

/// Where catalogs lie while no store is open.
#[derive(Debug, Default)]
pub(crate) struct Shelf(Arc<Mutex<Inner>>);

impl Shelf {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    /// The catalog, for a store to open.
    pub(crate) fn catalog(&self) -> Option<Box<dyn Catalog>> {
        let mut inner = self.inner();
        (inner.deleted, inner.failing) = (false, false);
        Some(Box::new(ShelfCatalog(Arc::clone(&self.0))))
    }

    /// Another shelf with the same content.
    pub(crate) fn copy(&self) -> Self {
        Self(Arc::new(Mutex::new(self.inner().clone())))
    }

    /// Takes the folder away, whoever uses it.
    pub(crate) fn delete(&self) {
        let mut inner = self.inner();
        inner.now = Folder::default();
        inner.deleted = true;
    }

    /// Lets every call of the open catalog fail.
    pub(crate) fn fail(&self) {
        self.inner().failing = true;
    }

    /// Something by chance.
    pub(crate) fn spoil_somehow(&self, random: &mut Seeded) -> Spoil {
        let all: Vec<Spoil> = Spoil::iter().collect();
        let spoil = all[random.below(all.len() as u64) as usize];
        self.spoil(spoil, random);
        spoil
    }

    fn spoil(&self, spoil: Spoil, random: &mut Seeded) {
        let inner = &mut *self.inner();
        let some = |random: &mut Seeded, from: &[Folder]| {
            let at = random.below(from.len() as u64) as usize;
            from.get(at).cloned().unwrap_or_default()
        };
        match spoil {
            Spoil::Intact => {}
            Spoil::LostEnd => inner.now = some(random, &inner.before),
            Spoil::Older => inner.now = some(random, &inner.ends),
            Spoil::Empty => {
                inner.now = Folder {
                    exists: true,
                    ..Folder::default()
                };
            }
            Spoil::Missing => inner.now = Folder::default(),
            Spoil::Unreadable => inner.now.unreadable = true,
            Spoil::DroppedRows => {
                for rows in inner.now.pieces.values_mut() {
                    rows.retain(|_| random.below(4) > 0);
                }
            }
            Spoil::ChangedRow => {
                if let Some(row) = inner.now.pieces.values_mut().flatten().next() {
                    row.place.offset += 4096 * (1 + random.below(8));
                }
            }
            Spoil::OldRow => {
                let old = inner.before.iter().rev().flat_map(|folder| &folder.pieces);
                let old = old.flat_map(|(name, rows)| rows.iter().map(|row| (*name, *row)));
                let gone = |(_, row): &(_, Stored)| {
                    let mut here = inner.now.pieces.values().flatten();
                    here.all(|here| here.place != row.place)
                };
                if let Some((name, row)) = old.into_iter().find(gone) {
                    inner.now.pieces.entry(name).or_default().push(row);
                }
            }
        }
    }
}

#[derive(Debug)]
struct ShelfCatalog(Arc<Mutex<Inner>>);

impl ShelfCatalog {
    fn change(&self, change: impl FnOnce(&mut Folder)) -> Result<(), CatalogError> {
        let inner = &mut *self.0.lock().unwrap();
        if inner.failing {
            let what = "told to fail".to_owned();
            return Err(CatalogError::Library { what });
        }
        if inner.deleted {
            return Ok(());
        }
        inner.before.push(inner.now.clone());
        if inner.before.len() > HISTORY {
            inner.before.remove(0);
        }
        change(&mut inner.now);
        Ok(())
    }
}

impl Catalog for ShelfCatalog {
    fn load(&mut self, stamp: &Stamp, each: &mut dyn FnMut(&Stored)) -> Result<(), CatalogError> {
        let inner = self.0.lock().unwrap();
        let folder = &inner.now;
        let what = |what: &str| what.to_owned();
        if !folder.exists {
            return Err(CatalogError::Missing);
        }
        if folder.unreadable {
            let what = what("unreadable");
            return Err(CatalogError::Library { what });
        }
        if folder.stamp != Some(*stamp) {
            let what = what("another stamp");
            return Err(CatalogError::Unsound { what });
        }
        for row in folder.pieces.values().flatten() {
            let mut row = *row;
            (row.pinned, row.place.epoch) = (false, 0);
            each(&row);
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), CatalogError> {
        self.change(|folder| {
            *folder = Folder {
                exists: true,
                ..Folder::default()
            };
        })
    }

    fn put(&mut self, piece: &Piece<'_>) -> Result<(), CatalogError> {
        let Piece {
            segment, number, ..
        } = *piece;
        self.change(|folder| {
            folder.pieces.remove(&(segment, number));
            if !piece.rows.is_empty() {
                folder.pieces.insert((segment, number), piece.rows.to_vec());
            }
            if piece.last {
                let behind = |name: &(u32, u32)| name.0 == segment && name.1 > number;
                folder.pieces.retain(|name, _| !behind(name));
            }
        })
    }

    fn close(&mut self, stamp: &Stamp) -> Result<(), CatalogError> {
        self.change(|folder| folder.stamp = Some(*stamp))?;
        let inner = &mut *self.0.lock().unwrap();
        inner.ends.push(inner.now.clone());
        Ok(())
    }
}
