//! Between raw blocks in host memory and encoded records: pure CPU work on buffers.
//!
//! Upstairs:   `tier::Tiers` runs these on worker threads.
//! Downstairs: `kvtier_kernels` codes parts, `kvtier_store::image` builds records; `runs` shares
//!             the parts of a large block among workers.
//!
//! Not here on purpose: no choice of level, no I/O, no lock.

use std::time::Duration;

use kvtier_kernels::codec::Restored;
use kvtier_kernels::{Codec, PartShape, Registry};
use kvtier_proto::{BlockLayout, Level, Miss, PartCode};
use kvtier_store::mem::IoBuf;
use kvtier_store::{ImageLayout, PartSpec, Record, RecordBuilder, RecordImage, RecordMeta};

use super::runs;
use crate::block::{BlockFacts, BlockId};

/// Why a block could not be encoded. It stays in host memory only.
#[derive(Debug, thiserror::Error)]
#[error("block {key} cannot be encoded: {problem}")]
pub struct EncodeFailed {
    key: String,
    problem: String,
}

/// Why a record could not be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodeFailed {
    /// It is a miss for this.
    Miss(Miss),
    /// These tables are not loaded.
    Tables(u32),
}

impl From<Miss> for DecodeFailed {
    fn from(miss: Miss) -> Self {
        Self::Miss(miss)
    }
}

/// A raw block that is to be encoded.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Identity.
    pub id: BlockId,
    /// Facts.
    pub facts: &'a BlockFacts,
    /// The raw bytes.
    pub payload: &'a [u8],
}

/// Memory that the record of a block may take at most under a codec. Unit: bytes.
pub fn image_bound(codec: &dyn Codec, facts: &BlockFacts) -> Result<ImageLayout, String> {
    let bounds = shapes(facts)?.into_iter().map(|shape| {
        u32::try_from(codec.stored_bytes_max(&shape)).map_err(|_| "a part is too large".to_owned())
    });
    let bounds = bounds.collect::<Result<Vec<_>, _>>()?;
    ImageLayout::new(bounds).map_err(|problem| problem.to_string())
}

/// True when the codec takes every part of such a block.
pub fn applies(codec: &dyn Codec, facts: &BlockFacts) -> bool {
    shapes(facts).is_ok_and(|shapes| shapes.iter().all(|shape| codec.applies(shape)))
}

/// Encodes a block into `scratch`, which is at least as long as [`image_bound`] says, on up to
/// `workers` threads. Says how long they ran, all together.
pub fn encode(
    codec: &dyn Codec,
    source: Source<'_>,
    mut scratch: IoBuf,
    workers: usize,
) -> Result<(RecordImage, Duration), EncodeFailed> {
    let Source { id, facts, payload } = source;
    let failed = |problem: String| EncodeFailed {
        key: id.key.short(),
        problem,
    };
    let shapes = shapes(facts).map_err(failed)?;
    let bound = image_bound(codec, facts).map_err(failed)?;
    let room = scratch.get_mut(bound.head_len as usize..);
    let room = room.unwrap_or_default();
    let layout = facts.layout.as_ref();
    let alone = shapes.iter().all(|shape| codec.needs(shape).is_empty());
    let coded = match alone {
        true => runs::encode(codec, layout, &shapes, payload, room, workers),
        false => in_order(codec, layout, &shapes, payload, room),
    };
    let (stored, time) = coded.map_err(failed)?;
    let specs = layout.parts().iter().zip(stored);
    let specs = specs.map(|(part, stored)| spec(part, stored));
    let specs = specs.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    let meta = meta(id, facts, codec);
    let builder = RecordBuilder::new(&meta, &specs).with_head_len(bound.head_len);
    let image = builder.build(scratch);
    let image = image.map_err(|(_, problem)| failed(problem.to_string()))?;
    Ok((image, time))
}

/// Encodes parts that others are predicted from: one after the other, each after those that it
/// needs as decoding gives them.
fn in_order(
    codec: &dyn Codec,
    layout: &BlockLayout,
    shapes: &[PartShape],
    payload: &[u8],
    room: &mut [u8],
) -> Result<(Vec<usize>, Duration), String> {
    let begin = std::time::Instant::now();
    // What a lossy level restores is not what was saved.
    let mut restored = match codec.exact() {
        true => Vec::new(),
        false => vec![0; payload.len()],
    };
    let needed: Vec<_> = shapes.iter().flat_map(|shape| codec.needs(shape)).collect();
    let (mut sizes, mut end) = (Vec::with_capacity(shapes.len()), 0);
    for (part, shape) in layout.parts().iter().zip(shapes) {
        let raw = payload.get(part.offset..part.offset + part.len);
        let raw = raw.unwrap_or_default();
        let out = room.get_mut(end..).unwrap_or_default();
        let size = if codec.exact() {
            let before = payload.get(..part.offset).unwrap_or_default();
            codec.encode_after(shape, raw, &Before::new(layout, before), out)
        } else {
            let (before, here) = restored.split_at_mut(part.offset);
            let before = Before::new(layout, before);
            match needed.contains(&(part.layer, part.code)) {
                true => {
                    let here = here.get_mut(..part.len).unwrap_or_default();
                    codec.encode_restoring(shape, raw, &before, (out, here))
                }
                false => codec.encode_after(shape, raw, &before, out),
            }
        };
        let size = size.map_err(|problem| problem.to_string())?;
        end += size;
        sizes.push(size);
    }
    Ok((sizes, begin.elapsed()))
}

