//! The metadata state. It is a protobuf message, so that a checkpoint of it is its own encoding; tags are stable.

use crate::delivery::{Mode, Policy};
use crate::ids::{BrokerId, GroupId, META_GROUP, Replica, ReplicaId};
use crate::meta::names;
use crate::pattern;
use std::collections::BTreeMap;

/// Whether a broker takes replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Phase {
    /// Takes replicas.
    Active = 0,
    /// Its replicas are moved away, then it is removed.
    Draining = 1,
    /// Its disk is gone: it never comes back; its replicas are replaced.
    Lost = 2,
    /// Named by an administrator, has not joined yet.
    Expected = 3,
}

/// A broker.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Broker {
    /// Its id.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Its name (a StatefulSet's pod name, say); a new disk under an old name is a new broker.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Where clients reach it, `host:port`.
    #[prost(string, tag = "3")]
    pub client_address: String,
    /// Where peers reach it.
    #[prost(string, tag = "4")]
    pub peer_address: String,
    /// Where administrators reach it.
    #[prost(string, tag = "5")]
    pub admin_address: String,
    /// Failure domain; empty for none.
    #[prost(string, tag = "6")]
    pub rack: String,
    /// See [`Phase`].
    #[prost(enumeration = "Phase", tag = "7")]
    pub phase: i32,
    /// The newest [`Incarnation`](crate::incarnation::Incarnation) recorded of its data; at least that of its last start.
    #[prost(uint64, tag = "8")]
    pub incarnation: u64,
    /// Why the data was set aside that a broker of this name had, where it was; for people.
    #[prost(string, tag = "9")]
    pub rebuilt_because: String,
}

/// What a topic promises.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TopicSpec {
    /// Number of partitions.
    #[prost(uint32, tag = "1")]
    pub partitions: u32,
    /// Replicas of each.
    #[prost(uint32, tag = "2")]
    pub replicas: u32,
    /// Records older than this may go, ms; 0 keeps them.
    #[prost(uint64, tag = "3")]
    pub retention_ms: u64,
    /// A partition larger than this loses its oldest records, bytes; 0 for no limit.
    #[prost(uint64, tag = "4")]
    pub retention_bytes: u64,
    /// Largest batch taken, bytes.
    #[prost(uint32, tag = "5")]
    pub message_bytes_max: u32,
    /// Whether an ack waits for a majority's disk sync (default) or only for its memory.
    #[prost(bool, tag = "6")]
    pub quorum_memory: bool,
    /// Full name of the topic that its messages go to when they are due; empty for an ordinary topic.
    #[prost(string, tag = "7")]
    pub schedule_for: String,
}

/// A topic.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Topic {
    /// Its id.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// `namespace/name`.
    #[prost(string, tag = "2")]
    pub name: String,
    /// What it promises.
    #[prost(message, required, tag = "3")]
    pub spec: TopicSpec,
    /// Groups of its partitions, in order.
    #[prost(uint64, repeated, tag = "4")]
    pub groups: Vec<u64>,
    /// Who declared it: the uid of a resource.
    #[prost(string, tag = "5")]
    pub owner_uid: String,
    /// Generation of that resource.
    #[prost(uint64, tag = "6")]
    pub generation: u64,
}

/// A replica as the metadata group records it.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct ReplicaRecord {
    /// The replica's id.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Its broker.
    #[prost(uint64, tag = "2")]
    pub broker: u64,
    /// A learner: follows, never votes. (In the metadata group, from the sixth broker on.)
    #[prost(bool, tag = "3")]
    pub learner: bool,
}

impl From<ReplicaRecord> for Replica {
    fn from(r: ReplicaRecord) -> Self {
        Self { id: ReplicaId(r.id), broker: BrokerId(r.broker) }
    }
}

/// Where the replicas of a group should be.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Assignment {
    /// The topic; 0 for the metadata group.
    #[prost(uint64, tag = "1")]
    pub topic: u64,
    /// The partition.
    #[prost(uint32, tag = "2")]
    pub partition: u32,
    /// Wanted replicas, the preferred leader first.
    #[prost(message, repeated, tag = "3")]
    pub replicas: Vec<ReplicaRecord>,
    /// Replicas of earlier assignments that may still be members.
    #[prost(message, repeated, tag = "4")]
    pub leaving: Vec<ReplicaRecord>,
    /// Counts the assignments; 0 is the one the group was made with.
    #[prost(uint64, tag = "5")]
    pub epoch: u64,
    /// The epoch whose membership the group's leader has reported as reached.
    #[prost(uint64, tag = "6")]
    pub settled_epoch: u64,
}

