//! What re-encoding asks of the devices: blocks that nobody uses, and another form of them.
//!
//! Upstairs:   `tier::recode`.
//! Downstairs: the devices' threads, which know what was used and own the stores.

use std::sync::Arc;

use kvtier_store::{DeviceState, RecordImage, Stored};
use tokio::sync::oneshot;

use super::device::{As, Command};
use super::{DiskTier, OnDisk, Slot};
use crate::metrics::Device;
use crate::sync::AtomicU64;
use crate::tier::host::Life;

impl DiskTier {
    /// Devices that serve, and how they do.
    pub fn serving(&self) -> Vec<(Device, DeviceState)> {
        let serving = self.slots.iter().filter_map(Slot::serving);
        serving.map(|one| (one.device(), one.state())).collect()
    }

    /// Blocks of the oldest sealed segment above `epoch` that nobody has used for long, by place;
    /// and the epoch of that segment.
    pub async fn cold_after(&self, device: Device, epoch: u64) -> Option<(u64, Vec<Stored>)> {
        let handle = self.handle(device)?;
        let cold = |reply| Command::Cold { epoch, reply };
        let cold = handle.ask_within(self.patience.look, cold).await;
        cold.unwrap_or_default()
    }

    /// A block is not cold, though nobody has read it from its device.
    pub fn touch(&self, found: &OnDisk) {
        if let Some(handle) = self.handle(found.device) {
            let (namespace, key) = (found.namespace, found.key);
            drop(handle.ask(|reply: oneshot::Sender<()>| Command::Touch {
                namespace,
                key,
                reply,
            }));
        }
    }

    /// Stores another form of a record in its place, on its device. Returns when it is durable.
    ///
    /// # Errors
    /// Why it is not stored, for the log. The record that was found stays where it was, unless it
    /// was replaced or has gone.
    pub async fn recode(
        &self,
        image: RecordImage,
        found: &OnDisk,
        lives: Arc<AtomicU64>,
        life: Life,
    ) -> Result<(), String> {
        let handle = self.handle(found.device).ok_or("the device has gone")?;
        let how = As::Form(found.stored);
        let put = handle.put(image, how, (lives, life), self.patience.put);
        put.await.map_err(|unstored| unstored.problem)
    }
}
