//! The daemon's directories: made, locked, and looked at before anything is opened in them.
//!
//! Upstairs:   `process`.
//! Downstairs: the file system, and the ledger of disks that were seen before.
//!
//! The state directory, or the only disk, that cannot be used is an error. Of several disks each
//! that cannot be used is out of service, and the daemon starts with the others. A disk that was
//! seen before is not made anew in the place where it should be mounted: that would fill the file
//! system under it, and hide the disk when it comes back.

use std::fs::File;
use std::path::Path;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::{Failed, failed};
use crate::config::Config;
use crate::log::chain;
use crate::tier::disk::{Ledger, is_apart};

/// Descriptors that the rest of the process needs beside segments: a quarter of the limit.
const SPARE_SHARE: u64 = 4;

/// See the module.
pub(super) struct Directories {
    /// Held for as long as the daemon lives.
    pub(super) locks: Vec<File>,
    /// Of each disk: why it cannot be used.
    pub(super) unusable: Vec<Option<String>>,
    /// What is remembered of the disks.
    pub(super) ledger: Ledger,
}

/// Why a directory is not ours.
enum Refused {
    /// Another daemon has it: one of the two is configured wrongly.
    InUse(String),
    /// It cannot be used.
    Unusable(String),
}

impl Refused {
    fn into_failed(self) -> Failed {
        let (Self::InUse(why) | Self::Unusable(why)) = self;
        failed(why)
    }
}

impl Directories {
    /// Makes what is missing and locks everything, so that no second daemon works in it.
    pub(super) fn prepare(config: &Config) -> Result<Self, Failed> {
        let state = config.state.dir.as_path();
        let mut locks = vec![lock(state).map_err(Refused::into_failed)?];
        let ledger = Ledger::open(state).map_err(|problem| failed(chain(&problem)))?;
        let several = config.disks.len() > 1;
        if several {
            check_open_files(config, getrlimit(Resource::Nofile).current)?;
        }
        let mut unusable = Vec::new();
        for disk in &config.disks {
            let path = disk.path.as_path();
            let mounted = match several {
                true => check_mounted(path, &ledger),
                false => Ok(()),
            };
            let locked = mounted.and_then(|()| lock(path));
            unusable.push(match locked {
                Ok(lock) => {
                    locks.push(lock);
                    None
                }
                Err(Refused::Unusable(why)) if several => Some(why),
                Err(refused) => return Err(refused.into_failed()),
            });
        }
        Ok(Self {
            locks,
            unusable,
            ledger,
        })
    }
}

/// Is the disk there that was there before?
fn check_mounted(path: &Path, ledger: &Ledger) -> Result<(), Refused> {
    let Some(seen) = ledger.seen(path) else {
        return Ok(());
    };
    let shown = path.display();
    if !path.is_dir() {
        let why = format!("{shown} is gone: a disk was there before; mount it, or make it anew");
        return Err(Refused::Unusable(why));
    }
    if seen.apart() && !is_apart(path, ledger.state_dir()) {
        let state = ledger.state_dir().display();
        let why = format!(
            "{shown} is on the file system of {state} or of the root, and had one of its own before: \
             is it mounted?"
        );
        return Err(Refused::Unusable(why));
    }
    Ok(())
}

/// Each store looks at the limit of open files as if it were alone.
fn check_open_files(config: &Config, limit: Option<u64>) -> Result<(), Failed> {
    let disks = config.disks.iter();
    let segments = disks.map(|disk| disk.capacity.get() / disk.segment_size.get().max(1) + 1);
    let segments: u64 = segments.sum();
    let Some(limit) = limit.filter(|limit| segments > limit - limit / SPARE_SHARE) else {
        return Ok(());
    };
    let least = segments * SPARE_SHARE / (SPARE_SHARE - 1) + 1;
    Err(failed(format!(
        "the disks have {segments} segments in all, each an open file, and this process may open \
         {limit} files: raise LimitNOFILE= to {least}, or disk.segment_size"
    )))
}

fn lock(dir: &Path) -> Result<File, Refused> {
    use std::os::unix::fs::DirBuilderExt;
    let shown = dir.display();
    let say = |problem: std::io::Error| Refused::Unusable(format!("cannot use {shown}: {problem}"));
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(say)?;
    let file = File::create(dir.join("lock")).map_err(say)?;
    let how = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    match rustix::fs::flock(&file, how) {
        Ok(()) => Ok(file),
        Err(problem) => Err(not_locked(dir, problem)),
    }
}

fn not_locked(dir: &Path, problem: Errno) -> Refused {
    let shown = dir.display();
    match problem {
        Errno::WOULDBLOCK => Refused::InUse(format!(
            "{shown} is in use by another daemon (its lock is held)"
        )),
        _ => Refused::Unusable(format!("cannot lock {shown}: {problem}")),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn config(home: &Path, disks: &[&str]) -> Config {
        let state = home.join("state").display().to_string();
        let disk = |name: &&str| {
            let path = home.join(name).display().to_string();
            format!("[[disk]]\npath = {path:?}\ncapacity = \"64 MiB\"\nsegment_size = \"1 MiB\"\n")
        };
        let disks: String = disks.iter().map(disk).collect();
        Config::from_toml(&format!("[state]\ndir = {state:?}\n{disks}")).unwrap()
    }

    fn blocked(home: &Path) -> PathBuf {
        let path = home.join("file");
        std::fs::write(&path, "not a directory").unwrap();
        path
    }

    #[test]
    fn one_of_several_disks_that_cannot_be_used_is_named_and_the_only_one_is_an_error() {
        let home = tempfile::tempdir().unwrap();
        blocked(home.path());
        let several = Directories::prepare(&config(home.path(), &["a", "file/b"])).unwrap();
        assert_eq!(several.unusable[0], None);
        let why = several.unusable[1].as_ref().unwrap();
        assert!(why.contains("file/b"), "{why}");
        drop(several);
        let only = Directories::prepare(&config(home.path(), &["file/b"]));
        assert!(only.err().unwrap().to_string().contains("file/b"));
    }

    #[test]
    fn a_disk_of_another_daemon_is_an_error_however_many_there_are() {
        let home = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        let _locks = Directories::prepare(&config(home.path(), &["a"])).unwrap();
        let shared = home.path().join("a").display().to_string();
        let refused = Directories::prepare(&config(other.path(), &["b", &shared]));
        let why = refused.err().unwrap().to_string();
        assert!(why.contains("in use by another daemon"), "{why}");
    }

    // Goal: a device that fails is out of service, as ever; only a lock that is held is a mistake.
    #[test]
    fn a_lock_that_fails_is_no_other_daemon() {
        let is_in_use = |problem| matches!(not_locked(Path::new("/d"), problem), Refused::InUse(_));
        assert!(is_in_use(Errno::WOULDBLOCK));
        assert!(!is_in_use(Errno::IO) && !is_in_use(Errno::NOLCK) && !is_in_use(Errno::STALE));
    }

    #[test]
    fn more_segments_than_open_files_are_refused_with_the_limit_that_would_do() {
        let home = tempfile::tempdir().unwrap();
        let config = config(home.path(), &["a", "b"]);
        let check = |limit| check_open_files(&config, limit);
        let why = check(Some(150)).err().unwrap().to_string();
        assert!(why.contains("130 segments in all"), "{why}");
        assert!(why.contains("LimitNOFILE= to 174"), "{why}");
        assert!(check(Some(174)).is_ok() && check(None).is_ok());
    }
}
