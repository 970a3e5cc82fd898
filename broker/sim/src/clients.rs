//! Simulated clients: producers that repeat what has no answer, a reader that acknowledges, and one that takes producer ids.

use crate::World;
use bytes::Bytes;
use stateright::semantics::{ConsistencyTester as _, LinearizabilityTester, SequentialSpec};
use weir_checker::{Event, Place};
use weir_core::batch::{BatchHeader, ProducerStamp, synthetic};
use weir_core::cursor::{CursorUpdate, OffsetRange};
use weir_core::entry::Control;
use weir_core::group::Machine;
use weir_core::ids::{BrokerId, GroupId, META_GROUP};
use weir_core::meta::command::{Answer, Kind, MetaError};
use weir_core::node::Reply;
use weir_core::observe::GroupStatus;
use weir_core::storage::Store as _;
use weir_core::tail::LogBatch;

/// What one simulated producer is doing.
pub(crate) struct Producer {
    id: u64,
    partition: u32,
    sequence: i32,
    /// value of the batch under way and when to offer it again
    offer: Option<(u64, u64)>,
}

impl Producer {
    pub(crate) fn new(id: u64, partition: u32) -> Self {
        Self { id, partition, sequence: 0, offer: None }
    }
}

/// What was asked of a broker.
#[derive(Clone, Debug)]
pub(crate) enum Asked {
    /// A publish, of this producer.
    Publish(usize),
    /// An acknowledgement in this partition.
    Ack(u32),
    /// Producer ids, as this thread of the allocator.
    Allocate(u64),
    /// An id for the broker of this name, asked for the how manieth time.
    Join(String, u32),
    /// A drain.
    Drain,
    /// Something of the administrator's.
    Administer,
}

/// Producer ids by one client after another, some at the same time: a counter that only grows.
#[derive(Clone, Debug)]
pub(crate) struct Counter(u64);

impl SequentialSpec for Counter {
    type Op = u64;
    type Ret = u64;

    fn invoke(&mut self, op: &u64) -> u64 {
        let first = self.0;
        self.0 += op;
        first
    }
}

/// Operations of one history: checking takes exponential time in those that overlap.
const ALLOCATIONS_MAX: u64 = 60;
/// At one time.
const ALLOCATIONS_OPEN: usize = 2;
/// Of those that got no answer, which may take effect at any later time.
const UNANSWERED_MAX: usize = 4;

pub(crate) struct Allocator {
    pub tester: LinearizabilityTester<u64, Counter>,
    next: u64,
    open: usize,
    pub unanswered: usize,
    pub answered: usize,
}

impl Default for Allocator {
    fn default() -> Self {
        // ids are given from 1 on
        let tester = LinearizabilityTester::new(Counter(1));
        Self { tester, next: 0, open: 0, unanswered: 0, answered: 0 }
    }
}

/// The value in a batch that holds one.
pub(crate) fn value_of(data: &[u8]) -> u64 {
    u64::from_be_bytes(data[61..69].try_into().expect("a synthetic batch holds its value"))
}

impl World {
    /// Batches acknowledged to each producer.
    pub(crate) fn progress(&self) -> Vec<i32> {
        self.producers.iter().map(|p| p.sequence).collect()
    }

