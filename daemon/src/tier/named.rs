//! What a stored record says of itself: asked of the record, before anybody restores it.
//!
//! Upstairs:   `explain`.
//! Downstairs: `disk` reads the head, `codecs` knows what is loaded, `unreadable` remembers.
//!
//! Not here on purpose: no part in lookups. They answer thousands of blocks at a time without a
//! read; that a level has no tables at all they know, and of which ones, they hear.

use kvtier_store::Header;
use tokio::time::timeout;

use super::disk::OnDisk;
use super::scratch::Line;
use super::{ROOM_WAIT, Tiers};
use crate::block::BlockId;

impl Tiers {
    /// The head of a record; `None` when it cannot be read.
    pub async fn head(&self, id: BlockId, stored: &OnDisk) -> Option<Header> {
        let disk = self.disk.as_ref()?;
        let buf = self
            .scratch
            .take(stored.place.head_len as usize, Line::Load);
        let buf = timeout(ROOM_WAIT, buf).await.ok().flatten()?;
        let head = disk.head(id, buf, stored.device).await.ok()?;
        let same = head.place() == stored.place;
        let record = head.verify().ok().filter(|_| same)?;
        Some(record.head().header)
    }

    /// The tables that a stored block needs and that are not loaded, as its head says. 0 where it
    /// is certain that they are not, and the head could not be read.
    pub fn missing_tables(
        &self,
        id: BlockId,
        stored: &OnDisk,
        head: Option<&Header>,
    ) -> Option<u32> {
        if !stored.level.needs_tables() {
            return None;
        }
        let at = (stored.device, stored.place);
        if let Some(tables) = self.unreadable.tables(&id, &at) {
            return Some(tables);
        }
        let Some(head) = head else {
            return (!self.codecs.decodes(stored, None)).then_some(0);
        };
        let tables = head.codec_tables;
        if self.codecs.decodes(stored, Some(tables)) {
            return None;
        }
        self.unreadable.add(id, at, tables);
        Some(tables)
    }
}
