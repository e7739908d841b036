//! Keys and values as the inner loop wants them: packed f32, made from the cache's bytes.
//!
//! Upstairs:   `attention` reads panels.
//! Downstairs: `cache` owns one per layer and brings it up to date.
//!
//! Invariants kept here
//!   E1  Panels hold what the stored bytes say and nothing else; a token is converted after it
//!       was computed or restored, once, by the same code.
//!   P1  Everything below `ready` is converted; whoever changes bytes lowers `ready` first.
//!
//! Not here on purpose: deciding when. A serving engine would hold this in its own page layout.

use std::hint::black_box;
use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use super::config::{Attention, CacheDtype};
use super::kernel::PANEL;

/// Panels of keys that one task converts; a decode step has fewer and starts no task.
const TASK_PANELS: usize = 4;

const PAGE_NUMBERS: usize = 4096 / size_of::<f32>();

/// Numbers of one head inside a token's run of bytes of one part.
#[derive(Debug, Clone)]
struct Slice {
    part: usize,
    from: usize,
    width: usize,
}

/// Panels of one layer.
#[derive(Debug)]
pub(super) struct Prepared {
    /// Each KV head: where its keys come from, and its panels `[tokens / 16][key_dim][16]`.
    keys: Vec<(Vec<Slice>, Vec<f32>)>,
    /// Each KV head, each 16 columns of its values: where from, and `[tokens][16]`.
    values: Vec<(Slice, Vec<f32>)>,
    key_dim: usize,
    /// Panels of values a head.
    value_panels: usize,
    ready: usize,
}

impl Prepared {
    pub(super) fn new(attention: &Attention, max_tokens: usize) -> Self {
        let whole = |part, head, width| Slice {
            part,
            from: head * width,
            width,
        };
        let (keys, values): (Vec<Vec<Slice>>, Vec<Slice>) = match *attention {
            Attention::Heads {
                kv_heads,
                key_dim,
                value_dim,
                ..
            } => (0..kv_heads)
                .map(|head| (vec![whole(0, head, key_dim)], whole(1, head, value_dim)))
                .unzip(),
            // One shared head: its key is the latent and the rotated part, its value the latent.
            Attention::Latent {
                latent_dim,
                rope_dim,
                ..
            } => (
                vec![vec![whole(0, 0, latent_dim), whole(1, 0, rope_dim)]],
                vec![whole(0, 0, latent_dim)],
            ),
        };
        let key_dim = keys
            .first()
            .map_or(0, |slices| slices.iter().map(|s| s.width).sum());
        let value_panels = values
            .first()
            .map_or(0, |slice| slice.width.div_ceil(PANEL));
        let tokens = max_tokens.next_multiple_of(PANEL);
        let keys = keys
            .into_iter()
            .map(|slices| (slices, touched(tokens * key_dim)))
            .collect();
        let values = values
            .iter()
            .flat_map(panels_of)
            .map(|slice| (slice, touched(tokens * PANEL)))
            .collect();
        Self {
            keys,
            values,
            key_dim,
            value_panels,
            ready: 0,
        }
    }

    /// Bytes from `token` on have changed or will.
    pub(super) fn lower(&mut self, token: usize) {
        self.ready = self.ready.min(token);
    }

