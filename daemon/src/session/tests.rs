//! Tests of sessions: a token is good for its user only, and everything ends with the session.

use std::path::Path;

use kvtier_proto::descriptor::{LayerSpec, PartOrder, Shard};
use kvtier_proto::{BlockKey, Bytes, Element, PayloadKind};

use super::*;
use crate::block::{BlockFacts, BlockId};
use crate::tenant::{TenantSpec, Tenants};

fn model() -> ModelDescriptor {
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

fn tenant(state: &Path) -> Arc<Tenant> {
    let spec = TenantSpec {
        name: "red".into(),
        uids: vec![7],
        host_quota: Bytes::mib(1),
        staging_max: Bytes::mib(1),
    };
    let tenants = Tenants::open(state, &[spec], None, &[]).unwrap();
    Arc::clone(tenants.named("red").unwrap())
}

fn session(tenant: &Arc<Tenant>) -> Session {
    let peer = Peer::Unix { uid: 7, pid: 1 };
    let limits = crate::config::Config::from_toml("").unwrap().limits;
    let (token, tenant) = (Token::random().unwrap(), Arc::clone(tenant));
    Session::new(token, tenant, peer, "test".into(), model(), &limits)
}

fn block(session: &Session) -> HostBlock {
    let layout = session.layouts.get(PayloadKind::Kv, 16, 0).unwrap();
    let id = BlockId {
        namespace: session.tenant.id,
        kind: PayloadKind::Kv,
        key: BlockKey([1; 32]),
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
        fingerprint,
        layout,
        order,
    };
    HostBlock::new(id, facts, image, 0).unwrap()
}

#[test]
fn find_refuses_another_user_and_anything_that_is_no_token() {
    let dir = tempfile::tempdir().unwrap();
    let sessions = Sessions::new(4);
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
    let sessions = Sessions::new(4);
    let open = sessions.open(session(&tenant)).unwrap();
    let kept = tenant
        .host
        .insert(block(&open), true, tenant.host.life())
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
    let late = Arc::new(block(&open));
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
