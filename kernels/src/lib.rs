//! Codecs and page movers: what happens to the bytes of a part between an engine and a tier.
//!
//! Upstairs:   `tier` and `restore` in the daemon, the client where it decodes on its own side.
//! Downstairs: nothing of ours but the vocabulary of `kvtier-proto`.
//!
//! Two jobs. [`codec`] turns the raw bytes of one part (K, V, latent, ... of one layer of one
//! block) into fewer bytes and back. [`paged`] moves parts between the paged memory of a serving
//! engine and the canonical token-major order of a block. Everything here is the scalar
//! reference: the truth that faster paths must match bit for bit. [`project`] stands aside: it
//! makes K and V from hidden states.
//!
//! ```
//! use kvtier_kernels::{PartShape, Registry};
//! use kvtier_proto::{Level, element::Element};
//!
//! let codecs = Registry::builtin();
//! let codec = codecs.get(Level::ZSTD)?;
//! let shape = PartShape::new(Element::Bf16, 256, 192)?;
//!
//! let raw = vec![0x3f_u8; shape.raw_bytes()];
//! let mut stored = vec![0; codec.stored_bytes_max(&shape)];
//! let len = codec.encode(&shape, &raw, &mut stored)?;
//!
//! let mut back = vec![0; shape.raw_bytes()];
//! codec.decode(&shape, &stored[..len], &mut back)?;
//! assert_eq!(back, raw);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Not here on purpose: no I/O, no clock, and no threads but those of [`mod@calibrate`],
//! which end with its call. Unsafe code is below `simd` only. A codec does not know where its bytes
//! are kept, and checks of identity (key, layout, namespace) belong to the store.
#![deny(unsafe_code)]
#![deny(missing_docs, rustdoc::broken_intra_doc_links)]

pub mod calibrate;
pub mod codec;
#[doc(hidden)]
pub mod fuzzing;
pub mod paged;
pub mod planes;
pub mod profile;
pub mod project;
pub mod rans;
pub mod shape;
pub mod simd;

pub use codec::registry::Registry;
pub use codec::{Codec, DecodeError, EncodeError};
pub use paged::layout::PagedLayout;
pub use paged::{PageSpan, PagedError, PagedPart};
pub use shape::PartShape;
