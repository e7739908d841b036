//! Configuration in every layer, and the files of namespaces and of disks.
//!
//! Upstairs:   the targets `config_file`, `config_layers`, `namespaces_file` and `disks_file`.
//! Downstairs: `config`, `tenant`, `tier::disk`.

use std::ffi::OsString;

use crate::config::{Config, ConfigArgs, ConfigProblems, sample};
use crate::tenant::{TenantError, kept_in};
use crate::tier::disk::{ledger_after, ledger_mended};

/// Longest input that is read as a configuration. Unit: bytes.
const TEXT_MAX: usize = 16 << 10;

/// A configuration reads back as itself, or every problem says what would be accepted (C2, C4).
fn judge(read: Result<Config, ConfigProblems>) {
    match read {
        Ok(config) => {
            let text = config.to_toml();
            let again = Config::from_toml(&text);
            assert!(again.as_ref() == Ok(&config), "{again:?}\n{text}");
            assert!(!config.namespaces.is_empty());
        }
        Err(problems) => {
            assert!(!problems.0.is_empty(), "refused for no reason");
            for problem in &problems.0 {
                assert!(!problem.to_string().is_empty(), "{problem:?}");
            }
        }
    }
}

pub(super) fn file(data: &[u8]) {
    if let (Ok(text), true) = (std::str::from_utf8(data), data.len() <= TEXT_MAX) {
        judge(Config::from_toml(text));
    }
}

/// The input is lines: `NAME=VALUE` for a variable, `table.setting=value` for a `--set`.
pub(super) fn layers(data: &[u8]) {
    let (Ok(text), true) = (std::str::from_utf8(data), data.len() <= TEXT_MAX) else {
        return;
    };
    let (mut args, mut env) = (ConfigArgs::default(), Vec::new());
    for line in text.lines().take(256) {
        match line.split_once('=') {
            // It names a file, and this target reads none.
            Some(("KVTIER_CONFIG", _)) => {}
            Some((name, value)) if name.starts_with("KVTIER_") => {
                env.push((OsString::from(name), OsString::from(value)));
            }
            _ => args.set.push(line.to_owned()),
        }
    }
    judge(Config::load(&args, env));
}

pub(super) fn file_seeds() -> Vec<Vec<u8>> {
    let whole = "[server]\nsocket = \"/run/kvtier/s\"\ntcp = \"127.0.0.1:7\"\ntcp_namespace = \"a\"\n\
        [host]\ncapacity = \"1 GiB\"\n[[disk]]\npath = \"/d\"\ncapacity = \"4 GiB\"\n\
        lane = \"pread\"\n[[namespace]]\nname = \"a\"\nuids = [1, 2]\nhost_quota = \"64 MiB\"\n\
        [limits]\nrestores_per_session = 2\n[log]\nlevel = \"debug\"\nformat = \"json\"\n";
    let effective = Config::from_toml("").map(|config| config.to_toml());
    let wrong = "[server]\nsocket = 7\n[disk]\npath = 1\n[nothing]\n[[namespace]]\nuids = [-1]\n\
        a.b.c = [[[{d = 1}]]]\n";
    let texts = [
        whole.into(),
        effective.unwrap_or_default(),
        wrong.into(),
        sample(),
    ];
    texts.map(String::into_bytes).into()
}

pub(super) fn layer_seeds() -> Vec<Vec<u8>> {
    let texts = [
        "KVTIER_HOST_CAPACITY=1 GiB\nKVTIER_SERVER_SOCKET=/s\nKVTIER_LOG_LEVEL=warn\n",
        "KVTIER_DISK_PATH=/d\nKVTIER_DISK_CAPACITY=4 GiB\nKVTIER_CONFIG=/none\nKVTIER_WRONG=1\n",
        "host.capacity=2 GiB\nnamespace.a.uids=1,2\nnamespace.a.host_quota=\"64 MiB\"\nlog.level\n",
        "server.tcp=127.0.0.1:1\nserver.tcp_namespace=b\nnamespace.b.uids=[]\n.=\n=\n",
    ];
    texts.map(|text| text.as_bytes().to_vec()).into()
}

pub(super) fn namespaces(data: &[u8]) {
    if let (Ok(text), true) = (std::str::from_utf8(data), data.len() <= TEXT_MAX) {
        namespaces_in(text);
    }
}

/// Numbers and secrets stay with their names, and no number is given twice (N1).
fn namespaces_in(text: &str) {
    let (id, secret, after) = match kept_in(text, "a") {
        Ok(kept) => kept,
        Err(problem) => {
            assert!(matches!(problem, TenantError::Damaged { .. }), "{problem}");
            return assert!(problem.to_string().contains("remove it"), "{problem}");
        }
    };
    assert_ne!(id.0, 0);
    match kept_in(&after, "b") {
        Ok((other, other_secret, last)) => {
            assert!(other != id && other_secret != secret);
            let again = kept_in(&last, "a");
            assert!(again.is_ok_and(|(again, kept, _)| (again, kept) == (id, secret)));
        }
        Err(problem) => assert!(matches!(problem, TenantError::Damaged { .. }), "{problem}"),
    }
}

pub(super) fn namespace_seeds() -> Vec<Vec<u8>> {
    let secret = "5a".repeat(32);
    let kept = |next: u32, id: u32| {
        format!(r#"{{"next":{next},"namespaces":{{"a":{{"id":{id},"secret":"{secret}"}}}}}}"#)
    };
    let texts = [
        kept(2, 1),
        kept(1, 1),
        kept(u32::MAX, 7),
        kept(9, 0),
        "{}".to_owned(),
    ];
    texts.map(String::into_bytes).into()
}

/// The file of disks, as it is and with the checksum that belongs to it.
pub(super) fn disks(data: &[u8]) {
    if data.len() > TEXT_MAX {
        return;
    }
    let mended = ledger_mended(data);
    for text in [Some(data), mended.as_deref()].into_iter().flatten() {
        match ledger_after(text) {
            Ok(written) => assert_eq!(ledger_after(&written).ok(), Some(written)),
            Err(problem) => assert!(!problem.to_string().is_empty()),
        }
    }
}

pub(super) fn disk_seeds() -> Vec<Vec<u8>> {
    let store = "5a".repeat(16);
    let kept = |wiped: &str, seen: &str| {
        format!(r#"{{"crc32":0,"kept":{{"seen":{{{seen}}},"wiped":{{{wiped}}}}}}}"#)
    };
    let texts = [
        kept("", ""),
        kept(&format!(r#""7":{{"{store}":1000}}"#), ""),
        kept(
            &format!(r#""1":{{"{store}":3}},"2":{{}}"#),
            &format!(r#""/mnt/a":{{"store":"{store}","apart":true}}"#),
        ),
        kept(r#""1":{"5A":3}"#, ""),
        "{}".to_owned(),
    ];
    let mended = |text: String| ledger_mended(text.as_bytes()).unwrap_or(text.into_bytes());
    texts.map(mended).into()
}
