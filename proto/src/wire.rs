//! From messages to domain types and back, at the door and nowhere else.
//!
//! Upstairs:   `kvtierd::server` and `kvtier-client`.
//! Downstairs: `v1` (generated), `descriptor`, `key`, `vocabulary`.
//!
//! Every number a peer sends is checked here before anything is computed or allocated from it;
//! an error names the field, what it held and what would be accepted.

use crate::descriptor::{DescriptorProblem, LayerSpec, ModelDescriptor, PartOrder, Rope, Shard};
use crate::element::Element;
use crate::key::BlockKey;
use crate::limits::{KEYS_PER_CALL_MAX, LAYERS_MAX};
use crate::v1;
use crate::vocabulary::{Miss, PayloadKind, Quality};

/// A message that cannot be taken. Maps to `INVALID_ARGUMENT`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// One field is out of range or missing.
    #[error("{field} is {value}; accepted: {accepted}")]
    Field {
        /// Path of the field.
        field: String,
        /// What it holds.
        value: String,
        /// What would be accepted.
        accepted: String,
    },
    /// The model descriptor has these problems, all of them.
    #[error("the model descriptor is not usable: {}", join(.0))]
    Descriptor(Vec<DescriptorProblem>),
}

impl WireError {
    /// One field is wrong.
    pub fn field(
        field: impl Into<String>,
        value: impl ToString,
        accepted: impl Into<String>,
    ) -> Self {
        Self::Field {
            field: field.into(),
            value: value.to_string(),
            accepted: accepted.into(),
        }
    }
}

/// Problems that a refusal tells: its text travels in a header of the reply, which has a bound.
const PROBLEMS_TOLD_MAX: usize = 16;

fn join(problems: &[DescriptorProblem]) -> String {
    let told = problems.iter().take(PROBLEMS_TOLD_MAX);
    let mut told: Vec<String> = told.map(ToString::to_string).collect();
    if let Some(more) = problems.len().checked_sub(PROBLEMS_TOLD_MAX + 1) {
        told.push(format!("and {} more", more + 1));
    }
    told.join("; ")
}

/// Reads one key.
pub fn key_from_wire(field: &str, bytes: &[u8]) -> Result<BlockKey, WireError> {
    BlockKey::from_slice(bytes)
        .ok_or_else(|| WireError::field(field, format!("{} bytes long", bytes.len()), "32 bytes"))
}

/// Reads the keys of a call: 1 to 4096 of them.
pub fn keys_from_wire<B: AsRef<[u8]>>(field: &str, keys: &[B]) -> Result<Vec<BlockKey>, WireError> {
    if keys.is_empty() || keys.len() > KEYS_PER_CALL_MAX {
        let value = format!("{} entries long", keys.len());
        return Err(WireError::field(
            field,
            value,
            format!("1 to {KEYS_PER_CALL_MAX} entries"),
        ));
    }
    let read =
        |(index, key): (usize, &B)| key_from_wire(&format!("{field}[{index}]"), key.as_ref());
    keys.iter().enumerate().map(read).collect()
}

impl TryFrom<v1::PayloadKind> for PayloadKind {
    type Error = WireError;

    fn try_from(kind: v1::PayloadKind) -> Result<Self, WireError> {
        Ok(match kind {
            v1::PayloadKind::Kv => Self::Kv,
            v1::PayloadKind::Latent => Self::Latent,
            v1::PayloadKind::Hidden => Self::Hidden,
            v1::PayloadKind::State => Self::State,
            v1::PayloadKind::Opaque => Self::Opaque,
            v1::PayloadKind::Unspecified => {
                return Err(WireError::field(
                    "kind",
                    kind.as_str_name(),
                    "KV, LATENT, HIDDEN, STATE or OPAQUE",
                ));
            }
        })
    }
}

impl From<PayloadKind> for v1::PayloadKind {
    fn from(kind: PayloadKind) -> Self {
        match kind {
            PayloadKind::Kv => Self::Kv,
            PayloadKind::Latent => Self::Latent,
            PayloadKind::Hidden => Self::Hidden,
            PayloadKind::State => Self::State,
            PayloadKind::Opaque => Self::Opaque,
        }
    }
}

impl From<v1::Quality> for Quality {
    fn from(quality: v1::Quality) -> Self {
        match quality {
            v1::Quality::Exact => Self::Exact,
            v1::Quality::Transparent => Self::Transparent,
            v1::Quality::Balanced => Self::Balanced,
            v1::Quality::Small => Self::Small,
            v1::Quality::Any => Self::Any,
        }
    }
}

