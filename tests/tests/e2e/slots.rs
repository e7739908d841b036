//! Malformed saves over plain gRPC: regions, slots and inline streams that cannot be.
//!
//! Upstairs:   `main`.
//! Downstairs: `requests`, whose helpers say what a refusal must hold.

use bytes::Bytes;
use kvtier_client::{PayloadKind, SaveBlock};
use kvtier_proto::v1;
use kvtier_tests::harness::{Daemon, Options, blocks, raw, run};
use tonic::Code;

use super::LIMIT;
use super::requests::{KV, key, opened, refused, still_works};

const DURABLE: i32 = v1::Acknowledge::Durable as i32;

#[test]
fn regions_of_sizes_that_cannot_be_are_refused_with_the_range() {
    run(LIMIT, async {
        let options = Options::default().staging_max_mib(16);
        let mut daemon = Daemon::start(options);
        let mut session = opened(&daemon).await;
        for bytes in [0, 1, 65_535, (16 << 20) + 1, 64 << 30, u64::MAX] {
            let request = v1::RegisterRegionRequest {
                session: session.token(),
                bytes,
                ..v1::RegisterRegionRequest::default()
            };
            let answer = session.rpc.register_region(request).await;
            let parts = &["bytes", &bytes.to_string(), "64 KiB to 16 MiB"];
            refused(answer, Code::InvalidArgument, parts);
        }
        // One region of all that is allowed, and not a byte more beside it.
        session.region(16 << 20).await;
        let request = v1::RegisterRegionRequest {
            session: session.token(),
            bytes: 65_536,
            ..v1::RegisterRegionRequest::default()
        };
        let answer = session.rpc.register_region(request).await;
        refused(answer, Code::ResourceExhausted, &["staging regions"]);
        assert_eq!(
            daemon.metrics().get("kvtier_region_bytes"),
            f64::from(16 << 20)
        );
        still_works(&mut daemon, 1).await;
    });
}

#[test]
fn blocks_that_cannot_be_saved_are_refused_by_index_and_field() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default());
        let mut session = opened(&daemon).await;
        let (grant, _) = session.region(1 << 20).await;
        let region = grant.region;
        let good = v1::BlockToSave {
            key: key(1),
            parent: key(0),
            position: 0,
            tokens: 16,
            kind: KV,
            opaque_bytes: 0,
            through: 0,
            slot: 0,
        };
        let bad = Code::InvalidArgument;
        let with = |change: fn(&mut v1::BlockToSave)| {
            let mut block = good.clone();
            change(&mut block);
            vec![good.clone(), block]
        };
        let cases: [(Vec<v1::BlockToSave>, &[&str]); 9] = [
            (vec![], &["blocks", "0 entries", "1 to 4096"]),
            (vec![good.clone(); 4097], &["blocks", "4097", "1 to 4096"]),
            (
                with(|block| block.key = vec![1; 5].into()),
                &["blocks[1].key", "5", "32"],
            ),
            (
                with(|block| block.parent = vec![].into()),
                &["blocks[1].parent", "32"],
            ),
            (
                with(|block| block.parent = block.key.clone()),
                &["blocks[1].parent"],
            ),
            (
                with(|block| block.tokens = 0),
                &["blocks[1]", "0 tokens", "1 to 16"],
            ),
            (
                with(|block| block.tokens = 17),
                &["blocks[1]", "17 tokens", "1 to 16"],
            ),
            (with(|block| block.kind = 77), &["kind"]),
            (
                with(|block| {
                    block.kind = v1::PayloadKind::Opaque.into();
                    block.opaque_bytes = u64::MAX;
                }),
                &["blocks[1]", "opaque bytes", "1 GiB"],
            ),
        ];
        for (asked, parts) in cases {
            refused(session.save(region, asked).await, bad, parts);
        }
        for wrong in [0, region + 1, u32::MAX] {
            let answer = session.save(wrong, vec![good.clone()]).await;
            refused(answer, bad, &["region", &wrong.to_string()]);
        }
        // Nothing of what was refused holds memory: the whole region can be granted.
        let all = (1..=33).map(|n| v1::BlockToSave {
            key: key(n),
            ..good.clone()
        });
        let grants = session.save(region, all.collect()).await.unwrap();
        let slots = grants.iter().filter_map(slot_of).count();
        assert_eq!(slots, 32, "32 blocks of 32 KiB fit into 1 MiB");
        still_works(&mut daemon, 1).await;
    });
}

fn slot_of(grant: &v1::SaveGrant) -> Option<v1::Slot> {
    match grant.grant {
        Some(v1::save_grant::Grant::Slot(slot)) => Some(slot),
        _ => None,
    }
}

