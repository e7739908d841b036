//! One restore in time of its own: the daemon's decisions and the engine's, over modelled devices.
//!
//! Upstairs:   the suite.
//! Downstairs: `kvtierd::restore`, `outlook` and `decide` as the daemon has them; `engine`, the
//!             SDK's rules.
//!
//! A device brings one block after the other, in the order in which they were asked for, each no
//! sooner than its latency after that. What has come goes through one link to the engine. The
//! engine computes one block at a time, at its share of the GPU, and the suffix when all is there.
//! A message between the two ends takes [`Scene::hop_s`]; the map takes none.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use kvtier_proto::claims::{Claim, Gate};
use kvtier_proto::{Level, Miss};
use kvtier_store::DeviceState;
use kvtierd::metrics::{Device, Label as _};
use kvtierd::restore::decide::Course;
use kvtierd::restore::outlook::{Asked, course, outlook};
use kvtierd::restore::plan::{Prefill, found};
use kvtierd::restore::rates::Rates;
use kvtierd::tier::Located;

use super::engine::{Engine, Map};
use super::trace::Trace;
use kvtier_benches::report::Problem;

/// Where a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// In host memory.
    Memory,
    /// On the device of this number.
    Device(usize),
    /// Nowhere.
    Missing,
}

/// A device.
#[derive(Debug, Clone)]
pub(super) struct Line {
    /// Bytes a second.
    pub(super) trace: Trace,
    /// From the call to the first byte. Unit: seconds.
    pub(super) latency_s: f64,
}

/// Everything that a restore meets.
#[derive(Debug, Clone)]
pub(super) struct Scene {
    /// Of each block.
    pub(super) places: Vec<Place>,
    pub(super) block_tokens: u32,
    /// Unit: bytes.
    pub(super) block_bytes: f64,
    pub(super) suffix_tokens: u32,
    /// Of the whole GPU.
    pub(super) prefill: Prefill,
    pub(super) devices: Vec<Line>,
    /// From host memory to the GPU. Unit: bytes a second.
    pub(super) link: Trace,
    /// The part of the GPU that prefill gets.
    pub(super) gpu: Trace,
    /// Unit: seconds.
    pub(super) hop_s: f64,
}

/// What earlier restores have taught the daemon.
#[derive(Debug, Default)]
pub(super) struct Learned {
    /// Bytes a second of each device.
    pub(super) rates: Vec<f64>,
    pub(super) prefill: Option<Prefill>,
}

/// How a restore went.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Went {
    pub(super) ttft_s: f64,
    /// Blocks that the engine computed, that were loaded, and that were loaded for nothing.
    pub(super) computed: usize,
    pub(super) loaded: usize,
    pub(super) wasted: usize,
}

impl Scene {
    /// Seconds of the whole GPU to compute a block.
    pub(super) fn compute_s(&self, index: usize) -> f64 {
        let tokens = f64::from(self.block_tokens);
        self.prefill.step_s(index as f64 * tokens, tokens)
    }

