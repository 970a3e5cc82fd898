//! Deterministic simulation: many cores ([`weir_core::node::Node`]) over memory stores in one thread, with a seeded network,
//! clock and disk. One seed, one schedule.

use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use weir_core::batch::{BatchHeader, ProducerStamp, synthetic};
use weir_core::ids::{BrokerId, GroupId, ReplicaId, Ticket};
use weir_core::meta::command::{ApplyTopic, Command, Kind, Placement};
use weir_core::meta::placement;
use weir_core::meta::state::{Broker, MetaState, TopicSpec};
use weir_core::node::{Fetch, Limits, Node, Now, PeerMessage, Reply, mix};
use weir_core::storage::StoreError;
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
}

struct Host {
    node: Option<Node>,
    store: Arc<MemStore>,
    /// rounds the disk has not finished: (id, due, sync)
    disk: VecDeque<(u64, u64, bool)>,
    /// reads it has not finished, by when they will be
    reads: VecDeque<(u64, Fetch)>,
    restart_at: u64,
}

/// What one simulated producer is doing.
struct Producer {
    id: u64,
    sequence: i32,
    /// value of the batch under way and when to offer it again
    offer: Option<(u64, u64)>,
}

/// A simulated cluster with its clients and their history.
pub struct World {
    dice: Dice,
    hosts: BTreeMap<BrokerId, Host>,
    /// (due, to, from, message)
    wire: BTreeMap<(u64, u64), (BrokerId, BrokerId, PeerMessage)>,
    sent: u64,
    now: u64,
    cut: BTreeSet<(BrokerId, BrokerId)>,
    loss_percent: u64,
    group: GroupId,
    producers: Vec<Producer>,
    tickets: BTreeMap<Ticket, (BrokerId, usize)>,
    next_ticket: u64,
    next_value: u64,
    /// acknowledged: value → (producer, offset)
    pub acked: BTreeMap<u64, (usize, u64)>,
    /// reads of old entries for followers that were behind
    pub fetched: u64,
    /// a hash over everything that happened
    pub trace: u64,
}

fn value_of(data: &[u8]) -> u64 {
    u64::from_be_bytes(data[61..69].try_into().expect("a synthetic batch holds its value"))
}

impl World {
    /// A cluster of `brokers` with one topic of one partition, replicated `replicas` times.
    pub fn new(seed: u64, brokers: u64, replicas: u32) -> Self {
        let list: Vec<Broker> =
            (1..=brokers).map(|id| Broker { id, name: format!("b-{id}"), ..Default::default() }).collect();
        let mut meta = MetaState::form("sim", &list);
        let placed = placement::place(placement::candidates(&meta), 1, replicas).expect("enough brokers");
        let placements = placed.iter().map(|p| Placement { brokers: p.iter().map(|b| b.0).collect() }).collect();
        let spec = TopicSpec { partitions: 1, replicas, ..Default::default() };
        let topic = ApplyTopic { name: "default/t".into(), spec, placements, ..Default::default() };
        meta.apply(&Command::from(Kind::ApplyTopic(topic))).expect("a right topic");
        let mut world = Self {
            dice: Dice(mix(seed)),
            hosts: BTreeMap::new(),
            wire: BTreeMap::new(),
            sent: 0,
            now: 1_000,
            cut: BTreeSet::new(),
            loss_percent: 0,
            group: meta.group_of("default/t", 0).expect("just made"),
            producers: (0..3).map(|i| Producer { id: i + 1, sequence: 0, offer: None }).collect(),
            tickets: BTreeMap::new(),
            next_ticket: 1,
            next_value: 1,
            acked: BTreeMap::new(),
            fetched: 0,
            trace: 0,
        };
        for id in (1..=brokers).map(BrokerId) {
            let store = Arc::new(MemStore::default());
            let mut node = world.open(id, store.clone());
            node.create_meta(ReplicaId(id.0), Some(&meta));
            world.hosts.insert(
                id,
                Host { node: Some(node), store, disk: VecDeque::new(), reads: VecDeque::new(), restart_at: 0 },
            );
            world.pump(id);
        }
        world
    }

