//! Configuration of the daemon: read in layers, checked whole, printed once, then trusted.
//!
//! Upstairs:   `bin/kvtierd.rs` loads it and hands each room its own table.
//! Downstairs: `config::tables` declares the settings, `layers` merges what was given.
//!
//! Precedence: defaults, then the file, then `KVTIER_*` variables, then flags.
//!
//! Invariants kept here
//!   C2  One run names every problem.
//!   C4  A `Config` that exists is usable as it is: every range was checked, every default that
//!       depends on others is filled in.
//!
//! Not here on purpose
//!   No reload: a running daemon keeps the configuration that it started with.
//!   Checking opens, creates and resolves nothing; the only file read is the one named.

mod document;
mod layers;
mod problem;
mod settings;
mod tables;
mod together;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use kvtier_proto::Bytes;
use serde::Serialize;

pub use document::{page, sample};
pub use problem::{ConfigProblem, ConfigProblems, Origin};
pub use tables::{
    CodecConfig, CodecLevel, DISKS_MAX, DiskConfig, HOST_QUOTA_MIN, HostConfig, HugePages, Lane,
    LimitsConfig, LogConfig, LogFormat, LowestQuality, NAMESPACES_MAX, NamespaceConfig,
    OperatorConfig, RegionsConfig, SEGMENTS_MIN, SOCKET_PATH_MAX, ServerConfig, StateConfig,
};

use layers::Tree;
use together::Tables;

/// Exit code of a process whose configuration is not usable (`EX_USAGE` of sysexits).
pub const EXIT_BAD_CONFIG: u8 = 64;

/// Tables that appear once, with their settings.
const SINGLE_TABLES: [(&str, &[&str]); 8] = [
    (ServerConfig::TABLE, ServerConfig::NAMES),
    (StateConfig::TABLE, StateConfig::NAMES),
    (HostConfig::TABLE, HostConfig::NAMES),
    (CodecConfig::TABLE, CodecConfig::NAMES),
    (OperatorConfig::TABLE, OperatorConfig::NAMES),
    (RegionsConfig::TABLE, RegionsConfig::NAMES),
    (LimitsConfig::TABLE, LimitsConfig::NAMES),
    (LogConfig::TABLE, LogConfig::NAMES),
];

/// All tables, in the order of the documents.
const TABLE_NAMES: [&str; 10] = [
    ServerConfig::TABLE,
    StateConfig::TABLE,
    HostConfig::TABLE,
    DiskConfig::TABLE,
    CodecConfig::TABLE,
    NamespaceConfig::TABLE,
    OperatorConfig::TABLE,
    RegionsConfig::TABLE,
    LimitsConfig::TABLE,
    LogConfig::TABLE,
];

/// Variables that start with `KVTIER_` and are no settings: the name of the file, the cache of
/// downloaded test models, and whatever tests need (by prefix).
const OTHER_VARIABLES: [&str; 2] = ["KVTIER_CONFIG", "KVTIER_CACHE"];
const TEST_PREFIX: &str = "KVTIER_TEST_";

/// Flags that every command with a configuration takes.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Configuration")]
pub struct ConfigArgs {
    /// Configuration file (or KVTIER_CONFIG); without one the defaults hold
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Sets any setting: --set host.capacity="4 GiB". May be repeated; the last one wins, also
    /// over the flags below
    #[arg(long = "set", value_name = "TABLE.SETTING=VALUE")]
    pub set: Vec<String>,
    /// Unix socket to listen on (server.socket)
    #[arg(long, value_name = "PATH")]
    pub socket: Option<String>,
    /// Loopback address for TCP clients (server.tcp)
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub tcp: Option<String>,
    /// Namespace of TCP clients (server.tcp_namespace)
    #[arg(long, value_name = "NAME")]
    pub tcp_namespace: Option<String>,
    /// HTTP address of metrics and health (server.metrics)
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub metrics: Option<String>,
    /// Directory of the daemon's own state (state.dir)
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<String>,
    /// Host memory for blocks (host.capacity)
    #[arg(long, value_name = "SIZE")]
    pub host_capacity: Option<String>,
    /// Directory of the disk tier (disk.path)
    #[arg(long, value_name = "DIR")]
    pub disk_path: Option<String>,
    /// Space of the disk tier (disk.capacity)
    #[arg(long, value_name = "SIZE")]
    pub disk_capacity: Option<String>,
    /// Log filter: error, warn, info, debug, or by part (log.level)
    #[arg(long, value_name = "FILTER")]
    pub log_level: Option<String>,
    /// Form of log lines: text or json (log.format)
    #[arg(long, value_name = "FORM")]
    pub log_format: Option<String>,
}

impl ConfigArgs {
    /// The flags with names of their own: flag, setting, value.
    fn named(&self) -> [(&'static str, &'static str, Option<&String>); 10] {
        [
            ("--socket", "server.socket", self.socket.as_ref()),
            ("--tcp", "server.tcp", self.tcp.as_ref()),
            (
                "--tcp-namespace",
                "server.tcp_namespace",
                self.tcp_namespace.as_ref(),
            ),
            ("--metrics", "server.metrics", self.metrics.as_ref()),
            ("--state-dir", "state.dir", self.state_dir.as_ref()),
            (
                "--host-capacity",
                "host.capacity",
                self.host_capacity.as_ref(),
            ),
            ("--disk-path", "disk.path", self.disk_path.as_ref()),
            (
                "--disk-capacity",
                "disk.capacity",
                self.disk_capacity.as_ref(),
            ),
            ("--log-level", "log.level", self.log_level.as_ref()),
            ("--log-format", "log.format", self.log_format.as_ref()),
        ]
    }
}

