//! Settings that must go together, and defaults that depend on other settings.
//!
//! Upstairs:   `config::Config::load`.
//! Downstairs: `tables`.
//!
//! A table with a problem of its own is absent here, so that one mistake is told once and not
//! again as its consequences.

use std::collections::BTreeMap;
use std::mem::take;
use std::path::Path;

use kvtier_proto::Bytes;

use super::Config;
use super::layers::{Entries, Tree};
use super::problem::ConfigProblem;
use super::settings::Reader;
use super::tables::{
    CodecConfig, DISKS_MAX, DiskConfig, HOST_QUOTA_MIN, HostConfig, LimitsConfig, LogConfig,
    LowestQuality, NAMESPACES_MAX, NamespaceConfig, OperatorConfig, RegionsConfig, SEGMENTS_MIN,
    SOCKET_PATH_MAX, ServerConfig, StateConfig,
};

/// The tables as far as each could be read.
pub(super) struct Tables {
    server: Option<ServerConfig>,
    state: Option<StateConfig>,
    host: Option<HostConfig>,
    disks: Vec<Option<DiskConfig>>,
    codec: Option<CodecConfig>,
    namespaces: Vec<Option<NamespaceConfig>>,
    operator: Option<OperatorConfig>,
    regions: Option<RegionsConfig>,
    limits: Option<LimitsConfig>,
    log: Option<LogConfig>,
}

/// Reads one table: how problems name it, what was given, where problems go.
type Read<T> = fn(Reader<'_>) -> Option<T>;

impl Tables {
    pub(super) fn read(mut tree: Tree, problems: &mut Vec<ConfigProblem>) -> Self {
        let (disks, namespaces) = (take(&mut tree.disks), take(&mut tree.namespaces));
        let mut tables = Single {
            given: tree.single,
            problems,
        };
        Self {
            server: tables.read(ServerConfig::TABLE, ServerConfig::read),
            state: tables.read(StateConfig::TABLE, StateConfig::read),
            host: tables.read(HostConfig::TABLE, HostConfig::read),
            codec: tables.read(CodecConfig::TABLE, CodecConfig::read),
            operator: tables.read(OperatorConfig::TABLE, OperatorConfig::read),
            regions: tables.read(RegionsConfig::TABLE, RegionsConfig::read),
            limits: tables.read(LimitsConfig::TABLE, LimitsConfig::read),
            log: tables.read(LogConfig::TABLE, LogConfig::read),
            disks: read_list(disks, DiskConfig::TABLE, problems, DiskConfig::read),
            namespaces: read_list(
                namespaces,
                NamespaceConfig::TABLE,
                problems,
                NamespaceConfig::read,
            ),
        }
    }

    /// Fills in what depends on other settings. `None` when a table is missing.
    pub(super) fn into_config(self, own_uid: u32) -> Option<Config> {
        let mut config = Config {
            server: self.server?,
            state: self.state?,
            host: self.host?,
            disks: self.disks.into_iter().collect::<Option<_>>()?,
            codec: self.codec?,
            namespaces: self.namespaces.into_iter().collect::<Option<_>>()?,
            operator: self.operator?,
            regions: self.regions?,
            limits: self.limits?,
            log: self.log?,
        };
        if config.namespaces.is_empty() {
            config.namespaces.push(own_namespace(own_uid));
        }
        let share = share(config.host.capacity, config.namespaces.iter());
        for namespace in &mut config.namespaces {
            namespace.host_quota.get_or_insert(share);
        }
        let mut operators = vec![0, own_uid];
        operators.dedup();
        config.operator.uids.get_or_insert(operators);
        let descriptor_socket = config.server.descriptor_socket();
        config.server.descriptor_socket = Some(descriptor_socket);
        Some(config)
    }
}

struct Single<'a> {
    given: BTreeMap<&'static str, Entries>,
    problems: &'a mut Vec<ConfigProblem>,
}

impl Single<'_> {
    fn read<T>(&mut self, table: &'static str, read: Read<T>) -> Option<T> {
        let entries = self.given.remove(table).unwrap_or_default();
        read(Reader::new(table, entries, self.problems))
    }
}