    fn time(&self) -> Now {
        Now { mono_ms: self.now, log_ms: self.now }
    }

    fn open(&mut self, id: BrokerId, store: Arc<MemStore>) -> Node {
        let limits = Limits { checkpoint_bytes: 4_000, tail_bytes_max: 8_000, ..Default::default() };
        let seed = self.dice.roll(u64::MAX);
        let node = Node::open(id, store, limits, seed, self.time()).expect("memory does not fail");
        assert!(node.damaged().is_empty(), "broker {id} found damage: nothing was damaged");
        node
    }

    /// The group of the one partition.
    pub fn group(&self) -> GroupId {
        self.group
    }

    /// Runs for `ms`, with faults while `faults`.
    pub fn run(&mut self, ms: u64, faults: bool) {
        let end = self.now + ms;
        while self.now < end {
            self.now += 1 + self.dice.roll(9);
            if faults {
                self.break_something();
            }
            let ids: Vec<BrokerId> = self.hosts.keys().copied().collect();
            for id in ids {
                self.restart(id);
                self.run_disk(id);
                let now = self.time();
                if let Some(node) = self.node(id) {
                    node.tick(now);
                }
                self.pump(id);
            }
            self.deliver();
            self.produce();
        }
    }

    /// Heals network and processes.
    pub fn heal(&mut self) {
        self.cut.clear();
        self.loss_percent = 0;
        let now = self.now;
        self.hosts.values_mut().for_each(|h| h.restart_at = h.restart_at.min(now));
    }

    fn node(&mut self, id: BrokerId) -> Option<&mut Node> {
        self.hosts.get_mut(&id)?.node.as_mut()
    }

    fn break_something(&mut self) {
        let n = self.hosts.len() as u64;
        match self.dice.roll(1_500) {
            0..=3 => {
                let victim = BrokerId(1 + self.dice.roll(n));
                self.crash(victim);
            }
            4 => {
                // all lose power at once
                (1..=n).for_each(|id| self.crash(BrokerId(id)));
            }
            5..=9 => {
                // one-way cuts too
                let pair = (BrokerId(1 + self.dice.roll(n)), BrokerId(1 + self.dice.roll(n)));
                self.cut.insert(pair);
                if self.dice.chance(50) {
                    self.cut.insert((pair.1, pair.0));
                }
            }
            10..=14 => self.cut.clear(),
            15..=17 => self.loss_percent = self.dice.roll(30),
            18..=20 => {
                let pair = (BrokerId(1 + self.dice.roll(n)), BrokerId(1 + self.dice.roll(n)));
                self.lose_contact(pair.0, pair.1);
            }
            _ => {}
        }
    }

    /// A reader at a broker finds old data of the partition damaged.
    pub fn find_damage(&mut self, at: BrokerId) {
        let group = self.group;
        let damage = StoreError::Damaged { group, index: 2, what: "a bit has flipped".to_owned() };
        if let Some(node) = self.node(at) {
            node.found_damage(group, damage);
        }
        self.pump(at);
    }

    /// The replica of the partition that a broker holds and that takes part.
    pub fn replica(&self, at: BrokerId) -> Option<ReplicaId> {
        self.hosts.get(&at)?.node.as_ref()?.group(self.group).map(|g| g.replica())
    }

    /// A connection breaks, whether or not the other end lives.
    pub fn lose_contact(&mut self, at: BrokerId, with: BrokerId) {
        if let Some(node) = self.node(at) {
            node.lost_contact(with);
        }
    }

    /// Who leads the partition, as each broker that runs sees it: (broker, term, leader).
    pub fn leaders(&self) -> Vec<(BrokerId, u64, BrokerId)> {
        let seen = |(id, host): (&BrokerId, &Host)| {
            let (term, leader) = host.node.as_ref()?.leader_of(self.group)?;
            Some((*id, term, leader))
        };
        self.hosts.iter().filter_map(seen).collect()
    }

