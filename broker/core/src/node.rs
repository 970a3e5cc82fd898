//! A broker's core: all its groups behind one set of inputs. Each call takes an input; [`Node::drain`] then gives the
//! effects: at most one round to write, messages that may leave now, replies. Messages that must wait for the disk
//! are kept here until [`Node::written`] or [`Node::synced`] names their round.

use crate::batch::BatchHeader;
use crate::entry::{Context, Control, Kind, entry_bytes};
use crate::group::{Group, Machine, Part};
use crate::ids::{BrokerId, GroupId, META_GROUP, ReplicaId, Ticket};
use crate::meta::command::{Answer, Command, MetaError};
use crate::meta::state::{Assignment, MetaState};
use crate::producer::SequenceError;
use crate::rate::Bucket;
use crate::storage::{Checkpoint, Store, StoreError, StoredGroup, WriteOp};
use bytes::Bytes;
use raft::eraftpb::{Entry, Message, MessageType};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use thiserror::Error;

/// Named bounds of a node.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Length of a tick, ms.
    pub tick_ms: u64,
    /// Ticks between heartbeats.
    pub heartbeat_ticks: usize,
    /// Shortest election timeout, ticks; the longest is twice that.
    pub election_ticks: usize,
    /// Entries sent to a peer in one message, bytes.
    pub message_bytes_max: u64,
    /// Proposed and not yet committed, bytes for each group.
    pub uncommitted_bytes_max: u64,
    /// Log between two checkpoints, bytes.
    pub checkpoint_bytes: u64,
    /// Checkpoints kept of each group.
    pub checkpoints_max: usize,
    /// Recent entries of all groups kept in memory, bytes.
    pub tail_bytes_max: u64,
    /// Rounds handed to the disk and not yet confirmed.
    pub rounds_max: usize,
    /// A message whose term is further than this beyond ours is refused.
    pub term_jump_max: u64,
    /// Old entries read for followers that are behind, bytes each second over all groups, beside up to as much as is published:
    /// live traffic keeps the rest.
    pub catch_up_bytes_per_second: u64,
    /// How long a leader leads before it hands over to the preferred one, ms.
    pub balance_after_ms: u64,
    /// Ticks for which nothing is asked of a group before it sleeps.
    pub idle_ticks: u32,
    /// Ticks without a word from a broker after which groups that sleep because of it wake.
    pub silence_ticks: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            tick_ms: 50,
            heartbeat_ticks: 2,
            election_ticks: 8,
            message_bytes_max: 1 << 20,
            uncommitted_bytes_max: 64 << 20,
            checkpoint_bytes: 16 << 20,
            checkpoints_max: 64,
            tail_bytes_max: 96 << 20,
            rounds_max: 32,
            term_jump_max: 1 << 20,
            catch_up_bytes_per_second: 96 << 20,
            balance_after_ms: 5_000,
            idle_ticks: 5,
            silence_ticks: 6,
        }
    }
}

/// Time as the shell sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Monotonic, ms; all timeouts go by it.
    pub mono_ms: u64,
    /// For append times and retention, ms since the epoch: the wall clock at start, moved on monotonically.
    pub log_ms: u64,
}

/// Raft's message between two replicas of a group.
#[derive(Clone, Debug, PartialEq)]
pub struct Envelope {
    /// The group.
    pub group: GroupId,
    /// From and to are replica ids.
    pub message: Message,
}

/// Who leads a group, as its leader says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaderInfo {
    /// The group.
    pub group: GroupId,
    /// In which term.
    pub term: u64,
    /// The assignment epoch whose membership is reached, where it is.
    pub settled_epoch: Option<u64>,
    /// Replica that has lost its data, as the leader or its broker found; 0 for none.
    pub damaged: ReplicaId,
}

/// A group's leader says that it sends no heartbeats until there is something to do: all its replicas have all of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asleep {
    /// The group.
    pub group: GroupId,
    /// The leader's term.
    pub term: u64,
    /// Index of the log's last entry, which is committed.
    pub index: u64,
}

