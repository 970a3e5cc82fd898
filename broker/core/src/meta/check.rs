//! What a command must be in itself, whoever proposes it. Users' bounds are checked where their requests come in, and may change from
//! version to version; what is refused here is refused by every replica alike, and is only what no version could work with: names that
//! nothing can list, topics without partitions, replicas of one partition on one broker.

use super::command::{ApplySubscription, ApplyTopic, Kind, MetaError};
use super::names;
use super::state::{Broker, Phase};
use crate::pattern;
use std::collections::BTreeSet;

/// Bytes of each text of a broker: addresses, failure domain, reason.
const TEXT_BYTES_MAX: usize = 4_096;

fn invalid(what: impl Into<String>) -> MetaError {
    MetaError::Invalid(what.into())
}

/// Checks a command on its own; what depends on the state is checked as it is applied.
pub(super) fn check(kind: &Kind) -> Result<(), MetaError> {
    match kind {
        Kind::Expect(broker) => part(&broker.name).and_then(|()| texts(broker)),
        Kind::Register(broker) | Kind::UpdateBroker(broker) => texts(broker),
        Kind::SetPhase(change) if !change.removed => match Phase::try_from(change.phase) {
            Ok(Phase::Active | Phase::Draining) => Ok(()),
            _ => Err(invalid(format!("no broker is given the phase {}", change.phase))),
        },
        Kind::ApplyTopic(change) => topic(change),
        Kind::ApplySubscription(change) => subscription(change),
        Kind::TakeSnapshot(change) => part(&change.name),
        Kind::Reassign(change) => distinct(&change.brokers),
        _ => Ok(()),
    }
}

fn part(name: &str) -> Result<(), MetaError> {
    if names::is_part(name) { Ok(()) } else { Err(not_a_name(name)) }
}

fn full_name(name: &str) -> Result<(), MetaError> {
    if names::is_full(name) { Ok(()) } else { Err(not_a_name(name)) }
}

fn not_a_name(name: &str) -> MetaError {
    let shown: String = name.chars().take(60).flat_map(char::escape_default).collect();
    invalid(format!("'{shown}' is not a name"))
}

fn texts(broker: &Broker) -> Result<(), MetaError> {
    let Broker { name, client_address, peer_address, admin_address, rack, rebuilt_because, .. } = broker;
    let mut texts = [name, client_address, peer_address, admin_address, rack, rebuilt_because].into_iter();
    if texts.all(|text| text.len() <= TEXT_BYTES_MAX) {
        return Ok(());
    }
    Err(invalid(format!("a text of a broker has more than {TEXT_BYTES_MAX} bytes")))
}

fn topic(change: &ApplyTopic) -> Result<(), MetaError> {
    full_name(&change.name)?;
    let (partitions, replicas) = (change.spec.partitions, change.spec.replicas);
    if partitions == 0 || replicas == 0 {
        return Err(invalid(format!("{} would have {partitions} partitions of {replicas} replicas", change.name)));
    }
    for placement in &change.placements {
        distinct(&placement.brokers)?;
        if placement.brokers.len() > replicas as usize {
            let given = placement.brokers.len();
            return Err(invalid(format!("{given} brokers for {replicas} replicas of a partition of {}", change.name)));
        }
    }
    Ok(())
}

/// Brokers of one group, one at least.
fn distinct(brokers: &[u64]) -> Result<(), MetaError> {
    let distinct = brokers.iter().collect::<BTreeSet<_>>().len();
    if distinct > 0 && distinct == brokers.len() {
        return Ok(());
    }
    Err(invalid(format!("{distinct} different brokers for {} replicas", brokers.len())))
}

