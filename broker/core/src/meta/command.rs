//! Commands to the metadata group and what applying them does. Placement is decided by the leader before it proposes
//! (see [`super::placement`]), so that applying stays the same in every version of the program.

use super::check::check;
use super::names;
use super::placement::{self, PlacementError};
use super::state::*;
use crate::pattern;
use crate::producer::OWN_PRODUCERS;
use std::collections::BTreeMap;
use thiserror::Error;

/// Brokers for one new partition, the preferred leader first.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Placement {
    /// Broker ids.
    #[prost(uint64, repeated, tag = "1")]
    pub brokers: Vec<u64>,
}

/// Creates a topic, or changes one: fields that may change, and more partitions.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ApplyTopic {
    /// Full name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// What it should be.
    #[prost(message, required, tag = "2")]
    pub spec: TopicSpec,
    /// Uid of the resource that says so; empty from the command line.
    #[prost(string, tag = "3")]
    pub owner_uid: String,
    /// Its generation.
    #[prost(uint64, tag = "4")]
    pub generation: u64,
    /// Brokers of the partitions to add.
    #[prost(message, repeated, tag = "5")]
    pub placements: Vec<Placement>,
}

/// Creates or changes a subscription.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ApplySubscription {
    /// Full name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// What it should be.
    #[prost(message, required, tag = "2")]
    pub spec: SubscriptionSpec,
    /// Uid of the resource that says so.
    #[prost(string, tag = "3")]
    pub owner_uid: String,
    /// Its generation.
    #[prost(uint64, tag = "4")]
    pub generation: u64,
}

/// Keeps a subscription's position as it is, under a name.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TakeSnapshot {
    /// Full name of the subscription.
    #[prost(string, tag = "1")]
    pub subscription: String,
    /// Name of the snapshot among those of the subscription.
    #[prost(string, tag = "2")]
    pub name: String,
}

/// Makes the position that remembers which dead letters of a subscription were redriven.
#[derive(Clone, PartialEq, prost::Message)]
pub struct OpenRedrive {
    /// Full name of the subscription.
    #[prost(string, tag = "1")]
    pub subscription: String,
}

/// Deletes by name, if the owner agrees.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Delete {
    /// Full name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Uid of the owner; empty for an administrator.
    #[prost(string, tag = "2")]
    pub owner_uid: String,
    /// Only forget the owner.
    #[prost(bool, tag = "3")]
    pub release: bool,
}

/// Changes where a group's replicas should be.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Reassign {
    /// The group.
    #[prost(uint64, tag = "1")]
    pub group: u64,
    /// Refused unless this is the current epoch.
    #[prost(uint64, tag = "2")]
    pub expected_epoch: u64,
    /// Brokers wanted, preferred leader first. Those that have a replica keep it.
    #[prost(uint64, repeated, tag = "3")]
    pub brokers: Vec<u64>,
    /// From this position on, the replicas are learners (metadata group); 0 for none.
    #[prost(uint32, tag = "4")]
    pub voters_max: u32,
    /// A replica that lost its data and gets a new id on its broker; 0 for none.
    #[prost(uint64, tag = "5")]
    pub renew: u64,
}

/// The leader of a group reports that membership is what an epoch wants.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Settled {
    /// The group.
    #[prost(uint64, tag = "1")]
    pub group: u64,
    /// The epoch reached.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
}

/// Changes a broker's phase; `removed` takes it out of the list.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct SetPhase {
    /// The broker.
    #[prost(uint64, tag = "1")]
    pub broker: u64,
    /// The phase.
    #[prost(enumeration = "Phase", tag = "2")]
    pub phase: i32,
    /// Take it out of the list; refused while it holds a replica.
    #[prost(bool, tag = "3")]
    pub removed: bool,
}

/// Records that a broker was started: see [`crate::incarnation`].
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct SetIncarnation {
    /// The broker.
    #[prost(uint64, tag = "1")]
    pub broker: u64,
    /// Incarnation of its data; a lower one than is recorded changes nothing.
    #[prost(uint64, tag = "2")]
    pub incarnation: u64,
}

/// One command.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Command {
    /// Which.
    #[prost(oneof = "Kind", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14")]
    pub kind: Option<Kind>,
}

/// The kinds of commands.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Kind {
    /// A broker with an empty disk asks for an id.
    #[prost(message, tag = "1")]
    Register(Broker),
    /// A broker's addresses changed.
    #[prost(message, tag = "2")]
    UpdateBroker(Broker),
    /// See [`SetPhase`].
    #[prost(message, tag = "3")]
    SetPhase(SetPhase),
    /// See [`ApplyTopic`].
    #[prost(message, tag = "4")]
    ApplyTopic(ApplyTopic),
    /// Deletes a topic with its data and subscriptions' positions.
    #[prost(message, tag = "5")]
    DeleteTopic(Delete),
    /// See [`ApplySubscription`].
    #[prost(message, tag = "6")]
    ApplySubscription(ApplySubscription),
    /// Deletes a subscription.
    #[prost(message, tag = "7")]
    DeleteSubscription(Delete),
    /// See [`Reassign`].
    #[prost(message, tag = "8")]
    Reassign(Reassign),
    /// See [`Settled`].
    #[prost(message, tag = "9")]
    Settled(Settled),
    /// Gives so many producer ids, at least one.
    #[prost(uint32, tag = "10")]
    AllocateProducers(u32),
    /// An administrator names a broker that may join.
    #[prost(message, tag = "11")]
    Expect(Broker),
    /// See [`TakeSnapshot`].
    #[prost(message, tag = "12")]
    TakeSnapshot(TakeSnapshot),
    /// See [`SetIncarnation`].
    #[prost(message, tag = "13")]
    SetIncarnation(SetIncarnation),
    /// See [`OpenRedrive`].
    #[prost(message, tag = "14")]
    OpenRedrive(OpenRedrive),
}

