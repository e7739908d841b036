//! What a test wants of its daemon, as a configuration file.
//!
//! Upstairs:   tests.
//! Downstairs: the daemon's TOML.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// One MiB in bytes.
const MIB: u64 = 1 << 20;

/// A namespace and the users in it.
#[derive(Debug, Clone)]
struct Namespace {
    name: String,
    uids: Vec<u32>,
}

/// A small daemon, unless told otherwise: 32 MiB of host memory, 64 MiB of disk in segments of
/// 4 MiB, level raw, whatever lane there is.
#[derive(Debug, Clone)]
pub struct Options {
    host_bytes: u64,
    disk_bytes: Option<u64>,
    segment_bytes: u64,
    lane: &'static str,
    level: &'static str,
    read_limit_mib: Option<u64>,
    queue_depth: Option<usize>,
    namespaces: Vec<Namespace>,
    tcp: Option<(SocketAddr, String)>,
    disk_dir: Option<PathBuf>,
    disks: usize,
    state_dir: Option<PathBuf>,
    restores_per_session: u32,
    leases_per_session: u32,
    staging_max: u64,
    operators: Option<Vec<u32>>,
    lowest_quality: &'static str,
    codec: String,
    trusted_uids: Vec<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            host_bytes: 32 * MIB,
            disk_bytes: Some(64 * MIB),
            segment_bytes: 4 * MIB,
            lane: "auto",
            level: "raw",
            read_limit_mib: None,
            queue_depth: None,
            namespaces: Vec::new(),
            tcp: None,
            disk_dir: None,
            disks: 1,
            state_dir: None,
            restores_per_session: 64,
            leases_per_session: 65_536,
            staging_max: 256 * MIB,
            operators: None,
            lowest_quality: "exact",
            codec: String::new(),
            trusted_uids: Vec::new(),
        }
    }
}

impl Options {
    /// Host memory. Unit: MiB, at least 16.
    #[must_use]
    pub fn host_mib(mut self, mib: u64) -> Self {
        self.host_bytes = mib * MIB;
        self
    }

    /// Disk capacity and size of a segment. Unit: MiB; at least 4 segments.
    #[must_use]
    pub fn disk_mib(mut self, capacity: u64, segment: u64) -> Self {
        self.disk_bytes = Some(capacity * MIB);
        self.segment_bytes = segment * MIB;
        self
    }

    /// Host memory alone.
    #[must_use]
    pub fn without_disk(mut self) -> Self {
        self.disk_bytes = None;
        self
    }

    /// Several disks, each of the capacity that one has.
    #[must_use]
    pub fn disks(mut self, count: usize) -> Self {
        self.disks = count;
        self
    }

