//! One group's log as Raft sees it: the shared tail in memory, the store behind it.

use crate::entry::entry_bytes;
use crate::ids::GroupId;
use crate::storage::{Checkpoint, HardState, Store, StoreError};
use crate::tail::Tail;
use raft::eraftpb::{ConfState, Entry, HardState as RaftHardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Result as RaftResult, Storage, StorageError};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// What stays in memory of each checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointInfo {
    /// Raft index.
    pub index: u64,
    /// High watermark there.
    pub next_offset: u64,
    /// Bytes of log up to there.
    pub log_bytes: u64,
    /// Append time of the last entry up to there, ms since the epoch.
    pub append_time_ms: u64,
}

impl From<&Checkpoint> for CheckpointInfo {
    fn from(c: &Checkpoint) -> Self {
        Self { index: c.index, next_offset: c.next_offset, log_bytes: c.log_bytes, append_time_ms: c.append_time_ms }
    }
}

/// Old entries that followers behind the tail need: read from the store by others than the core, which does not wait for a disk.
#[derive(Default)]
struct Fetching {
    /// asked for, by first index: whom to send them to once they are here, and whether the read was handed out
    wanted: BTreeMap<u64, (Vec<GetEntriesContext>, bool)>,
    /// read, by first index
    here: BTreeMap<u64, Vec<Entry>>,
    /// terms before a read, by index
    terms: BTreeMap<u64, u64>,
}

impl Fetching {
    /// Entries from `low` on that were read, at least one and at most so many bytes: one read serves several messages.
    fn read_from(&self, low: u64, bytes_max: u64) -> Option<Vec<Entry>> {
        let (first, entries) = self.here.range(..=low).next_back()?;
        let from = usize::try_from(low - first).ok().filter(|from| *from < entries.len())?;
        let mut bytes = 0;
        let fits = |e: &&Entry| {
            bytes += entry_bytes(e);
            bytes <= bytes_max
        };
        let count = entries[from..].iter().take_while(fits).count().max(1);
        Some(entries[from..from + count].to_vec())
    }

    /// Term of an entry that was read, or of the last of a read before.
    fn term(&self, index: u64) -> Option<u64> {
        let here = || {
            let (first, entries) = self.here.range(..=index).next_back()?;
            entries.get(usize::try_from(index - first).ok()?).map(|e| e.term)
        };
        self.terms.get(&index).copied().or_else(here)
    }
}

/// Reads under way for one group; beyond them a follower is asked again with its next heartbeat.
const FETCHES_MAX: usize = 8;

/// The log of one group.
pub struct GroupLog {
    group: GroupId,
    store: Arc<dyn Store>,
    tail: Arc<Tail>,
    hard: HardState,
    conf: ConfState,
    /// the truncation point; `None` for a replica that waits for its first checkpoint
    oldest: Option<Checkpoint>,
    checkpoints: VecDeque<CheckpointInfo>,
    last_index: u64,
    fetching: RefCell<Fetching>,
    /// a read that Raft asked for and that failed, until it is taken
    failed: RefCell<Option<StoreError>>,
}

impl GroupLog {
    /// A log as it was found in the store; the newest checkpoint gives membership and applied state.
    pub fn new(
        group: GroupId,
        store: Arc<dyn Store>,
        hard: HardState,
        checkpoints: &[Checkpoint],
        last_index: u64,
    ) -> Self {
        let newest = checkpoints.last();
        let tail = Arc::new(Tail::default());
        tail.reset(newest.map_or(0, |c| c.index) + 1, newest.map_or(0, |c| c.next_offset));
        tail.set_high_watermark(newest.map_or(0, |c| c.next_offset));
        tail.set_start_offset(checkpoints.first().map_or(0, |c| c.next_offset));
        Self {
            group,
            store,
            tail,
            hard,
            conf: newest.map(Checkpoint::conf_state).unwrap_or_default(),
            oldest: checkpoints.first().cloned(),
            checkpoints: checkpoints.iter().map(CheckpointInfo::from).collect(),
            last_index: last_index.max(newest.map_or(0, |c| c.index)),
            fetching: RefCell::default(),
            failed: RefCell::default(),
        }
    }

    /// First indexes of the reads that were asked for and not handed out yet; they count as handed out now.
    pub(crate) fn take_wanted(&self) -> Vec<u64> {
        let wanted = &mut self.fetching.borrow_mut().wanted;
        let new = wanted.iter_mut().filter(|(_, (_, out))| !out);
        new.map(|(low, (_, out))| {
            *out = true;
            *low
        })
        .collect()
    }

