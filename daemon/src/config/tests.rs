//! What the configuration promises, one test each.

use super::*;
use crate::golden;

fn env(pairs: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
    let pair = |(name, value): &(&str, &str)| (OsString::from(name), OsString::from(value));
    pairs.iter().map(pair).collect()
}

fn set(settings: &[&str]) -> ConfigArgs {
    ConfigArgs {
        set: settings.iter().map(|one| (*one).to_owned()).collect(),
        ..ConfigArgs::default()
    }
}

fn problems(toml: &str) -> Vec<String> {
    let problems = Config::from_toml(toml).expect_err("must have problems");
    problems.0.iter().map(ToString::to_string).collect()
}

fn only_problem(toml: &str) -> String {
    let problems = problems(toml);
    assert_eq!(problems.len(), 1, "{problems:#?}");
    problems[0].clone()
}

#[test]
fn config_has_usable_defaults_when_nothing_is_given() {
    let config = Config::load(&ConfigArgs::default(), env(&[("HOME", "/root")])).unwrap();
    assert_eq!(config.server.socket, Path::new("/run/kvtier/kvtierd.sock"));
    assert_eq!(
        config.server.descriptor_socket(),
        Path::new("/run/kvtier/kvtierd.sock.fd")
    );
    assert_eq!(config.server.metrics.to_string(), "127.0.0.1:9471");
    assert_eq!(config.host.capacity, Bytes::gib(1));
    assert!(config.disks.is_empty());
    let me = rustix::process::getuid().as_raw();
    let own = &config.namespaces[0];
    assert_eq!(
        (own.name.as_str(), &own.uids, own.host_quota()),
        ("default", &vec![me], Bytes::gib(1))
    );
    let mut operators = vec![0, me];
    operators.dedup();
    assert_eq!(config.operator.uids, Some(operators));
}

#[test]
fn sample_file_is_current() {
    golden::check("systemd/kvtier.toml", &sample());
}

#[test]
fn reference_page_is_current() {
    golden::check("docs/CONFIG.md", &page());
}

// Goal: an operator who installs the sample changes nothing.
#[test]
fn sample_file_says_what_the_defaults_are() {
    assert_eq!(Config::from_toml(&sample()), Config::from_toml(""));
    let settings = |line: &&str| line.starts_with("# ") && line.contains(" = ");
    let defaults = |line: &str| {
        let off = line.contains("(not set") || line.contains("(must be set");
        (!off).then(|| line.trim_start_matches("# ").to_owned())
    };
    let mut text = String::new();
    for line in sample().lines() {
        if line.starts_with('[') {
            text.push_str(line);
        } else if line.starts_with("# [[") {
            break;
        } else if settings(&line) {
            text.push_str(&defaults(line).unwrap_or_default());
        }
        text.push('\n');
    }
    assert_eq!(Config::from_toml(&text), Config::from_toml(""), "{text}");
}

#[test]
fn later_layers_win_over_earlier_ones() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        file.path(),
        "[server]\nsocket = \"/file\"\nsessions_max = 2\ndrain_timeout_s = 2\n\
         [host]\ncapacity = \"32 MiB\"\n",
    )
    .unwrap();
    let args = ConfigArgs {
        config: Some(file.path().to_owned()),
        set: vec![String::from("server.sessions_max=4")],
        socket: Some(String::from("/flag")),
        ..ConfigArgs::default()
    };
    let env = env(&[
        ("KVTIER_SERVER_SOCKET", "/env"),
        ("KVTIER_SERVER_SESSIONS_MAX", "3"),
        ("KVTIER_SERVER_DRAIN_TIMEOUT_S", "3"),
    ]);
    let config = Config::load(&args, env).unwrap();
    assert_eq!(config.server.socket, Path::new("/flag"));
    assert_eq!(config.server.sessions_max, 4);
    assert_eq!(config.server.drain_timeout_s, 3);
    assert_eq!(config.host.capacity, Bytes::mib(32));
}

#[test]
fn file_may_be_named_by_a_variable() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "[host]\ncapacity = 33554432\n").unwrap();
    let path = file.path().to_str().unwrap();
    let config = Config::load(&ConfigArgs::default(), env(&[("KVTIER_CONFIG", path)]));
    assert_eq!(config.unwrap().host.capacity, Bytes::mib(32));
}

