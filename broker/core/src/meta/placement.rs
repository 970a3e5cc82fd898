//! Where replicas go: pure functions over counts. Spread over racks first, then by load; stable: asked again, they change as little as they can.

use super::state::{Assignment, MetaState, Phase};
use crate::ids::BrokerId;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use thiserror::Error;

/// The remedy where brokers are too few.
const ADD_FIRST: &str = "add a broker first and start it (`weir cluster add NAME`; with the operator, raise `spec.brokers` of the StreamCluster)";

/// Why no placement exists.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum PlacementError {
    /// More replicas than brokers.
    #[error("{replicas} replicas need {replicas} brokers, {brokers} are active")]
    TooFewBrokers { replicas: u32, brokers: u32 },
    /// No broker would be left.
    #[error("broker {broker} cannot be drained: no other broker is active; {ADD_FIRST}")]
    LastBroker { broker: String },
    /// A topic wants more replicas than brokers would be left.
    #[error(
        "broker {broker} cannot be drained: topic {topic} wants {replicas} replicas, and {left} active brokers would be left; \
         apply the topic with fewer replicas, or {ADD_FIRST}"
    )]
    NeededBroker { broker: String, topic: String, replicas: u32, left: u32 },
}

/// A broker as placement sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The broker.
    pub id: BrokerId,
    /// Its failure domain.
    pub rack: String,
    /// Replicas it holds (wanted).
    pub replicas: u32,
    /// Partitions whose preferred leader it is.
    pub leaders: u32,
}

/// Active brokers with their loads.
pub fn candidates(meta: &MetaState) -> Vec<Candidate> {
    let mut loads: BTreeMap<u64, (u32, u32)> = BTreeMap::new();
    for assignment in meta.groups.values().filter(|a| a.topic != 0) {
        for (at, replica) in assignment.replicas.iter().enumerate() {
            let load = loads.entry(replica.broker).or_default();
            load.0 += 1;
            load.1 += u32::from(at == 0);
        }
    }
    let active = meta.brokers.values().filter(|b| b.phase() == Phase::Active);
    active
        .map(|b| {
            let (replicas, leaders) = loads.get(&b.id).copied().unwrap_or_default();
            Candidate { id: BrokerId(b.id), rack: b.rack.clone(), replicas, leaders }
        })
        .collect()
}

/// Checks that the other active brokers can take all replicas of a broker, so that a drain of it ends.
pub fn check_drain(meta: &MetaState, broker: u64) -> Result<(), PlacementError> {
    let left = meta.brokers.values().filter(|b| b.phase() == Phase::Active && b.id != broker).count() as u32;
    let broker = meta.brokers.get(&broker).map_or_else(|| broker.to_string(), |b| b.name.clone());
    if left == 0 {
        return Err(PlacementError::LastBroker { broker });
    }
    // internal topics have as many replicas as the topics they are kept for
    let topics = meta.topics.values().filter(|t| t.spec.schedule_for.is_empty());
    match topics.max_by_key(|t| t.spec.replicas) {
        Some(topic) if topic.spec.replicas > left => {
            let (topic, replicas) = (topic.name.clone(), topic.spec.replicas);
            Err(PlacementError::NeededBroker { broker, topic, replicas, left })
        }
        _ => Ok(()),
    }
}

/// Brokers for `partitions` new partitions, the preferred leader first.
pub fn place(
    mut brokers: Vec<Candidate>,
    partitions: u32,
    replicas: u32,
) -> Result<Vec<Vec<BrokerId>>, PlacementError> {
    if replicas == 0 || brokers.len() < replicas as usize {
        return Err(PlacementError::TooFewBrokers { replicas, brokers: brokers.len() as u32 });
    }
    let mut out = Vec::new();
    for _ in 0..partitions {
        let mut chosen: Vec<BrokerId> = Vec::new();
        for _ in 0..replicas {
            chosen.push(next_broker(&brokers, &chosen).expect("checked: enough brokers"));
        }
        for b in brokers.iter_mut().filter(|b| chosen.contains(&b.id)) {
            b.replicas += 1;
        }
        // the one that leads least is the preferred leader
        let leader = brokers.iter().filter(|b| chosen.contains(&b.id)).min_by_key(|b| (b.leaders, b.id)).map(|b| b.id);
        let leader = leader.expect("at least one replica");
        chosen.sort_by_key(|id| *id != leader);
        brokers.iter_mut().filter(|b| b.id == leader).for_each(|b| b.leaders += 1);
        out.push(chosen);
    }
    Ok(out)
}

/// The best broker to add to `chosen`: from the rack used least, then the one with the fewest replicas.
pub fn next_broker(brokers: &[Candidate], chosen: &[BrokerId]) -> Option<BrokerId> {
    let racks: Vec<&str> = brokers.iter().filter(|b| chosen.contains(&b.id)).map(|b| b.rack.as_str()).collect();
    brokers
        .iter()
        .filter(|b| !chosen.contains(&b.id))
        .min_by_key(|b| (racks.iter().filter(|r| **r == b.rack).count(), b.replicas, b.leaders, b.id))
        .map(|b| b.id)
}

