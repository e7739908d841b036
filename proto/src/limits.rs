//! Bounds on everything a peer can ask for, each with its reason and what happens when it is hit.
//!
//! Upstairs:   server, sessions, SDK and decoders check against these, and error texts quote them.
//! Downstairs: nothing.

use crate::units::{Bytes, GIB, KIB, MIB};

/// Version of the protocol spoken here. A client of another major version is refused by name.
pub const PROTOCOL_VERSION: u32 = 1;

/// Fewest tokens in a full block. Smaller blocks cost more index than they save.
pub const BLOCK_TOKENS_MIN: u32 = 16;
/// Most tokens in a block. Larger blocks waste the tail of every prompt.
pub const BLOCK_TOKENS_MAX: u32 = 2048;
/// Tokens in a block when the engine does not say.
pub const BLOCK_TOKENS_DEFAULT: u32 = 256;

/// Most layers a descriptor may list. The deepest published models have fewer than 200.
pub const LAYERS_MAX: usize = 1024;
/// Most parts (K, V, latent, ...) a block may have: two a layer.
pub const PARTS_MAX: usize = 2 * LAYERS_MAX;
/// Most KV heads of a layer.
pub const HEADS_MAX: u32 = 1024;
/// Widest head, latent or hidden vector. Unit: elements.
pub const WIDTH_MAX: u32 = 65_536;
/// Largest raw block. A descriptor whose full block exceeds it is refused.
pub const BLOCK_BYTES_MAX: Bytes = Bytes(GIB);
/// Largest raw page part. Lengths on disk are 32 bits wide.
pub const PART_BYTES_MAX: Bytes = Bytes(GIB);

/// Most floating point operations a layer takes for a token, or for a pair of them. The largest
/// published layers take some 2^33.
pub const LAYER_FLOP_MAX: u64 = 1 << 50;

/// Longest model, revision, adapter or namespace name. Unit: bytes of UTF-8.
pub const NAME_BYTES_MAX: usize = 256;
/// Longest `extra` of a request. Unit: bytes.
pub const EXTRA_BYTES_MAX: usize = 1024;

/// Most keys in one Lookup, Save, Commit, Restore, Pin, Prefetch or Release.
pub const KEYS_PER_CALL_MAX: usize = 4096;
/// Most restores one session runs at a time. One more ends at once, all its blocks missed for
/// want of space.
pub const RESTORES_PER_SESSION_MAX: usize = 64;
/// Most reports of prefill steps in one message.
pub const REPORTS_PER_CALL_MAX: usize = 64;
/// Most leases one session holds. Blocks beyond are missed for want of space.
pub const LEASES_PER_SESSION_MAX: usize = 65_536;
/// Most sessions the daemon serves.
pub const SESSIONS_MAX: usize = 1024;
/// Largest staging region of one session.
pub const REGION_BYTES_MAX: Bytes = Bytes(64 * GIB);
/// Smallest staging region of one session.
pub const REGION_BYTES_MIN: Bytes = Bytes(64 * KIB);
/// Largest region for claims: maps for every restore that a session runs at a time.
pub const CLAIMS_BYTES_MAX: Bytes = Bytes(MIB);
/// Most regions for claims of one session. One is enough.
pub const CLAIMS_REGIONS_MAX: usize = 4;
/// Largest region of an engine's own memory. Only addresses are taken for it.
pub const ENGINE_REGION_BYTES_MAX: Bytes = Bytes(16 * 1024 * GIB);
/// Most engine regions of one session: one for each group of layers that is kept apart.
pub const ENGINE_REGIONS_MAX: usize = 16;
/// Most slots of an engine's region.
pub const ENGINE_SLOTS_MAX: u32 = 1 << 24;
/// Most pieces of a slot of an engine's region: K and V of every layer, and some more.
pub const PIECES_MAX: usize = 4096;
/// Most rows in all pieces of a slot. Each is a copy of its own.
pub const ROWS_MAX: u32 = 65_536;

/// Largest payload of one inline message. Large messages collapse HTTP/2 throughput.
pub const INLINE_CHUNK_MAX: Bytes = Bytes(MIB);
/// Largest message to a client.
pub const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Largest message to the daemon, which is decoded before anybody knows whose it is: a chunk of
/// inline payload and what surrounds it. 4096 blocks to save take less.
pub const REQUEST_BYTES_MAX: usize = 1024 * 1024 + 64 * 1024;
/// HTTP/2 stream window: large enough that a 2 MiB block streams without a stall.
pub const HTTP2_STREAM_WINDOW: u32 = 16 * 1024 * 1024;
/// HTTP/2 connection window.
pub const HTTP2_CONNECTION_WINDOW: u32 = 32 * 1024 * 1024;
/// HTTP/2 frame size.
pub const HTTP2_FRAME: u32 = 1024 * 1024;
/// Most calls and streams that one connection has open; more wait at the client.
pub const HTTP2_STREAMS_MAX: u32 = 256;

/// Pages of memory and blocks of a device: everything that is read directly is aligned to it.
pub const IO_ALIGN: u64 = 4 * KIB;
