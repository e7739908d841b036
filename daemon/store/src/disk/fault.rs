//! A lane that fails when a file in its directory says so: for tests of the real daemon.
//!
//! Upstairs:   `disk::lane` puts it around the lane that it chose.
//! Downstairs: that lane.
//!
//! Only builds with debug assertions have it, and there only a directory that holds a file named
//! `faults` when it is opened. The file is read again before every call, so a fault begins and
//! ends when the file changes. One rule a line, the first that matches strikes:
//!
//! ```text
//!   CALL EFFECT [after=N] [times=N]      # what follows this mark is a remark
//!   CALL    read write sync list open create remove any
//!   EFFECT  eio enospc erofs eacces      the call fails
//!           lost                         a write or sync reports success and does nothing
//!           flip                         one bit of a read is wrong
//!           delay_ms=N                   a read, write or sync begins so much later
//!   after   calls that pass before it strikes; times: how often it strikes; else for ever
//! ```
//!
//! Each strike is a line of the file `faults.struck` beside it, so that a test can tell a fault
//! that was survived from one that never happened.
//!
//! Invariants kept here
//!   D1  An operation that fails here never reached the lane below; its buffer comes home.
//!
//! Not here on purpose: no seed and no chance. What a test asks for happens, each time; for
//! everything at once under a seed there is `disk::sim`.

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::lane::Lane;
use super::{Disk, Done, FileId, Found, Op, OpKind, SubmitError, Wait, Waker};
use crate::mem::Arena;

/// Name of the file with the rules.
pub const FILE: &str = "faults";
/// Name of the file with what they did: `CALL EFFECT`, one line each.
pub const STRUCK: &str = "faults.struck";
/// Longest pause of [`Disk::reap`] while an operation is held back: commands of other threads
/// wait no longer than this.
const PAUSE: Duration = Duration::from_millis(1);

/// What a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::EnumString, strum::Display)]
#[strum(serialize_all = "snake_case")]
enum Call {
    Read,
    Write,
    Sync,
    List,
    Open,
    Create,
    Remove,
    Any,
}

/// What happens to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    Fail(Errno),
    Lost,
    Flip,
    Delay(Duration),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    call: Call,
    effect: Effect,
    /// Calls that still pass.
    after: u64,
    /// Strikes that are left.
    times: u64,
}

/// The lane below, and what is to go wrong with it.
#[derive(Debug)]
struct FaultLane {
    inner: Box<dyn Disk + Send>,
    file: PathBuf,
    /// The file as it was read last.
    text: String,
    rules: Vec<Rule>,
    /// Operations that came to their end here.
    ready: Vec<Done>,
    /// Operations that begin later.
    held: Vec<(Instant, Op)>,
    /// Reads that come back with a wrong bit, and where.
    flips: BTreeMap<u64, usize>,
}

/// Puts a fault lane around `lane` when the directory asks for one.
pub(super) fn around(path: &Path, lane: Lane) -> std::io::Result<Lane> {
    let file = path.join(FILE);
    let text = match std::fs::read_to_string(&file) {
        Err(problem) if problem.kind() == ErrorKind::NotFound => return Ok(lane),
        read => read?,
    };
    let rules = rules(&text).map_err(|what| Error::new(ErrorKind::InvalidInput, what))?;
    tracing::warn!(file = %file.display(), "faults are injected into this lane");
    let Lane { disk, mut report } = lane;
    let without = format!("{} injects faults: remove it", file.display());
    report.without.push(without);
    let disk = Box::new(FaultLane {
        inner: disk,
        file,
        text,
        rules,
        ready: Vec::new(),
        held: Vec::new(),
        flips: BTreeMap::new(),
    });
    Ok(Lane { disk, report })
}

/// Reads the rules, or says which line is none.
fn rules(text: &str) -> Result<Vec<Rule>, String> {
    let mut rules = Vec::new();
    for line in text.lines() {
        let rule = line.split('#').next().unwrap_or_default().trim();
        if !rule.is_empty() {
            let bad = || {
                format!(
                    "{rule:?} in {FILE} is no rule; write CALL EFFECT [after=N] [times=N] with a \
                     call of read, write, sync, list, open, create, remove, any and an effect of \
                     eio, enospc, erofs, eacces, lost, flip, delay_ms=N"
                )
            };
            rules.push(Rule::read(rule).ok_or_else(bad)?);
        }
    }
    Ok(rules)
}

impl Rule {
    fn read(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        let call = words.next()?.parse().ok()?;
        let effect = match words.next()? {
            "eio" => Effect::Fail(Errno::IO),
            "enospc" => Effect::Fail(Errno::NOSPC),
            "erofs" => Effect::Fail(Errno::ROFS),
            "eacces" => Effect::Fail(Errno::ACCESS),
            "lost" => Effect::Lost,
            "flip" => Effect::Flip,
            word => {
                let ms = word.strip_prefix("delay_ms=")?.parse().ok()?;
                Effect::Delay(Duration::from_millis(ms))
            }
        };
        let (mut after, mut times) = (0, u64::MAX);
        for word in words {
            match word.split_once('=')? {
                ("after", n) => after = n.parse().ok()?,
                ("times", n) => times = n.parse().ok()?,
                _ => return None,
            }
        }
        Some(Self {
            call,
            effect,
            after,
            times,
        })
    }

