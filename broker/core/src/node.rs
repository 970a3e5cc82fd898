//! A broker's core: all its groups behind one set of inputs. Each call takes an input; [`Node::drain`] then gives the
//! effects: at most one round to write, messages that may leave now, replies. Messages that must wait for the disk
//! are kept here until [`Node::written`] or [`Node::synced`] names their round.

use crate::batch::BatchHeader;
use crate::clocks::{self, Clocks};
use crate::entry::{Context, Control, Kind, entry_bytes};
use crate::group::{Group, Machine, Part};
use crate::ids::{BrokerId, GroupId, META_GROUP, ReplicaId, Ticket};
use crate::incarnation::{Answer as IncarnationAnswer, Guard, Incarnation, Query, Standing};
use crate::meta::command::{Answer, Command, MetaError};
use crate::meta::index::Metadata;
use crate::meta::state::{Assignment, Broker, MetaState, Phase};
use crate::pace::Pace;
use crate::producer::SequenceError;
use crate::rate::Bucket;
use crate::storage::{Checkpoint, Store, StoreError, StoredGroup, WriteOp};
use crate::syncs::Syncs;
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
    /// Ticks without a word from a broker after which what it led counts as without a leader.
    pub gone_ticks: u64,
    /// A broker whose clock differs from the median of all by more than this neither leads nor decides about retention, ms.
    pub clock_offset_ms_max: u64,
    /// Publishers are slowed only for a replica that lacks at least this much, bytes.
    pub behind_bytes_min: u64,
    /// Old entries read at one time for a follower that is behind, bytes.
    pub fetch_bytes: u64,
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
            gone_ticks: 30,
            clock_offset_ms_max: 10_000,
            behind_bytes_min: crate::pace::BEHIND_BYTES_MIN,
            fetch_bytes: 4 << 20,
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

/// What a broker reports of itself with each heartbeat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pulse {
    /// Incarnation of its data, on its disk; the default while it does not take part.
    pub incarnation: Incarnation,
    /// Its log time, ms since the epoch.
    pub log_ms: u64,
    /// Median of its last syncs, ms; 0 where it synced too little to tell.
    pub sync_ms: u32,
    /// Its syncs are an order of magnitude slower than the others': it gives leadership away.
    pub slow: bool,
}

/// What brokers tell each other.
#[derive(Clone, Debug, PartialEq)]
pub enum PeerMessage {
    /// That the sender runs: what leaders of sleeping groups have instead of heartbeats.
    Alive,
    /// The same, with how it does.
    Pulse(Pulse),
    /// Incarnation of the sender's data; the first message of a stream.
    Incarnation(Incarnation),
    /// The sender does not take part yet; see [`crate::incarnation`].
    IncarnationQuery(Query),
    /// The answer.
    IncarnationAnswer(IncarnationAnswer),
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

/// What an operator must hear of.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum Alarm {
    /// The data of a broker is older than what others know of it.
    #[error(
        "the volume of broker {broker} is rolled back: its data has incarnation {data}, {newest} is known; the broker neither \
         votes nor appends with it"
    )]
    RolledBack { broker: BrokerId, data: Incarnation, newest: Incarnation },
    /// A replica has committed records that the leader of its group lacks, or has others in their place.
    #[error(
        "group {group}: the replica of broker {follower} has entries up to index {committed} committed that the leader on broker \
         {leader} does not have: acknowledged records are missing there"
    )]
    CommittedLogLost { group: GroupId, leader: BrokerId, follower: BrokerId, committed: u64 },
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
    /// To tell them: that this broker runs, and how it does.
    pub pulse: Option<Pulse>,
    /// To tell single brokers.
    pub direct: Vec<(BrokerId, PeerMessage)>,
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
    /// Damage and failed reads, for the log and the metrics.
    pub damage: Vec<Damage>,
    /// What operators must hear of, each once.
    pub alarms: Vec<Alarm>,
    /// Whether this broker takes part changed.
    pub standing: Option<Standing>,
    /// The brokers whose volumes are known to be rolled back changed.
    pub rolled_back: Option<BTreeSet<BrokerId>>,
    /// This broker's volume was rolled back to before this incarnation, and the others have everything without it: its data is set
    /// aside, and it joins as a new broker.
    pub set_aside: Option<Incarnation>,
    /// What may be published to a group in a second changed, bytes; `None` for no limit.
    pub paces: Vec<(GroupId, Option<u64>)>,
}

