//! Classes of channels: which channels share the frequencies of symbols, and these.
//!
//! Upstairs:   [`super`].
//! Downstairs: [`crate::rans`] makes frequencies of weights, [`crate::simd`] sums costs;
//!             [`super::bits`].
//!
//! Channels differ in scale, and those of K in their mean: a channel with one has values of one
//! sign as a rule. So channels are put into classes by what they hold, and where most values of
//! a channel are negative its signs are turned over first, so that both kinds share classes.
//! Encoding finds the classes (k-means of counts, its distance the bits that they would cost);
//! decoding reads them. In bits, from the low bits of a byte on:
//!
//! - for each class 16 bits, which nibbles it has; then for each of these in turn, of its four
//!   symbols (plain, negative, half, both) the level, as the difference to the same symbol of the
//!   nibble before (of 24 at the first): a number of [`Writer::rice`], 2d for d >= 0, -2d - 1
//!   below. A symbol of level l has weight `256 * 2^(l/4)`, rounded ([`weight`]);
//! - where there are two classes or more, for each channel its class, in as few bits as count
//!   them, and a bit: its signs are turned over.
//!
//! Invariants kept here
//!   Integers only: the same part makes the same bytes on every machine.

use super::bits::{Reader, Writer};
use super::values::{SIGN, SYMBOLS};
use crate::rans::Frequencies;
use crate::simd::{self, Pair};

/// Most classes.
pub(super) const CLASSES_MAX: usize = 16;
/// Largest level of a symbol.
const LEVEL_MAX: u32 = 48;
/// Level that the first nibble is compared with.
const LEVEL_FIRST: u32 = 24;
/// Rounds of finding classes. What more gain is below 0.02 %.
const ROUNDS: usize = 4;
/// Bits of a class's frequencies, about.
const TABLE_BITS: u64 = 160;
/// Fractions of a bit in which costs are counted.
const BIT: u64 = 64;

/// Counts of symbols.
pub(super) type Counts = [u32; SYMBOLS];

/// Weight of a level: 256 times a power of two in quarters.
const fn weight(level: u32) -> u64 {
    let quarter: u64 = match level % 4 {
        0 => 256,
        1 => 304,
        2 => 362,
        _ => 431,
    };
    quarter << (level / 4)
}

/// The classes of a part.
#[derive(Debug, Clone)]
pub(super) struct Classes {
    /// Levels of each class's symbols; `None` for a nibble that it does not have.
    levels: Vec<[Option<[u32; 4]>; 16]>,
    /// The class of each channel.
    pub(super) of: Vec<u8>,
    /// [`SIGN`] for a channel whose signs are turned over, else 0.
    pub(super) masks: Vec<u8>,
}

impl Classes {
    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.levels.len()
    }

    /// All values in one class.
    pub(super) fn one(counts: &Counts) -> Self {
        Self {
            levels: vec![levels_of(counts)],
            of: vec![0],
            masks: vec![0],
        }
    }

    /// At most `most` classes for channels of these counts, and their cost in bits, tables
    /// included.
    pub(super) fn find(channels: &[Counts], most: usize) -> (Self, u64) {
        let mut turned = channels.to_vec();
        let masks: Vec<u8> = turned.iter_mut().map(turn_over).collect();
        let mut of = by_mean(&turned, most);
        let (mut sums, mut cost) = (sums_of(&turned, &of, most), 0);
        for _ in 0..ROUNDS {
            let costs: Vec<Counts> = sums.iter().map(costs_of).collect();
            cost = to_cheapest(&turned, &costs, &mut of);
            sums = sums_of(&turned, &of, most);
        }
        // Classes without a channel take no place.
        let mut kept = Vec::new();
        let mut number = [0_u8; CLASSES_MAX];
        for (class, (sums, number)) in (0_u8..).zip(sums.iter().zip(&mut number)) {
            if of.contains(&class) {
                *number = u8::try_from(kept.len()).unwrap_or(0);
                kept.push(levels_of(sums));
            }
        }
        for class in &mut of {
            *class = number.get(usize::from(*class)).copied().unwrap_or(0);
        }
        let side = kept.len() as u64 * TABLE_BITS
            + of.len() as u64 * u64::from(class_bits(kept.len()) + 1);
        let levels = kept;
        (Self { levels, of, masks }, cost / BIT + side)
    }

    /// About how many bits these values take in one class.
    pub(super) fn cost_of_one(counts: &Counts) -> u64 {
        cost_of(counts, &costs_of(counts)) / BIT + TABLE_BITS
    }

    pub(super) fn write(&self) -> Vec<u8> {
        let mut bits = Writer::default();
        for levels in &self.levels {
            levels
                .iter()
                .for_each(|nibble| bits.put(nibble.is_some().into(), 1));
            let mut before = [LEVEL_FIRST; 4];
            for level in levels.iter().flatten() {
                for (level, before) in level.iter().zip(before) {
                    bits.rice(match level.checked_sub(before) {
                        Some(more) => 2 * more,
                        None => 2 * (before - level) - 1,
                    });
                }
                before = *level;
            }
        }
        if self.count() > 1 {
            for (class, mask) in self.of.iter().zip(&self.masks) {
                bits.put((*class).into(), class_bits(self.count()));
                bits.put((*mask / SIGN).into(), 1);
            }
        }
        bits.bytes
    }

    /// `None` when the bytes are no classes of so many channels.
    pub(super) fn read(bytes: &[u8], count: usize, channels: usize) -> Option<Self> {
        let mut bits = Reader::new(bytes);
        let mut levels = Vec::with_capacity(count.min(CLASSES_MAX));
        for _ in 0..count {
            levels.push(read_levels(&mut bits)?);
        }
        let mut all = Self {
            levels,
            of: vec![0],
            masks: vec![0],
        };
        if count > 1 {
            (all.of, all.masks) = (Vec::with_capacity(channels), Vec::with_capacity(channels));
            for _ in 0..channels {
                let both = bits.get(class_bits(count) + 1)?;
                let turned = both >> class_bits(count);
                let class = u8::try_from(both - (turned << class_bits(count)))
                    .ok()
                    .filter(|class| usize::from(*class) < count);
                all.of.push(class?);
                all.masks.push(if turned == 1 { SIGN } else { 0 });
            }
        }
        bits.ends_here().then_some(all)
    }

    /// The frequencies of each class's symbols.
    pub(super) fn frequencies(&self) -> Option<Vec<Frequencies>> {
        let of = |levels: &[Option<[u32; 4]>; 16]| {
            let mut weights = [0; 256];
            for (nibble, levels) in levels.iter().enumerate() {
                for (index, level) in levels.iter().flatten().enumerate() {
                    *weights.get_mut(nibble + 16 * index)? = weight(*level);
                }
            }
            Frequencies::in_proportion(&weights)
        };
        self.levels.iter().map(of).collect()
    }
}

