//! Readers: what an engine does with a restore while it runs, and what computing costs it.
//!
//! Upstairs:   sessions keep one; whoever plans a restore decides by it.
//! Downstairs: the descriptor, whose layers it speaks of.
//!
//! It stands beside the descriptor and enters no fingerprint, because it changes no byte: engines
//! that differ here share their blocks.
//!
//! Invariants kept here
//!   F3  A reader that was taken has numbers that cannot overflow a plan: no cost of a block of
//!       any size in a prefix of any length exceeds 2^106, which f64 and u128 hold.

use crate::descriptor::{LayerSpec, ModelDescriptor};
use crate::limits::LAYER_FLOP_MAX;
use crate::v1;
use crate::wire::WireError;

/// Floating point operations of one decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerCost {
    /// For each token, whatever stands before it.
    pub token_flop: u64,
    /// For each token and each one before it that it sees.
    pub pair_flop: u64,
    /// For each token whose K and V are made from the layer's input.
    pub projection_flop: u64,
}

/// What an engine can do while a restore runs. The default takes a loaded prefix and computes the
/// rest after it, and says nothing of its costs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ReaderSpec {
    /// Computes blocks from the front while later ones arrive in any order.
    pub two_ended: bool,
    /// Begins what follows the prefix with the first layer while deeper layers arrive.
    pub layer_events: bool,
    /// Makes K and V of a layer from its input.
    pub hidden_projection: bool,
    /// One for each decoder layer of the descriptor, or none.
    pub layers: Vec<LayerCost>,
}

impl ReaderSpec {
    /// The same, computing from the front while later blocks arrive.
    #[must_use]
    pub fn two_ended(mut self) -> Self {
        self.two_ended = true;
        self
    }

    /// The same, beginning while deeper layers arrive.
    #[must_use]
    pub fn layer_events(mut self) -> Self {
        self.layer_events = true;
        self
    }

    /// The same, making K and V from hidden states.
    #[must_use]
    pub fn hidden_projection(mut self) -> Self {
        self.hidden_projection = true;
        self
    }

    /// The same with costs, one for each decoder layer.
    #[must_use]
    pub fn layers(mut self, layers: Vec<LayerCost>) -> Self {
        self.layers = layers;
        self
    }

    /// True when nothing is computed before all of the prefix has come.
    pub fn is_prefix_only(&self) -> bool {
        !self.two_ended && !self.layer_events
    }

    /// Refuses what does not fit `model`, naming the field, its value and what is accepted.
    ///
    /// # Errors
    /// [`WireError::Field`].
    pub fn check(&self, model: &ModelDescriptor) -> Result<(), WireError> {
        one_each(self.layers.len(), model)?;
        for (index, cost) in self.layers.iter().enumerate() {
            let fields = [
                ("token_flop", cost.token_flop, 1),
                ("pair_flop", cost.pair_flop, 0),
                ("projection_flop", cost.projection_flop, 0),
            ];
            for (field, value, min) in fields {
                if !(min..=LAYER_FLOP_MAX).contains(&value) {
                    let field = format!("reader.layers[{index}].{field}");
                    let accepted = format!("{min} to {LAYER_FLOP_MAX}");
                    return Err(WireError::field(field, value, accepted));
                }
            }
        }
        let projects = |layer: &LayerSpec| {
            matches!(
                layer,
                LayerSpec::Attention { .. } | LayerSpec::Latent { .. } | LayerSpec::SharesWith(_)
            )
        };
        let other = model.layers.iter().position(|layer| !projects(layer));
        if let (true, Some(index)) = (self.hidden_projection, other) {
            return Err(WireError::field(
                "reader.hidden_projection",
                "true",
                format!("false, because layer {index} stores what no projection makes"),
            ));
        }
        Ok(())
    }

    /// Reads what a client says of itself; nothing said is the default.
    ///
    /// # Errors
    /// As [`ReaderSpec::check`].
    pub fn from_wire(
        wire: Option<&v1::ReaderSpec>,
        model: &ModelDescriptor,
    ) -> Result<Self, WireError> {
        let Some(wire) = wire else {
            return Ok(Self::default());
        };
        one_each(wire.layers.len(), model)?;
        let cost = |cost: &v1::LayerCost| LayerCost {
            token_flop: cost.token_flop,
            pair_flop: cost.pair_flop,
            projection_flop: cost.projection_flop,
        };
        let spec = Self {
            two_ended: wire.two_ended,
            layer_events: wire.layer_events,
            hidden_projection: wire.hidden_projection,
            layers: wire.layers.iter().map(cost).collect(),
        };
        spec.check(model)?;
        Ok(spec)
    }
}

fn one_each(costs: usize, model: &ModelDescriptor) -> Result<(), WireError> {
    let layers = model.layers.len();
    if costs == 0 || costs == layers {
        return Ok(());
    }
    Err(WireError::field(
        "reader.layers",
        format!("{costs} entries long"),
        format!("0 or {layers} entries, one for each layer of the model"),
    ))
}

impl From<&ReaderSpec> for v1::ReaderSpec {
    fn from(spec: &ReaderSpec) -> Self {
        let cost = |cost: &LayerCost| v1::LayerCost {
            token_flop: cost.token_flop,
            pair_flop: cost.pair_flop,
            projection_flop: cost.projection_flop,
        };
        Self {
            two_ended: spec.two_ended,
            layer_events: spec.layer_events,
            hidden_projection: spec.hidden_projection,
            layers: spec.layers.iter().map(cost).collect(),
        }
    }
}

#[cfg(test)]
mod tests;
