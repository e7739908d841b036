//! Every setting of the daemon: name, unit, default, range and reason.
//!
//! Upstairs:   `config` reads these; `systemd/kvtier.toml` and `docs/CONFIG.md` are rendered
//!             from them by a test.
//! Downstairs: `settings`.
//!
//! Not here on purpose: no check that looks at two settings; those stand in `together`.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use kvtier_proto::limits;
use kvtier_proto::units::{Bytes, GIB, KIB, MIB};
use kvtier_proto::{Level, Quality};
use serde::{Deserialize, Serialize};

use super::settings::{Field, Reader, Start, default, required, settings, unset};

/// Most namespaces of one daemon. Each has an arena, a secret and a row in every table.
pub const NAMESPACES_MAX: usize = 256;
/// Least host memory of one namespace.
pub const HOST_QUOTA_MIN: Bytes = Bytes(MIB);
/// Longest path of a Unix socket that the kernel takes. Unit: bytes.
pub const SOCKET_PATH_MAX: usize = 107;
/// Most devices of one daemon. Each has a thread, a ring and a row in every table.
pub const DISKS_MAX: usize = 16;
/// Fewest segments of a disk: one is written, one is sealed, and two leave reclaim a choice.
pub const SEGMENTS_MIN: u64 = 4;

settings! {
    /// Where the daemon listens and how it ends.
    pub struct ServerConfig in "server" {
        /// Unix socket that engines and the `kvtier` command connect to.
        socket: PathBuf = default(PathBuf::from("/run/kvtier/kvtierd.sock")),
            accepts "a path of 1 to 107 bytes", if |path| is_socket_path(path);
        /// Unix socket that hands out the descriptors of shared memory.
        descriptor_socket: Option<PathBuf> = unset("the path of `socket` with `.fd` appended"),
            accepts "a path of 1 to 107 bytes, other than `socket`",
            if |path| path.as_deref().is_none_or(is_socket_path);
        /// TCP address for engines that cannot reach the Unix socket, in a container for example.
        /// Payload travels inline there, and every local user can connect.
        tcp: Option<SocketAddr> = unset("no TCP listener"),
            accepts "a loopback address with a port, such as \"127.0.0.1:9470\"",
            if |tcp| tcp.is_none_or(|tcp| tcp.ip().is_loopback());
        /// Namespace of everybody who connects through TCP: such a peer has no user id.
        tcp_namespace: Option<String> = unset("no namespace; needed when `tcp` is set"),
            accepts "the name of a configured namespace, when `tcp` is set";
        /// HTTP address of /metrics, /healthz and /readyz. Port 0 takes a free one and logs it.
        metrics: SocketAddr = default(SocketAddr::from(([127, 0, 0, 1], 9471))),
            accepts "a loopback address, or 0.0.0.0 or ::, with a port: \"127.0.0.1:9471\"",
            if |metrics| is_loopback_or_any(metrics.ip());
        /// Longest wait for running restores and unwritten blocks when the daemon is told to stop.
        /// Unit: seconds. Keep it 10 below the stop timeout of the service manager.
        drain_timeout_s: u32 = default(30), accepts "1 to 600", if |s| (1..=600).contains(s);
        /// Most sessions at a time; one more is refused. Unit: sessions. Each namespace may open
        /// an even share of them.
        sessions_max: u32 = default(256),
            accepts "1 to 1024", if |n| within(*n, limits::SESSIONS_MAX);
    }
}

settings! {
    /// What the daemon keeps about itself.
    pub struct StateConfig in "state" {
        /// Directory of identities and secrets of namespaces, and of the wipes that disks have
        /// missed. Blocks do not live here.
        dir: PathBuf = default(PathBuf::from("/var/lib/kvtier")),
            accepts "the path of a directory that the daemon owns", if |dir| is_path(dir);
    }
}

