//! Restarts of the real daemon over a store of many blocks: time to the first hit, and memory.
//!
//! Upstairs:   `index`.
//! Downstairs: the `kvtierd` of the same build, `kvtier_client`; `index::bed` for the blocks that
//!             are only there to be catalogued.
//!
//! The clock starts before exec and stops when a block that was saved in an earlier life lies
//! verified in this process. The same daemon with that one block only stands beside it: what a
//! process, its host memory and a session take is in both.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvtier_benches::launch;
use kvtier_benches::report::{Problem, Report};
use kvtier_client::{
    Acknowledge, BlockKey, Bytes, Client, ConnectOptions, Endpoint, PayloadKind, RestoreOptions,
    SaveBlock, Session, SessionOptions, Tier,
};
use kvtier_proto::units::MIB;
use rustix::process::{Pid, Signal, kill_process};

use super::bed::{Shape, anonymous_bytes, forget_pages};
use super::{BLOCK_BYTES_BAR, FIRST_HIT_BAR, at_most};
use crate::planes::daemon::{Room, binary, configuration};
use crate::planes::{BLOCK_TOKENS, block_to_save, model};

/// How long a start or a stop may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Host memory, as much as a configuration that says nothing has. Unit: MiB.
const HOST_MIB: usize = 1024;

/// Values of each round.
#[derive(Debug, Default)]
struct Rounds {
    first_hit: Vec<f64>,
    recovery: Vec<f64>,
    stop: Vec<f64>,
    memory: Vec<f64>,
}

/// How a life ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    InOrder,
    Killed,
}

/// Measures and adds the rows.
pub(super) fn measure(
    dir: &Path,
    blocks: u64,
    rounds: usize,
    report: &mut Report,
) -> Result<(), Problem> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let home = tempfile::Builder::new()
        .prefix("kvtier-bench-")
        .tempdir_in(dir)?;
    let mut bed = Bed::make(home.path(), blocks)?;
    let alone = runtime.block_on(bed.rounds(rounds, End::InOrder))?;
    let namespace = bed.namespace.ok_or("no session was opened")?;
    let shape = Shape {
        namespace,
        ..Shape::full_segments(blocks)
    };
    shape.fill(&home.path().join("disk"))?.close();
    let in_order = runtime.block_on(bed.rounds(rounds, End::InOrder))?;
    let killed = runtime.block_on(bed.rounds(rounds, End::Killed))?;
    report.note(format!(
        "restart: {blocks} blocks; {HOST_MIB} MiB of host memory; after kill -9 one open segment \
         of 256 MiB is walked"
    ));
    report.row("restart.alone.first_hit.s", "s", &alone.first_hit);
    at_most(
        report,
        ("restart.first_hit.s", "s"),
        &in_order.first_hit,
        FIRST_HIT_BAR,
    );
    report.row("restart.store_opening.s", "s", &in_order.recovery);
    report.row("restart.stop.s", "s", &in_order.stop);
    report.row("restart.killed.first_hit.s", "s", &killed.first_hit);
    report.row("restart.killed.store_opening.s", "s", &killed.recovery);
    let base = alone.memory.iter().copied().fold(f64::INFINITY, f64::min);
    let per_block = |memory: &[f64]| -> Vec<f64> {
        let more = memory.iter().map(|bytes| (bytes - base) / blocks as f64);
        more.collect()
    };
    for (name, memory) in [("in_order", &in_order.memory), ("killed", &killed.memory)] {
        let name = format!("restart.daemon.{name}.bytes_per_block");
        at_most(report, (&name, "B"), &per_block(memory), BLOCK_BYTES_BAR);
    }
    Ok(())
}

/// A home that daemons start in again and again.
struct Bed {
    binary: PathBuf,
    home: PathBuf,
    saved: Vec<BlockKey>,
    namespace: Option<kvtier_proto::NamespaceId>,
}

impl Bed {
    fn make(home: &Path, blocks: u64) -> Result<Self, Problem> {
        let room = Room {
            host_mib: HOST_MIB,
            // Room for the blocks, and for those that the rounds save.
            disk: Some((Shape::full_segments(blocks).capacity() / MIB + 4096, 64)),
        };
        std::fs::write(home.join("kvtier.toml"), configuration(home, &room)?)?;
        Ok(Self {
            binary: binary()?,
            home: home.to_owned(),
            saved: Vec::new(),
            namespace: None,
        })
    }

