//! An engine's own pool as a region: bytes go from its slots and back, whatever its shape, and an
//! engine that lies, shrinks or dies harms nobody else.
//!
//! Upstairs:   `main`.
//! Downstairs: the harness. A pool is read and written through its descriptor.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use kvtier_client::{
    Acknowledge, Bytes, Client, CommitFailure, Endpoint, Error, LeasedBlock, Miss, PayloadKind,
    Piece, RegionGeometry, RestoreEvent, RestoreOptions, SaveBlock, SaveOutcome, Session,
    SessionOptions, Tier, TwoEnded,
};
use kvtier_proto::v1;
use kvtier_tests::harness::daemon::{self, Daemon};
use kvtier_tests::harness::{Options, blocks, eventually, run};
use rustix::fs::{MemfdFlags, SealFlags};
use tonic::Code;

use super::LIMIT;
use super::requests::{opened, refused, still_works};

/// Bytes between rows, and behind slots, that nobody may touch.
const GAP: u64 = 64;
const FILLER: u8 = 0xEE;

/// Memory of an engine: a slot's parts lie apart, and the rows of a part with gaps between them.
struct Pool {
    file: File,
    geometry: RegionGeometry,
    bytes: u64,
}

/// Whether the pool can shrink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    Sealed,
    Open,
}

impl Pool {
    /// A layer-first pool for full blocks of the session's model.
    fn new(session: &Session, slots: u32, kept: Kept) -> Self {
        let layout = session.layout(PayloadKind::Kv, session.model().block_tokens);
        let mut offset = 4096;
        let mut pieces = Vec::new();
        for part in layout.unwrap().parts() {
            let row_bytes = (part.len / part.rows as usize) as u64;
            let row_stride = row_bytes + GAP;
            let slot_stride = u64::from(part.rows) * row_stride + GAP;
            pieces.push(Piece {
                offset,
                slot_stride,
                rows: part.rows,
                row_bytes,
                row_stride,
            });
            offset += u64::from(slots) * slot_stride;
        }
        let geometry = RegionGeometry {
            kind: PayloadKind::Kv,
            slots,
            pieces,
        };
        let file = memory(offset, kept);
        let filler = vec![FILLER; usize::try_from(offset).unwrap()];
        file.write_all_at(&filler, 0).unwrap();
        Self {
            file,
            geometry,
            bytes: offset,
        }
    }

    async fn register(&self, session: &Session) -> kvtier_client::EngineRegion {
        let geometry = self.geometry.clone();
        let registered = session.register_region(&self.file, self.bytes, geometry);
        registered.await.unwrap()
    }

    /// Puts a block's payload into a slot, as an engine computes it there.
    fn fill(&self, slot: u32, block: &SaveBlock) {
        let payload = self.payload(block);
        for run in self.geometry.runs(slot) {
            let bytes = &payload[run.from..run.from + run.len];
            self.file.write_all_at(bytes, run.at).unwrap();
        }
    }

    fn holds(&self, slot: u32, block: &SaveBlock) -> bool {
        self.read(slot) == self.payload(block)
    }

    fn read(&self, slot: u32) -> Vec<u8> {
        let mut payload = vec![0; usize::try_from(self.geometry.slot_bytes().unwrap()).unwrap()];
        for run in self.geometry.runs(slot) {
            let into = &mut payload[run.from..run.from + run.len];
            self.file.read_exact_at(into, run.at).unwrap();
        }
        payload
    }

    fn payload(&self, block: &SaveBlock) -> Vec<u8> {
        let len = usize::try_from(self.geometry.slot_bytes().unwrap()).unwrap();
        blocks::payload(&block.key, block.kind, len)
    }

    /// Every byte of the file that is in none of these slots.
    fn rest_is_untouched(&self, slots: impl IntoIterator<Item = u32>) -> bool {
        let mut whole = vec![0; usize::try_from(self.bytes).unwrap()];
        self.file.read_exact_at(&mut whole, 0).unwrap();
        for slot in slots {
            for run in self.geometry.runs(slot) {
                let at = usize::try_from(run.at).unwrap();
                whole[at..at + run.len].fill(FILLER);
            }
        }
        whole.iter().all(|byte| *byte == FILLER)
    }
}