    pub(crate) fn produce(&mut self) {
        if self.now < self.lull_until {
            return;
        }
        for at in 0..self.producers.len() {
            let due = self.producers[at].offer.is_none_or(|(_, again)| again <= self.now);
            let group = self.groups[self.producers[at].partition as usize];
            let due = due && self.paced_until.get(&group).is_none_or(|until| *until <= self.now);
            if !due || !self.dice.chance(30) {
                continue;
            }
            let producer = &self.producers[at];
            let group = self.groups[producer.partition as usize];
            let value = match producer.offer {
                Some((value, _)) => value,
                None => {
                    let value = self.next_value;
                    self.next_value += 1;
                    self.history.push(Event::Offered { producer: producer.id, value });
                    value
                }
            };
            // a real client follows the leader it was told of; a confused one guesses
            let ids: Vec<BrokerId> = self.hosts.keys().copied().collect();
            let guess = self.dice.chance(40);
            let leader = self.leader_of(group).filter(|_| !guess);
            let to = leader.or_else(|| self.dice.pick(&ids)).expect("there are hosts");
            let wait = 300 + self.dice.roll(500);
            let producer = &mut self.producers[at];
            producer.offer = Some((value, self.now + wait));
            let stamp = ProducerStamp { id: producer.id, epoch: 0, sequence: producer.sequence };
            let data = synthetic(1, Some(stamp), &value.to_be_bytes());
            if let Some(Some(limit)) = self.paces.get(&(to, group)) {
                let wait = (data.len() as u64 * 1_000).div_ceil(*limit);
                self.paced_until.insert(group, self.now + wait);
            }
            let header = BatchHeader::validate(&data).expect("a right batch");
            let ticket = self.ticket(to, Asked::Publish(at));
            if let Some(node) = self.node(to) {
                node.publish(ticket, group, Bytes::from(data), &header);
                self.pump(to);
            }
        }
    }

    pub(crate) fn replied(&mut self, ticket: weir_core::ids::Ticket, reply: Reply) {
        let Some((broker, asked)) = self.tickets.remove(&ticket) else { return };
        match asked {
            Asked::Publish(at) => self.published(broker, at, &reply),
            Asked::Ack(partition) => {
                if reply == Reply::Done {
                    self.saw_position(broker, partition);
                }
            }
            Asked::Allocate(thread) => match reply {
                Reply::Meta(Ok(Answer::Producers(first))) => {
                    self.allocator.open -= 1;
                    self.allocator.answered += 1;
                    self.allocator.tester.on_return(thread, first).expect("it was invoked");
                    self.note(&[first]);
                }
                _ => self.unanswered(Asked::Allocate(thread)),
            },
            Asked::Join(name, asked) => {
                if let Reply::Meta(Ok(Answer::Broker(id))) = reply {
                    self.joined(&name, asked, BrokerId(id));
                }
            }
            Asked::Drain => {
                if let Reply::Meta(Err(MetaError::Placement(_))) = reply {
                    self.drain_refused();
                }
            }
            Asked::Administer => {}
        }
    }

    /// Nobody will answer any more; whether it was done is not known.
    pub(crate) fn unanswered(&mut self, asked: Asked) {
        if let Asked::Allocate(_) = asked {
            self.allocator.open -= 1;
            self.allocator.unanswered += 1;
        }
    }

    fn published(&mut self, broker: BrokerId, at: usize, reply: &Reply) {
        if let Reply::Published { base_offset, .. } = reply {
            let partition = self.producers[at].partition;
            let term = self.group_at(broker, self.groups[partition as usize]).map_or(0, |g| g.term());
            let known = self.ends.entry(partition).or_default();
            *known = (known.0.max(term), known.1.max(base_offset + 1));
        }
        let now = self.now;
        let producer = &mut self.producers[at];
        let Some((value, again)) = producer.offer else { return };
        match reply {
            Reply::Published { base_offset, .. } => {
                let at_place = Place { partition: producer.partition, offset: *base_offset };
                producer.offer = None;
                producer.sequence += 1;
                self.history.push(Event::Acked { value, at: at_place });
                self.note(&[value, *base_offset]);
                // older offers of the same batch are answered alike; forget them
                self.tickets.retain(|_, (_, asked)| !matches!(asked, Asked::Publish(p) if *p == at));
            }
            _ => producer.offer = Some((value, again.min(now + 20))),
        }
    }

