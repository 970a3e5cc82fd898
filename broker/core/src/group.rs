//! One replica of one group: Raft's state machine, the log it drives, and the applied state.
//! Nothing here does IO: [`Group::drain`] turns what Raft wants into operations of a round and messages,
//! and says which messages may only leave once the round is on disk.

use crate::batch::BatchHeader;
use crate::entry::{Context, Control, Cut, Kind};
use crate::ids::{BrokerId, GroupId, META_GROUP, ReplicaId, Ticket};
use crate::log::GroupLog;
use crate::meta::command::Command;
use crate::meta::state::MetaState;
use crate::node::{Effects, Envelope, Fetch, LeaderInfo, Limits, Refusal, Reply, disk_bytes};
use crate::partition::{LogSums, PartitionState};
use crate::producer::{ProducerTable, Verdict};
use crate::sleep::Sleep;
use crate::storage::{Checkpoint, HardState, Store, StoreError, StoredGroup, WriteOp};
use bytes::Bytes;
use prost::Message as _;
use raft::eraftpb::{
    ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState, Entry, EntryType, Message,
    MessageType,
};
use raft::{Config, Progress, ProgressState, RawNode, SnapshotStatus, StateRole, Storage};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The replicated state of a group.
pub enum Machine {
    /// The metadata group's.
    Meta(Arc<MetaState>),
    /// A partition's.
    Partition(PartitionState),
}

impl Machine {
    fn decode(group: GroupId, checkpoint: Option<&Checkpoint>) -> Result<Self, StoreError> {
        let (state, next) = checkpoint.map_or((Bytes::new(), 0), |c| (c.state.clone(), c.next_offset));
        let index = checkpoint.map_or(0, |c| c.index);
        let damaged = |e: prost::DecodeError| StoreError::Damaged { group, index, what: format!("checkpoint: {e}") };
        Ok(if group == META_GROUP {
            Self::Meta(Arc::new(MetaState::decode(state).map_err(damaged)?))
        } else {
            Self::Partition(PartitionState::decode(&state, next).map_err(damaged)?)
        })
    }

    fn encode(&self) -> Bytes {
        match self {
            Self::Meta(state) => state.encode_to_vec().into(),
            Self::Partition(state) => state.encode(),
        }
    }

    fn next_offset(&self) -> u64 {
        match self {
            Self::Meta(_) => 0,
            Self::Partition(state) => state.next_offset,
        }
    }

    fn start_offset(&self) -> u64 {
        match self {
            Self::Meta(_) => 0,
            Self::Partition(state) => state.cut.offset,
        }
    }
}

/// What a leader knows of the end of its log, committed or not.
struct Lead {
    term: u64,
    next_offset: u64,
    producers: ProducerTable,
    /// the log's end when this leadership began, with its own first entry: all that was ever committed stands below
    begun: u64,
    /// index of the newest cut that was proposed
    cut: u64,
    /// append time of the log's end, ms since the epoch: none is earlier than the one before
    append_time_ms: u64,
    /// that it is applied was told
    serves: bool,
    /// `begun`, or the log's end when cursors were last proposed: before it is applied, cursors are not judged
    cursors_from: u64,
    /// index of the first entry proposed after the membership was applied that is to be reported; 0 for none
    marker: u64,
    /// (end offset, index) of what was proposed in this leadership and is not applied yet
    in_flight: std::collections::VecDeque<(u64, u64)>,
}

impl Lead {
    /// Of an entry that comes next.
    fn context(&self, kind: Kind, count: u32, now_ms: u64) -> Context {
        Context { kind, base_offset: self.next_offset, count, append_time_ms: now_ms.max(self.append_time_ms) }
    }
}

enum Waiter {
    Publish { ticket: Ticket, base_offset: u64, append_time_ms: u64 },
    Done { ticket: Ticket },
}

/// What must happen once (part of) a round is on disk.
pub(crate) struct Part {
    pub(crate) group: GroupId,
    pub(crate) number: u64,
    /// waits for the sync, not only for the write
    pub(crate) sync: bool,
    pub(crate) messages: Vec<Message>,
}

/// One replica of one group.
pub struct Group {
    id: GroupId,
    replica: ReplicaId,
    pub(crate) raft: RawNode<GroupLog>,
    machine: Machine,
    sums: LogSums,
    applied: u64,
    conf: ConfState,
    /// index from which on it is the membership
    conf_index: u64,
    lead: Option<Lead>,
    waiting: BTreeMap<u64, Vec<Waiter>>,
    /// brokers of replicas, as assigned or as their messages came
    pub(crate) brokers: BTreeMap<u64, BrokerId>,
    /// parts of rounds not yet confirmed, and those of them that need a sync
    outstanding: u32,
    outstanding_sync: u32,
    /// (term, vote) of the last hard state handed to the store
    vote_written: (u64, u64),
    /// an installed checkpoint that Raft may count as applied once it is on disk
    installed: Option<u64>,
    /// the leader last told to the node
    known_leader: Option<ReplicaId>,
    /// acks wait for a majority's memory only
    pub(crate) memory: bool,
    /// index of the newest cut that was carried out
    cut_seen: u64,
    /// as its topic says; 0 for no limit
    pub(crate) retention_bytes: u64,
    limits: Limits,
    /// when this replica became leader, by the node's clock
    pub(crate) leader_since_ms: u64,
    /// the leader's broker is known to have ended: no need to wait out the election timeout
    hurry: bool,
    /// ticks for which an election was put off
    held_back: u32,
    /// ticks since followers were sent a checkpoint that they have not answered
    checkpoints_sent: BTreeMap<u64, u32>,
    /// see [`crate::sleep`]
    pub(crate) sleep: Sleep,
}