/// Snapshots of one subscription.
pub const SNAPSHOTS_MAX: usize = 100;

/// What a command answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Done, or already so.
    Done,
    /// The id a broker was given.
    Broker(u64),
    /// First of the producer ids given.
    Producers(u64),
}

/// Why a command changed nothing.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum MetaError {
    /// The named thing does not exist.
    #[error("{kind} {name} does not exist")]
    NotFound { kind: &'static str, name: String },
    /// Another resource owns it.
    #[error("{name} belongs to another resource (uid {owner})")]
    Conflict { name: String, owner: String },
    /// A change that is not allowed.
    #[error("{0}")]
    Invalid(String),
    /// The brokers left cannot hold all replicas.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// Decided on what has changed since; decide again.
    #[error("decided on an old version")]
    Stale,
}

fn not_found(kind: &'static str, name: &str) -> MetaError {
    MetaError::NotFound { kind, name: name.to_owned() }
}

/// Refuses what a client may not touch, in case a broker did not.
fn check_not_internal(name: &str) -> Result<(), MetaError> {
    if names::is_internal(name) {
        return Err(MetaError::Invalid(format!("{name} is internal: brokers keep it for themselves")));
    }
    Ok(())
}

/// Whether a change is that of a topic's schedule, as safe as the topic is now: a drain is checked against the topic alone.
fn is_schedule_of(topic: &Topic, change: &ApplyTopic) -> bool {
    let (of, spec) = (&topic.spec, &change.spec);
    change.name == names::scheduled(topic.id) && (of.replicas, of.quorum_memory) == (spec.replicas, spec.quorum_memory)
}

fn check_owner(name: &str, owner: &str, uid: &str) -> Result<(), MetaError> {
    if owner.is_empty() || uid.is_empty() || owner == uid {
        return Ok(());
    }
    Err(MetaError::Conflict { name: name.to_owned(), owner: owner.to_owned() })
}

impl From<Kind> for Command {
    fn from(kind: Kind) -> Self {
        Self { kind: Some(kind) }
    }
}

impl MetaState {
    /// Applies a command. Deterministic; an error leaves the state as it was.
    pub fn apply(&mut self, command: &Command) -> Result<Answer, MetaError> {
        let before = self.version;
        let answer = match &command.kind {
            None => Ok(Answer::Done), // from a newer version: ignored by all alike
            Some(kind) => check(kind).and_then(|()| self.carry_out(kind)),
        };
        self.version = before + 1;
        answer
    }

    fn carry_out(&mut self, kind: &Kind) -> Result<Answer, MetaError> {
        match kind {
            Kind::Register(b) => self.register(b),
            Kind::UpdateBroker(b) => self.update_broker(b),
            Kind::Expect(b) => self.expect(b),
            Kind::SetPhase(c) => self.set_phase(c),
            Kind::ApplyTopic(c) => self.apply_topic(c),
            Kind::DeleteTopic(c) => self.delete_topic(c),
            Kind::ApplySubscription(c) => self.apply_subscription(c),
            Kind::DeleteSubscription(c) => self.delete_subscription(c),
            Kind::TakeSnapshot(c) => self.take_snapshot(c),
            Kind::SetIncarnation(c) => self.set_incarnation(c),
            Kind::OpenRedrive(c) => self.open_redrive(c),
            Kind::Reassign(c) => self.reassign(c),
            Kind::Settled(c) => self.settle(c),
            Kind::AllocateProducers(count) => self.allocate_producers(*count),
        }
    }

    fn allocate_producers(&mut self, count: u32) -> Result<Answer, MetaError> {
        let first = self.next_producer_id;
        let next = first.saturating_add(u64::from(count.max(1)));
        if next > OWN_PRODUCERS {
            return Err(MetaError::Invalid("all producer ids are given".to_owned()));
        }
        self.next_producer_id = next;
        Ok(Answer::Producers(first))
    }

    fn set_incarnation(&mut self, change: &SetIncarnation) -> Result<Answer, MetaError> {
        let broker = self.brokers.get_mut(&change.broker);
        let broker = broker.ok_or_else(|| not_found("broker", &change.broker.to_string()))?;
        broker.incarnation = broker.incarnation.max(change.incarnation);
        Ok(Answer::Done)
    }

    fn register(&mut self, broker: &Broker) -> Result<Answer, MetaError> {
        let Some(old) = self.broker_named(&broker.name).cloned() else {
            return Err(not_found("a place for broker", &broker.name));
        };
        if old.phase() == Phase::Expected {
            self.brokers.remove(&old.id);
        } else {
            self.brokers.entry(old.id).and_modify(|b| b.phase = Phase::Lost.into());
        }
        let id = self.take_id();
        self.brokers.insert(id, Broker { id, phase: Phase::Active.into(), incarnation: 0, ..broker.clone() });
        Ok(Answer::Broker(id))
    }

    fn update_broker(&mut self, broker: &Broker) -> Result<Answer, MetaError> {
        let old = self.brokers.get_mut(&broker.id).ok_or_else(|| not_found("broker", &broker.name))?;
        *old = Broker {
            phase: old.phase,
            name: old.name.clone(),
            incarnation: old.incarnation,
            rebuilt_because: old.rebuilt_because.clone(),
            ..broker.clone()
        };
        Ok(Answer::Done)
    }

    fn expect(&mut self, broker: &Broker) -> Result<Answer, MetaError> {
        if let Some(old) = self.broker_named(&broker.name) {
            return Ok(Answer::Broker(old.id));
        }
        let id = self.take_id();
        self.brokers.insert(id, Broker { id, phase: Phase::Expected.into(), incarnation: 0, ..broker.clone() });
        Ok(Answer::Broker(id))
    }