impl Assignment {
    /// The broker of a replica, wanted or leaving.
    pub fn broker_of(&self, replica: ReplicaId) -> Option<BrokerId> {
        self.replicas.iter().chain(&self.leaving).find(|r| r.id == replica.0).map(|r| BrokerId(r.broker))
    }

    /// The wanted replica on a broker.
    pub fn replica_on(&self, broker: BrokerId) -> Option<ReplicaRecord> {
        self.replicas.iter().find(|r| r.broker == broker.0).copied()
    }

    /// Whether membership is what is wanted.
    pub fn is_settled(&self) -> bool {
        self.epoch == self.settled_epoch
    }
}

/// Where a new subscription starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Start {
    /// With records published after it was made.
    Latest = 0,
    /// With the oldest record kept.
    Earliest = 1,
}

/// What a subscription promises.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SubscriptionSpec {
    /// The topic's full name.
    #[prost(string, tag = "1")]
    pub topic: String,
    /// Where it starts.
    #[prost(enumeration = "Start", tag = "2")]
    pub start: i32,
    /// How long a consumer may hold a message unacknowledged, ms.
    #[prost(uint64, tag = "3")]
    pub ack_deadline_ms: u64,
    /// How messages are shared.
    #[prost(enumeration = "Mode", tag = "4")]
    pub mode: i32,
    /// Wait before the first redelivery, ms.
    #[prost(uint64, tag = "5")]
    pub backoff_min_ms: u64,
    /// Longest wait before a redelivery, ms.
    #[prost(uint64, tag = "6")]
    pub backoff_max_ms: u64,
    /// Messages leased at one time in each partition.
    #[prost(uint32, tag = "7")]
    pub in_flight_max: u32,
    /// Deliveries of one message that may fail before it is buried; 0 for any number.
    #[prost(uint32, tag = "8")]
    pub deliveries_max: u32,
    /// Full name of the topic that takes what is buried; empty to drop it.
    #[prost(string, tag = "9")]
    pub dead_letter_topic: String,
    /// CEL expression a message must meet; empty for all.
    #[prost(string, tag = "10")]
    pub filter: String,
    /// Messages delivered each second over all partitions; 0 for any number.
    #[prost(uint64, tag = "11")]
    pub messages_per_second: u64,
    /// Bytes of keys and values delivered each second over all partitions; 0 for any number.
    #[prost(uint64, tag = "12")]
    pub bytes_per_second: u64,
    /// Messages that may go out at once after a pause; 0 for as many as a tenth of a second allows.
    #[prost(uint64, tag = "13")]
    pub burst_messages: u64,
    /// Messages leased at one time to one member in each partition; 0 for any number.
    #[prost(uint32, tag = "14")]
    pub in_flight_member_max: u32,
    /// Messages are given out by priority; in [`Mode::Shared`] only.
    #[prost(bool, tag = "15")]
    pub priorities: bool,
    /// A message's routing key must match one of these patterns; none for all messages.
    #[prost(string, repeated, tag = "16")]
    pub routing_keys: Vec<String>,
    /// Where messages are pushed to; none where members come for them.
    #[prost(message, optional, tag = "17")]
    pub push: Option<Push>,
    /// It starts with the first record appended at or after this time, ms since the epoch; `None` for what `start` says.
    #[prost(uint64, optional, tag = "18")]
    pub start_ms: Option<u64>,
}

/// Where and how messages are pushed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Push {
    /// An `http:` or `https:` URL.
    #[prost(string, tag = "1")]
    pub endpoint: String,
    /// Requests under way at one time from each partition.
    #[prost(uint32, tag = "2")]
    pub concurrency: u32,
    /// How long an answer may take, ms.
    #[prost(uint64, tag = "3")]
    pub timeout_ms: u64,
}

impl SubscriptionSpec {
    /// What the delivery goes by.
    pub fn policy(&self) -> Policy {
        Policy {
            mode: self.mode(),
            ack_deadline_ms: self.ack_deadline_ms,
            backoff_min_ms: self.backoff_min_ms,
            backoff_max_ms: self.backoff_max_ms,
            // subscriptions made before there was a choice say 0
            leased_max: if self.in_flight_max == 0 { Policy::default().leased_max } else { self.in_flight_max.into() },
            deliveries_max: self.deliveries_max,
            leased_by_member_max: match self.in_flight_member_max {
                0 => u64::MAX,
                max => max.into(),
            },
            priorities: self.priorities && self.mode() == Mode::Shared,
        }
    }

    /// Whether it reads a topic.
    pub fn reads(&self, topic: &Topic) -> bool {
        if !pattern::is_pattern(&self.topic) {
            return self.topic == topic.name;
        }
        !names::is_internal(&topic.name) && pattern::matches_topic(&self.topic, &topic.name)
    }
}

