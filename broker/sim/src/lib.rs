//! Deterministic simulation: many cores ([`weir_core::node::Node`]) over memory stores in one thread, with a seeded network,
//! clocks and disks, clients ([`clients`]), faults and an administrator ([`faults`]), and what must be true of it all ([`oracle`]).
//! One seed, one schedule.

mod clients;
mod faults;
mod oracle;
pub mod specs;

use clients::{Allocator, Asked, Producer};
pub use faults::Faults;
use faults::{Joining, Weather};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use weir_checker::History;
use weir_core::eraftpb::MessageType;
use weir_core::group::Group;
use weir_core::ids::{BrokerId, GroupId, META_GROUP, ReplicaId, Ticket};
use weir_core::incarnation::Standing;
use weir_core::meta::command::{ApplySubscription, ApplyTopic, Command, Kind, Placement};
use weir_core::meta::placement;
use weir_core::meta::state::{Broker, MetaState, Start, SubscriptionSpec, TopicSpec};
use weir_core::node::{Alarm, Disk, Envelope, Fetch, Limits, Node, Now, PeerMessage, mix};
use weir_core::storage::Store as _;
use weir_store::mem::MemStore;

/// Seeded choices.
pub struct Dice(u64);

impl Dice {
    /// The next number below `bound`.
    pub fn roll(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0) % bound
    }

    /// True in `percent` of a hundred cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.roll(100) < percent
    }

    /// One of these.
    pub fn pick<T: Clone>(&mut self, of: &[T]) -> Option<T> {
        (!of.is_empty()).then(|| of[self.roll(of.len() as u64) as usize].clone())
    }
}

struct Host {
    name: String,
    node: Option<Node>,
    store: Arc<MemStore>,
    /// rounds the disk has not finished: (id, due, sync)
    disk: VecDeque<(u64, u64, bool)>,
    /// reads it has not finished, by when they will be
    reads: VecDeque<(u64, Fetch)>,
    restart_at: u64,
    /// stopped, not dead: it does nothing until then
    paused_until: u64,
    /// the disk takes half a second for each round until then
    slow_until: u64,
    /// the disk has no room until then
    full_until: u64,
    /// little room is left: no more batches are taken on
    low_until: u64,
    low: Disk,
    /// an older copy of its disk, and when it was made
    copy: Option<(u64, Arc<MemStore>)>,
    /// the next write or sync fails
    failing: bool,
    /// its clock runs fast or slow, in parts of a thousand
    drift: i64,
    /// what its wall clock was off by when it started, ms
    wall_off: i64,
}

impl Host {
    fn new(name: String, drift: i64) -> Self {
        Self {
            name,
            node: None,
            store: Arc::default(),
            disk: VecDeque::new(),
            reads: VecDeque::new(),
            restart_at: 0,
            paused_until: 0,
            slow_until: 0,
            full_until: 0,
            low_until: 0,
            low: Disk::Low,
            copy: None,
            failing: false,
            drift,
            wall_off: 0,
        }
    }

    fn time(&self, now: u64) -> Now {
        let mono = now as i64 + now as i64 * self.drift / 1_000;
        Now { mono_ms: mono as u64, log_ms: (EPOCH_MS + mono + self.wall_off) as u64 }
    }
}

/// The wall clock when a simulation begins, ms.
const EPOCH_MS: i64 = 1_700_000_000_000;

/// A simulated cluster with its clients and their history.
pub struct World {
    dice: Dice,
    hosts: BTreeMap<BrokerId, Host>,
    /// (due, order) → (to, from, message)
    wire: BTreeMap<(u64, u64), (BrokerId, BrokerId, PeerMessage)>,
    sent: u64,
    /// when what was sent last in fair weather arrives, from one broker to another
    last_due: BTreeMap<(BrokerId, BrokerId), u64>,
    now: u64,
    cut: BTreeSet<(BrokerId, BrokerId)>,
    weather: Weather,
    /// clients ask for nothing until then
    lull_until: u64,
    groups: Vec<GroupId>,
    subscription: u64,
    /// the newest term in which a position was told, of each partition
    position_terms: BTreeMap<u32, u64>,
    /// of each partition: the newest term in which a leader acknowledged or told its end, and the end that this means
    ends: BTreeMap<u32, (u64, u64)>,
    producers: Vec<Producer>,
    allocator: Allocator,
    joining: Vec<Joining>,
    draining: Option<BrokerId>,
    /// a copy was lost (volume, flipped bit) and is not made up for yet
    injured: bool,
    tickets: BTreeMap<Ticket, (BrokerId, Asked)>,
    next_ticket: u64,
    next_value: u64,
    /// what the clients saw
    pub history: History<u64>,
    /// reads of old entries for followers that were behind
    pub fetched: u64,
    /// how often a leader put its group to sleep
    pub slept: u64,
    /// what operators were told
    pub alarms: Vec<Alarm>,
    /// how often publishers of a partition were slowed, or slowed more
    pub slowed: u64,
    /// what may be published in a second, as a leader said
    paces: BTreeMap<(BrokerId, GroupId), Option<u64>>,
    /// when the next batch may go to a partition whose publishers are slowed
    paced_until: BTreeMap<GroupId, u64>,
    limits: Limits,
    /// a read of old entries takes less than this, ms
    pub read_ms: u64,
    /// faults of each kind
    pub faults: BTreeMap<&'static str, u64>,
    /// a hash over everything that happened
    pub trace: u64,
}