    /// Converts what is missing below `end`. `parts` are the bytes and their size per token.
    pub(super) fn raise(&mut self, end: usize, dtype: CacheDtype, parts: [(&[u8], usize); 2]) {
        if end <= self.ready {
            return;
        }
        // A panel of keys is rewritten whole: its later columns were not there before.
        let (first, panels) = (self.ready / PANEL, self.ready / PANEL..end.div_ceil(PANEL));
        for (slices, keys) in &mut self.keys {
            keys.par_chunks_mut(self.key_dim * PANEL)
                .enumerate()
                .skip(first)
                .take(panels.len())
                .with_min_len(TASK_PANELS)
                .for_each(|(index, panel)| {
                    let tokens = index * PANEL..end.min((index + 1) * PANEL);
                    pack_keys(dtype, slices, parts, tokens, panel);
                });
        }
        let few = if panels.len() < TASK_PANELS {
            usize::MAX
        } else {
            1
        };
        self.values
            .par_iter_mut()
            .with_min_len(few)
            .for_each(|(slice, values)| {
                let tokens = values.chunks_exact_mut(PANEL).enumerate().take(end);
                for (token, place) in tokens.skip(first * PANEL) {
                    let from = numbers(slice, parts, token).iter();
                    from.zip(place)
                        .for_each(|(bytes, place)| *place = widen(dtype, *bytes));
                }
            });
        self.ready = end;
    }

    /// Panels of 16 tokens each, keys of one head. `tokens` starts on a panel.
    #[expect(
        clippy::indexing_slicing,
        reason = "a head or token too many is a bug here"
    )]
    pub(super) fn keys(
        &self,
        head: usize,
        tokens: &Range<usize>,
    ) -> impl Iterator<Item = &[f32]> + Clone {
        let panel = self.key_dim * PANEL;
        let panels = tokens.start / PANEL..tokens.end.div_ceil(PANEL);
        self.keys[head].1[panels.start * panel..panels.end * panel].chunks_exact(panel)
    }

    /// Panels of 16 columns each, values of one head, `tokens` deep.
    #[expect(
        clippy::indexing_slicing,
        reason = "a head or token too many is a bug here"
    )]
    pub(super) fn values(
        &self,
        head: usize,
        tokens: &Range<usize>,
    ) -> impl Iterator<Item = &[f32]> + Clone {
        let range = tokens.start * PANEL..tokens.end * PANEL;
        let panels = &self.values[head * self.value_panels..(head + 1) * self.value_panels];
        panels.iter().map(move |(_, values)| &values[range.clone()])
    }
}

fn panels_of(head: &Slice) -> impl Iterator<Item = Slice> {
    let Slice { part, from, width } = *head;
    (0..width).step_by(PANEL).map(move |column| Slice {
        part,
        from: from + column,
        width: PANEL.min(width - column),
    })
}

fn pack_keys(
    dtype: CacheDtype,
    slices: &[Slice],
    parts: [(&[u8], usize); 2],
    tokens: Range<usize>,
    panel: &mut [f32],
) {
    for (column, token) in tokens.enumerate() {
        let places = panel.iter_mut().skip(column).step_by(PANEL);
        let from = slices.iter().flat_map(|slice| numbers(slice, parts, token));
        from.zip(places)
            .for_each(|(bytes, place)| *place = widen(dtype, *bytes));
    }
}

/// The stored numbers of `slice` of one token.
#[expect(
    clippy::indexing_slicing,
    reason = "a part or token too many is a bug here"
)]
fn numbers<'a>(
    slice: &Slice,
    parts: [(&'a [u8], usize); 2],
    token: usize,
) -> &'a [[u8; CacheDtype::BYTES]] {
    let (bytes, token_bytes) = parts[slice.part];
    let start = token * token_bytes + slice.from * CacheDtype::BYTES;
    bytes[start..start + slice.width * CacheDtype::BYTES]
        .as_chunks()
        .0
}

/// A stored number as f32; exact.
#[inline(always)]
pub(super) fn widen(dtype: CacheDtype, bytes: [u8; CacheDtype::BYTES]) -> f32 {
    match dtype {
        CacheDtype::Bf16 => bf16::from_le_bytes(bytes).to_f32(),
        CacheDtype::F16 => f16::from_le_bytes(bytes).to_f32(),
    }
}

/// Zeros whose pages are already there; see `cache` for why.
fn touched(numbers: usize) -> Vec<f32> {
    let mut values = vec![0.0; numbers];
    for page in values.iter_mut().step_by(PAGE_NUMBERS) {
        *page = black_box(0.0);
    }
    values
}
