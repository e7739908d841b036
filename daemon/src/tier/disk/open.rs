//! Opening the disk tier: every device at once, with those that work.
//!
//! Upstairs:   `process`, before anything is served.
//! Downstairs: `device`, `ledger`, `roll`.
//!
//! ```text
//!   all devices open, side by side -> who is who -> wipes that they missed -> ledger -> serve
//! ```
//! A single device that does not open is an error. Of several, each that does not is out of
//! service, and said so; none at all is an error.
//!
//! Invariants kept here
//!   P3  A device serves nothing before it has forgotten what the ledger says was wiped, and the
//!       ledger knows that it has.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use kvtier_proto::{Bytes, NamespaceId};
use kvtier_store::DeviceState;
use tokio::sync::Mutex;

use super::device::{Command, DiskOptions, Handle, Opening};
use super::ledger::{Ledger, Owed, Seen};
use super::place::Share;
use super::roll::Roll;
use super::{DiskStatus, DiskTier, Slot};
use crate::health::Health;
use crate::log::chain;
use crate::metrics::Metrics;

impl DiskTier {
    /// Starts a thread for each device, opens the stores and waits until their indices are whole.
    /// Progress of the recoveries shows in `health`.
    ///
    /// # Errors
    /// The only device cannot be used, or none of several can; or the ledger does not take what
    /// must be in it. Damage is no error.
    pub async fn open(
        devices: Vec<DiskOptions>,
        ledger: Ledger,
        health: Arc<Health>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, String> {
        let begin = Instant::now();
        metrics.set_devices(devices.len());
        let roll = Arc::new(Roll::new(devices.len(), health, Arc::clone(&metrics)));
        let paths: Vec<_> = devices.iter().map(|one| one.path.clone()).collect();
        let mut slots = open_all(devices, &roll).await;
        twins_apart(&mut slots, &roll);
        let mut ledger = ledger;
        for (slot, path) in slots.iter().zip(&paths) {
            if let Some(handle) = &slot.handle {
                ledger.see(
                    path,
                    Seen::new(handle.id, is_apart(path, ledger.state_dir())),
                );
            }
        }
        catch_up(&mut slots, &mut ledger, &roll).await?;
        if slots.iter().all(|slot| slot.handle.is_none()) {
            let problems = slots.iter().map(|slot| slot.status.problem.as_str());
            return Err(problems.collect::<Vec<_>>().join("; "));
        }
        let share = |(slot, path): (&Slot, &PathBuf)| {
            let seen = || ledger.seen(path).and_then(Seen::id);
            let id = slot.handle.as_ref().map(|handle| handle.id).or_else(seen)?;
            let capacity = Bytes(slot.status.capacity_bytes);
            Some(Share::new(id, capacity))
        };
        let shares = slots.iter().zip(&paths).map(share).collect();
        let tier = Self {
            slots,
            shares,
            ledger: Mutex::new(ledger),
        };
        let blocks: u64 = tier.status().iter().map(|status| status.blocks).sum();
        let blocks = i64::try_from(blocks).unwrap_or(i64::MAX);
        metrics.recovered_blocks.of(()).set(blocks);
        let seconds = begin.elapsed().as_secs_f64();
        metrics.recovery_seconds.of(()).set(seconds);
        Ok(tier)
    }
}

/// Opens every device; one that does not open has no handle, and its status says why.
async fn open_all(devices: Vec<DiskOptions>, roll: &Arc<Roll>) -> Vec<Slot> {
    let start = |options: DiskOptions| {
        let status = DiskStatus::new(&options);
        let opening = match options.unusable.clone() {
            Some(problem) => Err(problem),
            None => Opening::start(options, Arc::clone(roll)),
        };
        (status, opening)
    };
    let openings: Vec<_> = devices.into_iter().map(start).collect();
    let mut slots = Vec::new();
    for (status, opening) in openings {
        let opened = match opening {
            Ok(opening) => opening.done().await,
            Err(problem) => Err(problem),
        };
        let mut slot = Slot {
            status,
            handle: None,
        };
        match opened {
            Ok(handle) => slot.handle = Some(handle),
            Err(problem) => slot.take_out(problem, roll),
        }
        slots.push(slot);
    }
    slots
}

/// Two copies of one store would each be taken for the other: the first one serves.
fn twins_apart(slots: &mut [Slot], roll: &Roll) {
    let mut known = Vec::new();
    for slot in slots {
        let Some(id) = slot.handle.as_ref().map(|handle| handle.id) else {
            continue;
        };
        match known.iter().find(|(other, _)| *other == id) {
            Some((_, first)) => {
                let problem = format!("{} holds a copy of the store in {first}", slot.status.path);
                slot.take_out(problem, roll);
            }
            None => known.push((id, slot.status.path.clone())),
        }
    }
}

impl Slot {
    /// The device is out of service until a restart.
    fn take_out(&mut self, problem: String, roll: &Roll) {
        let device = self.status.device;
        tracing::error!(
            device = device.number(),
            path = self.status.path,
            problem,
            "a disk is out of service; its blocks are misses until it is back and the daemon is \
             restarted"
        );
        roll.state(device, DeviceState::Failed, &problem);
        self.status.fail(problem);
        // Its thread, if it has one, closes the store and ends.
        self.handle = None;
    }
}

/// Every device forgets what was wiped without it, and the ledger hears of it before anything is
/// served. That it is in the superblock too can wait: the next start would find out.
async fn catch_up(slots: &mut [Slot], ledger: &mut Ledger, roll: &Roll) -> Result<(), String> {
    let mut taken = Vec::new();
    for (at, slot) in slots.iter_mut().enumerate() {
        match forget_owed(slot, ledger).await {
            Ok(namespaces) => taken.extend(namespaces.into_iter().map(|one| (at, one))),
            Err(problem) => slot.take_out(problem, roll),
        }
    }
    ledger.write().await.map_err(|problem| chain(&problem))?;
    for (at, namespace) in taken {
        let Some(slot) = slots.get(at) else { continue };
        if let Some(Err(problem)) = slot.keep_wipes(namespace).await {
            tracing::warn!(
                device = slot.status.device.number(),
                namespace = namespace.0,
                problem,
                "a wipe that was made up for is not durable on its disk; every start repeats it"
            );
        }
    }
    Ok(())
}

/// Namespaces that one device has forgotten now, because it had missed their wipes.
async fn forget_owed(slot: &Slot, ledger: &mut Ledger) -> Result<Vec<NamespaceId>, String> {
    let Some(handle) = &slot.handle else {
        return Ok(Vec::new());
    };
    let mut taken = Vec::new();
    for Owed { namespace, below } in owed(handle, ledger).await? {
        let forget = handle.ask(|reply| Command::Forget {
            namespace,
            below,
            reply,
        });
        let forgotten = forget.await.ok_or_else(ended)?;
        tracing::warn!(
            device = slot.status.device.number(),
            namespace = namespace.0,
            blocks = forgotten.blocks,
            "a disk had missed a wipe of this namespace; it is wiped now"
        );
        ledger.join(namespace, handle.id, forgotten.below);
        taken.push(namespace);
    }
    Ok(taken)
}

async fn owed(handle: &Handle, ledger: &Ledger) -> Result<Vec<Owed>, String> {
    let namespaces = ledger.namespaces();
    let ask = handle.ask(|reply| Command::WipedBelow {
        namespaces: namespaces.clone(),
        reply,
    });
    let below = ask.await.ok_or_else(ended)?;
    let said = |namespace| {
        let at = namespaces.iter().position(|one| *one == namespace);
        at.and_then(|at| below.get(at).copied()).unwrap_or(0)
    };
    Ok(ledger.owed(handle.id, said))
}

fn ended() -> String {
    "the disk thread ended while it took wipes that it had missed".to_owned()
}

/// True when `path` lies on another file system than the daemon's own state. Unknown counts as
/// the same.
pub fn is_apart(path: &Path, state_dir: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| std::fs::metadata(path).map(|found| found.dev()).ok();
    let (one, other) = (device(path), device(state_dir));
    one.is_some() && other.is_some() && one != other
}
