//! Inputs of the target `requests` to begin with: one that works for every call.
//!
//! Upstairs:   `requests`.
//! Downstairs: nothing.

use bytes::Bytes;
use kvtier_proto::fuzzing::{Message, model};
use kvtier_proto::{BlockKey, v1};

use super::METHODS;

/// A call of an input. The messages that are marked get the session's token.
fn call(name: &str, messages: &[(bool, Vec<u8>)]) -> Vec<u8> {
    let which = METHODS.iter().position(|method| method.name == name);
    let number = |n: usize| u8::try_from(n).unwrap_or_default();
    let mut call = vec![number(which.unwrap_or_default()), number(messages.len())];
    for (token, message) in messages {
        let len = u16::try_from(message.len()).unwrap_or_default();
        let mark = if *token { 0x8000 } else { 0 };
        call.extend((len | mark).to_le_bytes());
        call.extend(message);
    }
    call
}

fn one(name: &str, message: &impl Message) -> Vec<u8> {
    call(name, &[(true, message.encode_to_vec())])
}

fn key(number: u8) -> Bytes {
    BlockKey([number; 32]).0.to_vec().into()
}

fn keys() -> Vec<Bytes> {
    vec![key(1), key(2), key(9)]
}

const KIND: i32 = v1::PayloadKind::Opaque as i32;

fn to_save(number: u8) -> v1::BlockToSave {
    v1::BlockToSave {
        key: key(number),
        parent: key(number - 1),
        position: 16 * u32::from(number),
        tokens: 16,
        kind: KIND,
        opaque_bytes: 1000,
        through: 0,
        slot: u32::from(number - 1),
    }
}

/// Two blocks are granted slots and committed.
fn saved() -> Vec<u8> {
    let save = v1::SaveRequest {
        region: 1,
        blocks: (1..=2).map(to_save).collect(),
        ..v1::SaveRequest::default()
    };
    let filled = |number: u8| v1::FilledSlot {
        key: key(number),
        slot: Some(v1::Slot {
            region: 1,
            offset: 4096 * u64::from(number - 1),
            length: 1000,
            generation: number.into(),
        }),
        crc32: None,
        through: 0,
    };
    let commit = v1::CommitRequest {
        blocks: (1..=2).map(filled).collect(),
        wait_for: 1,
        ..v1::CommitRequest::default()
    };
    [one("Save", &save), one("Commit", &commit)].concat()
}

/// A restore of three blocks, of which two are there, that is told of progress and cancelled.
fn restored() -> Vec<u8> {
    use v1::restore_command::Command;
    let command = |command| {
        let command = Some(command);
        let message = v1::RestoreCommand {
            restore_id: 5,
            command,
        };
        message.encode_to_vec()
    };
    let map = Some(v1::Slot {
        region: 1,
        offset: 0,
        length: 8 + 2,
        generation: 0,
    });
    let two_ended = v1::TwoEnded {
        map,
        first_token: 0,
        suffix_tokens: 7,
    };
    let start = Command::Start(v1::RestoreStart {
        keys: keys(),
        kind: KIND,
        deadline_ms: 100,
        scattered: true,
        two_ended: Some(two_ended),
        ..v1::RestoreStart::default()
    });
    let progress = Command::Progress(v1::RestoreProgress { computed_blocks: 1 });
    // A token would make starts of the other two.
    let messages = [
        (true, command(start)),
        (false, command(progress)),
        (false, command(Command::Cancel(v1::RestoreCancel {}))),
    ];
    call("Restore", &messages)
}

