//! The two-ended part of a restore: the outlook, the gate, and what became of it.
//!
//! Upstairs:   `run`.
//! Downstairs: `claims`, `outlook`.
//!
//! Invariants kept here
//!   O2  When the device is late the gate opens, and the engine may have what is on its way: nobody
//!       waits for a device that has stopped while it could compute.

use std::time::Duration;

use kvtier_proto::claims::Gate;
use kvtier_proto::{Miss, PayloadKind};
use tokio::time::Instant;

use super::order::Order;
use super::{Event, Restore, State};
use crate::metrics::By;
use crate::restore::claims::Claims;
use crate::restore::history::Met;
use crate::restore::outlook::{Asked, Outlook, outlook};
use crate::restore::plan::found::Plan;
use crate::tier::Located;

/// A device of which no rate is known is late when nothing comes for this long.
const LATE_UNKNOWN: Duration = Duration::from_millis(250);

/// What an engine says that computes while blocks load.
#[derive(Debug, Clone)]
pub struct TwoEnded {
    /// Where both ends claim blocks.
    pub claims: Claims,
    /// Tokens of the prompt before the first block.
    pub first_token: u32,
    /// Tokens that it computes after the last.
    pub suffix_tokens: u32,
}

/// How a two-ended restore goes.
#[derive(Debug)]
pub(super) struct Meeting {
    pub(super) outlook: Outlook,
    claims: Claims,
    /// When the device is late if no block comes before.
    late_at: Option<Instant>,
}

impl Meeting {
    /// When the device counts as late.
    pub(super) fn late_at(&self) -> Option<Instant> {
        self.late_at
    }

    /// A block came.
    pub(super) fn landed(&mut self) {
        self.late_at = self.due();
    }

    /// The device is late: the engine may compute.
    pub(super) fn open(&mut self) {
        self.claims.set_gate(Gate::Open);
        self.outlook.open = true;
        self.late_at = None;
    }

    fn due(&self) -> Option<Instant> {
        let late = self.outlook.late.unwrap_or(LATE_UNKNOWN);
        Instant::now().checked_add(late)
    }
}

impl Restore {
    /// Looks ahead and lets the engine begin, when this restore is two-ended.
    pub(super) fn meeting(&self, found: &[Result<Located, Miss>], todo: &Plan) -> Option<Meeting> {
        let two_ended = self.request.two_ended.as_ref()?;
        let claims = two_ended.claims.clone();
        for index in &todo.resident {
            claims.take(*index);
        }
        let layouts = self.reader.layouts();
        let block_tokens = layouts.model().block_tokens;
        let layout = layouts.get(self.request.kind, block_tokens, 0);
        let asked = Asked {
            block_tokens,
            block_bytes: layout.map_or(0, |layout| layout.payload_len() as u64),
            first_token: two_ended.first_token,
            suffix_tokens: two_ended.suffix_tokens,
        };
        let engines = &self.learned.engines;
        let prefill = engines.prefill(self.reader.host().namespace(), layouts.fingerprint());
        // Blocks of other kinds save an engine other work than prefill.
        let prefill = prefill.filter(|_| self.request.kind == PayloadKind::Kv);
        let outlook = outlook(found, &asked, prefill, &self.learned.rates);
        let gate = if outlook.open {
            Gate::Open
        } else {
            Gate::Closed
        };
        claims.set_gate(gate);
        let mut meeting = Meeting {
            outlook,
            claims,
            late_at: None,
        };
        meeting.late_at = meeting.due();
        Some(meeting)
    }

    /// The device is late. False when nobody listens.
    pub(super) async fn late(&self, state: &mut State, order: &Order) -> bool {
        let Some(meeting) = &mut state.meeting else {
            return true;
        };
        meeting.open();
        order.give_back();
        tracing::debug!("the device is late: the engine computes beside it");
        self.events.send(Event::Hint).await.is_ok()
    }

    /// Says what came of it.
    pub(super) fn met(&self, state: &State, took: Duration) {
        let Some(meeting) = &state.meeting else {
            return;
        };
        let engines = |index: &usize| meeting.claims.is_engines(*index);
        let blocks = 0..state.arrived.len();
        let computed = blocks.clone().filter(engines).count();
        let loaded = blocks.filter(|index| state.has(*index)).count();
        let count = |by, blocks| self.metrics.two_ended_blocks.of(by).inc_by(blocks as u64);
        count(By::Engine, computed);
        count(By::Daemon, loaded);
        let outlook = &meeting.outlook;
        self.learned.history.add(Met {
            namespace: self.reader.host().namespace(),
            outlook: outlook.clone(),
            took,
            computed,
            loaded,
        });
        tracing::debug!(
            computed, loaded, ?took, planned = ?outlook.planned, load = ?outlook.load,
            compute = ?outlook.compute, reason = outlook.reason, "a two-ended restore ended"
        );
    }
}
