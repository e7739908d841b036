//! What a plan is made from: cells, resources, the engine's prefill model, what its reader can do.
//!
//! Upstairs:   whoever wants a plan.
//! Downstairs: nothing.
//!
//! A *cell* is one layer of one chunk (of one block). Its *variants* are the forms that are stored
//! of it. Time is in seconds, amounts are in the unit of their resource: bytes for a link or a
//! device, seconds for a processor.
//!
//! Invariants kept here
//!   Q1  What comes from outside is looked at before anything is planned: counts are bounded,
//!       numbers are finite and not negative. A rate of zero is no error: it is a resource that
//!       nothing can use now.

use kvtier_proto::Level;

/// Most resources of one request, the GPU with them.
pub const RESOURCES_MAX: usize = 8;
/// Most variants of one cell.
pub const VARIANTS_MAX: usize = 16;
/// Most cells of one request: 4,096 chunks of 128 layers.
pub const CELLS_MAX: usize = 1 << 19;
/// Most resources that one variant goes through.
pub const USES_MAX: usize = 4;
/// The resource that recomputes, projects and runs the suffix. Its unit is seconds.
pub const GPU: usize = 0;
/// No number of a request is larger: sums of them stay finite.
const NUMBER_MAX: f64 = 1e18;

/// Seconds that the engine takes for `x` new tokens after `p` that are there:
/// `fixed + per_context p + per_token x + attention (2 p x + x^2)`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Prefill {
    /// Of every step, whatever its size. Unit: seconds.
    pub fixed_s: f64,
    /// Of every token that is there already. Unit: seconds.
    pub per_context_s: f64,
    /// Of every new token. Unit: seconds.
    pub per_token_s: f64,
    /// Of every pair of tokens that attention looks at, by the term above. Unit: seconds.
    pub attention_s: f64,
}

impl Prefill {
    /// Seconds of a step with `new` tokens after `context`.
    pub fn step_s(&self, context: f64, new: f64) -> f64 {
        let fixed = if new > 0.0 { self.fixed_s } else { 0.0 };
        fixed + self.beyond_fixed_s(context, new)
    }

    /// The part of a step that its tokens cost.
    pub(super) fn beyond_fixed_s(&self, context: f64, new: f64) -> f64 {
        if new <= 0.0 {
            return 0.0;
        }
        let pairs = 2.0 * context * new + new * new;
        self.per_context_s * context + self.per_token_s * new + self.attention_s * pairs
    }

    fn numbers(&self) -> [f64; 4] {
        [
            self.fixed_s,
            self.per_context_s,
            self.per_token_s,
            self.attention_s,
        ]
    }
}

/// Something that does one thing after the other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Resource {
    /// Units a second at full share: bytes, or 1 for a processor whose unit is seconds.
    pub rate: f64,
    /// The part of it that this restore gets, 0 to 1.
    pub share: f64,
    /// Seconds that every descriptor takes beside its bytes.
    pub fixed_s: f64,
}

impl Resource {
    /// A processor of which this restore gets `share`.
    pub const fn processor(share: f64) -> Self {
        Self {
            rate: 1.0,
            share,
            fixed_s: 0.0,
        }
    }

    /// A link or device of `rate` bytes a second, all of it for this restore.
    pub const fn bytes(rate: f64, fixed_s: f64) -> Self {
        Self {
            rate,
            share: 1.0,
            fixed_s,
        }
    }

    /// Units a second that this restore gets.
    pub fn speed(&self) -> f64 {
        self.rate * self.share
    }
}

/// What a variant's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Form {
    /// Keys and values as they are needed, at a level.
    Kv(Level),
    /// Hidden states: the engine makes keys and values of them.
    Hidden,
}

/// Where a variant lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// In the engine's own memory: nothing is to do.
    Resident,
    /// In host memory.
    Memory,
    /// On a device of this host.
    Device,
    /// On another host.
    Remote,
}

/// What a variant asks of one resource.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Use {
    /// Index into the request's resources.
    pub resource: usize,
    /// Bytes or seconds, in the unit of the resource.
    pub amount: f64,
}

/// One form of a cell, and what it takes to bring it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Variant {
    /// What the bytes are.
    pub form: Form,
    /// Where they lie.
    pub tier: Tier,
    /// What they go through: device, link, decoder. A resource stands here once.
    pub uses: [Option<Use>; USES_MAX],
    /// Descriptors of it on each resource: 1, or less when one read brings several cells.
    pub descriptors: f64,
    /// Whether the engine has to decode it.
    pub engine_decodes: bool,
    /// Calibrated damage of the whole cell, 0 when exact. Unit: that of `PlanRequest::damage_max`.
    pub damage: f64,
}

impl Variant {
    /// A variant that asks nothing of anybody yet.
    pub const fn new(form: Form, tier: Tier) -> Self {
        Self {
            form,
            tier,
            uses: [None; USES_MAX],
            descriptors: 1.0,
            engine_decodes: false,
            damage: 0.0,
        }
    }

    /// The same, going through one resource more. Beyond `USES_MAX` nothing is added.
    #[must_use]
    pub fn through(mut self, resource: usize, amount: f64) -> Self {
        if let Some(free) = self.uses.iter_mut().find(|used| used.is_none()) {
            *free = Some(Use { resource, amount });
        }
        self
    }

    /// The same, with a damage.
    #[must_use]
    pub const fn damaging(mut self, damage: f64) -> Self {
        self.damage = damage;
        self
    }

    /// What it asks of a resource, in the unit of that.
    pub fn amount(&self, resource: usize) -> f64 {
        let uses = self.uses.iter().flatten();
        let of = uses.filter(|used| used.resource == resource);
        of.map(|used| used.amount).sum()
    }

