//! What an operation moves when it ends, and what goes wrong with it.
//!
//! Upstairs:   `disk::sim`, when an operation has its turn.
//! Downstairs: `sim::content`.

use std::io::{Error, ErrorKind};
use std::sync::Arc;
use std::time::Duration;

use super::content::{Fate, Loose, fill_runs, flip, loose_of, overlay, survive, tear};
use super::{Fault, Flying, SimDisk};
use crate::disk::{Done, Op, OpKind};
use crate::format::index;

/// Time that an operation takes, and time that its bytes take.
const OP_TIME: Duration = Duration::from_micros(50);
const BYTES_PER_MICROSECOND: u64 = 2000;

impl SimDisk {
    pub(super) fn finish(&mut self, flying: Flying) -> Done {
        let Flying {
            mut op,
            file,
            refused,
            covers,
            not_before,
            ..
        } = flying;
        let bytes = Duration::from_micros(op.total() as u64 / BYTES_PER_MICROSECOND);
        self.now = not_before.max(self.now + OP_TIME + bytes);
        let moved = if let Some(problem) = refused {
            Err(problem)
        } else if self.crashed {
            self.was_on_its_way(&op, file);
            Err(Error::other("the power is gone"))
        } else if self.fault(Fault::Interrupted) {
            Err(Error::from(ErrorKind::Interrupted))
        } else {
            match op.kind {
                OpKind::Read => self.read(&mut op, file),
                OpKind::Write => self.write(&op, file),
                OpKind::Sync => self.sync(file, covers),
            }
        };
        op.done(moved)
    }

    /// The power went while the device had it: a write may be there, whoever hears of it.
    fn was_on_its_way(&mut self, op: &Op, file: u32) {
        let write = loose_of(op).map(|write| (file, write));
        self.met_by_the_cut.extend(write);
    }

    /// Length that an operation moves: all of it, or less when the short fault fires.
    fn moved_len(&mut self, len: usize) -> usize {
        let blocks = (len / self.options.align) as u64;
        if blocks > 1 && self.fault(Fault::Short) {
            index(1 + self.random.below(blocks - 1)) * self.options.align
        } else {
            len
        }
    }

    fn read(&mut self, op: &mut Op, file: u32) -> std::io::Result<usize> {
        if self.fault(Fault::ReadError) {
            return Err(Error::from_raw_os_error(5));
        }
        let reach = op.at..op.at.saturating_add(op.total() as u64);
        if (self.unreadable).is_some_and(|(bad, at)| bad == file && reach.contains(&at)) {
            return Err(Error::from_raw_os_error(5));
        }
        let len = self.moved_len(op.total());
        let (name, mut file, mut at) = (file, file, op.at);
        if self.fault(Fault::MisdirectedRead) {
            (file, at) = self.elsewhere(file, op.at, len);
        }
        let stale = self.fault(Fault::StaleRead);
        let file = self
            .files
            .get(&file)
            .ok_or(Error::from(ErrorKind::NotFound))?;
        let from = index(at).min(file.now.len());
        let to = (from + len).min(file.now.len());
        let mut bytes = file.now.get(from..to).unwrap_or_default().to_vec();
        if let Some(before) = file.before.as_ref().filter(|_| stale) {
            overlay(&mut bytes, at, before);
        }
        if !bytes.is_empty() && self.fault(Fault::FlipOnRead) {
            flip(&mut bytes, &mut self.random);
        }
        self.misread_byte(name, op.at, &mut bytes);
        fill_runs(op, &bytes).ok_or(Error::from(ErrorKind::InvalidInput))?;
        Ok(bytes.len())
    }

    /// What a test asked for with [`SimDisk::misread`].
    fn misread_byte(&mut self, read: u32, from: u64, bytes: &mut [u8]) {
        if let Some((file, at, times)) = &mut self.misread
            && *file == read
            && *times > 0
            && let Some(byte) = at.checked_sub(from).and_then(|at| bytes.get_mut(index(at)))
        {
            // Another bit each time.
            *byte ^= 1 << (*times % 8);
            *times -= 1;
        }
    }

    fn write(&mut self, op: &Op, file: u32) -> std::io::Result<usize> {
        if self.fault(Fault::WriteError) {
            return Err(Error::from_raw_os_error(5));
        }
        if self.fault(Fault::WriteNoSpace) {
            return Err(Error::from_raw_os_error(28));
        }
        let len = self.moved_len(op.total());
        let mut file = file;
        let mut write = loose_of(op).ok_or(Error::from(ErrorKind::InvalidInput))?;
        write.data.truncate(len);
        if self.fault(Fault::LostWrite) {
            return Ok(len);
        }
        if self.fault(Fault::MisdirectedWrite) {
            (file, write.at) = self.elsewhere(file, op.at, len);
        }
        if self.fault(Fault::FlipOnWrite) {
            flip(&mut write.data, &mut self.random);
        }
        let torn = match (self.fault(Fault::TornSectors), self.fault(Fault::TornPages)) {
            (true, _) => Some(512),
            (false, true) => Some(4096),
            (false, false) => None,
        };
        let mut random = self.random.clone();
        let file = self
            .files
            .get_mut(&file)
            .ok_or(Error::from(ErrorKind::NotFound))?;
        let from = index(write.at);
        let room = file
            .now
            .get(from..from + len)
            .ok_or(Error::from_raw_os_error(27))?;
        file.before = Some(Loose {
            at: write.at,
            data: room.to_vec(),
        });
        if let Some(sector) = torn {
            let mut bytes = file.now.to_vec();
            tear(&mut bytes, &write, sector, &mut random);
            write.data = bytes.get(from..from + len).unwrap_or_default().to_vec();
        }
        overlay(Arc::make_mut(&mut file.now).as_mut_slice(), 0, &write);
        file.loose.push(write);
        self.random.draw();
        Ok(len)
    }

    /// A failed sync drops what it covered: each write may or may not be on the device, and the
    /// next sync will not tell (Rebello et al. 2020).
    fn sync(&mut self, file: u32, covers: usize) -> std::io::Result<usize> {
        let due = self.good_syncs == Some(0);
        self.good_syncs = self.good_syncs.and_then(|good| good.checked_sub(1));
        let fails = self.fault(Fault::SyncError) || due;
        let mut random = self.random.clone();
        self.random.draw();
        let file = self
            .files
            .get_mut(&file)
            .ok_or(Error::from(ErrorKind::NotFound))?;
        let covered = file
            .loose
            .drain(..covers.min(file.loose.len()))
            .collect::<Vec<_>>();
        for write in covered {
            let fate = if fails {
                Fate::some(&mut random)
            } else {
                Fate::Whole
            };
            survive(&mut file.durable, &write, fate);
        }
        if fails {
            Err(Error::from_raw_os_error(5))
        } else {
            Ok(0)
        }
    }

    /// Another aligned place of this file, or of any other that is long enough.
    fn elsewhere(&mut self, file: u32, at: u64, len: usize) -> (u32, u64) {
        let len = len as u64;
        let sizes = self.files.iter();
        let fit: Vec<(u32, u64)> = sizes
            .map(|(number, file)| (*number, file.now.len() as u64))
            .filter(|(_, size)| *size >= len)
            .collect();
        let chosen = fit.get(index(self.random.below(fit.len() as u64)));
        let Some((other, size)) = chosen.copied() else {
            return (file, at);
        };
        let place = self.random.below((size - len) / 4096 + 1) * 4096;
        if (other, place) == (file, at) {
            (other, place.saturating_sub(4096))
        } else {
            (other, place)
        }
    }
}
