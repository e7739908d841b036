//! Level 8, zstd: byte planes, each compressed with `zstd`. Bit-exact.
//!
//! Upstairs:   [`super::registry`].
//! Downstairs: [`crate::planes`] splits, the `zstd` crate compresses.
//!
//! After the [header](super::header) come chunks of [`CHUNK_ELEMENTS`] elements, the last one
//! shorter; a chunk is its planes, most significant first; a plane is:
//!
//! | off | len | field  | meaning                                                    |
//! |----:|----:|--------|------------------------------------------------------------|
//! |   0 |   4 | length | bytes of data; bit 31 set: the plane itself, not compressed |
//! |   4 |   n | data   | one zstd frame, or the plane                               |
//!
//! Float planes have hardly any repeats, so a match finder spends its time to make the result
//! larger: `zstd` is told to look for long matches in a tiny table, which leaves the entropy
//! coder. On real bf16 KV of three documents the ratio is 1.485, where the same planes through
//! level 1 as it comes give 1.455 to 1.461; the exponent plane codes 2.7 times as fast. Bytes
//! without numeric meaning get level 1 as it comes.
//!
//! Invariants kept here
//!   K2  Scratch is at most [`SCRATCH_BYTES`] a thread beside the contexts of `zstd`, which
//!       decode in one pass, without a window of their own.
//!
//! Not here on purpose: no dictionary and no tables; that is what levels 1 to 7 are for.

use std::cell::RefCell;
use std::io;

use kvtier_proto::Level;
use kvtier_proto::element::Element;
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{CParameter, find_frame_compressed_size};

use super::raw::exact_length;
use super::{Codec, DecodeError, EncodeError, envelope};
use crate::planes;
use crate::shape::PartShape;

/// Elements a chunk. A plane of a chunk is then one block of `zstd`, and chunk, planes and
/// output stay in a core's cache whatever the size of the part.
pub const CHUNK_ELEMENTS: usize = 128 * 1024;
/// Most scratch memory of a thread for planes. Unit: bytes.
pub const SCRATCH_BYTES: usize = 4 * CHUNK_ELEMENTS;

/// Bit of a plane's length that says the plane is not compressed.
const PLANE_RAW: u32 = 1 << 31;
/// Size of a plane's length. Unit: bytes.
const LENGTH_BYTES: usize = 4;
/// A compressed plane must save one byte in so many, else it is not worth decoding.
const WORTH: usize = 32;
const ZSTD_LEVEL: i32 = 1;

/// Level 8. One value serves all threads.
#[derive(Debug, Clone, Copy, Default)]
pub struct BytePlanes;

impl BytePlanes {
    /// The codec; it has no settings.
    pub const fn new() -> Self {
        Self
    }
}

impl Codec for BytePlanes {
    fn level(&self) -> Level {
        Level::ZSTD
    }

    fn applies(&self, _shape: &PartShape) -> bool {
        true
    }

    fn encode(&self, shape: &PartShape, raw: &[u8], out: &mut [u8]) -> Result<usize, EncodeError> {
        envelope::seal(self, shape, (raw, out), |body| {
            encode_body(shape.element(), raw, body).map_err(EncodeError::Compressor)
        })
    }

    fn decode(&self, shape: &PartShape, stored: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
        envelope::open(self, shape, (stored, out), |body, out| {
            decode_body(shape.element(), body, out)
        })
    }
}

/// What a thread keeps between parts: making contexts anew costs more than a small part.
struct EncodeScratch {
    planes: Vec<u8>,
    /// For planes of floats: entropy coding, next to no matches.
    floats: Compressor<'static>,
    /// For bytes of unknown meaning.
    bytes: Compressor<'static>,
}

struct DecodeScratch {
    planes: Vec<u8>,
    zstd: Decompressor<'static>,
}

thread_local! {
    static ENCODE: RefCell<Option<EncodeScratch>> = const { RefCell::new(None) };
    static DECODE: RefCell<Option<DecodeScratch>> = const { RefCell::new(None) };
}

