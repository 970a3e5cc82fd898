//! What breaks, and the administrator who drains brokers and brings in new ones meanwhile.

use crate::clients::Asked;
use crate::{GONE, Host, World};
use std::sync::Arc;
use weir_core::ids::{BrokerId, GroupId, META_GROUP, ReplicaId};
use weir_core::meta::command::{Kind, SetPhase};
use weir_core::meta::plan::renew;
use weir_core::meta::state::{Broker, Phase};
use weir_core::node::{Disk, mix};
use weir_core::storage::{Store as _, StoreError, StoredGroup};
use weir_store::mem::MemStore;

/// Which faults happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faults {
    /// None.
    None,
    /// Of networks and processes: crashes, power losses, pauses, cuts, bridges, loss, duplication, reordering.
    Crashes,
    /// These, and of disks and clocks, and drained, lost and added brokers.
    All,
}

/// How the network is.
#[derive(Default)]
pub(crate) struct Weather {
    pub loss_percent: u64,
    pub no_acks_of: Option<BrokerId>,
}

/// A broker with an empty disk that asks for an id.
pub(crate) struct Joining {
    pub name: String,
    /// how often it has asked: it takes the answer to its last question
    pub asked: u32,
    /// it asks again then
    pub again_at: u64,
    /// the broker that had the disk it replaces
    pub old: Option<BrokerId>,
}

/// A copy of a disk is old after this time, ms: others have heard of a newer mark.
const OLD_COPY_MS: u64 = 2_000;
/// A broker that was silent for this long may be replaced by one with its name, ms.
const SILENCE_MS: u64 = 2_000;

impl World {
    pub(crate) fn break_something(&mut self, faults: Faults) {
        match faults {
            Faults::None => {}
            Faults::Crashes => self.break_network_or_process(),
            Faults::All => {
                self.break_network_or_process();
                self.break_disk_or_members();
            }
        }
    }

    fn count(&mut self, fault: &'static str) {
        *self.faults.entry(fault).or_default() += 1;
        let id = fault.bytes().fold(0, |hash, byte| mix(hash ^ u64::from(byte)));
        self.note(&[id]);
    }

    fn any(&mut self) -> BrokerId {
        let ids = self.brokers();
        self.dice.pick(&ids).expect("there are hosts")
    }

    fn break_network_or_process(&mut self) {
        match self.dice.roll(1_500) {
            0..=3 => {
                self.count("crash");
                let victim = self.any();
                self.crash(victim);
            }
            4 => {
                self.count("power loss of all");
                let all: Vec<BrokerId> = self.hosts.keys().copied().collect();
                all.into_iter().for_each(|id| self.crash(id));
            }
            5..=9 => {
                // one-way cuts too
                self.count("cut");
                let pair = (self.any(), self.any());
                self.cut.insert(pair);
                if self.dice.chance(50) {
                    self.cut.insert((pair.1, pair.0));
                }
            }
            10..=14 => self.cut.clear(),
            15 => self.bridge(),
            16..=17 => {
                self.count("loss, duplication, reordering");
                self.weather.loss_percent = self.dice.roll(30);
            }
            18..=20 => {
                let pair = (self.any(), self.any());
                self.lose_contact(pair.0, pair.1);
            }
            21..=22 => {
                self.count("pause");
                let (victim, ms) = (self.any(), 200 + self.dice.roll(5_000));
                let until = self.now + ms;
                self.hosts.get_mut(&victim).expect("a host").paused_until = until;
            }
            23..=24 => {
                self.count("lull");
                self.lull_until = self.now + 500 + self.dice.roll(2_500);
            }
            _ => {}
        }
    }

    /// Two sides that reach each other only over one broker, which reaches all.
    pub fn bridge(&mut self) {
        self.count("bridge");
        let ids: Vec<BrokerId> = self.hosts.keys().copied().collect();
        let turn = self.dice.roll(ids.len() as u64) as usize;
        let middle = ids.len() / 2;
        for a in 0..middle {
            for b in middle + 1..ids.len() {
                let pair = (ids[(a + turn) % ids.len()], ids[(b + turn) % ids.len()]);
                self.cut.insert(pair);
                self.cut.insert((pair.1, pair.0));
            }
        }
    }

