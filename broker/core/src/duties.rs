//! What a node does by itself as time passes: membership, leadership, retention, memory, and, as metadata leader, the plan.

use crate::cursor::CursorUpdate;
use crate::entry::{Control, Cut};
use crate::group::{Group, Machine};
use crate::ids::{BrokerId, GroupId, META_GROUP, ReplicaId, SubscriptionId, Ticket, TopicId};
use crate::log::CheckpointInfo;
use crate::membership::{Step, next_step};
use crate::meta::command::{Command, Kind, Settled};
use crate::meta::plan;
use crate::meta::state::{Assignment, MetaState, Start, Subscription, Topic};
use crate::node::{LeaderInfo, Node, Pulse};
use crate::pace::Pace;
use crate::retention;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Ticket of the node's own proposals; nobody waits for them.
const NOBODY: Ticket = Ticket(0);
/// Ticks between two looks at membership and plan.
const MEMBERSHIP_TICKS: u64 = 4;
/// Ticks between two announcements of all groups led.
pub(crate) const ANNOUNCE_TICKS: u64 = 40;
/// Ticks after which a leadership that is announced no more is over.
const UNNAMED_TICKS: u64 = 3 * ANNOUNCE_TICKS;
/// A broker that was silent for this long does not live, ms.
const SILENCE_MS: u64 = 2_000;
/// Ticks between two looks at retention.
const RETENTION_TICKS: u64 = 100;
/// Ticks between two looks at replicas that are behind.
const PACE_TICKS: u64 = 20;
/// A cut that removes no record is made only where this many bytes of other entries go with it.
const CUT_BYTES_MIN: u64 = 1 << 20;

impl Node {
    pub(crate) fn run_duties(&mut self) {
        if self.ticks.is_multiple_of(self.limits.heartbeat_ticks as u64) {
            self.out.pulse = Some(self.pulse());
            self.ask_about_incarnation();
            self.remember_incarnations();
        }
        if self.ticks.is_multiple_of(2) {
            self.trim_memory();
        }
        if self.ticks.is_multiple_of(MEMBERSHIP_TICKS) {
            self.compare_with_others();
            self.tend_leaders();
            self.tend_cluster();
            self.watch_progress();
            self.retain_size();
        }
        if self.ticks.is_multiple_of(ANNOUNCE_TICKS) {
            self.announce_all();
        }
        if self.ticks.is_multiple_of(PACE_TICKS) {
            self.keep_pace();
        }
        if self.ticks.is_multiple_of(RETENTION_TICKS) {
            self.retain();
        }
    }

    pub(crate) fn pulse(&self) -> Pulse {
        Pulse {
            incarnation: if self.takes_part() { self.incarnation() } else { Default::default() },
            log_ms: self.now.log_ms,
            sync_ms: self.syncs.median_ms(self.now.mono_ms).map_or(0, |ms| ms.max(1)),
            slow: self.syncs.is_slow(),
        }
    }

    /// Compares disk and clock with the other brokers'.
    fn compare_with_others(&mut self) {
        let before = self.holds_back();
        self.syncs.compare(self.now.mono_ms);
        self.find_skew();
        self.tend_all |= before != self.holds_back();
    }

    /// Keeps recent entries of all groups within the budget, the same share for each.
    fn trim_memory(&mut self) {
        let held = self.awake.iter().filter_map(|id| self.groups.get(id)).map(|g| g.log().tail().bytes());
        let (mut total, mut busy) = (0, 0);
        for bytes in held {
            total += bytes;
            busy += u64::from(bytes > 64 << 10);
        }
        let budget = self.limits.tail_bytes_max - self.asleep_bytes.min(self.limits.tail_bytes_max / 2);
        if total <= budget {
            return;
        }
        let share = budget / busy.max(1);
        for id in &self.awake {
            self.groups.get_mut(id).into_iter().for_each(|g| g.evict(share));
        }
    }

