//! Idle groups sleep, so that thousands of them cost next to nothing: no time passes for them, and they send no heartbeats.
//! Brokers tell each other that they run instead ([`PeerMessage::Alive`](crate::node::PeerMessage::Alive)).
//!
//! A leader puts its group to sleep once all replicas have all of the log, nothing was asked of it for a while, and the brokers of
//! all replicas were heard of lately. It tells them ([`Asleep`]); a follower that does not have just that log in just that term
//! stays awake, misses heartbeats, asks for votes, and so wakes the others. What wakes a replica:
//! - any message of the group, but for acknowledgements that bring nothing new;
//! - what the leader is asked to append, to change or to hand over;
//! - the silence, or the lost connection, of the leader's broker, and for a leader of any replica's (where the broker was only silent,
//!   and speaks again before anyone asked for votes, followers sleep on);
//! - the leader's broker when it names the groups it leads, every two seconds, and this one is not among them in this term for long,
//!   or is damaged there.
//!
//! Nothing of this can do more than let a group wait: what is acknowledged is Raft's to say, as before. The idea is CockroachDB's
//! "quiescence".

use crate::duties::ANNOUNCE_TICKS;
use crate::group::Group;
use crate::ids::{BrokerId, GroupId, META_GROUP};
use crate::node::{Asleep, Node};
use raft::StateRole;
use raft::eraftpb::{Message, MessageType};

/// A follower that sleeps and is named by its leader no more wakes after so many ticks.
const FORGOTTEN_TICKS: u64 = 4 * ANNOUNCE_TICKS;

/// A replica's sleep.
#[derive(Default)]
pub(crate) struct Sleep {
    asleep: bool,
    /// ticks for which a leader's group has been still
    idle: u32,
    /// for a follower, the tick in which its leader last named the group
    named: u64,
    /// what a follower that is awake was told last, and by whom: it sleeps (again) as soon as that fits
    told: Option<(BrokerId, Asleep)>,
}

impl Group {
    /// Whether it sleeps.
    pub fn is_asleep(&self) -> bool {
        self.sleep.asleep
    }

    /// Ends its sleep; it is because a broker has said nothing for `elapsed` ticks, or 0. A leader asks its followers anew who is
    /// there.
    pub(crate) fn wake(&mut self, elapsed: usize) {
        self.sleep.idle = 0;
        self.sleep.told = None;
        if !std::mem::take(&mut self.sleep.asleep) {
            return;
        }
        let leads = self.is_leader();
        if elapsed > 0 && !leads {
            // should the broker speak again, all is as it was: its group sends no heartbeats
            let asleep = Asleep { group: self.id(), term: self.term(), index: self.last_index() };
            let leader = self.leader().and_then(|l| self.brokers.get(&l.0).copied());
            self.sleep.told = leader.map(|broker| (broker, asleep));
        }
        self.raft.raft.election_elapsed = if leads { 0 } else { elapsed };
        if leads && elapsed == 0 {
            // their brokers were heard of all the time
            let members: Vec<u64> = self.raft.raft.prs().iter().map(|(id, _)| *id).collect();
            for id in members {
                self.raft.raft.mut_prs().get_mut(id).into_iter().for_each(|p| p.recent_active = true);
            }
        }
    }

    /// Whether all has been done that was asked of a leader, and all replicas have it.
    fn is_still(&self) -> bool {
        let raft = &self.raft.raft;
        let last = raft.raft_log.last_index();
        self.is_leader()
            && self.rests_at(last)
            && !self.has_work()
            && raft.lead_transferee.is_none()
            && self.conf().voters_outgoing.is_empty()
            && raft.prs().iter().all(|(_, p)| p.matched == last)
    }

    /// Whether all there is, up to `index`, is on disk and applied, and nothing is under way.
    fn rests_at(&self, index: u64) -> bool {
        let log = &self.raft.raft.raft_log;
        log.last_index() == index && log.persisted == index && self.applied() == index && self.has_nothing_under_way()
    }

    pub(crate) fn count_idle(&mut self) {
        self.sleep.idle = if self.is_still() { self.sleep.idle.saturating_add(1) } else { 0 };
    }

    /// Acknowledgements that reach the leader of a group that sleeps, and had all of them: they do not wake it.
    pub(crate) fn says_nothing_new(&self, message: &Message) -> bool {
        let ack = matches!(message.msg_type, MessageType::MsgHeartbeatResponse | MessageType::MsgAppendResponse);
        ack && !message.reject && message.term == self.term() && self.is_leader()
    }

    /// For a follower: whether its leader's word fits what is here. The answer to a heartbeat of the same frame may be on its way.
    fn may_follow(&self, from: BrokerId, asleep: &Asleep) -> bool {
        self.raft.raft.state == StateRole::Follower
            && self.term() == asleep.term
            && self.leader_is_on(from)
            && self.rests_at(asleep.index)
    }

    /// Who told a follower that its group sleeps, where that fits now.
    pub(crate) fn may_sleep_by(&self) -> Option<BrokerId> {
        let (from, asleep) = self.sleep.told.as_ref()?;
        self.may_follow(*from, asleep).then_some(*from)
    }

    pub(crate) fn leader_is_on(&self, broker: BrokerId) -> bool {
        self.leader().is_some_and(|l| self.brokers.get(&l.0) == Some(&broker))
    }

