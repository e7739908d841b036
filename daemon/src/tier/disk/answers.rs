//! Who waits for what a store reports, and who hears that a block has left its device.
//!
//! Upstairs:   the disk thread.
//! Downstairs: one-shot channels, the namespaces' host tiers, metrics.

use std::collections::HashMap;
use std::sync::Arc;

use kvtier_proto::{BlockKey, Miss, NamespaceId, PayloadKind};
use kvtier_store::{Checked, Event, PutError, RecordImage};
use tokio::sync::oneshot;

use super::device::{GetDone, PutDone, Unstored};
use crate::log::chain;
use crate::metrics::{Damage, Device, Metrics, Tier};
use crate::tier::BlockEvent;
use crate::tier::host::HostTier;

/// See the module.
pub(super) struct Answers<'a> {
    device: Device,
    metrics: &'a Metrics,
    pub(super) puts: HashMap<u64, oneshot::Sender<PutDone>>,
    pub(super) gets: HashMap<u64, oneshot::Sender<GetDone>>,
    hosts: HashMap<NamespaceId, Arc<HostTier>>,
}

impl<'a> Answers<'a> {
    pub(super) fn new(device: Device, metrics: &'a Metrics, hosts: &[Arc<HostTier>]) -> Self {
        let hosts = hosts
            .iter()
            .map(|host| (host.namespace(), Arc::clone(host)));
        Self {
            device,
            metrics,
            puts: HashMap::new(),
            gets: HashMap::new(),
            hosts: hosts.collect(),
        }
    }

    /// How a put ended.
    pub(super) fn put(&mut self, tag: u64, done: PutDone) {
        if let Some(reply) = self.puts.remove(&tag) {
            let _ = reply.send(done);
        }
    }

    /// A read was started, or is a miss at once.
    pub(super) fn get(
        &mut self,
        tag: u64,
        started: Result<(), Miss>,
        reply: oneshot::Sender<GetDone>,
    ) {
        match started {
            Ok(()) => drop(self.gets.insert(tag, reply)),
            Err(miss) => drop(reply.send(Err(miss))),
        }
    }

    /// Passes on what the store reported.
    pub(super) fn tell(&mut self, event: Event) {
        match event {
            Event::Put { tag, image, result } => {
                let refused = |problem| unstored(image, &problem);
                self.put(tag, result.map(|_| ()).map_err(refused));
            }
            Event::Got { tag, result } => {
                if let Some(reply) = self.gets.remove(&tag) {
                    let _ = reply.send(result.map_err(|(_, miss)| miss));
                }
            }
            Event::Evicted {
                namespace,
                key,
                kind,
                ..
            } => {
                self.metrics.evicted_blocks.of(Tier::Disk).inc();
                self.gone(namespace, key, kind, Miss::Evicted);
            }
            Event::Device(state) => {
                let (device, state) = (self.device.number(), state.as_str());
                tracing::warn!(device, state, "device state");
            }
            // A store that is being closed scrubs no more.
            Event::Scrub(_) | Event::Scrubbed(_) => {}
        }
    }

    /// The scrub found a record damaged, and it has left the index.
    pub(super) fn damaged(&self, checked: &Checked, miss: Miss) {
        if let Some(damage) = Damage::of(miss) {
            self.metrics.corrupt.of(damage).inc();
        }
        let (key, place) = (checked.key(), checked.place());
        tracing::error!(
            device = self.device.number(), key = %key.short(),
            namespace = %checked.namespace(), reason = miss.as_str(),
            segment = place.segment, offset = place.offset,
            "the scrub found a damaged record; the block is a miss until it is saved again"
        );
        self.gone(checked.namespace(), key, checked.kind(), miss);
    }

    /// A block left the device. Of a kind other than KV only the name of its record is known,
    /// which says nothing to a watcher.
    fn gone(&self, namespace: NamespaceId, key: BlockKey, kind: PayloadKind, why: Miss) {
        let Some(host) = self.hosts.get(&namespace) else {
            return;
        };
        if kind == PayloadKind::Kv {
            host.set_durable(&(kind, key), false, host.life());
            host.announce(BlockEvent {
                key,
                tier: Tier::Disk,
                removed: Some(why),
            });
        }
    }
}

/// Why a record is not stored. A wiped one is nobody's to store, any other may go elsewhere.
pub(super) fn unstored(image: Option<RecordImage>, problem: &PutError) -> Unstored {
    let wiped = matches!(problem, PutError::Wiped { .. });
    Unstored {
        problem: chain(problem),
        image: image.filter(|_| !wiped),
    }
}