    /// Whether a read from `low` on is still waited for.
    pub(crate) fn awaits(&self, low: u64) -> bool {
        self.fetching.borrow().wanted.contains_key(&low)
    }

    /// What was read from `low` on; who waited for it.
    pub(crate) fn fetched(&self, low: u64, entries: Vec<Entry>) -> Vec<GetEntriesContext> {
        let mut fetching = self.fetching.borrow_mut();
        let Some((contexts, _)) = fetching.wanted.remove(&low) else { return Vec::new() };
        if let Some(last) = entries.last() {
            fetching.terms.insert(last.index, last.term);
            while fetching.terms.len() > 2 * FETCHES_MAX {
                fetching.terms.pop_first();
            }
            fetching.here.insert(low, entries);
        }
        contexts
    }

    /// A failed read since the last call. Raft takes the entry for one that retention removed, since it panics at any other error.
    pub(crate) fn take_failed(&self) -> Option<StoreError> {
        self.failed.borrow_mut().take()
    }

    /// Drops what was read and nobody took, and what was asked for: leadership went, or the log was replaced.
    pub(crate) fn forget_fetches(&self) {
        *self.fetching.borrow_mut() = Fetching::default();
    }

    /// What was read and is needed no more: all followers that waited have been served.
    pub(crate) fn drop_fetched(&self) {
        self.fetching.borrow_mut().here.clear();
    }

    fn fetch(&self, low: u64, bytes_max: u64, context: GetEntriesContext) -> RaftResult<Vec<Entry>> {
        let mut fetching = self.fetching.borrow_mut();
        if let Some(entries) = fetching.read_from(low, bytes_max) {
            return Ok(entries);
        }
        if let Some((contexts, _)) = fetching.wanted.get_mut(&low) {
            if contexts.len() < FETCHES_MAX {
                contexts.push(context);
            }
        } else if fetching.wanted.len() < FETCHES_MAX {
            fetching.wanted.insert(low, (vec![context], false));
        }
        Err(raft::Error::Store(StorageError::LogTemporarilyUnavailable))
    }

    /// Reads what follows the newest checkpoint into the tail. To be called once, before Raft starts.
    pub fn load_tail(&self) -> Result<(), StoreError> {
        let mut next = self.tail.first_index();
        while next <= self.last_index {
            let entries = self.store.entries(self.group, next, self.last_index + 1, 4 << 20)?;
            next += entries.len() as u64;
            self.tail.append(&entries);
        }
        Ok(())
    }

    /// The shared tail.
    pub fn tail(&self) -> &Arc<Tail> {
        &self.tail
    }

    /// The truncation point, which is also what a follower that is too far behind gets first.
    pub fn oldest(&self) -> Option<&Checkpoint> {
        self.oldest.as_ref()
    }

    /// All checkpoints, oldest first.
    pub fn checkpoints(&self) -> &VecDeque<CheckpointInfo> {
        &self.checkpoints
    }

    /// Takes appended entries into the tail; see [`Tail::append`].
    pub fn append(&mut self, entries: &[Entry]) -> Option<(u64, u64)> {
        let replaced = self.tail.append(entries);
        if let Some(last) = entries.last() {
            self.last_index = last.index;
        }
        replaced
    }

    /// Replaces everything by a checkpoint from the leader.
    pub fn install(&mut self, checkpoint: Checkpoint) {
        self.forget_fetches();
        self.tail.reset(checkpoint.index + 1, checkpoint.next_offset);
        self.tail.set_high_watermark(checkpoint.next_offset);
        self.tail.set_start_offset(checkpoint.next_offset);
        self.last_index = checkpoint.index;
        self.conf = checkpoint.conf_state();
        self.checkpoints = VecDeque::from([CheckpointInfo::from(&checkpoint)]);
        self.oldest = Some(checkpoint);
    }

    /// Remembers a new checkpoint.
    pub fn add_checkpoint(&mut self, checkpoint: &Checkpoint) {
        self.checkpoints.push_back(checkpoint.into());
    }

    /// Forgets every second checkpoint between the oldest and the newest; returns their indexes.
    pub fn thin_checkpoints(&mut self) -> Vec<u64> {
        let mut dropped = Vec::new();
        let last = self.checkpoints.len() - 1;
        let mut at = 0;
        self.checkpoints.retain(|c| {
            let keep = at == 0 || at == last || at % 2 == 0;
            at += 1;
            if !keep {
                dropped.push(c.index);
            }
            keep
        });
        dropped
    }