/// The likeliest symbol.
pub(super) fn likeliest(frequencies: &Frequencies) -> u8 {
    let all = (0..=u8::MAX).zip(frequencies.get());
    all.max_by_key(|(_, frequency)| **frequency)
        .map_or(0, |(symbol, _)| symbol)
}

fn read_levels(bits: &mut Reader<'_>) -> Option<[Option<[u32; 4]>; 16]> {
    let there = bits.get(16)?;
    let mut levels = [None; 16];
    let mut before = [LEVEL_FIRST; 4];
    for (nibble, level) in levels.iter_mut().enumerate() {
        if there >> nibble & 1 == 0 {
            continue;
        }
        for before in &mut before {
            let change = bits.rice()?;
            *before = match change % 2 {
                0 => before.checked_add(change / 2)?,
                _ => before.checked_sub(change / 2 + 1)?,
            };
            if *before > LEVEL_MAX {
                return None;
            }
        }
        *level = Some(before);
    }
    (there != 0).then_some(levels)
}

/// Bits that count so many classes.
const fn class_bits(count: usize) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// Turns signs over where most are set, and returns the mask that says so.
fn turn_over(counts: &mut Counts) -> u8 {
    let (mut plain, mut negative) = (0_u64, 0_u64);
    for pairs in counts.chunks_exact(2 * usize::from(SIGN)) {
        let (of_plain, of_negative) = pairs.split_at(SIGN.into());
        for (plain_count, negative_count) in of_plain.iter().zip(of_negative) {
            plain += u64::from(*plain_count);
            negative += u64::from(*negative_count);
        }
    }
    if negative <= plain {
        return 0;
    }
    for pairs in counts.chunks_exact_mut(2 * usize::from(SIGN)) {
        let (plain, negative) = pairs.split_at_mut(SIGN.into());
        plain.swap_with_slice(negative);
    }
    SIGN
}

/// Channels in as many equal classes, by their mean nibble.
fn by_mean(channels: &[Counts], most: usize) -> Vec<u8> {
    let mean = |counts: &Counts| {
        let (mut sum, mut all) = (0_u64, 0_u64);
        for (symbol, count) in counts.iter().enumerate() {
            sum += u64::from(*count) * (symbol as u64 % 16);
            all += u64::from(*count);
        }
        (sum << 16) / all.max(1)
    };
    let mut order: Vec<_> = channels.iter().map(mean).zip(0_usize..).collect();
    order.sort_unstable();
    let mut of = vec![0; channels.len()];
    for (rank, (_, channel)) in order.iter().enumerate() {
        if let Some(class) = of.get_mut(*channel) {
            *class = u8::try_from(rank * most / channels.len()).unwrap_or(0);
        }
    }
    of
}