    /// Seconds of the whole GPU for what comes after the blocks.
    pub(super) fn suffix_s(&self) -> f64 {
        let tokens = f64::from(self.block_tokens) * self.places.len() as f64;
        self.prefill.step_s(tokens, f64::from(self.suffix_tokens))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Happens {
    Landed(usize),
    Came(usize),
    Computed(usize),
    Done,
    Late,
    Look,
}

struct World<'a> {
    scene: &'a Scene,
    course: Course,
    map: Map,
    engine: Engine,
    now: Duration,
    coming: BinaryHeap<Reverse<(Duration, Happens)>>,
    /// When each device, and the link, has done what it was asked for. Unit: seconds.
    busy_s: Vec<f64>,
    link_busy_s: f64,
    /// When a device is late, as far as it is among what is coming.
    late: Option<Duration>,
    done: bool,
    went: Went,
}

/// Runs a restore to its first token.
pub(super) fn run(scene: &Scene, learned: &Learned) -> Result<Went, Problem> {
    let mut world = World::new(scene, learned)?;
    loop {
        world.act();
        if world.engine.has_all() {
            break;
        }
        let Some(Reverse((at, happens))) = world.coming.pop() else {
            return Err("a restore stands still: nothing is to happen any more".into());
        };
        world.now = at;
        world.happen(happens);
    }
    let now_s = world.now.as_secs_f64();
    world.went.ttft_s = scene.gpu.after(now_s, scene.suffix_s());
    Ok(world.went)
}

fn device(at: usize) -> Result<Device, Problem> {
    let device = Device::all().into_iter().nth(at);
    device.ok_or_else(|| "the daemon has no such device".into())
}

impl<'a> World<'a> {
    fn new(scene: &'a Scene, learned: &Learned) -> Result<Self, Problem> {
        let rates = Rates::default();
        let mut found = Vec::with_capacity(scene.places.len());
        for place in &scene.places {
            found.push(match *place {
                Place::Memory => Ok(Located::Host),
                Place::Missing => Err(Miss::Absent),
                Place::Device(at) => {
                    let device = device(at)?;
                    Ok(Located::Disk(device, DeviceState::Healthy, Level::RAW))
                }
            });
        }
        for (at, rate) in learned.rates.iter().enumerate() {
            let device = device(at)?;
            let second = Duration::from_secs(1);
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a rate is far below 2^53"
            )]
            rates.saw((device, Level::RAW), 1, *rate as u64, second);
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a block is far below 2^53 bytes"
        )]
        let asked = Asked {
            block_tokens: scene.block_tokens,
            block_bytes: scene.block_bytes as u64,
            first_token: 0,
            suffix_tokens: scene.suffix_tokens,
        };
        let todo = found::plan(&found, true);
        let open = outlook(&found, &asked, learned.prefill, &rates).open;
        let course = course(&found, &todo, &asked, learned.prefill, &rates, open);
        let blocks = scene.places.len();
        let map = Map::new(blocks);
        map.gate.set(course.gate());
        let mut world = Self {
            scene,
            course,
            map,
            engine: Engine::new(blocks),
            now: Duration::ZERO,
            coming: BinaryHeap::new(),
            busy_s: vec![0.0; scene.devices.len()],
            link_busy_s: 0.0,
            late: None,
            done: false,
            went: Went {
                ttft_s: 0.0,
                computed: 0,
                loaded: 0,
                wasted: 0,
            },
        };
        for (index, _) in todo.missed {
            world.map.swap(index, Claim::Empty, Claim::Missed);
        }
        for index in todo.resident {
            world.map.swap(index, Claim::Empty, Claim::Ready);
            world.send(index);
        }
        Ok(world)
    }

    /// Both ends do what they can do now.
    fn act(&mut self) {
        let map = &self.map;
        let take = |index: usize| map.swap(index, Claim::Empty, Claim::Loading);
        let wanted = 0..self.scene.places.len();
        let mut begun = Vec::new();
        while let Some(index) = self.course.next(self.now, &wanted, take) {
            begun.push(index);
        }
        begun.into_iter().for_each(|index| self.read(index));
        self.set_late();
        if self.course.loading() == 0 && !self.done {
            self.done = true;
            self.soon(Happens::Done);
        }
        if let Some(index) = self.engine.next(self.now, &self.map) {
            let now_s = self.now.as_secs_f64();
            let end_s = self.scene.gpu.after(now_s, self.scene.compute_s(index));
            self.at(end_s, Happens::Computed(index));
        } else if let Some(overdue) = self.engine.overdue_at(&self.map)
            && overdue > self.now
        {
            self.coming.push(Reverse((overdue, Happens::Look)));
        }
    }

    fn happen(&mut self, happens: Happens) {
        match happens {
            Happens::Landed(index) => self.land(index),
            Happens::Came(index) => {
                let from_device = matches!(self.scene.places.get(index), Some(Place::Device(_)));
                self.engine.came(self.now, index, from_device);
            }
            Happens::Computed(index) => {
                self.map.swap(index, Claim::Computing, Claim::Computed);
                self.engine.computed(self.now, index);
                self.went.computed += 1;
            }
            Happens::Done => self.engine.end(),
            Happens::Late if self.course.late_at().is_some_and(|late| late <= self.now) => {
                self.map.gate.set(Gate::Open);
                for index in self.course.give_back(self.now) {
                    self.map.swap(index, Claim::Loading, Claim::Empty);
                }
                self.soon(Happens::Look);
            }
            Happens::Late | Happens::Look => {}
        }
    }

    /// A device has brought a block.
    fn land(&mut self, index: usize) {
        let ready = |from| self.map.swap(index, from, Claim::Ready);
        if ready(Claim::Loading) || ready(Claim::Empty) {
            self.went.loaded += 1;
            self.send(index);
        } else {
            self.went.wasted += 1;
        }
        self.course.landed(self.now, index, true);
        let map = &self.map;
        if let Some(gate) = self.course.turn_gate(self.now, |index| map.of(index)) {
            self.map.gate.set(gate);
            self.soon(Happens::Look);
        }
    }

    /// A device begins to bring a block.
    fn read(&mut self, index: usize) {
        let Some(Place::Device(at)) = self.scene.places.get(index) else {
            return;
        };
        let (Some(line), Some(busy_s)) = (self.scene.devices.get(*at), self.busy_s.get_mut(*at))
        else {
            return;
        };
        let begin_s = (self.now.as_secs_f64() + line.latency_s).max(*busy_s);
        *busy_s = line.trace.after(begin_s, self.scene.block_bytes);
        let end_s = *busy_s;
        self.at(end_s, Happens::Landed(index));
    }

    /// A block goes to the engine.
    fn send(&mut self, index: usize) {
        let begin_s = (self.now.as_secs_f64() + self.scene.hop_s).max(self.link_busy_s);
        self.link_busy_s = self.scene.link.after(begin_s, self.scene.block_bytes);
        self.at(self.link_busy_s, Happens::Came(index));
    }

    fn set_late(&mut self) {
        let late = self.course.late_at();
        if let Some(at) = late.filter(|_| late != self.late) {
            self.coming.push(Reverse((at.max(self.now), Happens::Late)));
        }
        self.late = late;
    }

    fn soon(&mut self, happens: Happens) {
        self.at(self.now.as_secs_f64() + self.scene.hop_s, happens);
    }

    fn at(&mut self, at_s: f64, happens: Happens) {
        let at = Duration::try_from_secs_f64(at_s).unwrap_or(Duration::MAX);
        self.coming.push(Reverse((at.max(self.now), happens)));
    }
}