    fn break_disk_or_members(&mut self) {
        let victim = self.any();
        let (length, clock) = (self.dice.roll(4_000), self.dice.roll(3) as i64 - 1);
        let until = self.now + length;
        let roll = self.dice.roll(4_000);
        let host = self.hosts.get_mut(&victim).expect("a host");
        match roll {
            0..=1 => {
                host.slow_until = until;
                self.count("slow disk");
            }
            2..=3 => {
                host.failing = true;
                self.count("failed sync");
            }
            4..=5 => {
                host.full_until = until;
                self.count("full disk");
            }
            6..=7 => {
                // seen when the process starts next: while it runs, it goes by the monotonic clock
                host.wall_off = clock * 3_600_000;
                self.count("clock jump");
            }
            68..=71 => {
                host.low_until = until;
                host.low = [Disk::Low, Disk::Full, Disk::Spent, Disk::Exhausted][roll as usize - 68];
                self.count("nearly full disk");
            }
            72..=91 => {
                self.copy_volume(victim);
                self.count("copy of a volume");
            }
            92..=131 if self.is_well() && self.has_old_copy(victim) => self.roll_back(victim),
            8..=27 if self.is_well() => self.lose_volume(victim),
            28..=47 if self.is_well() => self.flip_bit(victim),
            48..=67 if self.is_well() => self.drain(victim),
            _ => {}
        }
    }

    /// What one broker says it has taken reaches nobody, until all is healed; what it refuses does.
    pub fn lose_acks_of(&mut self, broker: BrokerId) {
        self.weather.no_acks_of = Some(broker);
    }

    /// A broker's disk has little room left, until all is healed.
    pub fn lack_room(&mut self, at: BrokerId) {
        let host = self.hosts.get_mut(&at).expect("a host");
        (host.low_until, host.low) = (u64::MAX, Disk::Low);
    }

    /// A broker's process stands still for so long, as where it gets no processor.
    pub fn pause(&mut self, at: BrokerId, ms: u64) {
        self.hosts.get_mut(&at).expect("a host").paused_until = self.now + ms;
    }

    /// What one broker says does not reach another.
    pub fn cut(&mut self, from: BrokerId, to: BrokerId) {
        self.cut.insert((from, to));
    }

    /// Heals network, disks and processes.
    pub fn heal(&mut self) {
        self.cut.clear();
        self.weather = Weather::default();
        self.lull_until = 0;
        let now = self.now;
        for host in self.hosts.values_mut() {
            host.restart_at = host.restart_at.min(now);
            host.paused_until = host.paused_until.min(now);
            host.full_until = 0;
            host.low_until = 0;
            host.slow_until = 0;
            host.failing = false;
        }
    }

    /// A connection breaks, whether or not the other end lives.
    pub fn lose_contact(&mut self, at: BrokerId, with: BrokerId) {
        if let Some(node) = self.node(at) {
            node.lost_contact(with);
        }
    }

    /// Ends a broker's process; its unsynced writes may be gone.
    pub fn crash(&mut self, id: BrokerId) {
        let down_ms = 50 + self.dice.roll(3_000);
        let now = self.now;
        let keep = self.dice.roll(4) as usize;
        let host = self.hosts.get_mut(&id).expect("a host");
        let Some(node) = host.node.take() else { return };
        if node.groups().any(|g| g.is_leader() && g.is_asleep()) {
            *self.faults.entry("crash of a leader whose group sleeps").or_default() += 1;
        }
        // some of what was written, but not synced, may have reached the disk all the same, in order
        host.store.crash(if keep == 3 { usize::MAX } else { keep });
        host.disk.clear();
        host.reads.clear();
        host.failing = false;
        host.restart_at = now + down_ms;
        let lost: Vec<Asked> =
            self.tickets.extract_if(.., |_, (broker, _)| *broker == id).map(|(_, (_, asked))| asked).collect();
        lost.into_iter().for_each(|asked| self.unanswered(asked));
        // a process that ends breaks its connections; a machine that loses power says nothing
        let others: Vec<BrokerId> = self.hosts.keys().copied().filter(|b| *b != id).collect();
        for other in others {
            if self.dice.chance(50) {
                self.lose_contact(other, id);
            }
        }
    }

