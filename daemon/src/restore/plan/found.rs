//! What a restore does with what was found: which blocks to bring, in which order. A pure function.
//!
//! Upstairs:   `restore::run` executes it.
//! Downstairs: nothing: no I/O, no clock, no hidden state.
//!
//! Loading is planned front to back: a reader that can only take a loaded prefix gains from
//! every block that touches the prefix, and from no other. Each block comes with the device that
//! has it and how that does: nothing is asked of one that has failed.
//!
//! Not here on purpose: recomputing, quality levels and the speed of devices. Those are the rest of
//! `plan`, for readers that can do more than take a loaded prefix.

use kvtier_proto::Miss;
use kvtier_store::DeviceState;

use crate::tier::Located;

/// What is to happen to the blocks of one restore.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Already in host memory: leased at once. Indices into the request.
    pub resident: Vec<usize>,
    /// To be loaded, in this order. Indices into the request.
    pub load: Vec<usize>,
    /// Not restored, with the reason. Indices into the request.
    pub missed: Vec<(usize, Miss)>,
}

/// Plans a restore of blocks that were found like this. Without `scattered` nothing after the
/// first miss is brought: the reader could not use it.
pub fn plan(found: &[Result<Located, Miss>], scattered: bool) -> Plan {
    let mut plan = Plan::default();
    for (index, place) in found.iter().enumerate() {
        let miss = match place {
            Ok(Located::Host) => {
                plan.resident.push(index);
                continue;
            }
            Ok(Located::Disk(_, DeviceState::Failed, _)) => Miss::Device,
            Ok(Located::Disk(..)) => {
                plan.load.push(index);
                continue;
            }
            Err(miss) => *miss,
        };
        plan.missed.push((index, miss));
        if !scattered {
            break;
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    use crate::metrics::Device;
    use kvtier_proto::Level;

    fn place() -> impl Strategy<Value = Result<Located, Miss>> {
        let on = |state| Just(Ok(Located::Disk(Device::FIRST, state, Level::RAW)));
        prop_oneof![
            4 => Just(Ok(Located::Host)),
            2 => on(DeviceState::Healthy),
            1 => on(DeviceState::Slow),
            1 => on(DeviceState::ReadOnly),
            1 => on(DeviceState::Failed),
            1 => Just(Err(Miss::Absent)),
        ]
    }

    fn is_miss(place: &Result<Located, Miss>) -> bool {
        let failed =
            |at: Located| at == Located::Disk(Device::FIRST, DeviceState::Failed, Level::RAW);
        place.map_or(true, failed)
    }

    proptest! {
        #[test]
        fn plan_names_every_block_up_to_the_first_miss_exactly_once(
            found in proptest::collection::vec(place(), 0..40), scattered in any::<bool>(),
        ) {
            let plan = plan(&found, scattered);
            let first_miss = found.iter().position(is_miss);
            let end = match first_miss {
                Some(miss) if !scattered => miss + 1,
                _ => found.len(),
            };
            let mut named: Vec<usize> = plan.resident.iter().chain(&plan.load).copied().collect();
            named.extend(plan.missed.iter().map(|(index, _)| *index));
            named.sort_unstable();
            prop_assert_eq!(named, (0..end).collect::<Vec<_>>());
            let host = |index: &usize| found[*index] == Ok(Located::Host);
            prop_assert!(plan.resident.iter().all(host));
            let on_disk = |index: &usize| found[*index].is_ok() && !is_miss(&found[*index]);
            prop_assert!(plan.load.iter().all(|index| on_disk(index) && !host(index)));
            for (index, miss) in plan.missed {
                prop_assert_eq!(found[index].err().unwrap_or(Miss::Device), miss);
            }
            prop_assert!(plan.load.is_sorted() && plan.resident.is_sorted());
        }
    }
}
