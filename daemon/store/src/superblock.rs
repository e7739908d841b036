//! Keeps the superblock on the device: two slots, both written, both read back.
//!
//! Upstairs:   `recover` loads it and bumps the incarnation; `store::wipe` and `close` change it;
//!             `verify` looks.
//! Downstairs: `format::superblock`, `lane`.
//!
//! Invariants kept here
//!   W1  A change counts only when both slots hold it and have been read back from the device:
//!       a torn write, a lost write or later damage to one slot never brings back an older wipe
//!       table.
//!
//! Not here on purpose: no guess. When no slot is sound the store starts over under a new
//! identity, and every record of the old one is stale.

use std::io::Error;
use std::sync::Arc;

use crate::disk::{Disk, FileId};
use crate::format::superblock::{SLOT_LEN, SLOTS, SUPERBLOCK_NAME};
use crate::format::{Superblock, VERSION, index};
use crate::lane::{Lane, Transfer};
use crate::mem::{Arena, IoBuf};

/// Times that a change is tried before it fails.
const TRIES: u32 = 3;

/// Why a change is not durable.
#[derive(Debug)]
pub(crate) struct NotWritten {
    pub(crate) problem: Error,
    /// A sync failed: nothing that is written now can be trusted to be there (L3).
    pub(crate) sync_failed: bool,
}

impl From<Error> for NotWritten {
    fn from(problem: Error) -> Self {
        Self {
            problem,
            sync_failed: false,
        }
    }
}

/// The file and what it holds.
#[derive(Debug)]
pub(crate) struct SuperFile {
    file: FileId,
    arena: Arc<Arena>,
    now: Superblock,
    /// What both slots were last seen to hold.
    durable: Option<Superblock>,
}

/// What was found at the opening.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) file: FileId,
    /// The sound slot with the highest revision.
    pub(crate) found: Option<Superblock>,
    /// Slots that could not be used.
    pub(crate) bad_slots: u32,
}

/// Why there is no superblock to go by. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    #[error(transparent)]
    Io(#[from] Error),
    /// A sound slot is of a version that this program does not know.
    #[error("format version {0}")]
    Newer(u16),
    /// A slot is sound, but the file has another length than it was made with.
    #[error("a file of {0} bytes")]
    Length(u64),
}

/// Finds the file, or makes an empty one, and reads both slots.
///
/// A device that does not deliver any slot is an error: forgetting the whole store for what may
/// pass would be a guess. So is a slot of a later version: it is somebody's store.
pub(crate) fn load<D: Disk>(lane: &mut Lane<D>, arena: &Arc<Arena>) -> Result<Loaded, LoadError> {
    let len = SLOTS * SLOT_LEN;
    let files = lane.disk().list()?;
    match files.iter().find(|file| file.name == SUPERBLOCK_NAME) {
        None => {
            let file = lane.disk().create(SUPERBLOCK_NAME, len)?;
            Ok(Loaded {
                file,
                found: None,
                bad_slots: 0,
            })
        }
        Some(file) if file.len != len => {
            let old = lane.disk().open(SUPERBLOCK_NAME)?;
            for slot in 0..slots_in(file.len) {
                let found = read_slot(lane, arena, old, slot)?;
                refuse_newer(&found)?;
                if Superblock::decode(&found).is_some() {
                    return Err(LoadError::Length(file.len));
                }
            }
            lane.disk().remove(old)?;
            let file = lane.disk().create(SUPERBLOCK_NAME, len)?;
            Ok(Loaded {
                file,
                found: None,
                bad_slots: 2,
            })
        }
        Some(_) => {
            let file = lane.disk().open(SUPERBLOCK_NAME)?;
            read_slots(lane, arena, file, SLOTS)
        }
    }
}

/// Slots that a file of `len` bytes holds.
fn slots_in(len: u64) -> u64 {
    (len / SLOT_LEN).min(SLOTS)
}

fn refuse_newer(slot: &[u8]) -> Result<(), LoadError> {
    match Superblock::version_of(slot) {
        Some(version) if version > VERSION => Err(LoadError::Newer(version)),
        _ => Ok(()),
    }
}

/// What somebody sees who changes nothing.
#[derive(Debug)]
pub(crate) struct Looked {
    /// The sound slot that counts.
    pub(crate) found: Option<Superblock>,
    /// Slots that are not sound.
    pub(crate) bad_slots: u32,
    /// Length of the file when it is another than it was made with; 0 when there is none.
    pub(crate) misfit: Option<u64>,
}