// Goal: a slot is named by region, place, length, generation and key together; nothing else than
// what was granted is ever read, and a second commit of a slot is refused.
#[test]
fn slots_that_were_not_granted_are_stale() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default());
        let mut session = opened(&daemon).await;
        let (grant, memory) = session.region(1 << 20).await;
        let sdk = daemon.session(&blocks::gqa()).await;
        let set = blocks::loose(&sdk, 1, 2, PayloadKind::Kv);
        let asked = set.iter().map(raw::block).collect();
        let grants = session.save(grant.region, asked).await.unwrap();
        let slots: Vec<_> = grants.iter().filter_map(slot_of).collect();
        let len = usize::try_from(slots[0].length).unwrap();
        for (block, slot) in set.iter().zip(&slots) {
            use std::os::unix::fs::FileExt as _;
            let bytes = blocks::payload(&block.key, block.kind, len);
            memory.write_all_at(&bytes, slot.offset).unwrap();
        }
        let good = slots[0];
        let name = |slot: v1::Slot, block: &SaveBlock| v1::FilledSlot {
            key: block.key.0.to_vec().into(),
            slot: Some(slot),
            crc32: None,
            through: 0,
        };
        let mut wrong = vec![name(slots[1], &set[0]), name(good, &set[1])];
        let changes: [fn(&mut v1::Slot); 8] = [
            |slot| slot.region += 1,
            |slot| slot.region = 0,
            |slot| slot.offset += 4096,
            |slot| slot.offset = u64::MAX,
            |slot| slot.length -= 1,
            |slot| slot.length = u64::MAX,
            |slot| slot.generation += 1,
            |slot| slot.generation = 0,
        ];
        for change in changes {
            let mut slot = good;
            change(&mut slot);
            wrong.push(name(slot, &set[0]));
        }
        let stale = v1::commit_result::Result::Failed(v1::CommitFailure::StaleSlot.into());
        for one in wrong {
            let answer = session.commit(vec![one], v1::Acknowledge::Durable).await;
            assert_eq!(answer.unwrap()[0].result, Some(stale));
        }
        let crc = v1::FilledSlot {
            crc32: Some(12_345),
            ..name(slots[1], &set[1])
        };
        let answer = session.commit(vec![crc], v1::Acknowledge::Durable).await;
        let checksum = v1::commit_result::Result::Failed(v1::CommitFailure::Checksum.into());
        assert_eq!(answer.unwrap()[0].result, Some(checksum));
        let durable = v1::commit_result::Result::Acknowledged(DURABLE);
        let answer = session
            .commit(vec![name(good, &set[0])], v1::Acknowledge::Durable)
            .await;
        assert_eq!(answer.unwrap()[0].result, Some(durable));
        let answer = session
            .commit(vec![name(good, &set[0])], v1::Acknowledge::Durable)
            .await;
        assert_eq!(answer.unwrap()[0].result, Some(stale), "a second time");
        blocks::restore_all(&sdk, &set[..1]).await;
        let found = blocks::restore(&sdk, &set[1..]).await.unwrap();
        assert_eq!(found.hits, vec![], "its checksum was wrong");
        let answer = session.commit(vec![], v1::Acknowledge::Durable).await;
        refused(answer, Code::InvalidArgument, &["blocks", "1 to 4096"]);
        let answer = session
            .commit(vec![name(good, &set[0])], v1::Acknowledge::Unspecified)
            .await;
        refused(
            answer,
            Code::InvalidArgument,
            &["wait_for", "ACCEPTED or DURABLE"],
        );
        // Leases and slots that never were release nothing.
        let release = v1::ReleaseRequest {
            session: session.token(),
            leases: vec![0, 1, u64::MAX],
            slots: vec![good, slots[1]],
        };
        let released = session
            .rpc
            .release(release)
            .await
            .unwrap()
            .into_inner()
            .released;
        assert_eq!(released, 0);
        still_works(&mut daemon, 9).await;
    });
}

// Goal: the inline plane holds what it was told and no more.
#[test]
fn inline_streams_that_do_not_add_up_are_refused() {
    run(LIMIT, async {
        let mut daemon = Daemon::start(Options::default());
        let mut session = opened(&daemon).await;
        let token = session.token();
        let sdk = daemon.session(&blocks::gqa()).await;
        let set = blocks::loose(&sdk, 1, 1, PayloadKind::Kv);
        let payload = blocks::payload(&set[0].key, PayloadKind::Kv, 32 << 10);
        use v1::put_inline_request::Part;
        let header = |crc32| {
            Part::Block(v1::PutInlineBlock {
                session: token.clone(),
                block: Some(raw::block(&set[0])),
                crc32,
                wait_for: DURABLE,
            })
        };
        let data = |bytes: &[u8]| Part::Data(Bytes::copy_from_slice(bytes));
        let crc = crc32fast::hash(&payload);
        let cases: [(Vec<Part>, &[&str]); 6] = [
            (vec![], &["part", "at least one block"]),
            (vec![data(&payload)], &["data before any block"]),
            (
                vec![header(crc), data(&payload[1..])],
                &["data", "32767", "32768"],
            ),
            (vec![header(crc)], &["data", "0 bytes", "32768"]),
            (
                vec![header(crc), data(&payload), data(&[0])],
                &["data", "32769 bytes", "32768"],
            ),
            (
                vec![header(crc), data(&vec![0; (1 << 20) + 1])],
                &["data", "1048577 bytes", "1 MiB"],
            ),
        ];
        for (parts, words) in cases {
            let answer = session.rpc.put_inline(messages(parts)).await;
            refused(answer, Code::InvalidArgument, words);
        }
        let answer = session
            .rpc
            .put_inline(messages(vec![header(crc ^ 1), data(&payload)]));
        let result = answer.await.unwrap().into_inner().results[0].result;
        let checksum = v1::commit_result::Result::Failed(v1::CommitFailure::Checksum.into());
        assert_eq!(result, Some(checksum));
        let found = blocks::restore(&sdk, &set).await.unwrap();
        assert_eq!(found.hits, vec![], "none of these was stored");
        let answer = session
            .rpc
            .put_inline(messages(vec![header(crc), data(&payload)]));
        let result = answer.await.unwrap().into_inner().results[0].result;
        assert_eq!(
            result,
            Some(v1::commit_result::Result::Acknowledged(DURABLE))
        );
        blocks::restore_all(&sdk, &set).await;
        still_works(&mut daemon, 9).await;
    });
}

fn messages(
    parts: Vec<v1::put_inline_request::Part>,
) -> impl tokio_stream::Stream<Item = v1::PutInlineRequest> {
    let wrap = |part| v1::PutInlineRequest { part: Some(part) };
    tokio_stream::iter(parts.into_iter().map(wrap).collect::<Vec<_>>())
}
