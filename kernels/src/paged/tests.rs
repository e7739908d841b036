//! Tests of the page mover against a naive element-by-element reference.
#![allow(clippy::cast_possible_truncation, reason = "test sizes are small")]

use kvtier_proto::layout::PartCode;
use proptest::prelude::*;
use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::layout::{HeadOrder, LayerPlace, PagedLayout, Place, Widths};
use super::*;

/// Address of one element, from the definition of the array and not from strides.
fn naive_address(
    layout: &PagedLayout,
    layer: usize,
    code: PartCode,
    [page, slot, head, dim]: [usize; 4],
) -> usize {
    let (first, second) = match layout.widths {
        Widths::Kv { k, v } => (k as usize, v as usize),
        Widths::Latent { latent, rope } => (latent as usize, rope as usize),
    };
    let is_first = matches!(code, PartCode::K | PartCode::Latent);
    let (array, wide, column) = match &layout.layers[layer] {
        LayerPlace::Split([array, _]) if is_first => (array, first, dim),
        LayerPlace::Split([_, array]) => (array, second, dim),
        LayerPlace::Interleaved(array) if is_first => (array, first + second, dim),
        LayerPlace::Interleaved(array) => (array, first + second, first + dim),
    };
    let (heads, tokens) = (layout.heads as usize, layout.page_tokens as usize);
    let row = match layout.order {
        HeadOrder::Nhd => slot * heads + head,
        HeadOrder::Hnd => head * tokens + slot,
    };
    let element = row * wide + column;
    array.base as usize + page * array.page_stride as usize + element * layout.element.bytes()
}

fn naive_gather(
    layout: &PagedLayout,
    layer: usize,
    code: PartCode,
    pool: &[u8],
    table: &[u32],
    tokens: std::ops::Range<u32>,
) -> Vec<u8> {
    let dims = match (layout.widths, code) {
        (Widths::Kv { k, .. }, PartCode::K) => k,
        (Widths::Kv { v, .. }, _) => v,
        (Widths::Latent { latent, .. }, PartCode::Latent) => latent,
        (Widths::Latent { rope, .. }, _) => rope,
    };
    let mut part = Vec::new();
    for token in tokens {
        let page = table[(token / layout.page_tokens) as usize] as usize;
        let slot = (token % layout.page_tokens) as usize;
        for head in 0..layout.heads as usize {
            for dim in 0..dims as usize {
                let at = naive_address(layout, layer, code, [page, slot, head, dim]);
                part.extend_from_slice(&pool[at..at + layout.element.bytes()]);
            }
        }
    }
    part
}

/// Arrays back to back with gaps, of `layers` layers; also the size of the pool.
fn with_layers(
    mut layout: PagedLayout,
    layers: usize,
    split: bool,
    gaps: [u64; 2],
) -> (PagedLayout, usize) {
    let (first, second) = match layout.widths {
        Widths::Kv { k, v } => (u64::from(k), u64::from(v)),
        Widths::Latent { latent, rope } => (u64::from(latent), u64::from(rope)),
    };
    let rows = u64::from(layout.heads) * u64::from(layout.page_tokens);
    let mut end = gaps[0];
    let mut array = |width: u64| {
        let page_stride = rows * width * layout.element.bytes() as u64 + gaps[1];
        let place = Place {
            base: end,
            page_stride,
        };
        end += page_stride * u64::from(layout.pages) + gaps[0];
        place
    };
    layout.layers = (0..layers)
        .map(|_| match split {
            true => LayerPlace::Split([array(first), array(second)]),
            false => LayerPlace::Interleaved(array(first + second)),
        })
        .collect();
    (layout, end as usize)
}

#[derive(Debug, Clone)]
struct Case {
    layout: PagedLayout,
    pool: Vec<u8>,
    other: Vec<u8>,
    table: Vec<u32>,
    tokens: std::ops::Range<u32>,
    codes: [PartCode; 2],
}

fn any_layout() -> impl Strategy<Value = (PagedLayout, usize)> {
    let element = prop::sample::select(vec![Element::Bf16, Element::F32, Element::F8E4m3]);
    let sizes = (1_u32..7, 1_u32..9, 1_u32..6);
    let widths = (any::<bool>(), 1_u32..20, 1_u32..20).prop_map(|(mla, a, b)| match mla {
        true => Widths::Latent { latent: a, rope: b },
        false => Widths::Kv { k: a, v: b },
    });
    let order = prop::sample::select(vec![HeadOrder::Nhd, HeadOrder::Hnd]);
    let place = (1_usize..4, any::<bool>(), 0_u64..9, 0_u64..9);
    (element, sizes, widths, order, place).prop_map(|(element, sizes, widths, order, place)| {
        let (pages, page_tokens, heads) = sizes;
        let (layers, split, gap, page_gap) = place;
        let heads = if matches!(widths, Widths::Latent { .. }) {
            1
        } else {
            heads
        };
        let layout = PagedLayout {
            element,
            pages,
            page_tokens,
            heads,
            widths,
            order,
            layers: vec![],
        };
        with_layers(layout, layers, split, [gap, page_gap])
    })
}