    fn set_phase(&mut self, change: &SetPhase) -> Result<Answer, MetaError> {
        let name = change.broker.to_string();
        let Some(phase) = self.brokers.get(&change.broker).map(Broker::phase) else {
            return if change.removed { Ok(Answer::Done) } else { Err(not_found("broker", &name)) };
        };
        if change.removed {
            if phase == Phase::Active {
                return Err(MetaError::Invalid(format!("broker {name} is active: it is drained before it is removed")));
            }
            let holds = |a: &Assignment| a.replicas.iter().chain(&a.leaving).any(|r| r.broker == change.broker);
            if let Some((group, _)) = self.groups.iter().find(|(_, a)| holds(a)) {
                return Err(MetaError::Invalid(format!("broker {name} still holds a replica of group {group}")));
            }
            self.brokers.remove(&change.broker);
            return Ok(Answer::Done);
        }
        // here and not only where it is decided: another drain may have been applied since
        match (phase, change.phase()) {
            (Phase::Active, Phase::Draining) => placement::check_drain(self, change.broker)?,
            // one that has left the metadata group would never learn that it stays
            (Phase::Draining, Phase::Active) if !self.follows_metadata(change.broker) => return Err(MetaError::Stale),
            (Phase::Active | Phase::Draining, _) => {}
            _ => {
                let text = format!("broker {name} is {phase:?}: only an active or draining one is changed");
                return Err(MetaError::Invalid(text));
            }
        }
        self.brokers.entry(change.broker).and_modify(|b| b.phase = change.phase);
        Ok(Answer::Done)
    }

    fn apply_topic(&mut self, change: &ApplyTopic) -> Result<Answer, MetaError> {
        if change.spec.schedule_for.is_empty() {
            check_not_internal(&change.name)?;
        } else if self.topics.get(&change.spec.schedule_for).is_none_or(|topic| !is_schedule_of(topic, change)) {
            return Err(MetaError::Stale); // decided for a topic that was deleted, re-created, or changed meanwhile
        }
        let existing = self.topics.get(&change.name).cloned();
        if let Some(topic) = &existing {
            check_owner(&change.name, &topic.owner_uid, &change.owner_uid)?;
            let (had, wanted) = (topic.spec.partitions, change.spec.partitions);
            if wanted < had {
                let text = format!("{} has {had} partitions; they cannot shrink to {wanted}", change.name);
                return Err(MetaError::Invalid(text));
            }
        }
        let had = existing.as_ref().map_or(0, |t| t.groups.len());
        if had + change.placements.len() != change.spec.partitions as usize {
            return Err(MetaError::Stale);
        }
        // a broker that is drained or lost may never learn of its replica, and the partition would have no leader
        let is_active = |b: &u64| self.brokers.get(b).is_some_and(|b| b.phase() == Phase::Active);
        if !change.placements.iter().flat_map(|p| &p.brokers).all(is_active) {
            return Err(MetaError::Stale);
        }
        // a broker was drained since: a topic that needs it would keep the drain from ending
        if self.brokers.values().filter(|b| b.phase() == Phase::Active).count() < change.spec.replicas as usize {
            return Err(MetaError::Stale);
        }
        let mut topic = existing.unwrap_or_else(|| Topic { name: change.name.clone(), ..Default::default() });
        if topic.id == 0 {
            topic.id = self.take_id();
        }
        for placement in &change.placements {
            let group = self.take_id();
            let replica = |state: &mut Self, broker| ReplicaRecord { id: state.take_id(), broker, learner: false };
            let replicas = placement.brokers.iter().map(|b| replica(self, *b)).collect();
            let partition = topic.groups.len() as u32;
            self.groups.insert(group, Assignment { topic: topic.id, partition, replicas, ..Default::default() });
            topic.groups.push(group);
        }
        topic.spec = change.spec.clone();
        topic.generation = change.generation;
        if !change.owner_uid.is_empty() {
            topic.owner_uid = change.owner_uid.clone();
        }
        if topic.spec.schedule_for.is_empty() {
            self.follow_topic(&topic);
        } else {
            self.add_schedule_position(&topic);
        }
        self.topics.insert(change.name.clone(), topic);
        Ok(Answer::Done)
    }

    /// What is scheduled for a topic is kept as safely as the topic says now. Partitions are added by the next message that needs them.
    fn follow_topic(&mut self, topic: &Topic) {
        if let Some(schedule) = self.topics.get_mut(&names::scheduled(topic.id)) {
            let TopicSpec { replicas, quorum_memory, .. } = topic.spec;
            schedule.spec = TopicSpec { replicas, quorum_memory, ..schedule.spec.clone() };
        }
    }

    fn add_schedule_position(&mut self, schedule: &Topic) {
        if self.subscriptions.contains_key(&schedule.name) {
            return;
        }
        let spec =
            SubscriptionSpec { topic: schedule.name.clone(), start: Start::Earliest.into(), ..Default::default() };
        let (id, name) = (self.take_id(), schedule.name.clone());
        let position = Subscription { id, name, spec, topic_id: schedule.id, ..Default::default() };
        self.subscriptions.insert(schedule.name.clone(), position);
    }

    fn delete_topic(&mut self, change: &Delete) -> Result<Answer, MetaError> {
        check_not_internal(&change.name)?;
        let topic = self.topics.get(&change.name).ok_or_else(|| not_found("topic", &change.name))?;
        check_owner(&change.name, &topic.owner_uid, &change.owner_uid)?;
        if change.release {
            self.topics.entry(change.name.clone()).and_modify(|t| t.owner_uid.clear());
            return Ok(Answer::Done);
        }
        // what was scheduled for it has nowhere to go
        let schedule = names::scheduled(topic.id);
        self.remove_topic(&change.name);
        self.remove_topic(&schedule);
        Ok(Answer::Done)
    }

