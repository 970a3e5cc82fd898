//! What to do next about a StreamCluster, out of what it wants and what is seen. Pure: asked again it says the same.

use super::names::Names;
use crate::brokers::Snapshot;
use crate::conditions::Said;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::Timestamp;
use std::collections::BTreeSet;
use weir_crds::StreamCluster;
use weir_crds::cluster::{Member, Moves, StreamClusterStatus};
use weir_proto::v1;

/// A new pod that is not ready after this long holds a roll up, and people are told.
pub const STUCK_AFTER_SECONDS: i64 = 300;

/// A broker that is not ready because it fills its replicas is given this time before its pod counts as one that does not become ready.
pub const CATCHES_UP_SECONDS_MAX: i64 = 1_800;

/// A pod that is not ready for this long does not become so by itself: a drained node may take it while its replicas are whole
/// elsewhere, and an outdated one is replaced though others are not whole. One whose broker still fills its replicas is not broken.
pub const BROKEN_AFTER_SECONDS: i64 = 30;

/// Reason of `Progressing` where nothing is under way.
const SETTLED: &str = "Settled";

/// A broker's pod as seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodSeen {
    /// Its name, which is the broker's.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// Its version.
    pub resource_version: String,
    /// Its readiness probe succeeds.
    pub ready: bool,
    /// It was made from the StatefulSet's newest template.
    pub current: bool,
    /// It is going.
    pub terminating: bool,
    /// Its node's failure domain, where known.
    pub zone: Option<String>,
    /// Since when it is not ready, where it is not.
    pub unready_since: Option<Timestamp>,
}

/// What is seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Replicas of the StatefulSet, where there is one.
    pub pods_wanted: Option<i32>,
    /// The StatefulSet controller has seen the newest template.
    pub template_observed: bool,
    /// Storage its volume claims are made with, where there is one.
    pub template_storage: Option<String>,
    /// Its pods.
    pub pods: Vec<PodSeen>,
    /// What the brokers say, where one answered.
    pub snapshot: Option<std::sync::Arc<Snapshot>>,
    /// Why none did.
    pub unreachable: String,
    /// Brokers whose volumes are older than their data once was.
    pub rolled_back: Vec<String>,
}

/// What the child objects should say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Replicas of the StatefulSet.
    pub pods: i32,
    /// Brokers a broker with an empty disk looks for.
    pub peers: i32,
    /// The cluster it must join, once there is one.
    pub cluster_id: String,
    /// Storage that volume claims are made with; claims grow afterwards.
    pub template_storage: String,
    /// What a drained node may take.
    pub disruption: Disruption,
}

/// Which pods may be evicted, for the PodDisruptionBudget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Disruption {
    /// Pods that may be away at one time.
    pub pods_max: i32,
    /// Pods that are not ready may go whatever the budget says. Eviction does not count them then, so this is only where there is
    /// nothing to lose: any pod may be unready for a moment, and the broker in it vote and hold what is needed.
    pub unready_may_go: bool,
}

/// A call to the brokers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// Lets a broker of this name join.
    Add(String),
    /// Moves everything off.
    Drain { id: u64, name: String },
    /// Takes that back.
    Keep { id: u64, name: String },
    /// Says in which failure domain it is.
    SetRack { id: u64, rack: String },
}

/// What to do.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// For the child objects.
    pub wanted: Wanted,
    /// To the brokers.
    pub calls: Vec<Call>,
    /// The one pod to replace now.
    pub replace: Option<PodSeen>,
    /// The new status, but for the times of its conditions.
    pub status: StreamClusterStatus,
    /// Its conditions.
    pub conditions: Vec<Said>,
    /// Brokers that began with an empty disk since the status was written, for people.
    pub rebuilt: Vec<String>,
}

impl Plan {
    /// Replaces the condition of one kind.
    pub fn say(&mut self, said: Said) {
        self.conditions.iter_mut().filter(|c| c.kind == said.kind).for_each(|c| *c = said.clone());
    }

    /// Gives why nothing progresses; while something else does, or has stopped, that is kept, and the text added.
    pub fn stop(&mut self, reason: &'static str, text: &str) {
        for condition in self.conditions.iter_mut().filter(|c| c.kind == "Progressing") {
            if condition.reason == SETTLED {
                *condition = Said::new("Progressing", false, reason, text);
            } else {
                condition.message = format!("{}; {text}", condition.message);
            }
        }
    }
}