    /// Ends a broker's process; its unsynced writes may be gone.
    pub fn crash(&mut self, id: BrokerId) {
        let down_ms = 50 + self.dice.roll(3_000);
        let now = self.now;
        let keep = self.dice.roll(4) as usize;
        let host = self.hosts.get_mut(&id).expect("a host");
        if host.node.take().is_some() {
            // some of what was written may reach the disk all the same
            let keep = keep.min(host.store.unsynced());
            host.store.crash(if keep == 3 { host.store.unsynced() } else { 0 });
            host.disk.clear();
            host.reads.clear();
            host.restart_at = now + down_ms;
            self.tickets.retain(|_, (broker, _)| *broker != id);
            // a process that ends breaks its connections; a machine that loses power says nothing
            let others: Vec<BrokerId> = self.hosts.keys().copied().filter(|b| *b != id).collect();
            for other in others {
                if self.dice.chance(50) {
                    self.lose_contact(other, id);
                }
            }
        }
    }

    fn restart(&mut self, id: BrokerId) {
        let host = &self.hosts[&id];
        if host.node.is_none() && host.restart_at <= self.now {
            let store = host.store.clone();
            let node = self.open(id, store);
            self.hosts.get_mut(&id).expect("a host").node = Some(node);
        }
    }

    fn run_disk(&mut self, id: BrokerId) {
        let now = self.now;
        let host = self.hosts.get_mut(&id).expect("a host");
        let Some(node) = host.node.as_mut() else { return };
        while host.disk.front().is_some_and(|(_, due, _)| *due <= now) {
            let (round, _, sync) = host.disk.pop_front().expect("just seen");
            node.written(round);
            if sync {
                weir_core::storage::Store::sync(&*host.store).expect("memory");
            }
            node.synced(round);
        }
        while host.reads.front().is_some_and(|(due, _)| *due <= now) {
            let (_, fetch) = host.reads.pop_front().expect("just seen");
            let Fetch { group, low, high, bytes_max } = fetch;
            node.fetched(fetch, weir_core::storage::Store::entries(&*host.store, group, low, high, bytes_max));
        }
    }

    fn pump(&mut self, id: BrokerId) {
        let Some(node) = self.node(id) else { return };
        let effects = node.drain();
        if let Some(round) = effects.round {
            let due = self.now + self.dice.roll(8);
            let host = self.hosts.get_mut(&id).expect("a host");
            weir_core::storage::Store::write(&*host.store, &round.ops).expect("memory");
            // the disk works in order
            let due = host.disk.back().map_or(due, |last| due.max(last.1));
            host.disk.push_back((round.id, due, round.sync));
        }
        for fetch in effects.fetches {
            self.fetched += 1;
            let due = self.now + 1 + self.dice.roll(20);
            self.hosts.get_mut(&id).expect("a host").reads.push_back((due, fetch));
        }
        for (to, envelope) in effects.messages {
            self.post(id, to, PeerMessage::Raft(envelope));
        }
        if !effects.announce.is_empty() {
            let others: Vec<BrokerId> = self.hosts.keys().copied().filter(|b| *b != id).collect();
            others.into_iter().for_each(|to| self.post(id, to, PeerMessage::Leaders(effects.announce.clone())));
        }
        for (ticket, reply) in effects.replies {
            self.replied(ticket, reply);
        }
    }

    fn post(&mut self, from: BrokerId, to: BrokerId, message: PeerMessage) {
        if self.cut.contains(&(from, to)) || self.dice.chance(self.loss_percent) {
            return;
        }
        let copies = if self.loss_percent > 0 && self.dice.chance(5) { 2 } else { 1 };
        for _ in 0..copies {
            self.sent += 1;
            let spread = if self.loss_percent > 0 { 200 } else { 4 };
            let due = self.now + 1 + self.dice.roll(spread);
            self.wire.insert((due, self.sent), (to, from, message.clone()));
        }
    }