    fn remove_topic(&mut self, name: &str) {
        let Some(topic) = self.topics.remove(name) else { return };
        for group in topic.groups {
            self.groups.remove(&group);
            self.deleted_groups.insert(group, true);
        }
        let readers = self.subscriptions.values().filter(|s| s.topic_id == topic.id);
        let readers: Vec<String> = readers.map(|s| s.name.clone()).collect();
        readers.iter().for_each(|name| self.remove_subscription(name));
    }

    /// Removes a subscription with its snapshots and the position of its redrive.
    fn remove_subscription(&mut self, name: &str) {
        if let Some(Subscription { id, .. }) = self.subscriptions.remove(name) {
            self.subscriptions.retain(|_, s| s.snapshot_of != id && s.redrive_of != id);
        }
    }

    fn apply_subscription(&mut self, change: &ApplySubscription) -> Result<Answer, MetaError> {
        for name in [&change.name, &change.spec.topic, &change.spec.dead_letter_topic] {
            check_not_internal(name)?;
        }
        let topic = if pattern::is_pattern(&change.spec.topic) {
            0 // also topics that are made later
        } else {
            self.topics.get(&change.spec.topic).ok_or_else(|| not_found("topic", &change.spec.topic))?.id
        };
        let existing = self.subscriptions.get(&change.name);
        if let Some(old) = existing {
            check_owner(&change.name, &old.owner_uid, &change.owner_uid)?;
            if old.topic_id != topic || (topic == 0 && old.spec.topic != change.spec.topic) {
                let text = format!("{} reads {}; its topic cannot change", change.name, old.spec.topic);
                return Err(MetaError::Invalid(text));
            }
        }
        let id = existing.map(|s| s.id);
        let id = id.unwrap_or_else(|| self.take_id());
        let subscription = Subscription {
            id,
            name: change.name.clone(),
            spec: change.spec.clone(),
            topic_id: topic,
            owner_uid: change.owner_uid.clone(),
            generation: change.generation,
            ..Default::default()
        };
        self.subscriptions.insert(change.name.clone(), subscription);
        Ok(Answer::Done)
    }

    fn take_snapshot(&mut self, change: &TakeSnapshot) -> Result<Answer, MetaError> {
        check_not_internal(&change.subscription)?;
        let of = self.subscriptions.get(&change.subscription).cloned();
        let of = of.ok_or_else(|| not_found("subscription", &change.subscription))?;
        let name = names::snapshot(of.id, &change.name);
        if self.subscriptions.contains_key(&name) {
            return Err(MetaError::Invalid(format!("{} has a snapshot {}; delete it first", of.name, change.name)));
        }
        if self.subscriptions.values().filter(|s| s.snapshot_of == of.id).count() >= SNAPSHOTS_MAX {
            let text = format!("{} has {SNAPSHOTS_MAX} snapshots; delete one first", of.name);
            return Err(MetaError::Invalid(text));
        }
        let id = self.take_id();
        let snapshot = Subscription {
            id,
            name: name.clone(),
            snapshot_of: of.id,
            snapshot_name: change.name.clone(),
            owner_uid: String::new(),
            generation: 0,
            ..of
        };
        self.subscriptions.insert(name, snapshot);
        Ok(Answer::Done)
    }

    fn open_redrive(&mut self, change: &OpenRedrive) -> Result<Answer, MetaError> {
        check_not_internal(&change.subscription)?;
        let of = self.subscriptions.get(&change.subscription);
        let of = of.ok_or_else(|| not_found("subscription", &change.subscription))?;
        if of.spec.dead_letter_topic.is_empty() {
            return Err(MetaError::Invalid(format!("subscription {} has no dead-letter topic", of.name)));
        }
        let topic = self.topics.get(&of.spec.dead_letter_topic);
        let topic = topic.ok_or_else(|| not_found("topic", &of.spec.dead_letter_topic))?;
        let (name, topic_id, redrive_of) = (names::redrive(of.id), topic.id, of.id);
        // where the subscription names another dead-letter topic now, the position in the one before means nothing
        if self.subscriptions.get(&name).is_none_or(|known| known.topic_id != topic_id) {
            let spec =
                SubscriptionSpec { topic: topic.name.clone(), start: Start::Earliest.into(), ..Default::default() };
            let id = self.take_id();
            let position = Subscription { id, name: name.clone(), spec, topic_id, redrive_of, ..Default::default() };
            self.subscriptions.insert(name, position);
        }
        Ok(Answer::Done)
    }

    fn delete_subscription(&mut self, change: &Delete) -> Result<Answer, MetaError> {
        let old = self.subscriptions.get(&change.name).ok_or_else(|| not_found("subscription", &change.name))?;
        if old.snapshot_of == 0 {
            check_not_internal(&change.name)?;
        }
        check_owner(&change.name, &old.owner_uid, &change.owner_uid)?;
        if change.release {
            self.subscriptions.entry(change.name.clone()).and_modify(|s| s.owner_uid.clear());
        } else {
            self.remove_subscription(&change.name);
        }
        Ok(Answer::Done)
    }

