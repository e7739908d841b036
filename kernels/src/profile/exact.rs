//! Tables of the level that is bit-exact and predicts across layers.
//!
//! A section of its own after the parts of a profile's file, so that a profile without it has the
//! bytes that it had before there were such tables:
//!
//! | part    | bytes                                                                           |
//! |---------|---------------------------------------------------------------------------------|
//! | tag     | "EXCT"                                                                          |
//! | version | u16, 1                                                                          |
//! | parts   | u32 count; of each: layer u32, code u8, heads u32, dim u32, input (centre and   |
//! |         | scale, f32 a channel), u8 count of needs (layer u32, code u8), u32 columns,     |
//! |         | weights (a scale f32 a row, then i16), bias f32 a channel, within: 32 f32 a     |
//! |         | channel, pairs: 3 f32 a pair, steps i8 a channel, tables u8 a channel           |
//!
//! Upstairs:   [`super::Profile`]; [`crate::codec::ladder`] codes with them.
//! Downstairs: nothing.
//!
//! Invariants kept here
//!   P1  Tables that pass the check fit each other, and a prediction needs parts that come before.
//!
//! Not here on purpose: no bound on what sums to what. A prediction that leaves its range wraps on
//! every machine alike and costs room, never a bit.

use kvtier_proto::layout::PartCode;

use super::check::{self, Checked, FINITE, STEP, at_most, channels, exactly};
use super::{Input, Matrix16, NEEDS_MAX, Profile, ProfileError, Rope};
use crate::codec::ladder::cells::TABLES;

/// Channels that are predicted from one another as well as from what came before all of them.
pub const WITHIN: usize = 32;
/// Whole numbers that an input is read as lie within this and its negative.
pub const INPUT_MAX: i16 = 1023;
/// Numbers of a pair: the variances of both, and the covariance between them.
pub const PAIR: usize = 3;
/// Largest exponent of a step, and the least, negative.
pub const STEP_MAX: i8 = 100;

/// Tables of the K or V of one layer. All lists but the input's are in the order of coding, see
/// [`order`].
#[derive(Debug, Clone, PartialEq)]
pub struct ExactTables {
    /// Index of the layer in the model's descriptor.
    pub layer: u32,
    /// K or V.
    pub code: PartCode,
    /// Heads of the part.
    pub heads: u32,
    /// Channels of a head, an even number.
    pub dim: u32,
    /// How a value is read where it predicts others: `u = round((x - centre) / scale)`, held
    /// within [`INPUT_MAX`], where x of K is before RoPE.
    pub input: Input,
    /// Layer and code of each part that the prediction reads.
    pub needs: Vec<(u32, PartCode)>,
    /// A row for each channel; a column for each channel of all that is needed, then one for each
    /// channel of its own, of which those count that lie before its [`WITHIN`].
    pub weights: Matrix16,
    /// Added to the prediction of each channel.
    pub bias: Vec<f32>,
    /// For each channel, what it takes of the errors of the channels of its [`WITHIN`] that come
    /// before it.
    pub within: Vec<f32>,
    /// For each two channels, [`PAIR`] numbers about the errors that are left, before RoPE.
    pub pairs: Vec<f32>,
    /// For each channel, the size of its cells as a power of two.
    pub steps: Vec<i8>,
    /// For each channel, its table of probabilities.
    pub tables: Vec<u8>,
}

impl ExactTables {
    /// Channels of a token: heads times dim.
    pub const fn channels(&self) -> usize {
        self.heads as usize * self.dim as usize
    }
}