    /// Segments elsewhere than in the test's folder.
    #[must_use]
    pub fn disk_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.disk_dir = Some(dir.into());
        self
    }

    /// Everything that must last elsewhere than in the test's folder.
    #[must_use]
    pub fn data_dir(mut self, dir: &Path) -> Self {
        self.disk_dir = Some(dir.join("disk"));
        self.state_dir = Some(dir.join("state"));
        self
    }

    /// `io_uring`, `pread` or `auto`.
    #[must_use]
    pub fn lane(mut self, lane: &'static str) -> Self {
        self.lane = lane;
        self
    }

    /// Any level that `disk.level` takes.
    #[must_use]
    pub fn level(mut self, level: &'static str) -> Self {
        self.level = level;
        self
    }

    /// Most that restores may read of the device. Unit: MiB a second.
    #[must_use]
    pub fn read_limit_mib(mut self, mib: u64) -> Self {
        self.read_limit_mib = Some(mib);
        self
    }

    /// Most operations in flight on the device.
    #[must_use]
    pub fn queue_depth(mut self, depth: usize) -> Self {
        self.queue_depth = Some(depth);
        self
    }

    /// One more namespace; the first one takes the default one's place.
    #[must_use]
    pub fn namespace(mut self, name: &str, uids: &[u32]) -> Self {
        self.namespaces.push(Namespace {
            name: name.to_owned(),
            uids: uids.to_vec(),
        });
        self
    }

    /// A TCP listener on a free port, whose peers belong to `namespace`.
    #[must_use]
    pub fn tcp(mut self, namespace: &str) -> Self {
        // The port is free again between here and the daemon's bind: a race that the loopback's
        // thousands of ports make unlikely.
        let probe = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        self.tcp = Some((probe.local_addr().unwrap(), namespace.to_owned()));
        self
    }

    /// Most restores of one session.
    #[must_use]
    pub fn restores_per_session(mut self, most: u32) -> Self {
        self.restores_per_session = most;
        self
    }

    /// Most leases of one session.
    #[must_use]
    pub fn leases_per_session(mut self, most: u32) -> Self {
        self.leases_per_session = most;
        self
    }

    /// Most staging memory of one session. Unit: MiB.
    #[must_use]
    pub fn staging_max_mib(mut self, mib: u64) -> Self {
        self.staging_max = mib * MIB;
        self
    }

    /// Worst quality at which blocks of every namespace may be stored.
    #[must_use]
    pub fn lowest_quality(mut self, quality: &'static str) -> Self {
        self.lowest_quality = quality;
        self
    }

    /// Lines of the table `[codec]`.
    #[must_use]
    pub fn codec(mut self, lines: &str) -> Self {
        self.codec = lines.to_owned();
        self
    }

    /// Engines of this user may register memory of their own.
    #[must_use]
    pub fn trusting_own_user(mut self) -> Self {
        self.trusted_uids = vec![rustix::process::geteuid().as_raw()];
        self
    }

    /// Users who may operate the daemon.
    #[must_use]
    pub fn operators(mut self, uids: &[u32]) -> Self {
        self.operators = Some(uids.to_vec());
        self
    }

    /// Where TCP peers connect.
    pub fn tcp_address(&self) -> SocketAddr {
        self.tcp.as_ref().expect("this daemon has no TCP").0
    }

    /// Folder of the segments for a test in `home`.
    pub fn disk_dir_in(&self, home: &Path) -> PathBuf {
        self.disk_dir.clone().unwrap_or_else(|| home.join("disk"))
    }

    /// Folders of the segments of all disks: the first one's, and beside it the others'.
    pub fn disk_dirs_in(&self, home: &Path) -> Vec<PathBuf> {
        let first = self.disk_dir_in(home);
        let beside = |number: usize| {
            let name = first.file_name().unwrap_or_default().to_string_lossy();
            first.with_file_name(format!("{name}-{number}"))
        };
        let rest: Vec<_> = (1..self.disks).map(beside).collect();
        std::iter::once(first).chain(rest).collect()
    }

    /// The configuration file.
    pub fn to_toml(&self, home: &Path) -> String {
        let mut toml = String::new();
        let path = |path: &Path| format!("{:?}", path.display().to_string());
        let mut line = |text: String| writeln!(toml, "{text}").unwrap();
        line("[server]".into());
        line(format!("socket = {}", path(&home.join("d.sock"))));
        line("metrics = \"127.0.0.1:0\"\ndrain_timeout_s = 20".into());
        if let Some((address, namespace)) = &self.tcp {
            line(format!(
                "tcp = \"{address}\"\ntcp_namespace = \"{namespace}\""
            ));
        }
        let state = self.state_dir.clone().unwrap_or_else(|| home.join("state"));
        line(format!("[state]\ndir = {}", path(&state)));
        line(format!("[host]\ncapacity = {}", quoted(self.host_bytes)));
        // Many daemons start side by side: none takes from the pool of large pages.
        line("hugepages = \"off\"".into());
        let disks = self.disk_bytes.map(|capacity| {
            let dirs = self.disk_dirs_in(home).into_iter();
            dirs.map(move |dir| (dir, capacity))
        });
        for (dir, capacity) in disks.into_iter().flatten() {
            line(format!("[[disk]]\npath = {}", path(&dir)));
            line(format!("capacity = {}", quoted(capacity)));
            line(format!("segment_size = {}", quoted(self.segment_bytes)));
            line(format!(
                "lane = \"{}\"\nlevel = \"{}\"",
                self.lane, self.level
            ));
            if let Some(mib) = self.read_limit_mib {
                line(format!("read_limit = \"{mib} MiB\""));
            }
            if let Some(depth) = self.queue_depth {
                line(format!("queue_depth = {depth}"));
            }
        }
        line(format!("[codec]\n{}", self.codec));
        let own = Namespace {
            name: "default".into(),
            uids: vec![rustix::process::geteuid().as_raw()],
        };
        let own = [own];
        let given = &self.namespaces;
        for one in if given.is_empty() { &own[..] } else { given } {
            let (name, uids) = (&one.name, &one.uids);
            line(format!("[[namespace]]\nname = \"{name}\"\nuids = {uids:?}"));
            line(format!("staging_max = {}", quoted(self.staging_max)));
            line(format!("lowest_quality = \"{}\"", self.lowest_quality));
        }
        if let Some(uids) = &self.operators {
            line(format!("[operator]\nuids = {uids:?}"));
        }
        line(format!("[regions]\ntrusted_uids = {:?}", self.trusted_uids));
        line("[limits]".into());
        line(format!(
            "restores_per_session = {}",
            self.restores_per_session
        ));
        line(format!("leases_per_session = {}", self.leases_per_session));
        line("[log]\nformat = \"json\"\nlevel = \"info\"".into());
        toml
    }
}

fn quoted(bytes: u64) -> String {
    format!("\"{bytes} B\"")
}
