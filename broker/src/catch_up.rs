//! After a start, a broker is ready only once it has applied, of everything it holds, what was committed a moment before. Kubernetes would
//! count it as healthy earlier, and take the next broker away, while two of three copies of what is being published are elsewhere. Once
//! it is ready, falling behind does not make it unready: that is the traffic's doing, and clients need brokers to begin with.
//!
//! The leaders say how far each group is committed ([`weir_core::node::Node::committed_for`]). A replica that was lost with its disk
//! counts too: this broker is to take it over.

use crate::metrics;
use crate::peers;
use crate::service::Context;
use crate::shared::Shared;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use weir_core::ids::{BrokerId, GroupId, META_GROUP};
use weir_core::meta::state::{MetaState, Phase};
use weir_proto::v1;

/// Between two questions, at first and at last.
const ASK_EVERY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));
/// Between two looks at whether it is ready still.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A broker that has applied what was committed this long ago keeps up, however slow its disk is.
const TARGET_LASTS: Duration = Duration::from_secs(10);
/// A leader that does not answer within this time is asked again.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// One that was not ready for this long, for whatever reason, may have missed much: it starts over. An election takes less.
const AWAY_AFTER: Duration = Duration::from_secs(10);

/// What this broker lacks, for people; `None` where it is ready as far as that goes.
pub fn what_is_lacking(shared: &Shared) -> Option<String> {
    match shared.lacking.load(Ordering::Relaxed) {
        0 => None,
        usize::MAX => Some("asking the leaders what was committed".to_owned()),
        count => Some(format!("{count} replicas lack something that was committed before")),
    }
}

/// Keeps [`Shared::lacking`], for as long as the broker runs.
pub async fn watch(context: Context) {
    let (mut seen, mut wait) = (Seen::default(), ASK_EVERY.0);
    let mut away: Option<Instant> = None;
    loop {
        if metrics::why_not_ready(&context.shared).is_some() {
            if away.get_or_insert_with(Instant::now).elapsed() > AWAY_AFTER {
                seen = Seen::default();
                context.shared.lacking.store(usize::MAX, Ordering::Relaxed);
            }
            wait = ASK_EVERY.0;
        } else {
            away = None;
            if context.shared.lacking.load(Ordering::Relaxed) > 0 {
                let lacking = look(&context, &mut seen).await;
                context.shared.lacking.store(lacking, Ordering::Relaxed);
                wait = (wait * 2).min(ASK_EVERY.1);
            } else {
                wait = LOOK_EVERY;
            }
        }
        tokio::time::sleep(wait).await;
    }
}

/// What was found so far.
#[derive(Default)]
struct Seen {
    /// groups of which this broker had everything at some time
    whole: HashSet<GroupId>,
    /// how far the others were committed, and when that was asked
    targets: HashMap<GroupId, (Instant, u64)>,
    /// the groups that were to be held here when the metadata was whole; what is assigned later was not missed
    held: Option<HashSet<GroupId>>,
}

impl Seen {
    /// Takes note of what this broker has applied of a group that is committed up to `committed`.
    fn learn(&mut self, group: GroupId, applied: u64, committed: u64, now: Instant) {
        let target = self.targets.entry(group).or_insert((now, committed));
        if now.saturating_duration_since(target.0) > TARGET_LASTS {
            *target = (now, committed);
        }
        if applied >= target.1 {
            self.whole.insert(group);
        }
    }
}

/// The groups this broker is to hold.
fn held(shared: &Shared, meta: &MetaState) -> HashSet<GroupId> {
    let held = meta.groups.iter().filter(|(_, a)| a.replica_on(shared.broker).is_some()).map(|(id, _)| GroupId(*id));
    // metadata that does not name this broker is old
    held.chain([META_GROUP]).collect()
}