/// Decides.
pub fn plan(cluster: &StreamCluster, names: &Names, seen: &Seen, now: Timestamp) -> Plan {
    let spec = &cluster.spec;
    let before = cluster.status.clone().unwrap_or_default();
    let known_id = before.cluster_id.clone().unwrap_or_default();
    let snapshot = seen.snapshot.as_deref();
    let cluster_id = snapshot.map_or(known_id, |s| s.metadata.cluster_id.clone());
    let had = seen.pods_wanted.unwrap_or(spec.brokers);
    let mut calls = Vec::new();
    let pods = match snapshot {
        Some(snapshot) => scale(spec.brokers, had, names, snapshot, &mut calls),
        // nothing was formed yet, or nobody says so: more may come, and none may go
        None if cluster_id.is_empty() => spec.brokers.max(had),
        None => had.max(known_brokers(&before, names)),
    };
    if let Some(snapshot) = snapshot {
        calls.extend(racks(seen, snapshot));
    }
    let wanted = Wanted {
        pods,
        peers: pods.max(spec.brokers),
        cluster_id: cluster_id.clone(),
        template_storage: seen.template_storage.clone().unwrap_or_else(|| spec.storage.size.clone()),
        disruption: Disruption::default(),
    };
    let health = Health::of(names, seen, pods);
    let (replace, roll) = roll(seen, &health, pods, now);
    let disruption = disruption(names, seen, pods, &wanted.cluster_id, replace.is_some(), now);
    let wanted = Wanted { disruption, ..wanted };
    let rebuilt = snapshot.map(|s| rebuilt(&before.members, s)).unwrap_or_default();
    let moving = snapshot.map(|s| moves(s, names)).unwrap_or_default();
    let mut conditions = conditions(&health, spec.brokers, seen, &moving, &roll);
    conditions.extend(rolled_back(seen, &before.conditions));
    let status = StreamClusterStatus {
        observed_generation: cluster.metadata.generation,
        conditions: before.conditions,
        cluster_id: Some(cluster_id).filter(|id| !id.is_empty()),
        address: Some(names.client_address()),
        brokers: Some(seen.pods.len() as i32),
        ready_brokers: Some(health.ready),
        selector: Some(names.selector_text()),
        partitions: snapshot.map(|s| s.partitions().count() as i32),
        leaderless: snapshot.map(|_| health.leaderless as i32),
        under_replicated: snapshot.map(|_| health.under_replicated as i32),
        moves: snapshot.is_some().then_some(moving),
        members: snapshot.map_or(before.members, members),
    };
    Plan { wanted, calls, replace, status, conditions, rebuilt }
}

/// Members that are new under the name of an earlier one, and why.
fn rebuilt(before: &[Member], snapshot: &Snapshot) -> Vec<String> {
    let is_new = |b: &&v1::Broker| {
        let mut earlier = before.iter().filter(|m| m.name == b.name && m.phase != "expected").peekable();
        b.phase == "active" && earlier.peek().is_some() && earlier.all(|m| m.id < b.id as i64)
    };
    let say = |b: &v1::Broker| {
        let why = if b.rebuilt_because.is_empty() { "its volume was empty" } else { &b.rebuilt_because };
        format!("{} is rebuilt from the other brokers, under id {}: {why}", b.name, b.id)
    };
    snapshot.metadata.brokers.iter().filter(is_new).map(say).collect()
}

/// Pods that the brokers last known need.
fn known_brokers(status: &StreamClusterStatus, names: &Names) -> i32 {
    let ordinals = status.members.iter().filter_map(|m| names.ordinal(&m.name));
    ordinals.max().map_or(0, |highest| highest + 1)
}

fn broker_named<'a>(snapshot: &'a Snapshot, name: &str) -> Option<&'a v1::Broker> {
    snapshot.metadata.brokers.iter().find(|b| b.name == name && b.phase != "lost")
}

/// Pods there should be now, and the calls that lead to what is wanted. A pod goes only once its broker is out of the metadata.
fn scale(wanted: i32, had: i32, names: &Names, snapshot: &Snapshot, calls: &mut Vec<Call>) -> i32 {
    for ordinal in 0..wanted {
        let name = names.broker(ordinal);
        match broker_named(snapshot, &name) {
            None => calls.push(Call::Add(name)),
            Some(b) if b.phase == "draining" => calls.push(Call::Keep { id: b.id, name }),
            Some(_) => {}
        }
    }
    let mut keep = wanted;
    // also those beyond the StatefulSet: it may have been made anew with fewer
    let ordinals = snapshot.metadata.brokers.iter().filter_map(|b| names.ordinal(&b.name));
    let beyond = ordinals.max().map_or(0, |highest| highest + 1);
    // a StatefulSet gives up its highest pods first, so a broker is drained only if those above it are
    for ordinal in (wanted..had.max(beyond)).rev() {
        let name = names.broker(ordinal);
        // lost ones too: their replicas are still being replaced
        if let Some(b) = snapshot.metadata.brokers.iter().find(|b| b.name == name) {
            keep = keep.max(ordinal + 1);
            if b.phase == "active" || b.phase == "expected" {
                calls.push(Call::Drain { id: b.id, name });
            }
        }
    }
    keep
}

/// Text for a scale-down that stops at a broker that the others cannot replace, with the brokers' words.
pub fn drain_refused(wanted: i32, names: &Names, broker: &str, why: &str) -> String {
    let needed = names.ordinal(broker).map_or(wanted, |ordinal| ordinal + 1);
    format!("spec.brokers of the StreamCluster is {wanted}, and at least {needed} are needed: {why}")
}