fn any_case() -> impl Strategy<Value = Case> {
    (any_layout(), any::<u64>()).prop_map(|((layout, len), seed)| {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut table: Vec<u32> = (0..layout.pages).collect();
        table.shuffle(&mut random);
        table.truncate(random.random_range(1..=table.len()));
        let slots = table.len() as u32 * layout.page_tokens;
        let start = random.random_range(0..slots);
        let tokens = start..random.random_range(start..slots) + 1;
        let (mut pool, mut other) = (vec![0; len], vec![0; len]);
        random.fill(&mut pool[..]);
        random.fill(&mut other[..]);
        let codes = match layout.widths {
            Widths::Kv { .. } => [PartCode::K, PartCode::V],
            Widths::Latent { .. } => [PartCode::Latent, PartCode::Rope],
        };
        Case {
            layout,
            pool,
            other,
            table,
            tokens,
            codes,
        }
    })
}

proptest! {
    #[test]
    fn gather_equals_the_naive_reference(case in any_case()) {
        let Case { layout, pool, table, tokens, codes, .. } = case;
        let span =
            PageSpan::new(&table, tokens.clone(), layout.page_tokens, layout.pages).unwrap();
        for layer in 0..layout.layers.len() {
            for code in codes {
                let part = layout.part(layer, code).unwrap();
                let mut out = vec![0; part.part_bytes(&span)];
                part.gather(&pool, &span, &mut out).unwrap();
                let want = naive_gather(&layout, layer, code, &pool, &table, tokens.clone());
                prop_assert_eq!(out, want);
            }
        }
    }

    // Goal: scatter puts every byte where gather found it, and touches nothing else.
    // Method: move everything into a pool of other bytes; the part must come out of it again,
    // and every byte outside the addressed elements must be as it was.
    #[test]
    fn scatter_is_the_inverse_of_gather_and_touches_nothing_else(case in any_case()) {
        let Case { layout, pool, other, table, tokens, codes } = case;
        let span =
            PageSpan::new(&table, tokens.clone(), layout.page_tokens, layout.pages).unwrap();
        let (mut target, mut want) = (other.clone(), other);
        for layer in 0..layout.layers.len() {
            for code in codes {
                let part = layout.part(layer, code).unwrap();
                let mut moved = vec![0; part.part_bytes(&span)];
                part.gather(&pool, &span, &mut moved).unwrap();
                part.scatter(&moved, &span, &mut target).unwrap();
                let mut again = vec![0; moved.len()];
                part.gather(&target, &span, &mut again).unwrap();
                prop_assert_eq!(again, moved);
                for token in tokens.clone() {
                    let page = table[(token / layout.page_tokens) as usize] as usize;
                    let slot = (token % layout.page_tokens) as usize;
                    for head in 0..layout.heads as usize {
                        for dim in 0..part.place().dim as usize {
                            let at =
                                naive_address(&layout, layer, code, [page, slot, head, dim]);
                            let element = at..at + layout.element.bytes();
                            want[element.clone()].copy_from_slice(&pool[element]);
                        }
                    }
                }
            }
        }
        prop_assert_eq!(target, want);
    }
}

fn small() -> PagedLayout {
    PagedLayout {
        element: Element::Bf16,
        pages: 4,
        page_tokens: 2,
        heads: 3,
        widths: Widths::Kv { k: 8, v: 4 },
        order: HeadOrder::Hnd,
        layers: vec![LayerPlace::Interleaved(Place {
            base: 16,
            page_stride: 144,
        })],
    }
}

#[test]
fn shape_of_a_gathered_part_is_what_a_codec_takes() {
    let part = small().part(0, PartCode::K).unwrap();
    let span = PageSpan::new(&[3, 1], 1..4, 2, 4).unwrap();
    let shape = part.shape(&span).unwrap();
    assert_eq!((shape.tokens(), shape.width(), shape.heads()), (3, 24, 3));
    assert_eq!(shape.raw_bytes(), part.part_bytes(&span));
}

#[test]
fn span_refuses_tables_that_would_read_somebody_elses_pages() {
    let cases: [(&[u32], _, &str); 6] = [
        (
            &[0, 4],
            0..4,
            "entry 1 of the page table is page 4; the pool has 4 pages",
        ),
        (
            &[0, u32::MAX],
            0..4,
            "entry 1 of the page table is page 4294967295",
        ),
        (
            &[0, 1, 0],
            1..6,
            "entries 0 and 2 of the page table both are page 0",
        ),
        (
            &[0, 1],
            2..5,
            "5 tokens at 2 a page need more than the table's 2 pages",
        ),
        (&[0, 1], 2..2, "tokens 2 to 2 are no run"),
        (&[], 0..1, "more than the table's 0 pages"),
    ];
    for (table, tokens, want) in cases {
        let problem = PageSpan::new(table, tokens, 2, 4).unwrap_err().to_string();
        assert!(problem.contains(want), "{problem}");
    }
    #[allow(clippy::reversed_empty_ranges, reason = "that is the case")]
    let reversed = PageSpan::new(&[0, 1], 3..1, 2, 4).unwrap_err().to_string();
    assert!(reversed.contains("tokens 3 to 1 are no run"), "{reversed}");
}