fn read_list<T>(
    list: Vec<Entries>,
    table: &str,
    problems: &mut Vec<ConfigProblem>,
    read: Read<T>,
) -> Vec<Option<T>> {
    let single = list.len() == 1;
    let label = |index| match single {
        true => table.to_owned(),
        false => format!("{table}[{index}]"),
    };
    let one = |(index, entries)| read(Reader::new(label(index), entries, problems));
    list.into_iter().enumerate().map(one).collect()
}

/// The one namespace of a daemon whose configuration names none.
fn own_namespace(own_uid: u32) -> NamespaceConfig {
    NamespaceConfig {
        name: String::from("default"),
        uids: vec![own_uid],
        host_quota: None,
        lowest_quality: LowestQuality::Exact,
        staging_max: Bytes::gib(1),
    }
}

/// What each namespace without a quota gets.
fn share<'a>(capacity: Bytes, namespaces: impl Iterator<Item = &'a NamespaceConfig>) -> Bytes {
    let (mut left, mut sharing) = (capacity.get(), 0u64);
    for namespace in namespaces {
        match namespace.host_quota {
            Some(quota) => left = left.saturating_sub(quota.get()),
            None => sharing += 1,
        }
    }
    Bytes(left.checked_div(sharing).unwrap_or(0))
}

/// Checks what no single setting shows.
pub(super) fn check(tables: &Tables, problems: &mut Vec<ConfigProblem>) {
    if let Some(server) = &tables.server {
        check_sockets(server, problems);
        check_tcp(server, &tables.namespaces, problems);
    }
    check_disks(&tables.disks, problems);
    check_names(&tables.namespaces, problems);
    check_uids(tables, problems);
    if let Some(host) = &tables.host {
        check_quotas(host.capacity, &tables.namespaces, problems);
    }
}

fn together(key: &str, value: impl Into<String>, accepted: impl Into<String>) -> ConfigProblem {
    ConfigProblem::Together {
        key: key.to_owned(),
        value: value.into(),
        accepted: accepted.into(),
    }
}

fn check_sockets(server: &ServerConfig, problems: &mut Vec<ConfigProblem>) {
    let descriptors = server.descriptor_socket();
    let shown = |path: &Path| format!("{:?}", path.display().to_string());
    if descriptors == server.socket {
        problems.push(together(
            "server.descriptor_socket",
            shown(&descriptors),
            "a path other than server.socket",
        ));
    }
    if descriptors.as_os_str().len() > SOCKET_PATH_MAX {
        problems.push(together(
            "server.socket",
            shown(&server.socket),
            "a path of at most 104 bytes, or server.descriptor_socket set as well",
        ));
    }
}

fn check_tcp(
    server: &ServerConfig,
    namespaces: &[Option<NamespaceConfig>],
    problems: &mut Vec<ConfigProblem>,
) {
    let key = "server.tcp_namespace";
    match (&server.tcp, &server.tcp_namespace) {
        (Some(_), Some(name)) => {
            // A namespace that could not be read may be the one that is meant.
            let unknown = namespaces.iter().any(Option::is_none);
            let default = namespaces.is_empty() && name == "default";
            let is_it = |namespace: &NamespaceConfig| namespace.name == *name;
            if !(unknown || default || namespaces.iter().flatten().any(is_it)) {
                problems.push(together(key, format!("{name:?}"), configured(namespaces)));
            }
        }
        (Some(tcp), None) => problems.push(together(
            key,
            format!("not set, but server.tcp is {tcp}"),
            configured(namespaces),
        )),
        (None, Some(name)) => problems.push(together(
            key,
            format!("{name:?}, but server.tcp is not set"),
            "no value unless server.tcp is set",
        )),
        (None, None) => {}
    }
}

fn configured(namespaces: &[Option<NamespaceConfig>]) -> String {
    let names: Vec<_> = namespaces
        .iter()
        .flatten()
        .map(|one| one.name.as_str())
        .collect();
    match names.is_empty() {
        true => String::from("\"default\", the only namespace"),
        false => format!("the name of a configured namespace: {}", names.join(", ")),
    }
}

