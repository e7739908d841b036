//! Bodies of the fuzz targets: what clients and operators may send, write and configure.
//!
//! Upstairs:   `fuzz/` and `tests/tests/corpus.rs`, see `kvtier_proto::fuzzing`.
//! Downstairs: `server` with everything below it, `region`, `server::descriptors`, `tenant`,
//!             `config`.
//!
//! `requests` sends bytes through the real service, `slots` names staging slots, `settings` reads
//! configurations and the daemon's own file.

mod requests;
mod settings;
mod slots;

use kvtier_proto::fuzzing::Target;

/// Targets of this package.
pub const TARGETS: [Target; 7] = [
    Target::new("requests", requests::run, requests::seeds).allocating(32 << 20),
    Target::new("slot_names", slots::run, slots::seeds).allocating(1 << 20),
    Target::new("tickets", slots::tickets, slots::ticket_seeds),
    Target::new("config_file", settings::file, settings::file_seeds).allocating(8 << 20),
    Target::new("config_layers", settings::layers, settings::layer_seeds).allocating(8 << 20),
    Target::new(
        "namespaces_file",
        settings::namespaces,
        settings::namespace_seeds,
    ),
    Target::new("disks_file", settings::disks, settings::disk_seeds),
];
