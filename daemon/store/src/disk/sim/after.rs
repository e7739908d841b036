//! What is found afterwards: after a power cut, a restart, or the death of the writer alone.
//!
//! Upstairs:   the tests that end a store and open the next one.
//! Downstairs: `sim::content`.

use std::sync::Arc;

use super::content::{Fate, File, Loose, loose_of, overlay, survive};
use super::{Faults, Flying, Seeded, SimDisk, SimOptions};

impl SimDisk {
    /// Writes that no sync covered, finished or not: a power cut decides about each.
    pub fn unsynced(&self) -> usize {
        let loose = |(number, file): (&u32, &File)| {
            file.loose.len() + self.writes_in_flight(*number).count()
        };
        self.files.iter().map(loose).sum()
    }

    fn writes_in_flight(&self, number: u32) -> impl Iterator<Item = Loose> {
        let of = move |flying: &&Flying| flying.file == number && flying.refused.is_none();
        let flying = self.flying.iter().filter(of);
        let reaped = self.met_by_the_cut.iter();
        let reaped = reaped.filter(move |(file, _)| *file == number);
        let reaped = reaped.map(|(_, write)| write.clone());
        reaped.chain(flying.filter_map(|flying| loose_of(&flying.op)))
    }

    /// The disk as it is found after a power cut: durable bytes and a seeded subset of the writes
    /// that no sync covered, finished or not, some of them torn. No faults, no crash to come.
    pub fn crash(&self, seed: u64) -> SimDisk {
        let mut random = Seeded::new(seed);
        self.crash_with(seed, |_| Fate::some(&mut random))
    }

    /// As `crash`, with the fate of each of the [`SimDisk::unsynced`] writes chosen by `fate`.
    pub fn crash_with(&self, seed: u64, mut fate: impl FnMut(usize) -> Fate) -> SimDisk {
        let mut after = self.honest(seed);
        let mut write_number = 0;
        for (number, file) in &self.files {
            let mut bytes = Arc::clone(&file.durable);
            let in_flight = self.writes_in_flight(*number);
            for write in file.loose.iter().cloned().chain(in_flight) {
                survive(&mut bytes, &write, fate(write_number));
                write_number += 1;
            }
            after.files.insert(*number, whole(&file.name, bytes));
        }
        after
    }

    /// The disk after an orderly power-off: everything written is there.
    pub fn restart(&self, seed: u64) -> SimDisk {
        let mut after = self.honest(seed);
        after.take_files(self);
        after
    }

    /// The disk after the writer was killed: what it wrote is there, but no sync covered the last
    /// of it, and each operation in flight was done or not. A power cut may still take all that.
    pub fn killed(&self, seed: u64) -> SimDisk {
        let mut after = self.restart(seed);
        let mut random = Seeded::new(seed);
        for (number, file) in &self.files {
            let Some(kept) = after.files.get_mut(number) else {
                continue;
            };
            (kept.durable, kept.loose) = (Arc::clone(&file.durable), file.loose.clone());
            for write in self.writes_in_flight(*number) {
                if random.below(2) == 0 {
                    overlay(Arc::make_mut(&mut kept.now).as_mut_slice(), 0, &write);
                    kept.loose.push(write);
                }
            }
        }
        after
    }

    /// Another disk with the same content, everything durable, that behaves as `options` say.
    pub fn clone_with(&self, options: SimOptions) -> SimDisk {
        let mut after = SimDisk::new(options);
        after.take_files(self);
        after
    }

    /// A disk of the same shape without files, faults and a crash to come.
    fn honest(&self, seed: u64) -> SimDisk {
        let mut after = SimDisk::new(SimOptions {
            seed,
            faults: Faults::default(),
            crash_at: None,
            ..self.options
        });
        after.next_file = self.next_file;
        after
    }

    fn take_files(&mut self, other: &SimDisk) {
        for (number, file) in &other.files {
            let now = Arc::clone(&file.now);
            self.files.insert(*number, whole(&file.name, now));
        }
        self.next_file = other.next_file;
    }
}

/// A file with all of its bytes durable.
fn whole(name: &str, bytes: Arc<Vec<u8>>) -> File {
    File {
        name: name.to_owned(),
        now: Arc::clone(&bytes),
        durable: bytes,
        ..File::default()
    }
}