    fn reassign(&mut self, change: &Reassign) -> Result<Answer, MetaError> {
        let Some(mut assignment) = self.groups.get(&change.group).cloned() else {
            return Err(not_found("group", &change.group.to_string()));
        };
        if assignment.epoch != change.expected_epoch {
            return Err(MetaError::Stale);
        }
        if change.brokers.iter().any(|b| !self.brokers.contains_key(b)) {
            return Err(MetaError::Stale);
        }
        let old: BTreeMap<u64, ReplicaRecord> =
            assignment.replicas.iter().filter(|r| r.id != change.renew).map(|r| (r.broker, *r)).collect();
        let mut replicas = Vec::new();
        for (at, broker) in change.brokers.iter().enumerate() {
            let id = old.get(broker).map(|r| r.id).unwrap_or_else(|| self.take_id());
            let learner = change.voters_max > 0 && at >= change.voters_max as usize;
            replicas.push(ReplicaRecord { id, broker: *broker, learner });
        }
        let gone = assignment.replicas.iter().filter(|r| replicas.iter().all(|n| n.id != r.id));
        assignment.leaving.extend(gone.copied());
        assignment.replicas = replicas;
        assignment.epoch += 1;
        self.groups.insert(change.group, assignment);
        Ok(Answer::Done)
    }