/// What brokers tell each other.
#[derive(Clone, Debug, PartialEq)]
pub enum PeerMessage {
    /// That the sender runs: what leaders of sleeping groups have instead of heartbeats.
    Alive,
    /// Groups the sender leads that sleep from now on.
    Asleep(Vec<Asleep>),
    /// Raft.
    Raft(Envelope),
    /// Groups the sender leads (or, with `damaged`, of which it holds a damaged replica).
    Leaders(Vec<LeaderInfo>),
    /// Whether the sender's disk has no room for what is published.
    DiskFull(bool),
}

/// Why a request was not carried out. It changed nothing, except after [`Refusal::LeadershipLost`], when it may have.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// Another replica leads.
    #[error("this broker does not lead the partition")]
    NotLeader,
    /// Leadership went while the request was under way: it may or may not take effect.
    #[error("leadership moved while the request was under way; whether it took effect is unknown")]
    LeadershipLost,
    /// Too much is under way.
    #[error("too much is waiting to be replicated")]
    Overloaded,
    /// No majority of the partition's replicas has room on its disk.
    #[error("the disks of a majority of the partition's replicas are full; make room, or give them larger volumes")]
    DiskFull,
    /// No such group here.
    #[error("this broker holds no replica of the partition")]
    UnknownGroup,
    /// Idempotence.
    #[error("{0}")]
    Sequence(SequenceError),
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// A batch is committed.
    Published { base_offset: u64, append_time_ms: u64 },
    /// A control record is committed.
    Done,
    /// A metadata command was applied.
    Meta(Result<Answer, MetaError>),
    /// Not carried out.
    Refused(Refusal),
}

/// Work for the disk: one atomic write, then a sync where it says so.
#[derive(Debug)]
pub struct Round {
    /// Counts rounds.
    pub id: u64,
    /// What to write.
    pub ops: Vec<WriteOp>,
    /// Whether a sync must follow before [`Node::synced`].
    pub sync: bool,
    /// Whether anything waits for the write alone, and so for [`Node::written`].
    pub in_memory: bool,
}

/// Old entries to read from the store, for followers that are behind. Answered by [`Node::fetched`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Of this group
    pub group: GroupId,
    /// from this index on
    pub low: u64,
    /// up to and not including this one,
    pub high: u64,
    /// at most so many bytes, but at least one entry.
    pub bytes_max: u64,
}

/// What the node wants done.
#[derive(Default)]
pub struct Effects {
    /// To write.
    pub round: Option<Round>,
    /// To send now.
    pub messages: Vec<(BrokerId, Envelope)>,
    /// To read, beside everything else.
    pub fetches: Vec<Fetch>,
    /// To tell all other brokers.
    pub announce: Vec<LeaderInfo>,
    /// To tell them: whether this broker's disk is full.
    pub disk_full: Option<bool>,
    /// To tell them: that this broker runs.
    pub alive: bool,
    /// To tell brokers with replicas of groups led here: that these sleep. After the messages.
    pub asleep: Vec<(BrokerId, Asleep)>,
    /// To answer.
    pub replies: Vec<(Ticket, Reply)>,
    /// Groups whose high watermark moved.
    pub advanced: Vec<(GroupId, u64)>,
    /// Groups whose leader, as known here, changed, or serves from now on ([`Group::serves`]).
    pub leaders: Vec<GroupId>,
    /// The metadata changed.
    pub meta: Option<Arc<MetaState>>,
    /// Groups opened or removed.
    pub opened: Vec<GroupId>,
    /// Damage found, for people.
    pub damage: Vec<StoreError>,
}

/// Mixes 64 bits (SplitMix64's finisher, <https://prng.di.unimi.it/splitmix64.c>).
pub fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Whether a message brings what a full disk does not take. A checkpoint is small, and what it replaces goes.
fn takes_room(message: &Message) -> bool {
    let batch = |e: &Entry| Context::of(e).is_some_and(|c| c.kind == Kind::Batch);
    message.msg_type == MessageType::MsgAppend && message.entries.iter().any(batch)
}

/// How a disk stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Disk {
    /// There is room.
    #[default]
    Room,
    /// Little is left.
    Low,
    /// What is left is needed for what is small.
    Full,
}

/// When a broker was heard of last.
#[derive(Clone, Copy)]
pub(crate) struct Heard {
    /// by the clock
    pub(crate) ms: u64,
    /// by this node's ticks: what it was itself stopped for does not count
    pub(crate) tick: u64,
}