/// The parts of a block that lie before one of them.
struct Before<'a> {
    layout: &'a BlockLayout,
    bytes: &'a [u8],
}

impl<'a> Before<'a> {
    fn new(layout: &'a BlockLayout, bytes: &'a [u8]) -> Self {
        Self { layout, bytes }
    }
}

impl Restored for Before<'_> {
    fn part(&self, layer: u32, code: PartCode) -> Option<&[u8]> {
        let part = self.layout.part(layer, code)?;
        self.bytes.get(part.offset..part.offset + part.len)
    }
}

/// Decodes a verified record into `out`, which is exactly as long as the raw payload, on up to
/// `workers` threads. Says how long they ran, all together.
pub fn decode(
    codecs: &Registry,
    record: &Record,
    facts: &BlockFacts,
    out: &mut [u8],
    workers: usize,
) -> Result<Duration, DecodeFailed> {
    let header = &record.head().header;
    let (level, tables) = (header.summary.level, header.codec_tables);
    let codec = decoder(codecs, level, tables)?;
    let layout = facts.layout.as_ref();
    check_parts(record, layout)?;
    let shapes = shapes(facts).map_err(|_| Miss::WrongLayout)?;
    if shapes.iter().all(|shape| codec.needs(shape).is_empty()) {
        return Ok(runs::decode(codec, record, layout, &shapes, out, workers)?);
    }
    let begin = std::time::Instant::now();
    for (index, (part, shape)) in layout.parts().iter().zip(&shapes).enumerate() {
        let (_, stored) = record.part(index).ok_or(Miss::Undecodable)?;
        let (before, here) = out
            .split_at_mut_checked(part.offset)
            .ok_or(Miss::WrongLayout)?;
        let here = here.get_mut(..part.len).ok_or(Miss::WrongLayout)?;
        let decoded = codec.decode_after(shape, stored, &Before::new(layout, before), here);
        decoded.map_err(|_| Miss::Undecodable)?;
    }
    Ok(begin.elapsed())
}

/// What decodes records of a level that were coded with these tables.
fn decoder(codecs: &Registry, level: Level, tables: u32) -> Result<&dyn Codec, DecodeFailed> {
    codecs.decoder(level, tables).map_err(|_| match tables {
        // Nobody knows the level, or it needs no tables any more: a matter of versions.
        0 => DecodeFailed::Miss(Miss::Unsupported),
        tables => DecodeFailed::Tables(tables),
    })
}

/// The record has exactly the parts that the layout says.
pub fn check_parts(record: &Record, layout: &BlockLayout) -> Result<(), Miss> {
    let stored = record.head().parts();
    let alike = stored.len() == layout.parts().len()
        && stored.iter().zip(layout.parts()).all(|(stored, part)| {
            u32::from(stored.layer) == part.layer
                && stored.code == part.code
                && stored.raw_len as usize == part.len
        });
    if alike {
        Ok(())
    } else {
        Err(Miss::WrongLayout)
    }
}

/// What codecs are told of the parts of a block, in its order.
pub(super) fn shapes(facts: &BlockFacts) -> Result<Vec<PartShape>, String> {
    let shape = |part| {
        let shape = PartShape::of(part, facts.order).map_err(|problem| problem.to_string())?;
        let shape = shape.among_layers(facts.layout.layers());
        Ok(shape.at_position(facts.position))
    };
    facts.layout.parts().iter().map(shape).collect()
}

fn spec(part: &kvtier_proto::Part, stored: usize) -> Result<PartSpec, String> {
    let short = |len: usize| u32::try_from(len).map_err(|_| "a part is too large".to_owned());
    Ok(PartSpec {
        layer: u16::try_from(part.layer).map_err(|_| "too many layers".to_owned())?,
        code: part.code,
        flags: 0,
        stored_len: short(stored)?,
        raw_len: short(part.len)?,
    })
}

fn meta(id: BlockId, facts: &BlockFacts, codec: &dyn Codec) -> RecordMeta {
    RecordMeta {
        namespace: id.namespace,
        key: id.record_key(),
        parent: facts.parent,
        layout: facts.fingerprint,
        kind: id.kind,
        level: codec.level(),
        through: facts.through,
        tokens: facts.layout.tokens(),
        position: facts.position,
        codec_tables: codec.tables(),
    }
}
