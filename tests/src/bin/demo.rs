//! `cargo demo`: the README's first command. Everything it does lives in `kvtier_tests::demo`.

fn main() -> std::process::ExitCode {
    kvtier_tests::demo::main()
}