/// A broker's core.
pub struct Node {
    pub(crate) broker: BrokerId,
    store: Arc<dyn Store>,
    pub(crate) limits: Limits,
    seed: u64,
    pub(crate) now: Now,
    pub(crate) last_tick_ms: u64,
    pub(crate) ticks: u64,
    pub(crate) groups: BTreeMap<GroupId, Group>,
    /// replicas that were found damaged and take part in nothing
    pub(crate) damaged: BTreeMap<GroupId, ReplicaId>,
    /// the newest replica of each group that was removed here: it is never made again
    tombstones: BTreeMap<GroupId, ReplicaId>,
    pub(crate) meta: Arc<MetaState>,
    pub(crate) dirty: BTreeSet<GroupId>,
    /// operations that belong to no Raft round: creations, checkpoints, removals
    pub(crate) ops: Vec<WriteOp>,
    next_round: u64,
    rounds: VecDeque<(u64, Vec<Part>)>,
    /// when the oldest of them was handed out
    round_since_ms: u64,
    /// of each group led here with something not committed: how far it was, and since when it is no further
    progress: BTreeMap<GroupId, (u64, u64)>,
    /// leaders of groups as other brokers announced them
    announced: HashMap<GroupId, (u64, BrokerId)>,
    pub(crate) heard: BTreeMap<BrokerId, Heard>,
    /// groups that time passes for; the others sleep
    pub(crate) awake: BTreeSet<GroupId>,
    /// of groups that sleep, bytes in memory, as of the last look
    pub(crate) asleep_bytes: u64,
    /// metadata, leadership or disks changed: groups that sleep are looked at, too
    pub(crate) tend_all: bool,
    /// the metadata for which there was nothing to plan
    pub(crate) planned: Option<Arc<MetaState>>,
    /// settled epochs other leaders have reported and the metadata group has not recorded
    pub(crate) settled: BTreeMap<GroupId, u64>,
    pub(crate) to_renew: BTreeMap<GroupId, ReplicaId>,
    pub(crate) resigning: bool,
    /// this broker's disk has little room left
    pub(crate) low: bool,
    /// and none for batches
    full: bool,
    /// others that said so of theirs
    full_others: BTreeSet<BrokerId>,
    /// damage that was told and led to nothing
    told: BTreeSet<(GroupId, String)>,
    /// reads that wait for their turn, and the bytes that may be read now
    fetches: VecDeque<Fetch>,
    fetch_budget: Bucket,
    pub(crate) out: Effects,
}

impl Node {
    /// Opens what the store holds. A damaged group does not stop the others.
    pub fn open(
        broker: BrokerId,
        store: Arc<dyn Store>,
        limits: Limits,
        seed: u64,
        now: Now,
    ) -> Result<Self, StoreError> {
        let rate = limits.catch_up_bytes_per_second;
        // what gathers between two ticks, also where one is late
        let fetch_budget = Bucket::new(rate, rate * 2 * limits.tick_ms / 1_000, now.mono_ms);
        let mut node = Self {
            broker,
            store: store.clone(),
            limits,
            seed,
            now,
            last_tick_ms: now.mono_ms,
            ticks: 0,
            groups: BTreeMap::new(),
            damaged: BTreeMap::new(),
            tombstones: BTreeMap::new(),
            meta: Arc::default(),
            dirty: BTreeSet::new(),
            ops: Vec::new(),
            next_round: 1,
            rounds: VecDeque::new(),
            round_since_ms: 0,
            progress: BTreeMap::new(),
            announced: HashMap::new(),
            heard: BTreeMap::new(),
            awake: BTreeSet::new(),
            asleep_bytes: 0,
            tend_all: false,
            planned: None,
            settled: BTreeMap::new(),
            to_renew: BTreeMap::new(),
            resigning: false,
            low: false,
            full: false,
            full_others: BTreeSet::new(),
            told: BTreeSet::new(),
            fetches: VecDeque::new(),
            fetch_budget,
            out: Effects::default(),
        };
        for stored in store.load()? {
            if stored.destroyed {
                node.tombstones.insert(stored.group, stored.replica);
            } else {
                node.open_group(&stored);
            }
        }
        if let Some(Machine::Meta(meta)) = node.groups.get(&META_GROUP).map(Group::machine) {
            node.set_meta(meta.clone());
        }
        Ok(node)
    }

