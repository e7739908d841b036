//! Opening the disk tier: every device at once, with those that work.
//!
//! Upstairs:   `process`, before anything is served.
//! Downstairs: `device`, `ledger`, `roll`.
//!
//! ```text
//!   all devices open, side by side -> who is who -> wipes that they missed -> ledger -> serve
//! ```
//! A single device that does not open is an error. Of several, each that does not, or hangs, is out
//! of service, and said so; none at all is an error.
//!
//! Invariants kept here
//!   P3  A device serves nothing before it has forgotten what the ledger says was wiped, and the
//!       ledger knows that it has.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use kvtier_proto::{Bytes, NamespaceId};
use kvtier_store::DeviceState;
use tokio::sync::{Mutex, Notify};

use super::device::{Command, DiskOptions, Handle, Opening};
use super::late::Silent;
use super::ledger::{Ledger, Owed, Seen};
use super::place::Share;
use super::roll::Roll;
use super::{DiskStatus, DiskTier, Patience, Slot};
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
        Self::open_with(Patience::USUAL, devices, ledger, health, metrics).await
    }

    pub(super) async fn open_with(
        patience: Patience,
        devices: Vec<DiskOptions>,
        ledger: Ledger,
        health: Arc<Health>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, String> {
        let begin = Instant::now();
        let roll = Arc::new(Roll::new(devices.len(), health, Arc::clone(&metrics)));
        let paths: Vec<_> = devices.iter().map(|one| one.path.clone()).collect();
        let mut slots = open_all(devices, patience, &roll).await;
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
        catch_up(&mut slots, &mut ledger, patience, &roll).await?;
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
            left: Notify::new(),
            patience,
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
async fn open_all(devices: Vec<DiskOptions>, patience: Patience, roll: &Arc<Roll>) -> Vec<Slot> {
    // Without its only device the daemon could do nothing but end.
    let patience = (devices.len() > 1).then_some(patience.open);
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
            Ok(opening) => opening.done(patience).await,
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
        self.handle.take().into_iter().for_each(Handle::let_go);
    }
}

/// Every device forgets what was wiped without it, and the ledger hears of it before anything is
/// served. That it is in the superblock too can wait: the next start would find out.
async fn catch_up(
    slots: &mut [Slot],
    ledger: &mut Ledger,
    patience: Patience,
    roll: &Roll,
) -> Result<(), String> {
    let mut taken = Vec::new();
    for (at, slot) in slots.iter_mut().enumerate() {
        match forget_owed(slot, ledger, patience).await {
            Ok(namespaces) => taken.extend(namespaces.into_iter().map(|one| (at, one))),
            Err(problem) => slot.take_out(problem, roll),
        }
    }
    ledger.write().await.map_err(|problem| chain(&problem))?;
    for (at, namespace) in taken {
        let Some(handle) = slots.get(at).and_then(|slot| slot.handle.as_ref()) else {
            continue;
        };
        let keep = |reply| Command::KeepWipes { namespace, reply };
        let problem = match handle.ask_within(patience.get, keep).await {
            Ok(Ok(())) => continue,
            Ok(Err(problem)) => problem,
            Err(silent) => silent.to_string(),
        };
        tracing::warn!(
            device = handle.device().number(),
            namespace = namespace.0,
            problem,
            "a wipe that was made up for is not durable on its disk; every start repeats it"
        );
    }
    Ok(())
}

/// Namespaces that one device has forgotten now, because it had missed their wipes.
async fn forget_owed(
    slot: &Slot,
    ledger: &mut Ledger,
    patience: Patience,
) -> Result<Vec<NamespaceId>, String> {
    let Some(handle) = &slot.handle else {
        return Ok(Vec::new());
    };
    let mut taken = Vec::new();
    for Owed { namespace, below } in owed(handle, ledger, patience).await? {
        let forget = |reply| Command::Forget {
            namespace,
            below,
            reply,
        };
        let forgotten = handle.ask_within(patience.get, forget).await;
        let forgotten = forgotten.map_err(ended)?;
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

async fn owed(handle: &Handle, ledger: &Ledger, patience: Patience) -> Result<Vec<Owed>, String> {
    let namespaces = ledger.namespaces();
    let ask = |reply| Command::WipedBelow {
        namespaces: namespaces.clone(),
        reply,
    };
    let below = handle.ask_within(patience.get, ask).await.map_err(ended)?;
    let said = |namespace| {
        let at = namespaces.iter().position(|one| *one == namespace);
        at.and_then(|at| below.get(at).copied()).unwrap_or(0)
    };
    Ok(ledger.owed(handle.id, said))
}

fn ended(silent: Silent) -> String {
    format!("{silent} while it took wipes that it had missed")
}

/// True when `path` lies on a file system of its own, neither that of the daemon's state nor the
/// root's. Unknown counts as no.
pub fn is_apart(path: &Path, state_dir: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| std::fs::metadata(path).map(|found| found.dev()).ok();
    let others = [state_dir, Path::new("/")].map(device);
    own_device(device(path), others)
}

/// Whether a directory on the file system `own` can only be a mounted one.
fn own_device(own: Option<u64>, others: [Option<u64>; 2]) -> bool {
    own.is_some() && others.iter().all(|other| other.is_some() && *other != own)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: a disk that is not mounted is found out wherever its mount point is: under /var on a
    // file system of its own, and on the root's.
    #[test]
    fn a_disk_is_apart_from_the_state_directory_and_from_the_root() {
        let (root, var, disk) = (Some(1), Some(2), Some(3));
        assert!(own_device(disk, [var, root]) && own_device(disk, [root, root]));
        assert!(!own_device(root, [var, root]), "below /mnt, not mounted");
        assert!(!own_device(var, [var, root]), "below /var, not mounted");
        assert!(!own_device(None, [var, root]) && !own_device(disk, [None, root]));
    }
}
