//! Choice of the fastest path that this processor has; every path makes the same bits.
//!
//! Upstairs:   [`crate::rans`] and the coded levels.
//! Downstairs: the scalar references, and `avx2` and `avx512`, which are this package's rooms of
//!             unsafe code.
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
use crate::rans::reference::{self, Encoder};
use crate::rans::{Codes, Decoder, Slots, StreamError};

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "a room of unsafe code")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "a room of unsafe code")]
pub(crate) mod avx512;
pub(crate) mod ladder;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "a room of unsafe code")]
mod ladder_avx2;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "a room of unsafe code")]
mod ladder_avx512;

/// A set of instructions that is looked for, the fewest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Path {
    /// What every processor of its kind has.
    Scalar,
    /// AVX2 and POPCNT.
    Avx2,
    /// AVX-512 F, BW and VL beside those.
    Avx512,
}

thread_local! {
    /// The most that this thread may use.
    static LIMIT: Cell<Path> = const { Cell::new(Path::Avx512) };
}

impl Path {
    /// Those that this processor has, the fewest instructions first.
    pub fn available() -> impl Iterator<Item = Self> {
        let all = [Self::Scalar, Self::Avx2, Self::Avx512];
        all.into_iter().filter(|path| path.is_there())
    }

    /// Name for tables and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
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

/// [`Decoder::run`].
pub(crate) fn rans_decode(
    decoder: &mut Decoder<'_>,
    slots: &Slots,
    out: &mut [u8],
) -> Result<(), StreamError> {
    #[cfg(target_arch = "x86_64")]
    let done = match (fast512(), fast()) {
        (Some(fast), _) => avx512::decode(fast, decoder, slots, out),
        (None, Some(fast)) => avx2::decode(fast, decoder, slots, out),
        (None, None) => 0,
    };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    reference::decode(decoder, slots, out.get_mut(done..).unwrap_or_default())
}

/// [`rans_decode`] and [`halves::merge`] of whole groups, the symbols of which are not kept.
pub(crate) fn join(
    (decoder, slots): (&mut Decoder<'_>, &Slots),
    (kind, window): (Kind, Window),
    rest: &[u8],
    raw: &mut [u8],
) -> Result<(), StreamError> {
    let form = (kind, window);
    #[cfg(target_arch = "x86_64")]
    let done = match (fast512(), fast()) {
        (Some(fast), _) => avx512::join(fast, (decoder, slots), form, rest, raw),
        (None, Some(fast)) => avx2::join(fast, (decoder, slots), form, rest, raw),
        (None, None) => 0,
    };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
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

/// [`crate::rans::encode`].
pub(crate) fn rans_encode(codes: &Codes, symbols: &[u8], out: &mut [u8]) -> Option<usize> {
    rans_encode_runs(&[(codes, symbols)], out)
}

/// [`crate::rans::encode_runs`].
pub(crate) fn rans_encode_runs(runs: &[(&Codes, &[u8])], out: &mut [u8]) -> Option<usize> {
    let mut encoder = Encoder::new(out);
    for (codes, symbols) in runs.iter().rev() {
        #[cfg(target_arch = "x86_64")]
        let left = match (fast512(), fast()) {
            (Some(fast), _) => avx512::encode(fast, &mut encoder, codes, symbols)?,
            (None, Some(fast)) => avx2::encode(fast, &mut encoder, codes, symbols)?,
            (None, None) => symbols.len(),
        };
        #[cfg(not(target_arch = "x86_64"))]
        let left = symbols.len();
        encoder.run(codes, symbols.get(..left)?)?;
    }
    encoder.end()
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
