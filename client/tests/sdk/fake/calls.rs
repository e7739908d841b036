//! The fake's calls.
//!
//! Upstairs:   tonic.
//! Downstairs: `State`.

use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use kvtier_proto::v1;
use kvtier_proto::{BlockLayout, ModelDescriptor, PayloadKind};
use tokio::sync::mpsc::unbounded_channel;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::{Open, Places, Region, Service, State, Stored, descriptors};

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
type Reply<T> = Result<Response<T>, Status>;

impl State {
    fn session<T>(&self, session: &[u8], work: impl FnOnce(&mut Open) -> T) -> Result<T, Status> {
        let mut sessions = self.sessions.lock().unwrap();
        let open = sessions.get_mut(session);
        open.map(work)
            .ok_or_else(|| Status::unauthenticated("unknown session"))
    }

    fn ticket(&self, file: &std::fs::File) -> Bytes {
        let ticket: [u8; 16] = rand::random();
        let file = file.try_clone().unwrap();
        self.tickets.lock().unwrap().insert(ticket.to_vec(), file);
        Bytes::copy_from_slice(&ticket)
    }

    fn has(&self, key: &[u8]) -> bool {
        self.store().blocks.contains_key(key)
    }

    fn grant(&self, open: &mut Open, block: &v1::BlockToSave) -> v1::save_grant::Grant {
        use v1::save_grant::Grant;
        if let Some(stored) = self.store().blocks.get(block.key.as_ref()) {
            let level = if stored.durable { 2 } else { 1 };
            return Grant::Already(level);
        }
        let kind = PayloadKind::try_from(block.kind()).unwrap();
        let layout = BlockLayout::new(&open.model, kind, block.tokens).unwrap();
        let length = u64::try_from(layout.payload_len()).unwrap();
        let knobs = self.knobs();
        let staging = open.staging.as_mut().unwrap();
        let taken = match staging.places.take(length) {
            Some(_) if knobs.bad_grant => Some(staging.places.len),
            Some(_) if knobs.overlapping_grants => Some(8),
            taken => taken,
        };
        let Some(offset) = taken else {
            return Grant::Refused(v1::SaveRefusal::RegionFull.into());
        };
        open.generation += 1;
        open.keys.insert(offset, (block.key.to_vec(), block.tokens));
        self.store().slots += 1;
        Grant::Slot(v1::Slot {
            region: 1,
            offset,
            length,
            generation: open.generation,
        })
    }

    fn store_block(&self, key: &[u8], tokens: u32, payload: Vec<u8>, wait: i32) {
        let durable = wait == v1::Acknowledge::Durable as i32;
        let stored = Stored {
            payload,
            tokens,
            durable,
        };
        self.store().blocks.insert(key.to_vec(), stored);
    }

    fn commit(&self, open: &mut Open, block: &v1::FilledSlot, wait: i32) -> v1::CommitResult {
        use v1::commit_result::Result as Outcome;
        let result = |result| v1::CommitResult {
            key: block.key.clone(),
            result: Some(result),
        };
        let stale = || result(Outcome::Failed(v1::CommitFailure::StaleSlot.into()));
        let Some(slot) = &block.slot else {
            return match self.store().blocks.get_mut(block.key.as_ref()) {
                Some(stored) => {
                    stored.durable = true;
                    result(Outcome::Acknowledged(wait))
                }
                None => stale(),
            };
        };
        let staging = open.staging.as_mut().unwrap();
        let Some((key, tokens)) = open.keys.remove(&slot.offset) else {
            return stale();
        };
        let payload = super::read(&staging.file, slot);
        staging.places.free(slot.offset);
        self.store().slots -= 1;
        if block
            .crc32
            .is_some_and(|crc| crc != crc32fast::hash(&payload))
        {
            return result(Outcome::Failed(v1::CommitFailure::Checksum.into()));
        }
        self.store_block(&key, tokens, payload, wait);
        result(Outcome::Acknowledged(wait))
    }
}

/// Ends the session with its stream.
struct Life(Arc<State>, Vec<u8>);

impl Drop for Life {
    fn drop(&mut self) {
        let open = self.0.sessions.lock().unwrap().remove(&self.1);
        let mut store = self.0.store();
        store.sessions -= 1;
        store.slots -= open.map_or(0, |open| open.keys.len());
        store.leases.clear();
    }
}

