//! Tests of namespaces: identity from the peer, numbers and secrets that stay.

use super::*;

fn spec(name: &str, uid: u32) -> TenantSpec {
    TenantSpec {
        name: name.into(),
        uids: vec![uid],
        host_quota: Bytes::mib(1),
        lowest_quality: kvtier_proto::Quality::Exact,
        staging_max: Bytes::mib(1),
    }
}

fn options<'a>(state_dir: &'a Path, specs: &'a [TenantSpec]) -> TenantOptions<'a> {
    TenantOptions {
        state_dir,
        specs,
        tcp_namespace: None,
        operators: &[],
        pages: Pages::Small,
        disks: &[],
    }
}

fn peer(uid: u32) -> Peer {
    Peer::Unix { uid, pid: 1 }
}

#[test]
fn of_gives_a_peer_the_namespace_of_its_uid_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let specs = [spec("red", 10), spec("blue", 20)];
    let options = TenantOptions {
        tcp_namespace: Some("blue"),
        operators: &[0],
        ..options(dir.path(), &specs)
    };
    let tenants = Tenants::open(&options).unwrap();
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
    let open = |specs: &[TenantSpec]| Tenants::open(&options(dir.path(), specs)).unwrap();
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
    Tenants::open(&options(dir.path(), &[spec("red", 10)])).unwrap();
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
        let problem = Tenants::open(&options(dir.path(), &[spec("red", 10)])).unwrap_err();
        let text = problem.to_string();
        assert!(matches!(problem, TenantError::Damaged { .. }), "{text}");
        assert!(text.contains(FILE) && text.contains("remove it"), "{text}");
    }
}

// Goal: no file makes two namespaces share a secret, or a number by running out of them (N1).
#[test]
fn open_refuses_a_secret_that_is_there_twice_and_a_number_after_the_last() {
    let dir = tempfile::tempdir().unwrap();
    let one =
        |id: u32, secret: &str| format!(r#"{{"id": {id}, "secret": "{}"}}"#, secret.repeat(32));
    let open = |next: u32, namespaces: &str| {
        let text = format!(r#"{{"next": {next}, "namespaces": {{{namespaces}}}}}"#);
        std::fs::write(dir.path().join(FILE), text).unwrap();
        let opened = Tenants::open(&options(dir.path(), &[spec("red", 10)]));
        opened.map(|_| ()).map_err(|problem| problem.to_string())
    };
    let twice = format!(r#""red": {}, "blue": {}"#, one(1, "5a"), one(2, "5A"));
    let problem = open(3, &twice).unwrap_err();
    assert!(problem.contains("the same secret"), "{problem}");
    let problem = open(u32::MAX, &format!(r#""blue": {}"#, one(7, "5a"))).unwrap_err();
    assert!(
        problem.contains("the last namespace number is taken"),
        "{problem}"
    );
    assert_eq!(
        open(u32::MAX, &format!(r#""red": {}"#, one(7, "5a"))),
        Ok(())
    );
}

// Goal: records of a namespace whose number was forgotten never turn up under another one.
#[test]
fn open_without_its_file_hands_out_no_number_that_old_records_may_carry() {
    let (dir, disk) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let specs = [spec("red", 10), spec("blue", 20)];
    let open = || {
        let options = TenantOptions {
            disks: &[disk.path()],
            ..options(dir.path(), &specs)
        };
        let tenants = Tenants::open(&options).unwrap();
        let mut numbers: Vec<u32> = tenants.all().map(|tenant| tenant.id.0).collect();
        numbers.sort_unstable();
        numbers
    };
    std::fs::write(disk.path().join("lock"), "").unwrap();
    std::fs::create_dir(disk.path().join("lost+found")).unwrap();
    assert_eq!(open(), [1, 2], "nothing is stored yet");
    std::fs::write(disk.path().join("segment-00000000.kvs"), "x").unwrap();
    assert_eq!(open(), [1, 2], "the file says so");
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    let fresh = open();
    assert!(
        fresh[0] >= FRESH_START && fresh[1] == fresh[0] + 1,
        "{fresh:?}"
    );
    assert_eq!(open(), fresh);
}

// Goal: blocks on their way in through messages take bounded memory, one too large included.
#[tokio::test]
async fn inline_room_is_bounded_and_lets_the_largest_block_in_alone() {
    let dir = tempfile::tempdir().unwrap();
    let specs = [TenantSpec {
        host_quota: Bytes::mib(256),
        lowest_quality: kvtier_proto::Quality::Exact,
        ..spec("red", 10)
    }];
    let tenants = Tenants::open(&options(dir.path(), &specs)).unwrap();
    let tenant = Arc::clone(tenants.named("red").unwrap());
    let large = tenant.inline_room(256 << 20).await.unwrap();
    let waiting = {
        let tenant = Arc::clone(&tenant);
        tokio::spawn(async move { tenant.inline_room(1).await.is_some() })
    };
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished(), "the largest block has all the room");
    drop(large);
    assert!(waiting.await.unwrap());
    let mut held = Vec::new();
    while let Ok(Some(room)) = tokio::time::timeout(
        std::time::Duration::from_millis(20),
        tenant.inline_room(8 << 20),
    )
    .await
    {
        held.push(room);
    }
    assert_eq!(held.len(), 8, "64 MiB in blocks of 8 MiB");
}
