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
/// Numbers are names, not an order: which rung is exact, and how large its error is, the codec
/// registry in `kvtier-kernels` declares. 1 to 7 belong to the ladder's own coders, 8 to the
/// general-purpose baseline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(pub u8);

impl Level {
    /// As the engine stores it.
    pub const RAW: Level = Level(0);
    /// Bit-exact: exponents of 16-bit floats entropy-coded, their other bits as they are.
    pub const LOSSLESS: Level = Level(1);
    /// Lossy, below the noise of an engine's own arithmetic. Needs tables of the model, as the
    /// five after it do.
    pub const TRANSPARENT: Level = Level(2);
    /// Lossy: mean KL divergence of the continuation about 1e-3.
    pub const BALANCED: Level = Level(3);
    /// Lossy: mean KL divergence of the continuation about 1e-2.
    pub const SMALL: Level = Level(4);
    /// As [`Level::TRANSPARENT`], predicted from the layers before.
    pub const TRANSPARENT_X: Level = Level(5);
    /// As [`Level::BALANCED`], predicted from the layers before.
    pub const BALANCED_X: Level = Level(6);
    /// As [`Level::SMALL`], predicted from the layers before.
    pub const SMALL_X: Level = Level(7);
    /// Bit-exact: byte planes, each compressed with `zstd`.
    pub const ZSTD: Level = Level(8);
    /// Bit-exact: signs and exponents entropy-coded by classes of channels.
    pub const LOSSLESS_C: Level = Level(9);
    /// Bit-exact: predicted from the layer before.
    pub const LOSSLESS_X: Level = Level(10);
    /// 8-bit floats, e4m3.
    pub const FP8: Level = Level(32);
    /// 8 bits a value by groups of a token.
    pub const INT8: Level = Level(33);
    /// 4 bits a value by groups of a token.
    pub const INT4: Level = Level(34);
    /// 4 bits a value, K by channel.
    pub const KIVI4: Level = Level(35);
    /// 2 bits a value, K by channel.
    pub const KIVI2: Level = Level(36);
    /// 4 bits a value of heads that a Hadamard matrix rotated.
    pub const HADAMARD4: Level = Level(37);
    /// CacheGen as its code is published: absmax of a token, bins by layer, tables in each part.
    pub const CACHEGEN: Level = Level(38);
    /// CacheGen as its paper has it: anchors, differences to them, bins by layer.
    pub const CACHEGEN_PAPER: Level = Level(39);
}

impl Level {
    /// How good what was stored at this level is.
    ///
    /// A class between exact and any is a promise that calibration has measured on the model, so
    /// that only the ladder's own levels have one. Nobody has measured the levels of others on
    /// this model, and of an unknown level nothing is known.
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
        match self {
            Self::RAW | Self::LOSSLESS | Self::ZSTD | Self::LOSSLESS_C | Self::LOSSLESS_X => {
                Quality::Exact
            }
            Self::TRANSPARENT | Self::TRANSPARENT_X => Quality::Transparent,
            Self::BALANCED | Self::BALANCED_X => Quality::Balanced,
            Self::SMALL | Self::SMALL_X => Quality::Small,
            _ => Quality::Any,
        }
    }
}

/// How good the bytes of a block are, best first: what is stored at one quality serves whoever
/// accepts this or a greater one.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, EnumIter, IntoStaticStr,
)]
#[strum(serialize_all = "snake_case")]
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
    /// True when what is stored at `level` is good enough for whoever accepts this.
    ///
    /// ```
    /// use kvtier_proto::{Level, Quality};
    ///
    /// assert!(Quality::Balanced.accepts(Level::TRANSPARENT));
    /// assert!(!Quality::Balanced.accepts(Level::SMALL));
    /// ```
    pub const fn accepts(self, level: Level) -> bool {
        level.quality() as u8 <= self as u8
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