    fn deliver(&mut self) {
        while let Some(first) = self.wire.first_entry().filter(|e| e.key().0 <= self.now) {
            let (to, from, message) = first.remove();
            self.trace = mix(self.trace ^ mix(to.0 ^ (from.0 << 8) ^ (self.now << 16)));
            if let Some(node) = self.node(to) {
                node.peer(from, message);
                self.pump(to);
            }
        }
    }

    fn produce(&mut self) {
        let group = self.group();
        for at in 0..self.producers.len() {
            let due = self.producers[at].offer.is_none_or(|(_, again)| again <= self.now);
            if !due || !self.dice.chance(30) {
                continue;
            }
            let value = self.producers[at].offer.map_or(self.next_value, |(value, _)| value);
            self.next_value = self.next_value.max(value + 1);
            // a real client follows the leader it was told of; this one guesses, as a confused one would
            let to = BrokerId(1 + self.dice.roll(self.hosts.len() as u64));
            self.producers[at].offer = Some((value, self.now + 300 + self.dice.roll(500)));
            let producer = &self.producers[at];
            let stamp = ProducerStamp { id: producer.id, epoch: 0, sequence: producer.sequence };
            let data = synthetic(1, Some(stamp), &value.to_be_bytes());
            let header = BatchHeader::validate(&data).expect("a right batch");
            let ticket = Ticket(self.next_ticket);
            self.next_ticket += 1;
            self.tickets.insert(ticket, (to, at));
            if let Some(node) = self.node(to) {
                node.publish(ticket, group, Bytes::from(data), &header);
                self.pump(to);
            }
        }
    }

    fn replied(&mut self, ticket: Ticket, reply: Reply) {
        let Some((_, at)) = self.tickets.remove(&ticket) else { return };
        let producer = &mut self.producers[at];
        let Some((value, again)) = producer.offer else { return };
        match reply {
            Reply::Published { base_offset, .. } => {
                self.acked.insert(value, (at, base_offset));
                self.trace = mix(self.trace ^ value ^ (base_offset << 32));
                producer.offer = None;
                producer.sequence += 1;
                // older offers of the same batch are answered alike; forget them
                self.tickets.retain(|_, (_, p)| *p != at);
            }
            _ => producer.offer = Some((value, again.min(self.now + 20))),
        }
    }

    /// Reads every replica and compares it with what was acknowledged: nothing lost, nothing twice, one value an offset, in order.
    pub fn check(&self) {
        let group = self.group();
        let mut logs: Vec<(BrokerId, Vec<u64>)> = Vec::new();
        for (id, host) in &self.hosts {
            let Some(group) = host.node.as_ref().and_then(|n| n.group(group)) else { continue };
            let log = group.log();
            let first = log.oldest().expect("has one").index + 1;
            let mut values = Vec::new();
            let mut index = first;
            while index <= group.applied() {
                let entries = log.tail().entries(index, group.applied() + 1, u64::MAX).unwrap_or_else(|| {
                    let high = log.tail().first_index().min(group.applied() + 1);
                    weir_core::storage::Store::entries(&*host.store, group.id(), index, high, u64::MAX)
                        .expect("readable")
                });
                index += entries.len() as u64;
                values.extend(entries.iter().filter(|e| e.data.len() > 61).map(|e| value_of(&e.data)));
            }
            logs.push((*id, values));
        }
        let (longest_of, longest) = logs.iter().max_by_key(|(_, v)| v.len()).expect("a replica");
        for (id, values) in &logs {
            assert_eq!(values[..], longest[..values.len()], "broker {id} diverges from {longest_of}");
        }
        let distinct: BTreeSet<&u64> = longest.iter().collect();
        assert_eq!(distinct.len(), longest.len(), "a value stands twice");
        for (value, (_, offset)) in &self.acked {
            assert_eq!(
                longest.get(*offset as usize),
                Some(value),
                "acknowledged value {value} is not at its offset {offset}"
            );
        }
        for at in 0..self.producers.len() {
            let order: Vec<u64> = self.acked.values().filter(|(p, _)| *p == at).map(|(_, o)| *o).collect();
            assert!(order.is_sorted(), "producer {at}'s values are out of order");
        }
    }
}