    /// Membership, balance and announcements of the groups led here: of those awake, and where something changed of all.
    pub(crate) fn tend_leaders(&mut self) {
        let led = |g: &&Group| g.is_leader();
        let led: Vec<GroupId> = if std::mem::take(&mut self.tend_all) {
            self.groups.values().filter(led).map(Group::id).collect()
        } else {
            self.awake.iter().filter_map(|id| self.groups.get(id)).filter(led).map(Group::id).collect()
        };
        for id in led {
            let Some(assignment) = self.meta.assignment(id).cloned() else { continue };
            let mut info = LeaderInfo { group: id, term: 0, settled_epoch: None, damaged: ReplicaId(0) };
            let avoided = assignment.replicas.iter().filter(|r| self.is_avoided(BrokerId(r.broker)));
            let avoided: Vec<u64> = avoided.map(|r| r.id).collect();
            let unfit = self.low && id != META_GROUP || self.holds_back();
            let resigning = self.resigning;
            let now = self.now.mono_ms;
            let balance_after_ms = self.limits.balance_after_ms;
            let Some(group) = self.groups.get_mut(&id) else { continue };
            info.term = group.term();
            // its successor is to be on this broker, where it begins with nothing: another replica leads until it has caught up
            let is_replaced = assignment.replica_on(self.broker).is_some_and(|r| r.id != group.replica().0);
            let leaves = (resigning || unfit || is_replaced) && {
                // one that leaves would hand it back at once
                let leaving = assignment.leaving.iter().map(|r| r.id).filter(|_| !resigning);
                resign(group, &avoided.iter().copied().chain(leaving).collect::<Vec<_>>())
            };
            if !leaves && !resigning && tend_membership(group, &assignment) {
                info.settled_epoch = Some(assignment.epoch);
                balance(group, &assignment, &avoided, now, balance_after_ms);
            }
            if group.has_work() {
                self.dirty.insert(id);
            }
            self.tend_cursors(id, TopicId(assignment.topic));
            let reached = info.settled_epoch.is_some() && !assignment.is_settled();
            if reached && self.membership_is_on_disk(id) {
                self.settled.insert(id, assignment.epoch);
                self.out.announce.push(info);
            }
            let at_home = assignment.replicas.first().is_some_and(|r| r.broker == self.broker.0);
            if info.settled_epoch.is_some() && assignment.is_settled() && at_home {
                self.put_to_sleep(id);
            } else {
                self.wake(id); // there is something to do for it, and not just once
            }
        }
        let replaced = self.damaged.clone().into_iter().filter(|(group, _)| !self.not_opened.contains_key(group));
        for (group, replica) in replaced.collect::<Vec<_>>() {
            self.to_renew.insert(group, replica);
            self.out.announce.push(LeaderInfo { group, term: 0, settled_epoch: None, damaged: replica });
        }
    }

    fn membership_is_on_disk(&mut self, id: GroupId) -> bool {
        let log_ms = self.now.log_ms;
        let Some(group) = self.groups.get_mut(&id) else { return false };
        let known = group.membership_is_on_disk(log_ms);
        if group.has_work() {
            self.dirty.insert(id);
        }
        known
    }

