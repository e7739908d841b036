//! Between raw blocks in host memory and encoded records: pure CPU work on buffers.
//!
//! Upstairs:   `tier::Tiers` runs these on worker threads.
//! Downstairs: `kvtier_kernels` codes parts, `kvtier_store::image` builds records.
//!
//! Not here on purpose: no choice of level, no I/O, no lock.

use kvtier_kernels::{Codec, PartShape, Registry};
use kvtier_proto::{BlockLayout, Miss};
use kvtier_store::mem::IoBuf;
use kvtier_store::{ImageLayout, PartSpec, Record, RecordBuilder, RecordImage, RecordMeta};

use crate::block::{BlockFacts, BlockId, HostBlock};

/// Why a block could not be encoded. It stays in host memory only.
#[derive(Debug, thiserror::Error)]
#[error("block {key} cannot be encoded: {problem}")]
pub struct EncodeFailed {
    key: String,
    problem: String,
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

/// Encodes a block into `scratch`, which is at least as long as [`image_bound`] says.
pub fn encode(
    codec: &dyn Codec,
    block: &HostBlock,
    mut scratch: IoBuf,
) -> Result<RecordImage, EncodeFailed> {
    let failed = |problem: String| EncodeFailed {
        key: block.id().key.short(),
        problem,
    };
    let facts = block.facts();
    let bound = image_bound(codec, facts).map_err(failed)?;
    let mut parts = Vec::with_capacity(facts.layout.parts().len());
    let mut end = bound.head_len as usize;
    for (part, shape) in facts
        .layout
        .parts()
        .iter()
        .zip(shapes(facts).map_err(failed)?)
    {
        let raw = block
            .payload()
            .get(part.offset..part.offset + part.len)
            .unwrap_or_default();
        let room = scratch.get_mut(end..).unwrap_or_default();
        let stored = codec
            .encode(&shape, raw, room)
            .map_err(|e| failed(e.to_string()))?;
        end += stored;
        parts.push(spec(part, stored).map_err(failed)?);
    }
    let meta = meta(block.id(), facts, codec);
    let builder = RecordBuilder::new(&meta, &parts).with_head_len(bound.head_len);
    builder
        .build(scratch)
        .map_err(|(_, problem)| failed(problem.to_string()))
}

/// Decodes a verified record into `out`, which is exactly as long as the raw payload.
pub fn decode(
    codecs: &Registry,
    record: &Record,
    facts: &BlockFacts,
    out: &mut [u8],
) -> Result<(), Miss> {
    let header = &record.head().header;
    let codec = codecs
        .decoder(header.summary.level, header.codec_tables)
        .map_err(|_| Miss::Unsupported)?;
    check_parts(record, &facts.layout)?;
    for (index, (part, shape)) in facts
        .layout
        .parts()
        .iter()
        .zip(shapes(facts).map_err(|_| Miss::WrongLayout)?)
        .enumerate()
    {
        let (_, stored) = record.part(index).ok_or(Miss::Undecodable)?;
        let raw = out
            .get_mut(part.offset..part.offset + part.len)
            .ok_or(Miss::WrongLayout)?;
        codec
            .decode(&shape, stored, raw)
            .map_err(|_| Miss::Undecodable)?;
    }
    Ok(())
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

fn shapes(facts: &BlockFacts) -> Result<Vec<PartShape>, String> {
    let shape = |part| PartShape::of(part, facts.order).map_err(|problem| problem.to_string());
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
        tokens: facts.layout.tokens(),
        position: facts.position,
        codec_tables: codec.tables(),
    }
}