/// A checkpoint that was not answered by then is sent again: it, or its answer, was lost with a connection. Raft would wait for ever.
const CHECKPOINT_ANSWER_TICKS: u32 = 40;

/// Ticks for which a replica that should not lead leaves an election to others.
const HELD_BACK_TICKS: u32 = 40;

/// Ticks between the turns of those that hurry to replace a leader.
const HURRY_TICKS: usize = 3;
const NO_LIMIT_ERROR: &str = "raft accepts its own configuration";

impl Group {
    /// Opens a group as the store has it. An error means the replica's data is damaged.
    pub fn open(stored: &StoredGroup, store: Arc<dyn Store>, limits: &Limits) -> Result<Self, StoreError> {
        let newest = stored.checkpoints.last();
        let checkpoint_index = newest.map_or(0, |c| c.index);
        let mut hard = stored.hard;
        if hard.commit > stored.last_index {
            let what = format!("index {} was committed, the log ends before", hard.commit);
            return Err(StoreError::Damaged { group: stored.group, index: stored.last_index, what });
        }
        hard.commit = hard.commit.max(checkpoint_index);
        hard.term = hard.term.max(newest.map_or(0, |c| c.term));
        let log = GroupLog::new(stored.group, store, hard, &stored.checkpoints, stored.last_index);
        log.load_tail()?;
        let config = Config {
            id: stored.replica.0,
            election_tick: limits.election_ticks,
            heartbeat_tick: limits.heartbeat_ticks,
            min_election_tick: limits.election_ticks,
            max_election_tick: limits.election_ticks * 2,
            applied: checkpoint_index,
            max_size_per_msg: limits.message_bytes_max,
            max_inflight_msgs: 64,
            check_quorum: true,
            pre_vote: true,
            max_uncommitted_size: limits.uncommitted_bytes_max,
            max_committed_size_per_ready: 16 << 20,
            // partitions' followers hear of it with what is appended next, or the heartbeat; metadata is looked at everywhere
            skip_bcast_commit: stored.group != META_GROUP,
            ..Default::default()
        };
        let conf = log.initial_state().expect("reads memory").conf_state;
        let raft = RawNode::new(&config, log, &slog::Logger::root(slog::Discard, slog::o!())).expect(NO_LIMIT_ERROR);
        let machine = Machine::decode(stored.group, newest)?;
        raft.store().tail().raise_start_offset(machine.start_offset());
        let sums =
            newest.map_or(LogSums::default(), |c| LogSums { bytes: c.log_bytes, append_time_ms: c.append_time_ms });
        Ok(Self {
            id: stored.group,
            replica: stored.replica,
            raft,
            machine,
            sums,
            applied: checkpoint_index,
            conf,
            conf_index: checkpoint_index,
            lead: None,
            waiting: BTreeMap::new(),
            brokers: BTreeMap::new(),
            outstanding: 0,
            outstanding_sync: 0,
            vote_written: (hard.term, hard.vote),
            installed: None,
            known_leader: None,
            memory: false,
            cut_seen: 0,
            retention_bytes: 0,
            limits: limits.clone(),
            leader_since_ms: 0,
            hurry: false,
            held_back: 0,
            checkpoints_sent: BTreeMap::new(),
            sleep: Sleep::default(),
        })
    }

    /// The group.
    pub fn id(&self) -> GroupId {
        self.id
    }

    /// This replica of it.
    pub fn replica(&self) -> ReplicaId {
        self.replica
    }

    /// Applied state.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The log.
    pub fn log(&self) -> &GroupLog {
        self.raft.store()
    }

    /// Applied membership.
    pub fn conf(&self) -> &ConfState {
        &self.conf
    }

    /// Whether this replica leads and takes proposals.
    pub fn is_leader(&self) -> bool {
        self.raft.raft.state == StateRole::Leader
    }

    /// Whether this replica leads and has applied all that was committed before. A new leader has not: until its own first entry
    /// is committed it may lack what was acknowledged, and it must not say where the log ends (Raft, §8 of the extended paper,
    /// <https://raft.github.io/raft.pdf>).
    pub fn serves(&self) -> bool {
        self.is_leader() && self.lead.as_ref().is_some_and(|l| l.term == self.term() && l.begun <= self.applied)
    }

    /// Raft term.
    pub fn term(&self) -> u64 {
        self.raft.raft.term
    }