    /// Makes the replica of the metadata group, on an empty disk: with the state a cluster is formed with,
    /// or without, as a broker that joins and waits for its first checkpoint.
    pub fn create_meta(&mut self, replica: ReplicaId, formed: Option<&MetaState>) {
        let checkpoint = formed.map(|state| {
            let assignment = state.assignment(META_GROUP).expect("formed with one");
            initial_checkpoint(assignment, prost::Message::encode_to_vec(state).into())
        });
        self.create_group(META_GROUP, replica, checkpoint);
        if let Some(state) = formed {
            self.set_meta(Arc::new(state.clone()));
        }
    }

    fn create_group(&mut self, group: GroupId, replica: ReplicaId, checkpoint: Option<Checkpoint>) {
        self.ops.push(WriteOp::Create { group, replica, checkpoint: checkpoint.clone() });
        let last_index = checkpoint.as_ref().map_or(0, |c| c.index);
        let checkpoints = checkpoint.into_iter().collect();
        let stored = StoredGroup {
            group,
            replica,
            quarantined: false,
            destroyed: false,
            hard: Default::default(),
            checkpoints,
            last_index,
        };
        self.open_group(&stored);
    }

    fn open_group(&mut self, stored: &StoredGroup) {
        let opened = if stored.quarantined {
            let what = "quarantined before".to_owned();
            Err(StoreError::Damaged { group: stored.group, index: 0, what })
        } else {
            Group::open(stored, self.store.clone(), &self.limits)
        };
        match opened {
            Ok(mut group) => {
                if group.conf().voters == [stored.replica.0] {
                    group.campaign(); // alone, it need not wait for anyone
                }
                self.groups.insert(stored.group, group);
                self.dirty.insert(stored.group);
                self.out.opened.push(stored.group);
            }
            Err(error) => self.quarantine(stored.group, stored.replica, error),
        }
    }

    /// A reader found a group's data damaged. This replica is taken out, and rebuilt, only where it leads and a majority has all of
    /// the log without it; else it goes on serving what can be read: it may hold the last copy of what was acknowledged.
    pub fn found_damage(&mut self, id: GroupId, error: StoreError) {
        let Some(group) = self.groups.get(&id) else { return };
        let replica = group.replica();
        if matches!(error, StoreError::Damaged { index, .. } if index <= group.log().oldest().map_or(0, |c| c.index)) {
            return; // retention took it while it was read
        }
        if group.can_be_spared() {
            self.quarantine(id, replica, error);
        } else if self.told.insert((id, error.to_string())) {
            self.out.damage.push(error);
        }
    }

    /// Takes a replica out of everything: it answers nothing, votes for nobody, and waits to be replaced.
    fn quarantine(&mut self, group: GroupId, replica: ReplicaId, error: StoreError) {
        self.awake.remove(&group);
        if let Some(mut gone) = self.groups.remove(&group) {
            gone.fail_waiters(&mut self.out);
        }
        self.damaged.insert(group, replica);
        self.ops.push(WriteOp::Quarantine { group, replica });
        self.out.damage.push(error);
        self.out.opened.push(group);
    }

    /// Bytes of log kept of all groups, as retention counts them.
    pub fn kept_bytes(&self) -> u64 {
        self.groups.values().map(Group::kept_bytes).sum()
    }

    /// This broker.
    pub fn broker(&self) -> BrokerId {
        self.broker
    }

    /// The metadata as applied here.
    pub fn meta(&self) -> &Arc<MetaState> {
        &self.meta
    }

    /// A group held here.
    pub fn group(&self, id: GroupId) -> Option<&Group> {
        self.groups.get(&id)
    }

    /// All groups held here.
    pub fn groups(&self) -> impl Iterator<Item = &Group> {
        self.groups.values()
    }

    /// Replicas held here that were found damaged.
    pub fn damaged(&self) -> &BTreeMap<GroupId, ReplicaId> {
        &self.damaged
    }

    /// The leader of a group, as known here: from its own replica, else as announced. With the term.
    pub fn leader_of(&self, group: GroupId) -> Option<(u64, BrokerId)> {
        let own = self.groups.get(&group).and_then(|g| {
            let leader = g.leader()?;
            let broker = if leader == g.replica() { Some(self.broker) } else { g.brokers.get(&leader.0).copied() };
            broker.map(|b| (g.term(), b))
        });
        let announced = self.announced.get(&group).copied();
        own.into_iter().chain(announced).max()
    }