    /// Gives new subscriptions their start in a partition led here, and forgets those that were deleted.
    pub(crate) fn tend_cursors(&mut self, id: GroupId, topic: TopicId) {
        let Some(group) = self.groups.get(&id).filter(|g| g.knows_cursors()) else { return };
        let Machine::Partition(state) = group.machine() else { return };
        let meta = self.meta.clone();
        let tail = group.log().tail();
        let begin = |s: &Subscription| {
            // of a topic, or a partition, that was made after it, it misses nothing; a snapshot is as old as what it is of
            let since = if s.snapshot_of == 0 { s.id } else { s.snapshot_of };
            let all = s.spec.start() == Start::Earliest || id.0 > since;
            let start = if let Some(start_ms) = s.spec.start_ms {
                group.log().offset_at(start_ms).min(state.next_offset).max(tail.start_offset())
            } else if all {
                tail.start_offset()
            } else {
                state.next_offset
            };
            let known = s.snapshot_of != 0 && state.cursors.get(s.snapshot_of).is_some();
            let seek = (!known).then_some(start);
            let snapshot_of = if known { s.snapshot_of } else { 0 };
            CursorUpdate { subscription: s.id, seek, snapshot_of, ..Default::default() }
        };
        let new = meta.subscriptions_of(topic).filter(|s| state.cursors.get(s.0).is_none());
        let mut cursors: Vec<CursorUpdate> = new.filter_map(|s| meta.subscription_by_id(s)).map(begin).collect();
        let gone = state.cursors.iter().filter(|(s, _)| meta.subscription_by_id(SubscriptionId(*s)).is_none());
        cursors.extend(gone.map(|(subscription, _)| CursorUpdate { subscription, delete: true, ..Default::default() }));
        if !cursors.is_empty() {
            self.control(NOBODY, id, &Control { cursors, ..Default::default() });
            if let Some(group) = self.groups.get_mut(&id) {
                group.proposed_cursors();
            }
        }
    }

    /// As metadata leader: records what was reached, replaces damaged replicas, carries out the plan.
    fn tend_cluster(&mut self) {
        let Some(group) = self.groups.get(&META_GROUP) else { return };
        if !group.is_leader() || group.unapplied() > 0 || self.resigning {
            return;
        }
        let mut commands: Vec<Command> = Vec::new();
        for (group, epoch) in &self.settled {
            if self.meta.assignment(*group).is_some_and(|a| a.epoch == *epoch && !a.is_settled()) {
                commands.push(Kind::Settled(Settled { group: group.0, epoch: *epoch }).into());
            }
        }
        commands.extend(self.unrecorded_starts());
        for (group, replica) in &self.to_renew {
            commands
                .extend(self.meta.assignment(*group).and_then(|a| plan::renew(*group, a, *replica)).map(Command::from));
        }
        if commands.is_empty() && self.planned.as_ref().is_none_or(|of| !Arc::ptr_eq(of, &self.meta)) {
            commands = plan::plan(&self.meta);
            self.planned = commands.is_empty().then(|| self.meta.clone());
        }
        for command in commands {
            self.command(NOBODY, &command);
        }
    }

    fn announce_all(&mut self) {
        let info = |g: &Group| LeaderInfo { group: g.id(), term: g.term(), settled_epoch: None, damaged: ReplicaId(0) };
        let led: Vec<LeaderInfo> = self.groups.values().filter(|g| g.is_leader()).map(info).collect();
        self.out.announce.extend(led);
        self.out.disk_full = Some(self.low);
        let now = self.ticks;
        self.forget_leaderships(|_, tick| now - tick > UNNAMED_TICKS); // its leader names it no more
        self.wake_forgotten();
    }

    /// Decides what retention no longer keeps of the groups led here, and removes what was decided.
    fn retain(&mut self) {
        let meta = self.meta.clone();
        let redrives = redrives(&meta);
        for topic in meta.topics.values() {
            for id in topic.groups.iter().map(|g| GroupId(*g)) {
                let Some(group) = self.groups.get_mut(&id) else { continue };
                let newest = group.log().checkpoints().back().copied();
                let interval = (topic.spec.retention_ms / 16).max(1_000);
                let due = |c: CheckpointInfo| c.append_time_ms.saturating_add(interval) <= self.now.log_ms;
                if topic.spec.retention_ms > 0 && newest.is_some_and(due) {
                    group.checkpoint(&mut self.ops);
                }
                self.decide_cut(id, topic, &redrives);
                self.remove_cut(id);
            }
        }
    }