impl From<Quality> for v1::Quality {
    fn from(quality: Quality) -> Self {
        match quality {
            Quality::Exact => Self::Exact,
            Quality::Transparent => Self::Transparent,
            Quality::Balanced => Self::Balanced,
            Quality::Small => Self::Small,
            Quality::Any => Self::Any,
        }
    }
}

/// Reads the worst quality that a request takes.
///
/// # Errors
/// The number is none: taken for another, a request could get less than it accepts.
pub fn quality_from_wire(field: &str, number: i32) -> Result<Quality, WireError> {
    let known = v1::Quality::try_from(number).map(Quality::from);
    known.map_err(|_| {
        let accepted = "EXACT, TRANSPARENT, BALANCED, SMALL or ANY";
        WireError::field(field, number, accepted)
    })
}

/// Pairs of domain and wire values that must stay one to one; a test walks both sides.
const MISSES: [(Miss, v1::MissReason); 16] = [
    (Miss::Absent, v1::MissReason::Absent),
    (Miss::Evicted, v1::MissReason::Evicted),
    (Miss::StaleEpoch, v1::MissReason::StaleEpoch),
    (Miss::Misdirected, v1::MissReason::Misdirected),
    (Miss::HeaderCrc, v1::MissReason::HeaderCrc),
    (Miss::PayloadCrc, v1::MissReason::PayloadCrc),
    (Miss::WrongKey, v1::MissReason::WrongKey),
    (Miss::WrongLayout, v1::MissReason::WrongLayout),
    (Miss::Undecodable, v1::MissReason::Undecodable),
    (Miss::Unsupported, v1::MissReason::Unsupported),
    (Miss::Quality, v1::MissReason::Quality),
    (Miss::Device, v1::MissReason::Device),
    (Miss::NoSpace, v1::MissReason::NoSpace),
    (Miss::Deadline, v1::MissReason::Deadline),
    (Miss::NoTables, v1::MissReason::NoTables),
    (Miss::Region, v1::MissReason::Region),
];

impl From<Miss> for v1::MissReason {
    fn from(miss: Miss) -> Self {
        let pair = MISSES.iter().find(|(domain, _)| *domain == miss);
        pair.map_or(Self::Unspecified, |(_, wire)| *wire)
    }
}

impl TryFrom<v1::MissReason> for Miss {
    type Error = WireError;

    fn try_from(reason: v1::MissReason) -> Result<Self, WireError> {
        let pair = MISSES.iter().find(|(_, wire)| *wire == reason);
        pair.map(|(domain, _)| *domain)
            .ok_or_else(|| WireError::field("miss", reason.as_str_name(), "a known reason"))
    }
}

const ELEMENTS: [(Element, v1::Element); 6] = [
    (Element::Bf16, v1::Element::Bf16),
    (Element::F16, v1::Element::F16),
    (Element::F32, v1::Element::F32),
    (Element::F8E4m3, v1::Element::F8E4m3),
    (Element::F8E5m2, v1::Element::F8E5m2),
    (Element::U8, v1::Element::U8),
];

fn element_from_wire(number: i32) -> Result<Element, WireError> {
    let known = v1::Element::try_from(number).ok();
    let pair = ELEMENTS.iter().find(|(_, wire)| Some(*wire) == known);
    pair.map(|(element, _)| *element).ok_or_else(|| {
        WireError::field(
            "model.element",
            number,
            "BF16, F16, F32, F8_E4M3, F8_E5M2 or U8",
        )
    })
}

fn layer_from_wire(index: usize, layer: &v1::LayerSpec) -> Result<LayerSpec, WireError> {
    use v1::layer_spec::Spec;
    match &layer.spec {
        Some(Spec::Attention(spec)) => Ok(LayerSpec::Attention {
            kv_heads: spec.kv_heads,
            k_dim: spec.k_dim,
            v_dim: spec.v_dim,
            sliding_window: spec.sliding_window,
        }),
        Some(Spec::Latent(spec)) => Ok(LayerSpec::Latent {
            latent_dim: spec.latent_dim,
            rope_dim: spec.rope_dim,
        }),
        Some(Spec::SharesWith(other)) => Ok(LayerSpec::SharesWith(*other)),
        Some(Spec::State(spec)) => Ok(LayerSpec::State { bytes: spec.bytes }),
        Some(Spec::Opaque(spec)) => Ok(LayerSpec::Opaque {
            bytes_per_token: spec.bytes_per_token,
            bytes_per_block: spec.bytes_per_block,
        }),
        None => Err(WireError::field(
            format!("model.layers[{index}]"),
            "empty",
            "attention, latent, shares_with, state or opaque",
        )),
    }
}

