//! What the daemon says of a restore, checked and handed on.
//!
//! Upstairs:   [`Restore`] gives what its source brought.
//! Downstairs: `values` and `check` read the messages; `lineage` remembers what came.
//!
//! Not here on purpose: no waiting, and no word on who computes what.

use std::sync::Arc;

use kvtier_proto::{BlockKey, Quality, v1};

use super::{PlacedBlock, Restore, RestoreEvent, RestoreSummary, Source};
use crate::check;
use crate::error::Error;
use crate::inline::InlineBlock;
use crate::lease::{Held, LeasedBlock};
use crate::mux::{Feed, RESTORE};
use crate::release::LeaseGuard;
use crate::shm::LeasedView;
use crate::two_ended::Outlook;
use crate::values::{BlockStatus, Tier, grade_from_wire, miss_from_wire};

impl Restore {
    pub(super) fn take(&mut self, feed: Feed) -> Result<(), Error> {
        match feed {
            Feed::Plan(plan) => self.plan(&plan),
            Feed::Ready(blocks, at) => {
                for (block, lease) in blocks {
                    if self.leased(&block, lease)? != Tier::Host {
                        self.meeting.loaded(at);
                    }
                }
                Ok(())
            }
            Feed::Inline(block) => self.arrived(block),
            Feed::Hint => {
                if let Source::Mux(running) = &self.source {
                    running.heard();
                }
                Ok(())
            }
            Feed::Done(done) => self.done(&done),
            Feed::Failed(error) => Err(error),
        }
    }

    fn plan(&mut self, plan: &v1::RestorePlan) -> Result<(), Error> {
        let (planned, asked) = (plan.blocks.len(), self.asked.keys.len());
        if planned > asked {
            return Err(RESTORE.bad_reply(format!("a plan of {planned} blocks for {asked} keys")));
        }
        let read = |status| BlockStatus::from_wire(RESTORE, status);
        let blocks: Vec<_> = plan.blocks.iter().map(read).collect::<Result<_, _>>()?;
        let outlook = plan.outlook.as_ref().map(Outlook::from_wire);
        if let (Some(outlook), Some(two_ended)) = (&outlook, self.asked.two_ended) {
            let block_tokens = self.layouts.model().block_tokens;
            let expected = outlook.of_block(&blocks, block_tokens, two_ended.suffix_tokens);
            self.meeting.expect(expected);
        }
        self.ready.push_back(RestoreEvent::Plan(blocks));
        self.ready.extend(outlook.map(RestoreEvent::Outlook));
        Ok(())
    }

    /// Checks everything the daemon says about a leased block before a view is made (G1). Where it
    /// came from.
    fn leased(&mut self, block: &v1::LeasedBlock, lease: LeaseGuard) -> Result<Tier, Error> {
        let (index, key) = self.expected(block.index)?;
        let arena = self.link.arena.as_ref();
        let arena = arena.ok_or_else(|| RESTORE.bad_reply("a lease without an arena"))?;
        let length = block.slot.map_or(0, |slot| slot.length);
        let layout = self
            .layouts
            .of_length(self.asked.kind, block.tokens, length);
        let layout = layout.map_err(|error| RESTORE.bad_reply(error.to_string()))?;
        if let Some((region, slots)) = &self.asked.into {
            let placed = PlacedBlock::from_wire((index, key), block, (*region, slots), layout)?;
            let tier = placed.tier();
            self.hand_out(index, placed.quality(), RestoreEvent::Placed(placed))?;
            return Ok(tier);
        }
        let len = arena.map.len();
        let range = check::slot_range(block.slot.as_ref(), arena.number, len, &layout)
            .map_err(|problem| RESTORE.bad_reply(problem))?;
        let tier = Tier::from_wire(RESTORE, block.tier)?;
        let grade = grade_from_wire(RESTORE, block.level, block.quality)?;
        let view = LeasedView::new(Arc::clone(&arena.map), range, lease)
            .ok_or_else(|| RESTORE.bad_reply("a slot outside the arena"))?;
        let held = Held::Arena(view, Arc::clone(&self.link));
        let block = LeasedBlock::new((index, key), tier, grade, layout, held);
        self.hand_out(index, block.quality(), RestoreEvent::Ready(block))?;
        Ok(tier)
    }

    fn arrived(&mut self, block: InlineBlock) -> Result<(), Error> {
        let (index, key) = self.expected(block.index)?;
        let held = Held::Owned(block.bytes);
        let leased = LeasedBlock::new((index, key), block.tier, block.grade, block.layout, held);
        self.hand_out(index, leased.quality(), RestoreEvent::Ready(leased))
    }

    fn expected(&self, index: u32) -> Result<(usize, BlockKey), Error> {
        let asked = self.asked.keys.len();
        let at = usize::try_from(index).unwrap_or(usize::MAX);
        let key = self.asked.keys.get(at).copied();
        let key = key.ok_or_else(|| {
            RESTORE.bad_reply(format!("block {index} came, where {asked} were asked for"))
        })?;
        if self.came.get(at).copied().unwrap_or(true) {
            return Err(RESTORE.bad_reply(format!("block {index} came twice")));
        }
        Ok((at, key))
    }

    fn hand_out(
        &mut self,
        index: usize,
        quality: Quality,
        event: RestoreEvent,
    ) -> Result<(), Error> {
        if !self.asked.accept.accepts(quality) {
            let (got, accept) = (quality.as_str(), self.asked.accept.as_str());
            return Err(RESTORE.bad_reply(format!("a block is {got}; accepted: {accept}")));
        }
        if let Some(came) = self.came.get_mut(index) {
            *came = true;
        }
        self.lineage
            .raise(&self.asked, &mut self.behind, (index, quality));
        self.ready.push_back(event);
        Ok(())
    }

    fn done(&mut self, done: &v1::RestoreDone) -> Result<(), Error> {
        self.ended = true;
        if let Source::Mux(running) = &mut self.source {
            running.ended = true;
        }
        let asked = self.asked.keys.len();
        if done.missed.len() > asked {
            let missed = done.missed.len();
            return Err(RESTORE.bad_reply(format!("{missed} blocks missed of {asked}")));
        }
        let read = |missed: &v1::MissedBlock| {
            let index = usize::try_from(missed.index).unwrap_or(usize::MAX);
            let reason = miss_from_wire(RESTORE, missed.reason)?;
            Ok((index, reason))
        };
        let missed = done
            .missed
            .iter()
            .map(read)
            .collect::<Result<Vec<_>, Error>>()?;
        if missed.iter().any(|(index, _)| *index >= asked) {
            return Err(RESTORE.bad_reply("a missed block was not asked for"));
        }
        let covered = |(index, came): &(usize, &bool)| {
            **came || *index < self.reported || self.meeting.has(*index)
        };
        let came = self.came.iter().enumerate().take_while(covered).count();
        let said = usize::try_from(done.usable_blocks).unwrap_or(usize::MAX);
        // G2: the daemon may know of a reason to stop earlier, never of one to go further.
        self.ready.push_back(RestoreEvent::Done(RestoreSummary {
            usable_blocks: said.min(came),
            missed,
            cancelled: done.cancelled,
        }));
        Ok(())
    }
}
