//! Files of tables: found, read and checked when the daemon starts.
//!
//! Upstairs:   `process`, once.
//! Downstairs: `kvtier_kernels::profile` reads a file and checks it.
//!
//! A file is the profile of one model: its name there is the one of descriptors. Which models it
//! fits is decided when a session says what its model is; one that fits none is no mistake.
//!
//! Not here on purpose: no reload, and no search beyond one directory.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvtier_kernels::codec::ladder::Ladder;
use kvtier_kernels::profile::{self, FILE_BYTES_MAX, Profile};
use kvtier_proto::{LayerSpec, ModelDescriptor, descriptor};

use super::codecs::Tables;

/// Ending of files that a directory is searched for.
const ENDING: &str = "kvtables";

/// Reads all files.
///
/// # Errors
/// Names the first file that cannot be used, and what is wrong with it.
pub fn load(paths: &[PathBuf]) -> Result<Vec<Tables>, String> {
    let mut all: Vec<Tables> = Vec::new();
    for path in files(paths)? {
        let say = |problem: String| format!("codec.tables: {}: {problem}", path.display());
        let bytes = read(&path).map_err(|problem| say(format!("cannot be read: {problem}")))?;
        let tables = tables(&path, &bytes).map_err(say)?;
        if let Some(other) = all.iter().find(|other| other.id == tables.id) {
            return Err(say(format!("is the same as {}", other.path.display())));
        }
        tracing::info!(?tables, "tables loaded");
        all.push(tables);
    }
    Ok(all)
}

/// The files that are meant: directories give theirs, by name.
fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>, String> {
    let mut files = Vec::new();
    for path in paths {
        let say = |problem: std::io::Error| {
            format!(
                "codec.tables: {}: cannot be read: {problem}",
                path.display()
            )
        };
        if !std::fs::metadata(path).map_err(say)?.is_dir() {
            files.push(path.clone());
            continue;
        }
        let mut here = Vec::new();
        for entry in std::fs::read_dir(path).map_err(say)? {
            let file = entry.map_err(say)?.path();
            if file.extension().is_some_and(|ending| ending == ENDING) {
                here.push(file);
            }
        }
        here.sort();
        files.append(&mut here);
    }
    Ok(files)
}

/// The whole file, no more than the largest that is taken and a byte.
fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let most = u64::try_from(FILE_BYTES_MAX).unwrap_or(u64::MAX);
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path)?;
    file.take(most.saturating_add(1)).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn tables(path: &Path, bytes: &[u8]) -> Result<Tables, String> {
    let profile = Profile::from_bytes(bytes).map_err(|problem| crate::log::chain(&problem))?;
    let profile = Arc::new(profile);
    let codecs = Ladder::all(Arc::clone(&profile));
    let codecs = codecs.map_err(|problem| crate::log::chain(&problem))?;
    let id = codecs.first().map(|codec| codec.tables());
    Ok(Tables {
        id: id.ok_or("has tables of no level")?,
        model: profile.model.clone(),
        path: path.to_owned(),
        codecs,
        fits: Arc::new(move |model| fits(&profile, model)),
    })
}

/// True for the model that the tables are of: its name, revision and weights are theirs, and it
/// hands K over turned as they expect it. Of any other nobody has measured what they lose. What
/// either side does not say is taken to fit. Layers that are not as they say are left to other
/// levels. A stage of a pipeline counts its layers from 0, so that nobody knows which they are.
fn fits(profile: &Profile, model: &ModelDescriptor) -> bool {
    let (own, weights) = (&profile.weights_fingerprint, &model.weights_fingerprint);
    let weights = own.is_empty() || weights.is_empty() || own == weights;
    let (own, revision) = (&profile.revision, &model.revision);
    let revision = own.is_empty() || revision.is_empty() || own == revision;
    let parts = profile.parts.iter().all(|part| {
        let layer = usize::try_from(part.layer).ok();
        let layer = layer.and_then(|layer| model.layers.get(layer));
        matches!(layer, Some(LayerSpec::Attention { kv_heads, .. }) if *kv_heads == part.heads)
    });
    profile.model == model.model
        && profile.element == model.element
        && model.shard.pp_size == 1
        && weights
        && revision
        && parts
        && hands_k_over_alike(profile, model)
}

/// True when K comes as the tables expect it. Where nothing turns, before and after RoPE is the
/// same: of a model without it, tables say that K is not turned, and an engine that K is what it
/// is after turning.
fn hands_k_over_alike(profile: &Profile, model: &ModelDescriptor) -> bool {
    let after = profile.k_after_rope == model.k_after_rope;
    match (&profile.rope, &model.rope) {
        (None, None) => true,
        (Some(own), Some(model)) => after && turns_alike(own, model),
        // One side does not say.
        _ => after,
    }
}

/// True when both turn the same channels by the same angles, as far as the descriptor's words for
/// scaled angles let anybody know.
fn turns_alike(own: &profile::Rope, model: &descriptor::Rope) -> bool {
    let plain = profile::Rope::plain(model.theta, model.rotary_dim, model.rotate_half);
    let near = |(one, other): (&f64, &f64)| (one - other).abs() <= 1e-6 * other.abs();
    let mut angles = own.frequencies.iter().zip(&plain.frequencies);
    own.rotate_half == plain.rotate_half
        && own.frequencies.len() == plain.frequencies.len()
        && (!model.scaling.is_empty() || angles.all(near))
}

#[cfg(test)]
pub(super) mod tests;