    /// When a broker was last heard of, monotonic ms.
    pub fn heard_ms(&self, broker: BrokerId) -> Option<u64> {
        self.heard.get(&broker).map(|h| h.ms)
    }

    /// Says what time it is, without letting any pass: for what comes in before the next [`Self::tick`].
    pub fn set_now(&mut self, now: Now) {
        self.now = now;
    }

    /// Lets time pass. A node that was stopped for long does not make up for it all at once.
    pub fn tick(&mut self, now: Now) {
        self.now = now;
        let late = now.mono_ms.saturating_sub(self.last_tick_ms) / self.limits.tick_ms;
        if late == 0 {
            return;
        }
        self.last_tick_ms = if late > 4 { now.mono_ms } else { self.last_tick_ms + late * self.limits.tick_ms };
        for _ in 0..late.min(4) {
            self.ticks += 1;
            let salt = self.salt();
            for id in &self.awake {
                let Some(group) = self.groups.get_mut(id) else { continue };
                group.tick(salt);
                if group.has_work() {
                    self.dirty.insert(*id);
                }
            }
            self.sleep_as_told();
            self.wake_for_silence();
            // with each, also when several are made up for: every so many ticks means each of those
            self.run_duties();
        }
    }

    fn salt(&self) -> u64 {
        mix(self.seed ^ (self.ticks >> 4))
    }

    /// Takes what a peer said. `from` is the broker as the connection proved it.
    pub fn peer(&mut self, from: BrokerId, message: PeerMessage) {
        self.heard.insert(from, Heard { ms: self.now.mono_ms, tick: self.ticks });
        match message {
            PeerMessage::Alive => {}
            PeerMessage::Asleep(list) => list.iter().for_each(|a| self.leader_asleep(from, a)),
            PeerMessage::Raft(envelope) => self.raft_message(from, envelope),
            PeerMessage::Leaders(list) => list.iter().for_each(|info| self.leader_info(from, info)),
            PeerMessage::DiskFull(true) => self.tend_all |= self.full_others.insert(from),
            PeerMessage::DiskFull(false) => self.tend_all |= self.full_others.remove(&from),
        }
    }

    /// How this broker's disk stands. While it is low, no batch is accepted from publishers and leadership goes to where there is
    /// room; as a follower it takes what its leader has accepted before, until it is full. What is small goes on: votes,
    /// acknowledgements, metadata. So retention can make room.
    pub fn set_disk(&mut self, disk: Disk) {
        let low = disk != Disk::Room;
        self.full = disk == Disk::Full;
        if self.low != low {
            self.low = low;
            self.out.disk_full = Some(low);
            self.tend_all = true;
            self.tend_leaders();
        }
    }

    pub(crate) fn has_room(&self, broker: BrokerId) -> bool {
        if broker == self.broker { !self.low } else { !self.full_others.contains(&broker) }
    }

    /// Why a group led here takes no more batches now.
    fn no_room(&self, id: GroupId) -> Option<Refusal> {
        if !self.low && self.full_others.is_empty() {
            return None;
        }
        let assignment = self.meta.assignment(id)?;
        let voters = &self.groups.get(&id)?.conf().voters;
        let roomy = voters.iter().filter(|v| assignment.broker_of(ReplicaId(**v)).is_none_or(|b| self.has_room(b)));
        if roomy.count() <= voters.len() / 2 {
            return Some(Refusal::DiskFull);
        }
        // leadership is on its way to where there is room
        self.low.then_some(Refusal::NotLeader)
    }

