//! Tests of the choice of a path, and of what no codec's tests compare between paths.
#![allow(
    clippy::cast_possible_truncation,
    reason = "test data is cut to size on purpose"
)]
use super::*;

#[test]
fn a_path_is_taken_only_inside_of_what_was_allowed() {
    let all: Vec<_> = Path::available().collect();
    assert_eq!(all[0], Path::Scalar);
    assert_eq!(path(), all[all.len() - 1].name());
    for limit in [Path::Scalar, Path::Avx2, Path::Avx512, Path::Amx] {
        limit.at_most(|| {
            let best = all.iter().rfind(|path| **path <= limit);
            assert_eq!(Some(path()), best.map(|path| path.name()));
            assert_eq!(fast().is_some(), path() != "scalar");
            assert_eq!(fast512().is_some(), ["avx512", "amx"].contains(&path()));
        });
    }
    let _ = std::panic::catch_unwind(|| Path::Scalar.at_most(|| panic!("on purpose")));
    assert_eq!(path(), all[all.len() - 1].name(), "the limit is back");
}

// What `turn_to_rows` does is said in its one line.
#[test]
fn columns_become_the_same_rows_by_every_path_and_leave_the_others_alone() {
    let columns: Vec<[u8; ROWS]> = (0..BLOCK)
        .map(|i| std::array::from_fn(|j| (i * 37 + j * 11) as u8))
        .collect();
    let masks: [u8; BLOCK] = std::array::from_fn(|i| if i % 3 == 0 { 16 } else { 0 });
    let columns: [&[u8; ROWS]; BLOCK] = std::array::from_fn(|i| &columns[i]);
    for path in Path::available() {
        let width = BLOCK + 3;
        let mut rows = vec![0xee; ROWS * width];
        path.at_most(|| turn_to_rows(&columns, &masks, &mut rows, width));
        for (j, row) in rows.chunks(width).enumerate() {
            let want: Vec<u8> = (0..BLOCK).map(|i| columns[i][j] ^ masks[i]).collect();
            assert_eq!(row[..BLOCK], want, "row {j} by {}", path.name());
            assert_eq!(row[BLOCK..], [0xee; 3], "row {j} by {}", path.name());
        }
    }
}

#[test]
fn costs_are_the_same_sums_by_every_path() {
    let counts: [Pair; 32] = std::array::from_fn(|i| [(i * 31) as i16, 1000 - 7 * i as i16]);
    let costs_of = |i: usize| std::array::from_fn(|j| [(i * j) as i16, 4095 - (i + j) as i16]);
    let table: [[Pair; SIDE]; 32] = std::array::from_fn(costs_of);
    for path in Path::available() {
        let mut sums = [5; SIDE];
        path.at_most(|| costs(&counts, &table, &mut sums));
        for (j, sum) in sums.into_iter().enumerate() {
            let pairs = counts.as_flattened().iter().zip(0..);
            let products =
                pairs.map(|(count, at)| i32::from(*count) * i32::from(table[at / 2][j][at % 2]));
            assert_eq!(
                sum,
                5 + products.sum::<i32>(),
                "class {j} by {}",
                path.name()
            );
        }
    }
}
