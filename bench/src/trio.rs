//! The cores of a few brokers in one thread: what one sends the others have at once, and what it writes is written there and then.

use bytes::Bytes;
use std::sync::Arc;
use weir_core::batch::BatchHeader;
use weir_core::ids::{BrokerId, GroupId, ReplicaId, Ticket};
use weir_core::meta::command::{ApplyTopic, Command, Kind, Placement};
use weir_core::meta::state::{Broker, MetaState, TopicSpec};
use weir_core::node::{Limits, Node, Now, PeerMessage, Reply};
use weir_core::storage::Store;

/// See the module.
pub(crate) struct Trio {
    cores: Vec<(Node, Arc<dyn Store>)>,
    group: GroupId,
    leader: usize,
    ticket: u64,
    ms: u64,
}

impl Trio {
    /// One broker a store, with a topic of one partition that all of them hold, and its leader elected.
    pub(crate) fn new(stores: Vec<Arc<dyn Store>>) -> Self {
        let ids: Vec<u64> = (1..=stores.len() as u64).collect();
        let broker = |id: &u64| Broker { id: *id, name: format!("b-{id}"), ..Default::default() };
        let mut meta = MetaState::form("c", &ids.iter().map(broker).collect::<Vec<_>>());
        let spec = TopicSpec { partitions: 1, replicas: ids.len() as u32, ..Default::default() };
        let placements = vec![Placement { brokers: ids.clone() }];
        let topic = ApplyTopic { name: "default/t".into(), spec, placements, ..Default::default() };
        meta.apply(&Command::from(Kind::ApplyTopic(topic))).expect("a right topic");
        let group = meta.group_of("default/t", 0).expect("just made");
        let open = |(id, store): (&u64, Arc<dyn Store>)| {
            let now = Now { mono_ms: 1, log_ms: 1 };
            let mut node =
                Node::open(BrokerId(*id), store.clone(), Limits::default(), *id, now).expect("an empty store");
            node.create_meta(ReplicaId(*id), Some(&meta));
            (node, store)
        };
        let cores = ids.iter().zip(stores).map(open).collect();
        let mut all = Self { cores, group, leader: 0, ticket: 0, ms: 1 };
        while !all.is_led() {
            all.pass(25);
        }
        all
    }

    fn is_led(&mut self) -> bool {
        let leads =
            |(node, _): &(Node, _)| node.leader_of(self.group).is_some_and(|(_, leader)| leader == node.broker());
        let leader = self.cores.iter().position(leads);
        self.leader = leader.unwrap_or(0);
        leader.is_some() && self.ms > 10_000 // by then leadership has moved to where it is preferred
    }

    /// Lets time pass.
    fn pass(&mut self, ms: u64) {
        self.ms += ms;
        for (node, _) in &mut self.cores {
            node.tick(Now { mono_ms: self.ms, log_ms: self.ms });
        }
        self.settle(Ticket(0));
    }

    /// Carries out all that the cores want until they want nothing more; the answer to a ticket.
    fn settle(&mut self, ticket: Ticket) -> Option<Reply> {
        let mut answer = None;
        loop {
            let mut busy = false;
            for at in 0..self.cores.len() {
                let (node, store) = &mut self.cores[at];
                let from = node.broker();
                let effects = node.drain();
                answer = answer.or(effects.replies.into_iter().find(|(t, _)| *t == ticket).map(|(_, reply)| reply));
                if let Some(round) = effects.round {
                    store.write(&round.ops).expect("the store takes it");
                    node.written(round.id);
                    if round.sync {
                        store.sync().expect("the store takes it");
                    }
                    node.synced(round.id);
                    busy = true;
                }
                let raft = effects.messages.into_iter().map(|(to, message)| (to, PeerMessage::Raft(message)));
                let asleep = effects.asleep.into_iter().map(|(to, asleep)| (to, PeerMessage::Asleep(vec![asleep])));
                for (to, message) in raft.chain(asleep) {
                    self.cores[to.0 as usize - 1].0.peer(from, message);
                    busy = true;
                }
                if !effects.announce.is_empty() || effects.pulse.is_some() {
                    for (other, _) in self.cores.iter_mut().filter(|(other, _)| other.broker() != from) {
                        other.peer(from, PeerMessage::Alive);
                        other.peer(from, PeerMessage::Leaders(effects.announce.clone()));
                    }
                }
            }
            if !busy {
                return answer;
            }
        }
    }

    /// Checks a batch as a broker does, publishes it, and gives its first offset once it is acknowledged.
    pub(crate) fn publish(&mut self, data: Bytes) -> u64 {
        let header = BatchHeader::validate(&data).expect("a right batch");
        self.ticket += 1;
        let ticket = Ticket(self.ticket);
        self.cores[self.leader].0.publish(ticket, self.group, data, &header);
        match self.settle(ticket) {
            Some(Reply::Published { base_offset, .. }) => base_offset,
            other => panic!("not published: {other:?}"),
        }
    }
}