fn memory(bytes: u64, kept: Kept) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("kvtier-pool", flags).unwrap());
    file.set_len(bytes).unwrap();
    if kept == Kept::Sealed {
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    }
    file
}

fn options() -> Options {
    Options::default().trusting_own_user()
}

/// The first slots of a pool, in another order than the blocks.
fn shuffled(count: usize) -> Vec<u32> {
    let count = u32::try_from(count).unwrap();
    (0..count).map(|at| (at * 7 + 3) % count).collect()
}

async fn save(pool: &Pool, region: &kvtier_client::EngineRegion, set: &[SaveBlock]) {
    let slots = shuffled(set.len());
    for (block, slot) in set.iter().zip(&slots) {
        pool.fill(*slot, block);
    }
    let blocks: Vec<_> = set.iter().copied().zip(slots).collect();
    let outcomes = region.save(&blocks, Acknowledge::Durable).await.unwrap();
    let stored = |outcome: &SaveOutcome| outcome.is_stored(Acknowledge::Durable);
    assert!(outcomes.iter().all(stored), "{outcomes:?}");
}

// Goal: the engine copies nothing, and every byte arrives: from its slots to host memory and the
// device, and from either into other slots of a pool with gaps, which stay as they were.
#[test]
fn blocks_go_from_engine_slots_and_back_into_others_byte_for_byte() {
    run(LIMIT, async {
        for (kept, level) in [(Kept::Sealed, "raw"), (Kept::Open, "lossless")] {
            let mut daemon = Daemon::start(options().level(level));
            let session = daemon.session(&blocks::gqa()).await;
            let pool = Pool::new(&session, 40, kept);
            let region = pool.register(&session).await;
            let set = blocks::chain(&session, 1, 16 * 40, PayloadKind::Kv);
            save(&pool, &region, &set).await;
            // What lies in slots is as good as what was filled through staging memory.
            blocks::restore_all(&session, &set).await;
            drop((region, session));
            for tier in [Tier::Disk, Tier::Host] {
                if tier == Tier::Disk {
                    daemon.restart();
                }
                let session = daemon.session(&blocks::gqa()).await;
                let pool = Pool::new(&session, 60, kept);
                let region = pool.register(&session).await;
                let slots: Vec<u32> = shuffled(40).iter().map(|slot| slot + 11).collect();
                let keys = blocks::keys(&set);
                let restore = region
                    .restore(&keys, &slots, RestoreOptions::default())
                    .await;
                let restored = restore.unwrap().collect().await.unwrap();
                assert_eq!((restored.usable_blocks, restored.blocks.len()), (40, 0));
                for (placed, (block, slot)) in restored.placed.iter().zip(set.iter().zip(&slots)) {
                    assert_eq!((placed.key(), placed.slot()), (block.key, *slot));
                    assert_eq!(placed.tier(), tier, "{kept:?}");
                    assert!(pool.holds(*slot, block), "{kept:?}, {tier:?}, slot {slot}");
                }
                assert_eq!(restored.placed.len(), 40);
                assert!(pool.rest_is_untouched(slots));
            }
            let bytes = (set.len() * (32 << 10)) as f64;
            let moved = |way| format!("kvtier_engine_region_moved_bytes_total{{way=\"{way}\"}}");
            let metrics = daemon.metrics();
            assert_eq!(metrics.get(&moved("restored")), 2.0 * bytes);
            assert_eq!(metrics.get("kvtier_leases"), 0.0);
            still_works(&mut daemon, 9).await;
        }
    });
}