    /// The leader this replica knows of.
    pub fn leader(&self) -> Option<ReplicaId> {
        (self.raft.raft.leader_id != 0).then_some(ReplicaId(self.raft.raft.leader_id))
    }

    /// Index of the last entry applied.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// Index of the last entry of the log.
    pub fn last_index(&self) -> u64 {
        self.raft.raft.raft_log.last_index()
    }

    /// Committed but not yet applied or proposed but not yet committed entries.
    pub fn unapplied(&self) -> u64 {
        self.raft.raft.raft_log.last_index() - self.applied
    }

    /// Bytes kept of the log.
    pub fn kept_bytes(&self) -> u64 {
        self.sums.bytes - self.log().oldest().map_or(0, |c| c.log_bytes)
    }

    /// Bytes of log since the group's beginning.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.sums.bytes
    }

    /// Bytes that a replica lacks of `entries`, by the average entry.
    pub(crate) fn bytes_of(&self, entries: u64) -> u64 {
        let (first, last) = (self.log().oldest().map_or(0, |c| c.index), self.last_index());
        let average = self.kept_bytes() / last.saturating_sub(first).max(1);
        entries.saturating_mul(average).min(self.kept_bytes())
    }

    /// Whether a replica has nearly all of the leader's log and was heard of lately.
    pub fn caught_up(&self, replica: u64) -> bool {
        let last = self.raft.raft.raft_log.last_index();
        let there = |p: &Progress| p.recent_active || self.is_asleep();
        self.raft.raft.prs().get(replica).is_some_and(|p| there(p) && p.matched + 64 > last && p.matched > 0)
    }

    /// Whether a majority of the voters has nearly all of the log, and is there, without this replica, which leads.
    pub fn can_be_spared(&self) -> bool {
        let voters = &self.conf.voters;
        let others = voters.iter().filter(|id| **id != self.replica.0 && self.caught_up(**id)).count();
        self.is_leader() && self.conf.voters_outgoing.is_empty() && others > voters.len() / 2
    }

    /// Whether a majority of the voters has on disk that the membership is what it is: an entry that was sent once it was committed.
    /// Without that, should this leader's disk be lost now, the others would need the votes of replicas that it has taken out.
    pub(crate) fn membership_is_on_disk(&mut self, now_ms: u64) -> bool {
        let Some(lead) = self.lead.as_ref().filter(|l| l.term == self.raft.raft.term) else { return false };
        if lead.marker <= self.conf_index {
            let context = lead.context(Kind::Control, 0, now_ms);
            if let Ok(index) = self.propose(&context, Control::default().to_bytes()) {
                self.lead.as_mut().expect("still leader").marker = index;
            }
            return false;
        }
        let marker = lead.marker;
        let has = |id: &&u64| self.raft.raft.prs().get(**id).is_some_and(|p| p.matched >= marker);
        self.conf.voters.iter().filter(has).count() > self.conf.voters.len() / 2
    }

    /// How many entries a replica lacks, as the leader knows.
    pub fn lag(&self, replica: u64) -> Option<u64> {
        let last = self.raft.raft.raft_log.last_index();
        self.raft.raft.prs().get(replica).map(|p| last.saturating_sub(p.matched))
    }

    /// Lets time pass; `salt` chooses this replica's election timeout. One that `holds_back` leaves elections to others for a while.
    pub fn tick(&mut self, salt: u64, holds_back: bool) {
        self.count_idle(); // before the tick, which may have heartbeats to send
        if holds_back {
            self.hold_back();
        }
        self.raft.tick();
        self.choose_timeout(salt);
        if self.is_leader() {
            self.watch_checkpoints();
        }
    }

    /// Puts off an election that is due. Votes for others are given as usual.
    fn hold_back(&mut self) {
        let raft = &mut self.raft.raft;
        if raft.state == StateRole::Leader || raft.election_elapsed < self.limits.election_ticks {
            self.held_back = 0;
        } else if raft.election_elapsed + 1 >= raft.randomized_election_timeout() && self.held_back < HELD_BACK_TICKS {
            self.held_back += 1;
            raft.election_elapsed -= 1;
        }
    }

    fn watch_checkpoints(&mut self) {
        let waits = |(id, progress): (&u64, &Progress)| (progress.state == ProgressState::Snapshot).then_some(*id);
        let waiting: Vec<u64> = self.raft.raft.prs().iter().filter_map(waits).collect();
        self.checkpoints_sent.retain(|id, _| waiting.contains(id));
        for id in waiting {
            let ticks = self.checkpoints_sent.entry(id).or_default();
            *ticks += 1;
            if *ticks >= CHECKPOINT_ANSWER_TICKS {
                *ticks = 0;
                self.raft.report_snapshot(id, SnapshotStatus::Failure);
            }
        }
    }

    /// raft-rs draws election timeouts from the thread's randomness; ours come from the node's seed, so a schedule can be run again.
    fn choose_timeout(&mut self, salt: u64) {
        // heard from a leader, or stood for election: back to waiting
        self.hurry &= self.raft.raft.election_elapsed >= self.limits.election_ticks;
        if self.hurry {
            let ticks = self.limits.election_ticks + self.turn() * HURRY_TICKS;
            self.raft.raft.set_randomized_election_timeout(ticks.min(2 * self.limits.election_ticks - 1));
            return;
        }
        let mixed = crate::node::mix(salt ^ crate::node::mix(self.replica.0 ^ (self.id.0 << 20) ^ (self.term() << 40)));
        let ticks = self.limits.election_ticks + (mixed % self.limits.election_ticks as u64) as usize;
        self.raft.raft.set_randomized_election_timeout(ticks);
    }

    /// The connection from a broker broke, as it does when its process ends. Where the leader was there, its lease counts
    /// no more for this replica, and the first in turn stands for election with the next tick. Should the leader live, the
    /// others have not lost it, and their answers to the pre-vote keep it.
    pub fn lost_contact(&mut self, broker: BrokerId) {
        let leader = self.leader().filter(|l| *l != self.replica);
        if leader.is_some_and(|l| self.brokers.get(&l.0) == Some(&broker)) {
            self.raft.raft.election_elapsed = self.raft.raft.election_elapsed.max(self.limits.election_ticks);
            self.hurry = true;
        }
    }

    /// This replica's place among those that may follow the leader, another for each group: two that stand at once both lose.
    fn turn(&self) -> usize {
        let leader = self.leader().map_or(0, |l| l.0);
        let followers: Vec<u64> = self.conf.voters.iter().copied().filter(|id| *id != leader).collect();
        let place = followers.iter().position(|id| *id == self.replica.0).unwrap_or(0);
        (place + self.id.0 as usize) % followers.len().max(1)
    }

    /// The index up to which a follower's log is committed, where a message shows that the leader's log is another one there, or ends
    /// before. Raft drops what such a follower refuses; with intact disks it cannot happen.
    pub(crate) fn committed_beyond(&self, message: &Message) -> Option<u64> {
        match message.msg_type {
            MessageType::MsgAppendResponse | MessageType::MsgHeartbeatResponse if self.is_leader() => {
                let matched = if message.reject { 0 } else { message.index };
                let said =
                    message.commit.max(if message.msg_type == MessageType::MsgAppendResponse { matched } else { 0 });
                (message.term == self.term() && said > self.last_index()).then_some(said)
            }
            MessageType::MsgAppend
                if message.term >= self.term() && message.index < self.raft.raft.raft_log.committed =>
            {
                let committed = self.raft.raft.raft_log.committed;
                let other = |index: u64, term: u64| self.log().term(index).is_ok_and(|here| here != term);
                let entries = message.entries.iter().filter(|e| e.index <= committed);
                let contradicts =
                    other(message.index, message.log_term) || entries.clone().any(|e| other(e.index, e.term));
                contradicts.then_some(committed)
            }
            _ => None,
        }
    }

    /// Takes a peer's message. Refused before any state changes: a term far beyond ours.
    /// `Err` means that this replica forgot what it once acknowledged.
    pub fn step(&mut self, message: Message, salt: u64) -> Result<(), StoreError> {
        if message.term > self.term() + self.limits.term_jump_max {
            return Ok(());
        }
        let last = self.raft.raft.raft_log.last_index();
        if message.get_msg_type() == MessageType::MsgHeartbeat && message.term >= self.term() && message.commit > last {
            let what = format!("the leader saw index {} acknowledged here", message.commit);
            return Err(StoreError::Damaged { group: self.id, index: last, what });
        }
        if !self.says_nothing_new(&message) {
            self.wake(0);
        }
        // a message Raft does not want is dropped, as the network might have
        let _ = self.raft.step(message);
        self.choose_timeout(salt);
        Ok(())
    }

    /// Reads that followers wait for and that were not handed out yet.
    pub(crate) fn take_fetches(&self) -> impl Iterator<Item = Fetch> + '_ {
        let high = self.log().tail().first_index();
        let (group, bytes_max) = (self.id, self.limits.fetch_bytes);
        self.log().take_wanted().into_iter().filter(move |low| *low < high).map(move |low| Fetch {
            group,
            low,
            high,
            bytes_max,
        })
    }

    /// What was read for followers that are behind: it is sent to them. `Err` means that this replica is damaged.
    pub(crate) fn fetched(&mut self, low: u64, read: Result<Vec<Entry>, StoreError>) -> Result<(), StoreError> {
        if !self.log().awaits(low) {
            return Ok(()); // leadership went meanwhile, or the log was replaced
        }
        let truncated = low <= self.log().oldest().map_or(0, |c| c.index);
        let entries = match read {
            Ok(entries) => entries,
            Err(_) if truncated => Vec::new(), // retention was faster: Raft sends a checkpoint
            Err(error) => {
                self.log().fetched(low, Vec::new()); // nobody waits for it any more; who needs it asks again
                return Err(error);
            }
        };
        for context in self.log().fetched(low, entries) {
            self.raft.on_entries_fetched(context);
        }
        self.log().drop_fetched();
        Ok(())
    }

    /// Stands for election at once (a group of one need not wait).
    pub fn campaign(&mut self) {
        self.wake(0);
        let _ = self.raft.campaign();
    }

    /// Hands leadership to `to`.
    pub fn transfer(&mut self, to: u64) {
        if self.is_leader() && self.raft.raft.lead_transferee.is_none() {
            self.wake(0);
            self.raft.transfer_leader(to);
        }
    }

    /// Proposes a batch whose header was checked. The answer comes when a majority has it, or when it was refused.
    pub fn publish(
        &mut self,
        ticket: Ticket,
        data: Bytes,
        header: &BatchHeader,
        now_ms: u64,
        no_room: Option<Refusal>,
    ) -> Result<(), Refusal> {
        let Some(lead) = self.lead.as_ref().filter(|l| l.term == self.raft.raft.term) else {
            return Err(Refusal::NotLeader);
        };
        if let Some(stamp) = &header.producer
            && let Verdict::Duplicate { base_offset } =
                lead.producers.check(stamp, header.count).map_err(Refusal::Sequence)?
        {
            self.answer_duplicate(ticket, base_offset, base_offset + u64::from(header.count));
            return Ok(());
        }
        // after the look at what is there: a refusal says that it is not
        if let Some(refusal) = no_room {
            return Err(refusal);
        }
        let context = lead.context(Kind::Batch, header.count, now_ms);
        let Context { base_offset, append_time_ms, .. } = context;
        let index = self.propose(&context, data)?;
        let lead = self.lead.as_mut().expect("still leader");
        lead.next_offset = context.end_offset();
        lead.in_flight.push_back((context.end_offset(), index));
        if let Some(stamp) = &header.producer {
            lead.producers.record(stamp, header.count, base_offset);
        }
        self.wait(index, Waiter::Publish { ticket, base_offset, append_time_ms });
        Ok(())
    }

    fn answer_duplicate(&mut self, ticket: Ticket, base_offset: u64, end_offset: u64) {
        let lead = self.lead.as_ref().expect("asked as leader");
        // what is in flight waits for its commit; what is not was applied
        let at = lead.in_flight.partition_point(|(end, _)| *end < end_offset);
        let pending = (end_offset > self.machine.next_offset()).then(|| lead.in_flight.get(at)).flatten();
        let index = pending.map_or(0, |(_, index)| *index);
        self.wait(index, Waiter::Publish { ticket, base_offset, append_time_ms: self.sums.append_time_ms });
    }

    /// Proposes a control record.
    pub fn control(&mut self, ticket: Ticket, control: &Control, now_ms: u64) -> Result<(), Refusal> {
        self.propose_small(ticket, Kind::Control, control.to_bytes(), now_ms)
    }

    /// Proposes a command to the metadata group.
    pub fn command(&mut self, ticket: Ticket, command: &Command, now_ms: u64) -> Result<(), Refusal> {
        self.propose_small(ticket, Kind::Meta, command.encode_to_vec().into(), now_ms)
    }

    fn propose_small(&mut self, ticket: Ticket, kind: Kind, data: Bytes, now_ms: u64) -> Result<(), Refusal> {
        let Some(lead) = self.lead.as_ref().filter(|l| l.term == self.raft.raft.term) else {
            return Err(Refusal::NotLeader);
        };
        let context = lead.context(kind, 0, now_ms);
        let index = self.propose(&context, data)?;
        self.wait(index, Waiter::Done { ticket });
        Ok(())
    }

    fn propose(&mut self, context: &Context, data: Bytes) -> Result<u64, Refusal> {
        if self.raft.raft.lead_transferee.is_some() {
            return Err(Refusal::NotLeader);
        }
        self.wake(0);
        let mut message = Message { from: self.replica.0, ..Default::default() };
        message.set_msg_type(MessageType::MsgPropose);
        // not `RawNode::propose`: it takes a Vec, and the batch would be copied
        message.set_entries(vec![Entry { data, context: context.encode(), ..Default::default() }].into());
        self.raft.raft.step(message).map_err(|_| Refusal::Overloaded)?;
        if let Some(lead) = &mut self.lead {
            lead.append_time_ms = context.append_time_ms;
        }
        Ok(self.raft.raft.raft_log.last_index())
    }

    fn wait(&mut self, index: u64, waiter: Waiter) {
        self.waiting.entry(index).or_default().push(waiter);
    }

    /// Whether the applied cursors are all there are: what earlier leaders and this one proposed about them is applied.
    pub(crate) fn knows_cursors(&self) -> bool {
        self.is_leader() && self.lead.as_ref().is_some_and(|l| l.cursors_from <= self.applied)
    }

    /// Cursors were proposed just now.
    pub(crate) fn proposed_cursors(&mut self) {
        let last = self.last_index();
        if let Some(lead) = &mut self.lead {
            lead.cursors_from = last;
        }
    }

    /// Proposes a membership change.
    pub fn change_membership(&mut self, change: &ConfChangeV2) {
        if !self.raft.raft.has_pending_conf() {
            self.wake(0);
            let _ = self.raft.propose_conf_change(Vec::new(), change.clone());
        }
    }

    pub(crate) fn has_nothing_under_way(&self) -> bool {
        self.outstanding == 0 && self.installed.is_none() && self.waiting.is_empty() && !self.hurry
    }

    /// Whether Raft has work.
    pub fn has_work(&self) -> bool {
        self.raft.has_ready() || self.waiting.first_key_value().is_some_and(|(i, _)| *i <= self.applied)
    }

    /// Handles all that Raft wants now.
    pub(crate) fn drain(
        &mut self,
        ops: &mut Vec<WriteOp>,
        parts: &mut Vec<Part>,
        out: &mut Effects,
    ) -> Result<(), StoreError> {
        while self.raft.has_ready() {
            let mut ready = self.raft.ready();
            let number = ready.number();
            self.send(ready.take_messages(), out);
            let mut sync = false;
            if !ready.snapshot().is_empty() {
                self.install(&ready.snapshot().data.clone(), ops, out)?;
                sync = true;
            }
            let entries = ready.take_entries();
            if !entries.is_empty() || ready.must_sync() {
                let hs = self.raft.raft.hard_state();
                let hard = HardState { term: hs.term, vote: hs.vote, commit: hs.commit };
                ops.push(WriteOp::SetHardState { group: self.id, hard });
                let vote = (hard.term, hard.vote);
                sync |= !self.memory || vote != self.vote_written;
                self.vote_written = vote;
            }
            if !entries.is_empty() {
                let replace_from = self.raft.mut_store().append(&entries);
                ops.push(WriteOp::Append { group: self.id, entries, replace_from });
            } else if !ready.must_sync() && self.outstanding == 0 {
                // nothing to write and nothing before it under way
                let messages = ready.take_persisted_messages();
                let committed = ready.take_committed_entries();
                self.raft.advance_append_async(ready);
                self.raft.on_persist_ready(number);
                self.send(messages, out);
                self.apply(committed, out);
                self.after_apply(ops);
                continue;
            }
            let messages = ready.take_persisted_messages();
            let committed = ready.take_committed_entries();
            self.raft.advance_append_async(ready);
            let sync = sync || self.outstanding_sync > 0;
            self.outstanding += 1;
            self.outstanding_sync += u32::from(sync);
            parts.push(Part { group: self.id, number, sync, messages });
            self.apply(committed, out);
            self.after_apply(ops);
        }
        self.sync_role(out);
        self.answer(out);
        Ok(())
    }

    fn send(&self, messages: Vec<Message>, out: &mut Effects) {
        for message in messages {
            if let Some(broker) = self.brokers.get(&message.to) {
                let envelope = Envelope { group: self.id, message };
                out.messages.push((*broker, envelope));
            }
        }
    }

    /// A part of a round is on disk.
    pub(crate) fn persisted(&mut self, part: Part, out: &mut Effects) {
        self.outstanding -= 1;
        self.outstanding_sync -= u32::from(part.sync);
        self.raft.on_persist_ready(part.number);
        if let Some(index) = self.installed.filter(|_| self.outstanding == 0) {
            self.installed = None;
            if index > self.raft.raft.raft_log.applied {
                self.raft.advance_apply_to(index);
            }
        }
        self.send(part.messages, out);
    }

    fn install(&mut self, data: &Bytes, ops: &mut Vec<WriteOp>, out: &mut Effects) -> Result<(), StoreError> {
        let damaged = |e: prost::DecodeError| StoreError::Damaged { group: self.id, index: 0, what: e.to_string() };
        let checkpoint = Checkpoint::decode(data.clone()).map_err(damaged)?;
        self.machine = Machine::decode(self.id, Some(&checkpoint))?;
        self.sums = LogSums { bytes: checkpoint.log_bytes, append_time_ms: checkpoint.append_time_ms };
        self.applied = checkpoint.index;
        self.conf = checkpoint.conf_state();
        self.conf_index = checkpoint.index;
        ops.push(WriteOp::Install { group: self.id, checkpoint: checkpoint.clone() });
        self.installed = Some(checkpoint.index);
        out.advanced.push((self.id, checkpoint.next_offset));
        if let Machine::Meta(state) = &self.machine {
            out.meta = Some(state.clone());
        }
        self.raft.mut_store().install(checkpoint);
        self.log().tail().raise_start_offset(self.machine.start_offset());
        Ok(())
    }

    fn apply(&mut self, committed: Vec<Entry>, out: &mut Effects) {
        let Some(last) = committed.last().map(|e| e.index) else { return };
        let before = self.machine.next_offset();
        for entry in committed {
            self.sums.add(&entry);
            self.applied = entry.index;
            match entry.get_entry_type() {
                EntryType::EntryNormal => self.apply_normal(&entry, out),
                _ => self.apply_membership(&entry),
            }
        }
        self.raft.advance_apply_to(last);
        let next = self.machine.next_offset();
        self.log().tail().set_high_watermark(next);
        self.log().tail().raise_start_offset(self.machine.start_offset());
        if next != before {
            out.advanced.push((self.id, next));
        }
    }

    fn apply_normal(&mut self, entry: &Entry, out: &mut Effects) {
        let mut answer = None;
        match &mut self.machine {
            Machine::Partition(state) => state.apply(entry),
            Machine::Meta(state) => {
                let command = Context::of(entry).filter(|c| c.kind == Kind::Meta);
                if let Some(Ok(command)) = command.map(|_| Command::decode(entry.data.clone())) {
                    answer = Some(Arc::make_mut(state).apply(&command));
                    out.meta = Some(state.clone());
                }
            }
        }
        let ours = self.lead.as_ref().is_some_and(|l| l.term == entry.term);
        if let Some(answer) = answer.filter(|_| ours) {
            let waiters = self.waiting.remove(&entry.index).unwrap_or_default();
            for waiter in waiters {
                let Waiter::Done { ticket } = waiter else { continue };
                out.replies.push((ticket, Reply::Meta(answer.clone())));
            }
        }
    }

    fn apply_membership(&mut self, entry: &Entry) {
        let change = decode_change(&entry.data);
        let Ok(conf) = self.raft.apply_conf_change(&change) else { return };
        let votes = conf.voters.contains(&self.replica.0) || conf.voters_outgoing.contains(&self.replica.0);
        self.conf = conf;
        self.conf_index = entry.index;
        // no leader removes itself, but one that was elected after its removal was proposed does. Raft would let it lead on, and
        // panic at the next acknowledgement
        if self.is_leader() && !votes {
            let term = self.term();
            self.raft.raft.become_follower(term, raft::INVALID_ID);
        }
    }

    fn after_apply(&mut self, ops: &mut Vec<WriteOp>) {
        if let Some(lead) = &mut self.lead {
            while lead.in_flight.front().is_some_and(|(_, index)| *index <= self.applied) {
                lead.in_flight.pop_front();
            }
        }
        let cut = match &self.machine {
            Machine::Partition(state) => state.cut.index,
            Machine::Meta(_) => 0,
        };
        if cut > self.cut_seen {
            self.cut_seen = cut;
            let _ = self.remove_cut(ops); // what cannot be removed now is with the next look at retention
        }
        let newest = self.log().checkpoints().back().copied();
        if newest.is_some_and(|c| self.sums.bytes - c.log_bytes >= self.limits.checkpoint_bytes) {
            self.checkpoint(ops);
        }
    }

    /// Writes a checkpoint of the applied state, if anything was applied since the last.
    pub(crate) fn checkpoint(&mut self, ops: &mut Vec<WriteOp>) {
        let Some(newest) = self.log().checkpoints().back().copied().filter(|c| c.index < self.applied) else { return };
        assert!(newest.log_bytes <= self.sums.bytes);
        let Ok(term) = self.log().term(self.applied) else { return };
        let mut checkpoint = Checkpoint {
            index: self.applied,
            term,
            next_offset: self.machine.next_offset(),
            log_bytes: self.sums.bytes,
            append_time_ms: self.sums.append_time_ms,
            state: self.machine.encode(),
            ..Default::default()
        };
        checkpoint.set_conf_state(&self.conf);
        self.raft.mut_store().add_checkpoint(&checkpoint);
        ops.push(WriteOp::PutCheckpoint { group: self.id, checkpoint });
        if self.log().checkpoints().len() > self.limits.checkpoints_max {
            for index in self.raft.mut_store().thin_checkpoints() {
                ops.push(WriteOp::DropCheckpoint { group: self.id, index });
            }
        }
    }

    /// Proposes where the log is cut, once for each place.
    pub(crate) fn propose_cut(&mut self, cut: Cut, now_ms: u64) {
        if self.lead.as_ref().is_none_or(|l| l.cut >= cut.index) {
            return;
        }
        let control = Control { cut: Some(cut), ..Default::default() };
        if self.control(Ticket(0), &control, now_ms).is_ok()
            && let Some(lead) = &mut self.lead
        {
            lead.cut = cut.index;
        }
    }

    /// The checkpoint that the start of the log may move to, as far as the leaders' decision allows it.
    fn cut_point(&self) -> Option<u64> {
        let Machine::Partition(state) = &self.machine else { return None };
        let oldest = self.log().oldest().map_or(0, |c| c.index);
        let points = self.log().checkpoints().iter().rev().map(|c| c.index);
        points.take_while(|i| *i > oldest).find(|i| *i <= state.cut.index)
    }

    /// Removes what retention no longer keeps.
    pub(crate) fn remove_cut(&mut self, ops: &mut Vec<WriteOp>) -> Result<(), StoreError> {
        self.cut_point().map_or(Ok(()), |index| self.truncate(index, ops).map(drop))
    }

    fn truncate(&mut self, index: u64, ops: &mut Vec<WriteOp>) -> Result<bool, StoreError> {
        let Some(info) = self.raft.mut_store().truncate(index)? else { return Ok(false) };
        ops.push(WriteOp::Truncate { group: self.id, index: info.index, offset: info.next_offset });
        Ok(true)
    }

    /// Bytes of entries that were taken on and are in no round yet.
    pub(crate) fn undrained_bytes(&self) -> u64 {
        disk_bytes(&self.raft.raft.raft_log.unstable.entries)
    }

    /// Drops applied and persisted entries from memory until at most `bytes_max` are left.
    pub(crate) fn evict(&mut self, bytes_max: u64) {
        let upto = self.applied.min(self.raft.raft.raft_log.persisted);
        self.log().tail().evict(upto, bytes_max);
    }

    fn sync_role(&mut self, out: &mut Effects) {
        let term = self.raft.raft.term;
        let leads = self.is_leader();
        if self.leader() != self.known_leader {
            self.known_leader = self.leader();
            out.leaders.push(self.id);
        }
        if self.lead.as_ref().is_some_and(|l| !leads || l.term != term) {
            self.lead = None;
            self.log().forget_fetches();
            self.fail_waiters(out);
            out.leaders.push(self.id);
        }
        if leads && self.lead.is_none() {
            self.lead = Some(self.build_lead(term));
            self.leader_since_ms = 0;
            let info = LeaderInfo { group: self.id, term, settled_epoch: None, damaged: ReplicaId(0) };
            out.announce.push(info); // brokers without a replica send clients here
            out.leaders.push(self.id);
        }
        let serves = self.serves();
        if let Some(lead) = self.lead.as_mut().filter(|l| l.serves != serves) {
            lead.serves = serves;
            out.leaders.push(self.id);
        }
    }

    /// A new leader's view of the end of its log: the applied state, and the entries behind it that are not applied yet.
    fn build_lead(&self, term: u64) -> Lead {
        let mut lead = Lead {
            term,
            next_offset: self.log().tail().end_offset(),
            begun: self.last_index(),
            append_time_ms: self.sums.append_time_ms,
            cut: 0,
            serves: false,
            cursors_from: self.last_index(),
            marker: 0,
            producers: ProducerTable::default(),
            in_flight: Default::default(),
        };
        if let Machine::Partition(state) = &self.machine {
            let mut end = PartitionState {
                producers: state.producers.clone(),
                next_offset: state.next_offset,
                ..Default::default()
            };
            let last = self.raft.raft.raft_log.last_index();
            let pending = if last > self.applied {
                self.log().tail().entries(self.applied + 1, last + 1, u64::MAX)
            } else {
                None
            };
            for entry in pending.unwrap_or_default() {
                end.apply(&entry);
                let stamped = Context::of(&entry).map_or(0, |c| c.append_time_ms);
                lead.append_time_ms = lead.append_time_ms.max(stamped);
                lead.in_flight.push_back((end.next_offset, entry.index));
            }
            lead.producers = end.producers;
        }
        lead
    }

    pub(crate) fn fail_waiters(&mut self, out: &mut Effects) {
        for waiter in std::mem::take(&mut self.waiting).into_values().flatten() {
            let (Waiter::Publish { ticket, .. } | Waiter::Done { ticket }) = waiter;
            out.replies.push((ticket, Reply::Refused(Refusal::LeadershipLost)));
        }
    }

    fn answer(&mut self, out: &mut Effects) {
        while let Some(first) = self.waiting.first_entry().filter(|e| *e.key() <= self.applied) {
            for waiter in first.remove() {
                out.replies.push(match waiter {
                    Waiter::Publish { ticket, base_offset, append_time_ms } => {
                        (ticket, Reply::Published { base_offset, append_time_ms })
                    }
                    Waiter::Done { ticket } => (ticket, Reply::Done),
                });
            }
        }
    }
}