    /// The same for groups whose log is too large: at full speed it grows by gigabytes between two looks at all.
    fn retain_size(&mut self) {
        let awake = self.awake.iter().filter_map(|id| self.groups.get(id));
        let large = awake.filter(|g| g.retention_bytes > 0 && g.kept_bytes() > g.retention_bytes);
        let large: Vec<GroupId> = large.map(Group::id).collect();
        if large.is_empty() {
            return;
        }
        let meta = self.meta.clone();
        let redrives = redrives(&meta);
        for id in large {
            if let Some(topic) = meta.topic_of(id) {
                self.decide_cut(id, topic, &redrives);
            }
            self.remove_cut(id);
        }
    }

    /// As leader: where the log of a partition is cut. By time only where a majority of the cluster's clocks agree with the one here.
    fn decide_cut(&mut self, id: GroupId, topic: &Topic, redrives: &BTreeSet<u64>) {
        let stamp_ms = self.stamp_ms();
        let now_ms = self.clock_confirmed.then_some(self.now.log_ms);
        let decides = |g: &&mut Group| g.serves() && g.knows_cursors();
        let Some(group) = self.groups.get_mut(&id).filter(decides) else { return };
        let Machine::Partition(state) = group.machine() else { return };
        let readers = self.meta.subscriptions_of(TopicId(topic.id)).map(|s| s.0);
        let declared = readers.map(|id| (id, state.cursors.get(id).map_or(0, |c| c.position())));
        // the metadata here may be behind: what the log knows of counts too
        let positions = declared.chain(state.cursors.iter().map(|(id, c)| (id, c.position())));
        let keep = positions.filter(|(id, _)| !redrives.contains(id)).map(|(_, position)| position).min();
        let points = group.log().checkpoints();
        let found = retention::cut(points.iter(), &topic.spec, group.total_bytes(), now_ms, keep);
        let Some(point) = points.iter().find(|c| Some(c.index) == found).copied() else { return };
        let freed = point.log_bytes.saturating_sub(group.log().oldest().map_or(0, |c| c.log_bytes));
        // the record of a cut is itself a part of the log that ages
        let worth = point.next_offset > state.cut.offset || freed >= CUT_BYTES_MIN;
        if worth && point.index > state.cut.index {
            group.propose_cut(Cut { index: point.index, offset: point.next_offset }, stamp_ms);
            self.dirty.insert(id);
        }
    }

