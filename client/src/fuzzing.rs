//! Bodies of the fuzz targets: what the daemon answers, which this side does not take on trust.
//!
//! Upstairs:   `fuzz/` and `tests/tests/corpus.rs`, see `kvtier_proto::fuzzing`.
//! Downstairs: `values`, `check`, `save`, `events`, `link`, `layouts`, `shm`.
//!
//! The first byte of an input chooses the message; the rest is the message.

use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use kvtier_proto::fuzzing::{Message, Target, model};
use kvtier_proto::limits::BLOCK_BYTES_MAX;
use kvtier_proto::{BlockKey, PayloadKind, v1};

use crate::check::slot_range;
use crate::error::{Call, Error};
use crate::layouts::Layouts;
use crate::shm::Staging;
use crate::values::{BlockStatus, Explanation, Lookup};
use crate::{events, link, save};

/// Targets of this package.
pub const TARGETS: [Target; 2] = [
    Target::new("client_replies", replies, reply_seeds),
    Target::new("client_slots", slots, slot_seeds).allocating(1 << 20),
];

const CALL: Call = Call::reads("Fuzz");
/// Keys that were asked for, whatever the answer says.
const ASKED: usize = 3;
/// Longest text of an error about an answer. Unit: bytes.
const ERROR_BYTES_MAX: usize = 1024;
/// Size of the mapped region. Unit: bytes.
const REGION: usize = 64 << 10;
const REGION_NUMBER: u32 = 1;

fn message<M: Message + Default>(data: &[u8]) -> Option<M> {
    M::decode(data).ok()
}

fn asked() -> Vec<[u8; 32]> {
    (1..).take(ASKED).map(|number| [number; 32]).collect()
}

/// An answer that cannot be is an error that says so, in few words.
fn refused<T>(read: Result<T, Error>) -> Option<T> {
    read.inspect_err(|problem| {
        let text = problem.to_string();
        assert!(!text.is_empty() && text.len() <= ERROR_BYTES_MAX, "{text}");
    })
    .ok()
}

fn replies(data: &[u8]) {
    let Some((which, data)) = data.split_first() else {
        return;
    };
    match which % 6 {
        0 => message(data).iter().for_each(lookup),
        1 => {
            let read = message(data).map(|reply| Explanation::from_wire(CALL, reply));
            let told = read.and_then(refused).into_iter();
            let mut variants = told.flat_map(|told| told.variants);
            assert!(variants.all(|variant| variant.raw_bytes <= BLOCK_BYTES_MAX.get()));
        }
        2 => {
            let read = message(data).map(|reply| save::results(CALL, &asked(), &reply));
            let count = read
                .and_then(refused)
                .map_or(ASKED, |outcomes| outcomes.len());
            assert_eq!(count, ASKED);
        }
        3 => message(data).iter().for_each(opened),
        4 => {
            let read = message(data).map(|event| events::read(&event));
            read.and_then(refused);
        }
        _ => {
            let read = message(data).map(|status| BlockStatus::from_wire(CALL, &status));
            read.and_then(refused);
        }
    }
}

fn lookup(reply: &v1::LookupReply) {
    for prefix_only in [false, true] {
        let read = Lookup::from_wire(CALL, ASKED, prefix_only, reply);
        let Some(found) = refused(read) else { continue };
        let leading = found.blocks.iter().take_while(|one| one.is_present());
        assert_eq!(leading.count(), found.prefix_blocks);
        assert!(found.blocks.len() <= ASKED);
        assert!(prefix_only || found.blocks.len() == ASKED);
    }
}

fn opened(opened: &v1::SessionOpened) {
    let ours = model().fingerprint();
    if let Some(identity) = refused(link::identify(opened, ours)) {
        assert_eq!(opened.layout_fingerprint, ours.0[..]);
        assert_eq!(&identity.secret.expose()[..], opened.key_secret);
        assert_eq!(opened.session.len(), 16);
    }
    if let Some(grant) = &opened.arena {
        let len = refused(link::mappable(grant, "arena"));
        assert!(len.is_none_or(|len| len as u64 == grant.bytes));
    }
}

/// Memory of a region, made once: what is mapped from it is mapped anew for each input.
fn memory() -> Option<&'static OwnedFd> {
    static MEMORY: OnceLock<Option<OwnedFd>> = OnceLock::new();
    let make = || {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let fd = rustix::fs::memfd_create("kvtier-fuzz", flags).ok()?;
        rustix::fs::ftruncate(&fd, REGION as u64).ok()?;
        Some(fd)
    };
    MEMORY.get_or_init(make).as_ref()
}