#[test]
fn saves_of_known_blocks_and_of_wrong_sizes_or_slots_move_nothing() {
    run(LIMIT, async {
        let daemon = Daemon::start(options());
        let session = daemon.session(&blocks::gqa()).await;
        let pool = Pool::new(&session, 8, Kept::Sealed);
        let region = pool.register(&session).await;
        let set = blocks::chain(&session, 1, 16 * 4, PayloadKind::Kv);
        save(&pool, &region, &set).await;
        // Other bytes under known keys are not looked at.
        let again: Vec<_> = set.iter().copied().zip(4..8).collect();
        let outcomes = region.save(&again, Acknowledge::Durable).await.unwrap();
        let already = SaveOutcome::Already(Acknowledge::Durable);
        assert_eq!(outcomes, [already; 4]);
        let short = blocks::chain(&session, 2, 5, PayloadKind::Kv);
        let refused = region.save(&[(short[0], 0)], Acknowledge::Accepted).await;
        let text = refused.unwrap_err().to_string();
        assert!(
            text.contains("blocks[0]") && text.contains("exactly 32768"),
            "{text}"
        );
        let outside = region.save(&[(set[0], 8)], Acknowledge::Accepted).await;
        assert!(
            outside
                .unwrap_err()
                .to_string()
                .contains("slot 8; accepted: less than 8")
        );
        // Nothing is left in use by what was refused.
        save(
            &pool,
            &region,
            &blocks::chain(&session, 3, 16 * 8, PayloadKind::Kv),
        )
        .await;
        // A block that is shorter than a slot does not come into one.
        blocks::save_durable(&session, &short).await;
        let keys = blocks::keys(&short);
        let restore = region.restore(&keys, &[0], RestoreOptions::default()).await;
        let restored = restore.unwrap().collect().await.unwrap();
        assert_eq!(restored.missed, [(0, Miss::Region)]);
    });
}

#[test]
fn an_untrusted_user_is_refused_with_the_setting_that_would_trust_him() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default());
        let session = daemon.session(&blocks::gqa()).await;
        let pool = Pool::new(&session, 4, Kept::Sealed);
        let geometry = pool.geometry.clone();
        let refused = session
            .register_region(&pool.file, pool.bytes, geometry)
            .await;
        let refused = refused.unwrap_err();
        assert!(matches!(refused, Error::Refused { .. }), "{refused:?}");
        assert!(
            refused.to_string().contains("regions.trusted_uids"),
            "{refused}"
        );
        let name = "kvtier_engine_region_refused_total{reason=\"untrusted\"}";
        assert_eq!(daemon.metrics().get(name), 1.0);
        assert!(daemon.log().contains("an engine's region was refused"));
        still_works(&mut daemon, 1).await;
    });
}

#[test]
fn files_that_cannot_be_used_are_refused_with_the_reason() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(options());
        let session = daemon.session(&blocks::gqa()).await;
        let pool = Pool::new(&session, 4, Kept::Sealed);
        let on_disk = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        on_disk.set_len(pool.bytes).unwrap();
        let read_only = format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&pool.file)
        );
        let read_only = File::open(read_only).unwrap();
        let frozen = memory(pool.bytes, Kept::Sealed);
        rustix::fs::fcntl_add_seals(&frozen, SealFlags::FUTURE_WRITE).unwrap();
        let small = memory(pool.bytes - 1, Kept::Sealed);
        let cases = [
            (
                on_disk,
                "accepted: a memfd or a file on tmpfs",
                "not_memory",
            ),
            (read_only, "accepted: O_RDWR", "not_writable"),
            (frozen, "F_SEAL_FUTURE_WRITE", "sealed"),
            (small, "smaller than the region", "too_small"),
        ];
        for (file, said, reason) in cases {
            let geometry = pool.geometry.clone();
            let refused = session.register_region(&file, pool.bytes, geometry).await;
            let text = refused.unwrap_err().to_string();
            assert!(text.contains(said), "{reason}: {text}");
            let name = format!("kvtier_engine_region_refused_total{{reason=\"{reason}\"}}");
            assert_eq!(daemon.metrics().get(&name), 1.0);
        }
        still_works(&mut daemon, 1).await;
    });
}

