//! The two-ended part of a restore: the outlook, the gate, and what became of it.
//!
//! Upstairs:   `run`.
//! Downstairs: `claims`, `outlook`; `decide` says when the gate turns.

use std::sync::Arc;
use std::time::Duration;

use kvtier_proto::claims::Gate;
use kvtier_proto::{Miss, PayloadKind};

use super::{Learned, Restore, State};
use crate::metrics::By;
use crate::restore::claims::Claims;
use crate::restore::decide::Course;
use crate::restore::history::Met;
use crate::restore::outlook::{Asked, Outlook, course, outlook};
use crate::restore::plan::found::Plan;
use crate::tier::Located;

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
}

impl Meeting {
    fn set_gate(&mut self, gate: Gate) {
        self.claims.set_gate(gate);
        self.outlook.open |= gate == Gate::Open;
    }
}

impl Restore {
    /// Looks ahead and lets the engine begin, when this restore is two-ended.
    pub(super) async fn meeting(
        &self,
        found: &[Result<Located, Miss>],
        todo: &Plan,
    ) -> Option<(Meeting, Course)> {
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
        let name = (self.reader.host().namespace(), layouts.fingerprint());
        let is_prefill = self.request.kind == PayloadKind::Kv;
        let (learned, found, todo) = (Arc::clone(&self.learned), found.to_vec(), todo.clone());
        // Some milliseconds for a prompt of thousands of blocks: not on a thread of all others.
        let planned = tokio::task::spawn_blocking(move || {
            let Learned { engines, rates, .. } = &*learned;
            let prefill = engines.prefill(name.0, name.1);
            // Blocks of other kinds save an engine other work than prefill.
            let prefill = prefill.filter(|_| is_prefill);
            let outlook = outlook(&found, &asked, prefill, rates);
            let course = course(&found, &todo, &asked, prefill, rates, outlook.open);
            (outlook, course)
        });
        let (outlook, course) = planned.await.ok()?;
        claims.set_gate(course.gate());
        Some((Meeting { outlook, claims }, course))
    }

    /// A device is late.
    pub(super) fn late(&self, course: &mut Course, state: &mut State, now: Duration) {
        let Some(meeting) = &mut state.meeting else {
            return;
        };
        meeting.set_gate(Gate::Open);
        for index in course.give_back(now) {
            meeting.claims.give_back(index);
        }
        state.news = true;
        tracing::debug!("a device is late: the engine computes beside it");
    }

    /// Opens or closes the gate as the restore goes.
    pub(super) fn turn_gate(&self, course: &mut Course, state: &mut State, now: Duration) {
        let Some(meeting) = &mut state.meeting else {
            return;
        };
        let claims = meeting.claims.clone();
        if let Some(gate) = course.turn_gate(now, |index| claims.of(index)) {
            meeting.set_gate(gate);
            state.news |= gate == Gate::Open;
        }
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
