//! Words every package shares: miss reasons, payload kinds, codec levels and their quality.
//!
//! Upstairs:   store, tiers, sessions and the SDK all speak these reasons; metrics label by them.
//! Downstairs: nothing.

use strum::{EnumIter, IntoStaticStr};

/// Reason of a miss. The `snake_case` name is the metric label and the text of `explain`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, EnumIter, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Miss {
    /// Never saved in this namespace, or its name is unknown.
    Absent,
    /// Was here, made room for others.
    Evicted,
    /// The record belongs to an earlier life of its segment.
    StaleEpoch,
    /// The record says it lives elsewhere: a misdirected write or read.
    Misdirected,
    /// The record header fails its checksum, magic or bounds.
    HeaderCrc,
    /// A page fails its checksum.
    PayloadCrc,
    /// The record is of another block or another namespace.
    WrongKey,
    /// The record was written for another layout.
    WrongLayout,
    /// The codec refused the stored bytes.
    Undecodable,
    /// The record's format version or codec level is not known to this daemon.
    Unsupported,
    /// Only lossy variants exist and the request wants a better level.
    Quality,
    /// The device did not deliver: I/O error, short read or device out of service.
    Device,
    /// No room to restore into: host arena or quota exhausted by leased blocks.
    NoSpace,
    /// It did not come in time: the request's deadline passed first, or a device hangs.
    Deadline,
    /// The tables that it was coded with are not loaded.
    NoTables,
    /// The engine's region did not take it: of another size than its slots, or the file is gone.
    Region,
}

impl Miss {
    /// Name as metrics and tables show it.
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// True when the reason speaks of damage that deserves a human, not of ordinary cache life.
    pub const fn is_damage(self) -> bool {
        matches!(
            self,
            Miss::Misdirected
                | Miss::HeaderCrc
                | Miss::PayloadCrc
                | Miss::WrongKey
                | Miss::WrongLayout
                | Miss::Undecodable
                | Miss::Device
        )
    }
}

/// What a block's bytes are. The number is the one in records and on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, EnumIter, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
#[repr(u8)]
pub enum PayloadKind {
    /// Attention keys and values.
    Kv = 1,
    /// MLA latent and rope parts.
    Latent = 2,
    /// Input of every decoder layer (HCache).
    Hidden = 3,
    /// Recurrent state snapshots.
    State = 4,
    /// Bytes only the engine understands.
    Opaque = 5,
}

impl PayloadKind {
    /// Reads the number of a record or a message.
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Kv,
            2 => Self::Latent,
            3 => Self::Hidden,
            4 => Self::State,
            5 => Self::Opaque,
            _ => return None,
        })
    }

    /// Name as tables show it.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// A rung of the codec ladder: the number that records and messages carry.
///
/// Numbers are names, not an order. 1 to 7, 9 and 10 belong to the ladder's own coders, 8 to the
/// general-purpose baseline, those from 32 on are others' levels, to compare with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(pub u8);

