//! What can be wrong with a paged layout, a page table or the memory given for a copy.
//!
//! Upstairs:   everything in [`super`]; the server shows these texts to the engine that asked.
//! Downstairs: nothing.
//!
//! Every error comes before the first byte is copied.

use kvtier_proto::layout::PartCode;

/// Why pages were not moved. Nothing was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PagedError {
    /// A size that must be above zero.
    #[error("{field} is 0; accepted: at least 1")]
    Zero {
        /// Field of the layout.
        field: &'static str,
    },
    /// Two rows of the part would share bytes.
    #[error("{field} is {stride} bytes; accepted: at least {within}, the bytes it steps over")]
    Overlap {
        /// The stride.
        field: &'static str,
        /// Its value. Unit: bytes.
        stride: u64,
        /// Least value. Unit: bytes.
        within: u64,
    },
    /// Base, strides and counts go past what can be addressed.
    #[error("base, strides and counts of the part exceed the address space")]
    TooLarge,
    /// The layout has fewer layers.
    #[error("layer {layer} of a layout of {layers} layers")]
    NoLayer {
        /// Layer asked for.
        layer: usize,
        /// Layers there are.
        layers: usize,
    },
    /// The layout does not keep this part.
    #[error("the layout keeps no {} part; it keeps {}", name(.part), names(.kept))]
    NoPart {
        /// Part asked for.
        part: PartCode,
        /// Parts it keeps.
        kept: [Option<PartCode>; 2],
    },
    /// An empty or reversed run of tokens.
    #[error("tokens {start} to {end} are no run; accepted: an end above the start")]
    NoTokens {
        /// First token.
        start: u32,
        /// Token behind the last.
        end: u32,
    },
    /// The table ends before the run of tokens does.
    #[error("{end} tokens at {page_tokens} a page need more than the table's {table_pages} pages")]
    TableTooShort {
        /// Token behind the last.
        end: u32,
        /// Slots of a page.
        page_tokens: u32,
        /// Entries of the table.
        table_pages: usize,
    },
    /// A page that the pool does not have.
    #[error("entry {index} of the page table is page {page}; the pool has {pages} pages")]
    PageOutOfRange {
        /// Entry of the table.
        index: usize,
        /// Its page.
        page: u32,
        /// Pages of the pool.
        pages: u32,
    },
    /// One page for two places of a sequence: a padding entry, or a table torn by a race.
    #[error("entries {first} and {second} of the page table both are page {page}")]
    PageTwice {
        /// The page.
        page: u32,
        /// First entry.
        first: usize,
        /// Second entry.
        second: usize,
    },
    /// The span was made for a pool of another geometry.
    #[error(
        "span is of {span_pages} pages of {span_page_tokens} tokens, \
         the part of {pages} pages of {page_tokens}"
    )]
    OtherPool {
        /// Pages the span was checked against.
        span_pages: u32,
        /// Slots of a page it was cut by.
        span_page_tokens: u32,
        /// Pages of the part.
        pages: u32,
        /// Slots of a page of the part.
        page_tokens: u32,
    },
    /// The pool is smaller than its layout says.
    #[error("pool has {have} bytes but its layout needs {need}")]
    PoolTooSmall {
        /// Bytes that the layout reaches.
        need: usize,
        /// Bytes given.
        have: usize,
    },
    /// The part's memory is not as long as the span's tokens.
    #[error("part has {got} bytes but the span makes {want}")]
    PartLength {
        /// Bytes of the span.
        want: usize,
        /// Bytes given.
        got: usize,
    },
}

fn name(part: &PartCode) -> &'static str {
    part.into()
}

fn names(kept: &[Option<PartCode>; 2]) -> String {
    let names: Vec<_> = kept.iter().flatten().map(name).collect();
    names.join(" and ")
}
