//! Texts that no person wrote: records, encoded bytes, figures.
//!
//! Upstairs:   [`super::foreign`].
//! Downstairs: ChaCha8 from a fixed seed.
//!
//! Invariant: the same text on every machine and in every later version.
//!
//! Not here on purpose: realism beyond form. They stand for what a calibration never saw.

use std::fmt::Write as _;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

const SEED: u64 = 20;

/// Characters that a text goes on for, if about as many as 1,024 tokens need.
const CHARACTERS: usize = 4500;

struct Draw(ChaCha8Rng);

impl Draw {
    fn new(stream: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(SEED + stream))
    }

    /// A whole number below `end`.
    fn below(&mut self, end: u32) -> u32 {
        self.0.next_u32() % end
    }

    fn one_of<'a>(&mut self, words: &[&'a str]) -> &'a str {
        let at = self.below(words.len().try_into().unwrap_or(1));
        words.get(at as usize).copied().unwrap_or_default()
    }
}

/// An array of records, as a service answers them.
pub(super) fn json() -> String {
    let mut draw = Draw::new(0);
    let mut out = String::from("[\n");
    let names = ["alpha", "kestrel", "mill", "quartz", "ribbon", "tundra"];
    let states = ["active", "pending", "retired", "unknown"];
    while out.len() < CHARACTERS {
        let (id, x, y) = (draw.0.next_u32(), draw.below(100_000), draw.below(1000));
        let (name, state) = (draw.one_of(&names), draw.one_of(&states));
        let (on, tag) = (draw.below(2) == 0, draw.one_of(&names));
        let _ = writeln!(
            out,
            "  {{\"id\": \"{id:08x}\", \"name\": \"{name}-{y}\", \"state\": \"{state}\", \
             \"price\": {}.{:02}, \"tags\": [\"{tag}\", {y}], \"on\": {on}, \"parent\": null}},",
            x / 100,
            x % 100
        );
    }
    out.push_str("  {}\n]\n");
    out
}

/// Lines of base64 of random bytes.
pub(super) fn base64() -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut draw = Draw::new(1);
    let mut out = String::new();
    while out.len() < CHARACTERS {
        let letters = (0..76).map(|_| ALPHABET.get(draw.below(64) as usize));
        out.extend(letters.flatten().map(|letter| char::from(*letter)));
        out.push('\n');
    }
    out
}

/// Columns of figures.
pub(super) fn numbers() -> String {
    let mut draw = Draw::new(2);
    let mut out = String::new();
    let mut sum = 0_u32;
    while out.len() < CHARACTERS {
        let (a, b, c) = (draw.below(1000), draw.below(1_000_000), draw.below(10_000));
        sum = sum.wrapping_add(a) % 100_000;
        let _ = writeln!(out, "{sum:5} {a:4} {}.{:03} -{c}", b / 1000, b % 1000);
    }
    out
}