/// Declares the levels: for each a constant, its number, its name, its quality, and whether it
/// codes with tables of a model. Whatever lists levels (settings, metrics, codecs) lists these.
macro_rules! levels {
    ($(
        $(#[doc = $doc:literal])+
        $constant:ident = $number:literal, $name:literal, $quality:ident, tables: $tables:literal;
    )+) => {
        impl Level {
            $($(#[doc = $doc])+ pub const $constant: Level = Level($number);)+

            /// Every level that there is, in the order of documents.
            pub const ALL: &'static [Level] = &[$(Self::$constant),+];

            /// Name in tables, logs, settings and metrics; `None` for the number of no level.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($number => Some($name),)+
                    _ => None,
                }
            }

            /// How good what was stored at this level is.
            ///
            /// A class between exact and any is a promise that calibration has measured on the
            /// model, so that only the ladder's own levels have one. Nobody has measured the levels
            /// of others on this model, and of an unknown level nothing is known.
            ///
            /// ```
            /// use kvtier_proto::{Level, Quality};
            ///
            /// assert_eq!(Level::LOSSLESS.quality(), Quality::Exact);
            /// assert_eq!(Level::BALANCED_X.quality(), Quality::Balanced);
            /// assert_eq!(Level::INT8.quality(), Quality::Any);
            /// assert_eq!(Level(255).quality(), Quality::Any);
            /// ```
            pub const fn quality(self) -> Quality {
                match self.0 {
                    $($number => Quality::$quality,)+
                    _ => Quality::Any,
                }
            }

            /// True when only a daemon that has loaded tables of the model can code it.
            pub const fn needs_tables(self) -> bool {
                match self.0 {
                    $($number => $tables,)+
                    _ => false,
                }
            }
        }
    };
}

levels! {
    /// As the engine stores it.
    RAW = 0, "raw", Exact, tables: false;
    /// Bit-exact: exponents of 16-bit floats entropy-coded, their other bits as they are.
    LOSSLESS = 1, "lossless", Exact, tables: false;
    /// Bit-exact: signs and exponents entropy-coded by classes of channels.
    LOSSLESS_C = 9, "lossless_c", Exact, tables: false;
    /// Bit-exact: predicted from the layer before.
    LOSSLESS_X = 10, "lossless_x", Exact, tables: true;
    /// Bit-exact: byte planes, each compressed with `zstd`.
    ZSTD = 8, "zstd", Exact, tables: false;
    /// Lossy, below the noise of an engine's own arithmetic.
    TRANSPARENT = 2, "transparent", Transparent, tables: true;
    /// Lossy: mean KL divergence of the continuation about 1e-3.
    BALANCED = 3, "balanced", Balanced, tables: true;
    /// Lossy: mean KL divergence of the continuation about 1e-2.
    SMALL = 4, "small", Small, tables: true;
    /// As [`Level::TRANSPARENT`], predicted from the layers before.
    TRANSPARENT_X = 5, "transparent_x", Transparent, tables: true;
    /// As [`Level::BALANCED`], predicted from the layers before.
    BALANCED_X = 6, "balanced_x", Balanced, tables: true;
    /// As [`Level::SMALL`], predicted from the layers before.
    SMALL_X = 7, "small_x", Small, tables: true;
    /// 8-bit floats, e4m3.
    FP8 = 32, "fp8", Any, tables: false;
    /// 8 bits a value by groups of a token.
    INT8 = 33, "int8", Any, tables: false;
    /// 4 bits a value by groups of a token.
    INT4 = 34, "int4", Any, tables: false;
    /// 4 bits a value, K by channel.
    KIVI4 = 35, "kivi4", Any, tables: false;
    /// 2 bits a value, K by channel.
    KIVI2 = 36, "kivi2", Any, tables: false;
    /// 4 bits a value of heads that a Hadamard matrix rotated.
    HADAMARD4 = 37, "hadamard4", Any, tables: false;
    /// CacheGen as its code is published: absmax of a token, bins by layer, tables in each part.
    CACHEGEN = 38, "cachegen", Any, tables: false;
    /// CacheGen as its paper has it: anchors, differences to them, bins by layer.
    CACHEGEN_PAPER = 39, "cachegen_paper", Any, tables: false;
}

impl Level {
    /// The level of a name.
    ///
    /// ```
    /// use kvtier_proto::Level;
    ///
    /// assert_eq!(Level::from_name("balanced_x"), Some(Level::BALANCED_X));
    /// assert_eq!(Level::from_name("best"), None);
    /// ```
    pub fn from_name(name: &str) -> Option<Self> {
        let mut all = Self::ALL.iter().copied();
        all.find(|level| level.name() == Some(name))
    }
}

/// How good the bytes of a block are, best first: what is stored at one quality serves whoever
/// accepts this or a greater one. The number is the one in records and on the wire.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, EnumIter, IntoStaticStr,
)]
#[strum(serialize_all = "snake_case")]
#[repr(u8)]
pub enum Quality {
    /// Every bit is the one that was saved.
    #[default]
    Exact,
    /// Lossy, below the noise of an engine's own arithmetic, as measured on the model.
    Transparent,
    /// Mean KL divergence of the continuation about 1e-3, as measured on the model.
    Balanced,
    /// Mean KL divergence of the continuation about 1e-2, as measured on the model.
    Small,
    /// Lossy in a way that nobody has measured on the model.
    Any,
}

impl Quality {
    /// True when what is of this other quality is good enough for whoever accepts this one.
    ///
    /// ```
    /// use kvtier_proto::Quality;
    ///
    /// assert!(Quality::Balanced.accepts(Quality::Transparent));
    /// assert!(!Quality::Balanced.accepts(Quality::Small));
    /// ```
    pub const fn accepts(self, other: Quality) -> bool {
        other as u8 <= self as u8
    }

    /// Reads the number of a record.
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::Exact,
            1 => Self::Transparent,
            2 => Self::Balanced,
            3 => Self::Small,
            4 => Self::Any,
            _ => return None,
        })
    }

    /// Name as configuration files, tables and the command line show it.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    // Goal: a level is one number and one name, so that whatever lists levels can look them up.
    #[test]
    fn levels_have_a_number_and_a_name_of_their_own() {
        let numbers: BTreeSet<_> = Level::ALL.iter().collect();
        let names: BTreeSet<_> = Level::ALL.iter().filter_map(|one| one.name()).collect();
        assert_eq!(numbers.len(), Level::ALL.len());
        assert_eq!(names.len(), Level::ALL.len());
        for level in Level::ALL {
            assert_eq!(level.name().and_then(Level::from_name), Some(*level));
        }
    }

    #[test]
    fn a_quality_that_calibration_promises_needs_tables() {
        for level in (0..=u8::MAX).map(Level) {
            let promised = !matches!(level.quality(), Quality::Exact | Quality::Any);
            assert!(!promised || level.needs_tables(), "{level}");
            assert!(level.name().is_some() || level.quality() == Quality::Any);
        }
    }
}