/// A request for a region of these bytes, as a careless engine might send it.
async fn ask(
    session: &mut kvtier_tests::harness::raw::RawSession,
    bytes: u64,
    geometry: Option<v1::RegionGeometry>,
    replaces: &[u8],
) -> Result<v1::RegisterRegionReply, tonic::Status> {
    let request = v1::RegisterRegionRequest {
        session: session.token(),
        bytes,
        purpose: v1::RegionPurpose::Engine.into(),
        geometry,
        replaces: replaces.to_vec().into(),
    };
    let reply = session.rpc.register_region(request).await;
    reply.map(tonic::Response::into_inner)
}

#[test]
fn geometries_and_slots_that_cannot_be_are_refused_by_field() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(options());
        let sdk = daemon.session(&blocks::gqa()).await;
        let good = v1::RegionGeometry::from(&Pool::new(&sdk, 4, Kept::Sealed).geometry);
        let mut session = opened(&daemon).await;
        let with = |change: fn(&mut v1::RegionGeometry)| {
            let mut geometry = good.clone();
            change(&mut geometry);
            Some(geometry)
        };
        let bad = Code::InvalidArgument;
        let cases = [
            (None, &["geometry is missing"][..]),
            (with(|one| one.kind = 77), &["kind"]),
            (
                with(|one| one.kind = v1::PayloadKind::Latent.into()),
                &["geometry.kind is latent"],
            ),
            (
                with(|one| one.slots = u32::MAX),
                &["geometry.slots", "accepted: 1 to"],
            ),
            (
                with(|one| one.pieces.clear()),
                &["geometry.pieces", "1 to 4096"],
            ),
            (
                with(|one| one.pieces[3].offset = u64::MAX),
                &["pieces[3]", "within the region's"],
            ),
            (
                with(|one| one.pieces[2].row_stride = 1),
                &["pieces[2].row_stride is 1"],
            ),
            (
                with(|one| one.pieces.truncate(9)),
                &["exactly 32768, the payload"],
            ),
        ];
        for (geometry, parts) in cases {
            refused(ask(&mut session, 1 << 20, geometry, b"").await, bad, parts);
        }
        for bytes in [0, u64::MAX] {
            let answer = ask(&mut session, bytes, Some(good.clone()), b"").await;
            refused(answer, bad, &["bytes is", "regions.session_max"]);
        }
        let own = session.token();
        let answer = ask(&mut session, 1 << 20, Some(good.clone()), &own).await;
        refused(answer, bad, &["replaces"]);
        for _ in 0..16 {
            ask(&mut session, 1 << 20, Some(good.clone()), b"")
                .await
                .unwrap();
        }
        let more = ask(&mut session, 1 << 20, Some(good.clone()), b"").await;
        refused(
            more,
            Code::ResourceExhausted,
            &["regions of an engine's memory", "16"],
        );
        let into = |region, slots: &[u32]| {
            Some(v1::IntoSlots {
                region,
                slots: slots.to_vec(),
            })
        };
        let cases = [
            (into(99, &[0, 1]), "into.region is 99"),
            (
                into(1, &[0]),
                "into.slots is 1 entries long; accepted: 2 entries",
            ),
            (into(1, &[0, 4]), "into.slots is slot 4 of 4"),
            (into(1, &[2, 2]), "into.slots is slot 2 twice"),
        ];
        for (into, part) in cases {
            let start = v1::RestoreStart {
                session: session.token(),
                keys: vec![super::requests::key(1), super::requests::key(2)],
                kind: super::requests::KV,
                into,
                ..v1::RestoreStart::default()
            };
            let command = v1::RestoreCommand {
                restore_id: 1,
                command: Some(v1::restore_command::Command::Start(start)),
            };
            let stream = tokio_stream::iter(vec![command]);
            let mut events = session.rpc.restore(stream).await.unwrap().into_inner();
            refused(events.message().await, bad, &[part]);
        }
        still_works(&mut daemon, 1).await;
    });
}