fn subscription(change: &ApplySubscription) -> Result<(), MetaError> {
    full_name(&change.name)?;
    let (topic, dead) = (&change.spec.topic, &change.spec.dead_letter_topic);
    if !dead.is_empty() {
        full_name(dead)?;
    }
    if !pattern::is_pattern(topic) {
        return full_name(topic);
    }
    let (namespace, words) = topic.split_once('/').unwrap_or(("", topic));
    if !pattern::is_well_formed(words) {
        return Err(not_a_name(topic));
    }
    // a word that a `*` or `#` could stand for
    full_name(&format!("{namespace}/{}", words.replace(['*', '#'], "x")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meta::command::{
        ApplySubscription, ApplyTopic, Command, Placement, Reassign, SetPhase, Settled, TakeSnapshot,
    };
    use crate::meta::state::{MetaState, SubscriptionSpec, TopicSpec};
    use crate::producer::OWN_PRODUCERS;

    fn broker(id: u64) -> Broker {
        Broker { id, name: format!("b-{id}"), ..Default::default() }
    }

    fn topic(name: &str, (partitions, replicas): (u32, u32), placements: &[&[u64]]) -> Kind {
        let spec = TopicSpec { partitions, replicas, ..Default::default() };
        let placements = placements.iter().map(|brokers| Placement { brokers: brokers.to_vec() }).collect();
        Kind::ApplyTopic(ApplyTopic { name: name.to_owned(), spec, placements, ..Default::default() })
    }

    fn subscription(name: &str, topic: &str, dead: &str) -> Kind {
        let spec =
            SubscriptionSpec { topic: topic.to_owned(), dead_letter_topic: dead.to_owned(), ..Default::default() };
        Kind::ApplySubscription(ApplySubscription { name: name.to_owned(), spec, ..Default::default() })
    }

    fn reassign(group: u64, brokers: &[u64]) -> Kind {
        Kind::Reassign(Reassign { group, brokers: brokers.to_vec(), ..Default::default() })
    }

    fn phase(broker: u64, phase: i32, removed: bool) -> Kind {
        Kind::SetPhase(SetPhase { broker, phase, removed })
    }

    fn apply(state: &mut MetaState, kind: Kind) -> Result<(), MetaError> {
        state.apply(&Command::from(kind)).map(drop)
    }

    /// Three brokers, one that is expected (4), one that is lost (2, whose place 5 has taken), a topic and a subscription.
    fn state() -> MetaState {
        let mut state = MetaState::form("c", &[broker(1), broker(2), broker(3)]);
        for kind in [
            Kind::Expect(broker(9)),
            Kind::Register(broker(2)),
            topic("default/t", (1, 2), &[&[1, 3]]),
            subscription("default/s", "default/t", ""),
        ] {
            apply(&mut state, kind).unwrap();
        }
        state
    }

    #[test]
    fn what_only_a_forger_proposes_is_refused_and_changes_nothing() {
        let mut state = state();
        let group = state.topics["default/t"].groups[0];
        let long = "x".repeat(254);
        let huge = "x".repeat(TEXT_BYTES_MAX + 1);
        let words = format!("default/#.{}", "*.".repeat(130));
        let mut forged = vec![
            topic("default/new", (1, 2), &[&[]]),
            topic("default/new", (1, 2), &[&[1, 1]]),
            topic("default/new", (1, 2), &[&[1, 3, 5]]),
            topic("default/new", (0, 1), &[]),
            topic("default/new", (1, 0), &[&[1]]),
            topic("default/t", (1, 0), &[]),
            reassign(group, &[]),
            reassign(group, &[1, 1]),
            reassign(0, &[]),
            phase(1, 7, false),
            phase(1, -1, false),
            phase(1, Phase::Lost.into(), false),
            phase(1, Phase::Expected.into(), false),
            phase(2, Phase::Active.into(), false),
            phase(4, Phase::Active.into(), false),
            phase(5, 0, true),
            subscription("default/new", "default/a.b*", ""),
            subscription("default/new", "default/a b.*", ""),
            subscription("default/new", "*", ""),
            subscription("default/new", "*/t", ""),
            subscription("default/new", words.trim_end_matches('.'), ""),
            subscription("default/new", "default/t", "no name"),
            Kind::Expect(Broker { name: String::new(), ..Default::default() }),
            Kind::Expect(Broker { name: "two words".into(), ..Default::default() }),
            Kind::Expect(Broker { rack: huge.clone(), ..broker(6) }),
            Kind::Register(Broker { client_address: huge.clone(), ..broker(9) }),
            Kind::UpdateBroker(Broker { peer_address: huge, ..broker(1) }),
        ];
        for name in ["", "t", "default/", "/t", "default/two words", "default/T", "a/b/c", &format!("default/{long}")] {
            forged.push(topic(name, (1, 1), &[&[1]]));
            forged.push(subscription(name, "default/t", ""));
        }
        for name in ["", "a b", "a/b", &long] {
            let (subscription, name) = ("default/s".to_owned(), name.to_owned());
            forged.push(Kind::TakeSnapshot(TakeSnapshot { subscription, name }));
        }
        for kind in forged {
            let before = state.clone();
            let refused = apply(&mut state, kind.clone());
            assert!(matches!(refused, Err(MetaError::Invalid(_))), "{kind:?} {refused:?}");
            assert_eq!(state, MetaState { version: before.version + 1, ..before }, "{kind:?}");
        }
    }

    #[test]
    fn producer_ids_end_where_those_of_brokers_begin() {
        let mut state = MetaState { next_producer_id: OWN_PRODUCERS - 10, ..state() };
        let last = state.apply(&Kind::AllocateProducers(10).into());
        assert!(last.is_ok(), "{last:?}");
        for count in [0, 1, u32::MAX] {
            assert!(apply(&mut state, Kind::AllocateProducers(count)).is_err(), "{count}");
        }
        assert_eq!(state.next_producer_id, OWN_PRODUCERS);
    }

    #[test]
    fn a_broker_that_joins_begins_without_an_incarnation() {
        let mut state = state();
        apply(&mut state, Kind::Register(Broker { incarnation: u64::MAX, ..broker(9) })).unwrap();
        assert_eq!(state.broker_named("b-9").unwrap().incarnation, 0);
    }

    #[test]
    fn what_brokers_propose_is_taken() {
        let mut state = state();
        let group = state.topics["default/t"].groups[0];
        let id = state.broker_named("b-9").unwrap().id;
        for kind in [
            phase(3, Phase::Draining.into(), false),
            phase(3, Phase::Active.into(), false),
            phase(id, 0, true),
            reassign(group, &[1, 5]),
            Kind::Settled(Settled { group, epoch: 1 }),
            topic("default/t", (2, 1), &[&[5]]),
            subscription("default/all", "default/#.a-1.*", "default/t"),
        ] {
            apply(&mut state, kind.clone()).unwrap_or_else(|e| panic!("{kind:?} {e}"));
        }
    }
}