    fn remove_cut(&mut self, id: GroupId) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        if let Err(error) = group.remove_cut(&mut self.ops) {
            self.read_failed(id, error);
        }
    }

    /// Slows publishers of groups led here of which a replica that runs is far behind and does not gain. Once a second.
    fn keep_pace(&mut self) {
        let least = self.limits.behind_bytes_min;
        let led = |g: &&Group| g.is_leader() && g.id() != META_GROUP;
        let led = self.awake.iter().filter_map(|id| self.groups.get(id)).filter(led);
        let mut seen: BTreeMap<GroupId, (u64, u64)> = BTreeMap::new();
        for group in led {
            let runs = |id: &u64| group.brokers.get(id).is_some_and(|b| self.was_heard(*b));
            let members = group.conf().voters.iter().chain(&group.conf().learners);
            let others = members.filter(|id| **id != group.replica().0 && runs(id));
            let behind = others.map(|id| group.bytes_of(group.lag(*id).unwrap_or(0))).max().unwrap_or(0);
            if behind >= least || self.paces.contains_key(&group.id()) {
                seen.insert(group.id(), (group.total_bytes(), behind));
            }
        }
        let before = std::mem::take(&mut self.paces);
        for (id, (total, behind)) in seen {
            let mut pace = before.get(&id).cloned().unwrap_or_default();
            pace.second(total, behind, least);
            if behind >= least || pace.share() > 0 {
                self.paces.insert(id, pace);
            }
        }
        let limit = |paces: &BTreeMap<GroupId, Pace>, id: &GroupId| paces.get(id).and_then(Pace::limit);
        let ids: BTreeSet<GroupId> = before.keys().chain(self.paces.keys()).copied().collect();
        let changed = ids.into_iter().filter(|id| limit(&before, id) != limit(&self.paces, id));
        let changed: Vec<_> = changed.map(|id| (id, limit(&self.paces, &id))).collect();
        self.out.paces.extend(changed);
    }

    /// Begins a planned stop: leadership is handed over, and no new one is taken on.
    pub fn resign(&mut self) {
        self.resigning = true;
        self.tend_all = true;
        self.tend_leaders();
    }

    /// Writes a checkpoint of every group, so that the next start has nothing to replay.
    pub fn checkpoint_all(&mut self) {
        self.groups.values_mut().for_each(|g| g.checkpoint(&mut self.ops));
    }

    /// Groups led here that another replica could lead.
    pub fn led_with_others(&self) -> usize {
        self.groups.values().filter(|g| g.is_leader() && g.conf().voters.len() > 1).count()
    }

    /// Whether the data of the broker of this name can be rebuilt: the other replicas of each of its groups are a majority of the voters,
    /// and live.
    pub fn can_replace(&self, name: &str) -> bool {
        let Some(broker) = self.meta.broker_named(name).map(|b| b.id) else { return false };
        let lives = |id: u64| id == self.broker.0 || !self.is_silent(BrokerId(id), SILENCE_MS);
        let mut held = self.meta.groups.values().filter(|a| a.replica_on(BrokerId(broker)).is_some());
        held.all(|assignment| {
            let voters = || assignment.replicas.iter().filter(|r| !r.learner);
            voters().filter(|r| r.broker != broker && lives(r.broker)).count() > voters().count() / 2
        })
    }

    /// Whether a broker of this name may be replaced: the one that had it is silent.
    pub fn is_silent(&self, broker: BrokerId, silence_ms: u64) -> bool {
        self.heard.get(&broker).is_none_or(|at| self.now.mono_ms - at.ms >= silence_ms)
    }
}

/// Subscriptions that put dead letters back: what retention takes is not put back.
fn redrives(meta: &MetaState) -> BTreeSet<u64> {
    meta.subscriptions.values().filter(|s| s.redrive_of != 0).map(|s| s.id).collect()
}

/// One step of membership; true where it is as wanted.
fn tend_membership(group: &mut Group, assignment: &Assignment) -> bool {
    let ids = |learner: bool| -> Vec<u64> {
        assignment.replicas.iter().filter(|r| r.learner == learner).map(|r| r.id).collect()
    };
    let step = next_step(group.replica().0, group.conf(), &ids(false), &ids(true), |id| group.caught_up(id));
    match step {
        Step::Settled => return true,
        Step::Wait => {}
        Step::Change(change) => group.change_membership(&change),
        Step::Transfer(to) => group.transfer(to),
    }
    false
}

/// Hands leadership to the preferred replica once this one has led for a while.
fn balance(group: &mut Group, assignment: &Assignment, avoided: &[u64], now_ms: u64, after_ms: u64) {
    if group.leader_since_ms == 0 {
        group.leader_since_ms = now_ms.max(1);
    }
    let Some(preferred) = assignment.replicas.first().map(|r| r.id).filter(|id| !avoided.contains(id)) else { return };
    if preferred != group.replica().0 && now_ms - group.leader_since_ms >= after_ms && group.caught_up(preferred) {
        group.leader_since_ms = 0;
        group.transfer(preferred);
    }
}

/// Hands leadership to the replica that has most of the log, but to none that is `avoided`; returns false where there is none.
fn resign(group: &mut Group, avoided: &[u64]) -> bool {
    let other = |id: &u64| *id != group.replica().0 && !avoided.contains(id);
    let best = group.conf().voters.iter().copied().filter(other);
    let to = best.filter(|id| group.caught_up(*id)).min_by_key(|id| group.lag(*id));
    to.inspect(|to| group.transfer(*to)).is_some()
}
