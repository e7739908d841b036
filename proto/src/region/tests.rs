//! Tests of geometries: what is refused and how, and that every byte of a slot has one place.

use std::collections::BTreeSet;

use proptest::prelude::*;
use strum::IntoEnumIterator;

use super::*;

/// 2 layers of K and V with 3 heads of 4 bytes a row each, as a layer-first pool of 5 slots.
fn layer_first() -> RegionGeometry {
    let piece = |index: u64| Piece {
        offset: 64 + index * 100,
        slot_stride: 20,
        rows: 2,
        row_bytes: 8,
        row_stride: 10,
    };
    RegionGeometry {
        kind: PayloadKind::Kv,
        slots: 5,
        pieces: (0..4).map(piece).collect(),
    }
}

fn problem(geometry: &RegionGeometry, bytes: u64, payload: Option<u64>) -> String {
    geometry.check(bytes, payload).unwrap_err().to_string()
}

#[test]
fn check_takes_pools_by_layer_by_page_and_by_row() {
    layer_first().check(464, Some(64)).unwrap();
    let by_page = RegionGeometry {
        kind: PayloadKind::Kv,
        slots: 5,
        pieces: (0..4).map(|page| Piece::row(page * 16, 16, 64)).collect(),
    };
    by_page.check(5 * 64, Some(64)).unwrap();
    let by_row = RegionGeometry {
        kind: PayloadKind::Kv,
        slots: 5,
        pieces: vec![Piece {
            offset: 0,
            slot_stride: 16,
            rows: 4,
            row_bytes: 16,
            row_stride: 5 * 16,
        }],
    };
    by_row.check(5 * 64, Some(64)).unwrap();
}

#[test]
fn check_names_the_field_its_value_and_what_is_accepted() {
    let whole = |piece: Piece, slots: u32| RegionGeometry {
        kind: PayloadKind::Kv,
        slots,
        pieces: vec![piece],
    };
    let row = Piece::row(0, 64, 64);
    let strided = |row_stride| Piece {
        rows: 2,
        row_stride,
        ..row
    };
    let cases = [
        (whole(row, 0), "geometry.slots is 0; accepted: 1 to"),
        (whole(Piece { rows: 0, ..row }, 1), "pieces[0].rows is 0"),
        (
            whole(
                Piece {
                    row_bytes: 0,
                    ..row
                },
                1,
            ),
            "pieces[0].row_bytes is 0",
        ),
        (
            whole(strided(63), 1),
            "row_stride is 63; accepted: at least 64",
        ),
        (
            whole(
                Piece {
                    slot_stride: 63,
                    ..row
                },
                2,
            ),
            "slot_stride is 63",
        ),
        (whole(strided(80), 2), "slot_stride is 64"),
        (
            whole(row, 3),
            "last slot ends at byte 192; accepted: an end within",
        ),
        (
            whole(
                Piece {
                    offset: u64::MAX,
                    ..row
                },
                1,
            ),
            "ends at byte beyond 2^64",
        ),
        (
            whole(Piece::row(0, 32, 32), 1),
            "32 bytes a slot; accepted: exactly 64",
        ),
    ];
    for (geometry, part) in cases {
        let said = problem(&geometry, 128, Some(64));
        assert!(said.contains(part), "{said}");
    }
    let shares = RegionGeometry {
        kind: PayloadKind::Kv,
        slots: 1,
        pieces: vec![Piece::row(0, 32, 32), Piece::row(31, 32, 32)],
    };
    assert!(problem(&shares, 128, Some(64)).contains("pieces[1] is a piece that shares"));
    let rows = RegionGeometry {
        kind: PayloadKind::Opaque,
        slots: 1,
        pieces: (0..2u64)
            .map(|at| Piece {
                offset: at << 20,
                rows: 40_000,
                row_bytes: 1,
                row_stride: 1,
                slot_stride: 1,
            })
            .collect(),
    };
    assert!(problem(&rows, 1 << 30, None).contains("80000 rows; accepted: at most 65536"));
}

#[test]
fn runs_go_through_the_payload_once_and_join_rows_that_touch() {
    let run = |at, from, len| Run { at, from, len };
    let geometry = layer_first();
    let runs: Vec<Run> = geometry.runs(2).collect();
    assert_eq!(runs[..3], [run(104, 0, 8), run(114, 8, 8), run(204, 16, 8)]);
    assert_eq!((runs.len(), runs[7]), (8, run(414, 56, 8)));
    let touching = RegionGeometry {
        pieces: vec![Piece {
            offset: 5,
            slot_stride: 32,
            rows: 4,
            row_bytes: 8,
            row_stride: 8,
        }],
        ..layer_first()
    };
    assert_eq!(touching.runs(1).collect::<Vec<_>>(), [run(37, 0, 32)]);
}

#[test]
fn handover_reads_every_byte_that_it_writes() {
    for answer in Handover::iter() {
        assert_eq!(Handover::from_byte(answer as u8), Some(answer));
    }
    assert_eq!(Handover::from_byte(99), None);
}

fn any_piece() -> impl Strategy<Value = Piece> {
    let small = (0..200u64, 0..60u64, 0..5u32, 0..12u64, 0..60u64);
    small.prop_map(|(offset, slot_stride, rows, row_bytes, row_stride)| Piece {
        offset,
        slot_stride,
        rows,
        row_bytes,
        row_stride,
    })
}

proptest! {
    // Goal: Z1 and Z2 for whatever is described: bytes are counted one by one.
    #[test]
    fn runs_of_a_checked_geometry_stay_inside_and_apart(
        pieces in prop::collection::vec(any_piece(), 1..4),
        slots in 0..6u32,
    ) {
        let geometry = RegionGeometry { kind: PayloadKind::Opaque, slots, pieces };
        if geometry.check(400, None).is_err() {
            return Ok(());
        }
        for piece in &geometry.pieces {
            let one = RegionGeometry { pieces: vec![*piece], ..geometry.clone() };
            let mut seen = BTreeSet::new();
            for slot in 0..slots {
                for run in one.runs(slot) {
                    for at in run.at..run.at + run.len as u64 {
                        prop_assert!(at < 400 && seen.insert(at), "byte {at} of slot {slot}");
                    }
                }
            }
        }
        let mut seen = BTreeSet::new();
        let mut from = 0;
        for run in geometry.runs(0) {
            prop_assert_eq!(run.from, from);
            from += run.len;
            for at in run.at..run.at + run.len as u64 {
                prop_assert!(seen.insert(at));
            }
        }
        prop_assert_eq!(from as u64, geometry.slot_bytes().unwrap());
    }

    #[test]
    fn geometry_travels_unchanged(
        pieces in prop::collection::vec(any_piece(), 1..4),
        slots in any::<u32>(),
    ) {
        let geometry = RegionGeometry { kind: PayloadKind::Latent, slots, pieces };
        let wire = v1::RegionGeometry::from(&geometry);
        prop_assert_eq!(RegionGeometry::from_wire(Some(&wire)).unwrap(), geometry);
    }
}