/// One move that evens out replicas: from a fuller broker to an emptier one, where they differ by more than one and no
/// partition stands in fewer racks afterwards. The pair furthest apart comes first; where racks forbid it, the next.
/// Each move brings the counts closer together, so a sequence of them ends. Returns (group, from, to).
pub fn rebalance_step(meta: &MetaState) -> Option<(u64, BrokerId, BrokerId)> {
    let brokers = candidates(meta);
    let racks: BTreeMap<u64, &str> = brokers.iter().map(|b| (b.id.0, b.rack.as_str())).collect();
    let mut pairs: Vec<(&Candidate, &Candidate)> = brokers
        .iter()
        .flat_map(|from| brokers.iter().map(move |to| (from, to)))
        .filter(|(from, to)| from.replicas > to.replicas + 1)
        .collect();
    pairs.sort_by_key(|(from, to)| (Reverse(from.replicas - to.replicas), to.id, Reverse(from.id)));
    pairs.into_iter().find_map(|(from, to)| Some((movable(meta, &racks, from.id, to.id)?, from.id, to.id)))
}

/// A group that may go from one broker to another without standing in fewer racks.
fn movable(meta: &MetaState, racks: &BTreeMap<u64, &str>, from: BrokerId, to: BrokerId) -> Option<u64> {
    let spread =
        |ids: &mut dyn Iterator<Item = u64>| ids.filter_map(|id| racks.get(&id)).collect::<BTreeSet<_>>().len();
    meta.groups
        .iter()
        .filter(|(_, a)| a.topic != 0 && a.is_settled())
        .filter(|(_, a)| a.replica_on(from).is_some() && a.replica_on(to).is_none())
        .filter(|(_, a)| {
            let before = spread(&mut a.replicas.iter().map(|r| r.broker));
            let swap = |b: u64| if b == from.0 { to.0 } else { b };
            spread(&mut a.replicas.iter().map(|r| swap(r.broker))) >= before
        })
        // moving a replica that leads costs a leader change: prefer the others
        .min_by_key(|(id, a)| (a.replicas[0].broker == from.0, **id))
        .map(|(id, _)| *id)
}

/// One change of a preferred leader that evens out who leads: from the broker preferred most often to another that holds
/// a replica and is preferred less often by more than one. Moves no data. Returns (group, new preferred leader).
pub fn lead_step(meta: &MetaState) -> Option<(u64, BrokerId)> {
    let leaders: BTreeMap<u64, u32> = candidates(meta).iter().map(|b| (b.id.0, b.leaders)).collect();
    let gain = |a: &Assignment| {
        let (first, rest) = a.replicas.split_first()?;
        let most = *leaders.get(&first.broker)?;
        let least = rest.iter().filter_map(|r| Some((*leaders.get(&r.broker)?, r.broker))).min()?;
        (most > least.0 + 1).then(|| (most - least.0, BrokerId(least.1)))
    };
    let groups = meta.groups.iter().filter(|(_, a)| a.topic != 0 && a.is_settled());
    let best = groups.filter_map(|(id, a)| gain(a).map(|(by, to)| (Reverse(by), *id, to))).min()?;
    Some((best.1, best.2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn brokers(racks: &[&str]) -> Vec<Candidate> {
        let one = |(i, r): (usize, &&str)| Candidate {
            id: BrokerId(i as u64 + 1),
            rack: (*r).to_owned(),
            replicas: 0,
            leaders: 0,
        };
        racks.iter().enumerate().map(one).collect()
    }

    #[test]
    fn more_replicas_than_brokers_is_refused() {
        let error = place(brokers(&["a", "b"]), 1, 3).unwrap_err();
        assert_eq!(error, PlacementError::TooFewBrokers { replicas: 3, brokers: 2 });
    }

    proptest! {
        #[test]
        fn placements_are_even_distinct_and_spread_over_racks(n in 1usize..9, partitions in 1u32..40, replicas in 1u32..5) {
            let racks: Vec<&str> = (0..n).map(|i| ["a", "b", "c"][i % 3]).collect();
            prop_assume!(n >= replicas as usize);
            let placed = place(brokers(&racks), partitions, replicas).unwrap();
            let mut leaders = vec![0; n + 1];
            for ids in &placed {
                let distinct: BTreeSet<_> = ids.iter().collect();
                prop_assert_eq!(distinct.len(), replicas as usize);
                let used: BTreeSet<_> = ids.iter().map(|b| racks[b.0 as usize - 1]).collect();
                prop_assert_eq!(used.len(), (replicas as usize).min(n.min(3)));
                leaders[ids[0].0 as usize] += 1;
            }
            if n % 3 == 0 {
                let (min, max) = (leaders[1..].iter().min().unwrap(), leaders[1..].iter().max().unwrap());
                prop_assert!(max - min <= 2, "{:?}", leaders);
            }
        }
    }
}