#[test]
fn every_problem_is_named_at_once() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        file.path(),
        "[server]\nsokcet = \"/a\"\ndrain_timeout_s = 0\n\n[[disk]]\npath = 7\n[hosts]\n",
    )
    .unwrap();
    let args = ConfigArgs {
        config: Some(file.path().to_owned()),
        set: vec![
            String::from("host.capacity=4 KiB"),
            String::from("nonsense"),
        ],
        ..ConfigArgs::default()
    };
    let env = env(&[("KVTIER_LOG_FORMAT", "xml"), ("KVTIER_SOCKET", "/a")]);
    let text = Config::load(&args, env).unwrap_err().to_string();
    let name = file.path().display();
    for part in [
        "9 problems",
        &format!("{name}:2: server.sokcet is not a setting; accepted: socket, "),
        &format!("{name}:3: server.drain_timeout_s is 0; accepted: 1 to 600"),
        &format!("{name}:6: disk.path is 7; accepted: the path of"),
        "disk.capacity is not set and has no default; accepted: at least 4 times",
        &format!("{name}:7: hosts is not a setting; accepted: server, state, host"),
        "flag --set host.capacity=4 KiB: host.capacity is \"4 KiB\"; accepted: 16 MiB to",
        "flag --set: --set is \"nonsense\"; accepted: TABLE.SETTING=VALUE",
        "environment variable KVTIER_LOG_FORMAT: log.format is \"xml\"; accepted: \"text\"",
        "environment variable KVTIER_SOCKET: KVTIER_SOCKET is not a setting",
    ] {
        assert!(text.contains(part), "{part}\nnot in\n{text}");
    }
}

#[test]
fn syntax_errors_name_file_and_line() {
    let problem = only_problem("[server]\nsocket = \n");
    assert!(problem.starts_with("kvtier.toml:2: "), "{problem}");
}

#[test]
fn missing_file_is_named() {
    let args = ConfigArgs {
        config: Some(PathBuf::from("/nonexistent/kvtier.toml")),
        ..ConfigArgs::default()
    };
    let text = Config::load(&args, env(&[])).unwrap_err().to_string();
    assert!(
        text.contains("/nonexistent/kvtier.toml: cannot be read: "),
        "{text}"
    );
}

#[test]
fn variables_of_caches_and_tests_are_left_alone() {
    let env = env(&[("KVTIER_CACHE", "/c"), ("KVTIER_TEST_SEED", "1")]);
    assert!(Config::load(&ConfigArgs::default(), env).is_ok());
}

#[test]
fn single_disk_comes_from_variables_alone() {
    let env = env(&[
        ("KVTIER_DISK_PATH", "/disk"),
        ("KVTIER_DISK_CAPACITY", "4 GiB"),
        ("KVTIER_DISK_LANE", "pread"),
    ]);
    let config = Config::load(&ConfigArgs::default(), env).unwrap();
    assert_eq!(config.disks.len(), 1);
    assert_eq!(config.disks[0].path, Path::new("/disk"));
    assert_eq!(config.disks[0].lane, Lane::Pread);
    assert_eq!(config.disks[0].level.level(), kvtier_proto::Level::LOSSLESS);
}

#[test]
fn lists_are_written_with_or_without_brackets() {
    for text in ["7,8", "[7, 8]", "7 , 8"] {
        let config = Config::load(&set(&[&format!("operator.uids={text}")]), env(&[])).unwrap();
        assert_eq!(config.operator.uids, Some(vec![7, 8]), "{text}");
    }
    let config = Config::load(&set(&["operator.uids=7"]), env(&[])).unwrap();
    assert_eq!(config.operator.uids, Some(vec![7]));
}

#[test]
fn namespaces_come_from_flags_by_name() {
    let args = set(&[
        "namespace.a.uids=1",
        "namespace.b.uids=2",
        "namespace.a.host_quota=1 MiB",
    ]);
    let config = Config::load(&args, env(&[])).unwrap();
    let shown = |one: &NamespaceConfig| (one.name.clone(), one.uids.clone(), one.host_quota());
    let rest = Bytes(Bytes::gib(1).get() - Bytes::mib(1).get());
    assert_eq!(
        config.namespaces.iter().map(shown).collect::<Vec<_>>(),
        [
            (String::from("a"), vec![1], Bytes::mib(1)),
            (String::from("b"), vec![2], rest)
        ]
    );
}

