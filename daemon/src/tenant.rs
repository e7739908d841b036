//! Tenants: who a peer is, which namespace that gives it, and what the namespace owns.
//!
//! Upstairs:   `session` asks once, when a session opens; the answer is frozen for its life.
//! Downstairs: `tier::host` holds the namespace's blocks; a small file keeps numbers and secrets.
//!
//! A namespace comes from the authenticated peer and never from a field of a request. Its number
//! and secret are made once and kept in `namespaces.json`: losing that file loses access to the
//! blocks (they become misses), never mixes them up, because numbers are not handed out twice
//! while any record may carry them. Where records are and the file is not, numbers start anew at
//! a random place far from where they start otherwise.
//!
//! Invariants kept here
//!   N1  Two namespaces never share a number or a secret.
//!   N2  The secret is written before the first key is derived from it, and never logged.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvtier_proto::{Bytes, KeySecret, NamespaceId, Quality};
use kvtier_store::format::segment::segment_number;
use kvtier_store::mem::Pages;
use rand::TryRngCore;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::keep;
use crate::tier::host::HostTier;

const FILE: &str = "namespaces.json";
/// Least number that a daemon hands out which has records and has lost its numbers.
const FRESH_START: u32 = 1 << 16;
/// Share of a namespace's host memory that blocks on their way in through messages may take
/// beside it.
const INLINE_SHARE: u64 = 8;
/// Least of that memory, up to all of the quota. Unit: bytes.
const INLINE_MIN: u64 = 64 << 20;
const KEY_CONTEXT: &str = "kvtier 2026 block key secret";

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// A process on this host, as the kernel says.
    Unix {
        /// Effective user when it connected.
        uid: u32,
        /// Process, for status only: numbers are reused.
        pid: u32,
    },
    /// Somebody on the loopback address. TCP carries no identity.
    Tcp,
}

/// One namespace.
#[derive(Debug)]
pub struct Tenant {
    /// Number in records and metrics.
    pub id: NamespaceId,
    /// Name in the configuration.
    pub name: String,
    /// Secret that clients derive keys under.
    pub key_secret: KeySecret,
    /// Its host memory.
    pub host: Arc<HostTier>,
    /// Most staging memory of one session.
    pub staging_max: Bytes,
    inline: Arc<Semaphore>,
    inline_kib: u32,
}

impl Tenant {
    fn new(
        id: NamespaceId,
        secret: &[u8; 32],
        spec: &TenantSpec,
        pages: Pages,
    ) -> Result<Self, TenantError> {
        let quota = usize::try_from(spec.host_quota.get()).unwrap_or(usize::MAX);
        let host = HostTier::create(id, &spec.name, quota, pages).map_err(|source| {
            TenantError::Memory {
                name: spec.name.clone(),
                bytes: spec.host_quota,
                source,
            }
        })?;
        let share = (spec.host_quota.get() / INLINE_SHARE).max(INLINE_MIN);
        let inline = share.min(spec.host_quota.get()) / 1024;
        let inline_kib = u32::try_from(inline).unwrap_or(u32::MAX);
        Ok(Self {
            id,
            name: spec.name.clone(),
            key_secret: KeySecret::new(blake3::derive_key(KEY_CONTEXT, secret)),
            host: Arc::new(host.tolerating(spec.lowest_quality)),
            staging_max: spec.staging_max,
            inline: Arc::new(Semaphore::new(usize::try_from(inline_kib).unwrap_or(0))),
            inline_kib,
        })
    }

    /// Room for a block of `len` bytes that comes in messages; waits for it. A block larger than
    /// all the room there is takes all of it. `None` when there will be none.
    ///
    /// Cancel safety: nothing is taken until the future is ready.
    pub async fn inline_room(&self, len: usize) -> Option<OwnedSemaphorePermit> {
        let kib = u32::try_from(len.div_ceil(1024)).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.inline);
        room.acquire_many_owned(kib.min(self.inline_kib)).await.ok()
    }
}

