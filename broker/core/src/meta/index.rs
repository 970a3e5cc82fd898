//! The metadata with an index of what reads what. Matching all patterns with all topics takes long where there are thousands of either,
//! so a pattern is matched with a topic once, when one of the two is new. The index is no part of the state, nor of its encoding.

use super::state::{MetaState, Subscription, SubscriptionSpec, Topic};
use crate::ids::{GroupId, SubscriptionId, TopicId};
use crate::pattern;
use std::collections::{BTreeMap, HashMap};
use std::ops::Deref;
use std::sync::Arc;

/// A state of the metadata, which it dereferences to, and its index.
#[derive(Debug, Default)]
pub struct Metadata {
    state: Arc<MetaState>,
    index: Arc<Index>,
}

/// A topic by its id, which stands for one name for ever.
#[derive(Debug, Default, PartialEq)]
struct Indexed {
    name: String,
    /// Ids of the subscriptions that read it, by name of the subscription.
    readers: Vec<u64>,
}

#[derive(Debug, Default, PartialEq)]
struct Index {
    topics: HashMap<u64, Indexed>,
    /// Names by id.
    subscriptions: HashMap<u64, String>,
    /// Ids of the topics that match, ascending, by pattern.
    matched: BTreeMap<String, Vec<u64>>,
}

impl Index {
    /// The index of `state`, where `self` is that of a state before it.
    fn after(&self, state: &MetaState, mut reads: impl FnMut(&SubscriptionSpec, &Topic) -> bool) -> Self {
        let indexed = |t: &Topic| (t.id, Indexed { name: t.name.clone(), readers: Vec::new() });
        let mut topics: HashMap<u64, Indexed> = state.topics.values().map(indexed).collect();
        let all: Vec<&Topic> = state.topics.values().collect();
        let new: Vec<&Topic> = all.iter().filter(|t| !self.topics.contains_key(&t.id)).copied().collect();
        let mut matched: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        for s in state.subscriptions.values() {
            if s.topic_id != 0 {
                topics.entry(s.topic_id).and_modify(|t| t.readers.push(s.id));
                continue;
            }
            if !matched.contains_key(&s.spec.topic) {
                let known = self.matched.get(&s.spec.topic);
                let unmatched = if known.is_some() { &new } else { &all };
                let kept = known.into_iter().flatten().copied().filter(|id| topics.contains_key(id));
                let found = unmatched.iter().filter(|t| reads(&s.spec, t)).map(|t| t.id);
                let mut ids: Vec<u64> = kept.chain(found).collect();
                ids.sort_unstable();
                matched.insert(s.spec.topic.clone(), ids);
            }
            for id in &matched[&s.spec.topic] {
                topics.entry(*id).and_modify(|t| t.readers.push(s.id));
            }
        }
        let subscriptions = state.subscriptions.values().map(|s| (s.id, s.name.clone())).collect();
        Self { topics, subscriptions, matched }
    }
}

/// Whether an index of one state is one of the other as well: most changes are of other things.
fn same_index(a: &MetaState, b: &MetaState) -> bool {
    fn topics(state: &MetaState) -> impl Iterator<Item = (u64, &String)> {
        state.topics.values().map(|t| (t.id, &t.name))
    }
    fn subscriptions(state: &MetaState) -> impl Iterator<Item = (u64, &String, u64, &String)> {
        state.subscriptions.values().map(|s| (s.id, &s.name, s.topic_id, &s.spec.topic))
    }
    topics(a).eq(topics(b)) && subscriptions(a).eq(subscriptions(b))
}

impl Metadata {
    /// A later state; what is known already is not matched anew.
    pub fn after(&self, state: Arc<MetaState>) -> Self {
        self.after_with(state, SubscriptionSpec::reads)
    }

    fn after_with(&self, state: Arc<MetaState>, reads: impl FnMut(&SubscriptionSpec, &Topic) -> bool) -> Self {
        let index =
            if same_index(&self.state, &state) { self.index.clone() } else { self.index.after(&state, reads).into() };
        Self { state, index }
    }