    /// Takes a broker's word that it leads the group in `term`; false where that is news to a replica that sleeps.
    pub(crate) fn still_led(&mut self, by: BrokerId, term: u64, tick: u64) -> bool {
        if !self.is_asleep() || term < self.term() {
            return true;
        }
        self.sleep.named = tick;
        term == self.term() && self.leader_is_on(by)
    }
}

impl Node {
    /// Replicas held here that sleep.
    pub fn asleep(&self) -> usize {
        self.groups.values().filter(|g| g.is_asleep()).count()
    }

    /// Whether a broker has said something lately.
    pub(crate) fn was_heard(&self, broker: BrokerId) -> bool {
        self.heard.get(&broker).is_some_and(|h| self.ticks - h.tick < self.limits.silence_ticks)
    }

    pub(crate) fn wake(&mut self, id: GroupId) {
        if let Some(group) = self.groups.get_mut(&id) {
            group.wake(0);
            self.awake.insert(id);
        }
    }

    /// Lets time pass for a group, unless it sleeps.
    pub(crate) fn keep_awake(&mut self, id: GroupId) {
        if self.groups.get(&id).is_some_and(|g| !g.is_asleep()) {
            self.awake.insert(id);
        }
    }

    /// Puts a group led here to sleep, where it can.
    pub(crate) fn put_to_sleep(&mut self, id: GroupId) {
        let Some(group) = self.groups.get(&id).filter(|g| g.sleep.idle >= self.limits.idle_ticks) else { return };
        if id == META_GROUP || group.is_asleep() {
            return;
        }
        let mine = group.replica().0;
        let others = group.raft.raft.prs().iter().map(|(id, _)| *id).filter(|id| *id != mine);
        let others: Option<Vec<BrokerId>> = others.map(|id| group.brokers.get(&id).copied()).collect();
        let Some(others) = others.filter(|list| list.iter().all(|b| self.was_heard(*b))) else { return };
        let asleep = Asleep { group: id, term: group.term(), index: group.last_index() };
        self.out.asleep.extend(others.into_iter().map(|broker| (broker, asleep)));
        self.fall_asleep(id);
    }

    /// No time passes for it from now on, and its share of memory is an equal one.
    fn fall_asleep(&mut self, id: GroupId) {
        self.awake.remove(&id);
        let share = self.limits.tail_bytes_max / 2 / self.groups.len().max(1) as u64;
        if let Some(group) = self.groups.get_mut(&id) {
            group.sleep = Sleep { asleep: true, named: group.sleep.named, ..Sleep::default() };
            group.evict(share);
        }
    }

    /// A leader's word that its group sleeps. What came just before it may not be applied yet, or not on disk.
    pub(crate) fn leader_asleep(&mut self, from: BrokerId, asleep: &Asleep) {
        let ticks = self.ticks;
        let Some(group) = self.groups.get_mut(&asleep.group).filter(|g| g.id() != META_GROUP) else { return };
        group.sleep.named = ticks;
        group.sleep.told = Some((from, *asleep));
        if group.may_sleep_by().is_some() {
            self.fall_asleep(asleep.group);
        }
    }

    /// Lets followers sleep as they were told, where the leader's broker is there.
    pub(crate) fn sleep_as_told(&mut self) {
        let awake = self.awake.iter().filter_map(|id| self.groups.get(id));
        let may = awake.filter(|g| g.may_sleep_by().is_some_and(|by| self.was_heard(by)));
        let may: Vec<GroupId> = may.map(Group::id).collect();
        may.into_iter().for_each(|id| self.fall_asleep(id));
    }

    /// Wakes what sleeps because of a broker that has said nothing for a while.
    pub(crate) fn wake_for_silence(&mut self) {
        let silence = self.limits.silence_ticks;
        let silent: Vec<BrokerId> =
            self.heard.iter().filter(|(_, h)| self.ticks - h.tick == silence).map(|(b, _)| *b).collect();
        silent.into_iter().for_each(|broker| self.wake_with(broker, silence as usize));
        let gone_ticks = self.limits.gone_ticks;
        let gone: Vec<BrokerId> =
            self.heard.iter().filter(|(_, h)| self.ticks - h.tick == gone_ticks).map(|(b, _)| *b).collect();
        if !gone.is_empty() {
            self.forget_leaderships(|broker, _| gone.contains(&broker));
        }
    }

    /// Wakes groups whose leader is on `broker`, and groups led here that have a replica there.
    pub(crate) fn wake_with(&mut self, broker: BrokerId, elapsed: usize) {
        for (id, group) in self.groups.iter_mut().filter(|(_, g)| g.is_asleep()) {
            let member = |id: &u64| group.brokers.get(id) == Some(&broker);
            if group.leader_is_on(broker) || group.is_leader() && group.raft.raft.prs().iter().any(|(id, _)| member(id))
            {
                group.wake(elapsed);
                self.awake.insert(*id);
            }
        }
    }

    /// Wakes followers whose leader does not name them any more; looks at what sleeping groups hold in memory.
    pub(crate) fn wake_forgotten(&mut self) {
        self.asleep_bytes = 0;
        for (id, group) in self.groups.iter_mut().filter(|(_, g)| g.is_asleep()) {
            self.asleep_bytes += group.log().tail().bytes();
            if !group.is_leader() && self.ticks - group.sleep.named > FORGOTTEN_TICKS {
                group.wake(0);
                self.awake.insert(*id);
            }
        }
    }
}
