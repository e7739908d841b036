//! The section of the exact level across layers: one part's tables.
//!
//! Upstairs:   [`super`], which has tag and count.
//! Downstairs: nothing.

use super::super::check::{at_most, channels};
use super::super::exact::{PAIR, WITHIN};
use super::super::{ExactTables, Input, NEEDS_MAX, ProfileError};
use super::{Reader, Writer};

impl Writer {
    pub(super) fn exact(&mut self, part: &ExactTables) {
        self.word(part.layer);
        self.byte(part.code as u8);
        self.word(part.heads);
        self.word(part.dim);
        self.floats(&part.input.centre);
        self.floats(&part.input.scale);
        self.byte(u8::try_from(part.needs.len()).unwrap_or(u8::MAX));
        for (layer, code) in &part.needs {
            self.word(*layer);
            self.byte(*code as u8);
        }
        self.count(part.weights.columns());
        self.matrix(&part.weights);
        self.floats(&part.bias);
        self.floats(&part.within);
        self.floats(&part.pairs);
        self.0
            .extend(part.steps.iter().flat_map(|step| step.to_le_bytes()));
        self.0.extend(&part.tables);
    }
}

impl Reader<'_> {
    pub(super) fn exact(&mut self) -> Result<ExactTables, ProfileError> {
        let layer = self.word("layer")?;
        let code = self.code()?;
        let (heads, dim) = (self.word("heads")?, self.word("dim")?);
        let own = channels(heads, dim)?;
        let input = Input {
            centre: self.floats("exact centre", own)?,
            scale: self.floats("exact scale", own)?,
        };
        let count = usize::from(self.byte("exact needs")?);
        at_most("exact needs", count, NEEDS_MAX)?;
        let mut needs = Vec::new();
        for _ in 0..count {
            needs.push((self.word("needed layer")?, self.code()?));
        }
        let columns = self.word("exact weights")? as usize;
        Ok(ExactTables {
            layer,
            code,
            heads,
            dim,
            input,
            needs,
            weights: self.matrix("exact weights", [own, columns])?,
            bias: self.floats("exact bias", own)?,
            within: self.floats("exact within", own * WITHIN)?,
            pairs: self.floats("exact pairs", own / 2 * PAIR)?,
            steps: {
                let steps = self.take("exact steps", own)?.iter();
                steps.map(|step| i8::from_le_bytes([*step])).collect()
            },
            tables: self.take("exact tables", own)?.to_vec(),
        })
    }
}