    /// Reads on from the subscription's position at whoever takes itself for the leader, and acknowledges.
    pub(crate) fn consume(&mut self) {
        if self.now < self.lull_until {
            return;
        }
        for partition in 0..self.groups.len() as u32 {
            if !self.dice.chance(4) {
                continue;
            }
            let id = self.groups[partition as usize];
            let leaders = self.claims_of(id);
            let Some((_, at)) = self.dice.pick(&leaders) else { continue };
            self.saw_end(at, id);
            let Some(position) = self.position(at, partition) else { continue };
            let batches = self.read(at, partition, position);
            let Some(end) = batches.last().map(LogBatch::end_offset) else { continue };
            for batch in &batches {
                let place = Place { partition, offset: batch.base_offset };
                self.history.push(Event::Read { at: place, value: value_of(&batch.data) });
            }
            // some of it at once, some not in order
            let start = if self.dice.chance(20) { (position + 1).min(end - 1) } else { position };
            let acked = vec![OffsetRange { start, end }];
            let update = CursorUpdate { subscription: self.subscription, acked, ..Default::default() };
            let ticket = self.ticket(at, Asked::Ack(partition));
            if let Some(node) = self.node(at) {
                node.control(ticket, id, &Control { cursors: vec![update], ..Default::default() });
            }
            self.pump(at);
        }
    }

    pub(crate) fn position(&self, at: BrokerId, partition: u32) -> Option<u64> {
        let group = self.group_at(at, self.groups[partition as usize])?;
        let Machine::Partition(state) = group.machine() else { return None };
        state.cursors.get(self.subscription).map(|c| c.position())
    }

    /// A leader told a position. What one of an older term tells late is what was true then.
    pub(crate) fn saw_position(&mut self, at: BrokerId, partition: u32) {
        let group = self.group_at(at, self.groups[partition as usize]);
        let Some(term) = group.filter(|g| g.serves()).map(|g| g.term()) else { return };
        let newest = self.position_terms.entry(partition).or_default();
        if term < *newest {
            return;
        }
        *newest = term;
        if let Some(offset) = self.position(at, partition) {
            self.history.push(Event::Position { subscription: self.subscription, partition, offset });
        }
    }

    /// Whoever serves a partition is asked where it ends, as readers do: all that was acknowledged lies before. A leader of an older
    /// term may not know yet that there is a newer one.
    pub(crate) fn saw_end(&mut self, at: BrokerId, group: GroupId) {
        let Some(partition) = self.groups.iter().position(|g| *g == group) else { return };
        let seen = self.node(at).map_or(Vec::new(), |node| node.observe(META_GROUP));
        let Some(GroupStatus { term, high_watermark: end, .. }) = seen.into_iter().find(|s| s.group == group) else {
            return;
        };
        let known = self.ends.entry(partition as u32).or_default();
        if term >= known.0 {
            assert!(end >= known.1, "{at} serves {group} in term {term} and ends it at {end}: {} was told", known.1);
            *known = (term, end);
        }
    }

    fn read(&self, at: BrokerId, partition: u32, offset: u64) -> Vec<LogBatch> {
        let id = self.groups[partition as usize];
        let Some(group) = self.group_at(at, id) else { return Vec::new() };
        let store = &self.hosts[&at].store;
        let tail = group.log().tail();
        if let Some(batches) = tail.batches(offset, 2_000) {
            return batches;
        }
        let Ok(Some(low)) = store.locate_offset(id, offset) else { return Vec::new() };
        let entries = store.entries(id, low, tail.first_index(), 2_000).unwrap_or_default();
        let limit = tail.high_watermark();
        entries.iter().filter_map(LogBatch::of).filter(|b| b.end_offset() <= limit).collect()
    }

    /// Takes producer ids, at the metadata's leader or at one that takes itself for it.
    pub(crate) fn allocate(&mut self) {
        let all = &self.allocator;
        let may = all.next < ALLOCATIONS_MAX && all.open < ALLOCATIONS_OPEN && all.unanswered < UNANSWERED_MAX;
        if !may || !self.dice.chance(1) {
            return;
        }
        let leaders = self.claims_of(META_GROUP);
        let Some((_, at)) = self.dice.pick(&leaders) else { return };
        let count = 1 + self.dice.roll(3);
        let thread = self.allocator.next;
        self.allocator.next += 1;
        self.allocator.open += 1;
        self.allocator.tester.on_invoke(thread, count).expect("a thread of its own");
        self.propose(at, Asked::Allocate(thread), Kind::AllocateProducers(count as u32));
    }
}
