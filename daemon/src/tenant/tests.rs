//! Tests of namespaces: identity from the peer, numbers and secrets that stay.

use super::*;

fn spec(name: &str, uid: u32) -> TenantSpec {
    TenantSpec {
        name: name.into(),
        uids: vec![uid],
        host_quota: Bytes::mib(1),
        staging_max: Bytes::mib(1),
    }
}

fn peer(uid: u32) -> Peer {
    Peer::Unix { uid, pid: 1 }
}

#[test]
fn of_gives_a_peer_the_namespace_of_its_uid_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let specs = [spec("red", 10), spec("blue", 20)];
    let tenants = Tenants::open(dir.path(), &specs, Some("blue"), &[0]).unwrap();
    assert_eq!(tenants.of(peer(10)).unwrap().name, "red");
    assert_eq!(tenants.of(peer(20)).unwrap().name, "blue");
    assert!(tenants.of(peer(30)).is_none());
    assert_eq!(tenants.of(Peer::Tcp).unwrap().name, "blue");
    assert!(tenants.is_operator(peer(0)) && !tenants.is_operator(peer(10)));
    assert!(!tenants.is_operator(Peer::Tcp));
}

#[test]
fn open_keeps_numbers_and_secrets_and_never_reuses_a_number() {
    let dir = tempfile::tempdir().unwrap();
    let open = |specs: &[TenantSpec]| Tenants::open(dir.path(), specs, None, &[]).unwrap();
    let first = open(&[spec("red", 10), spec("blue", 20)]);
    let (red, blue) = (first.named("red").unwrap(), first.named("blue").unwrap());
    assert_ne!(red.id, blue.id);
    assert_ne!(red.key_secret, blue.key_secret);

    let second = open(&[spec("blue", 20)]);
    let third = open(&[spec("green", 30), spec("red", 10), spec("blue", 20)]);
    assert_eq!(second.named("blue").unwrap().key_secret, blue.key_secret);
    assert_eq!(third.named("red").unwrap().key_secret, red.key_secret);
    assert_eq!(third.named("red").unwrap().id, red.id);
    assert!(third.named("green").unwrap().id > blue.id);
}

#[test]
fn open_keeps_the_secrets_from_other_users() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    Tenants::open(dir.path(), &[spec("red", 10)], None, &[]).unwrap();
    let mode = std::fs::metadata(dir.path().join(FILE))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn open_refuses_a_damaged_file_and_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    for text in [
        "",
        "{",
        r#"{"next": 1, "namespaces": {"red": {"id": 1, "secret": "00"}}}"#,
        r#"{"next": 9, "namespaces": {"red": {"id": 1, "secret": "00"}}}"#,
    ] {
        std::fs::write(dir.path().join(FILE), text).unwrap();
        let problem = Tenants::open(dir.path(), &[spec("red", 10)], None, &[]).unwrap_err();
        let text = problem.to_string();
        assert!(matches!(problem, TenantError::Damaged { .. }), "{text}");
        assert!(text.contains(FILE) && text.contains("remove it"), "{text}");
    }
}
