//! What a restore saw of its devices.
//!
//! Upstairs:   `run`.
//! Downstairs: `rates`.

use std::collections::HashMap;
use std::time::Duration;

use kvtier_proto::{Level, Miss};

use crate::metrics::Device;
use crate::restore::rates::Rates;
use crate::tier::Located;

/// Blocks and bytes by where they came from, and when the last of them did.
#[derive(Debug, Default)]
pub(super) struct Seen {
    from: Vec<Option<(Device, Level)>>,
    sums: HashMap<(Device, Level), (u64, u64, Duration)>,
}

impl Seen {
    /// Blocks that were found like this.
    pub(super) fn new(found: &[Result<Located, Miss>]) -> Self {
        let from = |place: &Result<Located, Miss>| match place {
            Ok(Located::Disk(device, _, level)) => Some((*device, *level)),
            Ok(Located::Host) | Err(_) => None,
        };
        Self {
            from: found.iter().map(from).collect(),
            sums: HashMap::new(),
        }
    }

    /// A block of so many raw bytes came so long after the first load began.
    pub(super) fn landed(&mut self, index: usize, bytes: usize, after: Duration) {
        let Some(from) = self.from.get(index).copied().flatten() else {
            return;
        };
        let (blocks, sum, last) = self.sums.entry(from).or_default();
        *blocks += 1;
        *sum = sum.saturating_add(bytes as u64);
        *last = after.max(*last);
    }

    /// Tells what it came to.
    pub(super) fn tell(&self, rates: &Rates) {
        for (from, (blocks, bytes, took)) in &self.sums {
            rates.saw(*from, *blocks, *bytes, *took);
        }
    }
}

#[cfg(test)]
mod tests {
    use kvtier_store::DeviceState;

    use super::*;

    #[test]
    fn tell_makes_a_rate_of_what_came_until_the_last_block_of_each_device_and_level() {
        let on = |level| Ok(Located::Disk(Device::FIRST, DeviceState::Healthy, level));
        let found = [
            on(Level::RAW),
            Ok(Located::Host),
            on(Level::LOSSLESS),
            on(Level::RAW),
            Err(Miss::Absent),
        ];
        let mut seen = Seen::new(&found);
        let ms = Duration::from_millis;
        for (index, after) in [(0, 100), (1, 500), (2, 200), (3, 400), (9, 900)] {
            seen.landed(index, 1000, ms(after));
        }
        let rates = Rates::default();
        seen.tell(&rates);
        let rate = |level| rates.of((Device::FIRST, level)).unwrap().bytes_s;
        assert_eq!((rate(Level::RAW), rate(Level::LOSSLESS)), (5000.0, 5000.0));
        assert_eq!(rates.all().len(), 2);
    }
}