// Entries outside the run may be padding: only those of the run are looked at.
#[test]
fn span_ignores_entries_outside_its_run() {
    assert!(PageSpan::new(&[9, 2, 9, 9], 2..4, 2, 4).is_ok());
}

#[test]
fn gather_refuses_memory_of_the_wrong_size_before_it_copies() {
    let layout = small();
    let part = layout.part(0, PartCode::V).unwrap();
    let span = PageSpan::new(&[3], 0..2, 2, 4).unwrap();
    let mut out = vec![9; part.part_bytes(&span)];
    let short = vec![0; part.pool_bytes() - 1];
    let problem = part
        .gather(&short, &span, &mut out)
        .unwrap_err()
        .to_string();
    assert_eq!(problem, "pool has 591 bytes but its layout needs 592");
    let pool = vec![0; part.pool_bytes()];
    let problem = part
        .gather(&pool, &span, &mut out[1..])
        .unwrap_err()
        .to_string();
    assert_eq!(problem, "part has 47 bytes but the span makes 48");
    let foreign = PageSpan::new(&[3], 0..2, 2, 5).unwrap();
    assert!(matches!(
        part.gather(&pool, &foreign, &mut out),
        Err(PagedError::OtherPool {
            span_pages: 5,
            pages: 4,
            ..
        })
    ));
    assert!(out.iter().all(|byte| *byte == 9));
}

#[test]
fn layout_refuses_layers_and_parts_it_does_not_keep() {
    let mut layout = small();
    let problem = layout.part(1, PartCode::K).unwrap_err().to_string();
    assert_eq!(problem, "layer 1 of a layout of 1 layers");
    let problem = layout.part(0, PartCode::Rope).unwrap_err().to_string();
    assert_eq!(problem, "the layout keeps no rope part; it keeps k and v");
    layout.widths = Widths::Latent {
        latent: 12,
        rope: 0,
    };
    let problem = layout.part(0, PartCode::Rope).unwrap_err().to_string();
    assert_eq!(problem, "the layout keeps no rope part; it keeps latent");
}

#[test]
fn part_refuses_places_whose_rows_overlap_or_that_no_address_reaches() {
    let good = *small().part(0, PartCode::K).unwrap().place();
    assert!(PagedPart::new(good).is_ok());
    let strides = good.strides;
    let cases = [
        (PartPlace { heads: 0, ..good }, "heads is 0"),
        (PartPlace { pages: 0, ..good }, "pages is 0"),
        (
            PartPlace {
                strides: Strides { page: 0, ..strides },
                ..good
            },
            "page_stride is 0",
        ),
        (
            PartPlace {
                strides: Strides {
                    token: 15,
                    ..strides
                },
                ..good
            },
            "at least 16",
        ),
        (
            PartPlace {
                strides: Strides {
                    page: 135,
                    ..strides
                },
                ..good
            },
            "page_stride is 135",
        ),
        (
            PartPlace {
                strides: Strides {
                    page: u64::MAX / 2,
                    ..strides
                },
                ..good
            },
            "exceed",
        ),
        (
            PartPlace {
                base: u64::MAX - 8,
                ..good
            },
            "exceed",
        ),
    ];
    for (place, want) in cases {
        let problem = PagedPart::new(place).unwrap_err().to_string();
        assert!(problem.contains(want), "{problem}");
    }
}

// A pool that keeps all layers of a token together is no array of the table in `layout`; its
// strides say everything.
#[test]
fn gather_follows_the_strides_of_a_tensor_whose_layers_lie_inside_a_token() {
    let (pages, page_tokens, layers, heads, dim) = (3_u32, 4_u32, 2_u64, 2_u32, 5_u32);
    let row = u64::from(dim);
    let token = layers * u64::from(heads) * row;
    let pool: Vec<u8> = (0..3 * 4 * token).map(|i| i as u8).collect();
    for layer in 0..layers {
        let part = PagedPart::new(PartPlace {
            element: Element::U8,
            pages,
            page_tokens,
            heads,
            dim,
            base: layer * u64::from(heads) * row,
            strides: Strides {
                page: 4 * token,
                token,
                head: row,
            },
        })
        .unwrap();
        let span = PageSpan::new(&[2, 0], 3..6, page_tokens, pages).unwrap();
        let mut out = vec![0; part.part_bytes(&span)];
        part.gather(&pool, &span, &mut out).unwrap();
        let want: Vec<u8> = [(2, 3), (0, 0), (0, 1)]
            .iter()
            .flat_map(|(page, slot)| {
                let at = ((page * 4 + slot) * token + layer * 10) as usize;
                pool[at..at + 10].to_vec()
            })
            .collect();
        assert_eq!(out, want);
    }
}
