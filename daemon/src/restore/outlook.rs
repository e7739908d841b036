//! What a two-ended restore is expected to take, and whether its engine shall compute at all.
//!
//! Upstairs:   `run`, once a restore, when it knows where the blocks are.
//! Downstairs: `plan`, `decide`; `rates` and `engines` have what was seen before.
//!
//! A block is one column: an engine computes all of its layers in one step and a record is read
//! with one operation. What is not known is not guessed: without a rate or a prefill model both
//! ends just start, and the next restore knows more.
//!
//! Invariants kept here
//!   O1  The gate is closed only if everything can be loaded, and computing would save hardly
//!       anything; nothing that is in memory is computed.

use std::time::Duration;

use kvtier_proto::{Level, Miss};

use super::decide::{Course, Known, Load, SAVING_MIN_S, SAVING_PART, Steps};
use super::plan::found::Plan;
use super::plan::{self, Action, Form, GPU, PlanRequest, Prefill, Reader, Resource, Variant};
use super::rates::Rates;
use crate::metrics::Device;
use crate::tier::Located;

/// Most devices that are told apart; others share the last one's place. The GPU is the first of a
/// plan's resources.
const DEVICES_MAX: usize = plan::request::RESOURCES_MAX - 1;

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Raw bytes of a block.
    pub block_bytes: u64,
    /// Tokens of the prompt before the first block.
    pub first_token: u32,
    /// Tokens after the last.
    pub suffix_tokens: u32,
}

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub struct Outlook {
    /// As it is planned, if all blocks were loaded, if all were computed; as far as known.
    pub planned: Option<Duration>,
    /// If every block were loaded.
    pub load: Option<Duration>,
    /// If every block were computed.
    pub compute: Option<Duration>,
    /// Blocks that the engine is expected to compute before the ends meet.
    pub compute_blocks: usize,
    /// Blocks that are expected to be loaded.
    pub load_blocks: usize,
    /// Whether the engine computes from the start.
    pub open: bool,
    /// Why, in a sentence.
    pub reason: &'static str,
}

/// Looks ahead.
pub fn outlook(
    found: &[Result<Located, Miss>],
    asked: &Asked,
    prefill: Option<Prefill>,
    rates: &Rates,
) -> Outlook {
    let on_disk = |place: &&Result<Located, Miss>| matches!(place, Ok(Located::Disk(..)));
    let load_blocks = found.iter().filter(on_disk).count();
    let missing = found.iter().filter(|place| place.is_err()).count();
    let unknown = |reason| Outlook {
        planned: None,
        load: None,
        compute: None,
        compute_blocks: missing,
        load_blocks,
        open: true,
        reason,
    };
    if load_blocks + missing == 0 {
        return Outlook {
            open: false,
            ..unknown("everything is in memory")
        };
    }
    let Some(prefill) = prefill else {
        return unknown("the engine has not said yet how long its prefill takes");
    };
    let Some(request) = request(found, asked, prefill, rates) else {
        return unknown("nothing was loaded yet from a device that has blocks of this prompt");
    };
    let Ok(plan) = plan::plan(&request) else {
        return unknown("the numbers of this prompt make no plan");
    };
    let is = |wanted: fn(&Action) -> bool| plan.actions.iter().filter(|one| wanted(one)).count();
    let compute_blocks = is(|action| matches!(action, Action::Recompute | Action::Tail));
    let otherwise = plan.otherwise;
    let saving = otherwise.load_s - plan.ttft_s;
    let enough = SAVING_MIN_S.max(SAVING_PART * otherwise.load_s);
    let open = missing > 0 || saving >= enough;
    Outlook {
        planned: seconds(plan.ttft_s),
        load: seconds(otherwise.load_s),
        compute: seconds(otherwise.recompute_s),
        compute_blocks: if open { compute_blocks } else { 0 },
        load_blocks: is(|action| matches!(action, Action::Load(_))),
        open,
        reason: match (open, missing > 0) {
            (false, _) => "loading alone is as fast",
            (true, true) => "blocks are missing",
            (true, false) => "both together are faster",
        },
    }
}

