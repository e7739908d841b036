//! Tests of reading the daemon's answers: what does not fit is a bad reply, not a value.

use super::*;

const CALL: Call = Call::reads("Test");

fn present() -> v1::BlockStatus {
    let status = v1::block_status::Status::Tier(v1::Tier::Host.into());
    v1::BlockStatus {
        status: Some(status),
    }
}

fn missing(reason: i32) -> v1::BlockStatus {
    let status = v1::block_status::Status::Miss(reason);
    v1::BlockStatus {
        status: Some(status),
    }
}

fn lookup(
    asked: usize,
    prefix_only: bool,
    prefix_blocks: u32,
    blocks: Vec<v1::BlockStatus>,
) -> Result<Lookup, Error> {
    let reply = v1::LookupReply {
        prefix_blocks,
        blocks,
    };
    Lookup::from_wire(CALL, asked, prefix_only, &reply)
}

#[test]
fn lookup_reads_a_prefix_and_every_status() {
    let absent = missing(v1::MissReason::Absent.into());
    let read = lookup(3, true, 2, vec![present(), present(), absent]).unwrap();
    assert_eq!(read.prefix_blocks, 2);
    assert_eq!(read.blocks[2], BlockStatus::Missing(Miss::Absent));
    assert!(lookup(3, false, 1, vec![present(), absent, present()]).is_ok());
}

#[test]
fn lookup_refuses_a_prefix_that_its_statuses_do_not_show() {
    let absent = missing(v1::MissReason::Absent.into());
    for (asked, prefix_only, prefix, blocks) in [
        (1, true, 2, vec![present(), present()]),
        (3, true, 3, vec![present(), absent, present()]),
        (3, true, 0, vec![present()]),
        (3, true, 1, vec![present(), absent, absent]),
        (3, false, 1, vec![present()]),
        (1, true, u32::MAX, vec![present()]),
        (1, false, 0, vec![v1::BlockStatus { status: None }]),
        (1, false, 0, vec![missing(0)]),
    ] {
        let read = lookup(asked, prefix_only, prefix, blocks.clone());
        assert!(
            matches!(read, Err(Error::BadReply { .. })),
            "{blocks:?}: {read:?}"
        );
    }
}

#[test]
fn miss_of_a_later_protocol_is_a_miss_all_the_same() {
    let read = lookup(1, false, 0, vec![missing(999)]).unwrap();
    assert_eq!(read.blocks, [BlockStatus::Missing(Miss::Unsupported)]);
}

#[test]
fn numbers_that_are_not_known_are_refused() {
    assert!(Tier::from_wire(CALL, 0).is_err() && Tier::from_wire(CALL, 9).is_err());
    assert!(Acknowledge::from_wire(CALL, 0).is_err());
    assert!(SaveRefusal::from_wire(CALL, 0).is_err());
    assert!(CommitFailure::from_wire(CALL, 99).is_err());
    assert!(level_from_wire(CALL, 256).is_err());
    for level in [Acknowledge::Accepted, Acknowledge::Durable] {
        assert_eq!(
            Acknowledge::from_wire(CALL, level.to_wire()).unwrap(),
            level
        );
    }
}

#[test]
fn explanation_reads_variants_and_says_hit_when_nothing_is_missing() {
    let variant = v1::VariantInfo {
        kind: v1::PayloadKind::Kv.into(),
        tier: v1::Tier::Disk.into(),
        level: 8,
        level_name: "zstd".into(),
        raw_bytes: 4608,
        ..v1::VariantInfo::default()
    };
    let reply = v1::ExplainReply {
        variants: vec![variant.clone()],
        miss: 0,
        notes: Vec::new(),
        model: None,
    };
    let read = Explanation::from_wire(CALL, reply.clone()).unwrap();
    assert_eq!((read.miss, read.variants[0].tier), (None, Tier::Disk));
    assert_eq!(read.variants[0].parent, BlockKey::ROOT);

    let mut huge = reply;
    huge.variants[0].raw_bytes = u64::MAX;
    assert!(Explanation::from_wire(CALL, huge).is_err());
}