const TOPIC: &str = "default/t";
const SUBSCRIPTION: &str = "default/s";
/// Partitions of the one topic.
const PARTITIONS: u32 = 2;

/// The metadata a cluster is formed with: one topic, one subscription.
fn first_state(brokers: u64, replicas: u32, topic: TopicSpec) -> MetaState {
    let list: Vec<Broker> =
        (1..=brokers).map(|id| Broker { id, name: format!("b-{id}"), ..Default::default() }).collect();
    let mut meta = MetaState::form("sim", &list);
    let placed = placement::place(placement::candidates(&meta), PARTITIONS, replicas).expect("enough brokers");
    let placements = placed.iter().map(|p| Placement { brokers: p.iter().map(|b| b.0).collect() }).collect();
    let spec = TopicSpec { partitions: PARTITIONS, replicas, ..topic };
    let topic = ApplyTopic { name: TOPIC.into(), spec, placements, ..Default::default() };
    meta.apply(&Command::from(Kind::ApplyTopic(topic))).expect("a right topic");
    let spec = SubscriptionSpec { topic: TOPIC.into(), start: Start::Earliest.into(), ..Default::default() };
    let subscription = ApplySubscription { name: SUBSCRIPTION.into(), spec, ..Default::default() };
    meta.apply(&Command::from(Kind::ApplySubscription(subscription))).expect("a right subscription");
    meta
}

impl World {
    /// A cluster of `brokers` with one topic, replicated `replicas` times.
    pub fn new(seed: u64, brokers: u64, replicas: u32) -> Self {
        let limits = Limits { checkpoint_bytes: 4_000, tail_bytes_max: 8_000, idle_ticks: 6, ..Default::default() };
        Self::of(seed, first_state(brokers, replicas, TopicSpec::default()), limits)
    }

    /// The same with a topic and limits of one's own.
    pub fn with(seed: u64, brokers: u64, topic: TopicSpec, limits: Limits) -> Self {
        Self::of(seed, first_state(brokers, brokers as u32, topic), limits)
    }

    fn of(seed: u64, meta: MetaState, limits: Limits) -> Self {
        let brokers = meta.brokers.len() as u64;
        let mut world = Self {
            dice: Dice(mix(seed)),
            hosts: BTreeMap::new(),
            wire: BTreeMap::new(),
            sent: 0,
            last_due: BTreeMap::new(),
            now: 1_000,
            cut: BTreeSet::new(),
            weather: Weather::default(),
            lull_until: 0,
            groups: (0..PARTITIONS).map(|p| meta.group_of(TOPIC, p).expect("just made")).collect(),
            subscription: meta.subscriptions[SUBSCRIPTION].id,
            position_terms: BTreeMap::new(),
            ends: BTreeMap::new(),
            producers: (0..4).map(|i| Producer::new(i + 1, i as u32 % PARTITIONS)).collect(),
            allocator: Allocator::default(),
            joining: Vec::new(),
            draining: None,
            injured: false,
            tickets: BTreeMap::new(),
            next_ticket: 1,
            next_value: 1,
            history: History::default(),
            fetched: 0,
            slept: 0,
            alarms: Vec::new(),
            slowed: 0,
            paces: BTreeMap::new(),
            paced_until: BTreeMap::new(),
            limits,
            read_ms: 20,
            faults: BTreeMap::new(),
            trace: 0,
        };
        for id in (1..=brokers).map(BrokerId) {
            let drift = world.dice.roll(41) as i64 - 20;
            world.hosts.insert(id, Host::new(format!("b-{}", id.0), drift));
            world.start(id);
            world.node(id).expect("just started").create_meta(ReplicaId(id.0), Some(&meta));
            world.pump(id);
        }
        world
    }