// Goal: an engine that truncates its pool, before or during restores and saves, costs itself
// misses.
#[test]
fn a_pool_that_shrinks_under_the_daemon_is_a_miss_and_the_daemon_lives() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(options().host_mib(64));
        let session = daemon.session(&blocks::wide()).await;
        let set = blocks::chain(&session, 1, 16 * 40, PayloadKind::Kv);
        blocks::save_durable(&session, &set).await;
        let keys = blocks::keys(&set);
        let slots: Vec<u32> = (0..40).collect();
        let mut lost = 0;
        for round in 0..8u64 {
            let pool = Pool::new(&session, 40, Kept::Open);
            let region = pool.register(&session).await;
            let (file, len) = (pool.file.try_clone().unwrap(), pool.bytes);
            let shrinking = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(round));
                file.set_len(len / 2).unwrap();
            });
            if round == 0 {
                pool.file.set_len(0).unwrap();
            }
            let options = RestoreOptions::default().scattered();
            let restore = region.restore(&keys, &slots, options).await;
            let restored = restore.unwrap().collect().await.unwrap();
            let gone = |(_, miss): &(usize, Miss)| *miss == Miss::Region;
            assert!(restored.missed.iter().all(gone), "{:?}", restored.missed);
            assert_eq!(restored.placed.len() + restored.missed.len(), 40);
            shrinking.join().unwrap();
            lost += restored.missed.len();
            // What the file was is over: nothing is saved from it, whatever its size now.
            pool.file.set_len(len).unwrap();
            if !restored.missed.is_empty() {
                let fresh = blocks::loose(&session, 100 + round, 1, PayloadKind::Kv);
                let saved = region.save(&[(fresh[0], 0)], Acknowledge::Accepted).await;
                let unread = SaveOutcome::Failed(CommitFailure::Checksum);
                assert_eq!(saved.unwrap(), [unread]);
            }
        }
        assert!(lost >= 40, "{lost} blocks of 8 rounds were lost");
        let name = "kvtier_engine_region_refused_total{reason=\"lost\"}";
        assert!(daemon.metrics().get(name) >= 1.0);
        drop(session);
        still_works(&mut daemon, 1).await;
    });
}

/// Whether the daemon has the pool open or mapped.
fn has_pool(daemon: &Daemon) -> bool {
    let proc = format!("/proc/{}", daemon.pid());
    let maps = std::fs::read_to_string(format!("{proc}/maps")).unwrap();
    let fds = std::fs::read_dir(format!("{proc}/fd")).unwrap();
    let mut links = fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    let open = links.any(|link| link.to_string_lossy().contains("kvtier-pool"));
    open || maps.contains("kvtier-pool")
}

#[test]
fn the_region_of_an_engine_that_is_gone_is_closed_and_unmapped() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(options());
        for kept in [Kept::Sealed, Kept::Open] {
            let session = daemon.session(&blocks::gqa()).await;
            let pool = Pool::new(&session, 4, kept);
            let region = pool.register(&session).await;
            assert!(has_pool(&daemon));
            let bytes = pool.bytes as f64;
            assert_eq!(daemon.metrics().get("kvtier_engine_region_bytes"), bytes);
            drop((region, session));
            eventually(Duration::from_secs(10), async || match has_pool(&daemon) {
                false => Ok(()),
                true => Err("the daemon still has the pool".into()),
            })
            .await;
            assert_eq!(daemon.metrics().get("kvtier_engine_region_bytes"), 0.0);
        }
        still_works(&mut daemon, 1).await;
    });
}

#[test]
fn a_wiped_namespace_brings_nothing_into_slots() {
    run(LIMIT, async {
        let daemon = Daemon::start(options());
        let session = daemon.session(&blocks::gqa()).await;
        let pool = Pool::new(&session, 8, Kept::Sealed);
        let set = blocks::chain(&session, 1, 16 * 8, PayloadKind::Kv);
        blocks::save_durable(&session, &set).await;
        session.wipe().await.unwrap();
        let region = pool.register(&session).await;
        let slots: Vec<u32> = (0..8).collect();
        let options = RestoreOptions::default().scattered();
        let restore = region.restore(&blocks::keys(&set), &slots, options).await;
        let restored = restore.unwrap().collect().await.unwrap();
        assert_eq!((restored.placed.len(), restored.missed.len()), (0, 8));
        assert!(pool.rest_is_untouched([]));
    });
}

