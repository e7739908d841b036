//! Fixed-width fields in byte slices, without a panic and without a cast that can truncate.
//!
//! Upstairs:   the decoders and encoders beside it.
//! Downstairs: nothing.

/// The `N` bytes at `at`, or `None` when the slice is too short.
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

pub(crate) fn u8_at(bytes: &[u8], at: usize) -> Option<u8> {
    bytes.get(at).copied()
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

/// Writes `value` at `at`. Encoders write into slices whose length they have checked; a field
/// outside is a defect that the golden tests see, and it must not panic a lane.
pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    let place = bytes.get_mut(at..at + value.len());
    debug_assert!(place.is_some(), "field at {at} is outside of its block");
    if let Some(place) = place {
        place.copy_from_slice(value);
    }
}

/// CRC-32 (IEEE) of `bytes[from..to]`, or `None` when the slice is too short.
pub(crate) fn crc_of(bytes: &[u8], from: usize, to: usize) -> Option<u32> {
    bytes.get(from..to).map(crc32fast::hash)
}

/// True when the checksum at `at` is there and is the one of everything before it.
pub(crate) fn is_sealed(bytes: &[u8], at: usize) -> bool {
    crc_of(bytes, 0, at).is_some_and(|crc| u32_at(bytes, at) == Some(crc))
}

/// True when `bytes[from..to]` is there and zero.
pub(crate) fn zero(bytes: &[u8], from: usize, to: usize) -> bool {
    bytes
        .get(from..to)
        .is_some_and(|run| run.iter().all(|byte| *byte == 0))
}

/// A length as an index. Lossless: the project builds for 64-bit hosts only.
pub(crate) const fn index(len: u64) -> usize {
    const { assert!(usize::BITS == 64, "kvtier needs a 64-bit host") };
    #[expect(
        clippy::cast_possible_truncation,
        reason = "usize has 64 bits, asserted above"
    )]
    let index = len as usize;
    index
}
