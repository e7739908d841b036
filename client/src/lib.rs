//! kvtier client SDK: save KV blocks to the daemon of this host, and restore them later.
//!
//! Upstairs:   serving engines, their adapters, `kvtier-bench` and the end-to-end tests.
//! Downstairs: `kvtier-proto` (messages, keys, layouts), tonic over a Unix socket, mapped memory.
//!
//! Control goes through gRPC; payload lies in memory that both ends map. A save copies a block
//! once, into a staging slot; a restore hands out views of the daemon's arena without a copy.
//! Where no descriptor can be passed (TCP) the same calls carry the payload inline. An engine whose
//! blocks lie in shared memory of its own registers that ([`Session::register_region`]) and copies
//! nothing.
//!
//! ```no_run
//! use kvtier_client::{Acknowledge, Client, ConnectOptions, Endpoint, SessionOptions};
//! use kvtier_client::{ModelDescriptor, PayloadKind, RestoreOptions};
//!
//! # use kvtier_client::Error;
//! # async fn engine(model: ModelDescriptor, tokens: Vec<u32>) -> Result<(), Error> {
//! let endpoint = Endpoint::unix("/run/kvtier/kvtierd.sock");
//! let client = Client::connect(endpoint, ConnectOptions::default()).await?;
//! let session = client.open_session(&model, SessionOptions::new("my-engine 1.0")).await?;
//!
//! // Save what prefill computed: the closure fills one part (K or V of one layer) at a time.
//! let wait = Acknowledge::Durable;
//! session.save_prefix(&tokens, b"", wait, |_block, _part, bytes| bytes.fill(0)).await?;
//!
//! // Restore the longest prefix that is stored.
//! let keys = session.prefix_keys(&tokens, b"");
//! let options = RestoreOptions::default();
//! let restored = session.restore(&keys, PayloadKind::Kv, options).await?.collect().await?;
//! println!("{} leading blocks need no prefill", restored.usable_blocks);
//! # Ok(())
//! # }
//! ```
//!
//! # What holds everywhere
//!
//! * **A block that is not there is a [`Miss`], a value.** An [`Error`] says that the call itself
//!   did not work, and [`Error::happened`] says whether it may have had an effect.
//! * **Nothing hangs.** Every wait ends by [`Timeouts`], with [`Error::Timeout`].
//! * **Nothing is lost by dropping.** Dropping a future, a slot, a lease or a restore at any time
//!   gives back what it held, in the background and without blocking.
//! * **A session heals.** When the daemon restarts, calls in flight answer
//!   [`Error::SessionLost`]; the next call opens the session again and maps its memory anew.
//! * **Only filled blocks are saved and only leased blocks are read.** The types say so:
//!   [`ReservedSlot`] becomes [`FilledSlot`] when every part is written, only a `FilledSlot` can
//!   be committed, and [`LeasedBlock::release`] takes the block away from its reader.
//!
//! Not here on purpose
//!   No blocking facade: an engine without a runtime starts one.
//!   No retry of a call that may have happened: the caller knows what a second one would mean.
#![deny(missing_docs, rustdoc::broken_intra_doc_links)]
#![deny(unsafe_code)]

mod capture;
mod check;
mod connect;
mod descriptor;
mod engine_region;
mod error;
mod events;
#[doc(hidden)]
pub mod fuzzing;
mod hints;
mod inline;
mod layouts;
mod lease;
mod lineage;
mod link;
mod maps;
mod mux;
mod options;
mod release;
mod reports;
mod restore;
mod rpc;
mod save;
mod session;
#[allow(unsafe_code, reason = "the one room that maps shared memory")]
mod shm;
mod slot;
mod two_ended;
mod values;
mod windows;

pub use capture::HiddenCapture;
pub use connect::Client;
pub use engine_region::EngineRegion;
pub use error::{Error, Happened};
pub use events::{BlockChange, BlockEvent, Events};
pub use lease::{LeasedBlock, ReadError};
pub use options::{
    ConnectOptions, Endpoint, ReconnectOptions, RestoreOptions, SessionOptions, Timeouts,
};
pub use restore::{PlacedBlock, Restore, RestoreEvent, RestoreSummary, Restored};
pub use save::{CommitOutcome, Reservation, SaveBlock, SaveOutcome};
pub use session::{Session, SessionState};
pub use slot::{FillError, FilledSlot, ReservedSlot, Unfilled};
#[doc(hidden)]
pub use two_ended::ModelledPace;
pub use two_ended::{ComputeEnd, NextCompute, Outlook, PrefillStep, TwoEnded};
pub use values::{
    Acknowledge, BlockStatus, CommitFailure, Explanation, Lookup, Prefetched, SaveRefusal, Tier,
    Variant,
};

pub use kvtier_proto::descriptor::{PartOrder, Rope, Shard};
pub use kvtier_proto::{
    BlockKey, BlockLayout, Bytes, Element, KeyDeriver, LayerCost, LayerSpec, LayoutFingerprint,
    Level, Miss, ModelDescriptor, NamespaceId, Part, PartCode, PayloadKind, Piece, Quality,
    ReaderSpec, RegionGeometry,
};
