//! `_kvtier`: the Rust SDK of kvtier for Python, as an extension module of the package `kvtier`.
//!
//! Upstairs:   `python/kvtier`, which re-exports everything; engines and their connectors.
//! Downstairs: `kvtier-client`, over one tokio runtime a process.
//!
//! ```text
//!   client -> session -> saving, slot      (fill and commit; or out of the engine's pages)
//!                     -> restoring, restore, block   (into the engine's pages; or in place)
//!                     -> pending, events, keys, values
//!   pages, memory     the engine's arrays, and our bytes shown to Python
//!   runtime, errors   waits without the interpreter; exceptions
//! ```
//!
//! `kvtier/_kvtier.pyi` is the interface, with what each call promises; a test compares it with
//! what is here. Everything is decided and copied here or below, with the interpreter free.
//!
//! Invariants kept here and below: W (waits, forks) in `runtime`, A (memory) in `memory`, H in
//! `pages`, Q in `saving`, J in `restoring`, N in `keys`, O in `restore`.
//!
//! Not here on purpose
//!   No asyncio: engines call from threads, and poll.
//!   No interpreter before 3.11: the stable ABI has no buffers before.

use pyo3::prelude::*;

mod client;
mod errors;
mod events;
mod keys;
mod memory;
mod model;
mod pages;
mod pending;
mod restore;
mod restoring;
mod runtime;
mod save;
mod saving;
mod session;
mod slot;
mod values;
mod words;

/// Types of the extension module: the Rust SDK of kvtier for Python.
#[pymodule]
fn _kvtier(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("ROOT", keys::bytes(py, &kvtier_client::BlockKey::ROOT))?;
    errors::register(module)?;
    module.add_function(wrap_pyfunction!(client::connect, module)?)?;
    module.add_class::<memory::block::LeasedBlock>()?;
    module.add_class::<client::Client>()?;
    module.add_class::<events::BlockEvent>()?;
    module.add_class::<events::Events>()?;
    module.add_class::<memory::array::Memory>()?;
    module.add_class::<memory::view::View>()?;
    module.add_class::<model::BlockLayout>()?;
    module.add_class::<model::LayerSpec>()?;
    module.add_class::<model::ModelDescriptor>()?;
    module.add_class::<model::Part>()?;
    module.add_class::<model::ReaderSpec>()?;
    module.add_class::<model::Rope>()?;
    module.add_class::<model::Shard>()?;
    module.add_class::<pages::PagedCache>()?;
    module.add_class::<pending::Pending>()?;
    module.add_class::<restore::ComputeEnd>()?;
    module.add_class::<restore::Restore>()?;
    module.add_class::<restore::RestorePlan>()?;
    module.add_class::<restore::RestoreSummary>()?;
    module.add_class::<restoring::Restoring>()?;
    module.add_class::<save::SaveBlock>()?;
    module.add_class::<save::SaveOutcome>()?;
    module.add_class::<saving::Saving>()?;
    module.add_class::<session::Session>()?;
    module.add_class::<slot::Filling>()?;
    module.add_class::<slot::Slot>()?;
    module.add_class::<values::BlockStatus>()?;
    module.add_class::<values::Explanation>()?;
    module.add_class::<values::Lookup>()?;
    module.add_class::<values::Prefetched>()?;
    module.add_class::<values::Variant>()?;
    Ok(())
}
