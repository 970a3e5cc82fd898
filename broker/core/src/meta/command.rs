//! Commands to the metadata group and what applying them does. Placement is decided by the leader before it proposes
//! (see [`super::placement`]), so that applying stays the same in every version of the program.

use super::state::*;
use crate::pattern;
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

impl TakeSnapshot {
    /// Its name among subscriptions: no ordinary one has an `@`.
    pub fn full_name(&self) -> String {
        format!("{}@{}", self.subscription, self.name)
    }
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

/// One command.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Command {
    /// Which.
    #[prost(oneof = "Kind", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12")]
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
    /// Gives so many producer ids.
    #[prost(uint32, tag = "10")]
    AllocateProducers(u32),
    /// An administrator names a broker that may join.
    #[prost(message, tag = "11")]
    Expect(Broker),
    /// See [`TakeSnapshot`].
    #[prost(message, tag = "12")]
    TakeSnapshot(TakeSnapshot),
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
    /// Decided on what has changed since; decide again.
    #[error("decided on an old version")]
    Stale,
}

fn not_found(kind: &'static str, name: &str) -> MetaError {
    MetaError::NotFound { kind, name: name.to_owned() }
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
            Some(Kind::Register(b)) => self.register(b),
            Some(Kind::UpdateBroker(b)) => self.update_broker(b),
            Some(Kind::Expect(b)) => self.expect(b),
            Some(Kind::SetPhase(c)) => self.set_phase(c),
            Some(Kind::ApplyTopic(c)) => self.apply_topic(c),
            Some(Kind::DeleteTopic(c)) => self.delete_topic(c),
            Some(Kind::ApplySubscription(c)) => self.apply_subscription(c),
            Some(Kind::DeleteSubscription(c)) => self.delete_subscription(c),
            Some(Kind::TakeSnapshot(c)) => self.take_snapshot(c),
            Some(Kind::Reassign(c)) => self.reassign(c),
            Some(Kind::Settled(c)) => self.settle(c),
            Some(Kind::AllocateProducers(count)) => {
                let first = self.next_producer_id;
                self.next_producer_id += u64::from((*count).max(1));
                Ok(Answer::Producers(first))
            }
        };
        self.version = before + 1;
        answer
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
        self.brokers.insert(id, Broker { id, phase: Phase::Active.into(), ..broker.clone() });
        Ok(Answer::Broker(id))
    }

    fn update_broker(&mut self, broker: &Broker) -> Result<Answer, MetaError> {
        let old = self.brokers.get_mut(&broker.id).ok_or_else(|| not_found("broker", &broker.name))?;
        *old = Broker { phase: old.phase, name: old.name.clone(), ..broker.clone() };
        Ok(Answer::Done)
    }

    fn expect(&mut self, broker: &Broker) -> Result<Answer, MetaError> {
        if let Some(old) = self.broker_named(&broker.name) {
            return Ok(Answer::Broker(old.id));
        }
        let id = self.take_id();
        self.brokers.insert(id, Broker { id, phase: Phase::Expected.into(), ..broker.clone() });
        Ok(Answer::Broker(id))
    }

    fn set_phase(&mut self, change: &SetPhase) -> Result<Answer, MetaError> {
        let name = change.broker.to_string();
        if !self.brokers.contains_key(&change.broker) {
            return if change.removed { Ok(Answer::Done) } else { Err(not_found("broker", &name)) };
        }
        if change.removed {
            let holds = |a: &Assignment| a.replicas.iter().chain(&a.leaving).any(|r| r.broker == change.broker);
            if let Some((group, _)) = self.groups.iter().find(|(_, a)| holds(a)) {
                return Err(MetaError::Invalid(format!("broker {name} still holds a replica of group {group}")));
            }
            self.brokers.remove(&change.broker);
        } else if let Some(broker) = self.brokers.get_mut(&change.broker) {
            broker.phase = change.phase;
        }
        Ok(Answer::Done)
    }

    fn apply_topic(&mut self, change: &ApplyTopic) -> Result<Answer, MetaError> {
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
        let unknown = |b: &&u64| !self.brokers.contains_key(b);
        if change.placements.iter().flat_map(|p| &p.brokers).find(unknown).is_some() {
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
        self.topics.insert(change.name.clone(), topic);
        Ok(Answer::Done)
    }

    fn delete_topic(&mut self, change: &Delete) -> Result<Answer, MetaError> {
        let topic = self.topics.get(&change.name).ok_or_else(|| not_found("topic", &change.name))?;
        check_owner(&change.name, &topic.owner_uid, &change.owner_uid)?;
        if change.release {
            self.topics.entry(change.name.clone()).and_modify(|t| t.owner_uid.clear());
            return Ok(Answer::Done);
        }
        let topic = self.topics.remove(&change.name).expect("just found");
        for group in topic.groups {
            self.groups.remove(&group);
            self.deleted_groups.insert(group, true);
        }
        self.subscriptions.retain(|_, s| s.topic_id != topic.id);
        // what was scheduled for it has nowhere to go
        let scheduled = self.topics.values().find(|t| t.spec.schedule_for == change.name).map(|t| t.name.clone());
        if let Some(name) = scheduled {
            self.delete_topic(&Delete { name, ..Default::default() })?;
        }
        Ok(Answer::Done)
    }

    fn apply_subscription(&mut self, change: &ApplySubscription) -> Result<Answer, MetaError> {
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
            snapshot_of: 0,
        };
        self.subscriptions.insert(change.name.clone(), subscription);
        Ok(Answer::Done)
    }

    fn take_snapshot(&mut self, change: &TakeSnapshot) -> Result<Answer, MetaError> {
        let of = self.subscriptions.get(&change.subscription).filter(|s| s.snapshot_of == 0).cloned();
        let of = of.ok_or_else(|| not_found("subscription", &change.subscription))?;
        let name = change.full_name();
        if self.subscriptions.contains_key(&name) {
            return Err(MetaError::Invalid(format!("{} has a snapshot {}; delete it first", of.name, change.name)));
        }
        if self.subscriptions.values().filter(|s| s.snapshot_of == of.id).count() >= SNAPSHOTS_MAX {
            let text = format!("{} has {SNAPSHOTS_MAX} snapshots; delete one first", of.name);
            return Err(MetaError::Invalid(text));
        }
        let id = self.take_id();
        let snapshot =
            Subscription { id, name: name.clone(), snapshot_of: of.id, owner_uid: String::new(), generation: 0, ..of };
        self.subscriptions.insert(name, snapshot);
        Ok(Answer::Done)
    }

    fn delete_subscription(&mut self, change: &Delete) -> Result<Answer, MetaError> {
        let old = self.subscriptions.get(&change.name).ok_or_else(|| not_found("subscription", &change.name))?;
        check_owner(&change.name, &old.owner_uid, &change.owner_uid)?;
        if change.release {
            self.subscriptions.entry(change.name.clone()).and_modify(|s| s.owner_uid.clear());
        } else {
            let id = old.id;
            self.subscriptions.remove(&change.name);
            self.subscriptions.retain(|_, s| s.snapshot_of != id);
        }
        Ok(Answer::Done)
    }

    fn reassign(&mut self, change: &Reassign) -> Result<Answer, MetaError> {
        let Some(mut assignment) = self.groups.get(&change.group).cloned() else {
            return Err(not_found("group", &change.group.to_string()));
        };
        if assignment.epoch != change.expected_epoch || change.brokers.is_empty() {
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

    #[test]
    fn a_broker_that_holds_a_replica_is_not_removed() {
        let mut state = MetaState::form("c", &[broker(1), broker(2)]);
        let remove = Kind::SetPhase(SetPhase { broker: 2, phase: 0, removed: true });
        assert!(matches!(state.apply(&remove.into()), Err(MetaError::Invalid(_))));
    }
}