/// Whatever slots the daemon grants, views lie in the region and have no byte in common (C1, M2).
fn slots(data: &[u8]) {
    let Some((how, data)) = data.split_first() else {
        return;
    };
    let Some(ready) = message::<v1::BlocksReady>(data) else {
        return;
    };
    let map = memory().and_then(|fd| Staging::map(fd, REGION).ok());
    let Some(region) = map else { return };
    let kinds = [PayloadKind::Kv, PayloadKind::Hidden, PayloadKind::Opaque];
    let kind = kinds.iter().cycle().nth(usize::from(*how));
    let layouts = Layouts::new(model());
    let mut spans = Vec::new();
    for block in ready.blocks.iter().take(64) {
        let length = block.slot.map_or(0, |slot| slot.length);
        let layout = kind.map(|kind| layouts.of_length(*kind, block.tokens, length));
        let Some(layout) = layout.and_then(refused) else {
            continue;
        };
        let Ok(range) = slot_range(block.slot.as_ref(), REGION_NUMBER, REGION, &layout) else {
            continue;
        };
        assert!(range.end <= REGION && range.len() == layout.payload_len());
        assert!(range.len() as u64 == length);
        if let Some(mut span) = region.claim(range) {
            // The number is behind the last of the others, so that no two are alike.
            let number = u8::try_from(spans.len() + 1).unwrap_or(u8::MAX);
            span.bytes_mut().fill(number);
            spans.push((number, span));
        }
    }
    for (number, span) in &spans {
        assert!(
            span.bytes().iter().all(|byte| byte == number),
            "two views of one byte"
        );
    }
}

fn reply_seeds() -> Vec<Vec<u8>> {
    use v1::block_status::Status;
    use v1::commit_result::Result as Outcome;
    let status = |status| v1::BlockStatus {
        status: Some(status),
    };
    let lookup = v1::LookupReply {
        prefix_blocks: 2,
        blocks: vec![
            status(Status::Tier(1)),
            status(Status::Tier(2)),
            status(Status::Miss(1)),
        ],
    };
    let outcomes = [
        Outcome::Acknowledged(1),
        Outcome::Acknowledged(2),
        Outcome::Failed(3),
    ];
    let result = |(key, outcome): ([u8; 32], Outcome)| v1::CommitResult {
        key: key.to_vec().into(),
        result: Some(outcome),
    };
    let commit = v1::CommitReply {
        results: asked().into_iter().zip(outcomes).map(result).collect(),
    };
    let explain = v1::ExplainReply {
        variants: vec![v1::VariantInfo {
            kind: 1,
            tier: 2,
            level: 8,
            level_name: "zstd".into(),
            stored_bytes: 100,
            raw_bytes: 200,
            parent: BlockKey::ROOT.0.to_vec().into(),
            ..v1::VariantInfo::default()
        }],
        miss: 2,
        notes: vec!["a note".into()],
        model: None,
    };
    let opened = opened_seed();
    let event = v1::BlockEvent {
        key: vec![4; 32].into(),
        event: Some(v1::block_event::Event::Removed(1)),
        reason: 2,
    };
    let messages = [
        lookup.encode_to_vec(),
        explain.encode_to_vec(),
        commit.encode_to_vec(),
        opened.encode_to_vec(),
        event.encode_to_vec(),
        status(Status::Miss(14)).encode_to_vec(),
    ];
    let seed = |(which, message): (u8, _)| [vec![which], message].concat();
    (0..).zip(messages).map(seed).collect()
}

fn opened_seed() -> v1::SessionOpened {
    v1::SessionOpened {
        session: vec![1; 16].into(),
        namespace_id: 1,
        namespace_name: "default".into(),
        key_secret: vec![2; 32].into(),
        layout_fingerprint: model().fingerprint().0.to_vec().into(),
        arena: Some(v1::RegionGrant {
            region: 0,
            bytes: 4096,
            ticket: vec![3; 16].into(),
        }),
        daemon_version: "0.1.0".into(),
        descriptor_socket: "/run/kvtier/kvtierd.sock.fd".into(),
        durable: true,
    }
}

fn slot_seeds() -> Vec<Vec<u8>> {
    let layouts = Layouts::new(model());
    let kv = layouts.get(PayloadKind::Kv, 16);
    let len = kv.map_or(0, |layout| layout.payload_len()) as u64;
    let block = |index: u32, offset, length| v1::LeasedBlock {
        index,
        slot: Some(v1::Slot {
            region: REGION_NUMBER,
            offset,
            length,
            generation: 1,
        }),
        lease: index.into(),
        tier: 1,
        level: 0,
        tokens: 16,
        quality: 0,
    };
    let of = |how: u8, blocks: Vec<v1::LeasedBlock>| {
        [vec![how], v1::BlocksReady { blocks }.encode_to_vec()].concat()
    };
    vec![
        of(
            0,
            vec![block(0, 0, len), block(1, 4096, len), block(2, 4097, len)],
        ),
        of(
            2,
            vec![block(0, 0, 100), block(1, 100, 1), block(2, 65_535, 1)],
        ),
        of(
            2,
            vec![
                block(0, u64::MAX, 2),
                block(1, 65_535, 2),
                block(2, 5, 1 << 40),
            ],
        ),
    ]
}
