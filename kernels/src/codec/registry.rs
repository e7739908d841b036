//! The registry: which levels this build can code and decode.
//!
//! Upstairs:   the daemon asks for a level by the number of a record or a request.
//! Downstairs: the codecs.
//!
//! Invariants kept here
//!   K5  One level and one set of tables, one codec. Adding a second is refused.
//!
//! Not here on purpose: no global. Levels with tables are added for a model at run time, so a
//! registry is a value that its owner passes on.

use std::fmt;
use std::sync::Arc;

use kvtier_proto::Level;

use super::Codec;
use super::byte_planes::BytePlanes;
use super::cachegen::CacheGen;
use super::cachegen_paper::CacheGenPaper;
use super::fp8::Fp8;
use super::lossless::Lossless;
use super::lossless_c::LosslessC;
use super::quant::Quantiser;
use super::raw::Raw;

/// The codecs of this build, by level. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Registry {
    /// Sorted by level; of one level, those that were added last come last.
    codecs: Vec<Arc<dyn Codec>>,
}

/// A level that no codec of this build serves.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("codec level {level} is not available; available: {available}")]
pub struct UnknownLevel {
    level: Level,
    available: Levels,
}

/// Why nothing decodes a part of a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoDecoder {
    /// No codec of this build serves the level.
    #[error(transparent)]
    Level(UnknownLevel),
    /// The level is there, the tables that the part was coded with are not.
    #[error("codec level {level} needs tables {tables:08x}, which are not loaded")]
    Tables {
        /// The level.
        level: Level,
        /// What the record names.
        tables: u32,
    },
}

/// A codec for a level that has one with these tables already.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("codec level {level} is taken by {by}")]
pub struct LevelTaken {
    level: Level,
    by: &'static str,
}

/// Levels as error texts list them: `0 (raw), 8 (zstd)`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Levels(Vec<(Level, &'static str)>);

impl fmt::Display for Levels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (level, name)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{level} ({name})")?;
        }
        Ok(())
    }
}

impl Registry {
    /// Levels that need no tables of a model: raw, lossless, zstd and lossless_c.
    pub fn builtin() -> Self {
        Self {
            codecs: vec![
                Arc::new(Raw),
                Arc::new(Lossless::new()),
                Arc::new(BytePlanes::new()),
                Arc::new(LosslessC::new()),
            ],
        }
    }

    /// The builtin levels and those of others that need no tables, to compare with: int8, int4,
    /// KIVI, Hadamard, fp8 and CacheGen. All of these lose something.
    pub fn with_baselines() -> Self {
        let mut all = Self::builtin();
        all.codecs.push(Arc::new(Fp8));
        all.codecs.push(Arc::new(CacheGen));
        all.codecs.push(Arc::new(CacheGenPaper));
        for one in Quantiser::all() {
            all.codecs.push(Arc::new(one));
        }
        all.codecs.sort_by_key(|codec| codec.level());
        all
    }

    /// The codec that encodes at a level: of several with tables, the one added last.
    ///
    /// ```
    /// use kvtier_kernels::Registry;
    /// use kvtier_proto::Level;
    ///
    /// let codecs = Registry::builtin();
    /// assert_eq!(codecs.get(Level::ZSTD)?.name(), "zstd");
    /// assert_eq!(
    ///     codecs.get(Level(3)).unwrap_err().to_string(),
    ///     "codec level 3 is not available; \
    ///      available: 0 (raw), 1 (lossless), 8 (zstd), 9 (lossless_c)"
    /// );
    /// # Ok::<(), kvtier_kernels::codec::registry::UnknownLevel>(())
    /// ```
    ///
    /// # Errors
    /// [`UnknownLevel`] lists the levels there are.
    pub fn get(&self, level: Level) -> Result<&dyn Codec, UnknownLevel> {
        let found = self.codecs.iter().rfind(|codec| codec.level() == level);
        found.map(AsRef::as_ref).ok_or_else(|| UnknownLevel {
            level,
            available: self.levels(),
        })
    }