    fn raft_message(&mut self, from: BrokerId, envelope: Envelope) {
        let Envelope { group: id, message } = envelope;
        let assigned = self.meta.assignment(id).and_then(|a| a.broker_of(ReplicaId(message.from)));
        let salt = self.salt();
        if id == META_GROUP && !self.groups.contains_key(&id) && self.damaged.get(&id).is_none_or(|d| d.0 < message.to)
        {
            // a broker that joined, or whose replica was damaged, learns its replica's id from the leader that calls it
            if self.damaged.contains_key(&id) {
                self.destroy(id);
            }
            self.create_meta(ReplicaId(message.to), None);
        }
        let renewed = self.damaged.get(&id).is_some_and(|damaged| {
            let mine = self.meta.assignment(id).and_then(|a| a.replica_on(self.broker));
            mine.is_some_and(|mine| mine.id == message.to && mine.id > damaged.0)
        });
        if id != META_GROUP && renewed {
            // the group's leader calls the replica that is to follow the damaged one: it has settled that with a majority
            self.destroy(id);
            self.create_group(id, ReplicaId(message.to), None);
        }
        let Some(group) = self.groups.get_mut(&id) else { return };
        if message.to != group.replica().0 || assigned.is_some_and(|b| b != from) {
            return;
        }
        // a replica nobody assigned may only speak to one that knows nothing yet, or about the metadata group
        if assigned.is_none() && id != META_GROUP && self.meta.assignment(id).is_some() {
            return;
        }
        if self.full && id != META_GROUP && takes_room(&message) {
            return;
        }
        group.brokers.insert(message.from, from);
        let replica = group.replica();
        match group.step(message, salt) {
            Ok(()) => {
                self.dirty.insert(id);
            }
            Err(error) => self.quarantine(id, replica, error),
        }
    }

    /// The connection from a peer broke: its process may have ended.
    pub fn lost_contact(&mut self, with: BrokerId) {
        self.full_others.remove(&with); // it says so again
        self.wake_with(with, 0);
        self.groups.values_mut().for_each(|g| g.lost_contact(with));
    }

    fn leader_info(&mut self, from: BrokerId, info: &LeaderInfo) {
        if info.damaged != ReplicaId(0) {
            self.to_renew.insert(info.group, info.damaged);
            self.wake(info.group);
            return;
        }
        let now = self.ticks;
        if self.groups.get_mut(&info.group).is_some_and(|g| !g.still_led(from, info.term, now)) {
            self.wake(info.group);
        }
        let known = self.announced.entry(info.group).or_insert((0, from));
        if info.term >= known.0 && *known != (info.term, from) {
            *known = (info.term, from);
            self.out.leaders.push(info.group);
        }
        if let Some(epoch) = info.settled_epoch {
            self.settled.insert(info.group, epoch);
        }
    }

    /// Publishes a batch whose header was checked; the reply comes with the ticket.
    pub fn publish(&mut self, ticket: Ticket, id: GroupId, data: Bytes, header: &BatchHeader) {
        let log_ms = self.now.log_ms;
        let no_room = self.no_room(id);
        let (bytes, mut appended) = (data.len() as u64, false);
        self.with_group(ticket, id, |g| {
            let before = g.last_index();
            let taken = g.publish(ticket, data, header, log_ms, no_room);
            appended = g.last_index() > before;
            taken
        });
        if appended {
            self.fetch_budget.give(bytes); // one that is behind is not to fall further behind
        }
    }

    /// Appends a control record to a partition's log.
    pub fn control(&mut self, ticket: Ticket, id: GroupId, control: &Control) {
        let log_ms = self.now.log_ms;
        self.with_group(ticket, id, |g| g.control(ticket, control, log_ms));
    }

    /// Proposes a metadata command, where this broker leads the metadata group.
    pub fn command(&mut self, ticket: Ticket, command: &Command) {
        let log_ms = self.now.log_ms;
        self.with_group(ticket, META_GROUP, |g| g.command(ticket, command, log_ms));
    }

    fn with_group(&mut self, ticket: Ticket, id: GroupId, run: impl FnOnce(&mut Group) -> Result<(), Refusal>) {
        let result = match self.groups.get_mut(&id) {
            Some(group) => run(group),
            None => Err(Refusal::UnknownGroup),
        };
        match result {
            Ok(()) => {
                self.dirty.insert(id);
            }
            Err(refusal) => {
                self.keep_awake(id);
                self.out.replies.push((ticket, Reply::Refused(refusal)));
            }
        }
    }

    /// A round up to `round` is written, not yet synced.
    pub fn written(&mut self, round: u64) {
        let mut ready = Vec::new();
        for (_, parts) in self.rounds.iter_mut().take_while(|(id, _)| *id <= round) {
            let waits = |p: &mut Part| !p.sync;
            ready.extend(parts.extract_if(.., waits));
        }
        self.confirm(ready);
    }