    /// A reader at a broker finds old data of the first partition damaged.
    pub fn find_damage(&mut self, at: BrokerId) {
        let group = self.group();
        self.injured = true;
        let damage = StoreError::Damaged { group, index: 2, what: "a bit has flipped".to_owned() };
        if let Some(node) = self.node(at) {
            node.found_damage(group, damage);
        }
        self.pump(at);
    }

    /// The metadata's replica on a broker was found damaged, and can be read again by the time that is decided.
    pub fn renew_metadata(&mut self, at: BrokerId) {
        let Some(controller) = self.controller() else { return };
        let meta = self.hosts[&controller].node.as_ref().expect("it leads").meta().clone();
        let assignment = meta.assignment(META_GROUP).expect("there is one");
        let replica = assignment.replica_on(at).map(|r| ReplicaId(r.id));
        let Some(change) = replica.and_then(|r| renew(META_GROUP, assignment, r)) else { return };
        self.injured = true;
        self.propose(controller, Asked::Administer, change);
    }

    /// An entry on a broker's disk, of those it reads when it starts, cannot be read any more.
    fn flip_bit(&mut self, at: BrokerId) {
        self.crash(at);
        let store = self.hosts[&at].store.clone();
        let newest = |g: &StoredGroup| g.checkpoints.last().map_or(g.last_index, |c| c.index);
        let groups: Vec<(GroupId, u64, u64)> =
            store.load().expect("memory").iter().map(|g| (g.group, newest(g), g.last_index)).collect();
        let Some((group, newest, last)) = self.dice.pick(&groups).filter(|(_, newest, last)| last > newest) else {
            return;
        };
        self.count("flipped bit");
        self.injured = true;
        store.damage(group, newest + 1 + self.dice.roll(last - newest));
    }

    /// A broker's disk is gone; one with an empty disk comes under its name.
    pub fn lose_volume(&mut self, at: BrokerId) {
        self.count("lost volume");
        self.injured = true;
        self.crash(at);
        let again_at = self.now + self.dice.roll(3_000);
        let host = self.hosts.get_mut(&at).expect("a host");
        host.store = Arc::default();
        let name = std::mem::replace(&mut host.name, GONE.to_owned());
        self.joining.push(Joining { name, asked: 0, again_at, old: Some(at) });
    }

    /// Copies a broker's disk, as it is synced.
    pub fn copy_volume(&mut self, at: BrokerId) {
        let host = self.hosts.get_mut(&at).expect("a host");
        host.copy = Some((self.now, Arc::new(host.store.copy())));
    }

    /// Whether there is a copy of a broker's disk that it has written marks after. What is lost with a younger one cannot be noticed.
    fn has_old_copy(&self, at: BrokerId) -> bool {
        let host = &self.hosts[&at];
        let own = |store: &MemStore| {
            let known = store.incarnations().expect("memory");
            known.into_iter().find(|(b, _)| *b == at).map(|(_, incarnation)| incarnation)
        };
        host.copy.as_ref().is_some_and(|(made, copy)| made + OLD_COPY_MS <= self.now && own(copy) < own(&host.store))
    }

    /// The older copy of a broker's disk comes back.
    pub fn roll_back(&mut self, at: BrokerId) {
        self.count("rolled-back volume");
        self.injured = true;
        self.crash(at);
        let host = self.hosts.get_mut(&at).expect("a host");
        host.store = host.copy.take().expect("it was copied").1;
    }

    /// A broker's data is set aside, because it was rolled back, and it comes again with an empty disk.
    pub(crate) fn set_aside(&mut self, at: BrokerId) {
        *self.faults.entry("data set aside").or_default() += 1;
        self.injured = true;
        self.crash(at);
        let again_at = self.now;
        let host = self.hosts.get_mut(&at).expect("a host");
        host.store = Arc::default();
        let name = std::mem::replace(&mut host.name, GONE.to_owned());
        self.joining.push(Joining { name, asked: 0, again_at, old: Some(at) });
    }

    /// A broker's process ends and does not start again before so many ms.
    pub fn stop(&mut self, at: BrokerId, ms: u64) {
        self.crash(at);
        self.hosts.get_mut(&at).expect("a host").restart_at = self.now.saturating_add(ms);
    }