/// Those of them that it has not had everything of, and how many replicas of a lost disk nobody has taken over.
fn open(shared: &Shared, meta: &MetaState, seen: &Seen) -> (HashSet<GroupId>, usize) {
    let was_held = |g: &GroupId| seen.held.as_ref().is_none_or(|held| held.contains(g));
    let is_open = |g: &GroupId| was_held(g) && !shared.not_opened.contains(g) && !seen.whole.contains(g);
    let name = meta.broker(shared.broker).map(|b| b.name.as_str());
    let lost = |id: u64| {
        let broker = meta.broker(BrokerId(id));
        broker.is_some_and(|b| b.phase() == Phase::Lost && Some(b.name.as_str()) == name)
    };
    // of a partition of one replica nobody has what was lost: waiting for it would never end
    let replicated = meta.groups.values().filter(|a| a.replicas.len() > 1);
    let members = replicated.map(|a| a.replicas.iter().chain(&a.leaving));
    let left = members.filter(|m| m.clone().any(|r| lost(r.broker))).count();
    (held(shared, meta).into_iter().filter(is_open).collect(), left)
}

/// Asks once; returns how many replicas are lacking something.
async fn look(context: &Context, seen: &mut Seen) -> usize {
    let (shared, meta) = (&context.shared, context.shared.meta());
    let (open_now, _) = open(shared, &meta, seen);
    let leads = |g: &GroupId| shared.leads(*g);
    seen.whole.extend(open_now.iter().copied().filter(leads));
    let leaders: HashSet<BrokerId> = open_now.iter().filter_map(|g| shared.leader(*g)).collect();
    let ask = leaders.into_iter().filter(|b| *b != shared.broker).map(|leader| {
        let address = meta.broker(leader).map(|b| b.peer_address.clone()).unwrap_or_default();
        ask(context, leader, address)
    });
    let answers = futures::future::join_all(ask).await;
    let committed: HashMap<GroupId, u64> = answers.into_iter().flatten().collect();
    // the metadata as of what was applied: what is shared may be older for a moment
    let now = move |node: &mut weir_core::node::Node| {
        let applied = open_now.iter().filter_map(|g| Some((*g, node.group(*g)?.applied()))).collect::<Vec<_>>();
        (applied, node.meta().clone())
    };
    let Some((applied, meta)) = context.node.ask(now).await else { return usize::MAX };
    for (group, applied) in applied {
        if let Some(committed) = committed.get(&group) {
            seen.learn(group, applied, *committed, Instant::now());
        }
    }
    if seen.held.is_none() && seen.whole.contains(&META_GROUP) {
        seen.held = Some(held(shared, &meta));
    }
    let (open_now, left) = open(shared, &meta, seen);
    open_now.len() + left
}

/// How far the groups are committed that a broker leads and this one is a member of; nothing where it does not say.
async fn ask(context: &Context, leader: BrokerId, address: String) -> Vec<(GroupId, u64)> {
    let Ok(channel) = context.channels.to(&address) else { return Vec::new() };
    let mut client = peers::client(channel);
    let request = v1::CommittedRequest { hello: Some(context.hello_to(leader)) };
    match tokio::time::timeout(ANSWER_MAX, client.committed(request)).await {
        Ok(Ok(answer)) => answer.into_inner().groups.into_iter().map(|g| (GroupId(g.group), g.index)).collect(),
        Ok(Err(error)) => {
            tracing::debug!(peer = %leader, %error, "asking what is committed");
            Vec::new()
        }
        Err(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broker_that_is_behind_by_less_than_a_target_lasts_is_ready_and_one_that_falls_behind_is_not() {
        let begun = Instant::now();
        // 1,000 entries a second are committed; asked every half second
        let is_whole_after = |applied: &dyn Fn(u64) -> u64| {
            let mut seen = Seen::default();
            (0..240).map(|n| n * 500).find(|ms| {
                seen.learn(GroupId(7), applied(*ms), 100_000 + ms, begun + Duration::from_millis(*ms));
                seen.whole.contains(&GroupId(7))
            })
        };
        assert_eq!(is_whole_after(&|ms| 100_000 + ms), Some(0));
        assert_eq!(is_whole_after(&|ms| 98_000 + ms), Some(2_000), "always two seconds behind");
        assert_eq!(is_whole_after(&|ms| 50_000 + ms), None, "it does not come nearer");
        let filled = is_whole_after(&|ms| 3 * ms).unwrap();
        let behind = (100_000 + filled).saturating_sub(3 * filled);
        assert!(behind <= 10_500, "ready while {behind} entries behind");
    }
}
