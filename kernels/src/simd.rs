//! Choice of the fastest path that this processor has; every path makes the same bits.
//!
//! Upstairs:   [`crate::rans`] and the coded levels.
//! Downstairs: the scalar references, and the modules for sets of instructions, which are this
//!             package's rooms of unsafe code.
//!
//! Invariants kept here
//!   V1  A path is taken only where the processor was found to have its instructions.
//!   V2  Whatever path is taken, the bytes are those of the scalar reference. The fast ones do
//!       whole steps while there is room to read and write in whole registers; the reference
//!       does the rest.

#[cfg(target_arch = "x86_64")]
use std::arch::is_x86_feature_detected;
use std::cell::Cell;

use crate::codec::halves::{self, GROUP, GROUP_SYMBOLS, Kind, Window};
use crate::codec::lossless_c::values as signed;
use crate::rans::reference::{self, Encoder};
use crate::rans::{Codes, Decoder, Frequencies, LANES, SCALE, Slots, StreamError};

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "a room of unsafe code")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "a room of unsafe code")]
pub(crate) mod avx512;
pub(crate) mod ladder;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[allow(unsafe_code, reason = "a room of unsafe code")]
mod ladder_amx;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "a room of unsafe code")]
mod ladder_avx2;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "a room of unsafe code")]
mod ladder_avx512;

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "a room of unsafe code")]
mod avx2_signed;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "a room of unsafe code")]
mod avx512_signed;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "a room of unsafe code")]
mod steps;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "a room of unsafe code")]
mod turn;

/// A set of instructions that is looked for, the fewest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Path {
    /// What every processor of its kind has.
    Scalar,
    /// AVX2 and POPCNT.
    Avx2,
    /// AVX-512 F, BW and VL beside those.
    Avx512,
    /// Tiles of bytes beside those, which the operating system lends this process.
    Amx,
}

thread_local! {
    /// The most that this thread may use.
    static LIMIT: Cell<Path> = const { Cell::new(Path::Amx) };
}

impl Path {
    /// Those that this processor has, the fewest instructions first.
    pub fn available() -> impl Iterator<Item = Self> {
        let all = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Amx];
        all.into_iter().filter(|path| path.is_there())
    }

    /// Name for tables and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
        }
    }

    /// The answer is kept by the standard library.
    #[cfg(target_arch = "x86_64")]
    fn is_there(self) -> bool {
        let avx2 = || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("popcnt");
        match self {
            Self::Scalar => true,
            Self::Avx2 => avx2(),
            Self::Avx512 => {
                avx2()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_os = "linux")]
            Self::Amx => Self::Avx512.is_there() && ladder_amx::is_lent(),
            #[cfg(not(target_os = "linux"))]
            Self::Amx => false,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_there(self) -> bool {
        self == Self::Scalar
    }

    /// True when this thread may take it (V1).
    fn is_open(self) -> bool {
        self <= LIMIT.get() && self.is_there()
    }

    /// Runs `work` with no more than these instructions on this thread: for tests, which compare
    /// the paths, and for measuring one beside the other.
    pub fn at_most<T>(self, work: impl FnOnce() -> T) -> T {
        /// Puts the limit back, also when `work` panics.
        struct Back(Path);
        impl Drop for Back {
            fn drop(&mut self) {
                LIMIT.set(self.0);
            }
        }
        let _back = Back(LIMIT.replace(self));
        work()
    }
}

/// Name of the path that is taken on this processor and thread, for tables and logs.
pub fn path() -> &'static str {
    let open = Path::available().filter(|path| path.is_open());
    open.last().unwrap_or(Path::Scalar).name()
}

/// Proof that this processor has the instructions of [`Path::Avx2`] (V1).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fast(());

/// Proof that this processor has the instructions of [`Path::Avx512`] (V1).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fast512(());

/// The proof of AVX2, where it may be used.
pub(crate) fn fast() -> Option<Fast> {
    Path::Avx2.is_open().then_some(Fast(()))
}

/// The proof of AVX-512, where it may be used.
pub(crate) fn fast512() -> Option<Fast512> {
    Path::Avx512.is_open().then_some(Fast512(()))
}

