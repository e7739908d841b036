//! What both widths of registers do alike: the loops over steps and groups, and the safe doors to
//! them. One of this package's rooms of unsafe code.
//!
//! Upstairs:   [`super`].
//! Downstairs: `avx2` and `avx512`, which say what a register does.
//!
//! Unsafe is used to call a function that needs some instructions with the proof that they are
//! there, and to ask for memory before it is needed.
//!
//! Invariants kept here
//!   R3  Words are read only while whole registers of them are left for a step.

use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};

/// How far ahead of its writing memory is asked for. Unit: bytes.
///
/// A step that finds its output in no cache waits longer for that than for its table.
const AHEAD: usize = 4096;
/// What a processor fetches at a time. Unit: bytes.
const LINE: usize = 64;

/// Asks for a line that will be written.
#[inline]
fn fetch(line: *const u8) {
    // SAFETY: a hint, which reads nothing that a program could see; an address that is nobody's
    // is ignored.
    unsafe { _mm_prefetch::<_MM_HINT_ET0>(line.cast()) }
}

/// Asks for memory that will be written.
#[inline]
pub(super) fn fetch_all(soon: &[u8]) {
    for line in soon.chunks(LINE) {
        fetch(line.as_ptr());
    }
}

/// Asks for what lies [`AHEAD`] of memory that is written now: most likely that is next.
#[inline]
pub(super) fn fetch_ahead(now: &[u8]) {
    for line in now.chunks(LINE) {
        fetch(line.as_ptr().wrapping_add(AHEAD));
    }
}

/// The functions of a width, in a module that has its registers: `REGS`, `WORDS`, `Merge`,
/// `load_states`, `store_states`, `decode_step`, `encode_steps` and `split_groups`.
macro_rules! steps {
    ($fast:ty, $features:literal) => {
        /// Decodes whole steps while words are left for all their registers. Returns how many
        /// symbols it decoded.
        pub(crate) fn decode(
            _: $fast,
            decoder: &mut Decoder<'_>,
            slots: &Slots,
            out: &mut [u8],
        ) -> usize {
            // SAFETY: the proof is of all that the function needs (V1).
            unsafe { decode_steps(decoder, slots, out) }
        }

        /// [`decode`] of two streams at once: one waits for its table while the other counts.
        /// Returns how many symbols it decoded of each. `soon` is fetched meanwhile.
        pub(crate) fn decode_two(
            _: $fast,
            decoders: [&mut Decoder<'_>; 2],
            slots: &Slots,
            out: [&mut [u8]; 2],
            soon: &[u8],
        ) -> usize {
            // SAFETY: the proof is of all that the function needs (V1).
            unsafe { decode_two_steps(decoders, slots, out, soon) }
        }

        /// Decodes the symbols of whole groups and puts these together, while words are left as
        /// above. Returns how many groups it did.
        pub(crate) fn join(
            _: $fast,
            coder: (&mut Decoder<'_>, &Slots),
            form: (Kind, Window),
            rest: &[u8],
            raw: &mut [u8],
        ) -> usize {
            // SAFETY: the proof is of all that the function needs (V1).
            unsafe { join_groups(coder, form, rest, raw) }
        }

        /// Encodes whole steps, the last one first, while there is room for all their words.
        /// Returns how many symbols are left, or `None` when one has no code.
        pub(crate) fn encode(
            _: $fast,
            encoder: &mut Encoder<'_>,
            codes: &Codes,
            symbols: &[u8],
        ) -> Option<usize> {
            // SAFETY: the proof is of all that the function needs (V1).
            unsafe { encode_steps(encoder, codes, symbols) }
        }

        /// [`crate::codec::halves::split`].
        pub(crate) fn split(
            _: $fast,
            kind: Kind,
            window: Window,
            raw: &[u8],
            planes: PlanesMut<'_>,
        ) {
            // SAFETY: the proof is of all that the function needs (V1).
            unsafe { split_groups(kind, window, raw, planes) }
        }

        /// [`Slots::fill`].
        pub(crate) fn fill(_: $fast, frequencies: &Frequencies, slots: &mut [u32; SCALE]) {
            // SAFETY: the proof is of all that the function needs (V1).
            unsafe { fill_slots(frequencies, slots) }
        }

        #[target_feature(enable = $features)]
        fn decode_steps(decoder: &mut Decoder<'_>, slots: &Slots, out: &mut [u8]) -> usize {
            let mut states = load_states(&decoder.states);
            let (mut at, mut done) = (0, 0);
            for step in out.as_chunks_mut::<LANES>().0 {
                if decoder.words.len() - at < REGS * WORDS {
                    break;
                }
                decode_step((&mut states, &mut at), decoder.words, slots, step);
                done += LANES;
            }
            store_states(&mut decoder.states, states);
            decoder.words = decoder.words.get(at..).unwrap_or_default();
            done
        }

        #[target_feature(enable = $features)]
        fn decode_two_steps(
            [a, b]: [&mut Decoder<'_>; 2],
            slots: &Slots,
            [to_a, to_b]: [&mut [u8]; 2],
            soon: &[u8],
        ) -> usize {
            let (mut states_a, mut states_b) = (load_states(&a.states), load_states(&b.states));
            let (mut at_a, mut at_b, mut done) = (0, 0, 0);
            let mut soon = soon.chunks(2 * GROUP);
            let to_a = to_a.as_chunks_mut().0.iter_mut();
            for (to_a, to_b) in to_a.zip(to_b.as_chunks_mut().0) {
                if a.words.len() - at_a < REGS * WORDS || b.words.len() - at_b < REGS * WORDS {
                    break;
                }
                steps::fetch_all(soon.next().unwrap_or_default());
                decode_step((&mut states_a, &mut at_a), a.words, slots, to_a);
                decode_step((&mut states_b, &mut at_b), b.words, slots, to_b);
                done += LANES;
            }
            store_states(&mut a.states, states_a);
            store_states(&mut b.states, states_b);
            a.words = a.words.get(at_a..).unwrap_or_default();
            b.words = b.words.get(at_b..).unwrap_or_default();
            done
        }

        /// A step decodes the symbols of one group: putting that together fits into the time in
        /// which the next step waits for its table.
        #[target_feature(enable = $features)]
        fn join_groups(
            (decoder, slots): (&mut Decoder<'_>, &Slots),
            (kind, window): (Kind, Window),
            rest: &[u8],
            raw: &mut [u8],
        ) -> usize {
            let mut states = load_states(&decoder.states);
            let merge = Merge::new(kind, window);
            let (mut at, mut done) = (0, 0);
            let mut symbols = [0; LANES];
            let groups = raw.as_chunks_mut::<{ 2 * GROUP }>().0;
            for (group, rest) in groups.iter_mut().zip(rest.chunks_exact(kind.plane_bytes())) {
                if decoder.words.len() - at < REGS * WORDS {
                    break;
                }
                steps::fetch_ahead(group);
                decode_step((&mut states, &mut at), decoder.words, slots, &mut symbols);
                merge.group(&symbols, rest, group);
                done += 1;
            }
            store_states(&mut decoder.states, states);
            decoder.words = decoder.words.get(at..).unwrap_or_default();
            done
        }

        #[target_feature(enable = $features)]
        fn fill_slots(frequencies: &Frequencies, slots: &mut [u32; SCALE]) {
            frequencies.fill(slots);
        }
    };
}

pub(super) use steps;