    fn settle(&mut self, change: &Settled) -> Result<Answer, MetaError> {
        let assignment = self.groups.get_mut(&change.group).ok_or(MetaError::Stale)?;
        if assignment.epoch != change.epoch {
            return Err(MetaError::Stale);
        }
        assignment.settled_epoch = change.epoch;
        assignment.leaving.clear();
        Ok(Answer::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn broker(id: u64) -> Broker {
        Broker { id, name: format!("b-{id}"), ..Default::default() }
    }

    fn topic(state: &mut MetaState, partitions: u32, uid: &str) -> Result<Answer, MetaError> {
        let had = state.topics.get("default/t").map_or(0, |t| t.groups.len());
        let placements = vec![Placement { brokers: vec![1, 2] }; (partitions as usize).saturating_sub(had)];
        let spec = TopicSpec { partitions, replicas: 2, ..Default::default() };
        let name = "default/t".to_owned();
        state.apply(
            &Kind::ApplyTopic(ApplyTopic { name, spec, owner_uid: uid.into(), generation: 1, placements }).into(),
        )
    }

    #[test]
    fn topics_grow_never_shrink_and_have_one_owner() {
        let mut state = MetaState::form("c", &[broker(1), broker(2)]);
        topic(&mut state, 2, "a").unwrap();
        topic(&mut state, 4, "a").unwrap();
        assert_eq!(state.topics["default/t"].groups.len(), 4);
        assert!(matches!(topic(&mut state, 1, "a"), Err(MetaError::Invalid(_))));
        assert!(matches!(topic(&mut state, 4, "b"), Err(MetaError::Conflict { .. })));
    }

    #[test]
    fn a_topic_made_again_has_new_groups_and_the_old_ones_are_recorded_as_deleted() {
        let mut state = MetaState::form("c", &[broker(1), broker(2)]);
        topic(&mut state, 1, "").unwrap();
        let old = state.topics["default/t"].groups[0];
        state.apply(&Kind::DeleteTopic(Delete { name: "default/t".into(), ..Default::default() }).into()).unwrap();
        topic(&mut state, 1, "").unwrap();
        assert_ne!(state.topics["default/t"].groups[0], old);
        assert!(state.deleted_groups.contains_key(&old) && !state.groups.contains_key(&old));
    }

    #[test]
    fn what_puts_dead_letters_back_goes_with_its_subscription_and_begins_anew_in_another_topic() {
        let mut state = MetaState::form("c", &[broker(1), broker(2)]);
        let made = |name: &str| {
            let (spec, placements) =
                (TopicSpec { partitions: 1, replicas: 1, ..Default::default() }, vec![Placement { brokers: vec![1] }]);
            Kind::ApplyTopic(ApplyTopic { name: name.into(), spec, placements, ..Default::default() })
        };
        let redrive = || Kind::OpenRedrive(OpenRedrive { subscription: "default/s".into() });
        let mut apply = |kind: Kind| state.apply(&kind.into()).map(|_| state.clone()).unwrap();
        for topic in ["default/t", "default/dead", "default/dead-2"] {
            apply(made(topic));
        }
        let name =
            names::redrive(apply(subscribe("default/s", "default/t", "default/dead")).subscriptions["default/s"].id);
        let first = apply(redrive()).subscriptions[&name].id;
        let again = apply(redrive()).subscriptions[&name].id;
        apply(subscribe("default/s", "default/t", "default/dead-2"));
        let moved = apply(redrive()).subscriptions[&name].clone();
        assert_eq!(again, first);
        assert_ne!(moved.id, first, "its position was one in another topic");
        let deleted = |name: &str| Delete { name: name.to_owned(), ..Default::default() };
        assert!(apply(Kind::DeleteSubscription(deleted("default/s"))).subscriptions.is_empty());
        apply(subscribe("default/s", "default/t", "default/dead"));
        apply(redrive());
        assert!(
            apply(Kind::DeleteTopic(deleted("default/t"))).subscriptions.is_empty(),
            "also with the topic of its subscription"
        );
    }

    #[test]
    fn a_new_disk_under_an_old_name_is_a_new_broker_and_strangers_are_refused() {
        let mut state = MetaState::form("c", &[broker(1), broker(2)]);
        let Ok(Answer::Broker(id)) = state.apply(&Kind::Register(broker(2)).into()) else { panic!() };
        assert_eq!(state.brokers[&2].phase(), Phase::Lost);
        assert_eq!(state.broker_named("b-2").unwrap().id, id);
        assert!(state.apply(&Kind::Register(broker(9)).into()).is_err());
        state.apply(&Kind::Expect(broker(9)).into()).unwrap();
        assert!(state.apply(&Kind::Register(broker(9)).into()).is_ok());
    }

    #[test]
    fn reassigning_keeps_replicas_that_stay_and_gives_new_ids_to_the_others() {
        let mut state = MetaState::form("c", &[broker(1), broker(2), broker(3)]);
        topic(&mut state, 1, "").unwrap();
        let group = state.topics["default/t"].groups[0];
        let before = state.groups[&group].replicas.clone();
        let change = Reassign { group, expected_epoch: 0, brokers: vec![1, 3], ..Default::default() };
        state.apply(&Kind::Reassign(change.clone()).into()).unwrap();
        let after = state.groups[&group].clone();
        assert_eq!(after.replicas[0], before[0]);
        assert_eq!(after.leaving, vec![before[1]]);
        assert_eq!(state.apply(&Kind::Reassign(change).into()), Err(MetaError::Stale));
        let renew =
            Reassign { group, expected_epoch: 1, brokers: vec![1, 3], renew: before[0].id, ..Default::default() };
        state.apply(&Kind::Reassign(renew).into()).unwrap();
        assert_ne!(state.groups[&group].replicas[0].id, before[0].id);
        state.apply(&Kind::Settled(Settled { group, epoch: 2 }).into()).unwrap();
        assert!(state.groups[&group].leaving.is_empty());
    }

    fn apply(state: &mut MetaState, kind: Kind) -> Result<Answer, MetaError> {
        state.apply(&kind.into())
    }

    fn schedule(state: &MetaState, partitions: u32) -> Kind {
        let topic = &state.topics["default/t"];
        let name = names::scheduled(topic.id);
        let had = state.topics.get(&name).map_or(0, |t| t.groups.len());
        let placements = vec![Placement { brokers: vec![1, 2] }; partitions as usize - had];
        let spec = TopicSpec {
            partitions,
            replicas: 2,
            schedule_for: "default/t".into(),
            message_bytes_max: 9,
            ..Default::default()
        };
        Kind::ApplyTopic(ApplyTopic { name, spec, placements, ..Default::default() })
    }

    fn subscribe(name: &str, topic: &str, dead: &str) -> Kind {
        let spec = SubscriptionSpec { topic: topic.into(), dead_letter_topic: dead.into(), ..Default::default() };
        Kind::ApplySubscription(ApplySubscription { name: name.into(), spec, ..Default::default() })
    }

    #[test]
    fn the_schedule_of_a_topic_follows_the_topic_and_goes_with_it() {
        let mut state = MetaState::form("c", &[broker(1), broker(2)]);
        topic(&mut state, 1, "").unwrap();
        let made = schedule(&state, 1);
        apply(&mut state, made).unwrap();
        let name = names::scheduled(state.topics["default/t"].id);
        let position = state.subscriptions[&name].clone();
        assert_eq!((position.topic_id, position.spec.start()), (state.topics[&name].id, Start::Earliest));
        topic(&mut state, 3, "").unwrap();
        let grown = schedule(&state, 3);
        apply(&mut state, grown.clone()).unwrap();
        assert_eq!(state.subscriptions[&name], position, "it keeps its position as it grows");
        let spec = TopicSpec { partitions: 3, replicas: 1, quorum_memory: true, retention_ms: 5, ..Default::default() };
        let change = ApplyTopic { name: "default/t".into(), spec, ..Default::default() };
        apply(&mut state, Kind::ApplyTopic(change)).unwrap();
        let kept = &state.topics[&name].spec;
        assert_eq!((kept.replicas, kept.quorum_memory), (1, true), "as safe as its topic");
        assert_eq!((kept.retention_ms, kept.message_bytes_max, kept.partitions), (0, 9, 3), "the rest is its own");
        let groups = state.topics[&name].groups.clone();
        apply(&mut state, Kind::DeleteTopic(Delete { name: "default/t".into(), ..Default::default() })).unwrap();
        assert!(state.topics.is_empty() && state.subscriptions.is_empty());
        assert!(groups.iter().all(|g| state.deleted_groups.contains_key(g)));
        topic(&mut state, 1, "").unwrap();
        assert_eq!(apply(&mut state, grown), Err(MetaError::Stale), "decided for the topic that was deleted");
    }

    #[test]
    fn nobody_makes_changes_reads_or_deletes_an_internal_object() {
        let mut state = MetaState::form("c", &[broker(1), broker(2)]);
        topic(&mut state, 1, "").unwrap();
        let made = schedule(&state, 1);
        apply(&mut state, made).unwrap();
        apply(&mut state, subscribe("default/s", "default/t", "default/t")).unwrap();
        let take = TakeSnapshot { subscription: "default/s".into(), name: "x".into() };
        apply(&mut state, Kind::TakeSnapshot(take)).unwrap();
        apply(&mut state, Kind::OpenRedrive(OpenRedrive { subscription: "default/s".into() })).unwrap();
        let internal: Vec<String> =
            state.topics.keys().chain(state.subscriptions.keys()).filter(|n| names::is_internal(n)).cloned().collect();
        assert_eq!(internal.len(), 4, "a topic, its position, a snapshot and a redrive: {internal:?}");
        let before = state.clone();
        let new = format!("{}/mine", names::INTERNAL_NAMESPACE);
        for name in internal.iter().chain([&new]) {
            let spec = TopicSpec { partitions: 1, replicas: 1, ..Default::default() };
            let placements = vec![Placement { brokers: vec![1] }];
            let delete = Delete { name: name.clone(), ..Default::default() };
            let mut refused = vec![
                Kind::ApplyTopic(ApplyTopic { name: name.clone(), spec, placements, ..Default::default() }),
                Kind::DeleteTopic(delete.clone()),
                subscribe(name, "default/t", ""),
                subscribe("default/new", name, ""),
                subscribe("default/new", "default/t", name),
                Kind::TakeSnapshot(TakeSnapshot { subscription: name.clone(), name: "y".into() }),
                Kind::OpenRedrive(OpenRedrive { subscription: name.clone() }),
            ];
            if state.subscriptions.get(name).is_none_or(|s| s.snapshot_of == 0) {
                refused.push(Kind::DeleteSubscription(delete)); // a snapshot is deleted by its owner, through a call of its own
            }
            for kind in refused {
                assert!(apply(&mut state, kind.clone()).is_err(), "{kind:?}");
            }
        }
        let same = MetaState { version: before.version, ..state.clone() };
        assert_eq!(same, before, "what is refused changes nothing");
    }

    #[test]
    fn snapshots_and_the_redrive_of_a_subscription_go_with_it_and_names_of_users_are_their_own() {
        let mut state = MetaState::form("c", &[broker(1), broker(2)]);
        topic(&mut state, 1, "").unwrap();
        for name in ["default/s", "default/s.redrive", "default/s.scheduled"] {
            apply(&mut state, subscribe(name, "default/t", "default/t")).unwrap();
        }
        let open = || Kind::OpenRedrive(OpenRedrive { subscription: "default/s".into() });
        apply(&mut state, open()).unwrap();
        let name = names::redrive(state.subscriptions["default/s"].id);
        let first = state.subscriptions[&name].clone();
        apply(&mut state, open()).unwrap();
        assert_eq!(state.subscriptions[&name], first, "opened again it goes on where it was");
        let take = TakeSnapshot { subscription: "default/s".into(), name: "x".into() };
        apply(&mut state, Kind::TakeSnapshot(take)).unwrap();
        assert_eq!(state.snapshot("default/s", "x").unwrap().snapshot_name, "x");
        let delete = Delete { name: "default/s".into(), ..Default::default() };
        apply(&mut state, Kind::DeleteSubscription(delete)).unwrap();
        let left: Vec<&String> = state.subscriptions.keys().collect();
        assert_eq!(left, ["default/s.redrive", "default/s.scheduled"]);
    }

    fn phase(broker: u64, phase: Phase) -> Kind {
        Kind::SetPhase(SetPhase { broker, phase: phase.into(), removed: false })
    }

    fn remove(broker: u64) -> Kind {
        Kind::SetPhase(SetPhase { broker, phase: 0, removed: true })
    }

    /// `default/t` with so many replicas on the first of these brokers.
    fn replicated(replicas: u32, brokers: &[u64]) -> Kind {
        let spec = TopicSpec { partitions: 1, replicas, ..Default::default() };
        let placements = vec![Placement { brokers: brokers[..replicas as usize].to_vec() }];
        Kind::ApplyTopic(ApplyTopic { name: "default/t".into(), spec, placements, ..Default::default() })
    }

    /// Takes a broker out of the metadata group, as the plan does once it holds no partition.
    fn leave_metadata(state: &mut MetaState, broker: u64) {
        let assignment = state.groups[&0].clone();
        let brokers = assignment.replicas.iter().map(|r| r.broker).filter(|b| *b != broker).collect();
        let (expected_epoch, voters_max) = (assignment.epoch, 5);
        let change = Reassign { group: 0, expected_epoch, brokers, voters_max, renew: 0 };
        apply(state, Kind::Reassign(change)).unwrap();
    }

    #[test]
    fn two_drains_at_one_time_leave_as_many_brokers_as_a_topic_has_replicas() {
        let mut state = MetaState::form("c", &[broker(1), broker(2), broker(3)]);
        topic(&mut state, 1, "").unwrap();
        apply(&mut state, phase(1, Phase::Draining)).unwrap();
        let (broker, name) = ("b-2".to_owned(), "default/t".to_owned());
        let needed = PlacementError::NeededBroker { broker, topic: name, replicas: 2, left: 1 };
        assert_eq!(apply(&mut state, phase(2, Phase::Draining)), Err(needed.into()));
        assert_eq!(state.brokers[&2].phase(), Phase::Active);
        assert_eq!(apply(&mut state, phase(1, Phase::Draining)), Ok(Answer::Done), "a drain may be repeated");
        apply(&mut state, phase(1, Phase::Active)).unwrap();
        assert_eq!(apply(&mut state, phase(2, Phase::Draining)), Ok(Answer::Done));
    }

    #[test]
    fn set_phase_refuses_what_would_lose_a_replica_or_never_end() {
        let mut state = MetaState::form("c", &[broker(1), broker(2), broker(3), broker(4)]);
        apply(&mut state, replicated(2, &[1, 2])).unwrap();
        apply(&mut state, Kind::Expect(broker(9))).unwrap();
        let expected = state.broker_named("b-9").unwrap().id;
        apply(&mut state, Kind::Register(broker(4))).unwrap();
        apply(&mut state, phase(1, Phase::Draining)).unwrap();
        // 2 and 3 are active, as is the broker that replaces 4, which is lost; 1 is draining
        for (kind, refused) in [
            (phase(77, Phase::Draining), "broker 77 does not exist"),
            (phase(expected, Phase::Active), "is Expected"),
            (phase(expected, Phase::Draining), "is Expected"),
            (phase(4, Phase::Active), "is Lost"),
            (phase(4, Phase::Draining), "is Lost"),
            (phase(2, Phase::Lost), "phase 2"),
            (phase(2, Phase::Expected), "phase 3"),
            (Kind::SetPhase(SetPhase { broker: 2, phase: 7, removed: false }), "phase 7"),
            (remove(3), "is active"),
            (remove(1), "still holds a replica"),
        ] {
            let error = apply(&mut state, kind.clone()).unwrap_err().to_string();
            assert!(error.contains(refused), "{kind:?}: {error}");
        }
        // a replica that leaves still counts
        let group = state.topics["default/t"].groups[0];
        let change = Reassign { group, expected_epoch: 0, brokers: vec![2, 3], ..Default::default() };
        apply(&mut state, Kind::Reassign(change)).unwrap();
        leave_metadata(&mut state, 1);
        let holds = |state: &mut MetaState| apply(state, remove(1)).unwrap_err().to_string();
        assert!(holds(&mut state).contains("still holds a replica of group 0"));
        apply(&mut state, Kind::Settled(Settled { group: 0, epoch: 1 })).unwrap();
        assert!(holds(&mut state).contains(&format!("still holds a replica of group {group}")));
        apply(&mut state, Kind::Settled(Settled { group, epoch: 1 })).unwrap();
        assert_eq!(apply(&mut state, remove(1)), Ok(Answer::Done));
        assert_eq!(apply(&mut state, remove(1)), Ok(Answer::Done), "a removal may be repeated");
        assert_eq!(apply(&mut state, remove(expected)), Ok(Answer::Done), "it never joined");
    }

    #[test]
    fn the_last_active_broker_is_not_drained_also_where_no_topic_exists() {
        let mut state = MetaState::form("c", &[broker(1)]);
        apply(&mut state, Kind::Expect(broker(9))).unwrap();
        let last = PlacementError::LastBroker { broker: "b-1".to_owned() };
        assert_eq!(apply(&mut state, phase(1, Phase::Draining)), Err(last.into()), "b-9 has not joined");
    }

    #[test]
    fn a_drain_is_cancelled_only_while_the_broker_hears_of_it() {
        let mut state = MetaState::form("c", &[broker(1), broker(2)]);
        apply(&mut state, phase(2, Phase::Draining)).unwrap();
        apply(&mut state, phase(2, Phase::Active)).unwrap();
        apply(&mut state, phase(2, Phase::Draining)).unwrap();
        leave_metadata(&mut state, 2);
        assert_eq!(apply(&mut state, phase(2, Phase::Active)), Err(MetaError::Stale), "it has left the metadata group");
        assert_eq!(state.brokers[&2].phase(), Phase::Draining);
    }

    #[test]
    fn a_drain_goes_on_where_another_broker_that_is_drained_is_removed() {
        let mut state = MetaState::form("c", &[broker(1), broker(2), broker(3), broker(4)]);
        apply(&mut state, replicated(2, &[1, 2])).unwrap();
        for id in [3, 4] {
            apply(&mut state, phase(id, Phase::Draining)).unwrap();
        }
        leave_metadata(&mut state, 4);
        apply(&mut state, Kind::Settled(Settled { group: 0, epoch: 1 })).unwrap();
        apply(&mut state, remove(4)).unwrap();
        assert_eq!(state.brokers[&3].phase(), Phase::Draining);
        assert_eq!(apply(&mut state, phase(4, Phase::Active)), Err(not_found("broker", "4")), "it is gone");
        let group = state.topics["default/t"].groups[0];
        let change = Reassign { group, expected_epoch: 0, brokers: vec![1, 4], ..Default::default() };
        assert_eq!(apply(&mut state, Kind::Reassign(change)), Err(MetaError::Stale), "decided before");
    }

    #[test]
    fn a_topic_that_was_decided_before_a_drain_does_not_keep_it_from_ending() {
        let mut state = MetaState::form("c", &[broker(1), broker(2)]);
        apply(&mut state, phase(1, Phase::Draining)).unwrap();
        assert_eq!(topic(&mut state, 1, ""), Err(MetaError::Stale));
        apply(&mut state, replicated(1, &[2])).unwrap();
        let spec = TopicSpec { partitions: 1, replicas: 2, ..Default::default() };
        let more = Kind::ApplyTopic(ApplyTopic { name: "default/t".into(), spec, ..Default::default() });
        assert_eq!(apply(&mut state, more.clone()), Err(MetaError::Stale), "more replicas of one that exists");
        apply(&mut state, phase(1, Phase::Active)).unwrap();
        assert_eq!(apply(&mut state, more), Ok(Answer::Done));
    }

    #[test]
    fn a_partition_is_placed_on_active_brokers_only_also_where_that_was_decided_before() {
        let mut state = MetaState::form("c", &[broker(1), broker(2), broker(3)]);
        apply(&mut state, phase(2, Phase::Draining)).unwrap();
        leave_metadata(&mut state, 2);
        let Ok(Answer::Broker(successor)) = apply(&mut state, Kind::Register(broker(3))) else { panic!("it may join") };
        for id in [2, 3, 77] {
            assert_eq!(apply(&mut state, replicated(1, &[id])), Err(MetaError::Stale), "broker {id}");
        }
        assert_eq!(apply(&mut state, replicated(2, &[1, successor])), Ok(Answer::Done));
    }

    #[test]
    fn a_schedule_that_was_decided_before_its_topic_changed_does_not_keep_a_drain_from_ending() {
        let mut state = MetaState::form("c", &[broker(1), broker(2)]);
        topic(&mut state, 1, "").unwrap();
        let decided = schedule(&state, 1);
        let mut fewer = state.topics["default/t"].spec.clone();
        (fewer.replicas, fewer.quorum_memory) = (1, true);
        let fewer = ApplyTopic { name: "default/t".into(), spec: fewer, ..Default::default() };
        apply(&mut state, Kind::ApplyTopic(fewer)).unwrap();
        assert_eq!(apply(&mut state, decided), Err(MetaError::Stale), "it would have two replicas, and its topic one");
        assert_eq!(apply(&mut state, phase(2, Phase::Draining)), Ok(Answer::Done));
    }
}
