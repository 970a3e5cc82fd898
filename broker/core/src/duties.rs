//! What a node does by itself as time passes: membership, leadership, retention, memory, and, as metadata leader, the plan.

use crate::cursor::CursorUpdate;
use crate::entry::Control;
use crate::group::{Group, Machine};
use crate::ids::{BrokerId, GroupId, META_GROUP, ReplicaId, Ticket, TopicId};
use crate::membership::{Step, next_step};
use crate::meta::command::{Command, Kind, Reassign, Settled};
use crate::meta::plan;
use crate::meta::state::{Assignment, Start, Subscription};
use crate::node::{LeaderInfo, Node};
use crate::retention;
use std::sync::Arc;

/// Ticket of the node's own proposals; nobody waits for them.
const NOBODY: Ticket = Ticket(0);
/// Ticks between two looks at membership and plan.
const MEMBERSHIP_TICKS: u64 = 4;
/// Ticks between two announcements of all groups led.
pub(crate) const ANNOUNCE_TICKS: u64 = 40;
/// Ticks between two looks at retention.
const RETENTION_TICKS: u64 = 100;

impl Node {
    pub(crate) fn run_duties(&mut self) {
        self.out.alive |= self.ticks.is_multiple_of(self.limits.heartbeat_ticks as u64);
        if self.ticks.is_multiple_of(2) {
            self.trim_memory();
        }
        if self.ticks.is_multiple_of(MEMBERSHIP_TICKS) {
            self.tend_leaders();
            self.tend_cluster();
            self.watch_progress();
        }
        if self.ticks.is_multiple_of(ANNOUNCE_TICKS) {
            self.announce_all();
        }
        if self.ticks.is_multiple_of(RETENTION_TICKS) {
            self.retain();
        }
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
            let full = assignment.replicas.iter().filter(|r| !self.has_room(BrokerId(r.broker)));
            let full: Vec<u64> = full.map(|r| r.id).collect();
            let low = self.low && id != META_GROUP;
            let resigning = self.resigning;
            let now = self.now.mono_ms;
            let balance_after_ms = self.limits.balance_after_ms;
            let Some(group) = self.groups.get_mut(&id) else { continue };
            info.term = group.term();
            let leaves = (resigning || low) && resign(group, &full);
            if !leaves && !resigning && tend_membership(group, &assignment) {
                info.settled_epoch = Some(assignment.epoch);
                balance(group, &assignment, &full, now, balance_after_ms);
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
        for (group, replica) in self.damaged.clone() {
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
            let start = if s.spec.start_ms > 0 {
                group.log().offset_at(s.spec.start_ms).min(state.next_offset).max(tail.start_offset())
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
        let new = meta.subscriptions_of(topic).filter(|s| state.cursors.get(s.id).is_none());
        let mut cursors: Vec<CursorUpdate> = new.map(begin).collect();
        let gone = state.cursors.iter().filter(|(s, _)| meta.subscriptions.values().all(|x| x.id != *s));
        cursors.extend(gone.map(|(subscription, _)| CursorUpdate { subscription, delete: true, ..Default::default() }));
        if !cursors.is_empty() {
            self.control(NOBODY, id, &Control { cursors });
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
        for (group, replica) in &self.to_renew {
            commands.extend(self.meta.assignment(*group).and_then(|a| renew(*group, a, *replica)));
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
        self.wake_forgotten();
    }

    /// Removes what retention no longer keeps, each replica for itself.
    fn retain(&mut self) {
        let meta = self.meta.clone();
        for topic in meta.topics.values() {
            for id in topic.groups.iter().map(|g| GroupId(*g)) {
                let Some(group) = self.groups.get_mut(&id) else { continue };
                let Machine::Partition(state) = group.machine() else { continue };
                let readers = || meta.subscriptions_of(TopicId(topic.id));
                let declared = readers().map(|s| state.cursors.get(s.id).map_or(0, |c| c.position()));
                // the metadata here may be behind: what the log knows of counts too
                let keep = declared.chain(state.cursors.iter().map(|(_, c)| c.position())).min();
                let newest = group.log().checkpoints().back().copied();
                let interval = (topic.spec.retention_ms / 16).max(1_000);
                let aged = topic.spec.retention_ms > 0
                    && newest.is_some_and(|c| c.append_time_ms + interval <= self.now.log_ms);
                if aged {
                    group.checkpoint(&mut self.ops);
                }
                let oldest = group.log().oldest().map_or(0, |c| c.index);
                let total = group.kept_bytes() + group.log().oldest().map_or(0, |c| c.log_bytes);
                let points = group.log().checkpoints().iter();
                let cut = retention::cut(points, &topic.spec, total, self.now.log_ms, keep);
                if let Some(index) = cut.filter(|i| *i > oldest)
                    && let Err(error) = group.truncate(index, &mut self.ops)
                {
                    self.out.damage.push(error);
                }
            }
        }
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

    /// Whether a broker of this name may be replaced: the one that had it is silent.
    pub fn is_silent(&self, broker: BrokerId, silence_ms: u64) -> bool {
        self.heard.get(&broker).is_none_or(|at| self.now.mono_ms - at.ms >= silence_ms)
    }
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
fn balance(group: &mut Group, assignment: &Assignment, full: &[u64], now_ms: u64, after_ms: u64) {
    if group.leader_since_ms == 0 {
        group.leader_since_ms = now_ms.max(1);
    }
    let Some(preferred) = assignment.replicas.first().map(|r| r.id).filter(|id| !full.contains(id)) else { return };
    if preferred != group.replica().0 && now_ms - group.leader_since_ms >= after_ms && group.caught_up(preferred) {
        group.leader_since_ms = 0;
        group.transfer(preferred);
    }
}

/// Hands leadership to whoever has most of the log, but to none whose disk is `full`; says whether there is one.
fn resign(group: &mut Group, full: &[u64]) -> bool {
    let other = |id: &u64| *id != group.replica().0 && !full.contains(id);
    let best = group.conf().voters.iter().copied().filter(other);
    let to = best.filter(|id| group.caught_up(*id)).min_by_key(|id| group.lag(*id));
    to.inspect(|to| group.transfer(*to)).is_some()
}

fn renew(group: GroupId, assignment: &Assignment, damaged: ReplicaId) -> Option<Command> {
    assignment.replicas.iter().find(|r| r.id == damaged.0)?;
    let brokers = assignment.replicas.iter().map(|r| r.broker).collect();
    let learners = assignment.replicas.iter().any(|r| r.learner);
    let voters_max = if group == META_GROUP || learners { plan::META_VOTERS_MAX as u32 } else { 0 };
    let change = Reassign { group: group.0, expected_epoch: assignment.epoch, brokers, voters_max, renew: damaged.0 };
    Some(Kind::Reassign(change).into())
}
