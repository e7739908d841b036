//! A device that fails when a test says so, over real files.
//!
//! Upstairs:   tests of the disk tier and of the process break the device at a path.
//! Downstairs: any lane.
//!
//! Only tests have it: the thread wraps the lane of a path that a test has named.

use std::collections::HashMap;
use std::io::Error;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvtier_store::disk::{Disk, Done, FileId, Found, Op, OpKind, SubmitError, Wait, Waker};
use kvtier_store::mem::Arena;

/// How often the switch is looked at while the device hangs.
const LOOK: Duration = Duration::from_millis(1);

/// What the device does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mood {
    /// Reads answer EIO.
    pub(crate) reads_fail: bool,
    /// Writes answer EIO.
    pub(crate) writes_fail: bool,
    /// Syncs answer EIO.
    pub(crate) syncs_fail: bool,
    /// The lane takes no operation any more.
    pub(crate) gone: bool,
    /// The thread that uses the lane breaks.
    pub(crate) breaks: bool,
    /// No operation comes back.
    pub(crate) hangs: bool,
    /// The thread that uses the lane waits for it.
    pub(crate) stuck: bool,
}

impl Mood {
    /// Nothing.
    pub(crate) const GOOD: Self = Self {
        reads_fail: false,
        writes_fail: false,
        syncs_fail: false,
        gone: false,
        breaks: false,
        hangs: false,
        stuck: false,
    };
    /// Everything answers EIO.
    pub(crate) const DEAD: Self = Self {
        reads_fail: true,
        writes_fail: true,
        syncs_fail: true,
        ..Self::GOOD
    };
}

/// The switch of one device, kept by the test.
#[derive(Debug)]
pub(crate) struct Switch {
    mood: Mutex<Mood>,
    /// Operations that failed because of the mood.
    pub(crate) failed: AtomicU64,
    /// Looks of a thread that waits for the lane.
    looks: AtomicU64,
}

impl Switch {
    /// From now on.
    pub(crate) fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap_or_else(PoisonError::into_inner) = mood;
    }

    /// Waits until the thread is stuck: it may have gone to sleep before it was to be. `wake` is
    /// anything that wakes it.
    pub(crate) async fn until_stuck<T>(&self, wake: impl AsyncFn() -> T) {
        let before = self.looks.load(Ordering::SeqCst);
        while self.looks.load(Ordering::SeqCst) == before {
            wake().await;
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The mood, once it lets go of the thread.
    fn mood(&self) -> Mood {
        loop {
            let mood = *self.mood.lock().unwrap_or_else(PoisonError::into_inner);
            if !mood.stuck {
                return mood;
            }
            self.looks.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(LOOK);
        }
    }
}

static SWITCHES: Mutex<Option<HashMap<PathBuf, Arc<Switch>>>> = Mutex::new(None);

/// The switch of the device at `path`, for stores that are opened there from now on.
pub(crate) fn switch(path: &Path) -> Arc<Switch> {
    let switch = Arc::new(Switch {
        mood: Mutex::new(Mood::GOOD),
        failed: AtomicU64::new(0),
        looks: AtomicU64::new(0),
    });
    let mut switches = SWITCHES.lock().unwrap_or_else(PoisonError::into_inner);
    let switches = switches.get_or_insert_default();
    switches.insert(path.to_owned(), Arc::clone(&switch));
    switch
}

/// The lane, with the switch of its path if there is one.
pub(super) fn on(path: &Path, lane: Box<dyn Disk + Send>) -> Box<dyn Disk + Send> {
    let switches = SWITCHES.lock().unwrap_or_else(PoisonError::into_inner);
    match switches.as_ref().and_then(|switches| switches.get(path)) {
        Some(switch) => Box::new(Faulty {
            lane,
            switch: Arc::clone(switch),
            failed: Vec::new(),
            hanging: Vec::new(),
        }),
        None => lane,
    }
}

#[derive(Debug)]
struct Faulty {
    lane: Box<dyn Disk + Send>,
    switch: Arc<Switch>,
    /// Operations that the device was never asked for.
    failed: Vec<Done>,
    /// Operations that the device has not begun with.
    hanging: Vec<Op>,
}

impl Disk for Faulty {
    fn list(&mut self) -> std::io::Result<Vec<Found>> {
        self.switch.mood();
        self.lane.list()
    }

    fn open(&mut self, name: &str) -> std::io::Result<FileId> {
        self.lane.open(name)
    }

    fn create(&mut self, name: &str, len: u64) -> std::io::Result<FileId> {
        if self.switch.mood().writes_fail {
            return Err(Error::from_raw_os_error(5));
        }
        self.lane.create(name, len)
    }

    fn remove(&mut self, file: FileId) -> std::io::Result<()> {
        self.lane.remove(file)
    }

    fn close(&mut self, file: FileId) {
        self.lane.close(file);
    }

    fn submit(&mut self, op: Op) -> Result<(), (Op, SubmitError)> {
        let mood = self.switch.mood();
        assert!(!mood.breaks, "this device breaks its thread on purpose");
        if mood.gone {
            return Err((op, SubmitError::Failed));
        }
        if mood.hangs {
            self.hanging.push(op);
            return Ok(());
        }
        let fails = match op.kind {
            OpKind::Read => mood.reads_fail,
            OpKind::Write => mood.writes_fail,
            OpKind::Sync => mood.syncs_fail,
        };
        if !fails {
            return self.lane.submit(op);
        }
        self.switch.failed.fetch_add(1, Ordering::SeqCst);
        self.failed.push(Done {
            user: op.user,
            kind: op.kind,
            buf: op.buf,
            more: op.more,
            moved: Err(Error::from_raw_os_error(5)),
        });
        Ok(())
    }

    fn reap(&mut self, wait: Wait, done: &mut Vec<Done>) {
        if !self.switch.mood().hangs {
            while let Some(op) = self.hanging.pop() {
                if let Err((op, _)) = self.lane.submit(op) {
                    self.hanging.push(op);
                    break;
                }
            }
        }
        let wait = match (self.failed.is_empty(), self.hanging.is_empty()) {
            (false, _) => Wait::No,
            (true, false) if wait != Wait::No => Wait::For(LOOK),
            _ => wait,
        };
        done.append(&mut self.failed);
        self.lane.reap(wait, done);
    }

    fn in_flight(&self) -> usize {
        self.lane.in_flight() + self.failed.len() + self.hanging.len()
    }

    fn depth(&self) -> usize {
        self.lane.depth()
    }

    fn files_max(&self) -> u64 {
        self.lane.files_max()
    }

    fn align(&self) -> usize {
        self.lane.align()
    }

    fn attach(&mut self, arena: &Arc<Arena>) -> Option<String> {
        self.lane.attach(arena)
    }

    fn waker(&self) -> Waker {
        self.lane.waker()
    }

    fn lane(&self) -> &'static str {
        self.lane.lane()
    }
}