    /// All rounds up to `round` are on disk.
    pub fn synced(&mut self, round: u64) {
        let mut ready = Vec::new();
        while self.rounds.front().is_some_and(|(id, _)| *id <= round) {
            ready.extend(self.rounds.pop_front().expect("just seen").1);
            self.round_since_ms = self.now.mono_ms;
        }
        self.confirm(ready);
    }

    fn confirm(&mut self, parts: Vec<Part>) {
        for part in parts {
            let id = part.group;
            if let Some(group) = self.groups.get_mut(&id) {
                group.persisted(part, &mut self.out);
                self.dirty.insert(id);
            }
        }
    }

    /// What a [`Fetch`] read, or why it could not.
    pub fn fetched(&mut self, fetch: Fetch, read: Result<Vec<raft::eraftpb::Entry>, StoreError>) {
        // it was taken for a full one, and may have been less, or one large entry
        self.fetch_budget.take(read.iter().flatten().map(entry_bytes).sum());
        self.fetch_budget.give(fetch.bytes_max);
        let Some(group) = self.groups.get_mut(&fetch.group) else { return };
        match group.fetched(fetch.low, read) {
            Ok(()) => {
                self.dirty.insert(fetch.group);
            }
            Err(error) if error.is_damage() => self.found_damage(fetch.group, error),
            // it may pass: the follower asks again
            Err(error) => {
                if self.told.insert((fetch.group, error.to_string())) {
                    self.out.damage.push(error);
                }
            }
        }
    }

    /// Hands out reads for followers that are behind, as far as their budget goes.
    fn drain_fetches(&mut self) {
        while self.fetch_budget.available(self.now.mono_ms) > 0
            && let Some(fetch) = self.fetches.pop_front()
        {
            self.fetch_budget.take(fetch.bytes_max);
            self.out.fetches.push(fetch);
        }
    }

    /// Looks at what gets no further, for [`Self::stalled`].
    pub(crate) fn watch_progress(&mut self) {
        let now = self.now.mono_ms;
        let mut seen = BTreeMap::new();
        let awake = self.awake.iter().filter_map(|id| self.groups.get(id));
        for group in awake.filter(|g| g.is_leader() && g.unapplied() > 0) {
            let before = self.progress.get(&group.id()).filter(|(applied, _)| *applied == group.applied());
            seen.insert(group.id(), (group.applied(), before.map_or(now, |(_, since)| *since)));
        }
        self.progress = seen;
    }

    /// For how long nothing has come of what this broker tries, ms: the disk has not answered, or a group led here has committed
    /// nothing of what it was given. 0 where all is well.
    pub fn stalled(&self) -> u64 {
        let disk = (!self.rounds.is_empty()).then(|| self.now.mono_ms - self.round_since_ms);
        let groups = self.progress.values().map(|(_, since)| self.now.mono_ms - since);
        disk.into_iter().chain(groups).max().unwrap_or(0)
    }

    /// Everything to do now. While too many rounds are under way, what needs the disk waits.
    pub fn drain(&mut self) -> Effects {
        let may = self.rounds.len() < self.limits.rounds_max;
        if may {
            self.drain_groups();
        }
        self.drain_fetches();
        let mut out = std::mem::take(&mut self.out);
        if !may {
            // heartbeats of the same tick have not left: behind the word that their group sleeps they would wake its followers
            self.out.asleep = std::mem::take(&mut out.asleep);
        }
        out
    }

    fn drain_groups(&mut self) {
        let mut parts = Vec::new();
        // applying metadata may open groups, whose work is then done in the same call
        while let Some(id) = self.dirty.pop_first() {
            let Some(group) = self.groups.get_mut(&id) else { continue };
            let replica = group.replica();
            if let Err(error) = group.drain(&mut self.ops, &mut parts, &mut self.out) {
                self.quarantine(id, replica, error);
            } else {
                self.fetches.extend(group.take_fetches());
                self.keep_awake(id);
            }
            if let Some(meta) = self.out.meta.clone()
                && !Arc::ptr_eq(&meta, &self.meta)
            {
                self.set_meta(meta);
            }
        }
        let ops = std::mem::take(&mut self.ops);
        if ops.is_empty() && parts.is_empty() {
            return;
        }
        let structural = |op: &WriteOp| {
            !matches!(
                op,
                WriteOp::Append { .. }
                    | WriteOp::SetHardState { .. }
                    | WriteOp::PutCheckpoint { .. }
                    | WriteOp::DropCheckpoint { .. }
            )
        };
        let sync = parts.iter().any(|p| p.sync) || ops.iter().any(structural);
        let id = self.next_round;
        self.next_round += 1;
        if self.rounds.is_empty() {
            self.round_since_ms = self.now.mono_ms;
        }
        let in_memory = parts.iter().any(|p| !p.sync);
        self.rounds.push_back((id, parts));
        self.out.round = Some(Round { id, ops, sync, in_memory });
    }