/// Damaged data or a failed read, and its consequence for the replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    /// The replica takes no part any more: the partition's other replicas rebuild it.
    Quarantined(StoreError),
    /// The replica cannot be opened and no other replica has its data, or reading it failed for a reason that may pass. It takes
    /// no part, nothing is written about it, and the next start opens it again.
    NotOpened(StoreError),
    /// The replica cannot be spared: it stays in service and serves what can be read.
    KeptInService(StoreError),
    /// A read failed for a reason that may pass; it is retried.
    ReadFailed(StoreError),
}

impl Damage {
    /// The error behind it.
    pub fn error(&self) -> &StoreError {
        match self {
            Self::Quarantined(error)
            | Self::NotOpened(error)
            | Self::KeptInService(error)
            | Self::ReadFailed(error) => error,
        }
    }
}

/// Messages kept of groups that the metadata here does not name yet.
const EARLY_MAX: usize = 256;

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

/// Whether an entry begins a term, changes members or cuts a log.
fn makes_room(entry: &Entry) -> bool {
    match Context::of(entry) {
        Some(context) if context.kind == Kind::Control => {
            <Control as prost::Message>::decode(&entry.data[..]).is_ok_and(|c| c.cursors.is_empty())
        }
        context => context.is_none_or(|c| c.kind != Kind::Batch),
    }
}

/// About what an entry takes on the disk beside its own bytes: keys, its place by offset, what is written with it.
const ENTRY_BYTES_MORE: u64 = 256;

/// Bytes that entries take on the disk.
pub(crate) fn disk_bytes<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> u64 {
    entries.into_iter().map(|e| entry_bytes(e) + ENTRY_BYTES_MORE).sum()
}

/// Bytes that a write brings into a log.
fn appended_bytes(op: &WriteOp) -> u64 {
    match op {
        WriteOp::Append { entries, .. } => disk_bytes(entries),
        _ => 0,
    }
}

