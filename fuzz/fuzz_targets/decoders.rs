//! Every fuzz target, under libFuzzer. Which one, the variable `KVTIER_FUZZ_TARGET` says.
//!
//! Upstairs:   `fuzz/run`.
//! Downstairs: the `fuzzing` module of every package.
#![no_main]

use std::sync::OnceLock;

use kvtier_proto::fuzzing::Target;

fn target() -> &'static Target {
    static TARGET: OnceLock<Target> = OnceLock::new();
    TARGET.get_or_init(|| {
        let all: [&[Target]; 5] = [
            &kvtier_proto::fuzzing::TARGETS,
            &kvtier_kernels::fuzzing::TARGETS,
            &kvtier_store::fuzzing::TARGETS,
            &kvtierd::fuzzing::TARGETS,
            &kvtier_client::fuzzing::TARGETS,
        ];
        let asked = std::env::var("KVTIER_FUZZ_TARGET").unwrap_or_default();
        let found = all.concat().into_iter().find(|one| one.name == asked);
        found.unwrap_or_else(|| {
            panic!("KVTIER_FUZZ_TARGET is {asked:?}; accepted: a folder of corpus/")
        })
    })
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| (target().run)(data));
