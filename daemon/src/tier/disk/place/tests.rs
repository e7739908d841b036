//! What the placement of blocks promises, over random devices and keys.

use proptest::prelude::*;

use super::*;

const KEYS: u32 = 4000;

/// Keys as clients derive them: without any order.
fn keys() -> impl Iterator<Item = BlockKey> {
    (0..KEYS).map(|number| BlockKey(*blake3::hash(&number.to_le_bytes()).as_bytes()))
}

fn share(id: u64, capacity: u64) -> Option<Share> {
    let hash = blake3::hash(&id.to_le_bytes());
    let id = hash.as_bytes()[..16].try_into().unwrap();
    Some(Share::new(StoreId(id), Bytes(capacity)))
}

/// Two to eight devices of 1 to 16 TiB.
fn devices() -> impl Strategy<Value = Vec<(u64, u64)>> {
    let ids = proptest::collection::btree_set(any::<u64>(), 2..9);
    ids.prop_flat_map(|ids| {
        let ids: Vec<u64> = ids.into_iter().collect();
        let capacities = proptest::collection::vec(1u64..17, ids.len());
        (Just(ids).prop_shuffle(), capacities)
            .prop_map(|(ids, sizes)| ids.into_iter().zip(sizes.iter().map(|n| n << 40)).collect())
    })
}

fn shares(devices: &[(u64, u64)]) -> Vec<Option<Share>> {
    devices
        .iter()
        .map(|(id, capacity)| share(*id, *capacity))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    // Five standard deviations of a draw with the right chances.
    #[test]
    fn every_device_owns_blocks_as_its_capacity_says(devices in devices()) {
        let shares = shares(&devices);
        let mut owned = vec![0u32; devices.len()];
        for key in keys() {
            owned[owner(&key, &shares).unwrap()] += 1;
        }
        let total: u64 = devices.iter().map(|(_, capacity)| capacity).sum();
        for ((_, capacity), owned) in devices.iter().zip(owned) {
            let chance = *capacity as f64 / total as f64;
            let (want, keys) = (chance * f64::from(KEYS), f64::from(KEYS));
            let bound = 5.0 * (keys * chance * (1.0 - chance)).sqrt() + 1.0;
            prop_assert!((f64::from(owned) - want).abs() < bound, "{owned}, not {want}");
        }
    }

    #[test]
    fn a_device_that_joins_takes_its_share_and_moves_nothing_else(devices in devices()) {
        let (after, before) = (shares(&devices), shares(&devices[1..]));
        for key in keys() {
            let (old, new) = (owner(&key, &before).unwrap() + 1, owner(&key, &after).unwrap());
            prop_assert!(new == 0 || new == old, "from {old} to {new}");
        }
    }

    // The same for one that is away: a device without a share counts as not there.
    #[test]
    fn blocks_of_a_device_that_leaves_go_to_the_next_in_their_order(devices in devices()) {
        let all = shares(&devices);
        for key in keys().take(200) {
            let order = order(&key, &all);
            prop_assert_eq!(order.len(), all.len());
            prop_assert_eq!(owner(&key, &all), order.first().copied());
            let mut left = all.clone();
            left[order[0]] = None;
            prop_assert_eq!(&super::order(&key, &left), &order[1..]);
        }
    }

    #[test]
    fn the_order_in_the_configuration_does_not_matter(devices in devices()) {
        let mut turned = devices.clone();
        turned.reverse();
        let (one, other) = (shares(&devices), shares(&turned));
        for key in keys().take(200) {
            let (here, there) = (owner(&key, &one).unwrap(), owner(&key, &other).unwrap());
            prop_assert_eq!(devices[here], turned[there]);
        }
    }
}

#[test]
fn blocks_of_no_device_have_no_owner_and_of_one_have_that() {
    let key = BlockKey([7; 32]);
    assert_eq!(owner(&key, &[]), None);
    assert_eq!(owner(&key, &[None, None]), None);
    assert_eq!(owner(&key, &[None, share(1, 1)]), Some(1));
    assert_eq!(order(&key, &[None, share(1, 1)]), [1]);
}

// Goal: nobody who does not know the devices' identities can aim at one of them with keys that
// differ little.
#[test]
fn keys_that_differ_in_one_bit_are_spread_like_all_others() {
    let shares = [share(1, 1), share(2, 1)];
    let mut owned = [0u32; 2];
    for bit in 0..256 {
        let mut key = [0; 32];
        key[bit / 8] = 1 << (bit % 8);
        owned[owner(&BlockKey(key), &shares).unwrap()] += 1;
    }
    assert!(
        owned.iter().all(|owned| (88..=168).contains(owned)),
        "{owned:?}"
    );
}
