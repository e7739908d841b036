//! Which tables a stored record needs: asked of the record itself, before anybody restores it.
//!
//! Upstairs:   `explain`.
//! Downstairs: `disk` reads the head, `codecs` knows what is loaded, `unreadable` remembers.
//!
//! Not here on purpose: no part in lookups. They answer thousands of blocks at a time without a
//! read; that a level has no tables at all they know, and of which ones, they hear.

use tokio::time::timeout;

use super::disk::OnDisk;
use super::scratch::Line;
use super::{ROOM_WAIT, Tiers};
use crate::block::BlockId;

impl Tiers {
    /// The tables that a stored block needs and that are not loaded. 0 where it is certain that
    /// they are not, and the record does not say which.
    pub async fn missing_tables(&self, id: BlockId, stored: &OnDisk) -> Option<u32> {
        if !stored.level.needs_tables() {
            return None;
        }
        let at = (stored.device, stored.place);
        if let Some(tables) = self.unreadable.tables(&id, &at) {
            return Some(tables);
        }
        let Some(tables) = self.named_in(id, stored).await else {
            return (!self.codecs.decodes(stored, None)).then_some(0);
        };
        if self.codecs.decodes(stored, Some(tables)) {
            return None;
        }
        self.unreadable.add(id, at, tables);
        Some(tables)
    }

    /// The tables that the head of a record names; `None` when it cannot be read.
    async fn named_in(&self, id: BlockId, stored: &OnDisk) -> Option<u32> {
        let disk = self.disk.as_ref()?;
        let buf = self
            .scratch
            .take(stored.place.head_len as usize, Line::Load);
        let buf = timeout(ROOM_WAIT, buf).await.ok().flatten()?;
        let head = disk.head(id, buf, stored.device).await.ok()?;
        let same = head.place() == stored.place;
        let record = head.verify().ok().filter(|_| same)?;
        Some(record.head().header.codec_tables)
    }
}
