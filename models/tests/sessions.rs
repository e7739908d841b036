//! Models of a session that ends while its restores lease blocks and others make room.
//!
//! Upstairs:   `cargo test`.
//! Downstairs: `session`, `tenant`, `tier::host`, as the daemon has them.
#![allow(clippy::unwrap_used, reason = "a panic is the failure report")]

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use kvtier_models::block::{BlockFacts, BlockId, HostBlock};
use kvtier_models::config::Config;
use kvtier_models::metrics::Metrics;
use kvtier_models::planted::Bug;
use kvtier_models::region::engine::EngineRegion;
use kvtier_models::session::{Session, Token};
use kvtier_models::tenant::{Peer, Tenant, TenantOptions, TenantSpec, Tenants};
use kvtier_models::tier::directory::Name;
use kvtier_models::{finds, holds};
use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::region::Handover;
use kvtier_proto::{
    BlockKey, BlockLayout, Bytes, LayoutFingerprint, PayloadKind, Piece, Quality, RegionGeometry,
};
use kvtier_store::mem::Pages;
use rustix::fs::MemfdFlags;
use shuttle::thread;

const BLOCK: usize = 4096;
const BLOCKS: u8 = 2;

/// A folder in memory where there is one: each order of events makes a namespace anew.
fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let folder = tempfile::tempdir_in(memory).or_else(|_| tempfile::tempdir());
    folder.unwrap()
}

fn tenant() -> Arc<Tenant> {
    let folder = folder();
    let spec = TenantSpec {
        name: "model".into(),
        uids: vec![7],
        host_quota: Bytes(u64::from(BLOCKS) * BLOCK as u64),
        staging_max: Bytes::mib(1),
        lowest_quality: kvtier_proto::Quality::Exact,
    };
    let options = TenantOptions {
        state_dir: folder.path(),
        specs: &[spec],
        tcp_namespace: None,
        operators: &[],
        pages: Pages::Small,
        disks: &[],
    };
    let tenants = Tenants::open(&options).unwrap();
    tenants.of(Peer::Unix { uid: 7, pid: 1 }).unwrap()
}

fn name(key: u8) -> Name {
    (PayloadKind::Kv, BlockKey([key; 32]))
}

fn add(tenant: &Tenant, key: u8) {
    let (kind, key) = name(key);
    let id = BlockId {
        namespace: tenant.id,
        kind,
        key,
    };
    let facts = BlockFacts {
        parent: BlockKey::ROOT,
        position: 0,
        through: Quality::Exact,
        fingerprint: LayoutFingerprint([0; 32]),
        layout: Arc::new(BlockLayout::opaque(16, BLOCK as u64).unwrap()),
        order: PartOrder::TokenMajor,
    };
    let image = tenant.host.room(BLOCK).image.unwrap();
    let block = HostBlock::new(id, facts, image, 0).unwrap();
    let kept = tenant.host.insert(block, false, tenant.host.life());
    assert!(kept.is_some());
}

fn session(tenant: &Arc<Tenant>) -> Session {
    let peer = Peer::Unix { uid: 7, pid: 1 };
    let limits = Config::from_toml("").unwrap().limits;
    let token = Token::from_slice(&[1; 16]).unwrap();
    let model = kvtier_proto::fuzzing::model();
    Session::new(
        token,
        Arc::clone(tenant),
        peer,
        "model".into(),
        model,
        &limits,
    )
}

/// Two restores lease a block each and give one back, the session ends, and a save wants all the
/// room there is.
fn leases_and_an_end() {
    let tenant = tenant();
    (1..=BLOCKS).for_each(|key| add(&tenant, key));
    let session = Arc::new(session(&tenant));
    let restore = |key: u8, gives_back: bool| {
        let (session, tenant) = (Arc::clone(&session), Arc::clone(&tenant));
        thread::spawn(move || {
            let Some(block) = tenant.host.get(&name(key)) else {
                return;
            };
            let Ok(lease) = session.lease(block) else {
                return;
            };
            if gives_back {
                session.release(lease);
                assert!(!session.release(lease), "a lease was given back twice");
            }
        })
    };
    let end = {
        let session = Arc::clone(&session);
        thread::spawn(move || {
            session.end();
            assert_eq!(
                session.leases(),
                0,
                "a session that has ended holds a block"
            );
        })
    };
    let save = {
        let tenant = Arc::clone(&tenant);
        thread::spawn(move || {
            let room = tenant.host.room(BLOCK);
            let left = room
                .evicted
                .iter()
                .all(|gone| tenant.host.info(gone).is_none());
            assert!(left, "a block that made room is there");
        })
    };
    for thread in [restore(1, false), restore(2, true), end, save] {
        thread.join().unwrap();
    }
    assert_eq!(session.leases(), 0, "a lease outlived its session");
    let room = tenant.host.room(usize::from(BLOCKS) * BLOCK);
    assert!(
        room.image.is_some(),
        "memory that nobody holds cannot be had"
    );
}

// Goal: E2. Whatever ends a session, and whenever, nothing of it keeps memory.
#[test]
fn nothing_that_a_session_held_outlives_it_in_any_order() {
    holds(leases_and_an_end);
    assert!(finds(Bug::LeaseAfterEnd, leases_and_an_end));
}

/// A session is ended by its client's going and by the next session of that client, at once, while
/// a restore writes into its engine's memory.
fn two_ends_of_an_engine() {
    let session = Arc::new(session(&tenant()));
    let geometry = RegionGeometry {
        kind: PayloadKind::Opaque,
        slots: 1,
        pieces: vec![Piece::row(0, 2, 2)],
    };
    let region = session.add_engine(2, 2, |number| {
        EngineRegion::new(number, 2, geometry, Arc::new(Metrics::new()))
    });
    let region = region.unwrap();
    let fd = rustix::fs::memfd_create("model", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, 2).unwrap();
    let copy = fd.as_fd().try_clone_to_owned().unwrap();
    assert_eq!(region.adopt(copy), Handover::Taken);
    let fd = Arc::new(fd);
    let reserved = region.reserve(&[0]).unwrap();
    drop(region);
    let restore = thread::spawn(move || {
        let _ = reserved.write(0, &[7; 2]);
    });
    let end = |byte: u64| {
        let (session, fd) = (Arc::clone(&session), Arc::clone(&fd));
        thread::spawn(move || {
            session.end();
            // The engine has its slot again: of each end another byte of it.
            rustix::io::pwrite(&*fd, &[9], byte).unwrap();
        })
    };
    let ends = [end(0), end(1)];
    restore.join().unwrap();
    for end in ends {
        end.join().unwrap();
    }
    let mut content = [0; 2];
    rustix::io::pread(&*fd, &mut content, 0).unwrap();
    assert_eq!(content, [9; 2], "bytes moved after an end");
}

// Goal: E2 for an engine's memory: whoever ends a session second waits as well.
#[test]
fn nothing_moves_after_either_of_two_ends_has_returned() {
    holds(two_ends_of_an_engine);
    assert!(finds(Bug::EngineOfOneEnd, two_ends_of_an_engine));
}
