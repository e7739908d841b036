//! The step and the table of a channel: those with which its samples take the fewest bits.
//!
//! Upstairs:   [`super`].
//! Downstairs: [`crate::codec::ladder::cells`].

use crate::codec::ladder::cells::{Form, TABLES, all, power, sigma};
use crate::profile::exact::STEP_MAX;

/// Largest distance of a cell that a table may hold.
const FAR: i32 = 127;

/// Values of a channel, and what they are about.
pub(super) struct Values {
    pub(super) bits: Vec<u16>,
    pub(super) about: Vec<f32>,
}

impl Values {
    /// The step and the table with which they take the fewest bits, and how many.
    pub(super) fn choose(&self, form: Form) -> Option<(i8, u8, f64)> {
        let count = self.about.len().max(1) as f64;
        let pairs = || self.bits.iter().zip(&self.about);
        let square = |(bits, about): (&u16, &f32)| f64::from(form.number(*bits) - about).powi(2);
        let deviation = (pairs().map(square).sum::<f64>() / count).sqrt();
        let octave = deviation.clamp(1e-25, 1e25).log2().floor();
        let mut best: Option<(i8, u8, f64)> = None;
        for below in -1..=4_i8 {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "within 84 and its negative"
            )]
            let step = (octave as i8 - below).clamp(-STEP_MAX, STEP_MAX);
            let mut counts = [0_u32; 256];
            let mut rest = 0.0;
            for (bits, about) in pairs() {
                let cell = form.cell(*about, power(-i32::from(step)));
                let coded = form.code(*bits, cell, (step.into(), FAR));
                *counts.get_mut(usize::from(coded.symbol.cast_unsigned()))? += 1;
                rest += f64::from(coded.len);
            }
            for table in 0..TABLES {
                // Tables far from the deviation cost more than their neighbours.
                let octaves = (sigma(table) / deviation).log2() + f64::from(step);
                if octaves.abs() > 3.0 && (1..TABLES - 1).contains(&table) {
                    continue;
                }
                let bits = rest + cost(&counts, table)?;
                if best.is_none_or(|(_, _, least)| bits < least) {
                    best = Some((step, u8::try_from(table).ok()?, bits));
                }
            }
        }
        best
    }
}

/// What symbols cost with a table; those beyond it are escapes.
fn cost(counts: &[u32; 256], table: usize) -> Option<f64> {
    let table = all().get(table)?;
    let escape = f64::from(*table.bits.get(128)?);
    let costs = counts.iter().zip(&table.bits).zip(0_u8..=255);
    Some(
        costs
            .map(|((count, bits), symbol)| {
                let distance = i32::from(symbol.cast_signed());
                let there = symbol == 128 || distance.abs() <= table.reach;
                let bits = if there {
                    f64::from(*bits)
                } else {
                    escape + 16.0
                };
                if *count == 0 {
                    0.0
                } else {
                    f64::from(*count) * bits
                }
            })
            .sum(),
    )
}