/// A round that was handed to the disk.
struct UnderWay {
    id: u64,
    parts: Vec<Part>,
    /// of entries in it
    bytes: u64,
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
    /// And that has used it up, but for metadata and for what makes room: nothing else begins here.
    Spent,
    /// Nothing else is taken from leaders either. A leader stops before its followers do: what makes room comes behind what it has
    /// taken on.
    Exhausted,
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
    /// replicas that take part in nothing: found damaged, or not opened
    pub(crate) damaged: BTreeMap<GroupId, ReplicaId>,
    /// those of them that no other replica can replace, or that could not be read this time: nobody is asked to replace them
    pub(crate) not_opened: BTreeMap<GroupId, StoreError>,
    /// the newest replica of each group that was removed here: it is never made again
    tombstones: BTreeMap<GroupId, ReplicaId>,
    pub(crate) meta: Arc<Metadata>,
    pub(crate) dirty: BTreeSet<GroupId>,
    /// operations that belong to no Raft round: creations, checkpoints, removals
    pub(crate) ops: Vec<WriteOp>,
    next_round: u64,
    rounds: VecDeque<UnderWay>,
    /// when the oldest of them was handed out
    round_since_ms: u64,
    /// of each group led here with something not committed: how far it was, and since when it is no further
    progress: BTreeMap<GroupId, (u64, u64)>,
    /// leaders of groups as other brokers announced them: term, broker, and the tick in which it last did
    pub(crate) announced: HashMap<GroupId, (u64, BrokerId, u64)>,
    pub(crate) heard: BTreeMap<BrokerId, Heard>,
    /// groups that time passes for; the others sleep
    pub(crate) awake: BTreeSet<GroupId>,
    /// of groups that sleep, bytes in memory, as of the last look
    pub(crate) asleep_bytes: u64,
    /// metadata, leadership or disks changed: groups that sleep are looked at, too
    pub(crate) tend_all: bool,
    /// the metadata for which there was nothing to plan
    pub(crate) planned: Option<Arc<Metadata>>,
    /// settled epochs other leaders have reported and the metadata group has not recorded
    pub(crate) settled: BTreeMap<GroupId, u64>,
    pub(crate) to_renew: BTreeMap<GroupId, ReplicaId>,
    pub(crate) resigning: bool,
    /// bytes of batches that the disk may take before it is looked at again
    room: u64,
    /// this broker's disk has little room left
    pub(crate) low: bool,
    /// and none for batches,
    full: bool,
    /// nor for acknowledgements
    spent: bool,
    /// also not those that leaders have taken on
    exhausted: bool,
    /// others that said so of theirs
    full_others: BTreeSet<BrokerId>,
    /// damage that was told and led to nothing
    told: BTreeSet<(GroupId, String)>,
    pub(crate) guard: Guard,
    pub(crate) clocks: Clocks,
    /// by how much the median of all clocks is ahead of this one, ms
    pub(crate) skew_ms: i64,
    /// whether a majority of the cluster's brokers, this one among them, have the same time
    pub(crate) clock_confirmed: bool,
    pub(crate) syncs: Syncs,
    /// of groups led here that have a replica far behind
    pub(crate) paces: BTreeMap<GroupId, Pace>,
    /// messages of groups newer than the metadata here: they are taken once it names them
    early: VecDeque<(BrokerId, Envelope)>,
    /// groups of which it was said that their leader lacks what is committed
    contradicted: BTreeSet<GroupId>,
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
            not_opened: BTreeMap::new(),
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
            room: u64::MAX,
            low: false,
            full: false,
            spent: false,
            exhausted: false,
            full_others: BTreeSet::new(),
            told: BTreeSet::new(),
            guard: Guard::default(),
            clocks: Clocks::default(),
            skew_ms: 0,
            clock_confirmed: false,
            syncs: Syncs::default(),
            paces: BTreeMap::new(),
            early: VecDeque::new(),
            contradicted: BTreeSet::new(),
            fetches: VecDeque::new(),
            fetch_budget,
            out: Effects::default(),
        };
        let stored = store.load()?;
        node.guard = Guard::open(broker, &store.incarnations()?, stored.is_empty(), seed);
        for stored in stored {
            if stored.destroyed {
                node.tombstones.insert(stored.group, stored.replica);
            } else {
                node.open_group(&stored);
            }
        }
        if let Some(Machine::Meta(meta)) = node.groups.get(&META_GROUP).map(Group::machine) {
            node.set_meta(meta.clone());
        }
        node.begin_guard();
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
                if group.conf().voters == [stored.replica.0] && self.takes_part() {
                    group.campaign(); // alone, it need not wait for anyone
                }
                self.groups.insert(stored.group, group);
                self.dirty.insert(stored.group);
                self.out.opened.push(stored.group);
            }
            Err(error) => self.keep_closed(stored, error),
        }
    }

    /// A replica could not be opened. Nothing is written about it: what the next start can read takes part again. The others are
    /// asked to replace it only where the data is damaged and there are others.
    fn keep_closed(&mut self, stored: &StoredGroup, error: StoreError) {
        let newest = stored.checkpoints.last();
        // a replica that does not know its own id cannot ask for a successor of that id
        let is_only = stored.replica == ReplicaId(0)
            || newest.is_some_and(|c| c.voters == [stored.replica.0] && c.voters_outgoing.is_empty());
        self.damaged.insert(stored.group, stored.replica);
        self.out.opened.push(stored.group);
        self.out.damage.push(if error.is_damage() && !is_only {
            Damage::Quarantined(error)
        } else {
            self.not_opened.insert(stored.group, error.clone());
            Damage::NotOpened(error)
        });
    }

    /// A reader found a group's data damaged. This replica is taken out, and rebuilt, only where it leads and a majority has all of
    /// the log without it; else it goes on serving what can be read: it may hold the last copy of what was acknowledged.
    pub fn found_damage(&mut self, id: GroupId, error: StoreError) {
        let Some(group) = self.groups.get(&id) else { return };
        let replica = group.replica();
        if matches!(error, StoreError::Damaged { index, .. } if index <= group.log().oldest().map_or(0, |c| c.index)) {
            return; // retention took it while it was read
        }
        if matches!(error, StoreError::Damaged { .. }) && group.can_be_spared() {
            self.quarantine(id, replica, error);
        } else {
            self.report(id, Damage::KeptInService(error));
        }
    }

    /// A read of the core's own failed.
    pub(crate) fn read_failed(&mut self, id: GroupId, error: StoreError) {
        if error.is_damage() {
            self.found_damage(id, error);
        } else {
            self.report(id, Damage::ReadFailed(error));
        }
    }

    /// Reports what leaves the replica in service; the same only once.
    pub(crate) fn report(&mut self, group: GroupId, damage: Damage) {
        if self.told.insert((group, damage.error().to_string())) {
            self.out.damage.push(damage);
        }
    }

    /// Takes a replica out of everything: it answers nothing, votes for nobody, and waits to be replaced. That is written, since it
    /// forgot what it once acknowledged, or a majority is complete without it.
    fn quarantine(&mut self, group: GroupId, replica: ReplicaId, error: StoreError) {
        self.awake.remove(&group);
        if let Some(mut gone) = self.groups.remove(&group) {
            gone.fail_waiters(&mut self.out);
        }
        self.damaged.insert(group, replica);
        self.ops.push(WriteOp::Quarantine { group, replica });
        self.out.damage.push(Damage::Quarantined(error));
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
    pub fn meta(&self) -> &Arc<Metadata> {
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

    /// Replicas held here that take part in nothing: found damaged, or not opened.
    pub fn damaged(&self) -> &BTreeMap<GroupId, ReplicaId> {
        &self.damaged
    }

    /// Why a replica was not opened, though nobody is asked to replace it.
    pub fn not_opened(&self, id: GroupId) -> Option<&StoreError> {
        self.not_opened.get(&id)
    }

    /// The leader of a group, as known here: from its own replica, else as announced, where that broker runs. With the term.
    pub fn leader_of(&self, group: GroupId) -> Option<(u64, BrokerId)> {
        let here = self.groups.get(&group);
        let own = here.and_then(|g| {
            let leader = g.leader()?;
            let broker = if leader == g.replica() { Some(self.broker) } else { g.brokers.get(&leader.0).copied() };
            broker.map(|b| (g.term(), b))
        });
        // a replica that has gone on to a newer term, or was left by the leader of this one, knows better
        let newest = here.map_or(0, |g| g.term());
        let announced = self.announced.get(&group).map(|(term, broker, _)| (*term, *broker));
        own.into_iter().chain(announced.filter(|(term, _)| *term >= newest)).max()
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
            let (takes_part, holds_back) = (self.takes_part(), self.holds_back());
            for id in self.awake.iter().filter(|_| takes_part) {
                let Some(group) = self.groups.get_mut(id) else { continue };
                group.tick(salt, holds_back);
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
            PeerMessage::Pulse(pulse) => self.take_pulse(from, &pulse),
            PeerMessage::Incarnation(incarnation) => self.take_incarnation(from, incarnation),
            PeerMessage::IncarnationQuery(query) => self.answer_query(from, query),
            PeerMessage::IncarnationAnswer(answer) => self.take_answer(from, answer),
            PeerMessage::Asleep(_) | PeerMessage::Raft(_) if !self.takes_part() => {}
            PeerMessage::Asleep(list) => list.iter().for_each(|a| self.leader_asleep(from, a)),
            PeerMessage::Raft(envelope) => self.raft_message(from, envelope),
            PeerMessage::Leaders(list) => list.iter().for_each(|info| self.leader_info(from, info)),
            PeerMessage::DiskFull(true) => self.tend_all |= self.full_others.insert(from),
            PeerMessage::DiskFull(false) => self.tend_all |= self.full_others.remove(&from),
        }
    }

    fn take_pulse(&mut self, from: BrokerId, pulse: &Pulse) {
        self.take_incarnation(from, pulse.incarnation);
        self.compare_clocks(from, pulse.log_ms);
        self.syncs.hear(from, pulse.sync_ms, pulse.slow, self.now.mono_ms);
    }

    fn take_incarnation(&mut self, from: BrokerId, incarnation: Incarnation) {
        if incarnation != Incarnation::default() && self.learn_incarnation(from, incarnation) {
            self.clocks.forget(from);
            self.forget_leaderships(|broker, _| broker == from); // its earlier process has ended
        }
    }

    pub(crate) fn compare_clocks(&mut self, with: BrokerId, log_ms: u64) {
        self.clocks.hear(with, log_ms, self.now.log_ms);
        self.find_skew();
    }

    /// Forgets announcements, by broker and by the tick in which they were last heard.
    pub(crate) fn forget_leaderships(&mut self, gone: impl Fn(BrokerId, u64) -> bool) {
        let out = &mut self.out.leaders;
        self.announced.retain(|group, (_, broker, tick)| {
            let forget = gone(*broker, *tick);
            out.extend(forget.then_some(*group));
            !forget
        });
    }

    /// How this broker's disk stands. While it is low, no batch is accepted from publishers and leadership goes to where there is
    /// room; as a follower it takes what its leader has accepted before, until it is full. What is small goes on: votes,
    /// acknowledgements, metadata. So retention can make room. Acknowledgements wait where they have used up what was left.
    ///
    /// `room` is how many bytes of batches may be written until the disk is looked at again: with more it counts as low, or as full,
    /// at once, however fast they come. What was taken on and is not written yet is among them.
    pub fn set_disk(&mut self, disk: Disk, room: u64) {
        self.room = room.saturating_sub(self.unwritten_bytes());
        self.disk_stands(disk);
    }

    /// Bytes of entries that were taken on and are not on the disk yet.
    fn unwritten_bytes(&self) -> u64 {
        let waiting = self.dirty.iter().filter_map(|id| self.groups.get(id)).map(Group::undrained_bytes);
        self.rounds.iter().map(|r| r.bytes).chain(waiting).sum()
    }

    fn disk_stands(&mut self, disk: Disk) {
        let low = disk != Disk::Room;
        self.full = matches!(disk, Disk::Full | Disk::Spent | Disk::Exhausted);
        self.spent = matches!(disk, Disk::Spent | Disk::Exhausted);
        self.exhausted = disk == Disk::Exhausted;
        if self.low != low {
            self.low = low;
            self.out.disk_full = Some(low);
            self.tend_all = true;
            self.tend_leaders();
        }
    }

    /// Whether this broker leads only where no other can: it is about to stop, its disk is slow, or its clock is wrong.
    pub(crate) fn holds_back(&self) -> bool {
        self.syncs.is_slow() || self.is_skewed()
    }

    /// Whether leadership is not to go to a broker.
    pub(crate) fn is_avoided(&self, broker: BrokerId) -> bool {
        if broker == self.broker {
            return self.low || self.holds_back();
        }
        self.full_others.contains(&broker) || self.syncs.is_slow_at(broker) || self.is_skewed_at(broker)
    }

    /// Whether this broker's clock is far from the median of all.
    pub fn is_skewed(&self) -> bool {
        self.skew_ms.unsigned_abs() > self.limits.clock_offset_ms_max
    }

    fn is_skewed_at(&self, broker: BrokerId) -> bool {
        let offset = self.clocks.offset_ms(broker).map_or(0, |o| o.saturating_sub(self.skew_ms));
        offset.unsigned_abs() > self.limits.clock_offset_ms_max
    }

    /// Compares this broker's clock with those that were heard of lately. Where the two in the middle differ, the skew known before stands:
    /// of two brokers that are left, the one that was wrong stays wrong.
    pub(crate) fn find_skew(&mut self) {
        let heard: Vec<i64> = self.clock_offsets().into_iter().map(|(_, offset)| offset).collect();
        let within = self.limits.clock_offset_ms_max;
        if let Some(median) = clocks::median_ms(heard.iter().copied(), within) {
            self.skew_ms = median;
        }
        let active = |b: &&Broker| matches!(b.phase(), Phase::Active | Phase::Draining);
        let members = self.meta.brokers.values().filter(active).count();
        self.clock_confirmed = 2 * clocks::agreeing(&heard, within) > members;
    }

    /// The time that is written into logs: this broker's, unless it is known to be wrong.
    pub(crate) fn stamp_ms(&self) -> u64 {
        if self.is_skewed() { clocks::moved_ms(self.now.log_ms, self.skew_ms) } else { self.now.log_ms }
    }

    /// Clocks of other brokers beside this one's, ms; of those that were heard of lately.
    pub fn clock_offsets(&self) -> Vec<(BrokerId, i64)> {
        self.clocks.offsets().filter(|(b, _)| self.was_heard(*b)).collect()
    }

    /// Whether this broker's syncs are an order of magnitude slower than the others'.
    pub fn is_slow(&self) -> bool {
        self.syncs.is_slow()
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

    /// Whether the disk has room for what a partition's leader sends.
    fn takes_on(&mut self, message: &Message) -> bool {
        if takes_room(message) {
            let bytes = disk_bytes(&message.entries);
            if self.room < bytes && !self.full {
                self.disk_stands(Disk::Full);
            }
            if self.full {
                return false;
            }
            self.room -= bytes;
        }
        !self.exhausted || message.entries.iter().all(makes_room)
    }

    fn raft_message(&mut self, from: BrokerId, envelope: Envelope) {
        let Envelope { group: id, message } = envelope;
        let assigned = self.meta.assignment(id).and_then(|a| a.broker_of(ReplicaId(message.from)));
        let salt = self.salt();
        let held = self.held_replica(id);
        let renewed = held.is_some_and(|held| {
            let mine = self.meta.assignment(id).and_then(|a| a.replica_on(self.broker));
            mine.is_some_and(|mine| mine.id == message.to && mine.id > held.0)
        });
        // a broker that joined, or whose replica was damaged, learns its replica's id from the leader that calls it
        let is_new = !self.groups.contains_key(&id) && held.is_none_or(|d| d.0 < message.to);
        if id == META_GROUP && (is_new || renewed) {
            self.destroy(id);
            self.create_meta(ReplicaId(message.to), None);
        } else if renewed && held != Some(ReplicaId(0)) {
            // the group's leader calls the replica that is to follow this one: it has settled that with a majority
            self.destroy(id);
            self.create_group(id, ReplicaId(message.to), None);
        }
        if id.0 > self.meta.last_id {
            // made a moment ago: the metadata that names it is on its way, often in the same frame
            let small = message.entries.is_empty() && message.msg_type != MessageType::MsgSnapshot;
            if !small {
                return;
            }
            if self.early.len() == EARLY_MAX {
                self.early.pop_front();
            }
            self.early.push_back((from, Envelope { group: id, message }));
            return;
        }
        let Some(group) = self.groups.get(&id) else { return };
        if message.to != group.replica().0 || assigned.is_some_and(|b| b != from) {
            return;
        }
        // a replica nobody assigned may only speak to one that knows nothing yet, or about the metadata group
        if assigned.is_none() && id != META_GROUP && self.meta.assignment(id).is_some() {
            return;
        }
        if id != META_GROUP && !self.takes_on(&message) {
            return;
        }
        let Some(group) = self.groups.get_mut(&id) else { return };
        group.brokers.insert(message.from, from);
        let replica = group.replica();
        if let Some(committed) = group.committed_beyond(&message) {
            let leads = group.is_leader();
            let (leader, follower) = if leads { (self.broker, from) } else { (from, self.broker) };
            if self.contradicted.insert(id) {
                self.out.alarms.push(Alarm::CommittedLogLost { group: id, leader, follower, committed });
            }
            return;
        }
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
        let tick = self.ticks;
        let known = self.announced.entry(info.group).or_insert((0, from, tick));
        if info.term >= known.0 {
            let news = (known.0, known.1) != (info.term, from);
            *known = (info.term, from, tick);
            self.out.leaders.extend(news.then_some(info.group));
        }
        if let Some(epoch) = info.settled_epoch {
            self.settled.insert(info.group, epoch);
        }
    }

    /// Publishes a batch whose header was checked; the reply comes with the ticket.
    pub fn publish(&mut self, ticket: Ticket, id: GroupId, data: Bytes, header: &BatchHeader) {
        let log_ms = self.stamp_ms();
        let (bytes, mut appended) = (data.len() as u64, false);
        let room = self.room.checked_sub(bytes + ENTRY_BYTES_MORE);
        if room.is_none() && !self.low {
            self.disk_stands(Disk::Low);
        }
        let no_room = self.no_room(id);
        self.with_group(ticket, id, |g| {
            let before = g.last_index();
            let taken = g.publish(ticket, data, header, log_ms, no_room);
            appended = g.last_index() > before;
            taken
        });
        if appended {
            self.room = room.unwrap_or(0);
            self.fetch_budget.give(bytes); // one that is behind is not to fall further behind
        }
    }

    /// Appends a control record to a partition's log.
    pub fn control(&mut self, ticket: Ticket, id: GroupId, control: &Control) {
        let log_ms = self.stamp_ms();
        if self.spent {
            return self.with_group(ticket, id, |_| Err(Refusal::Overloaded));
        }
        self.with_group(ticket, id, |g| g.control(ticket, control, log_ms));
    }

    /// Proposes a metadata command, where this broker leads the metadata group.
    pub fn command(&mut self, ticket: Ticket, command: &Command) {
        let log_ms = self.stamp_ms();
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
        for UnderWay { parts, .. } in self.rounds.iter_mut().take_while(|r| r.id <= round) {
            let waits = |p: &mut Part| !p.sync;
            ready.extend(parts.extract_if(.., waits));
        }
        self.confirm(ready);
    }

    /// All rounds up to `round` are on disk.
    pub fn synced(&mut self, round: u64) {
        let mut ready = Vec::new();
        while self.rounds.front().is_some_and(|r| r.id <= round) {
            ready.extend(self.rounds.pop_front().expect("just seen").parts);
            self.round_since_ms = self.now.mono_ms;
        }
        self.syncs.ended(round, self.now.mono_ms);
        self.confirm(ready);
        self.incarnation_synced(round);
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
            // where it may pass, the follower asks again
            Err(error) => self.read_failed(fetch.group, error),
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
                let failed = group.log().take_failed();
                self.keep_awake(id);
                failed.into_iter().for_each(|error| self.read_failed(id, error));
            }
            if let Some(meta) = self.out.meta.clone()
                && !Arc::ptr_eq(&meta, self.meta.state())
            {
                self.set_meta(meta);
            }
        }
        let mut ops = std::mem::take(&mut self.ops);
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
        self.mark_round(id, sync, &mut ops);
        if sync {
            self.syncs.begun(id, self.now.mono_ms);
        }
        let bytes = ops.iter().map(appended_bytes).sum();
        self.rounds.push_back(UnderWay { id, parts, bytes });
        self.out.round = Some(Round { id, ops, sync, in_memory });
    }

    /// Takes over new metadata: opens, renews and removes replicas.
    fn set_meta(&mut self, meta: Arc<MetaState>) {
        self.meta = Arc::new(self.meta.after(meta.clone()));
        self.forget_incarnations(&meta);
        self.out.meta = Some(meta.clone());
        self.tend_all = true;
        let specs: HashMap<u64, (bool, u64)> =
            meta.topics.values().map(|t| (t.id, (t.spec.quorum_memory, t.spec.retention_bytes))).collect();
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
                (group.memory, group.retention_bytes) = specs.get(&assignment.topic).copied().unwrap_or_default();
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
        for (from, envelope) in std::mem::take(&mut self.early) {
            self.raft_message(from, envelope); // what is still too early is kept again
        }
    }

    fn ensure_replica(&mut self, id: GroupId, replica: ReplicaId, assignment: &Assignment) {
        // replica ids only grow: an assignment of an older one than was held here is old metadata, replayed
        match self.held_replica(id).max(self.tombstones.get(&id).copied()) {
            Some(newest) if newest >= replica => return,
            // damaged or not, it may be all there is until the group's leader calls its successor
            _ if self.held_replica(id).is_some() => return,
            None if id == META_GROUP => return, // made when the broker formed or joined the cluster
            _ => {}
        }
        let first = assignment.epoch == 0;
        self.create_group(id, replica, first.then(|| initial_checkpoint(assignment, Bytes::new())));
        let preferred = assignment.replicas.first().is_some_and(|r| r.id == replica.0);
        let may = first && preferred && self.takes_part() && !self.holds_back();
        if let Some(group) = self.groups.get_mut(&id).filter(|_| may) {
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
        self.not_opened.remove(&id);
        self.ops.push(WriteOp::Destroy { group: id, replica });
        self.out.opened.push(id);
    }
}

/// The first checkpoint of a group: index 1, so that a replica that has nothing always needs it and learns the membership.
fn initial_checkpoint(assignment: &Assignment, state: Bytes) -> Checkpoint {
    let ids = |learner: bool| assignment.replicas.iter().filter(|r| r.learner == learner).map(|r| r.id).collect();
    Checkpoint { index: 1, term: 1, voters: ids(false), learners: ids(true), state, ..Default::default() }
}