/// A checked configuration (C4).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Config {
    /// Where the daemon listens and how it ends.
    pub server: ServerConfig,
    /// What the daemon keeps about itself.
    pub state: StateConfig,
    /// Host memory that holds blocks.
    pub host: HostConfig,
    /// Devices that hold blocks, or none.
    #[serde(rename = "disk", skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// How blocks are coded.
    pub codec: CodecConfig,
    /// Tenants, at least one.
    #[serde(rename = "namespace")]
    pub namespaces: Vec<NamespaceConfig>,
    /// Who may operate the daemon.
    pub operator: OperatorConfig,
    /// Memory of engines that the daemon copies from and to.
    pub regions: RegionsConfig,
    /// Bounds on what one session may hold.
    pub limits: LimitsConfig,
    /// What is logged.
    pub log: LogConfig,
}

impl Config {
    /// Reads all layers: `env` is the whole environment, of which `KVTIER_*` matters.
    pub fn load(
        args: &ConfigArgs,
        env: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, ConfigProblems> {
        let mut variables = Vec::new();
        let mut tree = Tree::default();
        for (name, value) in env {
            let Some(name) = name.to_str().filter(|name| name.starts_with("KVTIER_")) else {
                continue;
            };
            match value.into_string() {
                Ok(value) => variables.push((name.to_owned(), value)),
                Err(value) => tree.problems.push(ConfigProblem::Value {
                    origin: Origin::Environment(name.to_owned()),
                    key: name.to_owned(),
                    value: format!("{value:?}"),
                    accepted: String::from("text in UTF-8"),
                }),
            }
        }
        variables.sort();
        let named = |(name, _): &&(String, String)| name == "KVTIER_CONFIG";
        let from_env = variables
            .iter()
            .find(named)
            .map(|(_, path)| PathBuf::from(path));
        if let Some(path) = args.config.clone().or(from_env) {
            read_file(&path, &mut tree);
        }
        for (name, value) in &variables {
            let other = OTHER_VARIABLES.contains(&name.as_str()) || name.starts_with(TEST_PREFIX);
            if !other {
                tree.environment(name, value);
            }
        }
        flags(args, &mut tree);
        Self::from_tree(tree, own_uid())
    }

    /// Reads a configuration from the text of a file alone.
    pub fn from_toml(text: &str) -> Result<Self, ConfigProblems> {
        let mut tree = Tree::default();
        tree.file(Path::new("kvtier.toml"), text);
        Self::from_tree(tree, own_uid())
    }

    fn from_tree(mut tree: Tree, own_uid: u32) -> Result<Self, ConfigProblems> {
        let mut problems = std::mem::take(&mut tree.problems);
        let tables = Tables::read(tree, &mut problems);
        together::check(&tables, &mut problems);
        match tables.into_config(own_uid) {
            Some(config) if problems.is_empty() => Ok(config),
            _ => Err(ConfigProblems(problems)),
        }
    }

    /// The whole configuration as a file would say it, with every default filled in.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).unwrap_or_else(|error| format!("# not representable: {error}\n"))
    }
}

impl ServerConfig {
    /// The companion socket that hands out descriptors.
    pub fn descriptor_socket(&self) -> PathBuf {
        let derived = || {
            let mut path = self.socket.clone().into_os_string();
            path.push(".fd");
            PathBuf::from(path)
        };
        self.descriptor_socket.clone().unwrap_or_else(derived)
    }
}

impl NamespaceConfig {
    /// Host memory of this namespace.
    pub fn host_quota(&self) -> Bytes {
        self.host_quota.unwrap_or_default()
    }
}

fn own_uid() -> u32 {
    rustix::process::getuid().as_raw()
}

fn read_file(path: &Path, tree: &mut Tree) {
    match std::fs::read_to_string(path) {
        Ok(text) => tree.file(path, &text),
        Err(error) => tree.problems.push(ConfigProblem::Unreadable {
            path: path.to_owned(),
            message: error.to_string(),
        }),
    }
}

/// Flags with names of their own first: they speak of every disk, `--set` perhaps of one.
fn flags(args: &ConfigArgs, tree: &mut Tree) {
    for (flag, key, value) in args.named() {
        if let Some(value) = value {
            tree.flag(flag, key, value);
        }
    }
    for set in &args.set {
        let flag = format!("--set {set}");
        match set.split_once('=') {
            Some((key, value)) => tree.flag(&flag, key.trim(), value.trim()),
            None => tree.problems.push(ConfigProblem::Value {
                origin: Origin::Flag(String::from("--set")),
                key: String::from("--set"),
                value: format!("{set:?}"),
                accepted: String::from("TABLE.SETTING=VALUE"),
            }),
        }
    }
}

#[cfg(test)]
mod tests;
