//! The plan of a restore: which blocks to bring, in which order. A pure function.
//!
//! Upstairs:   `restore::run` executes it.
//! Downstairs: nothing: no I/O, no clock, no hidden state.
//!
//! Loading is planned front to back: a reader that can only take a loaded prefix gains from
//! every block that touches the prefix, and from no other. Recomputing and quality levels have no
//! part in it yet.

use kvtier_proto::Miss;

use crate::tier::Tier;

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
pub fn plan(found: &[Result<Tier, Miss>], scattered: bool) -> Plan {
    let mut plan = Plan::default();
    for (index, place) in found.iter().enumerate() {
        match place {
            Ok(Tier::Host) => plan.resident.push(index),
            Ok(Tier::Disk) => plan.load.push(index),
            Err(miss) => {
                plan.missed.push((index, *miss));
                if !scattered {
                    break;
                }
            }
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn place() -> impl Strategy<Value = Result<Tier, Miss>> {
        prop_oneof![
            4 => Just(Ok(Tier::Host)),
            4 => Just(Ok(Tier::Disk)),
            1 => Just(Err(Miss::Absent)),
        ]
    }

    proptest! {
        #[test]
        fn plan_names_every_block_up_to_the_first_miss_exactly_once(
            found in proptest::collection::vec(place(), 0..40), scattered in any::<bool>(),
        ) {
            let plan = plan(&found, scattered);
            let first_miss = found.iter().position(Result::is_err);
            let end = match first_miss {
                Some(miss) if !scattered => miss + 1,
                _ => found.len(),
            };
            let mut named: Vec<usize> = plan.resident.iter().chain(&plan.load).copied().collect();
            named.extend(plan.missed.iter().map(|(index, _)| *index));
            named.sort_unstable();
            prop_assert_eq!(named, (0..end).collect::<Vec<_>>());
            prop_assert!(plan.resident.iter().all(|index| found[*index] == Ok(Tier::Host)));
            prop_assert!(plan.load.iter().all(|index| found[*index] == Ok(Tier::Disk)));
            prop_assert!(plan.load.is_sorted() && plan.resident.is_sorted());
        }
    }
}