settings! {
    /// Host memory that holds blocks.
    pub struct HostConfig in "host" {
        /// Memory for blocks of all namespaces. Unit: bytes, written "8 GiB". Taken at start.
        capacity: Bytes = default(Bytes(GIB)), accepts "16 MiB to 16 TiB",
            if |bytes| (16 * MIB..=16 * 1024 * GIB).contains(&bytes.get());
        /// Whether to ask the kernel for large pages. "auto" does where they are offered. All of
        /// `capacity` is taken at start either way.
        hugepages: HugePages = default(HugePages::Auto), accepts "\"auto\" or \"off\"";
    }
}

settings! {
    /// A device that holds blocks durably; without any nothing survives a restart. With several
    /// `[[disk]]` tables, up to 16, each block goes to one of them, by their capacities. Disks can
    /// be added, and taken away with the blocks they hold; the daemon serves with those that work.
    pub struct DiskConfig in "disk" {
        /// Directory of the segments, on the device to use and on a file system of its own.
        path: PathBuf = required(), accepts "the path of a directory that the daemon owns",
            if |path| is_path(path);
        /// Space for segments. Unit: bytes, written "200 GiB". No default: a cache that guesses
        /// can fill a root disk.
        capacity: Bytes = required(), accepts "at least 4 times `segment_size`",
            if |bytes| bytes.get() > 0;
        /// Size of one segment file. Unit: bytes. Larger means fewer files, longer sequential
        /// runs and coarser eviction. No block is larger than a segment. A store that exists keeps
        /// the size it was made with; `capacity` must hold 4 segments of that size.
        segment_size: Bytes = default(Bytes::mib(256)),
            accepts "1 MiB to 4 GiB, a multiple of 4 KiB", if |bytes| is_segment_size(*bytes);
        /// Most operations in flight on this device. Unit: operations.
        queue_depth: u32 = default(64), accepts "1 to 1024", if |n| (1..=1024).contains(n);
        /// How the device is driven. "auto" takes io_uring and falls back to pread, saying why.
        lane: Lane = default(Lane::Auto), accepts "\"auto\", \"io_uring\" or \"pread\"";
        /// Most that restores may read from this device, where others need it too. Unit: bytes a
        /// second, written "500 MiB".
        read_limit: Option<Bytes> = unset("no limit"), accepts "1 MiB to 1024 GiB",
            if |rate| rate.is_none_or(|rate| (MIB..=1024 * GIB).contains(&rate.get()));
        /// How fast stored blocks are read and checked in the background, to find damage before it
        /// costs a restore. Unit: bytes a second, written "16 MiB"; "0 B" is never. Beside restores
        /// and saves it gets less.
        scrub_rate: Bytes = default(Bytes::mib(16)), accepts "0 B, or 64 KiB to 64 GiB",
            if |rate| rate.get() == 0 || (64 * KIB..=64 * GIB).contains(&rate.get());
        /// From the end of one such pass to the beginning of the next. Unit: hours. The first
        /// begins ten minutes after a start.
        scrub_every_h: u32 = default(168), accepts "1 to 8760",
            if |hours| (1..=8760).contains(hours);
        /// Codec of stored blocks. Bit-exact are "raw", which costs no CPU, and "lossless",
        /// "lossless_c" and "zstd", which take about two thirds of the space;
        /// "lossless" is the fastest of them. So is "lossless_x", which takes half, is slow, and needs
        /// tables of the model. All others lose something: blocks of a namespace are
        /// stored so only where its `lowest_quality` allows it, and as "lossless" elsewhere; a
        /// request gets them only when it says that it accepts that. "transparent", "balanced" and
        /// "small", with "_x" predicted across layers, need tables of the model. The same for every
        /// disk.
        level: CodecLevel = default(CodecLevel(Level::LOSSLESS)),
            accepts "\"raw\", \"lossless\", \"lossless_c\", \"lossless_x\", \"zstd\", \"transparent\", \
                \"balanced\", \"small\", \"transparent_x\", \"balanced_x\", \"small_x\", \"fp8\", \"int8\", \
                \"int4\", \"kivi4\", \"kivi2\", \"hadamard4\", \"cachegen\" or \"cachegen_paper\"";
    }
}