fn racks(seen: &Seen, snapshot: &Snapshot) -> Vec<Call> {
    let set = |pod: &PodSeen| {
        let zone = pod.zone.clone().filter(|z| !z.is_empty())?;
        let broker = broker_named(snapshot, &pod.name).filter(|b| b.rack != zone && b.phase != "expected")?;
        Some(Call::SetRack { id: broker.id, rack: zone })
    };
    seen.pods.iter().filter_map(set).collect()
}

struct Health {
    formed: bool,
    ready: i32,
    leaderless: usize,
    under_replicated: usize,
    /// every broker is there and every partition has all its replicas in sync
    whole: bool,
    draining: Vec<String>,
    joining: Vec<String>,
}

impl Health {
    fn of(names: &Names, seen: &Seen, pods: i32) -> Self {
        let ready = seen.pods.iter().filter(|p| p.ready && !p.terminating).count() as i32;
        let Some(snapshot) = seen.snapshot.as_deref() else {
            return Self {
                formed: false,
                ready,
                leaderless: 0,
                under_replicated: 0,
                whole: false,
                draining: Vec::new(),
                joining: Vec::new(),
            };
        };
        let all = || snapshot.partitions().chain(&snapshot.metadata.metadata_group);
        let in_phase = |phase: &str| {
            let brokers = snapshot.metadata.brokers.iter().filter(|b| b.phase == phase);
            brokers.map(|b| b.name.clone()).collect::<Vec<_>>()
        };
        let active =
            (0..pods).filter(|o| broker_named(snapshot, &names.broker(*o)).is_some_and(|b| b.phase == "active"));
        let leaderless = snapshot.leaderless(all());
        let under_replicated = snapshot.under_replicated(all());
        let all_there = ready == pods && seen.pods.len() as i32 == pods && active.count() as i32 == pods;
        let whole = all_there && leaderless == 0 && under_replicated == 0;
        let (draining, joining) = (in_phase("draining"), in_phase("expected"));
        Self { formed: true, ready, leaderless, under_replicated, whole, draining, joining }
    }
}

enum Roll {
    None,
    Running { left: usize, waits_for: String },
    Stuck { pod: String },
}

/// The pod to replace now. One that serves goes only when nothing else is missing; one that does not serve harms nobody by going.
fn roll(seen: &Seen, health: &Health, pods: i32, now: Timestamp) -> (Option<PodSeen>, Roll) {
    // one that fills its replicas becomes ready by itself
    let unready = |p: &PodSeen| match &seen.snapshot {
        Some(snapshot) if snapshot.catches_up(&p.name) && unready_seconds(p, now) < CATCHES_UP_SECONDS_MAX => 0,
        _ => unready_seconds(p, now),
    };
    let stuck = |p: &&PodSeen| p.current && unready(p) > STUCK_AFTER_SECONDS;
    if !seen.template_observed {
        return (None, Roll::None);
    }
    let old: Vec<&PodSeen> = seen.pods.iter().filter(|p| !p.current && !p.terminating).collect();
    if let Some(pod) = seen.pods.iter().find(stuck) {
        return (None, Roll::Stuck { pod: pod.name.clone() });
    }
    if old.is_empty() {
        return (None, Roll::None);
    }
    let running = |waits_for: String| Roll::Running { left: old.len(), waits_for };
    // a pod that is unready for a moment, because another is away, is not broken
    let all_there = seen.pods.len() as i32 == pods && seen.pods.iter().all(|p| !p.terminating);
    let others = |p: &PodSeen| seen.pods.iter().all(|x| x.name == p.name || x.ready || !x.current);
    if let Some(broken) = old.iter().find(|p| all_there && unready(p) > BROKEN_AFTER_SECONDS && others(p)) {
        return (Some((*broken).clone()), running(broken.name.clone()));
    }
    if !health.formed && old.iter().all(|p| !p.ready) {
        return (old.last().map(|p| (*p).clone()), running("the first cluster".to_owned()));
    }
    if !health.whole || health.ready != pods {
        let absent = seen.pods.iter().find(|p| !p.ready || p.terminating);
        let what = absent.map_or("replicas to be in sync again".to_owned(), |p| format!("{} to be ready", p.name));
        return (None, running(what));
    }
    (old.last().map(|p| (*p).clone()), running("its replicas to be in sync again".to_owned()))
}

