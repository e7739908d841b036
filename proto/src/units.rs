//! Units and small identifiers that cross package borders.
//!
//! Upstairs:   everything.
//! Downstairs: nothing.
//!
//! A bare `u64` never says what it counts, so sizes are [`Bytes`] and identities have types.
//! Text forms are those of configuration files and tables: `"256 MiB"`, `"2 GiB"`, `"4096"`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// One KiB in bytes.
pub const KIB: u64 = 1 << 10;
/// One MiB in bytes.
pub const MIB: u64 = 1 << 20;
/// One GiB in bytes.
pub const GIB: u64 = 1 << 30;

/// A size. Unit: bytes. Written `"2 GiB"`, `"1536 KiB"` or a plain number of bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Bytes(pub u64);

impl Bytes {
    /// `n` KiB.
    pub const fn kib(n: u64) -> Self {
        Self(n * KIB)
    }

    /// `n` MiB.
    pub const fn mib(n: u64) -> Self {
        Self(n * MIB)
    }

    /// `n` GiB.
    pub const fn gib(n: u64) -> Self {
        Self(n * GIB)
    }

    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, name) = match self.0 {
            n if n >= GIB => (GIB, "GiB"),
            n if n >= MIB => (MIB, "MiB"),
            n if n >= KIB => (KIB, "KiB"),
            n => return write!(f, "{n} B"),
        };
        if self.0.is_multiple_of(unit) {
            write!(f, "{} {name}", self.0 / unit)
        } else {
            write!(f, "{:.2} {name}", self.0 as f64 / unit as f64)
        }
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a size; write a whole number and one of B, KiB, MiB, GiB, TiB: \"256 MiB\""
)]
pub struct BadBytes {
    text: String,
}

impl FromStr for Bytes {
    type Err = BadBytes;

    fn from_str(text: &str) -> Result<Self, BadBytes> {
        let bad = || BadBytes {
            text: text.to_owned(),
        };
        let trimmed = text.trim();
        let digits = trimmed.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = trimmed.split_at(digits);
        let number: u64 = number.parse().map_err(|_| bad())?;
        let factor = match unit.trim() {
            "" | "B" => 1,
            "KiB" => KIB,
            "MiB" => MIB,
            "GiB" => GIB,
            "TiB" => GIB << 10,
            _ => return Err(bad()),
        };
        number.checked_mul(factor).map(Bytes).ok_or_else(bad)
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(u64),
            Text(String),
        }
        match Form::deserialize(from)? {
            Form::Number(n) => Ok(Bytes(n)),
            Form::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// Number of a namespace, as records and metrics carry it. 0 is never assigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NamespaceId(pub u32);

impl fmt::Display for NamespaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_reads_what_people_write() {
        for (text, want) in [
            ("4096", 4096),
            ("2 GiB", 2 << 30),
            ("1MiB", 1 << 20),
            (" 3 KiB ", 3 << 10),
        ] {
            assert_eq!(text.parse::<Bytes>(), Ok(Bytes(want)), "{text}");
        }
    }

    #[test]
    fn bytes_refuses_decimal_units_signs_and_overflow() {
        for text in ["", "GiB", "-1", "1 GB", "1.5 GiB", "99999999999 TiB"] {
            let problem = text.parse::<Bytes>().expect_err(text).to_string();
            assert!(problem.contains("256 MiB"), "{problem}");
        }
    }

    #[test]
    fn bytes_round_trips_through_its_text_when_exact() {
        for n in [0, 1, 1023, 1024, 5 * MIB, 7 * GIB] {
            assert_eq!(Bytes(n).to_string().parse::<Bytes>(), Ok(Bytes(n)));
        }
    }
}