// Goal: each range accepts its ends and nothing past them.
#[test]
fn ranges_hold_at_their_ends() {
    let disk = "[[disk]]\npath = \"/d\"\ncapacity = \"1 TiB\"\n";
    let cases: [(&str, &str, &[&str], &[&str]); 11] = [
        (
            "[server]",
            "drain_timeout_s",
            &["1", "600"],
            &["0", "601", "-1", "\"1\""],
        ),
        ("[server]", "sessions_max", &["1", "1024"], &["0", "1025"]),
        (
            "[server]",
            "metrics",
            &["\"127.0.0.1:0\"", "\"[::]:1\"", "\"0.0.0.0:1\""],
            &["\"10.0.0.1:1\"", "\"localhost:1\"", "\"127.0.0.1\""],
        ),
        (
            "[host]",
            "capacity",
            &["\"16 MiB\"", "\"16 TiB\""],
            &["16777215", "\"17 TiB\""],
        ),
        (
            disk,
            "segment_size",
            &["\"1 MiB\"", "\"4 GiB\""],
            &["1048575", "1050000", "\"5 GiB\""],
        ),
        (disk, "queue_depth", &["1", "1024"], &["0", "1025"]),
        (
            disk,
            "lane",
            &["\"auto\"", "\"io_uring\"", "\"pread\""],
            &["\"aio\""],
        ),
        (
            "[limits]",
            "leases_per_session",
            &["1", "65536"],
            &["0", "65537"],
        ),
        (
            "[limits]",
            "restores_per_session",
            &["1", "64"],
            &["0", "65"],
        ),
        (
            "[limits]",
            "pin_ttl_max_s",
            &["1", "604800"],
            &["0", "604801"],
        ),
        (
            "[log]",
            "level",
            &["\"info,kvtierd=debug\""],
            &["\"\"", "\"a=b=c\"", "1"],
        ),
    ];
    for (table, key, good, bad) in cases {
        for value in good {
            let text = format!("{table}\n{key} = {value}");
            assert!(
                Config::from_toml(&text).is_ok(),
                "{text}: {:?}",
                Config::from_toml(&text)
            );
        }
        for value in bad {
            let problem = only_problem(&format!("{table}\n{key} = {value}"));
            assert!(problem.contains(&format!(".{key} is ")), "{problem}");
            assert!(problem.contains("; accepted: "), "{problem}");
        }
    }
}

#[test]
fn tcp_needs_loopback_and_a_namespace_that_exists() {
    let remote = "[server]\ntcp = \"10.0.0.1:1\"\ntcp_namespace = \"default\"";
    assert!(problems(remote)[0].contains("server.tcp is \"10.0.0.1:1\"; accepted: a loopback"));
    let without = only_problem("[server]\ntcp = \"127.0.0.1:1\"");
    assert!(without.contains("server.tcp_namespace is not set, but server.tcp is 127.0.0.1:1"));
    let unknown = only_problem("[server]\ntcp = \"127.0.0.1:1\"\ntcp_namespace = \"x\"");
    assert!(
        unknown.contains("accepted: \"default\", the only namespace"),
        "{unknown}"
    );
    let alone = only_problem("[server]\ntcp_namespace = \"default\"");
    assert!(alone.contains("but server.tcp is not set"), "{alone}");
    let good = "[server]\ntcp = \"[::1]:1\"\ntcp_namespace = \"default\"";
    assert!(Config::from_toml(good).is_ok());
}

#[test]
fn disk_needs_four_segments_and_a_line_with_two_brackets() {
    let disk = "[[disk]]\npath = \"/d\"\ncapacity = \"4 MiB\"\nsegment_size = \"1 MiB\"\n";
    assert!(Config::from_toml(disk).is_ok());
    let small = only_problem(&disk.replace("\"4 MiB\"", "4194303"));
    assert!(
        small.contains("accepted: 4 MiB or more: 4 segments"),
        "{small}"
    );
    let single = only_problem("[disk]\npath = \"/d\"");
    assert!(
        single.contains("accepted: settings below a line [[disk]]"),
        "{single}"
    );
}

#[test]
fn disks_lie_in_directories_of_their_own_and_share_a_level() {
    let disk = |path: &str, level: &str| {
        format!("[[disk]]\npath = \"{path}\"\ncapacity = \"2 GiB\"\nlevel = \"{level}\"\n")
    };
    let raw = |path: &str| disk(path, "raw");
    let many = |count: usize| {
        (0..count)
            .map(|at| raw(&format!("/{at}")))
            .collect::<String>()
    };
    assert_eq!(Config::from_toml(&many(16)).unwrap().disks.len(), 16);
    let most = only_problem(&many(17));
    assert!(
        most.contains("disk is 17 tables; accepted: at most 16"),
        "{most}"
    );
    let twice = only_problem(&format!("{}{}", raw("/d"), raw("/d/")));
    assert!(
        twice.contains("more than once; accepted: each directory once"),
        "{twice}"
    );
    let levels = only_problem(&format!("{}{}", raw("/d"), disk("/e", "zstd")));
    assert!(
        levels.contains("accepted: the same in every [[disk]]"),
        "{levels}"
    );
}