/// What the namespaces are made from.
#[derive(Debug, Clone, Copy)]
pub struct TenantOptions<'a> {
    /// Directory of the file of numbers and secrets.
    pub state_dir: &'a Path,
    /// The namespaces.
    pub specs: &'a [TenantSpec],
    /// Namespace of TCP peers.
    pub tcp_namespace: Option<&'a str>,
    /// Users who may ask about and change the whole daemon.
    pub operators: &'a [u32],
    /// What host memory is made of.
    pub pages: Pages,
    /// Directories of the disk tier, whose records may carry numbers.
    pub disks: &'a [&'a Path],
}

/// What the configuration says of one namespace.
#[derive(Debug, Clone)]
pub struct TenantSpec {
    /// Name.
    pub name: String,
    /// Users it belongs to.
    pub uids: Vec<u32>,
    /// Host memory.
    pub host_quota: Bytes,
    /// Worst quality at which its blocks may be stored.
    pub lowest_quality: Quality,
    /// Most staging memory of one session.
    pub staging_max: Bytes,
}

/// Why the namespaces could not be set up. The daemon does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TenantError {
    /// The file of numbers and secrets cannot be read or written.
    #[error("cannot keep {path}")]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file of numbers and secrets is not what the daemon wrote.
    #[error(
        "{path} is damaged ({problem}); restore it, or remove it and the disk tier's files with it: \
         stored blocks cannot be found without their namespace's secret"
    )]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Host memory for a namespace cannot be had.
    #[error("cannot reserve {bytes} of host memory for namespace {name:?}")]
    Memory {
        /// Which namespace.
        name: String,
        /// How much.
        bytes: Bytes,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    next: u32,
    namespaces: BTreeMap<String, KeptOne>,
}

#[derive(Debug, Serialize, Deserialize)]
struct KeptOne {
    id: NamespaceId,
    secret: String,
}

/// All namespaces of this daemon.
#[derive(Debug)]
pub struct Tenants {
    by_name: BTreeMap<String, Arc<Tenant>>,
    by_uid: HashMap<u32, Arc<Tenant>>,
    tcp: Option<Arc<Tenant>>,
    operators: Vec<u32>,
}

impl Tenants {
    /// Reads or makes numbers and secrets in the state directory, and reserves host memory.
    pub fn open(options: &TenantOptions<'_>) -> Result<Self, TenantError> {
        let file = options.state_dir.join(FILE);
        let mut kept = Kept::read(&file, options.disks)?;
        let (mut by_name, mut by_uid) = (BTreeMap::new(), HashMap::new());
        for spec in options.specs {
            kept.ensure(&spec.name, &file)?;
        }
        kept.write(&file)?;
        for spec in options.specs {
            let (id, secret) = kept.get(&spec.name, &file)?;
            let tenant = Arc::new(Tenant::new(id, &secret, spec, options.pages)?);
            for uid in &spec.uids {
                by_uid.insert(*uid, Arc::clone(&tenant));
            }
            by_name.insert(spec.name.clone(), tenant);
        }
        let tcp = options.tcp_namespace;
        Ok(Self {
            tcp: tcp.and_then(|name| by_name.get(name).cloned()),
            by_name,
            by_uid,
            operators: options.operators.to_vec(),
        })
    }

    /// The namespace of a peer, if it has one.
    pub fn of(&self, peer: Peer) -> Option<Arc<Tenant>> {
        match peer {
            Peer::Unix { uid, .. } => self.by_uid.get(&uid).cloned(),
            Peer::Tcp => self.tcp.clone(),
        }
    }

    /// True for peers that may ask about and change the whole daemon.
    pub fn is_operator(&self, peer: Peer) -> bool {
        matches!(peer, Peer::Unix { uid, .. } if self.operators.contains(&uid))
    }

    /// The namespace of this name.
    pub fn named(&self, name: &str) -> Option<&Arc<Tenant>> {
        self.by_name.get(name)
    }

    /// The namespace of this number.
    pub fn numbered(&self, id: NamespaceId) -> Option<&Arc<Tenant>> {
        self.by_name.values().find(|tenant| tenant.id == id)
    }

    /// All namespaces, by name.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Tenant>> {
        self.by_name.values()
    }
}