settings! {
    /// How blocks are coded: tables of models, and what becomes of blocks that nobody uses.
    pub struct CodecConfig in "codec" {
        /// Files with tables of models, or directories of which every file named `*.kvtables` is
        /// one. `kvtier calibrate` makes them. All are read and checked at start.
        tables: Vec<PathBuf> = default(Vec::new()),
            accepts "a list of paths: [\"/etc/kvtier/tables\"]",
            if |paths| paths.iter().all(|path| is_path(path));
        /// Codec that blocks are re-encoded with in the background when nobody has saved or read
        /// them for `cold_after_s`. Only exact blocks are, and only where the `lowest_quality` of
        /// their namespace allows it.
        cold_level: Option<CodecLevel> = unset("blocks stay as they were stored"),
            accepts "what `disk.level` accepts";
        /// Time without use after which a block is cold, while the daemon runs. It may take up to
        /// twice as long. Unit: seconds.
        cold_after_s: u32 = default(604_800), accepts "1 to 31536000",
            if |seconds| (1..=31_536_000).contains(seconds);
        /// How fast cold blocks are read to be re-encoded. Unit: bytes a second, written "16 MiB".
        /// Beside restores and saves it gets less.
        cold_rate: Bytes = default(Bytes::mib(16)), accepts "64 KiB to 64 GiB",
            if |rate| (64 * KIB..=64 * GIB).contains(&rate.get());
    }
}

settings! {
    /// A tenant. Without any `[[namespace]]` there is one, "default", for the user id that the
    /// daemon runs as.
    pub struct NamespaceConfig in "namespace" {
        /// Name in tables and logs. Renaming a namespace makes a new, empty one.
        name: String = required(), accepts "1 to 64 characters of a-z, 0-9 and -",
            if |name| is_namespace_name(name);
        /// User ids whose processes belong to this namespace.
        uids: Vec<u32> = default(Vec::new()),
            accepts "a list of user ids, each in one namespace only: [1000, 1001]";
        /// Host memory of this namespace. Unit: bytes.
        host_quota: Option<Bytes> = unset("an even share of what other quotas leave of \
            `host.capacity`"),
            accepts "1 MiB or more; all quotas together at most `host.capacity`",
            if |quota| quota.is_none_or(|quota| quota >= HOST_QUOTA_MIN);
        /// Worst quality at which blocks of this namespace may be stored: "exact" is every bit.
        /// "transparent", "balanced" and "small" are what calibration has measured on the model;
        /// "any" allows levels that nobody has measured on it.
        lowest_quality: LowestQuality = default(LowestQuality::Exact),
            accepts "\"exact\", \"transparent\", \"balanced\", \"small\" or \"any\"";
        /// Shared memory that one session may fill before it hands blocks over. Unit: bytes.
        staging_max: Bytes = default(Bytes(GIB)), accepts "64 KiB to 64 GiB",
            if |bytes| (64 * KIB..=limits::REGION_BYTES_MAX.get()).contains(&bytes.get());
    }
}

settings! {
    /// Who may ask for statistics, explain any block, wipe any namespace and drain the daemon.
    pub struct OperatorConfig in "operator" {
        /// User ids of operators.
        uids: Option<Vec<u32>> = unset("root and the user id that the daemon runs as"),
            accepts "a list of user ids: [0, 998]";
    }
}

settings! {
    /// Memory of engines that the daemon copies blocks from and to.
    pub struct RegionsConfig in "regions" {
        /// User ids whose engines may register their own memory. Whoever can resize a file that the
        /// daemon writes can make it fill memory, so that nobody may unless he is named here.
        trusted_uids: Vec<u32> = default(Vec::new()),
            accepts "a list of user ids: [1000, 1001]";
        /// Most memory that one session may register. Unit: bytes, written "1 TiB". Only
        /// addresses are taken for it.
        session_max: Bytes = default(Bytes(1024 * GIB)), accepts "64 KiB to 16 TiB",
            if |bytes| (64 * KIB..=limits::ENGINE_REGION_BYTES_MAX.get()).contains(&bytes.get());
    }
}

