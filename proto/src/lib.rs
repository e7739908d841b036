//! The contract of kvtier: what goes over the wire and what both ends agree on.
//!
//! Upstairs:   every other package.
//! Downstairs: nothing of ours.
//!
//! Here live the gRPC messages, block keys, model descriptors and their layout, limits and units.
//! Not here on purpose: no I/O, no sockets, no runtime.
#![forbid(unsafe_code)]
#![deny(missing_docs, rustdoc::broken_intra_doc_links)]
#![deny(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

pub mod claims;
pub mod descriptor;
pub mod element;
#[doc(hidden)]
pub mod fuzzing;
pub mod key;
pub mod layout;
pub mod limits;
pub mod reader;
pub mod region;
pub mod units;
pub mod v1;
pub mod vocabulary;
mod wire;

pub use descriptor::{LayerSpec, ModelDescriptor};
pub use element::Element;
pub use key::{BlockKey, KeyDeriver, KeySecret, LayoutFingerprint};
pub use layout::{BlockLayout, Part, PartCode};
pub use reader::{LayerCost, ReaderSpec};
pub use region::{Piece, RegionGeometry};
pub use units::{Bytes, NamespaceId};
pub use vocabulary::{Level, Miss, PayloadKind, Quality};
pub use wire::{WireError, key_from_wire, keys_from_wire, quality_from_wire};
