//! Element types of stored tensors.
//!
//! Upstairs:   descriptors, layouts, codecs.
//! Downstairs: nothing.

use strum::{EnumIter, IntoStaticStr};

/// Element type of stored K, V, latents and hidden states. The number is the one on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EnumIter, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
#[repr(u8)]
pub enum Element {
    /// bfloat16.
    Bf16 = 1,
    /// IEEE half precision.
    F16 = 2,
    /// IEEE single precision.
    F32 = 3,
    /// 8-bit float, 4 exponent bits.
    F8E4m3 = 4,
    /// 8-bit float, 5 exponent bits.
    F8E5m2 = 5,
    /// Bytes without numeric meaning.
    U8 = 6,
}

impl Element {
    /// Size of one element. Unit: bytes.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
            Self::F8E4m3 | Self::F8E5m2 | Self::U8 => 1,
        }
    }

    /// Name as tables show it.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}