impl TryFrom<&v1::ModelDescriptor> for ModelDescriptor {
    type Error = WireError;

    /// Reads and validates; every problem of the descriptor is named at once.
    fn try_from(wire: &v1::ModelDescriptor) -> Result<Self, WireError> {
        if wire.layers.len() > LAYERS_MAX {
            let value = format!("{} entries", wire.layers.len());
            return Err(WireError::field(
                "model.layers",
                value,
                format!("1 to {LAYERS_MAX} entries"),
            ));
        }
        let layer = |(index, layer)| layer_from_wire(index, layer);
        let layers = wire
            .layers
            .iter()
            .enumerate()
            .map(layer)
            .collect::<Result<_, _>>()?;
        let order = match v1::PartOrder::try_from(wire.order) {
            Ok(v1::PartOrder::TokenMajor) => PartOrder::TokenMajor,
            Ok(v1::PartOrder::HeadMajor) => PartOrder::HeadMajor,
            _ => {
                return Err(WireError::field(
                    "model.order",
                    wire.order,
                    "TOKEN_MAJOR or HEAD_MAJOR",
                ));
            }
        };
        let rope = wire.rope.as_ref().map(|rope| Rope {
            theta: rope.theta,
            rotary_dim: rope.rotary_dim,
            rotate_half: rope.rotate_half,
            scaling: rope.scaling.clone(),
        });
        let shard = wire.shard.as_ref().map_or(Shard::WHOLE, |shard| Shard {
            tp_rank: shard.tp_rank,
            tp_size: shard.tp_size,
            pp_rank: shard.pp_rank,
            pp_size: shard.pp_size,
        });
        let model = ModelDescriptor {
            model: wire.model.clone(),
            revision: wire.revision.clone(),
            weights_fingerprint: wire.weights_fingerprint.to_vec(),
            adapter: wire.adapter.clone(),
            element: element_from_wire(wire.element)?,
            layers,
            d_model: wire.d_model,
            rope,
            block_tokens: wire.block_tokens,
            order,
            shard,
            k_after_rope: wire.k_after_rope,
        };
        let problems = model.validate();
        if problems.is_empty() {
            Ok(model)
        } else {
            Err(WireError::Descriptor(problems))
        }
    }
}

impl From<&ModelDescriptor> for v1::ModelDescriptor {
    fn from(model: &ModelDescriptor) -> Self {
        let element = ELEMENTS
            .iter()
            .find(|(element, _)| *element == model.element);
        let order = match model.order {
            PartOrder::TokenMajor => v1::PartOrder::TokenMajor,
            PartOrder::HeadMajor => v1::PartOrder::HeadMajor,
        };
        Self {
            model: model.model.clone(),
            revision: model.revision.clone(),
            weights_fingerprint: model.weights_fingerprint.clone().into(),
            adapter: model.adapter.clone(),
            element: element.map_or(0, |(_, wire)| *wire as i32),
            layers: model.layers.iter().map(layer_to_wire).collect(),
            d_model: model.d_model,
            rope: model.rope.as_ref().map(|rope| v1::RopeSpec {
                theta: rope.theta,
                rotary_dim: rope.rotary_dim,
                rotate_half: rope.rotate_half,
                scaling: rope.scaling.clone(),
            }),
            block_tokens: model.block_tokens,
            order: order as i32,
            shard: Some(v1::Shard {
                tp_rank: model.shard.tp_rank,
                tp_size: model.shard.tp_size,
                pp_rank: model.shard.pp_rank,
                pp_size: model.shard.pp_size,
            }),
            k_after_rope: model.k_after_rope,
        }
    }
}

fn layer_to_wire(layer: &LayerSpec) -> v1::LayerSpec {
    use v1::layer_spec::Spec;
    let spec = match *layer {
        LayerSpec::Attention {
            kv_heads,
            k_dim,
            v_dim,
            sliding_window,
        } => Spec::Attention(v1::AttentionSpec {
            kv_heads,
            k_dim,
            v_dim,
            sliding_window,
        }),
        LayerSpec::Latent {
            latent_dim,
            rope_dim,
        } => Spec::Latent(v1::LatentSpec {
            latent_dim,
            rope_dim,
        }),
        LayerSpec::SharesWith(other) => Spec::SharesWith(other),
        LayerSpec::State { bytes } => Spec::State(v1::StateSpec { bytes }),
        LayerSpec::Opaque {
            bytes_per_token,
            bytes_per_block,
        } => Spec::Opaque(v1::OpaqueSpec {
            bytes_per_token,
            bytes_per_block,
        }),
    };
    v1::LayerSpec { spec: Some(spec) }
}

#[cfg(test)]
mod tests;
