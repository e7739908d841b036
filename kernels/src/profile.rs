//! Profile of a model: the tables that the lossy levels of the ladder code with.
//!
//! Upstairs:   `kvtier calibrate` makes one from recorded KV; [`crate::codec::ladder`] codes with
//!             it; the daemon loads the files that its configuration names.
//! Downstairs: `file` is how it is stored, [`matrix`] how real numbers become integers,
//!             [`scales`] what a coefficient's scale index means.
//!
//! A part is one layer's K or V of a block: tokens of `heads x dim` channels. Its tables say how a
//! token's channels become coefficients that depend little on each other, and back:
//!
//! | step   | encoding                                       | decoding                          |
//! |--------|------------------------------------------------|-----------------------------------|
//! | rotary | K goes back to before RoPE                     | RoPE again                        |
//! | centre | minus the mean, or minus what the weights say  | plus the same                     |
//! | rotate | `forward * r`, real numbers                    | `inverse * q`, integers           |
//! | round  | `q = round(y / step)`                          | times `step`                      |
//!
//! A profile is plain data with public fields. Whatever takes one from outside calls
//! [`Profile::check`] first, [`Profile::from_bytes`] included.
//!
//! Invariants kept here
//!   P1  Tables that pass the check fit each other: lengths, layers, and what a prediction needs
//!       comes before what it predicts.
//!   P2  A row of integers sums to less than 2^24 in absolute values: times the 8-bit inputs of
//!       a prediction it cannot leave 32 bits.
//!   P3  Reading a file allocates no more than the file is long, and answers with an error that
//!       names the field and what is accepted.
//!
//! Not here on purpose: no statistics. Which matrices, steps and scales are good is calibration's.

use kvtier_proto::element::Element;
use kvtier_proto::layout::PartCode;

pub mod check;
pub mod exact;
mod file;
pub mod matrix;
pub mod scales;

pub use check::ProfileError;
pub use exact::ExactTables;
pub use matrix::Matrix16;
pub use scales::DEAD;

/// Levels that a transform serves: transparent, balanced and small, in this order.
pub const QUALITIES: usize = 3;
/// Most channels of a part with tables. Matrices grow with its square.
pub const CHANNELS_MAX: usize = 4096;
/// Most parts that one part is predicted from: K and V of two layers, and its own layer's K.
pub const NEEDS_MAX: usize = 5;
/// Most exact tokens at the front of a prefix. Unit: tokens.
pub const SINKS_MAX: u32 = 64;
/// Largest profile file. Unit: bytes.
pub const FILE_BYTES_MAX: usize = 1 << 32;

/// The tables of one model.
///
/// ```
/// use kvtier_kernels::profile::{
///     Input, LevelTables, Matrix16, PartTables, Plain, Profile, Rope, TokenPredictor, Transform,
///     scales,
/// };
/// use kvtier_proto::{element::Element, layout::PartCode};
///
/// // One layer whose K has one head of two channels that always differ by their sum alone.
/// let h = 0.5_f64.sqrt();
/// let transform = Transform {
///     forward: Matrix16::quantise(&[h, h, h, -h], 2, 2)?,
///     inverse: Matrix16::quantise(&[h, h, h, -h], 2, 2)?,
/// };
/// let balanced = LevelTables {
///     step: 0.1,
///     scales: vec![scales::nearest(10.0), scales::DEAD],
///     predictor: TokenPredictor::Mean,
/// };
/// let part = PartTables {
///     layer: 0,
///     code: PartCode::K,
///     heads: 1,
///     dim: 2,
///     input: None,
///     plain: Plain { mean: vec![0.5, 0.5], transform, levels: [None, Some(balanced), None] },
///     crosses: vec![],
/// };
/// let profile = Profile {
///     model: "tiny".to_owned(),
///     revision: String::new(),
///     weights_fingerprint: vec![],
///     element: Element::Bf16,
///     rope: Some(Rope::plain(10_000.0, 2, true)),
///     k_after_rope: true,
///     sinks: 4,
///     parts: vec![part],
///     measured: vec![],
///     exact: vec![],
/// };
/// let bytes = profile.to_bytes()?;
/// assert_eq!(Profile::from_bytes(&bytes)?, profile);
/// # Ok::<(), kvtier_kernels::profile::ProfileError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// Name of the model, as descriptors have it.
    pub model: String,
    /// Its revision.
    pub revision: String,
    /// Fingerprint of its weights, as descriptors have it; may be empty.
    pub weights_fingerprint: Vec<u8>,
    /// Element type of the KV that calibration saw.
    pub element: Element,
    /// How K is rotated; `None` where it is not.
    pub rope: Option<Rope>,
    /// K arrives after RoPE, and is coded before it.
    pub k_after_rope: bool,
    /// Tokens at the front of a prefix that are kept exactly. Unit: tokens.
    pub sinks: u32,
    /// Tables of the parts, by rising layer, K before V.
    pub parts: Vec<PartTables>,
    /// What calibration measured, for tables and planners.
    pub measured: Vec<Measured>,
    /// Tables of the bit-exact level across layers, by rising layer, K before V; may be none.
    pub exact: Vec<ExactTables>,
}

/// Rotary position embedding of K.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Angle of each pair of channels for one token. Unit: radians. As many as half the channels
    /// of a head that rotate; scaled frequencies are stored as they are.
    pub frequencies: Vec<f64>,
    /// True: pairs `(i, i + n)` of the first `2 n` channels. False: pairs `(2 i, 2 i + 1)`.
    pub rotate_half: bool,
}

