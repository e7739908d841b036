//! Tests of sessions: a token is good for its user only, and everything ends with the session.

use std::path::Path;

use kvtier_proto::descriptor::{LayerSpec, PartOrder, Shard};
use kvtier_proto::{BlockKey, Bytes, Element, PayloadKind, Quality};
use kvtier_store::mem::Pages;

use super::*;
use crate::block::{BlockFacts, BlockId};
use crate::tenant::{TenantOptions, TenantSpec, Tenants};

pub(crate) fn model() -> ModelDescriptor {
    ModelDescriptor {
        model: "test".into(),
        revision: String::new(),
        weights_fingerprint: Vec::new(),
        adapter: String::new(),
        element: Element::Bf16,
        layers: vec![LayerSpec::Attention {
            kv_heads: 1,
            k_dim: 4,
            v_dim: 4,
            sliding_window: 0,
        }],
        d_model: 8,
        rope: None,
        block_tokens: 16,
        order: PartOrder::TokenMajor,
        shard: Shard::WHOLE,
        k_after_rope: true,
    }
}

pub(crate) fn tenant(state: &Path) -> Arc<Tenant> {
    named(state, "red")
}

fn named(state: &Path, name: &str) -> Arc<Tenant> {
    std::fs::create_dir_all(state).unwrap();
    let spec = TenantSpec {
        name: "red".into(),
        uids: vec![7],
        host_quota: Bytes::mib(1),
        lowest_quality: kvtier_proto::Quality::Exact,
        staging_max: Bytes::mib(1),
    };
    let other = TenantSpec {
        name: "blue".into(),
        uids: vec![8],
        ..spec.clone()
    };
    let options = TenantOptions {
        state_dir: state,
        specs: &[spec, other],
        tcp_namespace: None,
        operators: &[],
        pages: Pages::Small,
        disks: &[],
    };
    let tenants = Tenants::open(&options).unwrap();
    Arc::clone(tenants.named(name).unwrap())
}

pub(crate) fn session(tenant: &Arc<Tenant>) -> Session {
    let peer = Peer::Unix { uid: 7, pid: 1 };
    let limits = crate::config::Config::from_toml("").unwrap().limits;
    let (token, tenant) = (Token::random().unwrap(), Arc::clone(tenant));
    Session::new(token, tenant, peer, "test".into(), model(), &limits)
}

pub(crate) fn block(session: &Session, number: u8) -> HostBlock {
    let layout = session.layouts.get(PayloadKind::Kv, 16, 0).unwrap();
    let id = BlockId {
        namespace: session.tenant.id,
        kind: PayloadKind::Kv,
        key: BlockKey([number; 32]),
    };
    let image = session
        .tenant
        .host
        .room(layout.payload_len())
        .image
        .unwrap();
    let (fingerprint, order) = (session.layouts.fingerprint(), PartOrder::TokenMajor);
    let facts = BlockFacts {
        parent: BlockKey::ROOT,
        position: 0,
        through: Quality::Exact,
        fingerprint,
        layout,
        order,
    };
    HostBlock::new(id, facts, image, 0).unwrap()
}

#[test]
fn find_refuses_another_user_and_anything_that_is_no_token() {
    let dir = tempfile::tempdir().unwrap();
    let sessions = Sessions::new(4, 1);
    let open = sessions.open(session(&tenant(dir.path()))).unwrap();
    let token = *open.token.expose();
    assert!(
        sessions
            .find(&token, Peer::Unix { uid: 7, pid: 99 })
            .is_some()
    );
    assert!(
        sessions
            .find(&token, Peer::Unix { uid: 8, pid: 1 })
            .is_none()
    );
    assert!(sessions.find(&token, Peer::Tcp).is_none());
    for bad in [&[][..], &[0; 16], &[0; 17]] {
        assert!(sessions.find(bad, Peer::Unix { uid: 7, pid: 1 }).is_none());
    }
}

#[test]
fn close_ends_leases_regions_and_restores() {
    let dir = tempfile::tempdir().unwrap();
    let tenant = tenant(dir.path());
    let sessions = Sessions::new(4, 1);
    let open = sessions.open(session(&tenant)).unwrap();
    let kept = tenant
        .host
        .insert(block(&open, 1), true, tenant.host.life())
        .unwrap();
    let lease = open.lease(Arc::clone(&kept)).unwrap();
    let region = open.add_region(8192).unwrap().unwrap();
    drop(kept);
    assert!(
        tenant.host.room(1 << 20).image.is_none(),
        "a leased block is never evicted"
    );

    sessions.close(open.token);
    assert!(sessions.is_empty());
    assert_eq!(open.leases(), 0);
    assert!(!open.release(lease));
    assert!(open.region(region.number()).is_none());
    assert!(open.restores.is_closed());
    assert!(tenant.host.room(1 << 20).image.is_some());
}

#[test]
fn an_ended_session_takes_nothing_more() {
    let dir = tempfile::tempdir().unwrap();
    let open = session(&tenant(dir.path()));
    let late = Arc::new(block(&open, 1));
    open.end();
    assert!(open.lease(late).is_err());
    assert!(open.add_region(4096).unwrap().is_err());
}

#[test]
fn add_region_refuses_more_than_the_namespace_may_stage() {
    let dir = tempfile::tempdir().unwrap();
    let open = session(&tenant(dir.path()));
    assert!(open.add_region(1 << 19).unwrap().is_ok());
    assert!(open.add_region(1 << 19).unwrap().is_ok());
    let refusal = open.add_region(4096).unwrap().unwrap_err();
    assert_eq!(refusal.max, 1 << 20);
    assert!(open.add_region(u64::MAX).unwrap().is_err());
}

// Goal: one namespace cannot take every place (P4).
#[test]
fn a_namespace_opens_its_share_of_the_sessions_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let (red, blue) = (named(dir.path(), "red"), named(dir.path(), "blue"));
    let sessions = Sessions::new(5, 2);
    let first = sessions.open(session(&red)).unwrap();
    sessions.open(session(&red)).unwrap();
    let refusal = sessions.open(session(&red)).unwrap_err();
    assert_eq!(
        (refusal.what, refusal.max),
        ("sessions of one namespace", 2)
    );
    sessions.open(session(&blue)).unwrap();
    sessions.close(first.token);
    assert!(sessions.open(session(&red)).is_ok(), "a place came free");
}

#[tokio::test]
async fn whoever_waits_for_the_end_of_a_session_hears_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let open = Arc::new(session(&tenant(dir.path())));
    let running = Arc::clone(&open.restores).try_acquire_owned().unwrap();
    let waiting = {
        let open = Arc::clone(&open);
        tokio::spawn(async move { tokio::join!(open.no_restores(), open.ended()) })
    };
    tokio::task::yield_now().await;
    assert!(
        Arc::clone(&open.restores).try_acquire_owned().is_err(),
        "none starts meanwhile"
    );
    assert!(!waiting.is_finished());
    drop(running);
    open.end();
    waiting.await.unwrap();
}