    /// True when every bit is as the engine made it, hidden states included: what it computes from
    /// them is what it computed before.
    pub fn exact(&self) -> bool {
        self.damage <= 0.0
    }
}

/// What an engine's reader can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent capabilities")]
pub struct Reader {
    /// It takes a loaded prefix and computes the rest, and nothing else. Stronger than `two_ended`.
    pub prefix_only: bool,
    /// It computes from the front while others load from the back.
    pub two_ended: bool,
    /// Its suffix runs a layer as soon as that layer is there.
    pub layer_events: bool,
    /// It makes keys and values of hidden states.
    pub hidden_proj: bool,
    /// It decodes levels itself.
    pub gpu_decode: bool,
}

/// Everything a plan depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanRequest {
    /// Tokens of each chunk, in the order of the prefix.
    pub chunks: Vec<u32>,
    /// Layers of the model.
    pub layers: usize,
    /// Variants of each cell: all layers of the first chunk, then those of the second. A cell
    /// without a variant is missing.
    pub cells: Vec<Vec<Variant>>,
    /// What the variants go through. The first is the GPU.
    pub resources: Vec<Resource>,
    /// The engine's prefill at full share.
    pub prefill: Prefill,
    /// Part of the prefill time that each layer takes; empty when all take the same.
    pub layer_weights: Vec<f64>,
    /// New tokens after the prefix.
    pub suffix_tokens: u32,
    /// What the reader can do.
    pub reader: Reader,
    /// The most mean damage of a cell that the request accepts: 0 is bit-exact.
    pub damage_max: f64,
    /// The rates are a guess: keep the order that needs no estimate wherever recompute takes part.
    pub rates_are_poor: bool,
}

/// Why there is no plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Invalid {
    /// Counts that do not fit together, or are too large.
    #[error("{what}: {count} where {wanted}")]
    Count {
        /// What was counted.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// How many there may be.
        wanted: &'static str,
    },
    /// A number that is not finite, negative or absurd.
    #[error("{what} is no number from 0 to 1e18")]
    Number {
        /// Which one.
        what: &'static str,
    },
}

fn number(what: &'static str, value: f64, most: f64) -> Result<(), Invalid> {
    let sound = value.is_finite() && (0.0..=most).contains(&value);
    sound.then_some(()).ok_or(Invalid::Number { what })
}

fn count(
    what: &'static str,
    count: usize,
    holds: bool,
    wanted: &'static str,
) -> Result<(), Invalid> {
    let wrong = Invalid::Count {
        what,
        count,
        wanted,
    };
    holds.then_some(()).ok_or(wrong)
}

impl PlanRequest {
    /// Looks at every number (Q1).
    pub fn check(&self) -> Result<(), Invalid> {
        let (chunks, layers, cells) = (self.chunks.len(), self.layers, self.cells.len());
        count("layers", layers, layers > 0, "at least 1 is needed")?;
        let wanted = chunks.checked_mul(layers);
        count("cells", cells, wanted == Some(cells), "chunks by layers")?;
        count("cells", cells, cells <= CELLS_MAX, "at most 524288 may be")?;
        let (resources, weights) = (self.resources.len(), self.layer_weights.len());
        let fits = (1..=RESOURCES_MAX).contains(&resources);
        count("resources", resources, fits, "1 to 8 may be")?;
        let fits = weights == 0 || weights == layers;
        count("layer weights", weights, fits, "none or one a layer")?;
        for tokens in &self.chunks {
            count("tokens of a chunk", 0, *tokens > 0, "at least 1 is needed")?;
        }
        for weight in &self.layer_weights {
            number("weight of a layer", *weight, NUMBER_MAX)?;
        }
        if weights > 0 && self.layer_weights.iter().sum::<f64>() <= 0.0 {
            return Err(Invalid::Number {
                what: "sum of the layers' weights",
            });
        }
        for value in self.prefill.numbers() {
            number("prefill model", value, 1e6)?;
        }
        for resource in &self.resources {
            number("rate", resource.rate, NUMBER_MAX)?;
            number("share", resource.share, 1.0)?;
            number("seconds of a descriptor", resource.fixed_s, 1e6)?;
        }
        number("damage accepted", self.damage_max, NUMBER_MAX)?;
        self.check_variants(resources)
    }

    fn check_variants(&self, resources: usize) -> Result<(), Invalid> {
        let mut before: Option<&Vec<Variant>> = None;
        for cell in &self.cells {
            if before == Some(cell) {
                continue; // layers of a chunk are alike as a rule
            }
            before = Some(cell);
            let variants = cell.len();
            let fits = variants <= VARIANTS_MAX;
            count("variants of a cell", variants, fits, "at most 16 may be")?;
            for variant in cell {
                number("descriptors", variant.descriptors, NUMBER_MAX)?;
                number("damage", variant.damage, NUMBER_MAX)?;
                for used in variant.uses.iter().flatten() {
                    let at = used.resource;
                    count(
                        "resource",
                        at,
                        at < resources,
                        "one of the request's is needed",
                    )?;
                    number("amount", used.amount, NUMBER_MAX)?;
                }
            }
        }
        Ok(())
    }

    /// Tokens before each chunk, and of all at the end.
    pub(super) fn starts(&self) -> Vec<f64> {
        let mut starts = Vec::with_capacity(self.chunks.len() + 1);
        let mut sum = 0.0;
        starts.push(sum);
        for tokens in &self.chunks {
            sum += f64::from(*tokens);
            starts.push(sum);
        }
        starts
    }

    /// Seconds of GPU for one second at full share; infinite when it gives this restore nothing.
    pub(super) fn gpu_stretch(&self) -> f64 {
        let share = self.resources.first().map_or(0.0, Resource::speed);
        1.0 / share
    }
}