    /// True when the effect means anything for the call.
    fn can_strike(&self, call: Call) -> bool {
        let about = self.call == call || self.call == Call::Any;
        about
            && match self.effect {
                Effect::Fail(_) => true,
                Effect::Lost => matches!(call, Call::Write | Call::Sync),
                Effect::Flip => call == Call::Read,
                Effect::Delay(_) => matches!(call, Call::Read | Call::Write | Call::Sync),
            }
    }
}

impl FaultLane {
    /// What happens to this call, if anything.
    fn strike(&mut self, call: Call) -> Option<Effect> {
        let now = std::fs::read_to_string(&self.file).unwrap_or_default();
        if now != self.text {
            match rules(&now) {
                Ok(rules) => self.rules = rules,
                Err(what) => tracing::error!(what, "the rules stay as they were"),
            }
            self.text = now;
        }
        for rule in self.rules.iter_mut().filter(|rule| rule.can_strike(call)) {
            if rule.after > 0 {
                rule.after -= 1;
            } else if rule.times > 0 {
                rule.times -= 1;
                let effect = rule.effect;
                tracing::debug!(%call, ?effect, "a fault was injected");
                self.note(call, effect);
                return Some(effect);
            }
        }
        None
    }

    /// Writes down that a rule struck.
    fn note(&self, call: Call, effect: Effect) {
        let path = self.file.with_file_name(STRUCK);
        let file = std::fs::File::options()
            .append(true)
            .create(true)
            .open(path);
        let written = file.and_then(|mut file| writeln!(file, "{call} {effect:?}"));
        if let Err(problem) = written {
            tracing::error!(%problem, "a strike is not written down");
        }
    }

    /// Fails a call of the cold lane when a rule says so.
    fn cold(&mut self, call: Call) -> std::io::Result<()> {
        match self.strike(call) {
            Some(Effect::Fail(errno)) => Err(errno.into()),
            _ => Ok(()),
        }
    }

    /// Hands over what was held back long enough.
    fn release(&mut self) {
        let now = Instant::now();
        let (due, held) = std::mem::take(&mut self.held)
            .into_iter()
            .partition(|(begin, _)| *begin <= now);
        self.held = held;
        for (begin, op) in due {
            match self.inner.submit(op) {
                Ok(()) => {}
                Err((op, SubmitError::Full { .. })) => self.held.push((begin, op)),
                Err((op, failed)) => self.ready.push(op.done(Err(Error::other(failed)))),
            }
        }
    }

    /// Turns bits over in reads that were chosen for it.
    fn spoil(&mut self, done: &mut [Done]) {
        for one in done {
            let Some(at) = self.flips.remove(&one.user) else {
                continue;
            };
            if let (Some(buf), Ok(1..)) = (one.buf.as_mut(), &one.moved)
                && let Some(byte) = buf.get_mut(at)
            {
                *byte ^= 0x10;
            }
        }
    }
}

impl Disk for FaultLane {
    fn list(&mut self) -> std::io::Result<Vec<Found>> {
        self.cold(Call::List)?;
        self.inner.list()
    }

    fn open(&mut self, name: &str) -> std::io::Result<FileId> {
        self.cold(Call::Open)?;
        self.inner.open(name)
    }

    fn create(&mut self, name: &str, len: u64) -> std::io::Result<FileId> {
        self.cold(Call::Create)?;
        self.inner.create(name, len)
    }

    fn remove(&mut self, file: FileId) -> std::io::Result<()> {
        self.cold(Call::Remove)?;
        self.inner.remove(file)
    }

    fn close(&mut self, file: FileId) {
        self.inner.close(file);
    }

    fn submit(&mut self, op: Op) -> Result<(), (Op, SubmitError)> {
        if self.in_flight() >= self.depth() {
            let depth = u32::try_from(self.depth()).unwrap_or(u32::MAX);
            return Err((op, SubmitError::Full { depth }));
        }
        let call = match op.kind {
            OpKind::Read => Call::Read,
            OpKind::Write => Call::Write,
            OpKind::Sync => Call::Sync,
        };
        match self.strike(call) {
            None => return self.inner.submit(op),
            Some(Effect::Fail(errno)) => self.ready.push(op.done(Err(errno.into()))),
            Some(Effect::Lost) => {
                let moved = op.total();
                self.ready.push(op.done(Ok(moved)));
            }
            Some(Effect::Flip) => {
                let (user, at) = (op.user, op.buf_at + op.len / 2);
                self.inner.submit(op)?;
                self.flips.insert(user, at);
            }
            Some(Effect::Delay(pause)) => self.held.push((Instant::now() + pause, op)),
        }
        Ok(())
    }

    fn reap(&mut self, wait: Wait, done: &mut Vec<Done>) {
        let before = done.len();
        self.release();
        done.append(&mut self.ready);
        let wait = match done.len() == before && self.held.is_empty() {
            true => wait,
            false => Wait::No,
        };
        self.inner.reap(wait, done);
        self.spoil(done.get_mut(before..).unwrap_or_default());
        if done.len() == before && !self.held.is_empty() {
            std::thread::sleep(PAUSE);
        }
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.ready.len() + self.held.len()
    }

    fn depth(&self) -> usize {
        self.inner.depth()
    }

    fn files_max(&self) -> u64 {
        self.inner.files_max()
    }

    fn align(&self) -> usize {
        self.inner.align()
    }

    fn attach(&mut self, arena: &Arc<Arena>) -> Option<String> {
        self.inner.attach(arena)
    }

    fn waker(&self) -> Waker {
        self.inner.waker()
    }

    fn lane(&self) -> &'static str {
        self.inner.lane()
    }

    fn now(&self) -> Duration {
        self.inner.now()
    }
}

#[cfg(test)]
mod tests;