    /// Opens what a host's disk holds.
    fn start(&mut self, id: BrokerId) {
        let limits = self.limits.clone();
        let seed = self.dice.roll(u64::MAX);
        let host = self.hosts.get_mut(&id).expect("a host");
        let node = Node::open(id, host.store.clone(), limits, seed, host.time(self.now)).expect("memory does not fail");
        assert!(node.damaged().is_empty() || self.injured, "broker {id} found damage: nothing was damaged");
        host.node = Some(node);
        self.paces.retain(|(at, _), _| *at != id);
    }

    /// Clients ask for nothing, for so long or until [`World::heal`].
    pub fn lull(&mut self, ms: u64) {
        self.lull_until = self.now + ms;
    }

    /// Raft messages under way of the first partition.
    pub fn messages(&self) -> usize {
        let group = self.group();
        self.wire.values().filter(|(.., m)| matches!(m, PeerMessage::Raft(e) if e.group == group)).count()
    }

    /// Brokers at which the first partition sleeps.
    pub fn sleepers(&self) -> Vec<BrokerId> {
        self.hosts.keys().copied().filter(|b| self.group_at(*b, self.group()).is_some_and(Group::is_asleep)).collect()
    }

    /// Begins a planned stop of a broker; how many of its groups others could lead, just before.
    pub fn resign(&mut self, at: BrokerId) -> usize {
        let Some(node) = self.node(at) else { return 0 };
        let led = node.led_with_others();
        node.resign();
        self.pump(at);
        led
    }

    /// The group of the first partition.
    pub fn group(&self) -> GroupId {
        self.groups[0]
    }

    /// Runs for `ms`.
    pub fn run(&mut self, ms: u64, faults: Faults) {
        let end = self.now + ms;
        while self.now < end {
            self.now += 1 + self.dice.roll(9);
            self.break_something(faults);
            let ids: Vec<BrokerId> = self.hosts.keys().copied().collect();
            for id in ids {
                self.step(id);
            }
            self.deliver();
            self.administer();
            self.produce();
            self.consume();
            self.allocate();
        }
    }

    fn step(&mut self, id: BrokerId) {
        let Some(host) = self.hosts.get(&id) else { return };
        if host.paused_until > self.now {
            return;
        }
        if host.node.is_none() && host.restart_at <= self.now && host.name != GONE {
            self.start(id);
        }
        self.run_disk(id);
        let Some(host) = self.hosts.get_mut(&id) else { return };
        let now = host.time(self.now);
        let disk = if host.low_until > self.now { host.low } else { Disk::Room };
        if let Some(node) = host.node.as_mut() {
            node.set_disk(disk, u64::MAX);
            node.tick(now);
        }
        self.pump(id);
    }

    fn node(&mut self, id: BrokerId) -> Option<&mut Node> {
        self.hosts.get_mut(&id)?.node.as_mut()
    }

    fn run_disk(&mut self, id: BrokerId) {
        let now = self.now;
        let host = self.hosts.get_mut(&id).expect("a host");
        let Some(node) = host.node.as_mut() else { return };
        let mut dead = false;
        while let Some((round, due, sync)) = host.disk.front().copied() {
            if due > now {
                break;
            }
            host.disk.pop_front();
            node.written(round);
            if sync {
                if std::mem::take(&mut host.failing) {
                    dead = true; // the process ends: what a disk says after a failed sync cannot be believed
                    break;
                }
                host.store.sync().expect("memory");
            }
            node.synced(round);
        }
        while !dead && host.reads.front().is_some_and(|(due, _)| *due <= now) {
            let (_, fetch) = host.reads.pop_front().expect("just seen");
            let Fetch { group, low, high, bytes_max } = fetch;
            node.fetched(fetch, host.store.entries(group, low, high, bytes_max));
        }
        if dead {
            self.crash(id);
        }
    }