#[tonic::async_trait]
impl v1::kvtier_server::Kvtier for Service {
    type OpenSessionStream = Replies<v1::SessionEvent>;
    type RestoreStream = Replies<v1::RestoreEvent>;
    type GetInlineStream = Replies<v1::GetInlineReply>;
    type WatchEventsStream = Replies<v1::BlockEvent>;

    async fn open_session(
        &self,
        request: Request<v1::OpenSessionRequest>,
    ) -> Reply<Self::OpenSessionStream> {
        use v1::session_event::Event;
        let state = Arc::clone(&self.0);
        state.enter("open_session").await?;
        let model = ModelDescriptor::try_from(request.get_ref().model.as_ref().unwrap());
        let model = model.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let knobs = state.knobs();
        let mut fingerprint = model.fingerprint().0;
        fingerprint[0] ^= u8::from(knobs.wrong_fingerprint);
        let session = rand::random::<[u8; 16]>().to_vec();
        let arena = state.shared.then(|| v1::RegionGrant {
            region: 0,
            bytes: super::ARENA_LEN,
            ticket: state.ticket(&state.arena.lock().unwrap().file),
        });
        let socket = state.descriptor_socket.to_str().unwrap().to_owned();
        let opened = v1::SessionOpened {
            session: session.clone().into(),
            namespace_id: 1,
            namespace_name: "tests".into(),
            key_secret: vec![knobs.secret; 32].into(),
            layout_fingerprint: fingerprint.to_vec().into(),
            descriptor_socket: if arena.is_some() {
                socket
            } else {
                String::new()
            },
            arena,
            daemon_version: "fake".into(),
            durable: true,
        };
        let open = Open {
            model,
            staging: None,
            generation: 0,
            keys: Default::default(),
        };
        state.sessions.lock().unwrap().insert(session.clone(), open);
        state.store().sessions += 1;
        let life = Life(Arc::clone(&state), session);
        let event = |event| Ok(v1::SessionEvent { event: Some(event) });
        let (out, events) = unbounded_channel();
        out.send(event(Event::Opened(opened))).unwrap();
        let mut drain = state.drain.subscribe();
        tokio::spawn(async move {
            if drain.wait_for(|drain| *drain).await.is_ok() {
                let reason = "told to drain".into();
                let _ = out.send(event(Event::Draining(v1::Draining { reason })));
            }
            out.closed().await;
        });
        let events = UnboundedReceiverStream::new(events).map(move |event| {
            let _held = &life;
            event
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn register_region(
        &self,
        request: Request<v1::RegisterRegionRequest>,
    ) -> Reply<v1::RegisterRegionReply> {
        self.0.enter("register_region").await?;
        let (state, asked) = (&self.0, request.get_ref());
        let file = descriptors::memory(asked.bytes, false, false);
        let is_staging = asked.purpose() == v1::RegionPurpose::Staging;
        let grant = Some(v1::RegionGrant {
            region: if is_staging { 1 } else { 2 },
            bytes: asked.bytes,
            ticket: state.ticket(&file),
        });
        let places = Places {
            len: asked.bytes,
            ..Places::default()
        };
        state.session(&asked.session, |open| {
            if is_staging {
                open.staging = Some(Region { file, places });
            }
        })?;
        Ok(Response::new(v1::RegisterRegionReply { grant }))
    }

    async fn lookup(&self, request: Request<v1::LookupRequest>) -> Reply<v1::LookupReply> {
        use v1::block_status::Status as Where;
        self.0.enter("lookup").await?;
        let asked = request.get_ref();
        self.0.session(&asked.session, |_| ())?;
        let mut reply = v1::LookupReply::default();
        for (index, key) in (0u32..).zip(&asked.keys) {
            let status = if self.0.has(key) {
                if reply.prefix_blocks == index {
                    reply.prefix_blocks += 1;
                }
                Where::Tier(v1::Tier::Host.into())
            } else {
                Where::Miss(v1::MissReason::Absent.into())
            };
            let status = Some(status);
            reply.blocks.push(v1::BlockStatus { status });
            if asked.prefix_only && reply.prefix_blocks == index {
                break;
            }
        }
        Ok(Response::new(reply))
    }

    async fn save(&self, request: Request<v1::SaveRequest>) -> Reply<v1::SaveReply> {
        self.0.enter("save").await?;
        let asked = request.get_ref();
        let mut store = self.0.store();
        store.widest_save = store.widest_save.max(asked.blocks.len());
        drop(store);
        let grants = self.0.session(&asked.session, |open| {
            let grant = |block| v1::SaveGrant {
                grant: Some(self.0.grant(open, block)),
            };
            asked.blocks.iter().map(grant).collect()
        })?;
        Ok(Response::new(v1::SaveReply { grants }))
    }

    async fn commit(&self, request: Request<v1::CommitRequest>) -> Reply<v1::CommitReply> {
        self.0.enter("commit").await?;
        let asked = request.get_ref();
        let results = self.0.session(&asked.session, |open| {
            let commit = |block| self.0.commit(open, block, asked.wait_for);
            asked.blocks.iter().map(commit).collect()
        })?;
        Ok(Response::new(v1::CommitReply { results }))
    }

    async fn restore(
        &self,
        request: Request<Streaming<v1::RestoreCommand>>,
    ) -> Reply<Self::RestoreStream> {
        self.0.enter("restore_stream").await?;
        let (out, events) = unbounded_channel();
        let state = Arc::clone(&self.0);
        tokio::spawn(super::restore::run(state, request.into_inner(), out));
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(
            events,
        ))))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Reply<v1::ReleaseReply> {
        self.0.enter("release").await?;
        let asked = request.get_ref();
        let mut released = 0;
        for lease in &asked.leases {
            released += u32::from(self.0.store().leases.remove(lease));
            let place = self.0.lease_places.lock().unwrap().remove(lease);
            if let Some(place) = place {
                self.0.arena.lock().unwrap().places.free(place);
            }
        }
        self.0.session(&asked.session, |open| {
            for slot in &asked.slots {
                if open.keys.remove(&slot.offset).is_some() {
                    open.staging.as_mut().unwrap().places.free(slot.offset);
                    self.0.store().slots -= 1;
                    released += 1;
                }
            }
        })?;
        Ok(Response::new(v1::ReleaseReply { released }))
    }

    async fn report_prefill(
        &self,
        request: Request<v1::ReportPrefillRequest>,
    ) -> Reply<v1::ReportPrefillReply> {
        self.0.enter("report_prefill").await?;
        self.0.store().steps.extend(request.into_inner().reports);
        Ok(Response::new(v1::ReportPrefillReply {}))
    }

    async fn pin(&self, request: Request<v1::PinRequest>) -> Reply<v1::PinReply> {
        self.0.enter("pin").await?;
        let keys = &request.get_ref().keys;
        let blocks = keys.iter().filter(|key| self.0.has(key)).count();
        let blocks = u32::try_from(blocks).unwrap();
        Ok(Response::new(v1::PinReply { blocks }))
    }

    async fn prefetch(&self, _: Request<v1::PrefetchRequest>) -> Reply<v1::PrefetchReply> {
        self.0.enter("prefetch").await?;
        let (resident, started) = (1, 2);
        Ok(Response::new(v1::PrefetchReply { resident, started }))
    }

    async fn put_inline(
        &self,
        request: Request<Streaming<v1::PutInlineRequest>>,
    ) -> Reply<v1::CommitReply> {
        use v1::put_inline_request::Part;
        self.0.enter("put_inline").await?;
        let mut parts = request.into_inner();
        let (mut blocks, mut wait) = (Vec::new(), 0);
        while let Some(message) = parts.message().await? {
            match message.part {
                Some(Part::Block(block)) => {
                    if blocks.is_empty() {
                        self.0.session(&block.session, |_| ())?;
                        wait = block.wait_for;
                    }
                    blocks.push((block, Vec::new()));
                }
                Some(Part::Data(data)) => blocks.last_mut().unwrap().1.extend_from_slice(&data),
                None => {}
            }
        }
        let store = |(header, payload): (v1::PutInlineBlock, Vec<u8>)| {
            let block = header.block.unwrap();
            assert_eq!(crc32fast::hash(&payload), header.crc32);
            self.0.store_block(&block.key, block.tokens, payload, wait);
            let result = Some(v1::commit_result::Result::Acknowledged(wait));
            let key = block.key;
            v1::CommitResult { key, result }
        };
        let results = blocks.into_iter().map(store).collect();
        Ok(Response::new(v1::CommitReply { results }))
    }

    async fn get_inline(
        &self,
        request: Request<v1::GetInlineRequest>,
    ) -> Reply<Self::GetInlineStream> {
        use v1::get_inline_reply::Part;
        self.0.enter("get_inline").await?;
        let (mut parts, mut done) = (Vec::new(), v1::RestoreDone::default());
        for (index, key) in (0u32..).zip(&request.get_ref().keys) {
            let Some(stored) = self.0.store().blocks.get(key.as_ref()).cloned() else {
                let reason = v1::MissReason::Absent.into();
                done.missed.push(v1::MissedBlock { index, reason });
                break;
            };
            let corrupt = u32::from(self.0.knobs().corrupt_inline && index == 1);
            parts.push(Part::Block(v1::GetInlineBlock {
                level: 0,
                index,
                length: u64::try_from(stored.payload.len()).unwrap(),
                crc32: crc32fast::hash(&stored.payload) ^ corrupt,
                tokens: stored.tokens,
                tier: v1::Tier::Host.into(),
                quality: 0,
            }));
            let chunks = stored.payload.chunks(1000);
            parts.extend(chunks.map(|chunk| Part::Data(Bytes::copy_from_slice(chunk))));
            done.usable_blocks += 1;
        }
        parts.push(Part::Done(done));
        let messages = parts
            .into_iter()
            .map(|part| Ok(v1::GetInlineReply { part: Some(part) }));
        let messages: Vec<_> = messages.collect();
        let stall = self.0.knobs().stall_inline;
        let blocks = messages.iter().enumerate();
        let starts = blocks.filter(|(_, message)| {
            let part = message.as_ref().ok().and_then(|reply| reply.part.as_ref());
            matches!(part, Some(Part::Block(_)))
        });
        // One chunk into the block that never ends.
        let cut = starts
            .map(|(at, _)| at + 2)
            .nth(stall)
            .filter(|_| stall > 0);
        let sent = cut.unwrap_or(messages.len());
        let messages = tokio_stream::iter(messages).take(sent);
        match cut {
            Some(_) => Ok(Response::new(Box::pin(
                messages.chain(tokio_stream::pending()),
            ))),
            None => Ok(Response::new(Box::pin(messages))),
        }
    }

    async fn wipe(&self, _: Request<v1::WipeRequest>) -> Reply<v1::WipeReply> {
        self.0.enter("wipe").await?;
        let blocks = std::mem::take(&mut self.0.store().blocks).len();
        let blocks = u64::try_from(blocks).unwrap();
        let waiting = Vec::new();
        Ok(Response::new(v1::WipeReply { blocks, waiting }))
    }

    async fn watch_events(
        &self,
        _: Request<v1::WatchEventsRequest>,
    ) -> Reply<Self::WatchEventsStream> {
        use v1::block_event::Event;
        self.0.enter("watch_events").await?;
        let event = |event, reason| {
            let key = Bytes::from_static(&[7; 32]);
            let event = Some(event);
            Ok(v1::BlockEvent { key, event, reason })
        };
        let events = [event(Event::Stored(2), 0), event(Event::Removed(1), 2)];
        Ok(Response::new(Box::pin(tokio_stream::iter(events))))
    }

    async fn explain(&self, request: Request<v1::ExplainRequest>) -> Reply<v1::ExplainReply> {
        self.0.enter("explain").await?;
        let mut reply = v1::ExplainReply::default();
        if self.0.knobs().oversized {
            reply.notes.push("x".repeat(5 << 20));
        }
        if !self.0.has(&request.get_ref().key) {
            reply.miss = v1::MissReason::Absent.into();
            reply.notes.push("never saved here".into());
        }
        Ok(Response::new(reply))
    }

    async fn stats(&self, _: Request<v1::StatsRequest>) -> Reply<v1::StatsReply> {
        Err(Status::permission_denied("the fake has no operators"))
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Reply<v1::DrainReply> {
        Err(Status::permission_denied("the fake has no operators"))
    }
}
