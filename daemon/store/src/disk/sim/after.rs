//! What is found afterwards: after a power cut, a restart, or the death of the writer alone.
//!
//! Upstairs:   the tests that end a store and open the next one.
//! Downstairs: `sim::content`.

use super::content::{File, loose_of, overlay, survive};
use super::{Faults, Flying, Seeded, SimDisk, SimOptions};

impl SimDisk {
    /// The disk as it is found after a power cut: durable bytes and a seeded subset of the writes
    /// that no sync covered, finished or not, some of them torn. No faults, no crash to come.
    pub fn crash(&self, seed: u64) -> SimDisk {
        let mut random = Seeded::new(seed);
        let options = SimOptions {
            seed,
            faults: Faults::default(),
            crash_at: None,
            ..self.options
        };
        let mut after = SimDisk::new(options);
        for (number, file) in &self.files {
            let mut bytes = file.durable.clone();
            let in_flight = self
                .flying
                .iter()
                .filter_map(|flying| loose_of(&flying.op, *number));
            for write in file.loose.iter().cloned().chain(in_flight) {
                survive(&mut bytes, &write, &mut random);
            }
            let (now, name) = (bytes.clone(), file.name.clone());
            after.files.insert(
                *number,
                File {
                    name,
                    now,
                    durable: bytes,
                    ..File::default()
                },
            );
        }
        after.next_file = self.next_file;
        after
    }

    /// The disk after an orderly power-off: everything written is there.
    pub fn restart(&self, seed: u64) -> SimDisk {
        let faults = Faults::default();
        self.clone_with(SimOptions {
            seed,
            faults,
            crash_at: None,
            ..self.options
        })
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
            (kept.durable, kept.loose) = (file.durable.clone(), file.loose.clone());
            let in_flight = |flying: &Flying| loose_of(&flying.op, *number);
            for write in self.flying.iter().filter_map(in_flight) {
                if random.below(2) == 0 {
                    overlay(&mut kept.now, 0, &write);
                    kept.loose.push(write);
                }
            }
        }
        after
    }

    /// Another disk with the same content, everything durable, that behaves as `options` say.
    pub fn clone_with(&self, options: SimOptions) -> SimDisk {
        let mut after = SimDisk::new(options);
        for (number, file) in &self.files {
            let (now, durable, name) = (file.now.clone(), file.now.clone(), file.name.clone());
            after.files.insert(
                *number,
                File {
                    name,
                    now,
                    durable,
                    ..File::default()
                },
            );
        }
        after.next_file = self.next_file;
        after
    }
}
