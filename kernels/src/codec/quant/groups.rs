//! Which values of a part share the numbers of a group.
//!
//! Upstairs:   [`super`].
//! Downstairs: [`crate::shape`].

use kvtier_proto::descriptor::PartOrder;

use crate::shape::PartShape;

/// Along what a group lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Axis {
    /// Neighbours of one token.
    Row,
    /// The same value of tokens in a row.
    Channel,
}

/// A part as blocks of rows of columns: a row is what lies together of one token.
#[derive(Debug, Clone, Copy)]
pub(super) struct View {
    /// 1, or the heads where each has its own run of tokens.
    blocks: usize,
    rows: usize,
    columns: usize,
}

impl View {
    pub(super) fn of(shape: &PartShape) -> Self {
        let (tokens, width) = (shape.tokens() as usize, shape.width() as usize);
        let heads = match shape.order() {
            PartOrder::HeadMajor => shape.heads() as usize,
            PartOrder::TokenMajor => 1,
        };
        Self {
            blocks: heads,
            rows: tokens,
            columns: width / heads.max(1),
        }
    }
}

/// The groups of a part.
#[derive(Debug, Clone, Copy)]
pub(super) struct Groups {
    view: View,
    axis: Axis,
    len: usize,
}

/// Where a group begins, and how many values it has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group {
    first: usize,
    len: usize,
}

impl Groups {
    pub(super) const fn new(view: View, axis: Axis, len: usize) -> Self {
        Self { view, axis, len }
    }

    /// All groups, in the order of their first values.
    pub(super) fn iter(self) -> impl Iterator<Item = Group> {
        let View {
            blocks,
            rows,
            columns,
        } = self.view;
        // Lines to cut: rows of columns, or columns of rows.
        let (along, across) = match self.axis {
            Axis::Row => (columns, rows),
            Axis::Channel => (rows, columns),
        };
        let cuts = along.div_ceil(self.len);
        (0..blocks).flat_map(move |block| {
            // Rows come one after the other; of channels the first tokens come first.
            let (outer, inner) = match self.axis {
                Axis::Row => (across, cuts),
                Axis::Channel => (cuts, across),
            };
            (0..outer).flat_map(move |outer| {
                (0..inner).map(move |inner| {
                    let (line, cut) = match self.axis {
                        Axis::Row => (outer, inner),
                        Axis::Channel => (inner, outer),
                    };
                    let begin = cut * self.len;
                    let first = match self.axis {
                        Axis::Row => line * columns + begin,
                        Axis::Channel => begin * columns + line,
                    };
                    Group {
                        first: block * rows * columns + first,
                        len: self.len.min(along - begin),
                    }
                })
            })
        })
    }

    /// Places of a group's values in the part.
    pub(super) fn values(self, group: Group) -> impl Iterator<Item = usize> {
        let step = match self.axis {
            Axis::Row => 1,
            Axis::Channel => self.view.columns,
        };
        (0..group.len).map(move |at| group.first + at * step)
    }
}
