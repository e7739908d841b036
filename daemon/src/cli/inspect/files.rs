//! Reads the files of a disk tier: superblock, segment headers, footers and record headers.
//!
//! Upstairs:   `inspect`.
//! Downstairs: the decoders of `kvtier_store::format`, which take any bytes.
//!
//! Not here on purpose: nothing is opened for writing, and nothing is read of a payload.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use kvtier_store::format::record::HEAD_LEN_MAX;
use kvtier_store::format::segment::{segment_name, segment_number};
use kvtier_store::format::superblock::{SLOT_LEN, SLOTS, SUPERBLOCK_NAME};
use kvtier_store::format::{BLOCK, Footer, SegmentHeader, Superblock, Trailer};
use kvtier_store::{Head, Header, Summary};

use crate::cli::connect::CliError;

/// The directory of a disk tier.
pub(in crate::cli) struct Folder {
    path: PathBuf,
    numbers: Vec<u32>,
}

/// Where the list of a segment's records comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// The footer of a sealed segment.
    Footer,
    /// A walk from record to record.
    Walk,
}

/// One segment file as far as it can be read.
pub(super) struct Segment {
    pub(super) number: u32,
    pub(super) len: u64,
    pub(super) header: Option<SegmentHeader>,
    /// True when block 0 is all zeros.
    pub(super) blank: bool,
    pub(super) source: Source,
    pub(super) records: Vec<Summary>,
    /// Blocks that a walk found and that are no record of this life of the segment.
    pub(super) refused: u64,
}

impl Segment {
    pub(super) fn epoch(&self) -> u64 {
        self.header.map_or(0, |header| header.epoch)
    }

    /// Bytes that records take, padding included.
    pub(super) fn used(&self) -> u64 {
        self.records
            .iter()
            .map(|record| u64::from(record.place.len))
            .sum()
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> CliError {
    CliError::Usage(format!("{} cannot be read: {error}", path.display()))
}

impl Folder {
    pub(in crate::cli) fn open(path: &Path) -> Result<Self, CliError> {
        let entries = std::fs::read_dir(path).map_err(|error| unreadable(path, &error))?;
        let (mut numbers, mut superblock) = (Vec::new(), false);
        for entry in entries {
            let name = entry.map_err(|error| unreadable(path, &error))?.file_name();
            let name = name.to_string_lossy();
            numbers.extend(segment_number(&name));
            superblock |= name == SUPERBLOCK_NAME;
        }
        if numbers.is_empty() && !superblock {
            return Err(CliError::Usage(format!(
                "{} is not a disk tier: it has neither {SUPERBLOCK_NAME} nor segment files. \
                 Accepted: the directory that disk.path names",
                path.display()
            )));
        }
        numbers.sort_unstable();
        Ok(Self {
            path: path.to_owned(),
            numbers,
        })
    }

    /// Numbers of the segment files, in order.
    pub(super) fn segments(&self) -> impl Iterator<Item = u32> + '_ {
        self.numbers.iter().copied()
    }

    /// The newest sound superblock.
    pub(super) fn superblock(&self) -> Result<Option<Superblock>, CliError> {
        let path = self.path.join(SUPERBLOCK_NAME);
        let Ok(file) = File::open(&path) else {
            return Ok(None);
        };
        let slot = |slot| Superblock::decode(&read(&file, slot * SLOT_LEN, SLOT_LEN)?);
        Ok((0..SLOTS)
            .filter_map(slot)
            .max_by_key(|superblock| superblock.revision))
    }

    /// Opens a segment and finds its records.
    pub(super) fn segment(&self, number: u32) -> Result<Segment, CliError> {
        let path = self.path.join(segment_name(number));
        let (file, len) = open(&path)?;
        let first = read(&file, 0, BLOCK).unwrap_or_default();
        let header = SegmentHeader::decode(&first).filter(|header| header.segment == number);
        let mut segment = Segment {
            number,
            len,
            blank: first.iter().all(|byte| *byte == 0),
            header,
            source: Source::Walk,
            records: Vec::new(),
            refused: 0,
        };
        match footer(&file, &segment) {
            Some(footer) => {
                segment.source = Source::Footer;
                segment.records = footer.rows;
            }
            None => walk(&file, &mut segment),
        }
        Ok(segment)
    }

    /// The head room of the record at `offset`.
    pub(super) fn head(&self, segment: &Segment, offset: u64) -> Result<Head, CliError> {
        let (file, len) = open(&self.path.join(segment_name(segment.number)))?;
        let room = u64::from(HEAD_LEN_MAX).min(len.saturating_sub(offset));
        let bytes = read(&file, offset, room).unwrap_or_default();
        Head::decode(&bytes).map_err(|miss| {
            let offsets: Vec<String> = segment
                .records
                .iter()
                .map(|record| record.place.offset.to_string())
                .take(8)
                .collect();
            CliError::Usage(format!(
                "--offset is {offset}, where no record begins ({}); records begin at {} ..",
                miss.as_str(),
                offsets.join(", ")
            ))
        })
    }
}

fn open(path: &Path) -> Result<(File, u64), CliError> {
    let opened = File::open(path).and_then(|file| {
        let len = file.metadata()?.len();
        Ok((file, len))
    });
    opened.map_err(|error| unreadable(path, &error))
}

/// `len` bytes at `at`, or nothing when the file ends before.
fn read(file: &File, at: u64, len: u64) -> Option<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len).ok()?];
    file.read_exact_at(&mut bytes, at).ok()?;
    Some(bytes)
}

/// The footer, when it is sound and of this life of the segment.
fn footer(file: &File, segment: &Segment) -> Option<Footer> {
    let header = segment.header?;
    let last = read(file, segment.len.checked_sub(BLOCK)?, BLOCK)?;
    let trailer = Trailer::decode(&last, segment.len)?;
    let same = trailer.store_id == header.store_id
        && trailer.segment == header.segment
        && trailer.epoch == header.epoch;
    let table = read(file, trailer.table_at, trailer.table_len()).filter(|_| same)?;
    Footer::decode(&table, trailer)
}

/// From record to record, and from block to block where there is none: to the very end, because
/// records are written side by side and a gap may be one that was never finished.
fn walk(file: &File, segment: &mut Segment) {
    let Some(header) = segment.header else {
        return;
    };
    let mut at = BLOCK;
    while let Some(block) = read(file, at, BLOCK) {
        let found = Header::decode(&block).ok().map(|found| found.summary);
        let found = found.filter(|found| {
            let place = &found.place;
            (place.segment, place.offset, place.epoch) == (segment.number, at, header.epoch)
        });
        if let Some(found) = found {
            at = at.saturating_add(u64::from(found.place.len));
            segment.records.push(found);
        } else {
            segment.refused += u64::from(block.iter().any(|byte| *byte != 0));
            at += BLOCK;
        }
    }
}