    /// A broker that was stopped starts.
    pub fn start_again(&mut self, at: BrokerId) {
        self.hosts.get_mut(&at).expect("a host").restart_at = self.now;
    }

    /// A broker's wall clock is off by so much from its next start on.
    pub fn set_clock(&mut self, at: BrokerId, off_ms: i64) {
        self.hosts.get_mut(&at).expect("a host").wall_off = off_ms;
    }

    /// A broker's disk takes up to half a second for each round, until all is healed.
    pub fn slow_disk(&mut self, at: BrokerId) {
        self.hosts.get_mut(&at).expect("a host").slow_until = u64::MAX;
    }

    /// An administrator drains a broker, where others can take its place.
    pub fn drain(&mut self, broker: BrokerId) {
        let spare = self.brokers().len() > 3;
        let Some(controller) = self.controller().filter(|_| spare && self.draining.is_none()) else { return };
        self.count("drained broker");
        self.draining = Some(broker);
        self.propose_drain(controller, broker);
    }

    fn propose_drain(&mut self, controller: BrokerId, broker: BrokerId) {
        let phase = SetPhase { broker: broker.0, phase: Phase::Draining.into(), removed: false };
        self.propose(controller, Asked::Drain, Kind::SetPhase(phase));
    }

    /// The administrator leaves a broker that a topic needs where it is.
    pub(crate) fn drain_refused(&mut self) {
        self.count("refused drain");
        self.draining = None;
    }

    pub(crate) fn propose(&mut self, at: BrokerId, asked: Asked, kind: Kind) {
        let ticket = self.ticket(at, asked);
        if let Some(node) = self.node(at) {
            node.command(ticket, &kind.into());
        }
        self.pump(at);
    }

    /// Brings in brokers for those that went, and takes out those that are drained.
    pub(crate) fn administer(&mut self) {
        if self.joining.is_empty() && self.draining.is_none() && !self.injured {
            return;
        }
        let Some(controller) = self.controller() else { return };
        let meta = self.hosts[&controller].node.as_ref().expect("it leads").meta().clone();
        if let Some(drained) = self.draining {
            let phase = meta.broker(drained).map(|b| b.phase());
            if phase.is_none() && self.hosts.contains_key(&drained) {
                // its process ends, and another broker comes
                self.crash(drained);
                self.hosts.remove(&drained);
                self.draining = None;
                let name = format!("b-{}-after", drained.0);
                self.joining.push(Joining { name, asked: 0, again_at: self.now, old: None });
            } else if phase == Some(Phase::Active) && self.dice.chance(1) {
                self.propose_drain(controller, drained); // nobody heard of it
            }
        }
        for at in 0..self.joining.len() {
            if self.joining[at].again_at > self.now {
                continue;
            }
            self.joining[at].again_at = self.now + 1_000;
            self.joining[at].asked += 1;
            let Joining { name, old, asked, .. } = &self.joining[at];
            let broker = Broker { name: name.clone(), ..Default::default() };
            let known = meta.broker_named(name);
            let silent = old
                .is_none_or(|old| self.hosts[&controller].node.as_ref().is_some_and(|n| n.is_silent(old, SILENCE_MS)));
            let asked = Asked::Join(name.clone(), *asked);
            match known {
                None => self.propose(controller, Asked::Administer, Kind::Expect(broker)),
                Some(_) if silent => self.propose(controller, asked, Kind::Register(broker)),
                Some(_) => {}
            }
        }
        if self.injured && self.joining.is_empty() && self.is_whole() {
            self.injured = false;
        }
    }

    /// A broker was given an id, and starts.
    pub(crate) fn joined(&mut self, name: &str, asked: u32, id: BrokerId) {
        let Some(at) = self.joining.iter().position(|j| j.name == name && j.asked == asked) else { return };
        let joining = self.joining.remove(at);
        if let Some(old) = joining.old {
            self.hosts.remove(&old);
        }
        let drift = self.dice.roll(41) as i64 - 20;
        self.hosts.insert(id, Host::new(name.to_owned(), drift));
    }

    /// Nothing is lost, drained or joining, and every replica has everything.
    fn is_well(&self) -> bool {
        !self.injured && self.joining.is_empty() && self.draining.is_none() && self.is_whole()
    }
}