/// Puts each channel into the class in which it costs least. Returns what all cost together.
fn to_cheapest(channels: &[Counts], costs: &[Counts], of: &mut [u8]) -> u64 {
    let small = small_costs(costs);
    let mut cost = 0;
    for (counts, class) in channels.iter().zip(of) {
        let mut all = [u64::MAX; CLASSES_MAX];
        match small_counts(counts) {
            Some(counts) => {
                let mut sums = [0; CLASSES_MAX];
                simd::costs(&counts, &small, &mut sums);
                for ((to, sum), _) in all.iter_mut().zip(sums).zip(costs) {
                    *to = sum.unsigned_abs().into();
                }
            }
            None => {
                for (to, costs) in all.iter_mut().zip(costs) {
                    *to = cost_of(counts, costs);
                }
            }
        }
        let mut least = u64::MAX;
        for (number, cost) in (0..).zip(all) {
            if cost < least {
                (*class, least) = (number, cost);
            }
        }
        cost += least;
    }
    cost
}

/// Pairs of counts for [`simd::costs`], when they are few: a cost is below 2^12, so their products
/// are below 2^27 together.
fn small_counts(counts: &Counts) -> Option<[Pair; SYMBOLS / 2]> {
    let values: u64 = counts.iter().map(|count| u64::from(*count)).sum();
    let mut small = [[0; 2]; SYMBOLS / 2];
    for (to, count) in small.as_flattened_mut().iter_mut().zip(counts) {
        *to = i16::try_from(*count).unwrap_or(i16::MAX);
    }
    (values <= i16::MAX as u64).then_some(small)
}

/// Pairs of costs for [`simd::costs`], of each class.
fn small_costs(costs: &[Counts]) -> [[Pair; CLASSES_MAX]; SYMBOLS / 2] {
    let mut small = [[[0; 2]; CLASSES_MAX]; SYMBOLS / 2];
    for (class, costs) in costs.iter().enumerate() {
        for (to, costs) in small.iter_mut().zip(costs.as_chunks::<2>().0) {
            if let Some(to) = to.get_mut(class) {
                *to = costs.map(|cost| i16::try_from(cost).unwrap_or(i16::MAX));
            }
        }
    }
    small
}

fn sums_of(channels: &[Counts], of: &[u8], most: usize) -> Vec<Counts> {
    let mut sums = vec![[0; SYMBOLS]; most];
    for (counts, class) in channels.iter().zip(of) {
        if let Some(sums) = sums.get_mut(usize::from(*class)) {
            for (sum, count) in sums.iter_mut().zip(counts) {
                // A part has fewer values than these numbers hold.
                *sum = u32::wrapping_add(*sum, *count);
            }
        }
    }
    sums
}

/// What each symbol costs where these were counted, in parts of a bit.
fn costs_of(counts: &Counts) -> Counts {
    // One more than 16 times what was counted: nothing is impossible.
    let share = |count: u32| 16 * u64::from(count) + 1;
    let all = log2(counts.iter().map(|count| share(*count)).sum());
    counts.map(|count| {
        let small = LOGS.get(count as usize).copied();
        all - small.map_or_else(|| log2(share(count)), u32::from)
    })
}

/// `log2(16 * count + 1)` of the counts that most symbols have.
static LOGS: [u16; 1024] = logs();

#[allow(
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    reason = "a constant: a bad index does not compile, and a logarithm is below 2^12"
)]
const fn logs() -> [u16; 1024] {
    let mut logs = [0; 1024];
    let mut count = 0;
    while count < logs.len() {
        logs[count] = log2(16 * count as u64 + 1) as u16;
        count += 1;
    }
    logs
}

fn cost_of(counts: &Counts, costs: &Counts) -> u64 {
    let each = counts.iter().zip(costs);
    each.map(|(count, cost)| u64::from(*count) * u64::from(*cost))
        .sum()
}

/// Logarithm to base 2 in parts of a bit, rounded down.
const fn log2(number: u64) -> u32 {
    if number < 2 {
        return 0;
    }
    // A number from 1 to 2 of 31 bits after the point; its square tells the next bit.
    let mut log = number.ilog2();
    let mut part = (number << (63 - log)) >> 32;
    let mut left = BIT.ilog2();
    while left > 0 {
        let square = part * part;
        let carry = square >> 63;
        part = square >> (31 + carry);
        log = 2 * log + (carry == 1) as u32;
        left -= 1;
    }
    log
}

/// The levels nearest to what was counted.
fn levels_of(counts: &Counts) -> [Option<[u32; 4]>; 16] {
    let all: u64 = counts.iter().map(|count| u64::from(*count)).sum();
    // A level between two: half a quarter of a power of two below.
    let is_above = |level: u32, count: u64| {
        let middle = weight(level) * 235 / 256;
        count << 20 >= middle * all
    };
    let count_of = |symbol: usize| counts.get(symbol).map_or(0, |count| u64::from(*count));
    std::array::from_fn(|nibble| {
        let four = [0, 16, 32, 48].map(|symbol| count_of(nibble + symbol));
        // The last level that is not above the count: half of what is left at a time.
        let level = |count| {
            [32, 16, 8, 4, 2, 1].iter().fold(0, |level, more| {
                let next = level + more;
                let is_below = next <= LEVEL_MAX && is_above(next, count);
                if is_below { next } else { level }
            })
        };
        four.iter().any(|count| *count > 0).then(|| four.map(level))
    })
}