/// Most bytes of words that a step takes.
const STEP_BYTES_MAX: usize = 2 * LANES;

/// Proof that this processor has the instructions of [`Path::Amx`] (V1).
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Amx(());

/// The proof of AMX, where it may be used.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn amx() -> Option<Amx> {
    Path::Amx.is_open().then_some(Amx(()))
}

/// [`Decoder::run`].
pub(crate) fn rans_decode(
    decoder: &mut Decoder<'_>,
    slots: &Slots,
    out: &mut [u8],
) -> Result<(), StreamError> {
    let done = whole_steps(decoder, slots, out);
    let out = out.get_mut(done..).unwrap_or_default();
    let done = padded(decoder, |decoder| whole_steps(decoder, slots, out))?;
    reference::decode(decoder, slots, out.get_mut(done..).unwrap_or_default())
}

/// Decodes what the fastest path can. Returns how many symbols it did.
#[cfg(target_arch = "x86_64")]
fn whole_steps(decoder: &mut Decoder<'_>, slots: &Slots, out: &mut [u8]) -> usize {
    match (fast512(), fast()) {
        (Some(fast), _) => avx512::decode(fast, decoder, slots, out),
        (None, Some(fast)) => avx2::decode(fast, decoder, slots, out),
        (None, None) => 0,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn whole_steps(_: &mut Decoder<'_>, _: &Slots, _: &mut [u8]) -> usize {
    0
}

/// Lets `work` decode the end of a stream with zeros behind it, so that it can load whole
/// registers of words up to the last one. Returns what `work` does.
fn padded(
    decoder: &mut Decoder<'_>,
    work: impl FnOnce(&mut Decoder<'_>) -> usize,
) -> Result<usize, StreamError> {
    let words = decoder.words;
    let mut room = [0; 3 * STEP_BYTES_MAX];
    match room.get_mut(..words.len()) {
        Some(front) if words.len() < STEP_BYTES_MAX => front.copy_from_slice(words),
        _ => return Ok(0),
    }
    let mut end = Decoder {
        states: decoder.states,
        words: &room,
    };
    let done = work(&mut end);
    decoder.words = words
        .get(room.len() - end.words.len()..)
        .ok_or(StreamError::Short)?;
    decoder.states = end.states;
    Ok(done)
}

/// [`rans_decode`] of two streams with the same slots. `soon` will be written next: it is fetched
/// meanwhile.
pub(crate) fn rans_decode_two(
    [a, b]: [&mut Decoder<'_>; 2],
    slots: &Slots,
    [to_a, to_b]: [&mut [u8]; 2],
    soon: &[u8],
) -> Result<(), StreamError> {
    #[cfg(target_arch = "x86_64")]
    let done = {
        let (coders, out) = ([&mut *a, &mut *b], [&mut *to_a, &mut *to_b]);
        match (fast512(), fast()) {
            (Some(fast), _) => avx512::decode_two(fast, coders, slots, out, soon),
            (None, Some(fast)) => avx2::decode_two(fast, coders, slots, out, soon),
            (None, None) => 0,
        }
    };
    #[cfg(not(target_arch = "x86_64"))]
    let (done, _) = (0, soon);
    rans_decode(a, slots, to_a.get_mut(done..).unwrap_or_default())?;
    rans_decode(b, slots, to_b.get_mut(done..).unwrap_or_default())
}

/// [`Slots::fill`].
pub(crate) fn fill_slots(frequencies: &Frequencies, slots: &mut [u32; SCALE]) {
    #[cfg(target_arch = "x86_64")]
    match (fast512(), fast()) {
        (Some(fast), _) => return avx512::fill(fast, frequencies, slots),
        (None, Some(fast)) => return avx2::fill(fast, frequencies, slots),
        (None, None) => {}
    }
    frequencies.fill(slots);
}

/// [`rans_decode`] and [`halves::merge`] of whole groups, the symbols of which are not kept.
pub(crate) fn join(
    (decoder, slots): (&mut Decoder<'_>, &Slots),
    (kind, window): (Kind, Window),
    rest: &[u8],
    raw: &mut [u8],
) -> Result<(), StreamError> {
    let form = (kind, window);
    let done = whole_groups((decoder, slots), form, rest, raw);
    let rest = rest.get(done * kind.plane_bytes()..).unwrap_or_default();
    let raw = raw.get_mut(done * 2 * GROUP..).unwrap_or_default();
    let done = padded(decoder, |decoder| {
        whole_groups((decoder, slots), form, rest, raw)
    })?;
    let groups = raw.as_chunks_mut::<{ 2 * GROUP }>().0.iter_mut();
    let rests = rest.chunks_exact(kind.plane_bytes());
    for (group, rest) in groups.zip(rests).skip(done) {
        let mut symbols = [0; GROUP_SYMBOLS];
        reference::decode(decoder, slots, &mut symbols)?;
        let planes = halves::Planes {
            symbols: &symbols,
            rest,
        };
        halves::merge(kind, window, planes, group);
    }
    Ok(())
}

/// Decodes and puts together what the fastest path can. Returns how many groups it did.
#[cfg(target_arch = "x86_64")]
fn whole_groups(
    (decoder, slots): (&mut Decoder<'_>, &Slots),
    form: (Kind, Window),
    rest: &[u8],
    raw: &mut [u8],
) -> usize {
    match (fast512(), fast()) {
        (Some(fast), _) => avx512::join(fast, (decoder, slots), form, rest, raw),
        (None, Some(fast)) => avx2::join(fast, (decoder, slots), form, rest, raw),
        (None, None) => 0,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn whole_groups(_: (&mut Decoder<'_>, &Slots), _: (Kind, Window), _: &[u8], _: &mut [u8]) -> usize {
    0
}

/// [`crate::rans::encode`].
pub(crate) fn rans_encode(codes: &Codes, symbols: &[u8], out: &mut [u8]) -> Option<usize> {
    rans_encode_runs(&[(codes, symbols)], out)
}

/// [`crate::rans::encode_runs`].
pub(crate) fn rans_encode_runs(runs: &[(&Codes, &[u8])], out: &mut [u8]) -> Option<usize> {
    let mut encoder = Encoder::new(out);
    for (codes, symbols) in runs.iter().rev() {
        rans_encode_run(&mut encoder, codes, symbols)?;
    }
    encoder.end()
}

/// Encodes whole steps before those that the encoder has already.
pub(crate) fn rans_encode_run(
    encoder: &mut Encoder<'_>,
    codes: &Codes,
    symbols: &[u8],
) -> Option<()> {
    #[cfg(target_arch = "x86_64")]
    let left = match (fast512(), fast()) {
        (Some(fast), _) => avx512::encode(fast, encoder, codes, symbols)?,
        (None, Some(fast)) => avx2::encode(fast, encoder, codes, symbols)?,
        (None, None) => symbols.len(),
    };
    #[cfg(not(target_arch = "x86_64"))]
    let left = symbols.len();
    encoder.run(codes, symbols.get(..left)?)
}

/// [`signed::join`] of groups: as many symbols as `raw` has values, the last group a shorter one.
pub(crate) fn join_signed(
    (kind, window): (Kind, Window),
    symbols: &[u8],
    rest: &[u8],
    raw: &mut [u8],
) {
    #[cfg(target_arch = "x86_64")]
    let done = match (fast512(), fast()) {
        (Some(fast), _) => avx512_signed::join(fast, (kind, window), symbols, rest, raw),
        (None, Some(fast)) => avx2_signed::join(fast, (kind, window), symbols, rest, raw),
        (None, None) => 0,
    };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    let groups = symbols.chunks(GROUP).zip(raw.chunks_mut(2 * GROUP));
    let rests = rest.chunks_exact(signed::rest_bytes(kind));
    for ((symbols, raw), rest) in groups.zip(rests).skip(done) {
        let (mut whole, mut group) = ([0; GROUP], [0; 2 * GROUP]);
        whole
            .iter_mut()
            .zip(symbols)
            .for_each(|(to, symbol)| *to = *symbol);
        signed::join((kind, window), &whole, rest, &mut group);
        raw.iter_mut().zip(group).for_each(|(to, byte)| *to = byte);
    }
}

/// The symbols of whole groups of values for level 9. Returns how many values it did.
pub(crate) fn symbols_signed(
    (kind, window): (Kind, Window),
    raw: &[u8],
    symbols: &mut [u8],
) -> usize {
    #[cfg(target_arch = "x86_64")]
    if let Some(fast) = fast() {
        return avx2_signed::symbols(fast, (kind, window), raw, symbols);
    }
    let _ = (kind, window, raw, symbols);
    0
}

/// Symbols that [`costs`] takes at a time, two.
pub(crate) type Pair = [i16; 2];
/// Classes that it counts side by side.
pub(crate) const SIDE: usize = 16;

/// Adds to each of `sums` the products of counts and of that class's costs, all of them together
/// below 2^31.
pub(crate) fn costs<const N: usize>(
    counts: &[Pair; N],
    costs: &[[Pair; SIDE]; N],
    sums: &mut [i32; SIDE],
) {
    #[cfg(target_arch = "x86_64")]
    if let Some(fast) = fast() {
        return avx2_signed::costs(fast, counts, costs, sums);
    }
    for ([a, b], costs) in counts.iter().zip(costs) {
        for (sum, [cost_a, cost_b]) in sums.iter_mut().zip(costs) {
            *sum += i32::from(*a) * i32::from(*cost_a) + i32::from(*b) * i32::from(*cost_b);
        }
    }
}

/// The rest of whole groups of values for level 9. Returns how many groups it did.
pub(crate) fn rest_signed(kind: Kind, raw: &[u8], rest: &mut [u8]) -> usize {
    #[cfg(target_arch = "x86_64")]
    if let Some(fast) = fast() {
        return avx2_signed::rests(fast, kind, raw, rest);
    }
    let _ = (kind, raw, rest);
    0
}

/// Rows and columns of [`turn`].
pub(crate) const BLOCK: usize = 16;
/// What is turned at a time.
pub(crate) type Block = [[u8; BLOCK]; BLOCK];

/// `turned[j][i] = block[i][j]`
#[cfg(target_arch = "x86_64")]
pub(crate) use turn::turn;

#[cfg(not(target_arch = "x86_64"))]
pub(crate) use turned as turn;

/// What `turn` does, a byte at a time.
#[cfg(any(test, not(target_arch = "x86_64")))]
pub(crate) fn turned(block: &Block, turned: &mut Block) {
    for (j, row) in turned.iter_mut().enumerate() {
        for (to, from) in row.iter_mut().zip(block) {
            *to = from.get(j).copied().unwrap_or(0);
        }
    }
}

/// Rows of [`turn_to_rows`].
pub(crate) const ROWS: usize = 2 * BLOCK;

/// Columns of [`ROWS`] symbols, each changed by its mask, become the first [`BLOCK`] bytes of rows
/// that are `width` apart.
pub(crate) fn turn_to_rows(
    columns: &[&[u8; ROWS]; BLOCK],
    masks: &[u8; BLOCK],
    rows: &mut [u8],
    width: usize,
) {
    let mut to = [[0; BLOCK]; ROWS];
    #[cfg(target_arch = "x86_64")]
    let done = fast().map(|fast| avx2_signed::turn_to_rows(fast, columns, masks, &mut to));
    #[cfg(not(target_arch = "x86_64"))]
    let done: Option<()> = None;
    if done.is_none() {
        for (half, to) in to.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            let mut block = [[0; BLOCK]; BLOCK];
            for ((block, column), mask) in block.iter_mut().zip(columns).zip(masks) {
                let half = column.as_chunks::<BLOCK>().0.get(half);
                *block = half.map_or([0; BLOCK], |half| half.map(|symbol| symbol ^ mask));
            }
            turn(&block, to);
        }
    }
    for (row, from) in rows.chunks_mut(width).zip(to) {
        if let Some(to) = row.first_chunk_mut() {
            *to = from;
        }
    }
}

/// [`halves::split`].
pub(crate) fn split(kind: Kind, window: Window, raw: &[u8], planes: halves::PlanesMut<'_>) {
    #[cfg(target_arch = "x86_64")]
    if let Some(fast) = fast512() {
        return avx512::split(fast, kind, window, raw, planes);
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(fast) = fast() {
        return avx2::split(fast, kind, window, raw, planes);
    }
    halves::split(kind, window, raw, planes);
}

#[cfg(test)]
mod tests;
