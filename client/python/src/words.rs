//! Words for the enumerations of the SDK, as `kvtier.types` lists them.
//!
//! Upstairs:   every class of the module.
//! Downstairs: `kvtier_client`.

use kvtier_client::{
    Acknowledge, CommitFailure, Element, Miss, PartCode, PartOrder, PayloadKind, Quality,
    SaveRefusal, Tier,
};
use pyo3::prelude::*;

use crate::errors;

/// An enumeration that Python sees as words.
pub(crate) trait Word: Copy + Sized + 'static {
    /// What an argument of it is called.
    const NAME: &'static str;

    /// Every value and its word.
    const ALL: &'static [(Self, &'static str)];

    /// Reads a word. Errors: `Invalid` names those that there are.
    fn read(word: &str) -> PyResult<Self> {
        let found = Self::ALL.iter().find(|(_, name)| *name == word);
        found.map(|(value, _)| *value).ok_or_else(|| {
            let accepted: Vec<_> = Self::ALL.iter().map(|(_, name)| *name).collect();
            let (name, accepted) = (Self::NAME, accepted.join(", "));
            errors::invalid(format!("{name} is {word:?}; accepted: {accepted}"))
        })
    }
}

impl Word for PayloadKind {
    const NAME: &'static str = "kind";
    const ALL: &'static [(Self, &'static str)] = &[
        (Self::Kv, "kv"),
        (Self::Latent, "latent"),
        (Self::Hidden, "hidden"),
        (Self::State, "state"),
        (Self::Opaque, "opaque"),
    ];
}

impl Word for PartCode {
    const NAME: &'static str = "code";
    const ALL: &'static [(Self, &'static str)] = &[
        (Self::K, "k"),
        (Self::V, "v"),
        (Self::Latent, "latent"),
        (Self::Rope, "rope"),
        (Self::State, "state"),
        (Self::Hidden, "hidden"),
        (Self::Opaque, "opaque"),
    ];
}

impl Word for PartOrder {
    const NAME: &'static str = "order";
    const ALL: &'static [(Self, &'static str)] = &[
        (Self::TokenMajor, "token_major"),
        (Self::HeadMajor, "head_major"),
    ];
}

impl Word for Element {
    const NAME: &'static str = "element";
    const ALL: &'static [(Self, &'static str)] = &[
        (Self::Bf16, "bf16"),
        (Self::F16, "f16"),
        (Self::F32, "f32"),
        (Self::F8E4m3, "f8_e4m3"),
        (Self::F8E5m2, "f8_e5m2"),
        (Self::U8, "u8"),
    ];
}

impl Word for Quality {
    const NAME: &'static str = "quality";
    const ALL: &'static [(Self, &'static str)] = &[
        (Self::Exact, "exact"),
        (Self::Transparent, "transparent"),
        (Self::Balanced, "balanced"),
        (Self::Small, "small"),
        (Self::Any, "any"),
    ];
}

impl Word for Acknowledge {
    const NAME: &'static str = "wait";
    const ALL: &'static [(Self, &'static str)] =
        &[(Self::Accepted, "accepted"), (Self::Durable, "durable")];
}

/// The word of a value; of a value that a later SDK may add, that it is another.
fn listed<T: Word + PartialEq>(value: T) -> &'static str {
    let found = T::ALL.iter().find(|(one, _)| *one == value);
    found.map_or("other", |(_, name)| *name)
}

pub(crate) fn kind(value: PayloadKind) -> &'static str {
    listed(value)
}

pub(crate) fn code(value: PartCode) -> &'static str {
    listed(value)
}

pub(crate) fn order(value: PartOrder) -> &'static str {
    listed(value)
}

pub(crate) fn element(value: Element) -> &'static str {
    listed(value)
}

pub(crate) fn quality(value: Quality) -> &'static str {
    listed(value)
}

pub(crate) fn acknowledge(value: Acknowledge) -> &'static str {
    listed(value)
}

pub(crate) fn miss(value: Miss) -> &'static str {
    value.as_str()
}

pub(crate) fn tier(value: Tier) -> &'static str {
    match value {
        Tier::Host => "host",
        Tier::Disk => "disk",
        _ => "other",
    }
}

pub(crate) fn refusal(value: SaveRefusal) -> &'static str {
    match value {
        SaveRefusal::RegionFull => "region_full",
        SaveRefusal::OverQuota => "over_quota",
        SaveRefusal::Draining => "draining",
        SaveRefusal::NoSpace => "no_space",
        _ => "other",
    }
}

pub(crate) fn failure(value: CommitFailure) -> &'static str {
    match value {
        CommitFailure::StaleSlot => "stale_slot",
        CommitFailure::Checksum => "checksum",
        CommitFailure::NoSpace => "no_space",
        CommitFailure::NotDurable => "not_durable",
        _ => "other",
    }
}
