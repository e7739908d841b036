//! Tests of key derivation: separation of fields, namespaces, layouts and prefixes.

use proptest::prelude::*;

use super::*;

fn deriver(secret: u8, layout: u8, adapter: &str) -> KeyDeriver {
    KeyDeriver::new(
        KeySecret::new([secret; 32]),
        LayoutFingerprint([layout; 32]),
        adapter,
    )
}

// Goal: a frozen value, so that a change of derivation cannot go unnoticed: it would orphan
// every block on every disk.
#[test]
fn derive_gives_the_golden_key() {
    let key = deriver(1, 2, "lora-a").derive(&BlockKey::ROOT, &[1, 2, 3], b"salt");
    assert_eq!(key.to_hex(), GOLDEN);
}

const GOLDEN: &str = "e70bf247b731e5df4b2692bdb203e29c0b26eadd81c5a2827d32c39c00abd298";

#[test]
fn derive_separates_namespace_layout_adapter_extra_parent_and_tokens() {
    let base = deriver(1, 2, "a").derive(&BlockKey::ROOT, &[1, 2], b"x");
    let others = [
        deriver(9, 2, "a").derive(&BlockKey::ROOT, &[1, 2], b"x"),
        deriver(1, 9, "a").derive(&BlockKey::ROOT, &[1, 2], b"x"),
        deriver(1, 2, "b").derive(&BlockKey::ROOT, &[1, 2], b"x"),
        deriver(1, 2, "a").derive(&BlockKey::ROOT, &[1, 2], b"y"),
        deriver(1, 2, "a").derive(&base, &[1, 2], b"x"),
        deriver(1, 2, "a").derive(&BlockKey::ROOT, &[1, 3], b"x"),
        deriver(1, 2, "a").derive(&BlockKey::ROOT, &[1, 2, 0], b"x"),
    ];
    for other in others {
        assert_ne!(base, other);
    }
}

// Museum row 8 (vLLM#44701): an adapter name and a cache salt hashed as one untagged list.
#[test]
fn museum_08_adapter_and_salt_never_change_places() {
    let tokens = [5, 6, 7];
    let a = deriver(1, 2, "salt").derive(&BlockKey::ROOT, &tokens, b"");
    let b = deriver(1, 2, "").derive(&BlockKey::ROOT, &tokens, b"salt");
    let c = deriver(1, 2, "sa").derive(&BlockKey::ROOT, &tokens, b"lt");
    assert!(a != b && b != c && a != c);
}

// Museum row 9 (CVE-2025-25183): block hashes that anybody can compute let one tenant make blocks
// that collide with another's. Without the secret, nothing about a key can be told.
#[test]
fn museum_09_another_secret_gives_unrelated_keys() {
    for tokens in 0..64u32 {
        let key = |secret| deriver(secret, 2, "a").derive(&BlockKey::ROOT, &[tokens], b"");
        let (one, other) = (key(2), key(3));
        let differ = one.0.iter().zip(other.0).map(|(a, b)| (a ^ b).count_ones());
        let differ: u32 = differ.sum();
        assert!((80..=176).contains(&differ), "{differ} of 256 bits differ");
    }
}

#[test]
fn secret_never_shows_in_debug_output() {
    let shown = format!("{:?}", deriver(0xAB, 2, "a"));
    assert!(
        !shown.contains("171") && !shown.to_lowercase().contains("abab"),
        "{shown}"
    );
}

#[test]
fn from_hex_refuses_what_is_not_64_hex_digits() {
    let key = BlockKey([0xC3; 32]);
    assert_eq!(BlockKey::from_hex(&key.to_hex()), Some(key));
    let signed = "+c".repeat(32);
    let long = ["g".repeat(64), "c".repeat(63), "é".repeat(32)];
    for bad in long
        .iter()
        .chain([&signed])
        .map(String::as_str)
        .chain(["", "c3"])
    {
        assert_eq!(BlockKey::from_hex(bad), None, "{bad}");
    }
}

proptest! {
    // Goal: K1 over random pairs of field lists that differ in at least one field.
    #[test]
    fn derive_never_collides_for_different_fields(
        a in (any::<[u8; 4]>(), ".{0,8}", proptest::collection::vec(any::<u8>(), 0..8),
              proptest::collection::vec(any::<u32>(), 0..6)),
        b in (any::<[u8; 4]>(), ".{0,8}", proptest::collection::vec(any::<u8>(), 0..8),
              proptest::collection::vec(any::<u32>(), 0..6)),
    ) {
        let key = |(layout, adapter, extra, tokens): &([u8; 4], String, Vec<u8>, Vec<u32>)| {
            let mut wide = [0; 32];
            wide[..4].copy_from_slice(layout);
            KeyDeriver::new(KeySecret::new([7; 32]), LayoutFingerprint(wide), adapter.clone())
                .derive(&BlockKey::ROOT, tokens, extra)
        };
        prop_assert_eq!(a == b, key(&a) == key(&b));
    }

    // Goal: a chain is the same however many tokens follow, so prefixes are shared.
    #[test]
    fn chain_of_a_prefix_is_a_prefix_of_the_chain(
        tokens in proptest::collection::vec(any::<u32>(), 1..200),
        cut in 0usize..200,
        block in 1usize..40,
    ) {
        let whole_blocks = cut.min(tokens.len()) / block * block;
        let keys = deriver(1, 2, "");
        let long = keys.chain(&tokens, block, b"");
        let short = keys.chain(&tokens[..whole_blocks], block, b"");
        prop_assert_eq!(&long[..short.len()], &short[..]);
        prop_assert_eq!(long.len(), tokens.len().div_ceil(block));
    }
}
