//! Stores of many small blocks: how they are filled, opened and spoiled.
//!
//! Upstairs:   `index`, `index::restart`.
//! Downstairs: `kvtier_store`, and the files of a store where a fault is played.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Instant;

use kvtier_benches::report::Problem;
use kvtier_proto::units::{KIB, MIB};
use kvtier_proto::{BlockKey, NamespaceId};
use kvtier_store::disk::hollow::HollowDisk;
use kvtier_store::disk::lane::{LaneKind, open_lane};
use kvtier_store::disk::{Disk, Wait};
use kvtier_store::format::BLOCK;
use kvtier_store::mem::IoBuf;
use kvtier_store::{
    Event, PartCode, PartSpec, PutError, RecordBuilder, RecordMeta, RecoveryReport, SledCatalog,
    Store, StoreOptions,
};

use super::DEPTH;
use crate::limits::lane::Clock;
use crate::limits::noisy_arena;
use crate::limits::store::raw_record;

pub(super) type AnyStore = Store<Box<dyn Disk + Send>>;

/// Room for a record's head. Unit: bytes.
const HEAD: u64 = 4 * KIB;
/// Payload of a small block. Unit: bytes.
const SMALL: u64 = 4 * KIB;
/// Image bytes on their way to the device. Unit: bytes.
const FLYING: u64 = 16 * MIB;

/// A store: how many blocks of which size, in which segments.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub(super) namespace: NamespaceId,
    pub(super) blocks: u64,
    /// Unit: bytes.
    pub(super) payload: u64,
    /// Unit: bytes.
    pub(super) segment_size: u64,
    /// Records are not kept: only what recovery reads of a sealed segment is.
    pub(super) hollow: bool,
}

/// A store that was just opened, what was found and what it took.
pub(super) struct Opened {
    pub(super) store: AnyStore,
    pub(super) found: RecoveryReport,
    /// Wall time. Unit: seconds.
    pub(super) wall_s: f64,
    /// Time of all threads. Unit: seconds.
    pub(super) cpu_s: f64,
}

impl Shape {
    /// Segments of the usual size, full of the smallest blocks: long tables, few files.
    pub(super) fn full_segments(blocks: u64) -> Self {
        Self {
            namespace: NamespaceId(1),
            blocks,
            payload: SMALL,
            segment_size: 256 * MIB,
            hollow: false,
        }
    }

    /// As many blocks in a segment as there are of 2 MiB in one of 256 MiB: short tables, many
    /// files.
    pub(super) fn many_segments(blocks: u64) -> Self {
        Self {
            segment_size: MIB,
            hollow: true,
            ..Self::full_segments(blocks)
        }
    }

    /// `bytes` of blocks with this payload.
    pub(super) fn large_records(bytes: u64, payload: u64) -> Self {
        Self {
            payload,
            ..Self::full_segments(bytes / (payload + HEAD))
        }
    }

    /// Room for the blocks and for what every segment keeps to itself.
    pub(super) fn capacity(&self) -> u64 {
        let image = self.payload + HEAD;
        let rows = (self.segment_size - 2 * BLOCK) / (image + 128);
        (self.blocks / rows.max(1) * 51 / 50 + 8) * self.segment_size
    }

    /// Makes a store in `dir`, or goes on with the one there, and puts the blocks into it.
    pub(super) fn fill(&self, dir: &Path) -> Result<Opened, Problem> {
        let mut opened = self.open_on(dir, true, self.hollow)?;
        put_all(&mut opened.store, self)?;
        Ok(opened)
    }

    /// Opens the store in `dir`.
    pub(super) fn open(&self, dir: &Path, catalog: bool) -> Result<Opened, Problem> {
        self.open_on(dir, catalog, false)
    }