/// The channels of a part in the order in which they are coded: those that RoPE turns together
/// lie side by side. With each, the pair of RoPE that it belongs to.
pub fn order(rope: Option<&Rope>, (heads, dim): (usize, usize)) -> Vec<(usize, Option<usize>)> {
    let mut order = Vec::with_capacity(heads * dim);
    for head in (0..heads).map(|head| head * dim) {
        let turned = rope.map_or(0, |rope| rope.frequencies.len()).min(dim / 2);
        for pair in 0..turned {
            let [a, b] = match rope.is_some_and(|rope| rope.rotate_half) {
                true => [pair, pair + turned],
                false => [2 * pair, 2 * pair + 1],
            };
            order.extend([(head + a, Some(pair)), (head + b, Some(pair))]);
        }
        order.extend((2 * turned..dim).map(|channel| (head + channel, None)));
    }
    order
}

impl Profile {
    /// Tables of the exact level of a part, when there are some.
    pub fn exact(&self, layer: u32, code: PartCode) -> Option<&ExactTables> {
        let key = (layer, code as u8);
        let of = |part: &ExactTables| (part.layer, part.code as u8);
        let at = self.exact.binary_search_by_key(&key, of).ok()?;
        self.exact.get(at)
    }

    /// The rotation of such a part; `None` where it is not rotated.
    pub(crate) fn turned(&self, code: PartCode) -> Option<&Rope> {
        let turned = code == PartCode::K && self.k_after_rope;
        self.rope.as_ref().filter(|_| turned)
    }

    pub(super) fn check_exact(&self) -> Checked {
        let mut before = None;
        for part in &self.exact {
            let (layer, code) = (part.layer, part.code);
            if before.is_some_and(|before| before >= (layer, code as u8)) {
                return Err(ProfileError::Order { layer, code });
            }
            before = Some((layer, code as u8));
            self.check_exact_part(part)?;
        }
        Ok(())
    }

    fn check_exact_part(&self, part: &ExactTables) -> Checked {
        let own = channels(part.heads, part.dim)?;
        if !part.dim.is_multiple_of(2) {
            let got = f64::from(part.dim);
            return Err(ProfileError::number("exact dim", got, "an even number"));
        }
        if let Some(rope) = self.turned(part.code) {
            let most = part.dim as usize / 2;
            at_most("rope frequencies", rope.frequencies.len(), most)?;
        }
        at_most("exact needs", part.needs.len(), NEEDS_MAX)?;
        let mut columns = own;
        for (layer, code) in &part.needs {
            let before = (*layer, *code as u8) < (part.layer, part.code as u8);
            let needed = self.exact(*layer, *code).filter(|_| before);
            columns += needed
                .ok_or(ProfileError::Needs {
                    layer: part.layer,
                    code: part.code,
                    from_layer: *layer,
                    from_code: *code,
                })?
                .channels();
        }
        check::check_matrix("exact weights", &part.weights, (own, columns))?;
        for (field, list, want, range) in [
            ("exact centre", &part.input.centre, own, FINITE),
            ("exact scale", &part.input.scale, own, STEP),
            ("exact bias", &part.bias, own, FINITE),
            ("exact within", &part.within, own * WITHIN, FINITE),
            ("exact pairs", &part.pairs, own / 2 * PAIR, FINITE),
        ] {
            exactly(field, list.len(), want)?;
            check::all(field, list, range)?;
        }
        for pair in part.pairs.as_chunks::<PAIR>().0 {
            let [first, second, _] = *pair;
            check::all("exact variance", &[first, second], STEP)?;
        }
        exactly("exact steps", part.steps.len(), own)?;
        let far = |step: &&i8| step.unsigned_abs() > STEP_MAX.unsigned_abs();
        if let Some(step) = part.steps.iter().find(far) {
            let got = f64::from(*step);
            return Err(ProfileError::number("exact step", got, "-100 to 100"));
        }
        exactly("exact tables", part.tables.len(), own)?;
        let unknown = |table: &&u8| usize::from(**table) >= TABLES;
        match part.tables.iter().find(unknown) {
            Some(table) => Err(ProfileError::number(
                "exact table",
                f64::from(*table),
                "0 to 24",
            )),
            None => Ok(()),
        }
    }
}