/// A subscription.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Subscription {
    /// Its id.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// `namespace/name`.
    #[prost(string, tag = "2")]
    pub name: String,
    /// What it promises.
    #[prost(message, required, tag = "3")]
    pub spec: SubscriptionSpec,
    /// The topic's id when it was made; 0 for one that reads all topics of a pattern.
    #[prost(uint64, tag = "4")]
    pub topic_id: u64,
    /// Who declared it.
    #[prost(string, tag = "5")]
    pub owner_uid: String,
    /// Generation of that resource.
    #[prost(uint64, tag = "6")]
    pub generation: u64,
    /// The subscription whose position this one keeps as it was, and is not delivered itself; 0 for an ordinary one.
    #[prost(uint64, tag = "7")]
    pub snapshot_of: u64,
    /// Of a snapshot, its name among the snapshots of that subscription.
    #[prost(string, tag = "8")]
    pub snapshot_name: String,
    /// The subscription whose redriven dead letters this one remembers: it is deleted with that one, and retention does not wait for it.
    /// 0 for all others.
    #[prost(uint64, tag = "9")]
    pub redrive_of: u64,
}

/// Everything the metadata group knows.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MetaState {
    /// The cluster's id.
    #[prost(string, tag = "1")]
    pub cluster_id: String,
    /// Counts changes; a `Metadata` answer carries it.
    #[prost(uint64, tag = "2")]
    pub version: u64,
    /// Last id given, of any kind: ids are never reused.
    #[prost(uint64, tag = "3")]
    pub last_id: u64,
    /// Next producer id.
    #[prost(uint64, tag = "4")]
    pub next_producer_id: u64,
    /// Brokers by id.
    #[prost(btree_map = "uint64, message", tag = "5")]
    pub brokers: BTreeMap<u64, Broker>,
    /// Topics by full name.
    #[prost(btree_map = "string, message", tag = "6")]
    pub topics: BTreeMap<String, Topic>,
    /// Assignments by group id, the metadata group's own (0) among them.
    #[prost(btree_map = "uint64, message", tag = "7")]
    pub groups: BTreeMap<u64, Assignment>,
    /// Subscriptions by full name.
    #[prost(btree_map = "string, message", tag = "8")]
    pub subscriptions: BTreeMap<String, Subscription>,
    /// Groups whose topic was deleted: the recorded decision without which no data is removed.
    #[prost(btree_map = "uint64, bool", tag = "9")]
    pub deleted_groups: BTreeMap<u64, bool>,
}

impl MetaState {
    /// The state a cluster is formed with: its brokers with ids 1.. in the order given, up to five of them voting.
    pub fn form(cluster_id: &str, brokers: &[Broker]) -> Self {
        let replicas = brokers
            .iter()
            .enumerate()
            .map(|(at, b)| ReplicaRecord { id: b.id, broker: b.id, learner: at >= crate::meta::plan::META_VOTERS_MAX })
            .collect();
        Self {
            cluster_id: cluster_id.to_owned(),
            version: 1,
            last_id: brokers.iter().map(|b| b.id).max().unwrap_or(0),
            next_producer_id: 1,
            brokers: brokers.iter().map(|b| (b.id, b.clone())).collect(),
            groups: BTreeMap::from([(META_GROUP.0, Assignment { replicas, ..Default::default() })]),
            ..Default::default()
        }
    }

    /// A broker by id.
    pub fn broker(&self, id: BrokerId) -> Option<&Broker> {
        self.brokers.get(&id.0)
    }

    /// The broker that last had a name and is not lost.
    pub fn broker_named(&self, name: &str) -> Option<&Broker> {
        self.brokers.values().find(|b| b.name == name && b.phase() != Phase::Lost)
    }

    /// Returns true if a broker has a replica of the metadata group, and so learns of what is decided.
    pub fn follows_metadata(&self, broker: u64) -> bool {
        self.assignment(META_GROUP).is_some_and(|a| a.replica_on(BrokerId(broker)).is_some())
    }

    /// An assignment by group.
    pub fn assignment(&self, group: GroupId) -> Option<&Assignment> {
        self.groups.get(&group.0)
    }

    /// The group of a topic's partition.
    pub fn group_of(&self, topic: &str, partition: u32) -> Option<GroupId> {
        self.topics.get(topic)?.groups.get(partition as usize).map(|g| GroupId(*g))
    }

    /// The topic that holds the scheduled messages of a topic, once there is one.
    pub fn schedule_of(&self, topic: &Topic) -> Option<&Topic> {
        self.topics.get(&names::scheduled(topic.id))
    }

    /// A snapshot of a subscription.
    pub fn snapshot(&self, subscription: &str, name: &str) -> Option<&Subscription> {
        self.subscriptions.get(&names::snapshot(self.subscriptions.get(subscription)?.id, name))
    }

    pub(crate) fn take_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }
}