    /// The state.
    pub fn state(&self) -> &Arc<MetaState> {
        &self.state
    }

    /// Subscriptions that read one topic, snapshots among them, by name.
    pub fn subscriptions_of(&self, topic: TopicId) -> impl Iterator<Item = SubscriptionId> {
        self.index.topics.get(&topic.0).into_iter().flat_map(|t| &t.readers).map(|id| SubscriptionId(*id))
    }

    /// Topics that a subscription reads, the oldest first.
    pub fn topics_of<'a>(&'a self, spec: &SubscriptionSpec) -> impl Iterator<Item = &'a Topic> + use<'a> {
        let (one, matched) = match pattern::is_pattern(&spec.topic) {
            false => (self.topics.get(&spec.topic), None),
            true => (None, self.index.matched.get(&spec.topic)),
        };
        one.into_iter().chain(matched.into_iter().flatten().filter_map(|id| self.topic(TopicId(*id))))
    }

    /// A topic by id.
    pub fn topic(&self, id: TopicId) -> Option<&Topic> {
        self.topics.get(&self.index.topics.get(&id.0)?.name)
    }

    /// The topic a group belongs to.
    pub fn topic_of(&self, group: GroupId) -> Option<&Topic> {
        self.topic(TopicId(self.assignment(group)?.topic))
    }

    /// A subscription by id.
    pub fn subscription_by_id(&self, id: SubscriptionId) -> Option<&Subscription> {
        self.subscriptions.get(self.index.subscriptions.get(&id.0)?)
    }
}

impl Deref for Metadata {
    type Target = MetaState;

    fn deref(&self) -> &MetaState {
        &self.state
    }
}