// Goal: W1. A save that its caller no longer waits for has its slots until it ends: what the engine
// puts there afterwards is never stored under the name of what was there.
#[test]
fn slots_are_the_daemons_until_a_save_that_was_given_up_has_ended() {
    run(LIMIT, async {
        let daemon = Daemon::start(options().host_mib(16));
        let session = daemon.session(&blocks::wide()).await;
        let large = blocks::loose(&session, 1, 32, PayloadKind::Kv);
        blocks::save_durable(&session, &large).await;
        let held = leases(&session, &large).await;
        assert!(held.len() > 24, "{} blocks fill host memory", held.len());
        let mut connect = daemon::connect_options();
        connect.timeouts.commit = Duration::from_millis(200);
        let client = Client::connect(Endpoint::unix(daemon.socket()), connect).await;
        let options = SessionOptions::new("impatient").staging_bytes(Bytes::mib(8));
        let impatient = client.unwrap().open_session(&blocks::wide(), options).await;
        let impatient = impatient.unwrap();
        let pool = Pool::new(&impatient, 8, Kept::Sealed);
        let region = pool.register(&impatient).await;
        let set = blocks::chain(&impatient, 2, 16 * 8, PayloadKind::Kv);
        let other = blocks::chain(&impatient, 3, 16 * 8, PayloadKind::Kv);
        let named: Vec<_> = set.iter().copied().zip(0..).collect();
        named
            .iter()
            .for_each(|(block, slot)| pool.fill(*slot, block));
        let given_up = region.save(&named, Acknowledge::Accepted).await;
        assert!(
            matches!(given_up, Err(Error::Timeout { .. })),
            "{given_up:?}"
        );
        let reuse = async {
            region.settle().await.unwrap();
            other
                .iter()
                .zip(0..)
                .for_each(|(block, slot)| pool.fill(slot, block));
        };
        let room = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            drop(held);
        };
        tokio::join!(reuse, room);
        // Time for a save that goes on after all.
        tokio::time::sleep(Duration::from_millis(300)).await;
        // Insists that what is there is right.
        let found = blocks::restore(&session, &set).await.unwrap();
        assert!(!found.hits.is_empty(), "nothing was stored");
    });
}

/// Blocks as they come, held.
async fn leases(session: &Session, blocks: &[SaveBlock]) -> Vec<LeasedBlock> {
    let options = RestoreOptions::default().scattered();
    let keys = blocks::keys(blocks);
    let restore = session.restore(&keys, PayloadKind::Kv, options).await;
    let (mut restore, mut held) = (restore.unwrap(), Vec::new());
    while let Some(event) = restore.next().await.unwrap() {
        if let RestoreEvent::Ready(block) = event {
            held.push(block);
        }
    }
    held
}