    fn pump(&mut self, id: BrokerId) {
        let Some(node) = self.node(id) else { return };
        let effects = node.drain();
        if let Some(round) = effects.round {
            let host = self.hosts.get_mut(&id).expect("a host");
            if host.full_until > self.now {
                // no room: the process ends before anything of this round is told
                self.crash(id);
                return;
            }
            host.store.write(&round.ops).expect("memory");
            let pace = if host.slow_until > self.now { 500 } else { 8 };
            // the disk works in order
            let due = host.disk.back().map_or(0, |last| last.1).max(self.now + self.dice.roll(pace));
            let host = self.hosts.get_mut(&id).expect("a host");
            host.disk.push_back((round.id, due, round.sync));
            self.note(&[id.0, round.id, round.ops.len() as u64, round.sync.into()]);
        }
        for fetch in effects.fetches {
            self.fetched += 1;
            let due = self.now + 1 + self.dice.roll(self.read_ms);
            self.hosts.get_mut(&id).expect("a host").reads.push_back((due, fetch));
        }
        for (to, envelope) in effects.messages {
            self.post(id, to, PeerMessage::Raft(envelope));
        }
        for (to, asleep) in effects.asleep {
            self.slept += 1;
            self.post(id, to, PeerMessage::Asleep(vec![asleep]));
        }
        for (to, message) in effects.direct {
            self.post(id, to, message);
        }
        if let Some(pulse) = effects.pulse {
            self.tell_others(id, &PeerMessage::Pulse(pulse));
        }
        if !effects.announce.is_empty() {
            self.tell_others(id, &PeerMessage::Leaders(effects.announce));
        }
        if let Some(full) = effects.disk_full {
            self.tell_others(id, &PeerMessage::DiskFull(full));
        }
        for group in effects.leaders {
            self.saw_end(id, group);
        }
        for (group, limit) in effects.paces {
            self.slowed += u64::from(limit.is_some());
            self.paces.insert((id, group), limit);
        }
        for alarm in effects.alarms {
            self.alarms.push(alarm);
        }
        if effects.set_aside.is_some() {
            self.set_aside(id);
            return;
        }
        for (ticket, reply) in effects.replies {
            self.replied(ticket, reply);
        }
    }

    fn tell_others(&mut self, from: BrokerId, message: &PeerMessage) {
        let others: Vec<BrokerId> = self.hosts.keys().copied().filter(|b| *b != from).collect();
        others.into_iter().for_each(|to| self.post(from, to, message.clone()));
    }

    /// Mixes into the trace.
    fn note(&mut self, what: &[u64]) {
        self.trace = what.iter().fold(mix(self.trace ^ self.now), |trace, n| mix(trace ^ n));
    }

    fn post(&mut self, from: BrokerId, to: BrokerId, message: PeerMessage) {
        if self.cut.contains(&(from, to)) || self.dice.chance(self.weather.loss_percent) {
            return;
        }
        let acks = |m: &PeerMessage| matches!(m, PeerMessage::Raft(e) if e.message.msg_type == MessageType::MsgAppendResponse && !e.message.reject);
        if self.weather.no_acks_of == Some(from) && acks(&message) {
            return;
        }
        let rough = self.weather.loss_percent > 0;
        let copies = if rough && self.dice.chance(5) { 2 } else { 1 };
        for _ in 0..copies {
            self.sent += 1;
            let spread = if rough { 200 } else { 4 };
            let mut due = self.now + 1 + self.dice.roll(spread);
            if !rough {
                // a stream keeps its order; what is lost and sent anew, over another one, does not
                let last = self.last_due.entry((from, to)).or_default();
                due = due.max(*last);
                *last = due;
            }
            self.wire.insert((due, self.sent), (to, from, message.clone()));
        }
    }

    fn deliver(&mut self) {
        while let Some(first) = self.wire.first_entry().filter(|e| e.key().0 <= self.now) {
            let ((_, order), (to, from, message)) = first.remove_entry();
            let paused = self.hosts.get(&to).map_or(0, |h| h.paused_until);
            if paused > self.now {
                self.wire.insert((paused, order), (to, from, message)); // it lies in a socket's buffer
                continue;
            }
            if let PeerMessage::Raft(Envelope { group, message: m }) = &message {
                self.note(&[to.0, from.0, group.0, m.msg_type as u64, m.term, m.index, m.entries.len() as u64]);
            }
            if let Some(node) = self.node(to) {
                node.peer(from, message);
                // several may be taken at once
                if self.dice.chance(70) {
                    self.pump(to);
                }
            }
        }
    }

    /// All brokers that are there.
    pub fn brokers(&self) -> Vec<BrokerId> {
        self.hosts.iter().filter(|(_, h)| h.name != GONE).map(|(id, _)| *id).collect()
    }