#[test]
fn one_of_several_disks_is_set_by_its_number() {
    let sets = [
        "disk.0.path=/a",
        "disk.1.path=/b",
        "disk.capacity=2 GiB",
        "disk.1.capacity=4 GiB",
    ];
    let config = Config::load(&set(&sets), env(&[])).unwrap();
    let disks: Vec<_> = config
        .disks
        .iter()
        .map(|disk| (disk.path.as_path(), disk.capacity))
        .collect();
    let want = [
        (Path::new("/a"), Bytes::gib(2)),
        (Path::new("/b"), Bytes::gib(4)),
    ];
    assert_eq!(disks, want);
    // What is said of every disk holds for those that come later, and one of them may differ.
    let sets = ["disk.0.path=/a", "disk.1.path=/b", "disk.1.lane=pread"];
    let mut args = set(&sets);
    args.disk_capacity = Some("8 GiB".into());
    let variables = [
        ("KVTIER_DISK_QUEUE_DEPTH", "7"),
        ("KVTIER_DISK_LANE", "io_uring"),
    ];
    let config = Config::load(&args, env(&variables)).unwrap();
    for (disk, lane) in config.disks.iter().zip([Lane::IoUring, Lane::Pread]) {
        assert_eq!(
            (disk.capacity, disk.queue_depth, disk.lane),
            (Bytes::gib(8), 7, lane)
        );
    }
    let gap = Config::load(&set(&["disk.1.path=/b"]), env(&[])).unwrap_err();
    assert!(gap.to_string().contains("disk.<number>.<setting>"), "{gap}");
}

#[test]
fn namespaces_share_no_name_no_user_and_no_memory() {
    let two = |a: &str, b: &str| format!("[[namespace]]\n{a}\n[[namespace]]\n{b}\n");
    let name = only_problem(&two("name = \"a\"\nuids = [1]", "name = \"a\"\nuids = [2]"));
    assert!(name.contains("\"a\" more than once"), "{name}");
    let uid = only_problem(&two("name = \"a\"\nuids = [1]", "name = \"b\"\nuids = [1]"));
    assert!(uid.contains("1 in \"a\" and in \"b\""), "{uid}");
    let quota = only_problem(&two(
        "name = \"a\"\nuids = [1]\nhost_quota = \"1 GiB\"",
        "name = \"b\"\nuids = [2]\nhost_quota = \"1 MiB\"",
    ));
    assert!(
        quota.contains("together at most host.capacity, which is 1 GiB"),
        "{quota}"
    );
    let rest = only_problem(&two(
        "name = \"a\"\nuids = [1]\nhost_quota = \"1 GiB\"",
        "name = \"b\"\nuids = [2]",
    ));
    assert!(
        rest.contains("0 B for each namespace without one"),
        "{rest}"
    );
    let nobody = only_problem("[[namespace]]\nname = \"a\"");
    assert!(nobody.contains("nobody could use it"), "{nobody}");
    let named = only_problem("[[namespace]]\nname = \"Team A\"\nuids = [1]");
    assert!(
        named.contains("namespace.name is \"Team A\"; accepted: 1 to 64"),
        "{named}"
    );
}

#[test]
fn sockets_fit_what_the_kernel_takes() {
    let path = |len: usize| format!("/{}", "s".repeat(len - 1));
    assert!(Config::from_toml(&format!("[server]\nsocket = {:?}", path(104))).is_ok());
    let derived = only_problem(&format!("[server]\nsocket = {:?}", path(105)));
    assert!(derived.contains("at most 104 bytes"), "{derived}");
    let long = only_problem(&format!("[server]\nsocket = {:?}", path(108)));
    assert!(
        long.contains("accepted: a path of 1 to 107 bytes"),
        "{long}"
    );
    let same = only_problem("[server]\nsocket = \"/a\"\ndescriptor_socket = \"/a\"");
    assert!(same.contains("a path other than server.socket"), "{same}");
}

// Goal: what a running daemon prints can be used as its file.
#[test]
fn effective_configuration_reads_back_as_itself() {
    let disk = "[[disk]]\npath = \"/d\"\ncapacity = \"4 GiB\"\nlane = \"io_uring\"\n";
    let config = Config::from_toml(disk).unwrap();
    assert_eq!(
        Config::from_toml(&config.to_toml()),
        Ok(config.clone()),
        "{}",
        config.to_toml()
    );
}
