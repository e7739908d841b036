//! Which token and channel a value of a part belongs to.
//!
//! Upstairs:   levels that treat tokens or channels apart.
//! Downstairs: [`crate::shape`].

use kvtier_proto::descriptor::PartOrder;

use crate::shape::PartShape;

/// A part as tokens of channels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    pub(super) tokens: usize,
    pub(super) channels: usize,
    /// 1, or the heads where each has its own run of tokens.
    blocks: usize,
}

impl Rows {
    pub(super) const fn of(shape: &PartShape) -> Self {
        Self {
            tokens: shape.tokens() as usize,
            channels: shape.width() as usize,
            blocks: match shape.order() {
                PartOrder::HeadMajor => shape.heads() as usize,
                PartOrder::TokenMajor => 1,
            },
        }
    }

    /// Token and channel of each value, in the order of the values.
    pub(super) fn places(self) -> impl Iterator<Item = (usize, usize)> {
        let columns = self.channels / self.blocks;
        (0..self.blocks).flat_map(move |block| {
            let channels = block * columns..(block + 1) * columns;
            (0..self.tokens)
                .flat_map(move |token| channels.clone().map(move |channel| (token, channel)))
        })
    }
}