impl EncodeScratch {
    fn new() -> io::Result<Self> {
        let mut floats = Compressor::new(ZSTD_LEVEL)?;
        floats.set_parameter(CParameter::MinMatch(7))?;
        floats.set_parameter(CParameter::HashLog(6))?;
        Ok(Self {
            planes: Vec::new(),
            floats,
            bytes: Compressor::new(ZSTD_LEVEL)?,
        })
    }
}

/// The scratch of this thread, made at first use.
fn get_or_make<T>(
    slot: &mut Option<T>,
    make: impl FnOnce() -> io::Result<T>,
) -> io::Result<&mut T> {
    let value = match slot.take() {
        Some(value) => value,
        None => make()?,
    };
    Ok(slot.insert(value))
}

/// Encoded size, or `None` when the planes do not fit into `out`, which is as long as `raw`.
pub(super) fn encode_body(
    element: Element,
    raw: &[u8],
    out: &mut [u8],
) -> io::Result<Option<usize>> {
    ENCODE.with_borrow_mut(|slot| {
        let EncodeScratch {
            planes,
            floats,
            bytes,
        } = get_or_make(slot, EncodeScratch::new)?;
        let zstd = if element == Element::U8 {
            bytes
        } else {
            floats
        };
        let writer = PlaneWriter { out, at: 0, zstd };
        Ok(match element.bytes() {
            1 => encode_planes(raw, planes, writer, planes::split1),
            2 => encode_planes(raw, planes, writer, planes::split2),
            _ => encode_planes(raw, planes, writer, planes::split4),
        })
    })
}

fn encode_planes<const P: usize>(
    raw: &[u8],
    scratch: &mut Vec<u8>,
    mut writer: PlaneWriter<'_>,
    split: fn(&[u8], [&mut [u8]; P]),
) -> Option<usize> {
    scratch.resize(scratch.len().max(P * CHUNK_ELEMENTS), 0);
    for chunk in raw.chunks(P * CHUNK_ELEMENTS) {
        let elements = chunk.len() / P;
        let mut regions = scratch.chunks_exact_mut(elements);
        let mut planes: [&mut [u8]; P] =
            std::array::from_fn(|_| regions.next().unwrap_or_default());
        split(chunk, planes.each_mut().map(|plane| &mut **plane));
        for plane in planes {
            writer.put(plane)?;
        }
    }
    Some(writer.at)
}

/// Appends planes to the output.
struct PlaneWriter<'a> {
    out: &'a mut [u8],
    at: usize,
    zstd: &'a mut Compressor<'static>,
}

impl PlaneWriter<'_> {
    /// `None` when the output is full: the part does not shrink.
    fn put(&mut self, plane: &[u8]) -> Option<()> {
        let (length, room) = self
            .out
            .get_mut(self.at..)?
            .split_first_chunk_mut::<LENGTH_BYTES>()?;
        let limit = room.len().min(plane.len() - plane.len() / WORTH);
        // An error means that the plane does not fit into `limit` bytes: it is not worth coding.
        let coded = match looks_like_noise(plane) {
            true => None,
            false => self
                .zstd
                .compress_to_buffer(plane, room.get_mut(..limit)?)
                .ok(),
        };
        let (len, flag) = match coded {
            Some(len) => (len, 0),
            None => {
                room.get_mut(..plane.len())?.copy_from_slice(plane);
                (plane.len(), PLANE_RAW)
            }
        };
        *length = (u32::try_from(len).ok()? | flag).to_le_bytes();
        self.at += LENGTH_BYTES + len;
        Some(())
    }
}

/// True when a sample of the plane is so even that no byte coder would gain.
///
/// Counts pairs of equal bytes in the sample: the sum of squared frequencies bounds the entropy
/// from below (Renyi entropy of order 2), so a plane is given up only when its sample holds at
/// least 7.5 bits a byte. Integer arithmetic, the same everywhere.
fn looks_like_noise(plane: &[u8]) -> bool {
    const RUN: usize = 512;
    const RUNS: usize = 8;
    if plane.len() < RUN * RUNS {
        return false;
    }
    let mut counts = [0_u32; 256];
    for run in plane.chunks(plane.len() / RUNS) {
        for byte in run.iter().take(RUN) {
            if let Some(count) = counts.get_mut(usize::from(*byte)) {
                *count += 1;
            }
        }
    }
    let sampled: u64 = counts.iter().map(|count| u64::from(*count)).sum();
    let pairs: u64 = counts.iter().map(|count| u64::from(*count).pow(2)).sum();
    pairs * 181 <= sampled * sampled // 181 is 2 to the power of 7.5
}

