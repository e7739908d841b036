//! `kvtier-judge`: what codecs and restores do to a model. Everything it does lives in
//! `kvtier_tests::judge`.

fn main() -> std::process::ExitCode {
    kvtier_tests::judge::main()
}