settings! {
    /// Bounds on what one session may hold.
    pub struct LimitsConfig in "limits" {
        /// Most blocks that one session holds leases on; one more is refused. Unit: leases.
        leases_per_session: u32 = default(65_536),
            accepts "1 to 65536", if |n| within(*n, limits::LEASES_PER_SESSION_MAX);
        /// Most restores that one session runs at a time; one more is refused. Unit: restores.
        restores_per_session: u32 = default(64),
            accepts "1 to 64", if |n| within(*n, limits::RESTORES_PER_SESSION_MAX);
        /// Longest time that a pin keeps a block. Unit: seconds.
        pin_ttl_max_s: u32 = default(86_400),
            accepts "1 to 604800", if |s| (1..=604_800).contains(s);
    }
}

settings! {
    /// What is written to standard error.
    pub struct LogConfig in "log" {
        /// Filter of `tracing`: a level, or levels for parts: "info,kvtierd::tier=debug".
        level: String = default(String::from("info")),
            accepts "a tracing filter such as \"info\" or \"warn,kvtierd=debug\"",
            if |level| is_filter(level);
        /// Form of a line. "json" is one object a line.
        format: LogFormat = default(LogFormat::Text), accepts "\"text\" or \"json\"";
    }
}

/// Whether large pages are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HugePages {
    /// Where the kernel offers them.
    Auto,
    /// Never.
    Off,
}

/// How a device is driven.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lane {
    /// io_uring where it works, else pread.
    Auto,
    /// io_uring or no start.
    IoUring,
    /// Threads that call pread and pwrite.
    Pread,
}

/// Codec of blocks on the disk tier, by the name of its level.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodecLevel(Level);

impl CodecLevel {
    /// As the file says it.
    pub fn as_str(self) -> &'static str {
        self.0.name().unwrap_or("unnamed")
    }

    /// The rung of the codec ladder.
    pub const fn level(self) -> Level {
        self.0
    }
}

impl Serialize for CodecLevel {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for CodecLevel {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let name = String::deserialize(from)?;
        let level = Level::from_name(&name).map(Self);
        level.ok_or_else(|| serde::de::Error::custom("no codec level has this name"))
    }
}

/// Worst quality at which blocks of a namespace may be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LowestQuality {
    /// Every bit.
    Exact,
    /// Below the noise of an engine.
    Transparent,
    /// About 1e-3 of divergence.
    Balanced,
    /// About 1e-2 of divergence.
    Small,
    /// Whatever the operator chose.
    Any,
}

impl From<LowestQuality> for Quality {
    fn from(lowest: LowestQuality) -> Self {
        match lowest {
            LowestQuality::Exact => Self::Exact,
            LowestQuality::Transparent => Self::Transparent,
            LowestQuality::Balanced => Self::Balanced,
            LowestQuality::Small => Self::Small,
            LowestQuality::Any => Self::Any,
        }
    }
}

/// Form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

fn within(n: u32, max: usize) -> bool {
    n >= 1 && usize::try_from(n).is_ok_and(|n| n <= max)
}

fn is_path(path: &Path) -> bool {
    let bytes = path.as_os_str().as_encoded_bytes();
    !bytes.is_empty() && !bytes.contains(&0)
}

fn is_socket_path(path: &Path) -> bool {
    is_path(path) && path.as_os_str().len() <= SOCKET_PATH_MAX
}

fn is_loopback_or_any(ip: IpAddr) -> bool {
    ip.is_loopback() || ip.is_unspecified()
}

fn is_segment_size(bytes: Bytes) -> bool {
    (MIB..=4 * GIB).contains(&bytes.get()) && bytes.get().is_multiple_of(limits::IO_ALIGN)
}

fn is_namespace_name(name: &str) -> bool {
    let accepted = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=64).contains(&name.len()) && name.bytes().all(accepted)
}

fn is_filter(level: &str) -> bool {
    !level.trim().is_empty() && tracing_subscriber::EnvFilter::try_new(level).is_ok()
}