    /// Starts, hits, and ends, again and again. The first life is not counted: it
    /// begins after an end of another kind.
    async fn rounds(&mut self, rounds: usize, end: End) -> Result<Rounds, Problem> {
        let mut measured = Rounds::default();
        for round in 0..=rounds {
            if self.home.join("disk/catalog").exists() {
                forget_pages(&self.home.join("disk"))?;
            }
            let begin = Instant::now();
            let mut life = Life::start(&self.binary, &self.home)?;
            let session = life.session().await?;
            if let Some(key) = self.saved.last() {
                restore(&session, *key).await?;
            }
            let first_hit = begin.elapsed().as_secs_f64();
            let memory = anonymous_bytes(&life.child.id().to_string())? as f64;
            let recovery = life.metric("kvtier_recovery_seconds")?;
            self.namespace = Some(session.namespace_id());
            // Whoever is killed leaves a segment open.
            if end == End::Killed || self.saved.is_empty() {
                let key = save(&session, self.saved.len() as u64).await?;
                self.saved.push(key);
            }
            drop(session);
            // The session's goodbye goes out while this runtime runs: the daemon need not wait.
            tokio::time::sleep(Duration::from_millis(50)).await;
            let stop = life.end(end)?;
            if round > 0 {
                measured.first_hit.push(first_hit);
                measured.memory.push(memory);
                measured.recovery.push(recovery);
                measured.stop.push(stop);
            }
        }
        Ok(measured)
    }
}

async fn restore(session: &Session, key: BlockKey) -> Result<(), Problem> {
    let options = RestoreOptions::default().scattered();
    let restore = session.restore(&[key], PayloadKind::Kv, options).await?;
    let mut right = 0;
    let visit = |leased: &kvtier_client::LeasedBlock, bytes: &[u8]| {
        let whole = bytes.get(..8) == key.0.get(..8) && leased.tier() == Tier::Disk;
        right += usize::from(whole);
    };
    restore.for_each(visit).await?;
    if right == 1 {
        Ok(())
    } else {
        Err("a block that was durable is not restored from the device".into())
    }
}

async fn save(session: &Session, number: u64) -> Result<BlockKey, Problem> {
    let block: SaveBlock = block_to_save(0x1d, number);
    let fill = |block: &SaveBlock, part: &kvtier_client::Part, bytes: &mut [u8]| {
        bytes.fill(1);
        if let (0, Some(start)) = (part.offset, bytes.get_mut(..8)) {
            start.copy_from_slice(block.key.0.get(..8).unwrap_or_default());
        }
    };
    let wait = Acknowledge::Durable;
    let saved = session.save_blocks(vec![block], wait, fill).await?;
    match saved.iter().find(|outcome| !outcome.is_stored(wait)) {
        Some(outcome) => Err(format!("a block did not become durable: {outcome:?}").into()),
        None => Ok(block.key),
    }
}

/// A daemon from exec to exit.
struct Life {
    child: Child,
    home: PathBuf,
}

impl Life {
    fn start(binary: &Path, home: &Path) -> Result<Self, Problem> {
        let mut command = Command::new(binary);
        launch::without_settings(&mut command);
        let child = command
            .arg("--config")
            .arg(home.join("kvtier.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(home.join("log"))?)
            .spawn()?;
        Ok(Self {
            child,
            home: home.to_owned(),
        })
    }

    /// A session as soon as there can be one.
    async fn session(&mut self) -> Result<Session, Problem> {
        let (socket, begin) = (self.home.join("sock"), Instant::now());
        while UnixStream::connect(&socket).is_err() {
            if let Some(status) = self.child.try_wait()? {
                return Err(
                    format!("kvtierd ended at its start: {status}\n{}", self.log()?).into(),
                );
            }
            if begin.elapsed() > PATIENCE {
                return Err(format!("kvtierd did not come up:\n{}", self.log()?).into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let client = Client::connect(Endpoint::unix(socket), ConnectOptions::default()).await?;
        let options = SessionOptions::new("kvtier-bench index").staging_bytes(Bytes::mib(8));
        let model = model("bench/index", 16, 8, BLOCK_TOKENS);
        Ok(client.open_session(&model, options).await?)
    }

    fn log(&self) -> Result<String, Problem> {
        Ok(std::fs::read_to_string(self.home.join("log"))?)
    }

    /// Value of a metric without labels.
    fn metric(&self, name: &str) -> Result<f64, Problem> {
        let address = launch::serving(&self.log()?).ok_or("the daemon does not serve")?;
        let (_, page) = launch::page(address, "/metrics")?;
        let value = page
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(value
            .ok_or_else(|| format!("no metric {name}"))?
            .trim()
            .parse()?)
    }

    /// Ends the daemon. Returns the seconds that it took.
    fn end(mut self, end: End) -> Result<f64, Problem> {
        let begin = Instant::now();
        let signal = match end {
            End::InOrder => Signal::TERM,
            End::Killed => Signal::KILL,
        };
        let pid = Pid::from_raw(i32::try_from(self.child.id())?).ok_or("no process")?;
        kill_process(pid, signal)?;
        let status = self.child.wait()?;
        if end == End::InOrder && !status.success() {
            return Err(format!("kvtierd did not stop in order: {status}\n{}", self.log()?).into());
        }
        Ok(begin.elapsed().as_secs_f64())
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