/// How a restore is to run whose blocks were found like this. `open` is what the outlook says.
pub fn course(
    found: &[Result<Located, Miss>],
    todo: &Plan,
    asked: &Asked,
    prefill: Option<Prefill>,
    rates: &Rates,
    open: bool,
) -> Course {
    let mut devices: Vec<Device> = Vec::new();
    // Of each device, blocks and what they take together, if that is known.
    let mut takes: Vec<(f64, Option<f64>)> = Vec::new();
    let mut loads = Vec::with_capacity(todo.load.len());
    for index in &todo.load {
        let Some(Ok(Located::Disk(device, _, level))) = found.get(*index) else {
            continue;
        };
        let known = devices.iter().position(|one| one == device);
        let at = known.unwrap_or_else(|| {
            devices.push(*device);
            takes.push((0.0, Some(0.0)));
            devices.len() - 1
        });
        let load_s = rates.of((*device, *level));
        let load_s = load_s.map(|rate| bytes(asked) / rate.bytes_s);
        if let Some((blocks, seconds)) = takes.get_mut(at) {
            *blocks += 1.0;
            *seconds = seconds.zip(load_s).map(|(sum, load_s)| sum + load_s);
        }
        let (index, device) = (*index, at);
        loads.push(Load { index, device });
    }
    let missing: Vec<usize> = todo.missed.iter().map(|(index, _)| *index).collect();
    let mean = |(blocks, seconds): (f64, Option<f64>)| seconds.map(|seconds| seconds / blocks);
    let known = Known {
        open,
        load_s: takes.into_iter().map(mean).collect(),
        steps: prefill.map(|prefill| Steps {
            prefill: after(prefill, asked.first_token),
            block_tokens: asked.block_tokens,
        }),
    };
    Course::two_ended(&loads, &missing, &known)
}

/// `None` when a rate is not known.
fn request(
    found: &[Result<Located, Miss>],
    asked: &Asked,
    prefill: Prefill,
    rates: &Rates,
) -> Option<PlanRequest> {
    let mut resources = vec![Resource::processor(1.0)];
    let mut known: Vec<(Device, Level)> = Vec::new();
    let mut cells = Vec::with_capacity(found.len());
    for place in found {
        let variant = match place {
            Err(_) => None,
            Ok(Located::Host) => Some(Variant::new(Form::Kv(Level::RAW), plan::Tier::Resident)),
            Ok(Located::Disk(device, _, level)) => {
                let from = (*device, *level);
                let at = match known.iter().position(|one| *one == from) {
                    Some(at) => at,
                    None => {
                        let rate = rates.of(from)?;
                        if known.len() < DEVICES_MAX {
                            known.push(from);
                            resources.push(Resource::bytes(rate.bytes_s, 0.0));
                        }
                        known.len().checked_sub(1)?
                    }
                };
                let variant = Variant::new(Form::Kv(*level), plan::Tier::Device);
                Some(variant.through(GPU + 1 + at, bytes(asked)))
            }
        };
        cells.push(variant.into_iter().collect());
    }
    Some(PlanRequest {
        chunks: vec![asked.block_tokens; found.len()],
        layers: 1,
        cells,
        resources,
        prefill: after(prefill, asked.first_token),
        layer_weights: Vec::new(),
        suffix_tokens: asked.suffix_tokens,
        reader: Reader {
            two_ended: true,
            ..Reader::default()
        },
        damage_max: 0.0,
        rates_are_poor: false,
    })
}

/// The model of a prompt whose first tokens are there: with `p` counted from there on.
fn after(prefill: Prefill, first_token: u32) -> Prefill {
    let first = f64::from(first_token);
    Prefill {
        fixed_s: prefill.fixed_s + prefill.per_context_s * first,
        per_token_s: prefill.per_token_s + 2.0 * prefill.attention_s * first,
        ..prefill
    }
}

#[expect(clippy::cast_precision_loss, reason = "blocks are at most 1 GiB")]
fn bytes(asked: &Asked) -> f64 {
    asked.block_bytes as f64
}

fn seconds(seconds: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests;