/// What a drained node may take. Eviction counts pods that are ready, and brokers are ready only once they have had everything; what has
/// fallen behind since, or moves, only the brokers know.
fn disruption(names: &Names, seen: &Seen, pods: i32, cluster_id: &str, replaces: bool, now: Timestamp) -> Disruption {
    const ANY: Disruption = Disruption { pods_max: 1, unready_may_go: true };
    if pods <= 1 || (cluster_id.is_empty() && seen.snapshot.is_none()) {
        return ANY; // with one broker a drain has to stop it, and brokers that form no cluster yet hold nothing
    }
    let Some(snapshot) = seen.snapshot.as_deref() else { return Disruption::default() };
    let all = || snapshot.partitions().chain(&snapshot.metadata.metadata_group);
    let is_there = |name: &str| seen.pods.iter().any(|p| p.name == name && p.ready && !p.terminating);
    let holds = |id: u64| all().any(|p| p.replicas.contains(&id));
    let ours = |b: &&v1::Broker| names.ordinal(&b.name).is_some() && b.phase != "expected" && holds(b.id);
    let away = snapshot.metadata.brokers.iter().filter(ours).filter(|b| !is_there(&b.name));
    // one whose disk was lost is there twice: with its old replicas, and with those that replace them
    let away: BTreeSet<&str> = away.map(|b| b.name.as_str()).collect();
    let allows = match Vec::from_iter(away)[..] {
        [] => snapshot.leaderless(all()) == 0 && snapshot.under_replicated(all()) == 0,
        // a budget of one lets it go, and no pod that is ready
        [name] => {
            let is_broken = |p: &PodSeen| p.name == name && unready_seconds(p, now) > BROKEN_AFTER_SECONDS;
            seen.pods.iter().any(is_broken)
                && snapshot.leaderless(all()) == 0
                && all().all(|p| whole_without(snapshot, p, name))
        }
        _ => false,
    };
    Disruption { pods_max: i32::from(allows && !replaces), unready_may_go: false }
}

/// Whether all other replicas of a partition are in sync, and a majority, without those of the broker of this name.
fn whole_without(snapshot: &Snapshot, partition: &v1::Partition, name: &str) -> bool {
    let in_sync = snapshot.in_sync(partition);
    let others: Vec<u64> = partition.replicas.iter().copied().filter(|id| snapshot.name(*id) != Some(name)).collect();
    others.iter().all(|id| in_sync.contains(id)) && others.len() > partition.replicas.len() / 2
}

/// For how long a pod is not ready; 0 where it is.
fn unready_seconds(pod: &PodSeen, now: Timestamp) -> i64 {
    match pod.unready_since {
        Some(since) if !pod.ready => now.as_second() - since.as_second(),
        _ => 0,
    }
}

fn moves(snapshot: &Snapshot, names: &Names) -> Moves {
    let draining: Vec<u64> = snapshot
        .metadata
        .brokers
        .iter()
        .filter(|b| b.phase == "draining" && names.ordinal(&b.name).is_some())
        .map(|b| b.id)
        .collect();
    let on_draining = |p: &v1::Partition| p.replicas.iter().filter(|r| draining.contains(r)).count();
    let running: Vec<&v1::Partition> = snapshot.partitions().filter(|p| !p.settled).collect();
    let lacks = |p: &&v1::Partition| {
        let replicas = snapshot.statuses.get(&p.group).into_iter().flat_map(|s| &s.replicas);
        replicas.filter(|r| !r.voter).map(|r| r.bytes_behind).sum::<u64>()
    };
    Moves {
        planned: snapshot.partitions().map(on_draining).sum::<usize>() as i32,
        running: running.len() as i32,
        bytes_left: people_bytes(running.iter().map(lacks).sum()),
    }
}

/// Bytes for people, coarse enough that a status does not change with every record.
pub fn people_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "Ki", "Mi", "Gi", "Ti"];
    let mut amount = bytes as f64;
    let mut unit = 0;
    while amount >= 1024.0 && unit + 1 < UNITS.len() {
        amount /= 1024.0;
        unit += 1;
    }
    if amount < 10.0 && unit > 0 {
        format!("{amount:.1}{}", UNITS[unit])
    } else {
        format!("{amount:.0}{}", UNITS[unit])
    }
}

fn members(snapshot: &Snapshot) -> Vec<Member> {
    let member = |b: &v1::Broker| Member {
        id: b.id as i64,
        name: b.name.clone(),
        phase: b.phase.clone(),
        zone: b.rack.clone(),
        leads: snapshot.partitions().filter(|p| p.leader == b.id).count() as i32,
        replicas: snapshot.partitions().filter(|p| p.replicas.contains(&b.id)).count() as i32,
    };
    snapshot.metadata.brokers.iter().map(member).collect()
}

