//! What a caller chooses: where the daemon is, how long to wait, how much memory to stage.
//!
//! Upstairs:   `Client` and `Session` take these.
//! Downstairs: `kvtier_proto::limits`, whose ranges the checks quote.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use kvtier_proto::limits::{NAME_BYTES_MAX, REGION_BYTES_MAX, REGION_BYTES_MIN};
use kvtier_proto::{BlockKey, Bytes, Quality, ReaderSpec};

use crate::error::Error;
use crate::two_ended::TwoEnded;

/// Longest path of a Unix socket. Unit: bytes; `sockaddr_un` has 108 with the final zero.
const SOCKET_PATH_MAX: usize = 107;

/// Where the daemon listens.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Endpoint {
    /// A Unix socket: the peer is known by its uid, and memory can be shared.
    Unix(PathBuf),
    /// TCP on this host. Payload travels inline. Only loopback: the protocol is not encrypted.
    Tcp(SocketAddr),
}

impl Endpoint {
    /// A Unix socket at `path`.
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        Self::Unix(path.into())
    }

    /// TCP at `address`, which must be loopback.
    pub fn tcp(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        match self {
            Self::Unix(path) if path.as_os_str().len() > SOCKET_PATH_MAX => {
                Err(Error::invalid(format!(
                    "endpoint {} is {} bytes long; accepted: a path of at most {SOCKET_PATH_MAX}",
                    path.display(),
                    path.as_os_str().len()
                )))
            }
            Self::Tcp(address) if !address.ip().is_loopback() => Err(Error::invalid(format!(
                "endpoint {address} is not loopback; accepted: 127.0.0.0/8 or [::1], \
                 since the connection is not encrypted"
            ))),
            _ => Ok(()),
        }
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(address) => write!(f, "{address}"),
        }
    }
}

/// How long each kind of wait may take. Nothing waits longer.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Timeouts {
    /// Connecting and opening a session. Default 5 s.
    pub connect: Duration,
    /// Calls that move no payload: lookup, reserve, pin, release. Default 5 s.
    pub control: Duration,
    /// A commit until its acknowledgement, which may wait for the device. Default 30 s.
    pub commit: Duration,
    /// Silence of a restore: time without any event. Default 30 s.
    pub restore_idle: Duration,
    /// A call that carries payload inline, as a whole. Default 60 s.
    pub inline: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            control: Duration::from_secs(5),
            commit: Duration::from_secs(30),
            restore_idle: Duration::from_secs(30),
            inline: Duration::from_secs(60),
        }
    }
}

/// How a lost session is opened again.
///
/// A call on a lost session makes at most one attempt, and none while the pause after the last
/// failed attempt lasts: an engine whose daemon is down must not be slowed by it. `wait` makes
/// calls wait for the daemon instead.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ReconnectOptions {
    /// Pause after the first failed attempt; doubles each time, plus or minus half. Default 50 ms.
    pub pause_min: Duration,
    /// Longest pause. Default 2 s.
    pub pause_max: Duration,
    /// How long a call keeps trying before it fails. Default zero: one attempt.
    pub wait: Duration,
    /// How long [`Session::reopen`](crate::Session::reopen) keeps trying. Default 30 s.
    pub reopen: Duration,
}

impl Default for ReconnectOptions {
    fn default() -> Self {
        Self {
            pause_min: Duration::from_millis(50),
            pause_max: Duration::from_secs(2),
            wait: Duration::ZERO,
            reopen: Duration::from_secs(30),
        }
    }
}

/// How to connect.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ConnectOptions {
    /// Limits of every wait.
    pub timeouts: Timeouts,
    /// How sessions are opened again.
    pub reconnect: ReconnectOptions,
    /// Where the descriptor socket is, when it is not where the daemon says: a container that
    /// mounts the sockets elsewhere.
    pub descriptor_socket: Option<PathBuf>,
}

/// What a session needs.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SessionOptions {
    /// Who is asking, for the daemon's logs and status. At most 256 bytes.
    pub client_name: String,
    /// Memory to fill blocks in before they are committed. 64 KiB to 64 GiB in whole 4 KiB
    /// pages; zero for a session that only reads. Default 64 MiB. At least two blocks, so that
    /// one fills while the other is committed.
    pub staging_bytes: Bytes,
    /// Send the CRC-32 of every saved block, so that the daemon refuses bytes that are not those
    /// that were filled in. One pass over the payload. Default true.
    pub checksum: bool,
    /// What the engine does with restores while they run. Default: it waits for a prefix.
    pub reader: ReaderSpec,
}

impl SessionOptions {
    /// Defaults for an engine that calls itself `client_name`.
    pub fn new(client_name: impl Into<String>) -> Self {
        Self {
            client_name: client_name.into(),
            staging_bytes: Bytes::mib(64),
            checksum: true,
            reader: ReaderSpec::default(),
        }
    }

    /// The same with another size of staging memory; zero for a session that only reads.
    #[must_use]
    pub fn staging_bytes(mut self, bytes: Bytes) -> Self {
        self.staging_bytes = bytes;
        self
    }