impl From<MetaState> for Metadata {
    fn from(state: MetaState) -> Self {
        Self::default().after(state.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meta::command::{ApplySubscription, ApplyTopic, Delete, Kind, OpenRedrive, Placement, TakeSnapshot};
    use crate::meta::names;
    use crate::meta::state::{Broker, TopicSpec};
    use proptest::prelude::*;

    fn full(name: &str) -> String {
        format!("default/{name}")
    }

    fn topic(name: &str) -> Kind {
        let spec = TopicSpec { partitions: 1, replicas: 1, ..Default::default() };
        let placements = vec![Placement { brokers: vec![1] }];
        Kind::ApplyTopic(ApplyTopic { name: full(name), spec, placements, ..Default::default() })
    }

    fn subscription(name: &str, topic: &str) -> Kind {
        let spec = SubscriptionSpec { topic: full(topic), dead_letter_topic: full("dead"), ..Default::default() };
        Kind::ApplySubscription(ApplySubscription { name: full(name), spec, ..Default::default() })
    }

    fn deleted(name: &str) -> Delete {
        Delete { name: full(name), ..Default::default() }
    }

    fn formed() -> MetaState {
        MetaState::form("c", &[Broker { id: 1, name: "b".into(), ..Default::default() }])
    }

    fn after(metadata: &Metadata, kind: Kind, matches: &mut Vec<(String, String)>) -> Metadata {
        let mut state = MetaState::clone(metadata);
        let _ = state.apply(&kind.into()); // refused or not
        metadata.after_with(state.into(), |spec, topic| {
            matches.push((spec.topic.clone(), topic.name.clone()));
            spec.reads(topic)
        })
    }

    /// A schedule of the topic, if there is one.
    fn schedule(metadata: &Metadata, name: &str) -> Kind {
        let Some(topic) = metadata.topics.get(&full(name)) else { return Kind::AllocateProducers(1) };
        let spec = TopicSpec { schedule_for: full(name), ..topic.spec.clone() };
        let placements = vec![Placement { brokers: vec![1] }];
        Kind::ApplyTopic(ApplyTopic { name: names::scheduled(topic.id), spec, placements, ..Default::default() })
    }

    fn assert_is_plain(metadata: &Metadata) {
        for topic in metadata.topics.values() {
            let reads = |s: &&Subscription| match s.topic_id {
                0 => s.spec.reads(topic),
                id => id == topic.id,
            };
            let wanted = metadata.subscriptions.values().filter(reads).map(|s| SubscriptionId(s.id));
            assert!(metadata.subscriptions_of(TopicId(topic.id)).eq(wanted), "{}", topic.name);
            assert!(topic.groups.iter().all(|g| metadata.topic_of(GroupId(*g)) == Some(topic)));
        }
        for s in metadata.subscriptions.values() {
            let mut wanted: Vec<&Topic> = metadata.topics.values().filter(|t| s.spec.reads(t)).collect();
            wanted.sort_by_key(|t| t.id);
            assert!(metadata.topics_of(&s.spec).eq(wanted), "{}", s.name);
            assert_eq!(metadata.subscription_by_id(SubscriptionId(s.id)), Some(s));
        }
        for gone in (0..=metadata.last_id).filter(|id| metadata.subscriptions.values().all(|s| s.id != *id)) {
            assert_eq!(metadata.subscription_by_id(SubscriptionId(gone)), None);
        }
    }

    fn kinds() -> impl Strategy<Value = (u8, &'static str, &'static str)> {
        let name = || prop::sample::select(vec!["a", "a.b", "b.a", "a.b.c", "dead"]);
        let read = prop::sample::select(vec!["a", "a.b", "#", "a.*", "*", "#.b.#", "*.a", "dead"]);
        (0..8_u8, name(), read)
    }

    proptest! {
        #[test]
        fn the_index_equals_the_definition_after_any_commands(steps in prop::collection::vec(kinds(), 1..40)) {
            let mut metadata = Metadata::from(formed());
            for (kind, name, read) in steps {
                let kind = match kind {
                    0 | 1 => topic(name),
                    2 | 3 => subscription(name, read),
                    4 => Kind::DeleteTopic(deleted(name)),
                    5 => Kind::DeleteSubscription(deleted(name)),
                    6 if read.len() > 3 => schedule(&metadata, name),
                    6 => Kind::OpenRedrive(OpenRedrive { subscription: full(name) }),
                    _ => Kind::TakeSnapshot(TakeSnapshot { subscription: full(name), name: read.len().to_string() }),
                };
                metadata = after(&metadata, kind, &mut Vec::new());
                assert_is_plain(&metadata);
                assert_eq!(metadata.index, Metadata::from(MetaState::clone(&metadata)).index, "as of the whole state");
            }
        }
    }

    #[test]
    fn a_pattern_is_matched_with_a_topic_once() {
        let matched = &mut Vec::new();
        let mut metadata = Metadata::from(formed());
        for kind in [topic("a"), topic("a.b"), topic("dead"), subscription("s", "a.#"), subscription("r", "*")] {
            metadata = after(&metadata, kind, matched);
        }
        assert_eq!(matched.len(), 6, "two new patterns with three topics");
        let broker = Broker { id: 1, client_address: "elsewhere:7070".into(), ..Default::default() };
        for (kind, wanted) in [
            (Kind::UpdateBroker(broker), 0),
            (Kind::AllocateProducers(5), 0),
            (topic("a"), 0),
            (subscription("s", "a.#"), 0),
            (subscription("t", "a.#"), 0), // the pattern is known
            (Kind::TakeSnapshot(TakeSnapshot { subscription: full("s"), name: "x".into() }), 0),
            (Kind::DeleteSubscription(deleted("t")), 0),
            (topic("a.c"), 2),
            (Kind::DeleteTopic(deleted("a")), 0),
            (topic("a"), 2),
            (subscription("t", "*.b"), 4),
        ] {
            matched.clear();
            metadata = after(&metadata, kind.clone(), matched);
            assert_eq!(matched.len(), wanted, "{kind:?} {matched:?}");
        }
        assert_is_plain(&metadata);
    }
}