fn conditions(health: &Health, brokers: i32, seen: &Seen, moving: &Moves, roll: &Roll) -> Vec<Said> {
    let ready = if !health.formed {
        let text = format!("{} of {brokers} brokers are ready; {}", health.ready, seen.unreachable);
        Said::new("Ready", false, "Unreachable", text)
    } else if health.leaderless > 0 {
        Said::new("Ready", false, "Leaderless", format!("{} partitions have no leader now", health.leaderless))
    } else {
        Said::new("Ready", true, "Serving", format!("{} of {brokers} brokers are ready", health.ready))
    };
    let progressing = match roll {
        Roll::Stuck { pod } => {
            let text = format!("the roll has stopped: {pod} is not ready after {STUCK_AFTER_SECONDS} s; see its log");
            Said::new("Progressing", false, "RollStuck", text)
        }
        Roll::Running { left, waits_for } => {
            Said::new("Progressing", true, "Rolling", format!("{left} brokers to replace; waiting for {waits_for}"))
        }
        Roll::None if !health.draining.is_empty() => {
            let text = format!("draining {}: {} replicas to move", health.draining.join(", "), moving.planned);
            Said::new("Progressing", true, "Draining", text)
        }
        Roll::None if !health.joining.is_empty() => {
            Said::new("Progressing", true, "Joining", format!("waiting for {}", health.joining.join(", ")))
        }
        Roll::None if moving.running > 0 => {
            let text = format!("{} partitions change their replicas", moving.running);
            Said::new("Progressing", true, "Balancing", text)
        }
        Roll::None if !health.formed => Said::new("Progressing", true, "Forming", "waiting for the brokers"),
        Roll::None => Said::new("Progressing", false, SETTLED, ""),
    };
    let degraded = if health.formed && (health.leaderless > 0 || health.under_replicated > 0) {
        let text = format!("{} partitions lack a replica, {} a leader", health.under_replicated, health.leaderless);
        Said::new("Degraded", true, "UnderReplicated", text)
    } else if matches!(roll, Roll::Stuck { .. }) {
        Said::new("Degraded", true, "RollStuck", "a new broker does not become ready")
    } else {
        Said::new("Degraded", false, "Whole", "")
    };
    vec![ready, progressing, degraded]
}