impl Rope {
    /// `theta^(-2 i / rotary_dim)` for each pair: RoPE without scaling.
    pub fn plain(theta: f64, rotary_dim: u32, rotate_half: bool) -> Self {
        let dim = f64::from(rotary_dim);
        let frequency = |i: u32| libm::pow(theta, -f64::from(2 * i) / dim);
        Self {
            frequencies: (0..rotary_dim / 2).map(frequency).collect(),
            rotate_half,
        }
    }
}

/// Tables of the K or V of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct PartTables {
    /// Index of the layer in the model's descriptor.
    pub layer: u32,
    /// K or V.
    pub code: PartCode,
    /// Heads of the part.
    pub heads: u32,
    /// Channels of a head.
    pub dim: u32,
    /// How this part is read where others are predicted from it; `None` where none is.
    pub input: Option<Input>,
    /// Tables of the plain levels.
    pub plain: Plain,
    /// Tables of the levels that predict from parts before this one. At most [`QUALITIES`]; of
    /// several with the same level the first counts. A part without is coded plainly there.
    pub crosses: Vec<Cross>,
}

impl PartTables {
    /// Channels of a token: heads times dim.
    pub const fn channels(&self) -> usize {
        self.heads as usize * self.dim as usize
    }
}

/// How a restored part is read to predict others: `u = round((x - centre) / scale)`, held within
/// -127 and 127, where x of K is before RoPE.
#[derive(Debug, Clone, PartialEq)]
pub struct Input {
    /// Subtracted from a channel.
    pub centre: Vec<f32>,
    /// What one step of a channel stands for; above 0.
    pub scale: Vec<f32>,
}

/// Tables of the plain levels of a part.
#[derive(Debug, Clone, PartialEq)]
pub struct Plain {
    /// Mean of each channel, of K before RoPE; zeros where no mean is taken away.
    pub mean: Vec<f32>,
    /// Between channels and coefficients.
    pub transform: Transform,
    /// Transparent, balanced, small; `None` where the level is not calibrated.
    pub levels: [Option<LevelTables>; QUALITIES],
}

/// Tables of levels that predict a part from parts before it.
#[derive(Debug, Clone, PartialEq)]
pub struct Cross {
    /// Layer and code of each part that the prediction reads, in the order of the weights'
    /// columns. Each has an [`Input`]. They are of an earlier layer, or K of this one for V.
    pub needs: Vec<(u32, PartCode)>,
    /// A row for each channel, a column for each channel of all that is needed. What is predicted
    /// is `weights * u + bias`, u as [`Input`] says: the inputs' scales belong into the weights,
    /// their centres into the bias.
    pub weights: Matrix16,
    /// Added to the prediction of each channel.
    pub bias: Vec<f32>,
    /// Between what the prediction leaves and coefficients.
    pub transform: Transform,
    /// Transparent, balanced, small; `None` where this prediction does not serve the level.
    pub levels: [Option<LevelTables>; QUALITIES],
}

/// From channels to coefficients and back, each a matrix of channels x channels. Coefficients are
/// ordered by falling variance.
#[derive(Debug, Clone, PartialEq)]
pub struct Transform {
    /// A row for each coefficient.
    pub forward: Matrix16,
    /// A row for each channel. Near the inverse of `forward` as it stands here, in integers.
    pub inverse: Matrix16,
}

/// Tables of one level.
#[derive(Debug, Clone, PartialEq)]
pub struct LevelTables {
    /// What one step of every coefficient stands for; above 0.
    pub step: f32,
    /// Scale index of each coefficient, see [`scales`]; [`DEAD`] where it is always 0.
    pub scales: Vec<u8>,
    /// What a token's coefficients are predicted from. Scale indices are of what it leaves.
    pub predictor: TokenPredictor,
}

/// What the rounded coefficients of a token are predicted from, to take fewer bits. The quality is
/// the same with each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenPredictor {
    /// Nothing: the mean is gone already.
    Mean,
    /// The first token of each run of `group` tokens of the part.
    Anchor {
        /// Tokens of a run, 2 or more.
        group: u16,
    },
    /// The token before: `round(rho / 64 * q)`, ties away from 0.
    First {
        /// One of each coefficient.
        rho: Vec<i8>,
    },
}

/// What calibration measured of a level.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// Number of the level.
    pub level: u8,
    /// Bits a value, everything counted.
    pub bits: f32,
    /// Kullback-Leibler divergence of the next token to expect; below 0 where none was predicted.
    /// Unit: nats.
    pub predicted_kl: f32,
    /// What each of the profile's parts adds to it, in their order; empty where nobody knows.
    /// Unit: nats.
    pub costs: Vec<f32>,
}

impl Profile {
    /// The bytes of its file.
    ///
    /// # Errors
    /// [`ProfileError`] when the tables do not fit each other (P1).
    pub fn to_bytes(&self) -> Result<Vec<u8>, ProfileError> {
        self.check()?;
        Ok(file::write(self))
    }

    /// Reads a file, and checks all of it.
    ///
    /// # Errors
    /// [`ProfileError`] names the field and what is accepted.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ProfileError> {
        let profile = file::read(bytes)?;
        profile.check()?;
        Ok(profile)
    }

    /// What records carry to name these tables: the first bytes of the hash that ends the file,
    /// little-endian, and 1 where that is 0. It writes the whole file to find out.
    pub fn identity(&self) -> u32 {
        file::identity(&file::write(self))
    }

    /// Tables of a part, when there are some.
    pub fn part(&self, layer: u32, code: PartCode) -> Option<&PartTables> {
        let key = (layer, code as u8);
        let of = |part: &PartTables| (part.layer, part.code as u8);
        let at = self.parts.binary_search_by_key(&key, of).ok()?;
        self.parts.get(at)
    }
}

#[cfg(test)]
mod tests;
