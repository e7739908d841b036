//! Choice of the fastest path that this processor has; every path makes the same bits.
//!
//! Upstairs:   [`crate::rans`] and the coded levels.
//! Downstairs: the scalar references, and `avx2`, which is this package's room of unsafe code.
//!
//! Invariants kept here
//!   V1  A path is taken only where the processor was found to have its instructions.
//!   V2  Whatever path is taken, the bytes are those of the scalar reference. The fast ones do
//!       whole steps while there is room to read and write in whole registers; the reference
//!       does the rest.

use crate::codec::halves::{self, Kind, Window};
use crate::rans::reference::{self, Encoder};
use crate::rans::{Codes, Decoder, Slots, StreamError};

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "this package's room of unsafe code")]
pub(crate) mod avx2;

/// Name of the path that is taken on this processor, for tables and logs.
pub fn path() -> &'static str {
    match fast() {
        Some(_) => "avx2",
        None => "scalar",
    }
}

/// Proof that this processor has the instructions of the fast path (V1).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fast(());

/// The fast path, where there is one. The answer is kept by the standard library.
#[cfg(target_arch = "x86_64")]
pub(crate) fn fast() -> Option<Fast> {
    let there = std::arch::is_x86_feature_detected!("avx2")
        && std::arch::is_x86_feature_detected!("popcnt");
    there.then_some(Fast(()))
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn fast() -> Option<Fast> {
    None
}

/// [`Decoder::run`].
pub(crate) fn rans_decode(
    decoder: &mut Decoder<'_>,
    slots: &Slots,
    out: &mut [u8],
) -> Result<(), StreamError> {
    #[cfg(target_arch = "x86_64")]
    let done = fast().map_or(0, |fast| avx2::decode(fast, decoder, slots, out));
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    reference::decode(decoder, slots, out.get_mut(done..).unwrap_or_default())
}

/// [`crate::rans::encode`].
pub(crate) fn rans_encode(codes: &Codes, symbols: &[u8], out: &mut [u8]) -> Option<usize> {
    let mut encoder = Encoder::new(out);
    #[cfg(target_arch = "x86_64")]
    let left = match fast() {
        Some(fast) => avx2::encode(fast, &mut encoder, codes, symbols)?,
        None => symbols.len(),
    };
    #[cfg(not(target_arch = "x86_64"))]
    let left = symbols.len();
    encoder.run(codes, symbols.get(..left)?)?;
    encoder.end()
}

/// [`halves::split`].
pub(crate) fn split(kind: Kind, window: Window, raw: &[u8], planes: halves::PlanesMut<'_>) {
    #[cfg(target_arch = "x86_64")]
    if let Some(fast) = fast() {
        return avx2::split(fast, kind, window, raw, planes);
    }
    halves::split(kind, window, raw, planes);
}

/// [`halves::merge`].
pub(crate) fn merge(kind: Kind, window: Window, planes: halves::Planes<'_>, raw: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(fast) = fast() {
        return avx2::merge(fast, kind, window, planes, raw);
    }
    halves::merge(kind, window, planes, raw);
}
