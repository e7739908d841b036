//! Which codecs there are for the blocks of a model: those without tables, and those whose tables
//! are of that model.
//!
//! Upstairs:   `save`, `load` and `recode` ask by layout; `explain` and `status` show them.
//! Downstairs: `kvtier_kernels`.
//!
//! Invariants kept here
//!   K5  One level and one set of tables, one codec.
//!
//! Not here on purpose: no reload. A file of tables that comes later is there after a restart.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use kvtier_kernels::{Codec, Registry};
use kvtier_proto::{LayoutFingerprint, Level, ModelDescriptor};
use kvtier_store::Stored;

use super::policy::Cold;
use crate::block::Layouts;

/// Models that are remembered beyond their sessions, so that their cold blocks can be re-encoded.
/// One more takes the place of whichever was used least recently.
const MODELS_KEPT: usize = 64;

/// Tables of one model, from one file.
#[derive(Clone)]
pub struct Tables {
    /// Identity: what records name.
    pub id: u32,
    /// The model, as people know it.
    pub model: String,
    /// The file.
    pub path: PathBuf,
    /// Codecs that code with them.
    pub codecs: Vec<Arc<dyn Codec>>,
    /// True for models that they are of.
    pub fits: Arc<dyn Fn(&ModelDescriptor) -> bool + Send + Sync>,
}

impl std::fmt::Debug for Tables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            id, model, path, ..
        } = self;
        write!(f, "tables {id:08x} of {model:?} from {}", path.display())
    }
}

/// How blocks are coded.
#[derive(Debug, Clone)]
pub struct Coding {
    /// Level of what is saved.
    pub level: Level,
    /// What becomes of cold blocks, if anything.
    pub cold: Option<Cold>,
    /// Tables that were loaded.
    pub tables: Vec<Tables>,
}

impl From<Level> for Coding {
    fn from(level: Level) -> Self {
        Self {
            level,
            cold: None,
            tables: Vec::new(),
        }
    }
}

/// A model that blocks were asked for.
#[derive(Debug, Clone)]
pub struct Known {
    /// Layouts of its blocks.
    pub layouts: Arc<Layouts>,
    /// What codes them.
    pub codecs: Arc<Registry>,
    used: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Codecs {
    /// For blocks of a model that is not known.
    plain: Arc<Registry>,
    tables: Vec<Tables>,
    known: Mutex<(u64, HashMap<LayoutFingerprint, Known>)>,
}

impl Codecs {
    /// The codecs of this build, and those of `tables`.
    pub fn new(tables: Vec<Tables>) -> Self {
        Self {
            plain: Arc::new(Registry::with_baselines()),
            tables,
            known: Mutex::default(),
        }
    }

    /// Tables that are loaded.
    pub fn tables(&self) -> &[Tables] {
        &self.tables
    }

    /// The name of a level; `None` when no codec of this daemon has it.
    pub fn name(&self, level: Level) -> Option<&'static str> {
        let plain = self.plain.iter();
        let all = plain.chain(
            self.tables
                .iter()
                .flat_map(|one| one.codecs.iter().map(AsRef::as_ref)),
        );
        all.into_iter()
            .find(|one| one.level() == level)
            .map(Codec::name)
    }

    /// The codecs for blocks of a model, which is remembered.
    pub fn of(&self, layouts: &Arc<Layouts>) -> Arc<Registry> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (clock, models) = &mut *known;
        *clock += 1;
        let fingerprint = layouts.fingerprint();
        if !models.contains_key(&fingerprint) && models.len() >= MODELS_KEPT {
            let oldest = models.iter().min_by_key(|(_, one)| one.used);
            if let Some(oldest) = oldest.map(|(name, _)| *name) {
                models.remove(&oldest);
            }
        }
        let one = models.entry(fingerprint).or_insert_with(|| Known {
            layouts: Arc::clone(layouts),
            codecs: self.made_for(layouts.model()),
            used: 0,
        });
        one.used = *clock;
        Arc::clone(&one.codecs)
    }

    /// A model that is remembered, and what codes its blocks.
    pub fn known(&self, is: impl Fn(&LayoutFingerprint) -> bool) -> Option<Known> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut models = known.1.iter();
        models
            .find(|(name, _)| is(name))
            .map(|(_, one)| one.clone())
    }

    /// True when a stored record may be decoded: there are tables for its level, and where they are
    /// named, those. Of a model that is not remembered, all that are loaded count.
    pub fn decodes(&self, stored: &Stored, tables: Option<u32>) -> bool {
        let level = stored.level;
        match self.known(|layout| stored.has_layout(layout)) {
            Some(known) => match tables {
                Some(tables) => known.codecs.decoder(level, tables).is_ok(),
                None => known.codecs.get(level).is_ok(),
            },
            None => self.tables.iter().any(|one| {
                let named = tables.is_none_or(|tables| tables == one.id);
                named && one.codecs.iter().any(|codec| codec.level() == level)
            }),
        }
    }

    /// The codecs for blocks of this layout: of a model that is not remembered, those without
    /// tables.
    pub fn of_layout(&self, layout: &LayoutFingerprint) -> Arc<Registry> {
        let known = self.known(|name| name == layout);
        known.map_or_else(|| Arc::clone(&self.plain), |known| known.codecs)
    }

    fn made_for(&self, model: &ModelDescriptor) -> Arc<Registry> {
        let mut registry = Registry::clone(&self.plain);
        for tables in self.tables.iter().filter(|one| (one.fits)(model)) {
            for codec in &tables.codecs {
                if let Err(taken) = registry.add(Arc::clone(codec)) {
                    tracing::warn!(?tables, %taken, "a codec with tables is not used");
                }
            }
        }
        Arc::new(registry)
    }
}

#[cfg(test)]
mod tests {
    use kvtier_proto::Quality;

    use super::*;

    // Goal: what the wire and the policy say of a level is what its codec does.
    #[test]
    fn quality_of_every_level_is_exact_where_its_codec_is() {
        let codecs = Codecs::new(Vec::new());
        for codec in codecs.plain.iter() {
            let exact = codec.level().quality() == Quality::Exact;
            assert_eq!(exact, codec.exact(), "{}", codec.name());
            assert_eq!(codecs.name(codec.level()), Some(codec.name()));
        }
        assert_eq!(codecs.name(Level(200)), None);
    }
}