impl Kept {
    fn read(path: &Path, disks: &[&Path]) -> Result<Self, TenantError> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(problem) if problem.kind() == std::io::ErrorKind::NotFound => {
                return Self::fresh(path, disks);
            }
            Err(source) => {
                return Err(TenantError::File {
                    path: path.to_owned(),
                    source,
                });
            }
        };
        Self::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, TenantError> {
        let kept: Self = serde_json::from_str(text).map_err(|problem| damaged(path, problem))?;
        let ids: std::collections::BTreeSet<_> =
            kept.namespaces.values().map(|one| one.id).collect();
        let fresh = ids.last().is_none_or(|last| last.0 < kept.next);
        if ids.len() != kept.namespaces.len() || !fresh || ids.contains(&NamespaceId(0)) {
            return Err(damaged(
                path,
                "a namespace number appears twice or is out of order",
            ));
        }
        let secrets = kept.namespaces.values();
        let secrets: std::collections::BTreeSet<_> =
            secrets.map(|one| one.secret.to_ascii_lowercase()).collect();
        if secrets.len() != kept.namespaces.len() {
            return Err(damaged(path, "two namespaces have the same secret"));
        }
        Ok(kept)
    }

    /// Nothing is known of any namespace. Records that lie on the disk all the same were written
    /// under numbers that must not be handed out again.
    fn fresh(path: &Path, disks: &[&Path]) -> Result<Self, TenantError> {
        let records = |dir: &&Path| {
            let mut files = std::fs::read_dir(dir).into_iter().flatten().flatten();
            files.any(|file| file.file_name().to_str().and_then(segment_number).is_some())
        };
        let mut next = 1;
        if disks.iter().any(records) {
            tracing::warn!(
                file = %path.display(),
                "numbers and secrets of namespaces are gone; blocks stored under them are out of \
                 reach and make room for new ones"
            );
            next = FRESH_START | (u32::from_le_bytes(random(path)?) >> 1);
        }
        let namespaces = BTreeMap::new();
        Ok(Self { next, namespaces })
    }

    fn ensure(&mut self, name: &str, path: &Path) -> Result<(), TenantError> {
        if self.namespaces.contains_key(name) {
            return Ok(());
        }
        let full = || damaged(path, "the last namespace number is taken");
        let next = self.next.checked_add(1).ok_or_else(full)?;
        let secret: [u8; 32] = random(path)?;
        let secret = kvtier_proto::BlockKey(secret).to_hex();
        self.namespaces.insert(
            name.to_owned(),
            KeptOne {
                id: NamespaceId(self.next),
                secret,
            },
        );
        self.next = next;
        Ok(())
    }

    fn get(&self, name: &str, path: &Path) -> Result<(NamespaceId, [u8; 32]), TenantError> {
        let one = self
            .namespaces
            .get(name)
            .ok_or_else(|| damaged(path, "a namespace is gone"))?;
        let secret = kvtier_proto::BlockKey::from_hex(&one.secret)
            .ok_or_else(|| damaged(path, "a secret is not 64 hex digits"))?;
        Ok((one.id, secret.0))
    }

    /// Replaces the file (N2).
    fn write(&self, path: &Path) -> Result<(), TenantError> {
        let text = serde_json::to_vec_pretty(self).map_err(std::io::Error::from);
        let written = text.and_then(|text| keep::replace(path, &text));
        written.map_err(|source| TenantError::File {
            path: path.to_owned(),
            source,
        })
    }
}

/// What a file of this text says of a namespace of this name, which is given a number when it has
/// none, and the file after that. For the fuzz target of the file.
pub(crate) fn kept_in(
    text: &str,
    name: &str,
) -> Result<(NamespaceId, [u8; 32], String), TenantError> {
    let path = Path::new(FILE);
    let mut kept = Kept::parse(text, path)?;
    kept.ensure(name, path)?;
    let (id, secret) = kept.get(name, path)?;
    let text = serde_json::to_string(&kept).map_err(|problem| damaged(path, problem))?;
    Ok((id, secret, text))
}

fn random<const N: usize>(path: &Path) -> Result<[u8; N], TenantError> {
    let mut bytes = [0; N];
    let filled = rand::rngs::OsRng.try_fill_bytes(&mut bytes);
    filled.map_err(|problem| TenantError::File {
        path: path.to_owned(),
        source: std::io::Error::other(problem),
    })?;
    Ok(bytes)
}

fn damaged(path: &Path, problem: impl ToString) -> TenantError {
    TenantError::Damaged {
        path: path.to_owned(),
        problem: problem.to_string(),
    }
}

#[cfg(test)]
mod tests;