/// CRC of the decoded bytes.
pub(super) fn decode_body(
    element: Element,
    body: &[u8],
    out: &mut [u8],
) -> Result<u32, DecodeError> {
    DECODE.with_borrow_mut(|slot| {
        let make = || {
            Ok(DecodeScratch {
                planes: Vec::new(),
                zstd: Decompressor::new()?,
            })
        };
        let no_context = |source| DecodeError::Plane {
            chunk: 0,
            plane: 0,
            want: out.len(),
            source: Some(source),
        };
        let DecodeScratch { planes, zstd } = get_or_make(slot, make).map_err(no_context)?;
        let reader = PlaneReader {
            body,
            total: body.len(),
            zstd,
        };
        match element.bytes() {
            1 => decode_planes(reader, planes, out, planes::merge1),
            2 => decode_planes(reader, planes, out, planes::merge2),
            _ => decode_planes(reader, planes, out, planes::merge4),
        }
    })
}

fn decode_planes<const P: usize>(
    mut reader: PlaneReader<'_>,
    scratch: &mut Vec<u8>,
    out: &mut [u8],
    merge: fn([&[u8]; P], &mut [u8]),
) -> Result<u32, DecodeError> {
    scratch.resize(scratch.len().max(P * CHUNK_ELEMENTS), 0);
    let mut crc = crc32fast::Hasher::new();
    for (chunk, raw) in out.chunks_mut(P * CHUNK_ELEMENTS).enumerate() {
        let mut regions = scratch.chunks_exact_mut(raw.len() / P);
        let mut planes: [&[u8]; P] = [&[]; P];
        for (index, plane) in planes.iter_mut().enumerate() {
            let region = regions.next().unwrap_or_default();
            *plane = reader.take(chunk, index, region)?;
        }
        merge(planes, raw);
        crc.update(raw);
    }
    exact_length(reader.body, 0)?;
    Ok(crc.finalize())
}

/// Takes planes off the stored bytes.
struct PlaneReader<'a> {
    body: &'a [u8],
    total: usize,
    zstd: &'a mut Decompressor<'static>,
}

impl<'a> PlaneReader<'a> {
    /// The next plane, as long as `region`: a piece of the stored bytes, or decoded into `region`.
    fn take<'s>(
        &mut self,
        chunk: usize,
        plane: usize,
        region: &'s mut [u8],
    ) -> Result<&'s [u8], DecodeError>
    where
        'a: 's,
    {
        let (total, want) = (self.total, region.len());
        let refused = |source| DecodeError::Plane {
            chunk,
            plane,
            want,
            source,
        };
        let short = |left: usize, need: usize| DecodeError::Truncated {
            need: total - left + need,
            have: total,
        };
        let (length, rest) = self
            .body
            .split_first_chunk::<LENGTH_BYTES>()
            .ok_or_else(|| short(self.body.len(), LENGTH_BYTES))?;
        let length = u32::from_le_bytes(*length);
        let len = usize::try_from(length & !PLANE_RAW).map_err(|_| refused(None))?;
        let (data, rest) = rest
            .split_at_checked(len)
            .ok_or_else(|| short(rest.len(), len))?;
        self.body = rest;
        if length & PLANE_RAW != 0 {
            return if len == want {
                Ok(data)
            } else {
                Err(refused(None))
            };
        }
        // One frame and nothing behind it: `zstd` would go on to the next frame by itself.
        if find_frame_compressed_size(data) != Ok(len) {
            return Err(refused(None));
        }
        match self.zstd.decompress_to_buffer(data, region) {
            Ok(got) if got == want => Ok(region),
            Ok(_) => Err(refused(None)),
            Err(source) => Err(refused(Some(source))),
        }
    }
}