    fn open_on(&self, dir: &Path, catalog: bool, hollow: bool) -> Result<Opened, Problem> {
        let clock = Clock::start(0.0);
        let mut disk = open_lane(dir, LaneKind::Auto, DEPTH, &[])?.disk;
        if hollow {
            disk = Box::new(HollowDisk::new(disk, dir));
        }
        let mut options = StoreOptions::new(self.capacity(), [1; 16]);
        options.segment_size = self.segment_size;
        let catalog: Option<Box<dyn kvtier_store::Catalog>> = match catalog {
            true => Some(Box::new(SledCatalog::new(dir.join("catalog")))),
            false => None,
        };
        let (store, found) = Store::open(disk, options, catalog, &mut |_| ())?;
        let took = clock.stop(found.bytes);
        Ok(Opened {
            store,
            found,
            wall_s: took.seconds,
            cpu_s: took.cpu_s,
        })
    }
}

impl Opened {
    /// Ends in order. Returns the seconds that it took.
    pub(super) fn close(self) -> f64 {
        let begin = Instant::now();
        drop(self.store.close(&mut Vec::new()));
        begin.elapsed().as_secs_f64()
    }
}

/// Puts every block and waits until all are durable.
fn put_all(store: &mut AnyStore, shape: &Shape) -> Result<(), Problem> {
    let image = shape.payload + HEAD;
    let arena = noisy_arena("bench-index", 2 * FLYING)?;
    let count = usize::try_from((FLYING / image).clamp(8, 2048))?;
    let len = usize::try_from(image)?;
    let bufs: Option<Vec<IoBuf>> = (0..count).map(|_| arena.alloc(len)).collect();
    let mut bufs = bufs.ok_or("the arena is too small")?;
    let stored_len = u32::try_from(shape.payload)?;
    let part = PartSpec {
        layer: 0,
        code: PartCode::K,
        flags: 0,
        stored_len,
        raw_len: stored_len,
    };
    let (mut next, mut events) = (0, Vec::new());
    loop {
        while next < shape.blocks
            && let Some(buf) = bufs.pop()
        {
            let meta = RecordMeta {
                namespace: shape.namespace,
                ..raw_record(key(next))
            };
            let image = RecordBuilder::new(&meta, &[part]).build(buf);
            let image = image.map_err(|(_, problem)| problem)?;
            match store.put(next, image) {
                Ok(()) => next += 1,
                Err((image, PutError::Busy { .. })) => {
                    bufs.push(image.into_buf());
                    break;
                }
                Err((_, problem)) => return Err(problem.into()),
            }
        }
        if next == shape.blocks && bufs.len() == count {
            return Ok(());
        }
        store.step(Wait::One, &mut events);
        for event in events.drain(..) {
            if let Event::Put { image, result, .. } = event {
                result?;
                bufs.push(image.ok_or("the device kept a buffer")?.into_buf());
            }
        }
    }
}

/// Key of block `number`: as good as random, as keys are.
fn key(number: u64) -> BlockKey {
    let mut key = [0; 32];
    let mut mixed = number;
    for word in key.chunks_mut(8) {
        mixed = mixed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let hash = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word.copy_from_slice(&(hash ^ (hash >> 27)).to_le_bytes());
    }
    BlockKey(key)
}

/// Memory of a process that is neither shared nor a file's. Unit: bytes.
pub(super) fn anonymous_bytes(process: &str) -> Result<u64, Problem> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let kib: u64 = line
        .and_then(|line| line.split_whitespace().nth(1))
        .ok_or("the kernel does not tell RssAnon")?
        .parse()?;
    Ok(kib * 1024)
}

/// A store keeps every segment open.
pub(super) fn allow_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // A store that needs more than there are says so itself.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// Takes the catalog's files below `dir` out of the page cache, as after a reboot.
pub(super) fn forget_pages(dir: &Path) -> Result<(), Problem> {
    for entry in std::fs::read_dir(dir.join("catalog"))? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            let file = std::fs::File::open(entry.path())?;
            file.sync_all()?;
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
    }
    Ok(())
}

/// Clears the last block of every segment: the trailer, without which there is no footer.
pub(super) fn cut_footers(dir: &Path) -> Result<(), Problem> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "kvs")
            && path.file_stem().is_some_and(|name| name != "superblock")
        {
            let file = std::fs::OpenOptions::new().write(true).open(&path)?;
            let last = file.metadata()?.len().saturating_sub(BLOCK);
            file.write_all_at(&vec![0; usize::try_from(BLOCK)?], last)?;
            file.sync_all()?;
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
    }
    Ok(())
}