    /// The codec that decodes what was encoded at a level with these tables.
    ///
    /// # Errors
    /// [`NoDecoder`] tells a level that is not known from tables that are not loaded.
    pub fn decoder(&self, level: Level, tables: u32) -> Result<&dyn Codec, NoDecoder> {
        let found = self
            .codecs
            .iter()
            .find(|codec| codec.level() == level && codec.tables() == tables);
        match found {
            Some(codec) => Ok(codec.as_ref()),
            None => Err(match self.get(level) {
                Ok(_) => NoDecoder::Tables { level, tables },
                Err(unknown) => NoDecoder::Level(unknown),
            }),
        }
    }

    /// The codec of a name, as configuration files and the command line give it.
    ///
    /// # Errors
    /// The names there are, when it is none of them.
    pub fn by_name(&self, name: &str) -> Result<&dyn Codec, String> {
        let found = self.codecs.iter().rfind(|codec| codec.name() == name);
        found.map(AsRef::as_ref).ok_or_else(|| {
            let names: Vec<_> = self.iter().map(Codec::name).collect();
            format!("{name:?} is no codec level; accepted: {}", names.join(", "))
        })
    }

    /// Adds a codec (K5).
    ///
    /// # Errors
    /// [`LevelTaken`] names the codec that has the level.
    pub fn add(&mut self, codec: Arc<dyn Codec>) -> Result<(), LevelTaken> {
        let level = codec.level();
        if let Ok(taken) = self.decoder(level, codec.tables()) {
            return Err(LevelTaken {
                level,
                by: taken.name(),
            });
        }
        self.codecs.push(codec);
        self.codecs.sort_by_key(|codec| codec.level());
        Ok(())
    }

    /// All codecs, by rising level.
    pub fn iter(&self) -> impl Iterator<Item = &dyn Codec> {
        self.codecs.iter().map(AsRef::as_ref)
    }

    fn levels(&self) -> Levels {
        Levels(
            self.iter()
                .map(|codec| (codec.level(), codec.name()))
                .collect(),
        )
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self::builtin()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registry_names_what_is_available_when_asked_for_a_reserved_level() {
        let codecs = Registry::builtin();
        for level in (2..=7).chain([10, 255]) {
            let problem = codecs.get(Level(level)).unwrap_err().to_string();
            assert!(
                problem.contains("0 (raw), 1 (lossless), 8 (zstd), 9 (lossless_c)"),
                "{problem}"
            );
        }
        let problem = codecs.by_name("lz4").unwrap_err();
        assert_eq!(
            problem,
            "\"lz4\" is no codec level; accepted: raw, lossless, zstd, lossless_c"
        );
    }

    #[test]
    fn registry_refuses_a_second_codec_for_a_level() {
        let mut codecs = Registry::builtin();
        let problem = codecs.add(Arc::new(Raw)).unwrap_err();
        assert_eq!(problem.to_string(), "codec level 0 is taken by raw");
        assert_eq!(codecs.iter().count(), Registry::builtin().iter().count());
    }

    #[test]
    fn registry_finds_every_codec_by_level_and_by_name() {
        let codecs = Registry::builtin();
        for codec in codecs.iter() {
            assert_eq!(codecs.get(codec.level()).unwrap().name(), codec.name());
            assert_eq!(codecs.by_name(codec.name()).unwrap().level(), codec.level());
        }
    }

    #[test]
    fn levels_that_lose_something_are_not_builtin() {
        assert!(Registry::builtin().iter().all(Codec::exact));
        let all = Registry::with_baselines();
        assert_eq!(all.iter().filter(|codec| !codec.exact()).count(), 8);
        let levels: std::collections::BTreeSet<_> = all.iter().map(Codec::level).collect();
        assert_eq!(levels.len(), all.iter().count(), "K5");
    }
}