    /// Who leads the first partition, as each broker that runs sees it: (broker, term, leader).
    pub fn leaders(&self) -> Vec<(BrokerId, u64, BrokerId)> {
        let seen = |(id, host): (&BrokerId, &Host)| {
            let (term, leader) = host.node.as_ref()?.leader_of(self.group())?;
            Some((*id, term, leader))
        };
        self.hosts.iter().filter_map(seen).collect()
    }

    /// The wall clock, ms since the epoch.
    pub fn wall_ms(&self) -> i64 {
        EPOCH_MS + self.now as i64
    }

    /// Of the first partition at each broker: where its log begins, and the time of its newest record, ms since the epoch.
    pub fn log_starts(&self) -> Vec<(BrokerId, u64, u64)> {
        let of = |id: &BrokerId| {
            let log = self.group_at(*id, self.group())?.log();
            let newest = log.checkpoints().back().map_or(0, |c| c.append_time_ms);
            Some((*id, log.tail().start_offset(), newest))
        };
        self.hosts.keys().filter_map(of).collect()
    }

    /// An administrator makes a topic with so many partitions, replicated on all brokers.
    pub fn make_topic(&mut self, name: &str, partitions: u32) {
        let controller = self.controller().expect("somebody leads the metadata");
        let meta = self.hosts[&controller].node.as_ref().expect("it leads").meta().clone();
        let replicas = meta.brokers.len() as u32;
        let placed = placement::place(placement::candidates(&meta), partitions, replicas).expect("enough brokers");
        let placements = placed.iter().map(|p| Placement { brokers: p.iter().map(|b| b.0).collect() }).collect();
        let spec = TopicSpec { partitions, replicas, ..Default::default() };
        let topic = ApplyTopic { name: name.to_owned(), spec, placements, ..Default::default() };
        self.propose(controller, Asked::Administer, Kind::ApplyTopic(topic));
    }

    /// Whether the first partition of a topic has a leader that serves.
    pub fn is_led(&self, topic: &str) -> bool {
        let nodes = || self.hosts.values().filter_map(|h| h.node.as_ref());
        let group = nodes().find_map(|n| n.meta().group_of(topic, 0));
        group.is_some_and(|g| nodes().any(|n| n.group(g).is_some_and(Group::serves)))
    }

    /// Brokers that run and take part in votes and appends.
    pub fn taking_part(&self) -> Vec<BrokerId> {
        let takes = |h: &Host| h.node.as_ref().is_some_and(|n| n.standing() == Standing::TakingPart);
        self.hosts.iter().filter(|(_, h)| takes(h)).map(|(id, _)| *id).collect()
    }

    /// Brokers whose volumes one broker knows to be rolled back.
    pub fn rolled_back(&self, at: BrokerId) -> Vec<BrokerId> {
        let node = self.hosts.get(&at).and_then(|h| h.node.as_ref());
        node.map_or(Vec::new(), |n| n.rolled_back().iter().copied().collect())
    }

    /// Brokers that take themselves for the leader of the first partition, with their terms.
    pub fn claims(&self) -> Vec<(u64, BrokerId)> {
        self.claims_of(self.group())
    }

    fn claims_of(&self, group: GroupId) -> Vec<(u64, BrokerId)> {
        let claim = |id: &BrokerId| self.group_at(*id, group).filter(|g| g.is_leader()).map(|g| (g.term(), *id));
        self.hosts.keys().filter_map(claim).collect()
    }

    /// The broker that takes itself for a group's leader in the newest term, of those that run.
    fn leader_of(&self, group: GroupId) -> Option<BrokerId> {
        self.claims_of(group).into_iter().max().map(|(_, id)| id)
    }

    /// A broker's replica of a group, where it runs and the replica takes part.
    fn group_at(&self, at: BrokerId, group: GroupId) -> Option<&Group> {
        self.hosts.get(&at)?.node.as_ref()?.group(group)
    }

    fn controller(&self) -> Option<BrokerId> {
        self.leader_of(META_GROUP)
    }

    /// The replica of the first partition that a broker holds and that takes part.
    pub fn replica(&self, at: BrokerId) -> Option<ReplicaId> {
        self.group_at(at, self.group()).map(Group::replica)
    }

    /// The replica of the metadata that a broker holds and that takes part.
    pub fn metadata_replica(&self, at: BrokerId) -> Option<ReplicaId> {
        self.group_at(at, META_GROUP).map(Group::replica)
    }

    fn ticket(&mut self, at: BrokerId, asked: Asked) -> Ticket {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.tickets.insert(ticket, (at, asked));
        ticket
    }
}

/// Name of a host that left the cluster for good.
const GONE: &str = "";