/// An engine's own region, without memory; two of its slots are saved, two restored into.
fn engine() -> Vec<u8> {
    use v1::restore_command::Command;
    let row = |offset: u64| v1::RegionPiece {
        offset,
        slot_stride: 1000,
        rows: 2,
        row_bytes: 250,
        row_stride: 250,
    };
    let geometry = v1::RegionGeometry {
        kind: KIND,
        slots: 4,
        pieces: vec![row(0), row(500)],
    };
    let register = v1::RegisterRegionRequest {
        bytes: 4000,
        purpose: v1::RegionPurpose::Engine as i32,
        geometry: Some(geometry),
        ..v1::RegisterRegionRequest::default()
    };
    let save = v1::SaveRequest {
        region: 2,
        blocks: (1..=2).map(to_save).collect(),
        ..v1::SaveRequest::default()
    };
    let filled = v1::FilledSlot {
        key: key(1),
        slot: Some(v1::Slot {
            region: 2,
            offset: 0,
            length: 1000,
            generation: 1,
        }),
        crc32: None,
        through: 0,
    };
    let commit = v1::CommitRequest {
        blocks: vec![filled],
        wait_for: 1,
        ..v1::CommitRequest::default()
    };
    let start = Command::Start(v1::RestoreStart {
        keys: vec![key(1), key(2)],
        kind: KIND,
        scattered: true,
        into: Some(v1::IntoSlots {
            region: 2,
            slots: vec![3, 2],
        }),
        ..v1::RestoreStart::default()
    });
    let restore = v1::RestoreCommand {
        restore_id: 6,
        command: Some(start),
    };
    [
        one("RegisterRegion", &register),
        one("Save", &save),
        one("Commit", &commit),
        call("Restore", &[(true, restore.encode_to_vec())]),
    ]
    .concat()
}

fn inline() -> Vec<u8> {
    use v1::put_inline_request::Part;
    let part = |part| v1::PutInlineRequest { part: Some(part) }.encode_to_vec();
    let payload = vec![7; 1000];
    let block = Part::Block(v1::PutInlineBlock {
        block: Some(to_save(3)),
        crc32: crc32fast::hash(&payload),
        wait_for: 1,
        ..v1::PutInlineBlock::default()
    });
    let data = Part::Data(payload.into());
    call("PutInline", &[(true, part(block)), (false, part(data))])
}

fn opening() -> v1::OpenSessionRequest {
    let cost = v1::LayerCost {
        token_flop: 1 << 20,
        pair_flop: 1 << 10,
        projection_flop: 1,
    };
    v1::OpenSessionRequest {
        protocol_version: 1,
        client: "fuzz".into(),
        model: Some(v1::ModelDescriptor::from(&model())),
        reader: Some(v1::ReaderSpec {
            two_ended: true,
            layers: vec![cost; model().layers.len()],
            ..v1::ReaderSpec::default()
        }),
    }
}

pub(in crate::fuzzing) fn seeds() -> Vec<Vec<u8>> {
    let lookup = v1::LookupRequest {
        keys: keys(),
        kind: KIND,
        ..v1::LookupRequest::default()
    };
    let get = v1::GetInlineRequest {
        keys: keys(),
        kind: KIND,
        scattered: true,
        ..v1::GetInlineRequest::default()
    };
    let pin = v1::PinRequest {
        keys: keys(),
        kind: KIND,
        ttl_s: 60,
        ..v1::PinRequest::default()
    };
    let release = v1::ReleaseRequest {
        leases: vec![1, 2, 7],
        ..v1::ReleaseRequest::default()
    };
    let step = v1::PrefillReport {
        before: 256,
        tokens: 256,
        micros: 9_000,
    };
    let report = v1::ReportPrefillRequest {
        reports: vec![step],
        ..v1::ReportPrefillRequest::default()
    };
    let explain = v1::ExplainRequest {
        key: key(1),
        ..v1::ExplainRequest::default()
    };
    let open = opening();
    let region = v1::RegisterRegionRequest {
        bytes: 64 << 10,
        ..v1::RegisterRegionRequest::default()
    };
    let stats = call("Stats", &[(false, Vec::new())]);
    let open = call("OpenSession", &[(false, open.encode_to_vec())]);
    let watch = one("WatchEvents", &v1::WatchEventsRequest::default());
    let wipe = one("Wipe", &v1::WipeRequest::default());
    vec![
        [saved(), one("Lookup", &lookup), one("Pin", &pin)].concat(),
        [saved(), one("GetInline", &get), one("Explain", &explain)].concat(),
        [saved(), restored(), one("Release", &release)].concat(),
        [one("ReportPrefill", &report), restored()].concat(),
        [inline(), one("Lookup", &lookup), wipe].concat(),
        [open, one("RegisterRegion", &region), stats].concat(),
        [watch, one("Prefetch", &pin)].concat(),
        engine(),
        [inline(), engine()].concat(),
    ]
}