// Goal: W1. Slots of a running restore are nobody else's, and come back when it was dropped and its
// end was told.
#[test]
fn slots_are_the_daemons_until_the_end_of_their_restore_is_told() {
    run(LIMIT, async {
        let options = options().read_limit_mib(16).host_mib(128).disk_mib(128, 16);
        let model = blocks::wide();
        let (daemon, set) = Daemon::cold(options, &model, |session| {
            blocks::chain(session, 1, 16 * 32, PayloadKind::Kv)
        })
        .await;
        let session = daemon.session(&model).await;
        let pool = Pool::new(&session, 40, Kept::Sealed);
        let region = pool.register(&session).await;
        let slots: Vec<u32> = (0..32).collect();
        let keys = blocks::keys(&set);
        let mut restore = region
            .restore(&keys, &slots, RestoreOptions::default())
            .await
            .unwrap();
        let first = loop {
            if let Some(RestoreEvent::Placed(placed)) = restore.next().await.unwrap() {
                break placed;
            }
        };
        let slot = first.slot();
        let again = region
            .restore(&keys[..1], &[slot], RestoreOptions::default())
            .await;
        let busy = again.unwrap_err();
        assert!(matches!(busy, Error::Busy { .. }), "{busy:?}");
        let busy = region.save(&[(set[0], slot)], Acknowledge::Accepted).await;
        assert!(matches!(busy.unwrap_err(), Error::Busy { .. }));
        drop(restore);
        region.settle().await.unwrap();
        // The engine's again: nobody writes there any more.
        pool.fill(slot, &set[31]);
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(pool.holds(slot, &set[31]));
        let restore = region
            .restore(&keys, &slots, RestoreOptions::default())
            .await;
        let restored = restore.unwrap().collect().await.unwrap();
        assert_eq!(restored.usable_blocks, 32);
        for (block, slot) in set.iter().zip(slots) {
            assert!(pool.holds(slot, block));
        }
    });
}

// Goal: W2. A session that its client gave up is over before its region is registered again.
#[test]
fn a_region_outlives_its_session_and_the_daemon_and_ends_the_session_before() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(options());
        let session = daemon.session(&blocks::gqa()).await;
        let pool = Pool::new(&session, 8, Kept::Sealed);
        let region = pool.register(&session).await;
        let set = blocks::chain(&session, 1, 16 * 8, PayloadKind::Kv);
        save(&pool, &region, &set).await;
        daemon.crash();
        session.until_not_open().await;
        session.reopen().await.unwrap();
        region.settle().await.unwrap();
        let slots: Vec<u32> = (0..8).collect();
        let keys = blocks::keys(&set);
        let restore = region.restore(&keys, &slots, RestoreOptions::default());
        let restored = restore.await.unwrap().collect().await.unwrap();
        assert_eq!(restored.usable_blocks, 8);
        let (mut old, mut new) = (opened(&daemon).await, opened(&daemon).await);
        let geometry = Some((&pool.geometry).into());
        let token = old.token();
        ask(&mut new, pool.bytes, geometry, &token).await.unwrap();
        let answer = old.region_refused().await;
        assert_eq!(answer, Code::Unauthenticated);
    });
}

// Goal: a two-ended restore brings its blocks into slots: each block by one of the two.
#[test]
fn a_two_ended_restore_meets_its_engine_in_slots() {
    run(LIMIT, async {
        let options = options().read_limit_mib(16).host_mib(128).disk_mib(128, 16);
        let model = blocks::wide();
        let (daemon, set) = Daemon::cold(options, &model, |session| {
            blocks::chain(session, 1, 16 * 32, PayloadKind::Kv)
        })
        .await;
        let session = daemon.session(&model).await;
        let pool = Pool::new(&session, 32, Kept::Sealed);
        let region = pool.register(&session).await;
        let slots: Vec<u32> = (0..32).collect();
        let two_ended = RestoreOptions::default().two_ended(TwoEnded::new(16));
        let keys = blocks::keys(&set);
        let mut restore = region.restore(&keys, &slots, two_ended).await.unwrap();
        let compute = restore.compute_end();
        let mut brought = vec![0; set.len()];
        loop {
            while let Some(event) = restore.try_next().unwrap() {
                if let RestoreEvent::Placed(placed) = event {
                    brought[placed.index()] += 1;
                }
            }
            match compute.next() {
                kvtier_client::NextCompute::Block(index) => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    pool.fill(slots[index], &set[index]);
                    brought[index] += 1;
                    compute.computed(index, None);
                }
                kvtier_client::NextCompute::Wait => restore.wait().await.unwrap(),
                kvtier_client::NextCompute::Finished => break,
            }
        }
        assert_eq!(brought, vec![1; set.len()]);
        for (block, slot) in set.iter().zip(slots) {
            assert!(pool.holds(slot, block), "slot {slot}");
        }
    });
}