fn check_disks(disks: &[Option<DiskConfig>], problems: &mut Vec<ConfigProblem>) {
    if disks.len() > DISKS_MAX {
        problems.push(together(
            "disk",
            format!("{} tables", disks.len()),
            format!("at most {DISKS_MAX}"),
        ));
    }
    check_disks_apart(disks, problems);
    for disk in disks.iter().flatten() {
        let least = disk.segment_size.get().saturating_mul(SEGMENTS_MIN);
        if disk.capacity.get() < least {
            problems.push(together(
                "disk.capacity",
                format!("{} with segments of {}", disk.capacity, disk.segment_size),
                format!("{} or more: {SEGMENTS_MIN} segments", Bytes(least)),
            ));
        }
    }
}

/// Two stores in one directory would take each other's files, and what is encoded once must suit
/// every disk that may have to take it.
fn check_disks_apart(disks: &[Option<DiskConfig>], problems: &mut Vec<ConfigProblem>) {
    let mut before: Vec<&DiskConfig> = Vec::new();
    for disk in disks.iter().flatten() {
        if before.iter().any(|other| other.path == disk.path) {
            problems.push(together(
                "disk.path",
                format!("{:?} more than once", disk.path.display().to_string()),
                "each directory once",
            ));
        }
        if let Some(first) = before.first().filter(|first| first.level != disk.level) {
            problems.push(together(
                "disk.level",
                format!("{:?} and {:?}", first.level.as_str(), disk.level.as_str()),
                "the same in every [[disk]]",
            ));
        }
        before.push(disk);
    }
}

fn check_names(namespaces: &[Option<NamespaceConfig>], problems: &mut Vec<ConfigProblem>) {
    if namespaces.len() > NAMESPACES_MAX {
        problems.push(together(
            "namespace",
            format!("{} tables", namespaces.len()),
            format!("at most {NAMESPACES_MAX}"),
        ));
    }
    let mut names: Vec<_> = namespaces
        .iter()
        .flatten()
        .map(|one| one.name.as_str())
        .collect();
    names.sort_unstable();
    let mut twice: Vec<_> = pairs(&names)
        .filter(|(a, b)| a == b)
        .map(|(a, _)| *a)
        .collect();
    twice.dedup();
    for name in twice {
        let value = format!("{name:?} more than once");
        problems.push(together("namespace.name", value, "each name once"));
    }
}

fn pairs<T>(sorted: &[T]) -> impl Iterator<Item = (&T, &T)> {
    sorted.iter().zip(sorted.iter().skip(1))
}

fn check_uids(tables: &Tables, problems: &mut Vec<ConfigProblem>) {
    let mut owners: BTreeMap<u32, &str> = BTreeMap::new();
    let tcp = tables
        .server
        .as_ref()
        .and_then(|server| server.tcp_namespace.as_deref());
    for namespace in tables.namespaces.iter().flatten() {
        if namespace.uids.is_empty() && tcp != Some(namespace.name.as_str()) {
            problems.push(together(
                "namespace.uids",
                format!("empty in {:?}: nobody could use it", namespace.name),
                "at least one user id, unless it is server.tcp_namespace",
            ));
        }
        for uid in &namespace.uids {
            if let Some(other) = owners.insert(*uid, &namespace.name) {
                problems.push(together(
                    "namespace.uids",
                    format!("{uid} in {other:?} and in {:?}", namespace.name),
                    "each user id once",
                ));
            }
        }
    }
}

fn check_quotas(
    capacity: Bytes,
    namespaces: &[Option<NamespaceConfig>],
    problems: &mut Vec<ConfigProblem>,
) {
    let quotas = || namespaces.iter().flatten().filter_map(|one| one.host_quota);
    let sum = quotas().fold(0u64, |sum, quota| sum.saturating_add(quota.get()));
    if sum > capacity.get() {
        problems.push(together(
            "namespace.host_quota",
            format!("{} in all", Bytes(sum)),
            format!("together at most host.capacity, which is {capacity}"),
        ));
        return;
    }
    let shares = namespaces
        .iter()
        .flatten()
        .any(|one| one.host_quota.is_none());
    let share = share(capacity, namespaces.iter().flatten());
    if shares && share < HOST_QUOTA_MIN {
        problems.push(together(
            "namespace.host_quota",
            format!("{share} for each namespace without one"),
            format!("{HOST_QUOTA_MIN} or more: raise host.capacity or lower other quotas"),
        ));
    }
}