// The wire form of a membership change, read by prost: bytes of a peer never meet rust-protobuf's parser.
#[derive(Clone, PartialEq, prost::Message)]
struct WireChange {
    #[prost(int32, tag = "1")]
    transition: i32,
    #[prost(message, repeated, tag = "2")]
    changes: Vec<WireSingle>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct WireSingle {
    #[prost(int32, tag = "1")]
    kind: i32,
    #[prost(uint64, tag = "2")]
    node: u64,
}

fn decode_change(data: &Bytes) -> ConfChangeV2 {
    let wire = WireChange::decode(data.clone()).unwrap_or_default();
    let mut out = ConfChangeV2::default();
    out.set_transition(match wire.transition {
        1 => ConfChangeTransition::Implicit,
        2 => ConfChangeTransition::Explicit,
        _ => ConfChangeTransition::Auto,
    });
    let single = |w: &WireSingle| {
        let mut c = ConfChangeSingle { node_id: w.node, ..Default::default() };
        c.set_change_type(match w.kind {
            1 => ConfChangeType::RemoveNode,
            2 => ConfChangeType::AddLearnerNode,
            _ => ConfChangeType::AddNode,
        });
        c
    };
    out.set_changes(wire.changes.iter().map(single).collect::<Vec<_>>().into());
    out
}