    /// Takes over new metadata: opens, renews and removes replicas.
    fn set_meta(&mut self, meta: Arc<MetaState>) {
        self.meta = meta.clone();
        self.out.meta = Some(meta.clone());
        self.tend_all = true;
        let memory: BTreeSet<u64> = meta.topics.values().filter(|t| t.spec.quorum_memory).map(|t| t.id).collect();
        self.settled.retain(|g, _| meta.assignment(*g).is_some_and(|a| !a.is_settled()));
        self.to_renew.retain(|g, r| meta.assignment(*g).is_some_and(|a| a.replicas.iter().any(|x| x.id == r.0)));
        for (id, assignment) in &meta.groups {
            let id = GroupId(*id);
            if let Some(mine) = assignment.replica_on(self.broker) {
                self.ensure_replica(id, ReplicaId(mine.id), assignment);
            }
            if let Some(group) = self.groups.get_mut(&id) {
                for replica in assignment.replicas.iter().chain(&assignment.leaving) {
                    group.brokers.insert(replica.id, BrokerId(replica.broker));
                }
                group.memory = memory.contains(&assignment.topic);
            }
        }
        let held: Vec<GroupId> = self.groups.keys().chain(self.damaged.keys()).copied().collect();
        for id in held {
            // only a recorded decision removes data: the topic was deleted, or the group settled without this broker
            // and metadata older than the replica (it is replayed at every start) decides nothing about it
            let left = meta.assignment(id).is_some_and(|a| a.is_settled() && a.replica_on(self.broker).is_none());
            let known = self.held_replica(id).is_some_and(|r| r.0 <= meta.last_id);
            if id != META_GROUP && known && (meta.deleted_groups.contains_key(&id.0) || left) {
                self.destroy(id);
            }
        }
    }

    fn ensure_replica(&mut self, id: GroupId, replica: ReplicaId, assignment: &Assignment) {
        // replica ids only grow: an assignment of an older one than was held here is old metadata, replayed
        match self.held_replica(id).max(self.tombstones.get(&id).copied()) {
            Some(newest) if newest >= replica => return,
            // damaged as it is, it may be all there is until the group's leader calls its successor
            _ if self.damaged.contains_key(&id) => return,
            None if id == META_GROUP => return, // made when the broker formed or joined the cluster
            _ => self.destroy(id),
        }
        let first = assignment.epoch == 0;
        self.create_group(id, replica, first.then(|| initial_checkpoint(assignment, Bytes::new())));
        let preferred = assignment.replicas.first().is_some_and(|r| r.id == replica.0);
        if let Some(group) = self.groups.get_mut(&id).filter(|_| first && preferred) {
            group.campaign();
        }
    }

    fn held_replica(&self, id: GroupId) -> Option<ReplicaId> {
        self.groups.get(&id).map(Group::replica).or_else(|| self.damaged.get(&id).copied())
    }

    fn destroy(&mut self, id: GroupId) {
        let Some(replica) = self.held_replica(id) else { return };
        self.tombstones.insert(id, replica);
        self.awake.remove(&id);
        if let Some(mut group) = self.groups.remove(&id) {
            group.fail_waiters(&mut self.out);
            group.log().tail().reset(0, 0);
        }
        self.damaged.remove(&id);
        self.ops.push(WriteOp::Destroy { group: id, replica });
        self.out.opened.push(id);
    }
}

/// The first checkpoint of a group: index 1, so that a replica that has nothing always needs it and learns the membership.
fn initial_checkpoint(assignment: &Assignment, state: Bytes) -> Checkpoint {
    let ids = |learner: bool| assignment.replicas.iter().filter(|r| r.learner == learner).map(|r| r.id).collect();
    Checkpoint { index: 1, term: 1, voters: ids(false), learners: ids(true), state, ..Default::default() }
}