    /// The same with or without checksums on commit.
    #[must_use]
    pub fn checksum(mut self, checksum: bool) -> Self {
        self.checksum = checksum;
        self
    }

    /// The same for an engine that reads restores in this way.
    #[must_use]
    pub fn reader(mut self, reader: ReaderSpec) -> Self {
        self.reader = reader;
        self
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let name = self.client_name.len();
        if name > NAME_BYTES_MAX {
            return Err(Error::invalid(format!(
                "client_name is {name} bytes long; accepted: at most {NAME_BYTES_MAX}"
            )));
        }
        let staging = self.staging_bytes;
        let sized = staging >= REGION_BYTES_MIN && staging <= REGION_BYTES_MAX;
        if staging.get() != 0 && !(sized && staging.get().is_multiple_of(4096)) {
            return Err(Error::invalid(format!(
                "staging_bytes is {staging}; accepted: 0, or {REGION_BYTES_MIN} to \
                 {REGION_BYTES_MAX} in whole 4 KiB pages"
            )));
        }
        Ok(())
    }
}

/// How to restore.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct RestoreOptions {
    /// Give up on what has not arrived by then; those blocks are misses with reason
    /// [`Miss::Deadline`](crate::Miss::Deadline). Default none. At most 49 days.
    pub deadline: Option<Duration>,
    /// Restore every block on its own. Default false: nothing after the first miss.
    pub scattered: bool,
    /// Worst quality that is taken. A block that is stored worse is a miss with reason
    /// [`Miss::Quality`](crate::Miss::Quality). Default [`Quality::Exact`]: every bit.
    pub accept: Quality,
    /// Name of the block before the first key, where the engine has that block already. A session
    /// that has restored it with a loss declares what follows accordingly. Default none: the first
    /// key begins a prefix.
    pub after: Option<BlockKey>,
    /// The engine computes blocks from the front while others load. Default none: it uses a loaded
    /// prefix only.
    pub two_ended: Option<TwoEnded>,
}

impl RestoreOptions {
    /// The same with a deadline.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// The same with every block restored on its own.
    #[must_use]
    pub fn scattered(mut self) -> Self {
        self.scattered = true;
        self
    }

    /// The same with blocks that are as bad as this, or better. How good each is says
    /// [`LeasedBlock::quality`](crate::LeasedBlock::quality). What is saved behind them the session
    /// declares as no better, by its keys, so that whoever asks for exact bytes does not get it;
    /// an engine that saves through another session, or restores behind blocks that it has, says
    /// so ([`Session::set_quality`](crate::Session::set_quality), [`after`](Self::after)).
    #[must_use]
    pub fn accept(mut self, accept: Quality) -> Self {
        self.accept = accept;
        self
    }

    /// The same behind a block that the engine has.
    #[must_use]
    pub fn after(mut self, parent: BlockKey) -> Self {
        self.after = Some(parent);
        self
    }

    /// The same for an engine that computes blocks from the front while others load from the back:
    /// it asks [`ComputeEnd::next`](crate::ComputeEnd::next) what to do. Every block stands for
    /// itself, as with [`scattered`](Self::scattered). Where memory cannot be shared, the engine
    /// computes what has not come by the end of the restore.
    #[must_use]
    pub fn two_ended(mut self, engine: TwoEnded) -> Self {
        self.two_ended = Some(engine);
        self.scattered = true;
        self
    }

    /// Milliseconds for the wire: 0 means none, so a deadline of zero becomes 1.
    pub(crate) fn deadline_ms(&self) -> u32 {
        match self.deadline {
            None => 0,
            Some(deadline) => u32::try_from(deadline.as_millis().max(1)).unwrap_or(u32::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoint_refuses_tcp_beyond_loopback_and_paths_no_socket_can_have() {
        let far = Endpoint::tcp("192.0.2.1:9470".parse().unwrap());
        let text = far.check().unwrap_err().to_string();
        assert!(text.contains("192.0.2.1:9470 is not loopback"), "{text}");
        let long = Endpoint::unix("/".repeat(108));
        assert!(
            long.check()
                .unwrap_err()
                .to_string()
                .contains("at most 107")
        );
        assert!(Endpoint::tcp("[::1]:9470".parse().unwrap()).check().is_ok());
    }

    #[test]
    fn session_options_name_the_accepted_range_of_staging_bytes() {
        let with = |bytes| SessionOptions::new("t").staging_bytes(Bytes(bytes)).check();
        assert!(with(0).is_ok() && with(64 << 10).is_ok());
        for bytes in [1, (64 << 10) + 1, (64 << 30) + 4096] {
            let text = with(bytes).unwrap_err().to_string();
            assert!(text.contains("64 KiB to 64 GiB"), "{text}");
        }
    }

    #[test]
    fn restore_deadline_of_zero_is_not_sent_as_no_deadline() {
        let options = RestoreOptions::default();
        assert_eq!(options.deadline_ms(), 0);
        assert_eq!(options.clone().deadline(Duration::ZERO).deadline_ms(), 1);
        assert_eq!(options.deadline(Duration::MAX).deadline_ms(), u32::MAX);
    }
}
