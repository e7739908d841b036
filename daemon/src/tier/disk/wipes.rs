//! Wipes of a namespace on all devices: told at once, then made durable one after the other.
//!
//! Upstairs:   `Tiers::wipe`, which empties host memory around the first half.
//! Downstairs: each device's thread, and the ledger of the state directory.
//!
//! Invariants kept here
//!   P3  What a device is asked after the first half comes behind the wipe. A device that was away
//!       takes the wipe from the ledger before it serves.
//!   P2  The ledger names for each device below which sequence it forgot: what is acknowledged
//!       afterwards stays.
//!
//! Not here on purpose: no order among namespaces. One that waits for a device holds nobody up.

use kvtier_proto::NamespaceId;
use kvtier_store::{DeviceState, Forgotten, StoreId};

use super::device::{Command, Handle, Question};
use super::{DiskTier, Slot};

/// What a wipe did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wiped {
    /// Blocks that went.
    pub blocks: u64,
    /// Devices that are out of service, and take the wipe before they serve again.
    pub waiting: Vec<String>,
}

/// A wipe that every device has in its queue.
pub struct Forgetting {
    namespace: NamespaceId,
    asked: Vec<(StoreId, Question<Forgotten>)>,
}

impl DiskTier {
    /// First half of a wipe, on all devices at once: whatever they are asked from now on, they
    /// have forgotten the namespace. Nobody waits for a device, and none that hangs keeps it from
    /// others.
    pub fn forget(&self, namespace: NamespaceId) -> Forgetting {
        let ask = |handle: &Handle| {
            let forget = handle.ask_at_once(|reply| Command::Forget {
                namespace,
                below: None,
                reply,
            });
            (handle.id, forget)
        };
        Forgetting {
            namespace,
            asked: self.handles().map(ask).collect(),
        }
    }

    /// Second half: makes durable what was forgotten. It waits for every device, also for one that
    /// hangs, since nothing else would keep what was acknowledged there; no other namespace's wipe
    /// waits with it.
    ///
    /// Not cancel safe: run it to its end, and one at a time for a namespace, or the next wipe
    /// tells the ledger before this one does.
    ///
    /// # Errors
    /// The state directory, or some device that takes writes, did not take it; nothing that was
    /// saved before is served meanwhile.
    pub async fn wipe(&self, forgetting: Forgetting) -> Result<Wiped, String> {
        let Forgetting { namespace, asked } = forgetting;
        let mut wiped = Wiped::default();
        let mut bounds = Vec::new();
        for (id, answer) in asked {
            let Some(forgotten) = answer.await else {
                continue;
            };
            wiped.blocks += forgotten.blocks;
            bounds.push((id, forgotten.below));
        }
        let mut problems = Vec::new();
        {
            let mut ledger = self.ledger.lock().await;
            ledger.wipe(namespace, bounds);
            if let Err(problem) = ledger.write().await {
                problems.push(crate::log::chain(&problem));
            }
        }
        for slot in &self.slots {
            let Some(handle) = slot.writable() else {
                // From the ledger, before it serves again after a restart.
                wiped.waiting.push(slot.name());
                continue;
            };
            let kept = handle.ask_at_once(|reply| Command::KeepWipes { namespace, reply });
            match kept.await {
                Some(Ok(())) => {}
                Some(Err(problem)) => problems.push(format!("{}: {problem}", handle.device())),
                None => wiped.waiting.push(slot.name()),
            }
        }
        let failed = |slot: &Slot| slot.status().state == DeviceState::Failed;
        if problems.is_empty() && self.slots.iter().all(failed) {
            problems.push("no device is in service".to_owned());
        }
        match problems.is_empty() {
            true => Ok(wiped),
            false => Err(problems.join("; ")),
        }
    }
}