/// Reads the slots and changes nothing.
pub(crate) fn look<D: Disk>(
    lane: &mut Lane<D>,
    arena: &Arc<Arena>,
    files: &[crate::disk::Found],
) -> Result<Looked, LoadError> {
    let here = files.iter().find(|file| file.name == SUPERBLOCK_NAME);
    let len = here.map_or(0, |file| file.len);
    let misfit = Some(len).filter(|len| *len != SLOTS * SLOT_LEN);
    if slots_in(len) == 0 {
        return Ok(Looked {
            found: None,
            bad_slots: 2,
            misfit,
        });
    }
    let file = lane.disk().open(SUPERBLOCK_NAME)?;
    let Loaded {
        found, bad_slots, ..
    } = read_slots(lane, arena, file, slots_in(len))?;
    let cut_off = u32::from(slots_in(len) < SLOTS);
    Ok(Looked {
        found,
        bad_slots: bad_slots + cut_off,
        misfit,
    })
}

fn read_slots<D: Disk>(
    lane: &mut Lane<D>,
    arena: &Arc<Arena>,
    file: FileId,
    slots: u64,
) -> Result<Loaded, LoadError> {
    let mut best: Option<Superblock> = None;
    let (mut bad_slots, mut refused) = (0, None);
    for slot in 0..slots {
        let mut sound = None;
        for _ in 0..TRIES {
            match read_slot(lane, arena, file, slot) {
                Ok(found) => {
                    refuse_newer(&found)?;
                    sound = Superblock::decode(&found);
                }
                Err(problem) => refused = Some(problem),
            }
            if sound.is_some() {
                break;
            }
        }
        bad_slots += u32::from(sound.is_none());
        let newer = match (&best, &sound) {
            (Some(best), Some(sound)) => sound.revision > best.revision,
            (None, Some(_)) => true,
            (_, None) => false,
        };
        if newer {
            best = sound;
        }
    }
    match (best, refused) {
        (None, Some(problem)) => Err(problem.into()),
        (found, _) => Ok(Loaded {
            file,
            found,
            bad_slots,
        }),
    }
}

fn read_slot<D: Disk>(
    lane: &mut Lane<D>,
    arena: &Arc<Arena>,
    file: FileId,
    slot: u64,
) -> Result<IoBuf, Error> {
    let buf = arena.alloc_or_own(index(SLOT_LEN))?;
    let (buf, result) = lane.run(Transfer::read(file, slot * SLOT_LEN, buf, index(SLOT_LEN)));
    result?;
    buf.ok_or_else(|| Error::other("the disk kept a buffer"))
}

impl SuperFile {
    pub(crate) fn new(file: FileId, arena: Arc<Arena>, now: Superblock) -> Self {
        Self {
            file,
            arena,
            now,
            durable: None,
        }
    }

    /// What counts now.
    pub(crate) fn now(&self) -> &Superblock {
        &self.now
    }

    /// Changes what counts in this process; [`SuperFile::write`] makes it durable.
    pub(crate) fn change(&mut self, change: impl FnOnce(&mut Superblock)) {
        change(&mut self.now);
    }

    /// Makes the present content durable in both slots, unless it is. A failed write is tried
    /// again, a failed sync is not.
    pub(crate) fn write<D: Disk>(&mut self, lane: &mut Lane<D>) -> Result<(), NotWritten> {
        let mut result = Ok(());
        if self.durable.as_ref() == Some(&self.now) {
            return result;
        }
        self.durable = None;
        for _ in 0..TRIES {
            self.now.revision += 1;
            result = (0..SLOTS).try_for_each(|slot| self.write_slot(lane, slot));
            match &result {
                Err(failed) if !failed.sync_failed => {}
                _ => break,
            }
        }
        self.durable = result.is_ok().then(|| self.now.clone());
        result
    }

    fn write_slot<D: Disk>(&self, lane: &mut Lane<D>, slot: u64) -> Result<(), NotWritten> {
        let mut buf = self.arena.alloc_or_own(index(SLOT_LEN))?;
        self.now.encode(&mut buf);
        let (at, len) = (slot * SLOT_LEN, index(SLOT_LEN));
        let (_, result) = lane.run(Transfer::write(self.file, at, buf, len));
        result?;
        let (_, result) = lane.run(Transfer::sync(self.file));
        result.map_err(|problem| NotWritten {
            problem,
            sync_failed: true,
        })?;
        let found = read_slot(lane, &self.arena, self.file, slot)?;
        if Superblock::decode(&found).as_ref() == Some(&self.now) {
            Ok(())
        } else {
            let problem = format!("slot {slot} of the superblock reads back differently");
            Err(Error::other(problem).into())
        }
    }
}

#[cfg(test)]
mod tests;