/// The condition that volumes were rolled back; while no broker answers, what was known last.
fn rolled_back(seen: &Seen, before: &[Condition]) -> Option<Said> {
    const KIND: &str = "VolumesRolledBack";
    let said = |text: String| Said::new(KIND, true, "OlderThanKnown", text);
    if seen.rolled_back.is_empty() {
        let known = before.iter().find(|c| c.type_ == KIND && c.status == "True");
        return known.filter(|_| seen.snapshot.is_none()).map(|c| said(c.message.clone()));
    }
    Some(said(format!(
        "the volumes of {} are older than their data once was; these brokers neither vote nor append with them, see the runbook",
        seen.rolled_back.join(", ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use weir_crds::StreamClusterSpec;

    const NAMES: fn() -> Names = || Names::new("shop", "default");

    fn cluster(brokers: i32) -> StreamCluster {
        StreamCluster::new("default", StreamClusterSpec { brokers, ..Default::default() })
    }

    fn pods(count: i32) -> Vec<PodSeen> {
        let pod = |o| PodSeen {
            name: NAMES().broker(o),
            uid: format!("uid-{o}"),
            ready: true,
            current: true,
            zone: Some(format!("z{}", o % 3)),
            ..Default::default()
        };
        (0..count).map(pod).collect()
    }

    /// `count` brokers with ids that are not their ordinals, and one partition on the first three.
    fn snapshot(count: i32) -> Snapshot {
        let broker = |o: i32| v1::Broker {
            id: 10 + o as u64,
            name: NAMES().broker(o),
            rack: format!("z{}", o % 3),
            phase: "active".into(),
            ..Default::default()
        };
        let partition = v1::Partition { group: 7, leader: 10, replicas: vec![10, 11, 12], settled: true, partition: 0 };
        let replica = |broker| v1::ReplicaStatus { broker, in_sync: true, voter: true, ..Default::default() };
        let status = v1::PartitionStatus { group: 7, replicas: [10, 11, 12].map(replica).into(), ..Default::default() };
        let metadata = v1::GetMetadataResponse {
            cluster_id: "c1".into(),
            brokers: (0..count).map(broker).collect(),
            topics: vec![v1::Topic { partitions: vec![partition], ..Default::default() }],
            ..Default::default()
        };
        Snapshot { metadata, statuses: [(7, status)].into(), answered: BTreeSet::new() }
    }

    fn seen(count: i32, snapshot: Snapshot) -> Seen {
        Seen {
            pods_wanted: Some(count),
            template_observed: true,
            template_storage: Some("10Gi".into()),
            pods: pods(count),
            snapshot: Some(Arc::new(snapshot)),
            unreachable: String::new(),
            rolled_back: Vec::new(),
        }
    }

    fn decide(brokers: i32, seen: &Seen) -> Plan {
        plan(&cluster(brokers), &NAMES(), seen, Timestamp::from_second(10_000).unwrap())
    }

    fn reason(plan: &Plan, kind: &str) -> &'static str {
        plan.conditions.iter().find(|c| c.kind == kind).unwrap().reason
    }

    #[test]
    fn a_whole_cluster_needs_nothing() {
        let plan = decide(3, &seen(3, snapshot(3)));
        assert_eq!((plan.wanted.pods, plan.calls.len(), plan.replace.as_ref()), (3, 0, None));
        assert_eq!(plan.wanted.cluster_id, "c1");
        assert_eq!((reason(&plan, "Ready"), reason(&plan, "Progressing")), ("Serving", "Settled"));
    }

    #[test]
    fn volumes_that_were_rolled_back_are_named_also_where_the_cluster_has_stopped() {
        let kinds = |plan: &Plan| plan.conditions.iter().map(|c| c.kind).collect::<Vec<_>>();
        assert!(!kinds(&decide(3, &seen(3, snapshot(3)))).contains(&"VolumesRolledBack"));
        let mut stopped = seen(3, snapshot(3));
        (stopped.snapshot, stopped.rolled_back) = (None, vec![NAMES().broker(0), NAMES().broker(2)]);
        let plan = decide(3, &stopped);
        let find = |plan: &Plan| plan.conditions.iter().find(|c| c.kind == "VolumesRolledBack").cloned();
        let said = find(&plan).unwrap();
        assert!(said.holds && said.message.contains(&format!("{}, {}", NAMES().broker(0), NAMES().broker(2))));
        // it is known until a broker says otherwise
        let mut known = cluster(3);
        let now = Timestamp::from_second(10_000).unwrap();
        let conditions = crate::conditions::merge(&[], plan.conditions, None, now);
        known.status = Some(StreamClusterStatus { conditions, ..Default::default() });
        stopped.rolled_back.clear();
        assert_eq!(find(&super::plan(&known, &NAMES(), &stopped, now)), Some(said));
        assert_eq!(find(&super::plan(&known, &NAMES(), &seen(3, snapshot(3)), now)), None);
    }

    #[test]
    fn brokers_are_named_before_their_pods_come() {
        let plan = decide(5, &seen(3, snapshot(3)));
        assert_eq!(plan.wanted.pods, 5);
        assert_eq!(plan.calls, vec![Call::Add(NAMES().broker(3)), Call::Add(NAMES().broker(4))]);
    }

    #[test]
    fn a_pod_goes_only_once_its_broker_is_out_of_the_metadata() {
        let mut s = seen(5, snapshot(5));
        let first = decide(3, &s);
        assert_eq!(first.wanted.pods, 5);
        let drain = |o: i32| Call::Drain { id: 10 + o as u64, name: NAMES().broker(o) };
        assert_eq!(first.calls, vec![drain(4), drain(3)]);
        let mut later = snapshot(5);
        later.metadata.brokers[3].phase = "draining".into();
        later.metadata.brokers.remove(4);
        s.snapshot = Some(Arc::new(later.clone()));
        let second = decide(3, &s);
        assert_eq!((second.wanted.pods, second.calls.len()), (4, 0));
        later.metadata.brokers.remove(3);
        s.snapshot = Some(Arc::new(later));
        assert_eq!(decide(3, &s).wanted.pods, 3);
    }

    #[test]
    fn a_higher_ordinal_that_still_holds_replicas_keeps_the_lower_pods() {
        let mut state = snapshot(5);
        state.metadata.brokers.remove(3);
        assert_eq!(decide(3, &seen(5, state)).wanted.pods, 5);
    }

    #[test]
    fn brokers_beyond_the_stateful_set_are_not_forgotten() {
        let made_anew = decide(3, &seen(3, snapshot(5)));
        assert_eq!(made_anew.wanted.pods, 5, "their volumes hold replicas");
        assert_eq!(made_anew.calls.len(), 2, "and are drained");
    }

    #[test]
    fn one_that_never_came_is_taken_back() {
        let mut state = snapshot(4);
        state.metadata.brokers[3].phase = "expected".into();
        let plan = decide(3, &seen(4, state));
        assert_eq!(plan.calls, vec![Call::Drain { id: 13, name: NAMES().broker(3) }]);
    }

    #[test]
    fn nothing_goes_while_nobody_answers_even_if_no_cluster_is_known() {
        let mut s = seen(5, snapshot(5));
        s.snapshot = None;
        assert_eq!(decide(3, &s).wanted.pods, 5);
    }

    #[test]
    fn a_drain_is_taken_back_when_the_broker_is_wanted_again() {
        let mut state = snapshot(5);
        state.metadata.brokers[4].phase = "draining".into();
        let plan = decide(5, &seen(5, state));
        assert_eq!(plan.calls, vec![Call::Keep { id: 14, name: NAMES().broker(4) }]);
    }

    #[test]
    fn while_no_broker_answers_a_formed_cluster_keeps_its_pods_and_an_unformed_one_gets_them() {
        let mut s = seen(3, snapshot(3));
        s.snapshot = None;
        let mut formed = cluster(5);
        formed.status = Some(StreamClusterStatus { cluster_id: Some("c1".into()), ..Default::default() });
        let now = Timestamp::from_second(10_000).unwrap();
        let kept = plan(&formed, &NAMES(), &s, now);
        assert_eq!((kept.wanted.pods, kept.wanted.cluster_id.as_str()), (3, "c1"));
        assert_eq!(reason(&kept, "Ready"), "Unreachable");
        assert_eq!(plan(&cluster(5), &NAMES(), &s, now).wanted.pods, 5);
    }

    #[test]
    fn a_roll_replaces_one_pod_and_waits_until_all_replicas_are_in_sync() {
        let mut s = seen(3, snapshot(3));
        s.pods.iter_mut().for_each(|p| p.current = false);
        let first = decide(3, &s);
        assert_eq!(first.replace.as_ref().map(|p| p.uid.as_str()), Some("uid-2"));
        s.pods[2].current = true;
        s.pods[2].ready = false;
        assert_eq!(decide(3, &s).replace, None, "its successor is not ready");
        s.pods[2].ready = true;
        let mut behind = snapshot(3);
        behind.statuses.get_mut(&7).unwrap().replicas[2].in_sync = false;
        s.snapshot = Some(Arc::new(behind));
        let waiting = decide(3, &s);
        assert_eq!((waiting.replace.as_ref(), reason(&waiting, "Progressing")), (None, "Rolling"));
        s.snapshot = Some(Arc::new(snapshot(3)));
        assert_eq!(decide(3, &s).replace.map(|p| p.uid), Some("uid-1".into()));
    }

    #[test]
    fn a_roll_that_fails_stops_and_a_mended_template_replaces_what_failed() {
        let mut s = seen(3, snapshot(3));
        s.pods[0].current = false;
        s.pods[2].ready = false;
        s.pods[2].unready_since = Some(Timestamp::from_second(10_000 - STUCK_AFTER_SECONDS - 1).unwrap());
        let stuck = decide(3, &s);
        assert_eq!((stuck.replace.as_ref(), reason(&stuck, "Progressing")), (None, "RollStuck"));
        s.pods[2].current = false; // people changed the template again
        assert_eq!(decide(3, &s).replace.map(|p| p.uid), Some("uid-2".into()));
    }

    /// So many seconds before the time of [`decide`].
    fn ago(seconds: i64) -> Option<Timestamp> {
        Some(Timestamp::from_second(10_000 - seconds).unwrap())
    }

    #[test]
    fn nothing_may_be_evicted_while_a_replica_is_missing_though_every_pod_is_ready() {
        let allowed = |s: &Seen, brokers| decide(brokers, s).wanted.disruption;
        let (one, none) = (Disruption { pods_max: 1, unready_may_go: false }, Disruption::default());
        assert_eq!(allowed(&seen(3, snapshot(3)), 3), one);
        let mut behind = snapshot(3);
        behind.statuses.get_mut(&7).unwrap().replicas[2].in_sync = false;
        assert_eq!(allowed(&seen(3, behind.clone()), 3), none);
        let mut moving = snapshot(3);
        moving.metadata.topics[0].partitions[0].settled = false;
        assert_eq!(allowed(&seen(3, moving), 3), none);
        let mut leaderless = snapshot(3);
        leaderless.metadata.topics[0].partitions[0].leader = 0;
        assert_eq!(allowed(&seen(3, leaderless), 3), none);
        let mut unformed = seen(3, snapshot(3));
        unformed.snapshot = None;
        let any = Disruption { pods_max: 1, unready_may_go: true };
        assert_eq!(allowed(&unformed, 3), any, "nothing was formed yet");
        let mut known = cluster(3);
        known.status = Some(StreamClusterStatus { cluster_id: Some("c1".into()), ..Default::default() });
        let now = Timestamp::from_second(10_000).unwrap();
        let blind = plan(&known, &NAMES(), &unformed, now).wanted.disruption;
        assert_eq!(blind, none, "nobody says how it stands");
        let mut rolling = seen(3, snapshot(3));
        rolling.pods[0].current = false;
        let step = decide(3, &rolling);
        assert_eq!((step.replace.is_some(), step.wanted.disruption), (true, none), "one at a time");
        let mut joining = seen(4, snapshot(4));
        joining.pods.pop();
        joining.snapshot = Some(Arc::new({
            let mut state = snapshot(4);
            state.metadata.brokers[3].phase = "expected".into();
            state
        }));
        assert_eq!(allowed(&joining, 4), one, "a broker that never came holds nothing");
    }

    #[test]
    fn a_pod_that_stays_unready_may_go_while_all_it_holds_is_whole_elsewhere_and_nobody_else_may() {
        let allowed = |s: &Seen| decide(3, s).wanted.disruption;
        // a budget of one that counts what is unready: the unready pod may go, and no other
        let (that_one, none) = (Disruption { pods_max: 1, unready_may_go: false }, Disruption::default());
        let mut behind = snapshot(3);
        behind.statuses.get_mut(&7).unwrap().replicas[1].in_sync = false;
        let mut away = seen(3, behind.clone());
        (away.pods[1].ready, away.pods[1].unready_since) = (false, ago(BROKEN_AFTER_SECONDS));
        assert_eq!(allowed(&away), none, "it may be back in a moment");
        away.pods[1].unready_since = ago(BROKEN_AFTER_SECONDS + 1);
        assert_eq!(allowed(&away), that_one);
        let mut other = away.clone();
        (other.pods[2].ready, other.pods[2].unready_since) = (false, ago(100));
        assert_eq!(allowed(&other), none, "two are away");
        behind.statuses.get_mut(&7).unwrap().replicas[2].in_sync = false;
        away.snapshot = Some(Arc::new(behind));
        assert_eq!(allowed(&away), none, "it may hold the last whole replica beside the leader's");
        let mut single = snapshot(3);
        single.metadata.topics[0].partitions[0].replicas = vec![11];
        away.snapshot = Some(Arc::new(single));
        assert_eq!(allowed(&away), none, "it holds the only one");
        // its disk was lost, and the broker on the new one is about to take the replicas over
        let mut rebuilt = snapshot(3);
        rebuilt.metadata.brokers[1].phase = "lost".into();
        let new = v1::Broker { id: 20, phase: "active".into(), ..rebuilt.metadata.brokers[1].clone() };
        rebuilt.metadata.brokers.push(new);
        let mut second = rebuilt.metadata.topics[0].partitions[0].clone();
        (second.group, second.replicas[1]) = (8, 20);
        rebuilt.metadata.topics[0].partitions.push(second);
        let mut status = rebuilt.statuses[&7].clone();
        status.replicas.remove(1);
        rebuilt.statuses = [(7, status.clone()), (8, status)].into();
        away.snapshot = Some(Arc::new(rebuilt));
        assert_eq!(allowed(&away), that_one, "it is one broker, twice");
    }

    #[test]
    fn a_pod_whose_broker_fills_its_replicas_is_neither_stuck_nor_broken() {
        let mut behind = snapshot(3);
        behind.statuses.get_mut(&7).unwrap().replicas[2].in_sync = false;
        let mut s = seen(3, behind.clone());
        (s.pods[2].ready, s.pods[2].unready_since) = (false, ago(STUCK_AFTER_SECONDS + 1));
        assert_eq!(reason(&decide(3, &s), "Progressing"), "RollStuck", "its broker does not answer");
        behind.answered = [10, 12].into();
        s.snapshot = Some(Arc::new(behind));
        assert_eq!(reason(&decide(3, &s), "Progressing"), "Settled");
        assert_eq!(reason(&decide(3, &s), "Degraded"), "UnderReplicated");
        s.pods[2].current = false;
        assert_eq!(decide(3, &s).replace, None, "it would begin again");
    }

    #[test]
    fn one_broker_may_always_be_evicted() {
        let mut state = snapshot(1);
        state.metadata.topics[0].partitions[0].leader = 0;
        let mut alone = seen(1, state);
        alone.pods[0].ready = false;
        assert_eq!(decide(1, &alone).wanted.disruption, Disruption { pods_max: 1, unready_may_go: true });
    }

    #[test]
    fn brokers_are_told_their_zone() {
        let mut state = snapshot(3);
        state.metadata.brokers[1].rack.clear();
        assert_eq!(decide(3, &seen(3, state)).calls, vec![Call::SetRack { id: 11, rack: "z1".into() }]);
    }

    #[test]
    fn a_broker_that_is_new_under_its_name_is_told_of_once_and_why() {
        let mut known = cluster(3);
        let at = |known: &StreamCluster, s: &Seen| plan(known, &NAMES(), s, Timestamp::from_second(10_000).unwrap());
        let before = at(&known, &seen(3, snapshot(3)));
        assert!(before.rebuilt.is_empty(), "a cluster that was formed");
        known.status = Some(before.status);
        let mut state = snapshot(3);
        state.metadata.brokers[1].phase = "lost".into();
        let why = "its store was damaged: 000012.sst".to_owned();
        let new =
            v1::Broker { id: 20, phase: "active".into(), rebuilt_because: why, ..state.metadata.brokers[1].clone() };
        state.metadata.brokers.push(new);
        let after = at(&known, &seen(3, state.clone()));
        let said = "default-broker-1 is rebuilt from the other brokers, under id 20: its store was damaged: 000012.sst";
        assert_eq!(after.rebuilt, [said]);
        known.status = Some(after.status);
        assert_eq!(at(&known, &seen(3, state.clone())).rebuilt.len(), 0, "once");
        state.metadata.brokers.remove(1);
        assert_eq!(at(&known, &seen(3, state)).rebuilt.len(), 0);
        assert_eq!(at(&known, &seen(5, snapshot(5))).rebuilt.len(), 0, "others that joined");
    }

    #[test]
    fn sizes_are_coarse() {
        assert_eq!(
            ["0B", "512B", "1.5Ki", "20Mi"],
            [0, 512, 1536, 20 << 20].map(people_bytes).map(|s| s.leak() as &str)
        );
    }
}
