//! `kvtier`: the operator's command line. Everything it does lives in `kvtierd::cli`.

fn main() -> std::process::ExitCode {
    kvtierd::cli::main()
}