    /// Offset of the first record appended at or after `time_ms`; where the store cannot tell, of the first one kept. Reads the store.
    pub fn offset_at(&self, time_ms: u64) -> u64 {
        match self.tail.offset_at(&*self.store, self.group, time_ms) {
            Ok(found) => found.unwrap_or(self.tail.end_offset()),
            Err(_) => self.tail.start_offset(),
        }
    }

    /// Moves the truncation point to one of the checkpoints; `None` where it is not in the store yet.
    pub fn truncate(&mut self, index: u64) -> Result<Option<CheckpointInfo>, StoreError> {
        let Some(checkpoint) = self.store.checkpoint(self.group, index)? else { return Ok(None) };
        let info = CheckpointInfo::from(&checkpoint);
        self.checkpoints.retain(|c| c.index >= index);
        self.oldest = Some(checkpoint);
        self.tail.evict(index, 0);
        self.tail.raise_start_offset(info.next_offset);
        Ok(Some(info))
    }

    fn first(&self) -> u64 {
        self.oldest.as_ref().map_or(0, |c| c.index) + 1
    }
}

fn other(error: StoreError) -> raft::Error {
    match error {
        StoreError::Compacted { .. } => raft::Error::Store(StorageError::Compacted),
        error => raft::Error::Store(StorageError::Other(Box::new(error))),
    }
}

impl Storage for GroupLog {
    fn initial_state(&self) -> RaftResult<RaftState> {
        let HardState { term, vote, commit } = self.hard;
        let hard = RaftHardState { term, vote, commit, ..Default::default() };
        Ok(RaftState { hard_state: hard, conf_state: self.conf.clone() })
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        context: GetEntriesContext,
    ) -> RaftResult<Vec<Entry>> {
        if low < self.first() {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        let bytes_max = max_size.into().unwrap_or(u64::MAX);
        if let Some(entries) = self.tail.entries(low, high, bytes_max) {
            return Ok(entries);
        }
        if context.can_async() {
            return self.fetch(low, bytes_max, context);
        }
        let high = high.min(self.tail.first_index());
        self.store.entries(self.group, low, high, bytes_max).map_err(other)
    }

    fn term(&self, index: u64) -> RaftResult<u64> {
        if let Some(term) = self.tail.term(index) {
            return Ok(term);
        }
        match &self.oldest {
            Some(oldest) if index == oldest.index => Ok(oldest.term),
            Some(oldest) if index < oldest.index => Err(raft::Error::Store(StorageError::Compacted)),
            None if index == 0 => Ok(0),
            _ if index > self.last_index => Err(raft::Error::Store(StorageError::Unavailable)),
            _ => {
                if let Some(term) = self.fetching.borrow().term(index) {
                    return Ok(term);
                }
                match self.store.entries(self.group, index, index + 1, 0) {
                    Ok(entries) => {
                        self.fetching.borrow_mut().terms.insert(index, entries[0].term);
                        Ok(entries[0].term)
                    }
                    Err(error) => {
                        *self.failed.borrow_mut() = Some(error);
                        Err(raft::Error::Store(StorageError::Compacted))
                    }
                }
            }
        }
    }

    fn first_index(&self) -> RaftResult<u64> {
        Ok(self.first())
    }

    fn last_index(&self) -> RaftResult<u64> {
        Ok(self.last_index)
    }

    fn snapshot(&self, _request_index: u64, to: u64) -> RaftResult<Snapshot> {
        let Some(oldest) = &self.oldest else {
            return Err(raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable));
        };
        let mut checkpoint = oldest.clone();
        let conf = [&oldest.voters, &oldest.voters_outgoing, &oldest.learners];
        if !conf.iter().any(|ids| ids.contains(&to)) {
            // Raft takes a snapshot only as a member; a replica added since then is a learner by the log behind it anyway
            checkpoint.learners.push(to);
        }
        Ok(to_snapshot(&checkpoint))
    }
}

/// A checkpoint as Raft carries it.
pub fn to_snapshot(checkpoint: &Checkpoint) -> Snapshot {
    let mut snapshot = Snapshot::default();
    let meta = snapshot.mut_metadata();
    meta.index = checkpoint.index;
    meta.term = checkpoint.term;
    meta.set_conf_state(checkpoint.conf_state());
    snapshot.data = prost::Message::encode_to_vec(checkpoint).into();
    snapshot
}
